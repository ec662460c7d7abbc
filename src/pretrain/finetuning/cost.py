"""Steps that pre-training saves: how soon one learning curve reaches the best score of another."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["steps_to_best"]


def steps_to_best(
    pretrained: Sequence[tuple[float, float]],
    scratch: Sequence[tuple[float, float]],
    *,
    pretraining_steps: float = 0.0,
    lower: bool = False,
) -> tuple[float, float] | None:
    """How soon the pre-trained model reaches the best score of the one from scratch.

    Args:
        pretrained: (step, validation score) in the order of the steps.
        scratch: the same for the model from scratch.
        pretraining_steps: the cost of pre-training in fine-tuning steps (its seconds / seconds of one such step).
        lower: whether lower scores are better.

    Returns:
        Steps of the pre-trained model divided by those of scratch, and the same with pre-training added; infinity
        if the score is never reached; None if scratch has no score, or its best one at step 0.
    """
    sign = -1.0 if lower else 1.0
    usable = [(step, sign * score) for step, score in scratch if not math.isnan(score)]
    if not usable:
        return None
    best = max(score for _, score in usable)
    base = next(step for step, score in usable if score == best)
    if base <= 0:
        return None
    own = next((step for step, score in pretrained if sign * score >= best), math.inf)
    return own / base, (own + pretraining_steps) / base
