"""The figures of a fine-tuned model, on one process or by those that share it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.training.evaluate import evaluate_rows
from pretrain.training.restore import load_weights

if TYPE_CHECKING:
    from pretrain.data.task_rows import TaskRows
    from pretrain.training.state import Run
    from pretrain.training.trainer import Trainer

__all__ = ["EVAL_ROWS", "measure_in_parts"]

EVAL_ROWS = 64  # in one forward pass


def measure_in_parts(
    trainer: Trainer, run: Run, parts: Sequence[TaskRows | None]
) -> list[dict[str, float]]:
    """Measure the weights of the best evaluation where they lie: no process may be able to hold all of them.

    Args:
        trainer: that has just trained; all processes call it.
        run: what came of it.
        parts: rows, or None where there are none.

    Returns:
        The figures of each part, the same on all processes; empty for None.
    """
    chosen, strategy, world = run.best or run.checkpoint, trainer.strategy, trainer.world
    assert chosen is not None
    world.mark("evaluate", run.step)
    load_weights(trainer.objective, chosen, {}, layout=strategy.layout, peers=world.peers())
    found = []
    for rows in parts:
        figures: dict[str, float] = {}
        if rows is not None:
            figures = evaluate_rows(
                trainer.objective,
                rows,
                trainer.eval_precision,
                batch_rows=EVAL_ROWS,
                strategy=strategy,
            )
        found.append(figures)
    return found
