"""Evaluation on held-out rows: sums over targets, the same rows and the same draws every time."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.data.loader import Examples, row_rngs
from pretrain.errors import DataError, TrainingError
from pretrain.training.feed import check_batch, to_device
from pretrain.training.precision import Precision

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

__all__ = ["NoTargets", "data_stats", "evaluate_rows", "probe_loss"]


class NoTargets(DataError):
    """The rows have nothing to predict."""


_SEED = 0x5EED  # of evaluation draws: part of the definition of the figure, so no run can set it


def data_stats(data: Any) -> dict[str, float]:
    """Figures of a split that turn a loss per token into one per byte; empty when it has no text."""
    # Every token but the first of a document is predicted; where that is not known, every token.
    targets = getattr(data, "num_targets", 0) or getattr(data, "num_tokens", 0)
    size = getattr(data, "num_bytes", 0)
    return {"targets_per_byte": targets / size} if targets and size else {}


def evaluate_rows(
    objective: Objective,
    data: Examples,
    precision: Precision,
    *,
    batch_rows: int,
    limit: int = 0,
) -> dict[str, float]:
    """Evaluate an objective.

    Args:
        objective: its model is put into evaluation mode and back.
        data: held-out rows, taken in their own order.
        precision: compute type and device.
        batch_rows: rows in one forward pass.
        limit: rows at most, spread evenly over the data; 0 takes all.

    Returns:
        The objective's figures (``loss`` in nats per target and what it adds), with ``targets``: plain numbers,
        which is what a log, a logger and a checkpoint's metadata can hold. Whatever else ``summarize`` gives is
        left out.

    Raises:
        DataError: there is no row, or no row has a target.
        TrainingError: a metric changes its kind or shape from batch to batch.
    """
    rows = len(data)
    if rows == 0:
        raise DataError(
            "There are no held-out rows to evaluate on: hold out more text (data.valid)."
        )
    take = range(rows) if not limit or limit >= rows else [i * rows // limit for i in range(limit)]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    count = 0.0
    metrics: dict[str, Any] = {}
    was_training = objective.training
    objective.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(take), batch_rows):
                part = take[start : start + batch_rows]
                rngs = [row_rngs(_SEED, "evaluation", row, 1)[0] for row in part]
                batch = objective.collate([data[row] for row in part], rngs, evaluation=True)
                check_batch(batch, objective.model, "Held-out", part)
                with precision.autocast():
                    loss = objective(to_device(batch, precision.device))
                total += loss.total.cpu().double()
                count += float(loss.count)
                _gather(metrics, loss.metrics, objective)
    finally:
        objective.train(was_training)
    if count == 0:
        raise NoTargets(
            f"None of the {len(take)} held-out rows has a target, so there is nothing to evaluate. "
            "Check the masking rate and that the rows are not empty or all special tokens."
        )
    sums = {
        key: value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
        for key, value in metrics.items()
    }
    figures = objective.summarize(float(total), count, sums, data_stats(data))
    plain = {key: _number(value) for key, value in figures.items()}
    return {key: value for key, value in plain.items() if value is not None} | {"targets": count}


def probe_loss(objective: Objective, rows: Examples, precision: Precision) -> float | None:
    """Loss on the first two rows, by which a resumed run recognises its own weights; None if they have none."""
    few = [rows[i] for i in range(min(2, len(rows)))]
    try:
        loss = evaluate_rows(objective, few, precision, batch_rows=2)["loss"]
    except NoTargets:
        return None
    return loss if math.isfinite(loss) else None


def _gather(found: dict[str, Any], metrics: Mapping[str, Any], objective: Objective) -> None:
    """Add the metrics of one batch: tensors are summed in fp64 on the CPU, lists are joined there."""
    for key, value in metrics.items():
        before = found.get(key)
        if isinstance(value, list | tuple):
            moved = [v.detach().cpu() if isinstance(v, Tensor) else v for v in value]
            if isinstance(before, list):
                before.extend(moved)  # a copy per batch would cost the square of the rows
                continue
            new: Any = moved
        else:
            # First to the CPU: not every accelerator has fp64.
            new = torch.as_tensor(value).detach().cpu().double()
        if before is None:
            found[key] = new
        elif isinstance(new, Tensor) and isinstance(before, Tensor) and new.shape == before.shape:
            found[key] = before + new
        else:
            shapes = [tuple(v.shape) if isinstance(v, Tensor) else "list" for v in (before, new)]
            raise TrainingError(
                f"The metric {key!r} of {type(objective).__name__} is a {shapes[0]} in one batch and a {shapes[1]} in "
                "another. Tensors are summed over batches and need one shape; return a list for one value per row."
            )


def _number(value: Any) -> float | None:
    """A plain number as a float, None for anything else."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) else None
