"""Batches of a step, prepared one step ahead in a background thread.

What comes at a position is a pure function of (seed, position), so the thread holds no state worth saving: after
a resume it starts at the position that the checkpoint names.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pretrain.data.loader import Loader, row_rngs

if TYPE_CHECKING:
    from pretrain.objectives.base import Batch, Objective

__all__ = ["Feed", "to_device"]

_MASKING = "collate"  # name of the random stream that collate draws from


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch; the copy overlaps with compute on a GPU."""
    if device.type == "cpu":
        return batch
    return {
        key: (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
        for key, value in batch.items()
    }


class Feed:
    """Iterator over optimizer steps; each item is the list of micro-batches of one step.

    Args:
        objective: makes the batches.
        data: rows; ``len`` and indexing are all it needs.
        seed: of the order and of the draws.
        start: rows consumed before the first step.
        batch_rows: rows in a step.
        micro_rows: rows in a micro-batch.
    """

    def __init__(
        self,
        objective: Objective,
        data: Sequence[Any],
        *,
        seed: int,
        start: int,
        batch_rows: int,
        micro_rows: int,
    ) -> None:
        self._objective, self._seed = objective, seed
        self._loader = Loader(data, seed=seed)
        self._start, self._batch_rows, self._micro_rows = start, batch_rows, micro_rows
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def step_at(self, position: int) -> list[Batch]:
        """The micro-batches of the step whose first row is number ``position`` of the run."""
        examples = self._loader.examples(position, self._batch_rows)
        rngs = row_rngs(self._seed, _MASKING, position, self._batch_rows)
        cut = range(0, self._batch_rows, self._micro_rows)
        return [
            self._objective.collate(
                examples[i : i + self._micro_rows], rngs[i : i + self._micro_rows]
            )
            for i in cut
        ]

    def _work(self) -> None:
        position = self._start
        while not self._stop.is_set():
            item: list[Batch] | BaseException
            try:
                item = self.step_at(position)
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            position += self._batch_rows

    def __iter__(self) -> Iterator[list[Batch]]:
        self._thread = threading.Thread(target=self._work, name="pretrain-feed", daemon=True)
        self._thread.start()
        try:
            while True:
                item = self._queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
