"""Rows with answers as files: JSON that any program reads, and masks that replace earlier ones with the table."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from pretrain.data.row_writer import RowWriter
from pretrain.data.tables import read_table
from pretrain.errors import DataError


def write(path: Path, values: list[int], error: type[BaseException] | None = None) -> None:
    with RowWriter(path, ["image"]) as output:
        for value in values:
            output.write({"image": f"{value}.png"}, {"mask": np.full((4, 4), value, np.uint8)})
        if error is not None:
            raise error


def held(path: Path) -> list[Any]:
    """The images of a table, and the values of the masks that it names."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    masks = [np.asarray(Image.open(path.parent / row["mask"])).max() for row in rows]
    return [[row["image"] for row in rows], masks]


def test_masks_are_replaced_with_their_table(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    write(out, [1, 2, 3])
    assert held(out) == [["1.png", "2.png", "3.png"], [1, 2, 3]]
    for error in (KeyboardInterrupt, DataError):
        with pytest.raises(error):
            write(out, [4], error)
        assert held(out) == [["1.png", "2.png", "3.png"], [1, 2, 3]]
    write(tmp_path / "o.csv", [5])  # another table of this name has its own masks
    assert held(out)[1] == [1, 2, 3]
    write(out, [7])
    assert held(out) == [["7.png"], [7]]
    folders = {p.name for p in tmp_path.iterdir()}
    assert folders == {"o.jsonl", "o.jsonl.masks", "o.csv", "o.csv.masks"}
    assert [p.name for p in (tmp_path / "o.jsonl.masks").iterdir()] == ["000000.png"]


def test_a_table_that_cannot_be_placed_keeps_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.jsonl"
    write(out, [1, 2])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.utils.files.IO.rename", full)
    for table in (out, tmp_path / "new.jsonl"):
        with pytest.raises(DataError, match="No space left"):
            write(table, [9])
    assert held(out)[1] == [1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"o.jsonl", "o.jsonl.masks"}


def test_other_files_in_the_folder_of_masks_are_kept(tmp_path: Path) -> None:
    (tmp_path / "o.jsonl.masks").mkdir()
    (tmp_path / "o.jsonl.masks" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt, which is no mask"):
        write(tmp_path / "o.jsonl", [1])
    assert (tmp_path / "o.jsonl.masks" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_numbers_that_json_cannot_express_are_null(tmp_path: Path, suffix: str) -> None:
    """So that what is written can be read again: cells of a .parquet file may be no numbers."""
    out = tmp_path / f"o{suffix}"
    with RowWriter(out, ["text", "x"]) as output:
        output.write({"text": "a", "x": [math.nan, 1.0]}, {"scores": {"b": math.inf}})
    text = out.read_text()
    assert text.count("null") == 2 and not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    assert len(read_table(out)) == 1


ROWS: list[dict[str, Any]] = [
    {"text": f"a {i}", "n": i if i % 2 else None, "x": [math.nan, 1.0]} for i in range(10)
]


def answer(i: int) -> dict[str, Any]:
    spans = [{"text": "a", "start": k} for k in range(i % 3)]
    return {"label": "cat", "score": i / 8, "spans": spans, "scores": {f"class {i % 2}": 0.5}}


def labelled(
    path: Path, rows: list[dict[str, Any]], error: type[BaseException] | None = None
) -> None:
    with RowWriter(path, list(rows[0])) as output:
        for row in rows:
            output.write(row, {"label": "cat"})
        if error is not None:
            raise error


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz", ".tsv.zst", ".jsonl.zst", ".CSV.GZ"])
def test_compressed_tables(tmp_path: Path, suffix: str) -> None:
    if "zst" in suffix:
        pytest.importorskip("zstandard")
    plain, packed = tmp_path / f"p{suffix[: suffix.rindex('.')]}", tmp_path / f"o{suffix}"
    for path in (plain, packed):
        with RowWriter(path, list(ROWS[0])) as output:
            for i, row in enumerate(ROWS):
                output.write(row, answer(i))
    assert read_table(packed).columns == read_table(plain).columns
    assert packed.stat().st_size < plain.stat().st_size
    with pytest.raises(KeyError):
        labelled(packed, [{"text": "b"}], KeyError)
    assert len(read_table(packed)) == 10 and len(list(tmp_path.iterdir())) == 2


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk fixes the types; what has none there is JSON."""
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("pretrain.data.parquet_rows._CHUNK", 4)
    path = tmp_path / "o.parquet"
    with RowWriter(path, list(ROWS[0])) as output:
        output.write(ROWS[0], {})  # waits for the columns of the first answer
        for i, row in enumerate(ROWS[1:], start=1):
            output.write(row, answer(i))
    table = parquet.read_table(path)
    assert parquet.ParquetFile(path).num_row_groups == 3
    assert table.column_names == ["text", "n", "x", "predicted_label", "score", "spans", "scores"]
    rows = table.to_pylist()
    for i, row in enumerate(rows[1:], start=1):
        told = answer(i)
        assert row == {
            "text": f"a {i}", "n": ROWS[i]["n"], "x": [None, 1.0], "predicted_label": "cat", "score": told["score"],
            "spans": told["spans"], "scores": json.dumps(told["scores"]),
        }  # fmt: skip
    assert [rows[0][name] for name in ("predicted_label", "score", "spans", "scores")] == [None] * 4
    assert read_table(path).columns["score"][1:] == [i / 8 for i in range(1, 10)]


@pytest.mark.parametrize(
    ("first", "later", "told"),
    [
        ({"x": 1}, {"x": 1, "y": 2}, "the column 'y' is new"),
        ({"x": 1}, {"x": "a"}, "column 'x'"),
        ({"x": {"a": 1}}, {"x": {"b": 1}}, "column 'x' have other keys"),
        ({"x": [{"a": 1}]}, {"x": [{"a": 1, "b": 2}]}, "column 'x' have other keys"),
    ],
)
def test_parquet_rows_that_differ_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Any, later: Any, told: str
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("pretrain.data.parquet_rows._CHUNK", 2)
    path = tmp_path / "o.parquet"
    with pytest.raises(DataError, match=rf"{told}.*Write \.jsonl"):
        labelled(path, [first, first, later])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values",
    [[None, None, {"a": 1}], [[], [], [1]], [1, "a", 2.5], [{}, {}], [2**70, 1], [[1], "a"]],
)
def test_parquet_columns_without_a_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("pretrain.data.parquet_rows._CHUNK", 2)
    path = tmp_path / "o.parquet"
    labelled(path, [{"x": value} for value in values])
    found = parquet.read_table(path).column("x").to_pylist()
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    assert found == texts


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        RowWriter(tmp_path / "o.parquet", ["x"]).__enter__()
    assert not list(tmp_path.iterdir())
