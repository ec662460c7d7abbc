"""Set-up of a run: what its trainer uses from the start-up to the end, built in the order of the dependencies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain import training
from pretrain.checkpoint import Saver
from pretrain.checkpoint.sharded_loading import latest_on_all_ranks
from pretrain.data.loader import Loader
from pretrain.distributed.strategy import Strategy
from pretrain.training.compiling import decide_for
from pretrain.training.ema import WeightAverage
from pretrain.training.feed import Feed
from pretrain.training.layers import Layers
from pretrain.training.optim import Optimizers, build_optimizers
from pretrain.training.parallelize import parallelize
from pretrain.training.plan import Plan, choose_micro_rows, mean_length
from pretrain.training.precision import (
    LossScale,
    Precision,
    common_precision,
    evaluation_precision,
)
from pretrain.training.preflight import check_rows, check_trainable

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["TrainSetup", "build_setup"]


@dataclass(frozen=True, eq=False, repr=False)
class TrainSetup:
    """The parts of a run: none is replaced, but most of them change.

    The trainer sets length, cutting and micro-batches of ``feed`` and the reserve of ``plan``; `restore` loads
    ``scaler``, ``average`` and ``optimizers``; the dry run may tell ``strategy`` to run its blocks eagerly.

    Attributes:
        checkpoint: the newest, to be restored; without one, initial weights have been drawn.
        plan: number of steps.
        row_length: mean units of a row, rounded.
        precision: of training.
        eval_precision: of evaluations.
        scaler: scale of the loss in fp16.
        strategy: the model on the devices of the run.
        params: the trainable parameters by name.
        layers: learning rates by depth, and gradual unfreezing.
        optimizers: one for each update rule.
        average: moving average of the weights.
        feed: micro-batches.
        saver: writes checkpoints.
    """

    checkpoint: Path | None
    plan: Plan
    row_length: int
    precision: Precision
    eval_precision: Precision
    scaler: LossScale
    strategy: Strategy
    params: dict[str, Tensor]
    layers: Layers
    optimizers: Optimizers
    average: WeightAverage
    feed: Feed
    saver: Saver


def build_setup(trainer: Trainer) -> TrainSetup:
    """Distribute the model over the ranks, set its weights, and build what trains, averages, feeds and saves it.

    Args:
        trainer: in its world, on its device.

    Raises:
        DataError, ConfigError: the rows, the model or the settings do not fit each other.
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    train, world, objective = trainer.train, trainer.world, trainer.objective
    check_rows(trainer.train_data, train.batch_rows)
    check_trainable(objective)
    if trainer.parallel.threads:
        torch.set_num_threads(trainer.parallel.threads)
    precision = common_precision(train.precision, trainer.device, world)
    # Every byte of the checkpoint is read here, so the checks that take less time come before.
    checkpoint = latest_on_all_ranks(trainer.out, world)
    loader = Loader(trainer.train_data, seed=train.seed)
    plan = Plan(train, trainer.train_data, objective, loader.epoch_length)
    row_length = round(mean_length(trainer.train_data, objective))
    compiled = decide_for(trainer, plan, precision, row_length)
    with trainer.journal.starting("placing the model"):
        strategy = _place(trainer, precision, compiled, initialise=checkpoint is None)
    eval_precision = evaluation_precision(
        train.eval_precision, precision, gathered=strategy.gathered
    )
    layers = Layers(objective, trainer.optim)
    sizes = strategy.choice.sizes
    micro_rows = choose_micro_rows(
        train,
        trainer.train_data,
        objective,
        trainer.device,
        share=train.batch_rows // sizes.dp,
        even=trainer.parallel.reproducible,
        most=strategy.choice.micro_rows,
    )
    return TrainSetup(
        checkpoint=checkpoint,
        plan=plan,
        row_length=row_length,
        precision=precision,
        eval_precision=eval_precision,
        scaler=LossScale(precision.name == "fp16"),
        strategy=strategy,
        params={name: p for name, p in objective.named_parameters() if p.requires_grad},
        layers=layers,
        optimizers=build_optimizers(
            objective,
            trainer.optim,
            objective.model.backbone.blocks(),
            trainer.device,
            scales=layers.scales,
            fresh=layers.fresh,
            collectives=strategy.matrix_collectives(),
        ),
        average=WeightAverage(objective.model, trainer.optim.ema),
        feed=Feed(
            objective,
            loader,
            batch_rows=train.batch_rows,
            micro_rows=micro_rows,
            share=(world.dp_rank, sizes.dp),
        ),
        saver=Saver(
            trainer.out,
            background=train.async_save,
            layout=strategy.layout if world.size > 1 else None,
            peers=world,
        ),
    )


def _place(
    trainer: Trainer, precision: Precision, compiled: tuple[bool, str], *, initialise: bool
) -> Strategy:
    """Distribute the model over the ranks, in fp32, allocate its memory and set its weights."""
    objective = trainer.objective
    if any(p.dtype is not torch.float32 for p in objective.parameters()):
        trainer.say("the weights are converted to fp32: half-precision weights lose small updates")
        objective.float()
    strategy = parallelize(trainer, precision, compiled)
    if precision.name == "fp8":  # after it, because the sizes of shards count
        trainer.say(training.use_float8(objective.model.backbone.blocks()))
    strategy.fill(initialise=initialise)
    strategy.broadcast_initial_values()
    return strategy
