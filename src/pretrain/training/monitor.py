"""Which evaluation is the best one, and when it has not become better for too long."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pretrain.errors import TrainingError
from pretrain.metrics import LOWER_IS_BETTER
from pretrain.training.state import RunState

__all__ = ["improves", "score"]


def score(figures: Mapping[str, float], monitor: str) -> float:
    """The monitored figure, with its sign turned where higher is better: lower scores are better.

    Raises:
        TrainingError: the evaluation has no such figure.
    """
    if monitor not in figures:
        known = [name for name in figures if name != "targets"]
        raise TrainingError(
            f"train.monitor is {monitor!r}, which is none of the figures of this evaluation: {', '.join(known)}."
        )
    value = figures[monitor]
    return value if monitor in LOWER_IS_BETTER else -value


def improves(state: RunState, figures: Mapping[str, float], monitor: str) -> bool:
    """Whether an evaluation at ``state.step`` is the best so far; the state remembers what the next must beat.

    Of evaluations with the same figure the one with the lower loss is better: a small held-out set has few different
    accuracies, and the first model that reaches one is seldom the best of them. A figure that is not a number (a
    correlation of constants) is never the best.

    Raises:
        TrainingError: as `score`.
    """
    value, loss = score(figures, monitor), figures.get("loss")
    if state.monitor != monitor:  # the score of another figure says nothing about this one
        state.monitor, state.best_score, state.evals_since_best = monitor, math.inf, 0
        state.loss_at_best = None
    better = value < state.best_score
    # Runs from before losses were remembered keep their first evaluation.
    if value == state.best_score and loss is not None and state.loss_at_best is not None:
        better = loss < state.loss_at_best
    if better:
        state.best_score, state.best_step = value, state.step
        state.loss_at_best = loss if loss is not None and math.isfinite(loss) else None
    state.evals_since_best = 0 if better else state.evals_since_best + 1
    return better
