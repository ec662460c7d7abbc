"""Rows with answers as files: JSON that any program reads, and masks that replace earlier ones with the table."""

from __future__ import annotations

import json
import math
import re
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
