"""Other places at which documents that are longer than a row are cut, in every pass over the rows after the first.

The pieces of a document move by one offset, round its end to its beginning. With one offset for all of its pieces every
token is in one piece still, and every row keeps its length. The offset is a function of the seed, the pass and the
document, so nothing is stored, and a resumed run cuts as the run that was never interrupted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pretrain.data.order import mix64

__all__ = ["Pieces", "cut_numbers", "recut"]

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
# First token, length and place in the batch of the row of every piece, in row order.
Pieces = tuple[Ints, Ints, Ints]


def cut_numbers(seed: int, passes: Ints) -> Words:
    """Return for each row the number by which its long documents are cut: 0, as prepared, in the first pass."""
    key = mix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    numbers = mix64(key ^ mix64(passes.astype(np.uint64))) | np.uint64(1)
    return np.where(passes > 0, numbers, np.uint64(0))


def recut(pieces: Pieces, cuts: Words, first: Ints, end: Ints) -> Pieces:
    """Move the pieces of long documents; the one that reaches the end of its document becomes two, end and beginning.

    Args:
        pieces: as they were prepared.
        cuts: of each row of the batch, see `cut_numbers`; the pieces of a row with 0 stay.
        first: of each piece the first token of its document.
        end: of each piece the token after the last one of its document.
    """
    starts, lengths, row = pieces
    size = end - first
    random = mix64(cuts[row] ^ mix64(first.astype(np.uint64)))
    offset = (random >> np.uint64(1)).astype(np.int64) % size
    offset[(cuts[row] == 0) | (lengths == size)] = 0  # a document in one piece stays whole
    inside = (starts - first + offset) % size
    head = np.minimum(lengths, size - inside)  # up to the end of the document
    both = np.stack((first + inside, head, row, first, lengths - head, row), axis=1)
    moved = both.reshape(-1, 3)
    starts, lengths, row = moved[moved[:, 1] > 0].T
    return starts, lengths, row
