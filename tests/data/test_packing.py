"""Packing keeps every token once, in order, and wastes next to nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.packing import best_fit, pack
from pretrain.errors import DataError


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))]).astype(np.int64)


@given(lengths=st.lists(st.integers(0, 70), max_size=80), row_length=st.integers(2, 24))
@settings(max_examples=150, deadline=None)
def test_every_token_once_in_rows_that_hold_them(lengths: list[int], row_length: int) -> None:
    offsets = offsets_of(lengths)
    packing = pack(offsets, row_length)
    tokens: list[int] = []
    for first, last in zip(packing.rows[:-1], packing.rows[1:], strict=True):
        row = packing.segments[first:last]
        assert 0 < row[:, 1].sum() <= row_length
        assert (np.diff(row[:, 0]) > 0).all()
        tokens += [t for start, size in row.tolist() for t in range(start, start + size)]
    assert sorted(tokens) == list(range(int(offsets[-1])))
    # A piece never reaches over the end of a document, and only documents longer than a row are cut.
    starts = np.sort(packing.segments[:, 0])
    pieces = packing.segments[np.argsort(packing.segments[:, 0])]
    owner = np.searchsorted(offsets, starts, side="right") - 1
    assert (pieces.sum(axis=1) <= offsets[owner + 1]).all()
    assert len(pieces) == sum(-(-n // row_length) for n in lengths)


def naive(lengths: list[int], capacity: int) -> int:
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(s, k) for k, s in enumerate(space) if s >= length]
        if fitting:
            space[min(fitting)[1]] -= length
        else:
            space.append(capacity - length)
    return len(space)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_groups_give_as_few_bins_as_one_by_one(lengths: list[int]) -> None:
    bins = best_fit(np.array(lengths), 20)
    assert int(bins.max()) + 1 == naive(lengths, 20)


def test_packs_a_million_documents_quickly_with_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1.2, 200_000), 1, 20_000).astype(int)
    offsets = offsets_of(lengths.tolist())
    started = time.perf_counter()
    packing = pack(offsets, 512)
    assert len(lengths) / (time.perf_counter() - started) > 50_000
    places = (len(packing.rows) - 1) * 512
    assert packing.segments[:, 1].sum() > 0.999 * places


def test_too_long_an_item_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be packed"):
        best_fit(np.array([5]), 4)


def test_nothing_gives_no_rows() -> None:
    assert len(pack(np.zeros(1, dtype=np.int64), 8).rows) == 1
