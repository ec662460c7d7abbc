"""Learning-rate schedules as a pure function of the optimizer step.

Warm-up, then cosine (SGDR, arXiv 1608.03983), linear, warm-up-stable-decay (MiniCPM, arXiv 2404.06395) or
constant. A schedule depends on optimizer steps only, so gradient accumulation and the number of devices do not
change it.
"""

from __future__ import annotations

import math

from pretrain.errors import ConfigError, did_you_mean

__all__ = ["SCHEDULES", "lr_factor", "warmup_steps"]

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def warmup_steps(warmup: float, total: int) -> int:
    """Return the number of warm-up steps: ``warmup`` itself if at least 1, else that share of ``total``."""
    return round(warmup) if warmup >= 1 else round(warmup * total)


def lr_factor(
    step: int,
    total: int,
    *,
    schedule: str,
    warmup: float = 0.0,
    decay: float = 0.4,
    min_lr: float = 0.0,
) -> float:
    """Return the factor on the peak learning rate for optimizer step ``step``, counted from 0.

    Args:
        step: the step about to be taken.
        total: steps of the whole run.
        schedule: one of ``SCHEDULES``.
        warmup: steps, or a share of ``total`` below 1. The factor is (step + 1) / warm-up, so never 0.
        decay: share of the run in the decay phase of ``wsd``.
        min_lr: factor at the end.

    Raises:
        ConfigError: the schedule is not known.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule is {schedule!r}." + did_you_mean(schedule, SCHEDULES))
    warm = warmup_steps(warmup, total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    start = warm if schedule != "wsd" else max(warm, total - round(decay * total))
    if step < start:
        return 1.0
    # The last step (total - 1) is one step before the end, so its factor is above 0 even if min_lr is 0.
    progress = min(1.0, (step - start) / max(1, total - start))
    if schedule == "cosine":
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + (1 - min_lr) * (1 - progress)
