"""The order is a permutation in every epoch, pure, and costs the same anywhere."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import MixtureOrder, Order
from pretrain.errors import ConfigError


@given(n=st.integers(1, 300), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    rows = Order(n, seed).indices(epoch * n, n)
    assert sorted(rows.tolist()) == list(range(n))


@given(
    n=st.integers(1, 10**12),
    position=st.integers(0, 10**15),
    count=st.integers(1, 40),
    cut=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_pure_and_independent_of_chunks(n: int, position: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = Order(n, 7).indices(position, count)
    parts = np.concatenate(
        [Order(n, 7).indices(position, cut), Order(n, 7).indices(position + cut, count - cut)]
    )
    assert np.array_equal(whole, parts)
    assert ((whole >= 0) & (whole < n)).all()


def test_epochs_and_seeds_differ_and_shuffle_well() -> None:
    n = 2000
    epochs = [Order(n, 0).indices(e * n, n) for e in range(4)] + [Order(n, 1).indices(0, n)]
    for i, a in enumerate(epochs):
        for b in epochs[:i]:
            assert (a == b).mean() < 0.01
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.1
        assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.1


def test_seek_at_a_million_million_costs_nothing() -> None:
    order = Order(10**12, 3)
    order.indices(0, 1)
    started = time.perf_counter()
    order.indices(10**12 * 5 + 123_456_789_012, 32)
    assert time.perf_counter() - started < 0.05


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 10), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_mixture_gives_exact_shares_and_no_early_repeat(
    sizes: list[int], weights: list[float], seed: int
) -> None:
    order = MixtureOrder(sizes, weights[: len(sizes)], seed)
    epochs = 3
    rows = order.indices(0, epochs * order.epoch_length).reshape(epochs, -1)
    firsts = np.cumsum([0, *sizes])
    for k, size in enumerate(sizes):
        inside = (rows >= firsts[k]) & (rows < firsts[k + 1])
        assert (inside.sum(axis=1) == order.counts[k]).all()
        share = sum(sizes) * weights[k] / sum(weights[: len(sizes)])
        assert abs(order.counts[k] - share) < 1
        seen = np.bincount(rows[inside] - firsts[k], minlength=size)
        total = epochs * order.counts[k]
        # Passes over a source interleave within one epoch only, so counts differ by at most the passes begun.
        assert seen.sum() == total and seen.max() - seen.min() <= 1


def test_mixture_by_size_visits_every_row_once() -> None:
    order = MixtureOrder([5, 0, 8], [5, 1, 8], 1)
    assert sorted(order.indices(13, 13).tolist()) == list(range(13))


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights"):
        MixtureOrder([3, 3], [0.0, 0.0])
    with pytest.raises(ConfigError, match="2 sources"):
        MixtureOrder([3, 3], [1.0])
    with pytest.raises(ConfigError, match="at least one row"):
        Order(0)
