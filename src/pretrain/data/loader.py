"""Data loader: rows by global position in a computed order, with a prefetch thread.

The row at a position depends only on the seed and the position, not on the prefetch depth, the batch size or the
number of devices. Documents that are longer than a row are cut at other places in every epoch after the first.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pretrain.data.order import Order
from pretrain.data.recut import cut_numbers
from pretrain.data.shards import Example, Rows

__all__ = ["Example", "Examples", "Loader", "row_rng", "row_rngs"]

T = TypeVar("T")


class Examples(Protocol):
    """Rows to train or evaluate on: a sized sequence whose items are mappings of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def row_rng(seed: int, stream: str, position: int) -> np.random.Generator:
    """Return the random generator of one row, a function of seed, stream name and the row's global position."""
    key = _stream_key(seed, stream)
    # Philox uses its key unhashed: the second word is the position, so no two rows share a stream.
    return np.random.Generator(
        np.random.Philox(key=np.array([key, position & (2**64 - 1)], dtype=np.uint64))
    )


@lru_cache(maxsize=256)
def _stream_key(seed: int, stream: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=8).digest(), "little"
    )


def row_rngs(seed: int, stream: str, position: int, count: int) -> list[np.random.Generator]:
    """Return the generators of ``count`` rows starting at global ``position``; see :func:`row_rng`."""
    return [row_rng(seed, stream, position + k) for k in range(count)]


class Loader:
    """Examples by position in the training order.

    Args:
        rows: a split of prepared data, or any sequence of dicts of arrays; at least one.
        seed: seed of the order.
        prefetch: batches that the thread of :meth:`stream` prefetches; 0 reads in the calling thread.
        recut: cut long documents of prepared data at other places in every epoch after the first.
    """

    def __init__(
        self, rows: Examples, seed: int = 0, *, prefetch: int = 2, recut: bool = False
    ) -> None:
        self.rows, self.seed, self.prefetch, self.recut = rows, int(seed), prefetch, recut
        self.order = rows.order(seed) if isinstance(rows, Rows) else Order(len(rows), seed)

    @property
    def epoch_length(self) -> int:
        """Rows in one epoch."""
        return self.order.epoch_length

    def indices(self, position: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` row numbers starting at ``position``, counted in rows since the start of training."""
        return self.order.indices(position, count)

    def examples(self, position: int, count: int) -> list[Example]:
        """Return ``count`` rows starting at ``position``, each a dict of (T,) arrays."""
        indices, passes = self.order.visits(position, count)
        if not isinstance(self.rows, Rows):
            return [self.rows[int(i)] for i in indices]
        cuts = cut_numbers(self.seed, passes) if self.recut and passes.any() else None
        batch = self.rows.gather(indices, cuts)
        return [{name: values[k] for name, values in batch.items()} for k in range(count)]

    def stream(
        self, places: Iterable[tuple[int, int]], make: Callable[[int, int], T]
    ) -> Generator[T, None, None]:
        """Yield ``make(position, count)`` for every place, computed ahead in a thread.

        Args:
            places: positions and counts; may be infinite.
            make: a pure function; its exceptions are raised here, at their place in the order.
        """
        return ahead((partial(make, position, count) for position, count in places), self.prefetch)


def ahead(tasks: Iterable[Callable[[], T]], depth: int) -> Generator[T, None, None]:
    """Run tasks in order in one thread, at most ``depth`` results ahead of the consumer."""
    if depth < 1:
        for task in tasks:
            yield task()
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="pretrain-loader")
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
