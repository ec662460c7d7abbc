"""Micro-batches of optimizer steps, prefetched by a background thread.

The rows at a position are a pure function of (seed, position), so the thread has no state to save: a resumed run starts
at the position in the checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch

from pretrain.data.loader import Loader, row_rngs
from pretrain.errors import DataError, TrainingError
from pretrain.nn.loss import IGNORE
from pretrain.nn.packed import sequence_offsets

if TYPE_CHECKING:
    from pretrain.models.base import Model
    from pretrain.objectives.base import Batch, Objective

__all__ = ["Feed", "check_batch", "check_targets", "hash_seed", "to_device"]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch; the copy overlaps with compute on a GPU.

    On CUDA the first tokens of the documents are added, by which attention finds them without waiting for the device.
    """
    if device.type == "cpu":
        return batch
    documents = batch.get("document_ids", batch.get("attention_mask"))
    if device.type == "cuda" and documents is not None and documents.ndim == 2:
        offsets = sequence_offsets(documents)
        batch = batch if offsets is None else {**batch, "document_offsets": offsets}
    return {
        key: (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
        for key, value in batch.items()
    }


def check_batch(batch: Batch, model: Model, kind: str, rows: Sequence[int]) -> None:
    """Check ids, positions and labels against the model, on the CPU, where the error can name the row.

    On a GPU an id out of range is a device-side assertion, which names no row and ends the process.

    Args:
        batch: collated by an objective.
        model: the ids must be within its tables.
        kind: name of the rows in errors.
        rows: indices of the rows in the data.

    Raises:
        DataError: an id is out of range.
    """
    for key, (what, size) in model.backbone.id_limits().items():
        values = batch.get(key)
        if values is None or values.ndim < 2 or (key == "labels" and not _is_vocabulary(model)):
            continue
        wrong = (values >= size) | (values < 0)
        if key == "labels":
            wrong &= values != IGNORE
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0][:2])
            # In a packed batch a row holds several examples, which cannot be told apart here.
            plain = len(rows) == len(values) and "first_index" not in batch
            named = f"row {rows[row]}" if plain else f"rows {_some(rows)}: one of these"
            raise DataError(
                f"{kind} {named} has {key} {int(values[row, column])} at position {column}, but the "
                f"model's {what} is {size}. The data were prepared with another tokenizer; prepare them again with "
                "the model's own (data.tokenizer=CHECKPOINT). Ignored labels are -100."
            )


def _some(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:16])) + ", ..." * (len(rows) > 16)


def check_targets(count: float, step: int, first: int, batch_rows: int) -> None:
    """Check that a step has targets, by whose number its loss is divided.

    Raises:
        TrainingError: no row of the step has a target.
    """
    if count == 0:
        raise TrainingError(
            f"Step {step}: rows {first} to {first + batch_rows - 1} of the run have no target at all, so there is "
            "nothing to learn from them. Every label is ignored: check the masking rate, the label column and that "
            "rows are longer than one token."
        )


def _is_vocabulary(model: Model) -> bool:
    return model.head_kind in ("causal-lm", "masked-lm")


class Feed:
    """The micro-batches of optimizer steps.

    Args:
        objective: collates the batches.
        loader: rows in training order.
        batch_rows: rows in a global batch.
        micro_rows: rows in a micro-batch; may be set to another divisor of the share during a run.
        share: data-parallel rank and size; every rank gets an equal number of consecutive rows of a global batch.

    Attributes:
        loader: rows in the order of training; a run that is resumed sets how it cuts documents.
        share_rows: rows of a global batch that this rank gets.
        total_rows: rows of the whole run; None if it is limited by time, or not known yet.
    """

    def __init__(
        self,
        objective: Objective,
        loader: Loader,
        *,
        batch_rows: int,
        micro_rows: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._objective, self.loader = objective, loader
        self.total_rows: int | None = None
        self._batch_rows, self.micro_rows = batch_rows, micro_rows
        self.share_rows = batch_rows // share[1]
        self._first = share[0] * self.share_rows

    def step_at(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of the step whose first row is number ``position`` of the run."""
        return self._split(position, self.micro_rows)

    def _split(self, position: int, micro_rows: int) -> list[Batch]:
        if self.total_rows is not None:
            self._objective.progress = min(1.0, position / self.total_rows)
        first_row = position + self._first
        examples = self.loader.examples(first_row, self.share_rows)
        rngs = row_rngs(self.loader.seed, "collate", first_row, self.share_rows)
        rows, batches = self.loader.indices(first_row, self.share_rows), []
        for i in range(0, self.share_rows, micro_rows):
            end = i + micro_rows
            batch = self._objective.collate(examples[i:end], rngs[i:end])
            check_batch(batch, self._objective.model, "Training", [int(r) for r in rows[i:end]])
            batches.append(batch)
        return batches

    def largest(self) -> Batch | None:
        """Return a micro-batch of the longest rows; None for data whose rows all have one length."""
        rows = self.loader.rows
        if not hasattr(rows, "largest"):
            return None
        longest = [int(i) for i in rows.largest(self.micro_rows)]
        rngs = [row_rngs(self.loader.seed, "collate", i, 1)[0] for i in longest]
        batch = self._objective.collate([rows[i] for i in longest], rngs)
        check_batch(batch, self._objective.model, "Training", longest)
        return batch

    def indices(self, position: int) -> list[int]:
        """Return the indices, in the data, of the rows of the global batch at ``position``."""
        return [int(i) for i in self.loader.indices(position, self._batch_rows)]

    def steps(self, position: int) -> Generator[list[Batch], None, None]:
        """Yield steps from ``position``, endlessly, prefetched by the loader's thread; closing it stops the thread."""

        def make(at: int, _: int) -> tuple[int, int, list[Batch]]:
            rows = self.micro_rows
            return at, rows, self._split(at, rows)

        places = ((at, self._batch_rows) for at in itertools.count(position, self._batch_rows))
        with contextlib.closing(self.loader.stream(places, make)) as stream:
            for at, rows, batches in stream:
                yield batches if rows == self.micro_rows else self.step_at(at)


def hash_seed(*parts: int) -> int:
    """Return a 63-bit seed from integers (the finaliser of SplitMix64); similar inputs give unrelated seeds."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
        value = value * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
    return value >> 1
