"""Choice of the best evaluation, and count of evaluations without improvement."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pretrain.errors import TrainingError
from pretrain.training.state import RunState

__all__ = ["LOWER_IS_BETTER", "improves", "score"]

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "mse", "rmse", "mae"})
"""Figures of which less is better; of all others more is."""


def score(figures: Mapping[str, float], monitor: str) -> float:
    """Return the monitored figure, negated if higher is better, so that lower scores are better.

    Raises:
        TrainingError: the evaluation has no such figure.
    """
    if monitor not in figures:
        known = [name for name in figures if name != "targets"]
        raise TrainingError(
            f"train.monitor is {monitor!r}, but the evaluation has only these figures: {', '.join(known)}. Set it to "
            "one of them."
        )
    value = figures[monitor]
    return value if monitor in LOWER_IS_BETTER else -value


def improves(
    state: RunState,
    figures: Mapping[str, float],
    monitor: str,
    *,
    rows: int = 0,
    last: bool = False,
) -> bool:
    """Whether an evaluation at ``state.step`` is the best so far; if so, it is recorded in ``state``.

    Ties are resolved by the lower loss: a small held-out set has few distinct accuracies, and the first model that
    reaches one is seldom the best of them. A NaN figure (a correlation of constants) is never the best.

    The best of many evaluations on few rows is partly due to chance, in particular at a high learning rate, where
    figures scatter. At the end of the schedule the rate is low, so the last evaluation counts as the best unless the
    best figure is above its own by more than one standard error of a proportion of the targets (docs/lab-log.md). A
    loss, which scatters less, is compared as it is.

    Scores of another figure, or on another number of ``rows``, cannot be compared: the best begins afresh.

    Raises:
        TrainingError: as `score`.
    """
    value, loss = score(figures, monitor), figures.get("loss")
    if state.monitor != monitor or state.eval_rows not in (None, rows):
        state.best_score, state.evals_since_best, state.loss_at_best = math.inf, 0, None
    state.monitor, state.eval_rows = monitor, rows
    better = value < state.best_score
    # Older states lack the loss; then the first of equal evaluations stays the best.
    if value == state.best_score and loss is not None and state.loss_at_best is not None:
        better = loss < state.loss_at_best
    if not better and last and (chance := _chance(state, figures)):
        better = value - state.best_score <= chance
    if better:  # what is compared with is always the figure of the checkpoint that is kept
        state.best_score, state.best_step = value, state.step
        state.loss_at_best = loss if loss is not None and math.isfinite(loss) else None
    state.evals_since_best = 0 if better else state.evals_since_best + 1
    return better


def _chance(state: RunState, figures: Mapping[str, float]) -> float:
    """Return the standard error of the best figure as a proportion of the targets; 0 for others, such as a loss."""
    share, targets = -state.best_score, figures.get("targets", 0.0)
    return math.sqrt(share * (1.0 - share) / targets) if targets and 0.0 < share < 1.0 else 0.0
