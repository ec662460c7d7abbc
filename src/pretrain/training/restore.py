"""Putting the weights of a checkpoint back into the objective that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import load
from pretrain.errors import TrainingError
from pretrain.objectives.base import Objective

__all__ = ["load_weights", "other_tensors"]


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
    saved = load(checkpoint, quiet=True).state_dict()
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
