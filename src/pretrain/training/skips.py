"""Steps with a non-finite loss or gradient: skipped, reported, and an error after several in a row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pretrain.errors import TrainingError

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["count_skips"]

_MAX_SKIPPED_IN_ROW = 3


def count_skips(trainer: Trainer, finite: bool, nll: float, grad_norm: float) -> None:
    """Count a skipped step and report its rows; moments and weights are unchanged.

    Raises:
        TrainingError: `_MAX_SKIPPED_IN_ROW` steps in a row were skipped.
    """
    state, step = trainer.state, trainer.state.step + 1
    if finite:
        state.skipped_in_row = 0
        return
    # The loss is never scaled, so only a non-finite gradient can be caused by the scale.
    if math.isfinite(nll) and trainer.scaler.explains():
        trainer.say(f"step {step}: fp16 overflow at scale {trainer.scaler.scale:g}, skipped")
        return
    state.skipped += 1
    state.skipped_in_row += 1
    rows = trainer.feed.indices(state.rows)
    named = f"training rows {', '.join(map(str, rows[:16]))}{', ...' * (len(rows) > 16)}"
    trainer.say(f"step {step}: loss {nll}, gradient norm {grad_norm}: skipped; {named}")
    trainer.journal.write({"event": "skipped", "step": step, "rows": rows, "loss": nll})
    if state.skipped_in_row >= _MAX_SKIPPED_IN_ROW:
        raise TrainingError(
            f"{state.skipped_in_row} steps in a row gave a non-finite loss or gradient, the last at step {step} "
            f"({named}). Weights and moments are those of the last good step. Likely causes: a learning rate too "
            "high, broken rows, or fp16 range; lower optim.lr or set train.precision=fp32."
        )
