"""One optimizer step: forward and backward over the micro-batches of a global batch, clipping, and the update.

The loss of a step is a sum over its targets, divided once by the number of targets in the global batch, which is known
before the first backward pass. Dropout is a function of (seed, step, micro-batch). A step with a non-finite loss or
gradient norm leaves weights and moments unchanged; after several in a row the run ends.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.errors import TrainingError, out_of_memory
from pretrain.nn.device import local
from pretrain.training.feed import check_targets, hash_seed, to_device

if TYPE_CHECKING:
    from pretrain.objectives.base import Batch
    from pretrain.training.trainer import Trainer

__all__ = ["take_step"]

_MAX_SKIPPED_IN_ROW = 3


def take_step(
    trainer: Trainer,
    batches: list[Batch],
    count: float,
    tokens: int,
    *,
    factor: float,
    began: float,
) -> dict[str, Any]:
    """Take one optimizer step and return its record.

    Args:
        trainer: of the run.
        batches: micro-batches of this rank.
        count: targets of the global batch.
        tokens: units of the global batch.
        factor: learning rate of this step, as a multiple of that of the settings.
        began: when fetching the micro-batches started.
    """
    state, setup, optim = trainer.state, trainer.setup, trainer.optim
    strategy = setup.strategy
    check_targets(count, state.step, state.rows, trainer.train.batch_rows)
    if optim.unfreeze and setup.layers.unfreeze(state):
        strategy.wrap()
    totals = _backward(trainer, batches, count)
    trainer.world.mark("update", state.step)
    setup.scaler.unscale([local(p.grad) for p in setup.params.values() if p.grad is not None])
    losses, grad_norm = strategy.reduce_loss_and_norm(totals, setup.params)
    nll = sum(losses)
    finite = math.isfinite(nll) and math.isfinite(grad_norm)
    if finite:
        if optim.clip:
            strategy.clip(setup.params, optim.clip, grad_norm)
        setup.optimizers.set_factor(factor)
        setup.optimizers.step()
        with torch.no_grad():
            trainer.objective.after_step()
        if optim.ema:
            setup.average.update(state.step)
        state.skipped_in_row = 0
    else:
        strategy.restore_buffers()
    setup.optimizers.zero_grad()
    if not finite:
        _report_skipped(trainer, nll, grad_norm)
    # The loss is never scaled: a non-finite one says nothing about the scale.
    if math.isfinite(nll):
        setup.scaler.update(finite)
    state.step += 1
    state.rows += trainer.train.batch_rows
    state.tokens += tokens
    if finite:
        state.window_total += nll
        state.window_count += count
    state.window_tokens += tokens
    state.window_seconds += time.perf_counter() - began
    return {
        "step": state.step,
        "loss": nll / count,
        "lr": float(optim.lr) * factor,
        "grad_norm": grad_norm,
        "targets": count,
        "skipped": not finite,
    }


def _backward(trainer: Trainer, batches: list[Batch], count: float) -> list[Tensor]:
    """Run forward and backward of every micro-batch and return their summed losses.

    If memory runs out, the same rows are tried again in smaller micro-batches, because nothing has changed yet.
    """
    state, setup, world = trainer.state, trainer.setup, trainer.world
    first = world.dp_rank * len(batches)

    def run(index: int) -> Tensor:
        world.mark("forward", state.step)
        torch.manual_seed(hash_seed(trainer.train.seed, state.step, first + index))
        with setup.precision.autocast():
            loss = setup.strategy.forward(to_device(batches[index], trainer.device))
        world.mark("backward", state.step)
        torch.autograd.backward(loss.total * (setup.scaler.scale / count))
        return loss.total.detach()

    try:
        return setup.strategy.backward_microbatches(run, len(batches))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or not trainer.halve_micro_rows():
            raise
    # Outside of the handler, whose traceback keeps the activations alive.
    return _backward(trainer, setup.feed.step_at(state.rows), count)


def _report_skipped(trainer: Trainer, nll: float, grad_norm: float) -> None:
    """Count a skipped step and report its rows.

    Raises:
        TrainingError: `_MAX_SKIPPED_IN_ROW` steps in a row were skipped.
    """
    state, setup, step = trainer.state, trainer.setup, trainer.state.step + 1
    # The loss is never scaled, so only a non-finite gradient can be caused by the scale.
    if math.isfinite(nll) and setup.scaler.may_cause_overflow():
        trainer.say(f"step {step}: fp16 overflow at scale {setup.scaler.scale:g}, skipped")
        return
    state.skipped += 1
    state.skipped_in_row += 1
    rows = setup.feed.indices(state.rows)
    named = f"training rows {', '.join(map(str, rows[:16]))}{', ...' * (len(rows) > 16)}"
    trainer.say(f"step {step}: loss {nll}, gradient norm {grad_norm}: skipped; {named}")
    trainer.journal.write({"event": "skipped", "step": step, "rows": rows, "loss": nll})
    if state.skipped_in_row >= _MAX_SKIPPED_IN_ROW:
        raise TrainingError(
            f"{state.skipped_in_row} steps in a row gave a non-finite loss or gradient, the last at step {step} "
            f"({named}). Weights and moments are those of the last good step. Likely causes: a learning rate too "
            "high, broken rows, or fp16 range; lower optim.lr or set train.precision=fp32."
        )
