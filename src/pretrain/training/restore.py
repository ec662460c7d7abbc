"""Putting the weights of a checkpoint back into the objective that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint import read_training, state_of
from pretrain.errors import CheckpointError, TrainingError
from pretrain.objectives.base import Objective
from pretrain.training.state import RunState

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["identity", "load_weights", "other_tensors", "restore"]


def identity(trainer: Trainer) -> dict[str, Any]:
    """What must be the same for the rows consumed so far to be the rows that will not come again."""
    return {
        "data": trainer.about.get("fingerprint"),
        "rows": len(trainer.train_data),
        "rows of an epoch": trainer.plan.epoch_rows,
        "train.seed": trainer.train.seed,
        "train.batch_rows": trainer.train.batch_rows,
    }


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Put a trainer where it was when the checkpoint was written.

    Raises:
        TrainingError: the checkpoint belongs to another model, objective, data set or order.
        CheckpointError: something that resuming needs is not in it.
    """
    training = read_training(checkpoint)
    now, then = identity(trainer), training.state.get("identity", {})
    for key, value in now.items():
        if then.get(key) != value:
            raise TrainingError(
                f"{checkpoint} was trained with {key} {then.get(key)!r} and this run has {value!r}: going on would "
                "repeat some rows and skip others. Restore what was changed, or use a new train.out."
            )
    trainer.state = RunState.from_json(training.state["run"])
    trainer.checkpoint = checkpoint
    trainer.scaler.load(trainer.state.scale)
    load_weights(trainer.objective, checkpoint, training.tensors.get("objective", {}))
    wanted = ["optimizer", "weights"] if trainer.average.decay else ["optimizer"]
    for stem in wanted:
        if stem not in training.tensors:
            raise CheckpointError(
                f"{checkpoint}/training lacks {stem}.safetensors: the run was made with another optim.ema. Use the "
                "old value or a new train.out."
            )
    if trainer.average.decay:
        trainer.average.load(training.tensors["weights"])
    trainer.optimizers.load(training.tensors["optimizer"])


def other_tensors(objective: Objective) -> dict[str, Tensor]:
    """What the objective owns besides the model, such as a teacher or a generator."""
    state = objective.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in state.items() if not name.startswith("model.")}


def load_weights(objective: Objective, checkpoint: Path, others: Mapping[str, Tensor]) -> None:
    """Take the model's weights from a checkpoint, and those of the objective's other modules from ``others``.

    Raises:
        TrainingError: the checkpoint holds another model or belongs to another objective.
    """
    mine = objective.model.state_dict()
    saved = state_of(checkpoint, objective.model)
    rest = other_tensors(objective)
    for here, there in ((mine, saved), (rest, others)):
        for name in sorted(here.keys() ^ there.keys()):
            where = (
                "the checkpoint lacks it" if name in here else "the configuration does not have it"
            )
            raise TrainingError(
                f"{checkpoint} holds another model: {name!r}: {where}. Use a new train.out."
            )
        for name, tensor in there.items():
            if tensor.shape != here[name].shape:
                raise TrainingError(
                    f"{checkpoint} holds another model: {name!r} is {tuple(tensor.shape)} there and "
                    f"{tuple(here[name].shape)} in the configuration. Use a new train.out."
                )
    objective.model.load_state_dict(saved)
    with torch.no_grad():
        for name, tensor in others.items():
            rest[name].copy_(tensor)
