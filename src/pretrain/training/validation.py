"""Evaluations of a run on the held-out rows, logged and compared with the best so far."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.training.evaluate import EvaluationStopped, evaluate_rows
from pretrain.training.monitor import improves

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["Cost", "Evaluation", "run_validation"]

# Evaluations that take more than this share of the time are remarked on, after so many of them.
_DEAR, _SEEN = 0.1, 3


class Cost:
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
            f"fewer train.eval_rows (now {train.eval_rows or rows:,} of {rows:,}) they take less"
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
    state, strategy, rows = trainer.state, trainer.strategy, len(trainer.eval_data)
    limit = min(trainer.train.eval_rows or rows, rows)
    try:
        figures, seconds = _figures(trainer, limit)
        state.last_eval, state.owed = state.step, False
        improved = improves(state, figures, trainer.train.monitor, rows=limit, last=last)
        note = " (best)" if improved else ""
        if last and limit < rows:
            (figures, seconds), note = _figures(trainer, rows), " on all rows"
    except EvaluationStopped:
        state.owed = True  # repeated on resume, before the next step
        trainer.say(f"asked to stop: the evaluation after step {state.step:,} is broken off")
        return None
    samples: list[str] = []
    trainer.world.mark("evaluate", state.step)
    if strategy.speaks:
        plain = trainer.objective.model.backbone.uncompiled()
        with trainer.average.applied(), strategy.whole(), plain:
            samples = trainer.objective.preview(
                [trainer.eval_data[0]], trainer.train.sample, trainer.train.seed
            )
    return Evaluation(figures, samples, improved, note, seconds)


def _figures(trainer: Trainer, limit: int) -> tuple[dict[str, float], float]:
    """Return the metrics on ``limit`` rows, and the seconds that all rows would take."""
    assert trainer.eval_data is not None
    began, train = time.monotonic(), trainer.train
    trainer.world.mark("evaluate", trainer.state.step)
    # Coupled rows are compared within one global batch, for any number of ranks.
    rows = train.batch_rows if trainer.objective.couples_examples else trainer.micro_rows
    with trainer.average.applied():
        figures = evaluate_rows(
            trainer.objective,
            trainer.eval_data,
            trainer.eval_precision,
            batch_rows=rows,
            limit=limit,
            strategy=trainer.strategy,
            stopped=trainer.asked_to_stop,
        )
    # All ranks must make the same decisions from them.
    figures = dict(trainer.world.broadcast_object(figures))
    return figures, (time.monotonic() - began) * len(trainer.eval_data) / limit
