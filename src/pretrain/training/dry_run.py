"""Dry run before step 0: forward and backward passes that check memory, loss and gradients."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pretrain.errors import ModelError, PretrainError, TrainingError, out_of_memory
from pretrain.nn.device import local
from pretrain.objectives.base import Loss
from pretrain.training.feed import check_targets, hash_seed, to_device
from pretrain.training.plan import row_length

if TYPE_CHECKING:
    from pretrain.objectives.base import Batch
    from pretrain.training.trainer import Trainer

__all__ = ["dry_run", "effects_undone", "run_pass"]

# Tolerances: compiled kernels sum in another order and draw other dropout masks; wrong code is far off.
_LOSS, _NORM, _DRAWS = 0.1, 0.5, 5.0


def dry_run(trainer: Trainer, batches: Sequence[Batch]) -> tuple[float, float]:
    """Run forward and backward on the largest micro-batch and on one of the first step; nothing is kept.

    Returns:
        Loss and seconds of the latter.

    Raises:
        TrainingError: there are no targets, memory does not suffice, the loss is not finite, a coupled loss does not
            gather the rows of all ranks, or compiled blocks compute something else.
    """
    strategy = trainer.setup.strategy
    counts = [float(trainer.objective.count(batch)) for batch in batches]
    (count,) = trainer.world.all_reduce_sum([sum(counts)])
    check_targets(count, trainer.state.step, trainer.state.rows, trainer.train.batch_rows)
    usable = batches[max(range(len(counts)), key=lambda i: counts[i] > 0)]
    largest = trainer.setup.feed.largest()
    trainer.objective.train()
    with effects_undone(trainer):
        # The first pass includes allocation and kernel selection; the time of the second is returned.
        tried = [usable if largest is None else largest, usable]
        try:
            if strategy.sharded:
                _find_used_for_fsdp2(trainer, tried)
            if strategy.compiled[0]:
                try_compiled(trainer, tried[0])
            run_pass(trainer, tried[0])
            check_coupling(trainer)
            loss, seconds = run_pass(trainer, usable)
            if strategy.compiled[0]:
                check_compiled(trainer, usable)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(
                f"A forward and backward pass of {trainer.micro_rows} row{'s' * (trainer.micro_rows > 1)} of "
                f"{row_length(trainer.train_data, trainer.objective)} {trainer.objective.unit_name} does not fit into "
                f"the memory of {trainer.device}. {trainer.less_memory()} shorter rows, or set "
                "parallel.activation_checkpointing=full."
            ) from error
        if not strategy.sharded:
            trained = strategy.trainable_parameters()
            _set_unused(trainer, {name for name, p in trained.items() if p.grad is not None})
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss of the first batch is {loss}. Likely causes: a non-finite number in the weights or the rows, or "
            "the range of fp16 (set train.precision=fp32)."
        )
    if unused := sorted(strategy.unused_parameters):
        trainer.say(
            f"no gradient reaches {len(unused)} trainable tensors, the first is {unused[0]}"
        )
    return loss, seconds


def run_pass(trainer: Trainer, batch: Batch, seed: int = 0) -> tuple[float, float]:
    """Return the loss over all ranks and the seconds of one pass; the gradients are kept."""
    start = time.perf_counter()
    result = _forward_backward(trainer, batch, seed)
    total, count = trainer.world.all_reduce_sum([float(result.total.detach()), float(result.count)])
    return total / max(count, 1.0), time.perf_counter() - start


def _forward_backward(trainer: Trainer, batch: Batch, seed: int = 0) -> Loss:
    setup = trainer.setup
    torch.manual_seed(hash_seed(trainer.train.seed, trainer.state.step, seed))
    with setup.precision.autocast():
        result = setup.strategy.forward_no_sync(to_device(batch, trainer.device))
    if not isinstance(result, Loss):
        raise ModelError(
            f"{type(trainer.objective).__name__} returned {type(result).__name__}; forward must return a "
            "pretrain.objectives.base.Loss: the sum of the loss over its targets, and their number."
        )
    torch.autograd.backward(result.total)
    return result


@contextlib.contextmanager
def effects_undone(trainer: Trainer) -> Iterator[None]:
    """Restore buffers and random state, and clear the gradients, at the end of the context."""
    state = torch.get_rng_state()
    buffers = {name: b.clone() for name, b in trainer.objective.named_buffers()}
    yield
    for name, buffer in trainer.objective.named_buffers():
        buffer.copy_(buffers[name])
    trainer.setup.optimizers.zero_grad()
    torch.set_rng_state(state)


def _find_used_for_fsdp2(trainer: Trainer, tried: Sequence[Batch]) -> None:
    """Find the parameters that gradients reach: FSDP2 must know before its first backward pass if ranks differ."""
    strategy: Any = trainer.setup.strategy  # a `ParallelStrategy`
    found: set[str] = set()
    for batch in tried:
        with trainer.setup.precision.autocast():
            found |= strategy.used_parameters(to_device(batch, trainer.device))
    _set_unused(trainer, found)


def _set_unused(trainer: Trainer, reached: set[str]) -> None:
    """Set the parameters that get no gradient on any rank, and whether ranks differ in this, in the strategy."""
    strategy = trainer.setup.strategy
    unused = sorted(strategy.trainable_parameters().keys() - reached)
    everywhere = [set(names) for names in trainer.world.all_gather_object(unused)]
    nowhere = set.intersection(*everywhere)
    strategy.set_unused_parameters(nowhere, uneven=set.union(*everywhere) != nowhere)


def check_coupling(trainer: Trainer) -> None:
    """Check that a loss that couples the rows of a batch has gathered those of the other ranks.

    Raises:
        TrainingError: it has not.
    """
    objective = trainer.objective
    if objective.batch_group is not None and not objective.compared:
        raise TrainingError(
            f"{type(objective).__name__} compares the rows of a batch with each other, but on several "
            "processes its forward() sees only those of its own. Gather all with self.whole_batch(vectors) in "
            "forward(), or use one process."
        )


def try_compiled(trainer: Trainer, batch: Batch) -> None:
    """Run compiled blocks for the first time; without a working compiler the run goes on with eager ones.

    Dynamo, the inductor, Triton and the C++ compiler raise errors of many classes. One that is the model's own is
    raised again by the pass that follows with eager blocks.
    """
    setup, fault = trainer.setup, ""
    try:
        _forward_backward(trainer, batch)
    except PretrainError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        cause = getattr(error, "inner_exception", error)  # Dynamo wraps what a compiler raises
        fault = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    setup.optimizers.zero_grad()
    if fault := next(filter(None, trainer.world.all_gather_object(fault)), ""):
        setup.strategy.reshard()
        setup.strategy.run_eagerly("compiling failed")
        trainer.say(f"the blocks cannot be compiled, so they run eagerly: {fault}")


def check_compiled(trainer: Trainer, batch: Batch) -> None:
    """Compare loss and gradient norm of compiled and eager blocks, because the compiler may be silently wrong.

    Raises:
        TrainingError: they are far apart, and ``parallel.compile`` is not ``auto``, which then runs eager blocks.
    """
    setup = trainer.setup
    passes = []
    # Eager with two seeds, to measure the effect of dropout alone.
    for stance, seed in (("default", 0), ("force_eager", 0), ("force_eager", 1)):
        setup.optimizers.zero_grad()
        with torch.compiler.set_stance(stance):
            loss, _ = run_pass(trainer, batch, seed)
        grads = [
            local(p.grad)
            for p in setup.strategy.trainable_parameters().values()
            if p.grad is not None
        ]
        mine = torch.nn.utils.get_total_norm([grad for grad in grads if grad.numel()])
        passes.append((loss, math.sqrt(trainer.world.all_reduce_sum([float(mine) ** 2])[0])))
    (loss, norm), (eager, eager_norm), other = passes
    far = abs(loss - eager) > _LOSS * abs(eager) + _DRAWS * abs(eager - other[0])
    if far or abs(norm - eager_norm) > _NORM * eager_norm + _DRAWS * abs(eager_norm - other[1]):
        wrong = (
            f"Compiled, the first batch has a loss of {loss:.4g} and a gradient of norm {norm:.4g}; without the "
            f"compiler it has {eager:.4g} and {eager_norm:.4g}. torch {torch.__version__} compiles this model wrongly: "
        )
        if trainer.parallel.compile != "auto":
            raise TrainingError(
                f"{wrong}set parallel.compile=false, or use another version of torch."
            )
        setup.strategy.run_eagerly("compiled wrongly")
        trainer.say(f"{wrong}its blocks run eagerly.")
