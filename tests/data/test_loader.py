"""What the loader gives depends on seed and position alone."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
from pretrain.data.loader import Loader, ahead, row_rng, row_rngs


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pretrain.data.shards.Rows:
    folder = tmp_path_factory.mktemp("loader")
    text = "\n".join(f"document {k} " + "abc " * (k * 7 % 40) for k in range(80))
    (folder / "a.txt").write_text(text)
    return pretrain.prepare(
        folder / "a.txt",
        folder / "out",
        tokenizer="char",
        separator="\n",
        row_length=48,
        quiet=True,
    ).train


def test_rows_restart_positions_and_number_documents(rows) -> None:
    tokens = 0
    for k in range(len(rows)):
        row = rows[k]
        used = int((row["document_ids"] > 0).sum())
        tokens += used
        assert all(values.shape == (48,) and values.dtype == np.int64 for values in row.values())
        assert (row["document_ids"][:used] > 0).all() and not row["document_ids"][used:].any()
        starts = np.flatnonzero(np.diff(row["document_ids"][:used], prepend=0))
        assert (row["position_ids"][starts] == 0).all()
        assert (
            np.diff(row["position_ids"][:used])[np.setdiff1d(np.arange(1, used), starts) - 1] == 1
        ).all()
        assert (row["input_ids"][used:] == rows.pad_id).all()
    assert tokens == rows.num_tokens
    assert np.array_equal(rows[-1]["input_ids"], rows[len(rows) - 1]["input_ids"])
    with pytest.raises(IndexError):
        rows[len(rows)]


@given(
    position=st.integers(0, 10**9),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    depth=st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_independent_of_prefetch_and_batch_size(
    rows, position: int, sizes: list[int], depth: int
) -> None:
    whole = Loader(rows, 5).examples(position, sum(sizes))
    places = [(position + sum(sizes[:k]), size) for k, size in enumerate(sizes)]
    loader = Loader(rows, 5, prefetch=depth)
    parts = [example for batch in loader.stream(places, loader.examples) for example in batch]
    assert len(parts) == len(whole)
    for a, b in zip(whole, parts, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_every_row_once_per_epoch(rows) -> None:
    loader = Loader(rows, 1)
    assert sorted(loader.indices(loader.epoch_length, loader.epoch_length).tolist()) == list(
        range(len(rows))
    )


def test_rows_travel_to_another_process(rows) -> None:
    copy = pickle.loads(pickle.dumps(rows))
    assert np.array_equal(copy[0]["input_ids"], rows[0]["input_ids"])


def test_randomness_belongs_to_the_row() -> None:
    together = [rng.random() for rng in row_rngs(3, "mask", 10, 4)]
    assert together == [row_rng(3, "mask", 10 + k).random() for k in range(4)]
    others = [
        row_rng(3, "mask", 9).random(),
        row_rng(4, "mask", 10).random(),
        row_rng(3, "drop", 10).random(),
    ]
    assert len({together[0], *others}) == 4
    row_rng(-1, "a very long stream name", 10**14).random()


def test_streams_with_long_names_differ() -> None:
    assert row_rng(0, "collate-train", 0).random() != row_rng(0, "collate-valid", 0).random()


def test_an_error_comes_at_its_place_and_the_thread_ends() -> None:
    def make(k: int) -> int:
        if k == 3:
            raise ValueError("three")
        return k

    values = ahead((lambda k=k: make(k) for k in range(9)), 2)
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(values)
    endless = ahead((lambda: 0 for _ in iter(int, 1)), 2)
    next(endless)
    endless.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("pretrain-loader")]


def test_a_batch_of_rows_equals_its_rows(rows) -> None:
    batch = rows.gather([3, 1, 3])
    assert batch["input_ids"].shape == (3, 48)
    assert all(np.array_equal(batch[name][1], rows[1][name]) for name in batch)
    assert rows.gather([])["input_ids"].shape == (0, 48)


def test_any_sequence_of_examples_can_be_loaded() -> None:
    loader = Loader([{"input_ids": np.arange(k)} for k in range(7)], 3)
    assert sorted(len(example["input_ids"]) for example in loader.examples(7, 7)) == list(range(7))
