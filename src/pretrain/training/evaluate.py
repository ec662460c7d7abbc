"""Evaluation on held-out rows: sums over targets, with the same rows and random draws every time."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.data.loader import Examples, row_rngs
from pretrain.errors import DataError, NoTargets, TrainingError
from pretrain.objectives.base import Loss
from pretrain.training.feed import check_batch, to_device
from pretrain.training.precision import Precision

if TYPE_CHECKING:
    from pretrain.distributed.strategy import Strategy
    from pretrain.objectives.base import Objective

__all__ = ["EvaluationStopped", "NoTargets", "data_stats", "evaluate_rows", "probe_loss"]


class EvaluationStopped(Exception):
    """The evaluation was interrupted because the run was asked to stop."""


_SEED = 0x5EED  # seed of evaluation draws; part of the definition of the figures, so not a setting


def data_stats(data: Any) -> dict[str, float]:
    """Return what converts a loss per token into one per byte; empty if the data have no text."""
    # Every token but the first of a document is a target; if that number is unknown, use all tokens.
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
    strategy: Strategy | None = None,
    split: bool = True,
    stopped: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Evaluate an objective on held-out rows.

    Args:
        objective: it is put into evaluation mode, and back afterwards.
        data: held-out rows, used in their own order.
        precision: compute type and device.
        batch_rows: rows per forward pass.
        limit: maximum number of rows, spread evenly over the data; 0 uses all.
        strategy: distribution of the objective over ranks; None for this process alone.
        split: distribute the batches over ranks; otherwise every rank evaluates all of them.
        stopped: called by all ranks before every batch; the evaluation is interrupted when it returns True.

    Returns:
        The figures of the objective (``loss`` in nats per target, and others) and ``targets``, as plain numbers that a
        log, a logger and the metadata of a checkpoint can hold. Other values returned by ``summarize`` are left out.

    Raises:
        DataError: there is no row, or no row has a target.
        TrainingError: a metric changes its kind or shape from batch to batch.
        EvaluationStopped: see ``stopped``.
    """
    rows = len(data)
    if rows == 0:
        raise DataError(
            "There are no held-out rows to evaluate on: hold out more text (data.valid)."
        )
    take = range(rows) if not limit or limit >= rows else [i * rows // limit for i in range(limit)]
    starts = range(0, len(take), batch_rows)
    dp_rank, dp_size = (0, 1)
    if strategy is not None and split:
        dp_rank, dp_size = strategy.world.dp_rank, strategy.world.sizes.dp
    losses: dict[int, Loss] = {}
    was_training = objective.training
    objective.eval()
    try:
        with torch.inference_mode() if strategy is None else strategy.without_gradient():
            for round_index in range(-(-len(starts) // dp_size)):
                k = round_index * dp_size + dp_rank
                if stopped is not None and stopped():
                    raise EvaluationStopped
                if strategy is not None:
                    strategy.world.heartbeat()
                # Ranks without a batch left run a dummy forward pass, because the collectives of a sharded model need
                # every rank; its result is discarded.
                if k >= len(starts) and not (strategy is not None and strategy.sharded):
                    continue
                start = starts[k if k < len(starts) else 0]
                part = take[start : start + batch_rows]
                rngs = [row_rngs(_SEED, "evaluation", row, 1)[0] for row in part]
                batch = objective.collate([data[row] for row in part], rngs, evaluation=True)
                check_batch(batch, objective.model, "Held-out", part)
                with precision.autocast():
                    moved = to_device(batch, precision.device)
                    loss = objective(moved) if strategy is None else strategy.forward_no_sync(moved)
                if k < len(starts):
                    losses[k] = _plain(loss)
    finally:
        objective.train(was_training)
    total, count, metrics = _together(
        losses, len(starts), objective, strategy if dp_size > 1 else None
    )
    if count == 0:
        raise NoTargets(
            f"None of the {len(take)} held-out rows has a target, so there is nothing to evaluate. "
            "Check the masking rate and that the rows are not empty, all special tokens, or masks of 255 alone."
        )
    figures = objective.summarize(total, count, _summed(metrics), data_stats(data))
    plain = {key: _number(value) for key, value in figures.items()}
    return {key: value for key, value in plain.items() if value is not None} | {"targets": count}


def _summed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics over all batches as ``summarize`` takes them: 0-d tensors as floats."""
    return {
        key: value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
        for key, value in metrics.items()
    }


def probe_loss(
    objective: Objective, rows: Examples, precision: Precision, strategy: Strategy | None = None
) -> float | None:
    """Return the loss on the first two rows, by which a resumed run verifies its weights; None if not finite."""
    few = [rows[i] for i in range(min(2, len(rows)))]
    try:
        figures = evaluate_rows(
            objective, few, precision, batch_rows=2, strategy=strategy, split=False
        )
    except NoTargets:
        return None
    return figures["loss"] if math.isfinite(figures["loss"]) else None


def _plain(loss: Loss) -> Loss:
    """Return the loss and metrics of one batch on the CPU: tensors in fp64; lists keep the types of their tensors."""
    metrics: dict[str, Any] = {}
    for key, value in loss.metrics.items():
        if isinstance(value, list | tuple):
            metrics[key] = [v.detach().cpu() if isinstance(v, Tensor) else v for v in value]
        else:
            # Moved to the CPU first, because not every accelerator has fp64.
            metrics[key] = torch.as_tensor(value).detach().cpu().double()
    return Loss(loss.total.cpu().double(), loss.count.cpu(), metrics)


def _together(
    losses: dict[int, Loss], batches: int, objective: Objective, strategy: Strategy | None
) -> tuple[float, float, dict[str, Any]]:
    """Return total, targets and metrics over all batches, summed in order: the same numbers on every rank."""
    if strategy is not None:
        own = {k: (loss.total, loss.count, loss.metrics) for k, loss in losses.items()}
        gathered = strategy.world.all_gather_object(own if strategy.world.tp_rank == 0 else {})
        losses = {k: Loss(*parts) for part in gathered for k, parts in part.items()}
    total, count = 0.0, 0.0
    metrics: dict[str, Any] = {}
    for k in range(batches):
        total += float(losses[k].total)
        count += float(losses[k].count)
        _gather(metrics, losses[k].metrics, objective)
    return total, count, metrics


def _gather(total: dict[str, Any], metrics: Mapping[str, Any], objective: Objective) -> None:
    """Add the metrics of one batch: tensors are summed, lists are joined."""
    for key, new in metrics.items():
        before = total.get(key)
        if isinstance(new, list) and isinstance(before, list):
            before.extend(new)  # a copy per batch would take quadratic time
        elif before is None:
            total[key] = list(new) if isinstance(new, list) else new
        elif isinstance(new, Tensor) and isinstance(before, Tensor) and new.shape == before.shape:
            total[key] = before + new
        else:
            shapes = [tuple(v.shape) if isinstance(v, Tensor) else "list" for v in (before, new)]
            raise TrainingError(
                f"The metric {key!r} of {type(objective).__name__} is a {shapes[0]} in one batch and a {shapes[1]} in "
                "another. Tensors are summed over batches and need one shape; return a list for one value per row."
            )


def _number(value: Any) -> float | None:
    """Return a plain number as a float, None for anything else."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) else None
