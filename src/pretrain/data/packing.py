"""Packing of documents into rows of fixed length: best-fit decreasing (Johnson 1974; Krell et al. 2021).

Lengths are small integers, so bins with equal free space are interchangeable and are handled as groups: the cost is a
few numpy calls for each combination of a length and a free space that occurs, not one step per document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import DataError

__all__ = ["Packing", "best_fit", "pack", "split_long"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """The assignment of tokens to rows.

    Attributes:
        segments: (S, 2) first token and length of every piece of a document, in row order.
        rows: (R + 1,) row ``r`` holds ``segments[rows[r]:rows[r + 1]]``.
    """

    segments: Ints
    rows: Ints


def split_long(offsets: Ints, row_length: int) -> Ints:
    """Split documents into pieces of at most ``row_length`` tokens; document ``i`` is ``offsets[i]:offsets[i + 1]``.

    Returns:
        (S, 2) first token and length of every piece in document order; empty documents have no pieces.
    """
    starts, lengths = offsets[:-1], np.diff(offsets)
    counts = -(-lengths // row_length)
    total = int(counts.sum())
    owner = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    inside = (np.arange(total) - before[owner]) * row_length
    pieces = np.empty((total, 2), dtype=np.int64)
    pieces[:, 0] = starts[owner] + inside
    pieces[:, 1] = np.minimum(lengths[owner] - inside, row_length)
    return pieces


class _Bins:
    """Bins grouped by free space; a bit mask of the free spaces in use finds the tightest group that fits."""

    def __init__(self, capacity: int) -> None:
        self.groups: list[list[Ints]] = [[] for _ in range(capacity + 1)]
        self.mask = 0

    def tightest(self, length: int) -> int:
        """Return the smallest free space >= ``length`` of any bin, or -1."""
        above = self.mask >> length
        return length + (above & -above).bit_length() - 1 if above else -1

    def put(self, space: int, bins: Ints) -> None:
        if bins.size and space:
            self.groups[space].append(bins)
            self.mask |= 1 << space

    def take(self, space: int, limit: int) -> Ints:
        group = self.groups[space]
        chunk = group.pop()
        if chunk.size > limit:
            group.append(chunk[limit:])
            chunk = chunk[:limit]
        if not group:
            self.mask &= ~(1 << space)
        return chunk


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """Assign every item to a bin, longest items first, each to the fullest bin that it fits into.

    From (N,) lengths between 1 and ``capacity`` to (N,) bin numbers, which count from 0 without gaps.
    """
    if lengths.size and (int(lengths.min()) < 1 or int(lengths.max()) > capacity):
        raise DataError(
            f"items of up to {int(lengths.max())} tokens cannot be packed: each needs 1 token or more, and room in a "
            f"row of {capacity}."
        )
    items = np.argsort(-lengths, kind="stable").astype(np.int64)
    ordered = lengths[items]
    edges = np.flatnonzero(np.diff(ordered)) + 1
    result = np.empty(len(lengths), dtype=np.int64)
    bins, opened = _Bins(capacity), 0
    for group in np.split(items, edges) if len(items) else []:
        length = int(lengths[group[0]])
        while group.size:
            space = bins.tightest(length)
            if space >= 0:
                chosen = bins.take(space, group.size)
                result[group[: chosen.size]] = chosen
                bins.put(space - length, chosen)
                group = group[chosen.size :]
                continue
            # A new bin is the tightest fit for items of this length until it is full, so fill it at once.
            each = capacity // length
            fresh = -(-group.size // each)
            result[group] = opened + np.arange(group.size) // each
            last = group.size - (fresh - 1) * each
            numbers = np.arange(opened, opened + fresh, dtype=np.int64)
            bins.put(capacity - each * length, numbers[:-1])
            bins.put(capacity - last * length, numbers[-1:])
            opened += fresh
            break
    return result


def pack(offsets: Ints, row_length: int) -> Packing:
    """Pack documents, by their (N + 1,) token offsets, into rows; only those longer than a row are split.

    Rows, and pieces within a row, are in the order of their first token.
    """
    pieces = split_long(offsets, row_length)
    if not len(pieces):
        return Packing(pieces, np.zeros(1, dtype=np.int64))
    bins = best_fit(pieces[:, 1], row_length)
    count = int(bins.max()) + 1
    # Pieces are in token order, so the first piece of a bin is the one with its first token.
    first = np.full(count, len(pieces), dtype=np.int64)
    np.minimum.at(first, bins, np.arange(len(pieces)))
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(count)
    row = rank[bins]
    order = np.argsort(row, kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))]).astype(np.int64)
    return Packing(pieces[order], rows)
