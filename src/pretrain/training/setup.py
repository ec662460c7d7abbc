"""Set-up of a trainer before its first step, in the order of dependencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pretrain.checkpoint import Saver
from pretrain.checkpoint.sharded_loading import latest_together
from pretrain.data.loader import Loader
from pretrain.distributed.whole_parameters import Parts, align
from pretrain.errors import ConfigError
from pretrain.training.ema import WeightAverage
from pretrain.training.feed import Feed
from pretrain.training.layers import Layers
from pretrain.training.optim import build_optimizers
from pretrain.training.parallelize import parallelize
from pretrain.training.plan import Plan, choose_micro_rows, mean_length
from pretrain.training.precision import (
    LossScale,
    Precision,
    choose_precision,
    evaluation_precision,
    peak_flops,
)
from pretrain.training.preflight import check_rows, preflight
from pretrain.training.restore import restore

if TYPE_CHECKING:
    from pretrain.distributed.world import World
    from pretrain.training.trainer import Trainer

__all__ = ["set_up"]


def set_up(trainer: Trainer) -> bool:
    """Set up precision, mesh, optimizers, batches and state of a trainer, and run all checks before step 0.

    Returns:
        True if a checkpoint is resumed.
    """
    train, world = trainer.train, trainer.world
    check_rows(trainer.train_data, train.batch_rows)
    if trainer.parallel.threads:
        torch.set_num_threads(trainer.parallel.threads)
    trainer.precision = _precision(train.precision, trainer.device, world)
    trainer.scaler = LossScale(trainer.precision.name == "fp16")
    if any(p.dtype is not torch.float32 for p in trainer.objective.parameters()):
        trainer.say("the weights are converted to fp32: half-precision weights lose small updates")
        trainer.objective.float()
    checkpoint = latest_together(trainer.out, world.peers())
    trainer.strategy = parallelize(trainer)
    trainer.eval_precision = evaluation_precision(
        train.eval_precision, trainer.precision, gathered=trainer.strategy.gathered
    )
    trainer.strategy.fill(initialise=checkpoint is None)
    align(trainer.objective, trainer.strategy.layout, world)
    trainer.params = {
        name: p for name, p in trainer.objective.named_parameters() if p.requires_grad
    }
    trainer.layers = Layers(trainer.objective, trainer.optim)
    trainer.optimizers = build_optimizers(
        trainer.objective,
        trainer.optim,
        trainer.objective.model.backbone.blocks(),
        trainer.device,
        scales=trainer.layers.scales,
        fresh=trainer.layers.fresh,
        # The last bits of a matrix product may depend on its batch, which changes with the number of ranks.
        parts=Parts(trainer.strategy.layout, world)
        if world.size > 1 and not trainer.parallel.reproducible
        else None,
    )
    trainer.average = WeightAverage(trainer.objective.model, trainer.optim.ema)
    trainer.saver = Saver(
        trainer.out,
        background=train.async_save,
        layout=trainer.strategy.layout if world.size > 1 else None,
        peers=world.peers(background=train.async_save),
    )
    sizes = trainer.strategy.choice.sizes
    trainer.micro_rows = choose_micro_rows(
        train,
        trainer.train_data,
        trainer.objective,
        trainer.device,
        share=train.batch_rows // sizes.dp,
        even=trainer.parallel.reproducible,
        most=trainer.strategy.choice.micro_rows,
    )
    trainer.feed = Feed(
        trainer.objective,
        loader := Loader(trainer.train_data, seed=train.seed),
        batch_rows=train.batch_rows,
        micro_rows=trainer.micro_rows,
        share=(world.dp_rank, sizes.dp),
    )
    trainer.plan = Plan(train, trainer.train_data, loader.epoch_length)
    trainer.journal.epoch_rows = trainer.plan.epoch_rows
    trainer.row_length = round(mean_length(trainer.train_data))
    if checkpoint is not None:
        restore(trainer, checkpoint)
    seconds = preflight(trainer, checkpoint)
    trainer.state.total_steps = world.broadcast_object(
        trainer.plan.first_total(trainer.state, seconds)
    )
    if trainer.optim.unfreeze:
        trainer.release()  # DDP must not wait for gradients of frozen layers
    trainer.strategy.wrap()
    trainer.state.limit = train.limit
    trainer.peak = peak_flops(trainer.precision)
    return checkpoint is not None


def _precision(setting: str, device: torch.device, world: World) -> Precision:
    """Choose the compute precision, the same on every rank.

    Raises:
        ConfigError: ``auto`` resolves to different types on different hosts.
    """
    precision = choose_precision(setting, device)
    names = world.all_gather_object(precision.name)
    if len(set(names)) > 1:
        types = ", ".join(f"{name} on rank {names.index(name)}" for name in sorted(set(names)))
        raise ConfigError(
            f"train.precision=auto means {types}: the hosts are not alike. Set train.precision to one that all can do."
        )
    return precision
