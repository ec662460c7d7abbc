"""Training order of rows: a seeded permutation that is computed on demand and never stored.

Row number ``i`` of epoch ``e`` is a pure function of ``(seed, e, i)``: a Feistel network over the smallest
power of two that is at least ``n``, with cycle walking for the values outside the range (Black & Rogaway 2002,
"Ciphers with Arbitrary Finite Domains"). Seeking costs the same at any position, the order does not depend on the
number of workers or devices, and a checkpoint stores one integer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import ConfigError

__all__ = ["MixtureOrder", "Order", "mix64"]

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def mix64(values: Words) -> Words:
    """Finalise 64-bit words so that every input bit reaches every output bit (splitmix64, Steele et al. 2014)."""
    x = values.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class Order:
    """Visit ``n`` rows in a new random order every epoch.

    Args:
        n: number of rows, at least 1.
        seed: any integer; another seed gives an unrelated order.

    Attributes:
        epoch_length: rows visited in one epoch.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        if n < 1:
            raise ConfigError(f"an order needs at least one row, found {n}.")
        self.epoch_length = int(n)
        bits = max(2, (self.epoch_length - 1).bit_length())
        self._right = np.uint64(bits // 2)
        self._left = np.uint64(bits - bits // 2)
        self._base = np.uint64(((int(seed) & _MASK64) * _GOLDEN + 0xD1B54A32D192ED03) & _MASK64)

    def indices(self, position: int, count: int) -> Ints:
        """Return the rows at ``count`` places starting at ``position``, counted in rows since the start of training."""
        return self.visits(position, count)[0]

    def visits(self, position: int, count: int) -> tuple[Ints, Ints]:
        """Return what ``indices`` returns, and for each row the number of the pass over all rows, from 0."""
        places = np.arange(count, dtype=np.int64) + np.int64(position)
        return self.at(places), places // self.epoch_length

    def at(self, places: Ints) -> Ints:
        """Return the rows at arbitrary ``places`` counted since the start of training."""
        epochs = (places // self.epoch_length).astype(np.uint64)
        keys = mix64(self._base ^ mix64(epochs * np.uint64(_GOLDEN) + np.uint64(1)))
        values = self._encipher((places % self.epoch_length).astype(np.uint64), keys)
        outside = np.flatnonzero(values >= self.epoch_length)
        while outside.size:
            values[outside] = self._encipher(values[outside], keys[outside])
            outside = outside[values[outside] >= self.epoch_length]
        return values.astype(np.int64)

    def _encipher(self, values: Words, keys: Words) -> Words:
        right_bits, left_bits = self._right, self._left
        one = np.uint64(1)
        right = values & ((one << right_bits) - one)
        left = values >> right_bits
        # An unbalanced network: the two halves keep their widths and are changed in alternation.
        for turn in range(_ROUNDS):
            key = mix64(keys + np.uint64((turn * _GOLDEN) & _MASK64))
            if turn % 2:
                right = right ^ (mix64(left + key) & ((one << right_bits) - one))
            else:
                left = left ^ (mix64(right + key) & ((one << left_bits) - one))
        return (left << right_bits) | right


class MixtureOrder:
    """Visit several sources in fixed shares: every epoch contains a fixed number of rows of each source.

    A source with fewer rows than its share of an epoch is repeated, in a new order each time; a source with more
    continues in the next epoch where it stopped. Within one source, no row is therefore visited a second time before
    all of its rows were visited once.

    Args:
        sizes: number of rows of each source; the rows of the sources are concatenated.
        weights: share of rows of each source (normalised here).
        seed: any integer.

    Attributes:
        epoch_length: rows visited in one epoch.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int = 0) -> None:
        self.counts = _shares(sizes, weights)
        self.epoch_length = sum(self.counts)
        self._firsts = np.cumsum(sizes) - sizes
        self._bounds = np.cumsum(self.counts)
        self._slots = Order(self.epoch_length, seed)
        self._orders = [Order(size, seed + 1 + k) if size else None for k, size in enumerate(sizes)]

    def indices(self, position: int, count: int) -> Ints:
        """Return the rows at ``count`` places starting at ``position``, counted in rows since the start of training."""
        return self.visits(position, count)[0]

    def visits(self, position: int, count: int) -> tuple[Ints, Ints]:
        """Return what ``indices`` returns, and for each row the number of the pass over its source, from 0."""
        places = np.arange(count, dtype=np.int64) + np.int64(position)
        epochs = places // self.epoch_length
        slots = self._slots.at(places)
        source = np.searchsorted(self._bounds, slots, side="right")
        rows, passes = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for k, order in enumerate(self._orders):
            chosen = np.flatnonzero(source == k)
            if order is None or not chosen.size:
                continue
            share = self.counts[k]
            within = epochs[chosen] * share + slots[chosen] - (self._bounds[k] - share)
            rows[chosen] = self._firsts[k] + order.at(within)
            passes[chosen] = within // order.epoch_length
        return rows, passes


def _shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Split an epoch of ``sum(sizes)`` rows by ``weights`` (largest remainders first; an empty source gets none)."""
    if len(weights) != len(sizes):
        raise ConfigError(
            f"{len(weights)} weights for {len(sizes)} sources; give one weight for each source."
        )
    usable = [float(w) if size else 0.0 for w, size in zip(weights, sizes, strict=True)]
    if any(not np.isfinite(w) or w < 0 for w in weights) or sum(usable) <= 0:
        raise ConfigError(
            "mixture weights must be finite, at least 0, and above 0 for some source with rows, found "
            f"{list(weights)}."
        )
    total = sum(sizes)
    exact = [total * w / sum(usable) for w in usable]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts
