"""Evaluations of a run on the held-out rows: what they cost, what they find, and which of them is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.errors import TrainingError
from pretrain.training.evaluate import EvaluationStopped, evaluate_rows
from pretrain.training.state import RunState

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["LOWER_IS_BETTER", "Evaluation", "EvaluationTime", "improves", "run_validation", "score"]

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "mse", "rmse", "mae"})
"""Figures of which less is better; of all others more is."""

# Evaluations that take more than this share of the time are remarked on, after so many of them.
_DEAR, _SEEN = 0.1, 3


class EvaluationTime:
    """Time that evaluations take, beside that of the whole run since this process started it.

    Evaluations are never moved by it: which checkpoint is the best must not depend on the speed of the machine.
    """

    def __init__(self) -> None:
        self._began, self._seconds, self._count = time.monotonic(), 0.0, 0

    def add(self, seconds: float, trainer: Trainer) -> str | None:
        """Count an evaluation; return a remark, once, if they take too much of the time."""
        self._seconds, self._count = self._seconds + seconds, self._count + 1
        share = self._seconds / max(1e-9, time.monotonic() - self._began)
        if self._count != _SEEN or share < _DEAR or trainer.eval_data is None:
            return None
        train, rows = trainer.train, len(trainer.eval_data)
        return (
            f"evaluations take {share:.0%} of the time: with a larger train.eval_every (now {train.eval_every}) or "
            f"fewer train.eval_rows (now {min(train.eval_rows or rows, rows):,} of {rows:,}) they take less"
        )


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        figures: metrics on the held-out rows, the same on all ranks.
        samples: texts of the model for the log; empty except on the ranks that write them.
        improved: whether the figures are the best so far.
        note: what the console adds to the line.
        seconds: time that an evaluation on all rows takes.
    """

    figures: Mapping[str, float]
    samples: list[str]
    improved: bool
    note: str
    seconds: float


def run_validation(trainer: Trainer, *, last: bool = False) -> Evaluation | None:
    """Evaluate on the held-out rows and compare with the best so far; return None if a stop request interrupts it.

    With ``train.eval_rows`` the best is chosen on that sample, and the last evaluation is also made on all rows. A stop
    request interrupts the evaluation, because there may only be time to save.
    """
    assert trainer.eval_data is not None
    state, setup, rows = trainer.state, trainer.setup, len(trainer.eval_data)
    limit = min(trainer.train.eval_rows or rows, rows)
    try:
        figures, seconds = _figures(trainer, limit)
        state.last_eval, state.eval_pending = state.step, False
        same = state.monitor == trainer.train.monitor and state.eval_rows in (None, limit)
        before = state.best_score if same else math.inf
        improved = improves(state, figures, trainer.train.monitor, rows=limit, last=last)
        note = " (best)" if improved else ""
        if improved and state.best_score > before:
            note = " (best: the last, as an earlier one was better by less than chance)"
        if last and limit < rows:
            (figures, seconds), note = _figures(trainer, rows), " on all rows"
    except EvaluationStopped:
        state.eval_pending = True  # repeated on resume, before the next step
        trainer.say(f"asked to stop: the evaluation after step {state.step:,} is broken off")
        return None
    samples: list[str] = []
    trainer.world.mark("evaluate", state.step)
    # The scores of a run that diverged give no text; its next steps are skipped, and say what to change.
    if setup.strategy.generates_samples and math.isfinite(figures.get("loss", 0.0)):
        plain = trainer.objective.model.backbone.uncompiled()
        with setup.average.applied(), setup.strategy.whole(), plain:
            samples = trainer.objective.preview(
                [trainer.eval_data[0]], trainer.train.sample, trainer.train.seed
            )
    return Evaluation(figures, samples, improved, note, seconds)


def _figures(trainer: Trainer, limit: int) -> tuple[dict[str, float], float]:
    """Return the metrics on ``limit`` rows, and the seconds that all rows would take."""
    assert trainer.eval_data is not None
    began, train, setup = time.monotonic(), trainer.train, trainer.setup
    trainer.world.mark("evaluate", trainer.state.step)
    # Coupled rows are compared within one global batch, for any number of ranks.
    rows = train.batch_rows if trainer.objective.couples_examples else trainer.micro_rows
    with setup.average.applied():
        figures = evaluate_rows(
            trainer.objective,
            trainer.eval_data,
            setup.eval_precision,
            batch_rows=rows,
            limit=limit,
            strategy=setup.strategy,
            stopped=trainer.asked_to_stop,
        )
    # All ranks must make the same decisions from them.
    figures = dict(trainer.world.broadcast_object(figures))
    return figures, (time.monotonic() - began) * len(trainer.eval_data) / limit


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
    if better:  # a later figure is compared with that of the kept checkpoint
        state.best_score, state.best_step = value, state.step
        state.loss_at_best = loss if loss is not None and math.isfinite(loss) else None
    state.evals_since_best = 0 if better else state.evals_since_best + 1
    return better


def _chance(state: RunState, figures: Mapping[str, float]) -> float:
    """Return the standard error of the best figure as a proportion of the targets; 0 for others, such as a loss."""
    share, targets = -state.best_score, figures.get("targets", 0.0)
    return math.sqrt(share * (1.0 - share) / targets) if targets and 0.0 < share < 1.0 else 0.0
