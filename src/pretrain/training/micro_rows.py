"""Choice of the micro-batch by measuring: the first step's rows in micro-batches of a few sizes, before step 0.

On a CPU nothing is measured. There the bits of a run depend on its settings alone, but the size of a micro-batch
decides in which order sums are rounded and what dropout draws, and a choice by the clock would make them depend on what
else the machine does. Little is lost: as many tokens as fit the caches are within a few per cent of the fastest.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from pretrain.distributed.estimates import memory
from pretrain.distributed.mesh import USABLE
from pretrain.errors import out_of_memory
from pretrain.training.dry_run import effects_undone, run_pass
from pretrain.training.parallelize import common_resources, needs_of
from pretrain.training.plan import row_length

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["candidates", "fastest_micro_rows", "may_measure"]

# Devices on which a run must give the same bits every time.
_EXACT = ("cpu",)
# Share of a run that measuring may take, seconds after which no further size is tried, and speed-up for which the size
# of the rule is replaced: smaller gains are noise.
_SHARE, _SECONDS, _GAIN = 0.02, 30.0, 1.05


def may_measure(trainer: Trainer) -> bool:
    """Whether the size of a micro-batch may be chosen by measuring: neither set, nor fixed, nor part of the result."""
    return not (
        trainer.train.micro_rows
        or trainer.state.micro_rows  # memory ran out with larger ones
        or trainer.state.step  # earlier steps had the size of the rule
        or trainer.device.type in _EXACT
        or trainer.objective.couples_examples
        or trainer.micro_rows_matter
    )


def candidates(trainer: Trainer) -> list[int]:
    """Return the sizes to measure, the smallest first: a quarter, half, once, twice and four times that of the rule.

    All divide the rows of this rank. More than the rule takes are tried by a single process only, which can give up a
    size for which the estimate of memory was too low.
    """
    rule, share = trainer.micro_rows, trainer.setup.feed.share_rows
    smaller = [rule // k for k in (4, 2) if rule % k == 0 and share % (rule // k) == 0]
    if trainer.world.size > 1:
        return [*smaller, rule]
    room, _, _ = common_resources(trainer.device, trainer.world)
    larger = [rows for rows in (2 * rule, 4 * rule) if share % rows == 0]
    fitting = [rows for rows in larger if room is None or _needed(trainer, rows) < room]
    return [*smaller, rule, *fitting]


def _needed(trainer: Trainer, rows: int) -> float:
    """Return the bytes that a device should have for micro-batches of so many rows, by the estimate."""
    choice = trainer.setup.strategy.choice
    length = row_length(trainer.train_data, trainer.objective)
    needed = memory(
        needs_of(trainer, trainer.setup.precision, rows),
        choice.sizes,
        choice.strategy,
        rows * length,
        whole=choice.whole,
        offload=trainer.parallel.cpu_offload,
    )
    return needed.total / USABLE


def fastest_micro_rows(trainer: Trainer, seconds: float) -> tuple[float, str]:
    """Set the fastest micro-batch that fits, if measuring it pays, and record it in the state of the run.

    All ranks choose the same: a size is as slow as it is on the slowest rank.

    Args:
        trainer: after its dry run; ``may_measure``.
        seconds: of an optimizer step with the micro-batch of the rule.

    Returns:
        Seconds of an optimizer step, and what the first lines of the run say about the choice.
    """
    rule, share, sizes = trainer.micro_rows, trainer.setup.feed.share_rows, candidates(trainer)
    seconds = trainer.world.broadcast_object(seconds)
    # Every size gets the rows of the largest one, after a pass over a single micro-batch.
    cost = seconds * (len(sizes) * max(sizes) + sum(sizes)) / share
    if len(sizes) == 1 or cost > _SHARE * seconds * trainer.setup.plan.total_steps(seconds):
        return seconds, (
            f" (not measured: {cost:.2g} s are more than {_SHARE:.0%} of this run)"
            if len(sizes) > 1
            else ""
        )
    began, speeds = time.monotonic(), dict[int, float]()
    # The size of the rule first: it is known to fit, and must be among those that are compared.
    for rows in sorted(sizes, key=lambda rows: (rows != rule, rows)):
        trainer.split(rows)
        taken = _measure(trainer, max(sizes))
        if taken is not None:
            taken = max(trainer.world.all_gather_object(taken))
            speeds[rows] = max(sizes) / max(taken, 1e-9)
        if trainer.world.broadcast_object(time.monotonic() - began > _SECONDS):
            break
    best = max(speeds, key=lambda rows: speeds[rows])
    chosen = best if speeds[best] > _GAIN * speeds[rule] else rule
    trainer.split(chosen, record=True)
    if trainer.device.type == "cuda":  # the peak is to be that of the chosen size
        torch.cuda.reset_peak_memory_stats(trainer.device)
        _measure(trainer, chosen)
    shown = ", ".join(f"{rows}: {speeds[rows]:,.4g}" for rows in sorted(speeds))
    return share / speeds[chosen], f" (measured, rows/s by micro: {shown})"


def _measure(trainer: Trainer, rows: int) -> float | None:
    """Return the seconds of the first ``rows`` rows of the first step; None if memory does not suffice.

    Compiled blocks are measured without the compiler, which would make new code for every size.
    """
    batches = trainer.setup.feed.step_at(trainer.state.rows)[: rows // trainer.micro_rows]
    largest = trainer.setup.feed.largest()
    try:
        with effects_undone(trainer), trainer.objective.model.backbone.uncompiled():
            run_pass(trainer, batches[0] if largest is None else largest)
            return sum(run_pass(trainer, batch)[1] for batch in batches)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or trainer.world.size > 1:
            raise
    # Outside of the handler, whose traceback keeps the activations alive.
    trainer.setup.optimizers.zero_grad()
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    return None
