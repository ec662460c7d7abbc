"""Evaluation on held-out rows: sums over targets, the same rows and the same draws every time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pretrain.data.loader import Examples, row_rngs
from pretrain.errors import DataError
from pretrain.training.feed import check_batch, to_device
from pretrain.training.precision import Precision

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

__all__ = ["NoTargets", "data_stats", "evaluate_rows"]


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
        The objective's figures (``loss`` in nats per target and what it adds), with ``targets``.

    Raises:
        DataError: there is no row, or no row has a target.
    """
    rows = len(data)
    if rows == 0:
        raise DataError(
            "There are no held-out rows to evaluate on: hold out more text (data.valid)."
        )
    take = range(rows) if not limit or limit >= rows else [i * rows // limit for i in range(limit)]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    count = 0.0
    metrics: dict[str, float] = {}
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
                for key, value in loss.metrics.items():
                    metrics[key] = metrics.get(key, 0.0) + float(value)
    finally:
        objective.train(was_training)
    if count == 0:
        raise NoTargets(
            f"None of the {len(take)} held-out rows has a target, so there is nothing to evaluate. "
            "Check the masking rate and that the rows are not empty or all special tokens."
        )
    figures = objective.summarize(float(total), count, metrics, data_stats(data))
    return figures | {"targets": count}
