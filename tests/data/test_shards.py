"""Prepared rows on disk: damage and cuts are named whatever the size, and old data without block sums still open."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from pretrain.data import flat_files
from pretrain.data.loader import Loader
from pretrain.data.order import MixtureOrder
from pretrain.data.prepare import Prepared
from pretrain.errors import DataError, PretrainError

BLOCK = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "a.txt"
    rng = np.random.default_rng(0)
    file.write_text(
        "\n".join(" ".join(map(str, rng.integers(0, 999, rng.integers(2, 90)))) for _ in range(120))
    )
    return file


@pytest.fixture
def large(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared data of which every file counts as too large to be hashed on opening."""
    monkeypatch.setattr(flat_files, "IN_MEMORY", 64)
    monkeypatch.setattr(flat_files, "BLOCK", BLOCK)
    prepare(source, tmp_path / "large")
    return tmp_path / "large"


def prepare(source: Path, out: Path) -> Prepared:
    return pretrain.prepare(
        source, out, tokenizer="char", separator="\n", row_length=64, valid=0.2, quiet=True
    )


def read(data: Prepared) -> list[Any]:
    return [Loader(rows, 1).examples(0, len(rows)) for rows in (data.train, data.valid)]


def equal(one: Any, two: Any) -> bool:
    return all(
        np.array_equal(a[key], b[key])
        for rows, others in zip(one, two, strict=True)
        for a, b in zip(rows, others, strict=True)
        for key in a
    )


def test_large_files_give_the_rows_of_small_ones(
    source: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Prepared.open(large)
    assert (large / "train.tokens.blocks.bin").is_file()
    found = read(data)
    assert data.train._tokens._whole is None and data.train._tokens._verified.all()
    monkeypatch.undo()
    assert equal(found, read(prepare(source, tmp_path / "small")))
    assert not (tmp_path / "small" / "train.tokens.blocks.bin").exists()


def test_data_from_before_there_were_block_sums_open(large: Path) -> None:
    expected = read(Prepared.open(large))
    manifest = json.loads((large / "manifest.json").read_text())
    manifest.pop("digest", None)
    for name in [name for name in manifest["files"] if ".blocks." in name]:
        del manifest["files"][name]
        (large / name).unlink()
    (large / "manifest.json").write_text(json.dumps(manifest))
    assert equal(read(Prepared.open(large)), expected)


@pytest.mark.parametrize("kind", ["tokens", "segments", "rows"])
def test_every_flipped_bit_is_named(large: Path, kind: str) -> None:
    file = large / f"train.{kind}.bin"
    whole = file.read_bytes()
    rng = np.random.default_rng(4)
    for _ in range(40):
        place = int(rng.integers(len(whole)))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        first = place // BLOCK * BLOCK
        with pytest.raises(
            DataError, match=rf"{kind}\.bin is damaged: its bytes {first:,} to .* row \d"
        ):
            read(Prepared.open(large))
        with pytest.raises(DataError, match="does not have the SHA-256"):
            Prepared.open(large, verify=True)
    file.write_bytes(whole)
    read(Prepared.open(large, verify=True))


def test_damage_reaches_the_consumer_of_a_loader_at_its_place(large: Path) -> None:
    data = Prepared.open(large)
    file = large / "train.tokens.bin"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    loader = Loader(data.train, 1)
    stream = loader.stream([(k, 1) for k in range(len(data.train))], loader.examples)
    with pytest.raises(DataError, match=r"train\.tokens\.bin is damaged"):
        list(stream)


@pytest.mark.parametrize("kind", ["tokens", "segments", "rows"])
def test_a_file_cut_while_it_is_read_is_an_error(large: Path, kind: str) -> None:
    data = Prepared.open(large)
    os.truncate(large / f"train.{kind}.bin", 100)
    with pytest.raises(DataError, match=rf"train\.{kind}\.bin was cut while it was read.*row \d"):
        read(data)


def test_small_files_are_held_in_memory(source: Path, tmp_path: Path) -> None:
    data = prepare(source, tmp_path / "out")
    expected = read(data)
    for file in (tmp_path / "out").glob("*.bin"):
        os.truncate(file, 10)
    assert equal(read(data), expected)


RANGES = {
    "splits.train.tokens": [-1, 5, 2**70, 1.5, "9", None, True],
    "splits.train.rows": [-1, 0, 10**30],
    "splits.train.documents": [-1, 10**400],
    "splits.train.padding": [-0.1, 1.1, "x"],
    "splits.train.sources.0.rows": [-1, 10**9],
    "splits.train.sources.0.share": [-1, 2],
    "splits.train.sources.0.weight": [-1, 0, "x", 1e301],
    "options.row_length": [1, -5, 10**12, 64.0],
    "tokenizer.vocab_size": [0, -1, 3, 2**40],
    "unigram.nats": [-1, 1e300, "x"],
    "duplicates": [-1, 2**61],
    "files.train.tokens.bin.size": [-1, "x", 2**70],
    "notes": [[3], "x"],
    "format": [0, "1", None],
}


@pytest.mark.parametrize("where", RANGES)
def test_hostile_manifests_are_one_sentence(source: Path, tmp_path: Path, where: str) -> None:
    prepare(source, tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    whole = json.loads(file.read_text())
    whole.pop("digest", None)
    for value in RANGES[where]:
        manifest = json.loads(json.dumps(whole))
        node, keys = manifest, where.replace("train.tokens.bin", "train/tokens/bin").split(".")
        keys = [key.replace("/", ".") for key in keys]
        for key in keys[:-1]:
            node = node[int(key) if isinstance(node, list) else key]
        node[keys[-1]] = value
        file.write_text(json.dumps(manifest))
        with pytest.raises(DataError) as told:
            Prepared.open(tmp_path / "out")
        assert "\n" not in str(told.value) and "out" in str(told.value), where
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        damaged = json.dumps(whole).replace(json.dumps(whole["splits"]["train"]["padding"]), text)
        file.write_text(damaged)
        with pytest.raises(DataError, match="manifest.json"):
            Prepared.open(tmp_path / "out")
    file.write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="manifest.json"):
        Prepared.open(tmp_path / "out")


def test_rows_that_point_elsewhere_are_refused(source: Path, tmp_path: Path) -> None:
    """Hashes are right, the numbers are not: what a stranger may hand over."""
    prepare(source, tmp_path / "out")
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("rows", "segments"):
        for value in (-1, -(2**62), 2**62, 10**6, 65):
            shutil.copytree(tmp_path / "out", tmp_path / "bad")
            file = tmp_path / "bad" / f"train.{kind}.bin"
            numbers = np.fromfile(file, dtype="<i8")
            numbers[int(rng.integers(1, len(numbers)))] = value
            numbers.tofile(file)
            manifest = json.loads((tmp_path / "bad" / "manifest.json").read_text())
            manifest.pop("digest", None)
            record = manifest["files"][file.name]
            record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            (tmp_path / "bad" / "manifest.json").write_text(json.dumps(manifest))
            told = ""
            try:
                read(Prepared.open(tmp_path / "bad"))
            except PretrainError as error:
                told = str(error)
            refused += bool(told)
            assert not told or "segments.bin" in told or "rows.bin" in told
            shutil.rmtree(tmp_path / "bad")
    assert refused >= 8


class _Places:
    """Stands for the file of the tokens and reads the place of each token."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, starts: Any, lengths: Any, rows: Any) -> Any:
        ranges = [np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]
        return np.concatenate(ranges)


@pytest.mark.parametrize("weighted", [False, True])
def test_every_epoch_cuts_long_documents_elsewhere_and_visits_every_token_once(
    source: Path, tmp_path: Path, weighted: bool
) -> None:
    sources: Any = {str(source): 1.0, str(source) + "2": 1.0} if weighted else source
    if weighted:
        text = source.read_text()
        Path(f"{source}2").write_text("\n".join(line[::-1] for line in text.splitlines()[::3]))
    rows = prepare(sources, tmp_path / "out").train
    bounds = np.fromfile(tmp_path / "out" / "train.documents.bin", dtype="<i8")
    rows._tokens = _Places(rows.num_tokens)  # type: ignore[assignment]
    loader, whole = Loader(rows, 3, recut=True), Loader(rows, 3)
    length, position, seen = loader.epoch_length, 0, []
    visited = np.zeros(rows.num_tokens, np.int64)
    cut = set()
    for epoch in range(3):
        examples = loader.examples(position, length)
        for example, plain in zip(examples, whole.examples(position, length), strict=True):
            filled = example["document_ids"] > 0
            assert np.array_equal(filled, plain["document_ids"] > 0)  # rows keep their length
            places, pieces = example["input_ids"][filled], example["document_ids"][filled]
            visited[places] += 1
            for piece in np.unique(pieces):
                run = places[pieces == piece]
                assert np.array_equal(run, run[0] + np.arange(len(run)))  # in order
                inside = np.searchsorted(bounds, run[[0, -1]], side="right")
                assert inside[0] == inside[1]  # of one document
                assert np.array_equal(
                    example["position_ids"][filled][pieces == piece], np.arange(len(run))
                )
                cut.add((epoch, int(run[0])))
            if epoch == 0 and not weighted:
                assert all(np.array_equal(example[key], plain[key]) for key in example)
        seen.append(visited.copy())
        position += length
    if not weighted:
        assert [set(counts.tolist()) for counts in seen] == [{1}, {2}, {3}]
    starts = [{place for e, place in cut if e == epoch} for epoch in range(3)]
    new = [starts[a] - starts[b] - set(bounds.tolist()) for a, b in ((1, 0), (2, 0), (2, 1))]
    assert all(len(each) > 20 for each in new)
    short = bounds[:-1][np.diff(bounds) <= 64]
    assert all(int(place) in starts[0] & starts[1] & starts[2] for place in short) or weighted


def test_damaged_bounds_of_documents_are_named(source: Path, tmp_path: Path) -> None:
    rows = prepare(source, tmp_path / "out").train
    rows._bounds = np.array([0, 5, rows.num_tokens // 2])
    with pytest.raises(DataError, match=r"train\.documents\.bin is damaged: row \d+"):
        Loader(rows, 0, recut=True).examples(len(rows), len(rows))


def test_mixtures_number_the_passes_over_each_source() -> None:
    order = MixtureOrder([5, 40], [0.5, 0.5], seed=2)
    count = 10 * order.epoch_length
    rows, passes = order.visits(0, count)
    assert np.array_equal(rows, order.indices(0, count))
    for row, last in [(0, 4), (4, 4), (5, 0), (44, 0)]:
        numbers = sorted(passes[rows == row].tolist())
        assert numbers == list(range(len(numbers))) and len(numbers) > last
    parts = [order.visits(position, 25)[1] for position in range(0, count, 25)]
    assert np.array_equal(np.concatenate(parts), passes)
