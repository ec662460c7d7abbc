"""Batches of a step, prepared one step ahead in a background thread.

What comes at a position is a pure function of (seed, position), so the thread holds no state worth saving: after
a resume it starts at the position that the checkpoint names.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch

from pretrain.data.loader import Loader

if TYPE_CHECKING:
    from pretrain.objectives.base import Batch, Objective

__all__ = ["Feed", "hash_seed", "real_tokens", "to_device"]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch; the copy overlaps with compute on a GPU."""
    if device.type == "cpu":
        return batch
    return {
        key: (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
        for key, value in batch.items()
    }


class Feed:
    """The micro-batches of optimizer steps.

    Args:
        objective: makes the batches.
        loader: rows in their training order.
        batch_rows: rows in a step.
        micro_rows: rows in a micro-batch.
    """

    def __init__(
        self, objective: Objective, loader: Loader, *, batch_rows: int, micro_rows: int
    ) -> None:
        self._objective, self._loader = objective, loader
        self._batch_rows, self._micro_rows = batch_rows, micro_rows

    def step_at(self, position: int) -> list[Batch]:
        """The micro-batches of the step whose first row is number ``position`` of the run."""
        examples = self._loader.examples(position, self._batch_rows)
        rngs = self._loader.rngs(position, self._batch_rows)
        return [
            self._objective.collate(
                examples[i : i + self._micro_rows], rngs[i : i + self._micro_rows]
            )
            for i in range(0, self._batch_rows, self._micro_rows)
        ]

    def steps(self, position: int) -> Generator[list[Batch], None, None]:
        """Steps without end from ``position``, read ahead by the loader's thread; close it to stop the thread."""
        places = ((at, self._batch_rows) for at in itertools.count(position, self._batch_rows))
        return self._loader.stream(places, lambda at, _: self.step_at(at))


def hash_seed(*parts: int) -> int:
    """A 63-bit seed from integers (the finaliser of SplitMix64), so that near inputs give far seeds."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
        value = value * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
    return value >> 1


def real_tokens(batch: Batch) -> int:
    """Tokens that are not padding; rows where a batch has no tokens."""
    for key in ("document_ids", "attention_mask"):
        if key in batch:
            return int((batch[key] != 0).sum())
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    return len(next(iter(batch.values())))
