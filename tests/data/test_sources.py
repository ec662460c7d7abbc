"""Sources that are no files: data sets, names of the hub, objects of the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from data.documents import documents
from pretrain.config.run import RunConfig
from pretrain.data.prepare import Prepared
from pretrain.data.sources import FileHashes, resolve_sources
from pretrain.errors import ConfigError, DataError

GOOD = [f"document number {k} says hello to the other {k * k} documents" for k in range(30)]


def prepare(source: object, out: Path | None = None, **options: object) -> Prepared:
    chosen = {"tokenizer": "char", "row_length": 64, "quiet": True, **options}
    return pretrain.prepare(source, out, **chosen)  # type: ignore[arg-type]


def test_stream_that_cannot_be_read_twice(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": GOOD})
    with pytest.raises(DataError, match="hub:NAME"):
        prepare(data.to_iterable_dataset())
    with pytest.raises(DataError, match=r"several splits \(train\)"):
        prepare(datasets.DatasetDict({"train": data}))


def test_columns_and_splits_in_memory_are_no_mixture() -> None:
    pandas = pytest.importorskip("pandas")
    wanted = list(documents(resolve_sources([{"text": text} for text in GOOD])[0][0]))
    for kind in (list, tuple, np.array, pandas.Series):
        columns = {"id": kind(range(len(GOOD))), "text": kind(GOOD)}
        assert list(documents(resolve_sources(columns)[0][0])) == wanted == GOOD
        with pytest.raises(DataError, match="no column 'body'; columns present: 'id', 'text'"):
            resolve_sources(columns, text="body")
    for split in ([{"text": "a"}], pandas.DataFrame({"text": ["a"]})):
        with pytest.raises(DataError, match=r"dict holds several splits \(train, test\)"):
            resolve_sources({"train": split, "test": split})
    with pytest.raises(DataError, match="shares of a mixture must be numbers"):
        resolve_sources({"a.txt": "b"})


def test_a_data_set_is_read_in_any_format() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": GOOD, "language": ["en"] * len(GOOD)})

    def joined(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {"both": [" ".join(p) for p in zip(batch["language"], batch["text"], strict=True)]}

    def texts(source: Any, column: str) -> list[str]:
        return list(documents(resolve_sources(source, text=column)[0][0]))

    for changed in (
        data,
        data.with_format("numpy"),
        data.with_format("numpy", columns=["language"]),
    ):
        assert texts(changed, "text") == GOOD
    assert texts(data.with_transform(joined), "both") == [f"en {text}" for text in GOOD]
    with pytest.raises(DataError, match="'text'.*both"):
        resolve_sources(data.with_transform(joined))


def test_a_folder_that_the_datasets_library_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": GOOD})
    data.select(range(0, 30, 2)).save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"of map")
    splits = {"train": data.select(range(20)), "test": data.select(range(20, 30))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    wanted = {"one": GOOD[::2], "dict": GOOD[:20], "dict/test": GOOD[20:]}
    for name, texts in wanted.items():
        assert list(documents(resolve_sources(tmp_path / name)[0][0])) == texts
    assert str(tmp_path / "dict" / "test") in capsys.readouterr().err
    datasets.DatasetDict(a=data).save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match=r"splits a, and none called train.*/odd/a"):
        resolve_sources(tmp_path / "odd")
    with pytest.raises(DataError, match="a text of 5,000 characters"):
        resolve_sources("x" * 5000)
    next((tmp_path / "one").glob("data-*1-of*")).unlink()
    with pytest.raises(DataError, match="cannot be read .*FileNotFoundError"):
        resolve_sources(tmp_path / "one")


def test_hub_name_is_streamed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        calls.append((name, config, split, streaming))
        if name == "missing/set":
            raise FileNotFoundError("no such data set")
        return iter({"text": text} for text in GOOD)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for _ in range(2):
        assert prepare("hub:some/set@en:test", row_length=96).train.num_documents > 20
    assert calls == [("some/set", "en", "test", True)]
    with pytest.raises(DataError, match="hub:missing/set cannot be streamed"):
        prepare("hub:missing/set")


def test_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    class Moving:
        name = "moving"
        notes: list[str] = []
        reads = 0

        def pieces(self):
            self.reads += 1
            yield from ((text, True) for text in GOOD[: 30 - 5 * self.reads])

        def fingerprint(self, hashes: object) -> str:
            return "moving"

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(Moving(), tmp_path / "out")


def test_rows_in_memory_are_documents_like_those_of_a_file(tmp_path: Path) -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    texts = [f"the man saw number {i}" for i in range(9)] + [None]
    rows = [{"body": text, "n": i} for i, text in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = list(documents(resolve_sources(str(path), text="body")[0][0]))
    prints = set()
    for given in (rows, tuple(rows), pandas.DataFrame(rows, index=range(5, 15)), pyarrow.table(
        {"body": texts}
    )):  # fmt: skip
        (source,), weights = resolve_sources(given, text="body")
        assert list(documents(source)) == expected and weights is None
        prints.add(source.fingerprint(FileHashes()))
    assert len(prints) == 1
    frame = pandas.DataFrame({"body": ["a", float("nan")]})
    for given in (frame, frame.convert_dtypes()):
        assert list(documents(resolve_sources([given], text="body")[0][0])) == ["a", ""]


def test_rows_and_texts_that_are_no_source() -> None:
    for given, message in (
        ([{"body": "a"}], "has no column 'text'"),
        ([{"text": "a"}, "b"], "dicts only"),
        ([{"text": 3}], "row 0: column 'text' holds int"),
        ("a text\nof two lines", r"given as rows: \[\{'text'"),
        (["the first text that is no file", "the second"], r"given as rows: \[\{'text'"),
    ):
        with pytest.raises(DataError, match=message):
            list(documents(resolve_sources(given)[0][0]))
    with pytest.raises(ConfigError, match=r"Prepare it first: pretrain.prepare"):
        RunConfig.load({"data": {"train": [{"text": "a"}]}})
