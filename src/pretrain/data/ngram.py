"""Interpolated modified Kneser-Ney model of order 3 (Chen and Goodman, 1999), a baseline for next-token models.

An n-gram is one integer, its tokens the digits, and the n-grams of an order are a sorted array: they are counted by
sorting and looked up by bisection. A document begins with a token of its own, which is context and never predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import DataError

__all__ = ["ORDER", "KneserNey"]

ORDER = 3
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class KneserNey:
    """A model of the tokens that follow others in the same document.

    Args:
        batches: training rows, with (B, T) ``input_ids`` and ``document_ids`` as ``Rows.gather`` returns them.
        vocab_size: ids that can be predicted; the probabilities of all of them sum to 1 in every context.

    Attributes:
        num_tokens: predicted tokens that were counted.

    Raises:
        DataError: no training row has two tokens of one document, or the vocabulary exceeds 2 million.
    """

    def __init__(self, batches: Iterable[Mapping[str, Ints]], vocab_size: int) -> None:
        self._vocab, self._base = vocab_size, vocab_size + 1
        if self._base**ORDER >= 2**63:
            raise DataError(f"n-grams of a vocabulary of {vocab_size:,} ids do not fit 64 bits.")
        parts = [self._trigrams(batch) for batch in batches]
        keys, counts = np.unique(
            np.concatenate([np.zeros(0, dtype=np.int64), *parts]), return_counts=True
        )
        if not len(keys):
            raise DataError("There is no token to count: no row has two tokens of one document.")
        self.num_tokens = int(counts.sum())
        # The count of a shorter n-gram is the number of tokens that precede it somewhere.
        pairs, before_pair = np.unique(keys % self._base**2, return_counts=True)
        tokens, before_token = np.unique(pairs % self._base, return_counts=True)
        self._orders = (
            _Order(tokens, before_token, self._base),
            _Order(pairs, before_pair, self._base),
            _Order(keys, counts, self._base),
        )

    def _trigrams(self, batch: Mapping[str, Ints]) -> Ints:
        """Every predicted token with the two before it, (N,); ``vocab_size`` stands before the first of a document."""
        ids, documents = batch["input_ids"], batch["document_ids"]
        inside = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] != 0)
        before = np.full_like(ids[:, 1:], self._vocab)
        np.copyto(before[:, 1:], ids[:, :-2], where=inside[:, :-1])
        keys: Ints = ((before * self._base + ids[:, :-1]) * self._base + ids[:, 1:])[inside]
        return keys

    def _probabilities(self, keys: Ints) -> Floats:
        """Probability of the last token of each trigram after the two others, (N,) -> (N,)."""
        found = np.full(len(keys), 1 / self._vocab)
        for n, order in enumerate(self._orders, start=1):
            found = order.interpolate(keys % self._base**n, found)
        return found

    def loss(self, batches: Iterable[Mapping[str, Ints]]) -> float:
        """Return the cross entropy of held-out rows in nats per predicted token; NaN if none is predicted."""
        total, count = 0.0, 0
        for batch in batches:
            keys, times = np.unique(self._trigrams(batch), return_counts=True)
            total -= float(times @ np.log(self._probabilities(keys)))
            count += int(times.sum())
        return total / count if count else float("nan")


class _Order:
    """Discounted probabilities of the n-grams of one order, and the weight of the order below in every context.

    Args:
        keys: (N,) n-grams in ascending order.
        counts: (N,) their counts.
        base: the digits of a key; its context is ``key // base``.
    """

    def __init__(self, keys: Ints, counts: Ints, base: int) -> None:
        self._keys, self._base = keys, base
        of = keys // base
        starts = np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]]))
        taken = _discounts(counts)[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, starts)
        self._contexts = of[starts]
        self._left = np.add.reduceat(taken, starts) / totals
        self._shares = (counts - taken) / np.repeat(totals, np.diff([*starts, len(keys)]))

    def interpolate(self, keys: Ints, lower: Floats) -> Floats:
        """Return the probabilities of n-grams, given those of the order below; unseen contexts keep the latter."""
        found: Floats = _look_up(self._keys, self._shares, keys, 0.0)
        found += _look_up(self._contexts, self._left, keys // self._base, 1.0) * lower
        return found


def _look_up(keys: Ints, values: Floats, wanted: Ints, missing: float) -> Floats:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)


def _discounts(counts: Ints) -> Floats:
    """What is taken from counts of 0, 1, 2, and 3 or more, (4,), estimated from how many n-grams occur 1 to 4 times.

    Estimates of tiny text may be missing or out of range; they are kept above 0, so that no token is impossible.
    """
    times = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    y = times[1] / max(1.0, times[1] + 2 * times[2])
    found = np.zeros(4)
    for k in (1, 2, 3):
        estimate = k - (k + 1) * y * times[k + 1] / times[k] if times[k] else found[k - 1]
        found[k] = min(max(estimate, 0.1), float(k))
    return found
