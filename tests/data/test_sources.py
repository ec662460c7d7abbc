"""Sources that are no files: data sets, names of the hub, objects of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

import pretrain
from pretrain.data.prepare import Prepared
from pretrain.errors import DataError

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
