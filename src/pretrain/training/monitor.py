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


def improves(
    state: RunState, figures: Mapping[str, float], monitor: str, *, last: bool = False
) -> bool:
    """Whether an evaluation at ``state.step`` is the best so far; the state remembers what the next must beat.

    Of evaluations with the same figure the one with the lower loss is better: a small held-out set has few different
    accuracies, and the first model that reaches one is seldom the best of them. A figure that is not a number (a
    correlation of constants) is never the best.

    The best of many evaluations on few rows is so in part by chance, above all of those at a high learning rate, which
    scatter. At the end of the schedule the rate has come down, so the last evaluation is taken for the best one unless
    the best figure is above its own by more than a standard error of a share of so many targets (docs/lab-log.md). A
    loss, which scatters less, is taken as it is.

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
    elif last and (chance := _chance(state, figures)) and value - state.best_score <= chance:
        better, state.best_step = True, state.step
    state.evals_since_best = 0 if better else state.evals_since_best + 1
    return better


def _chance(state: RunState, figures: Mapping[str, float]) -> float:
    """Standard error of the best figure as a share of the targets; 0 for what is no share, such as a loss."""
    share, targets = -state.best_score, figures.get("targets", 0.0)
    return math.sqrt(share * (1.0 - share) / targets) if targets and 0.0 < share < 1.0 else 0.0
