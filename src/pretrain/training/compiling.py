"""Compilation of the blocks: whether a run is long enough to pay for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pretrain.training.peak import peak_flops

if TYPE_CHECKING:
    from pretrain.training.plan import Plan
    from pretrain.training.precision import Precision
    from pretrain.training.trainer import Trainer

__all__ = ["decide_for", "eager_seconds", "should_compile"]

# Share of the peak that eager blocks reach, and of the time that compilation saves: torchtitan published 33.7 and
# 39.0 % of the peak for Llama 3 on H100. Small models reach less, so their runs are longer than the estimate.
_EAGER_SHARE, _SAVED = 0.337, 0.136
# Seconds of a first compilation for the shapes of a run, without a cache.
_COST = 60.0


def should_compile(
    setting: bool | Literal["auto"], device: str, seconds: float
) -> tuple[bool, str]:
    """Decide whether to compile the blocks, and say why.

    Args:
        setting: ``parallel.compile``.
        device: cpu, cuda or mps.
        seconds: of the run with eager blocks.
    """
    if setting != "auto":
        return setting, "as configured"
    if device != "cuda":
        return False, "auto compiles on CUDA only"
    saved = _SAVED * seconds
    return saved > _COST, (
        f"compiling takes about {_COST:.0f} s, and saves about {saved:,.0f} s of a run of {seconds / 60:,.2g} minutes"
    )


def eager_seconds(steps: int, flops: float, peak: float) -> float:
    """Return the seconds of ``steps`` with so many floating-point operations each, on devices of that peak FLOP/s."""
    return steps * flops / (_EAGER_SHARE * peak)


def decide_for(
    trainer: Trainer, plan: Plan, precision: Precision, row_length: int
) -> tuple[bool, str]:
    """Return ``should_compile`` of a run, the same on all ranks, before its model is distributed."""
    setting, device, limit = trainer.parallel.compile, trainer.device.type, plan.limit
    seconds = 60.0 * limit.value if limit.kind == "minutes" else 0.0
    if setting == "auto" and device == "cuda" and not seconds:
        units = trainer.train.batch_rows * row_length
        # The head, which works on the targets, is never compiled.
        flops = trainer.objective.flops(units, 0, row_length)
        peak = peak_flops(precision) * trainer.world.size
        seconds = eager_seconds(plan.total_steps(), flops, peak)
    decision: tuple[bool, str] = should_compile(
        setting, device, trainer.world.broadcast_object(seconds)
    )
    return decision
