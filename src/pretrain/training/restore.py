"""Saving and restoring the state of a trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint import TrainingState
from pretrain.checkpoint.peers import ALONE, Peers
from pretrain.checkpoint.sharded_loading import load_slices, read_training_slices
from pretrain.errors import CheckpointCorrupt, CheckpointError, TrainingError
from pretrain.nn.layout import ShardLayout, local
from pretrain.objectives.base import Objective
from pretrain.training.state import RunState

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["identity", "load_weights", "origin", "other_tensors", "restore", "training_state"]


def identity(trainer: Trainer) -> dict[str, Any]:
    """Return what must be unchanged on resume, so that no row is repeated or skipped."""
    return {
        "data": trainer.about.get("fingerprint"),
        "rows": len(trainer.train_data),
        "rows of an epoch": trainer.plan.epoch_rows,
        "train.seed": trainer.train.seed,
        "train.batch_rows": trainer.train.batch_rows,
        **trainer.origin,
    }


def origin(objective: Objective) -> dict[str, Any]:
    """Return what a run takes from its starting model besides the weights: the config and the tokenizer."""
    model = objective.model
    config = {f"model.{key}": value for key, value in asdict(model.backbone.config).items()}
    tokenizer = None if model.tokenizer is None else model.tokenizer.fingerprint
    plain: dict[str, Any] = json.loads(json.dumps({"tokenizer": tokenizer, **config}, default=str))
    return plain


def training_state(trainer: Trainer) -> TrainingState:
    """Return the state that `restore` needs: this rank's shards of the tensors, and plain values."""
    tensors = {"optimizer": trainer.optimizers.state()}
    if trainer.average.decay:
        tensors["weights"] = trainer.average.other()
    others = other_tensors(trainer.objective)
    if others:
        tensors["objective"] = others
    state = {"run": trainer.state.to_json(), "identity": identity(trainer)}
    return TrainingState(tensors=tensors, state=state)


def restore(trainer: Trainer, checkpoint: Path) -> RunState:
    """Restore a trainer from a checkpoint, which may have been written by another number of ranks.

    Args:
        trainer: with its model, optimizers and average in place.
        checkpoint: its files have been verified by ``latest_together``.

    Raises:
        TrainingError: the checkpoint belongs to another model, objective, data set or order.
        CheckpointError: the checkpoint lacks state that resuming needs.
    """
    layout = trainer.strategy.layout if trainer.world.size > 1 else None
    peers = trainer.world.peers()
    # `latest_together` has verified all bytes, each file on one rank.
    training = read_training_slices(checkpoint, layout, peers, verified=True)
    now, then = identity(trainer), training.state.get("identity", {})
    for key, value in now.items():
        if key in trainer.origin and then.get(key, value) != value:
            raise TrainingError(
                f"{checkpoint} holds another model: it was trained with {key} {_short(then[key])}, and the model that "
                f"this run starts from has {_short(value)}: it was changed since. Restore it, or use a new train.out."
            )
        if key not in trainer.origin and then.get(key) != value:
            raise TrainingError(
                f"{checkpoint} was trained with {key} {then.get(key)!r} and this run has {value!r}: going on would "
                "repeat some rows and skip others. Restore what was changed, or use a new train.out."
            )
    state = RunState.from_json(training.state["run"])
    trainer.scaler.load(state.scale)
    others = training.tensors.get("objective", {})
    load_weights(trainer.objective, checkpoint, others, layout=layout, peers=peers, verified=True)
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
    return state


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def other_tensors(objective: Objective) -> dict[str, Tensor]:
    """Return the tensors of the objective outside the model, such as those of a teacher or a generator."""
    state = objective.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in state.items() if not name.startswith("model.")}


def load_weights(
    objective: Objective,
    checkpoint: Path,
    others: Mapping[str, Tensor],
    *,
    layout: ShardLayout | None = None,
    peers: Peers = ALONE,
    verified: bool = False,
) -> None:
    """Load the model's weights from a checkpoint, and those of the objective's other modules from ``others``.

    Args:
        objective: the objective to load into.
        checkpoint: written by any number of ranks.
        others: this rank's shards.
        layout: placement of the parameter shards; None if every rank has all of them.
        peers: the ranks.
        verified: the hashes have been checked already.

    Raises:
        TrainingError: the checkpoint holds another model or belongs to another objective.
    """
    try:
        report = load_slices(objective.model, checkpoint, layout, peers, verified=verified)
    except CheckpointError as error:
        if isinstance(error, CheckpointCorrupt) or objective.model.adapter is not None:
            raise  # the error already names the adapter
        raise TrainingError(
            f"{checkpoint} holds another model than the configuration. {error} Use a new train.out."
        ) from error
    rest = {name: local(tensor) for name, tensor in other_tensors(objective).items()}
    here, there = {*rest, *report.missing}, {*others, *report.unexpected}
    for name in sorted(here ^ there):
        where = "the checkpoint lacks it" if name in here else "the configuration does not have it"
        raise TrainingError(
            f"{checkpoint} holds another model: {name!r}: {where}. Use a new train.out."
        )
    for name, tensor in others.items():
        if tensor.shape != rest[name].shape:
            raise TrainingError(
                f"{checkpoint} holds another model: {name!r} is {tuple(tensor.shape)} there and "
                f"{tuple(rest[name].shape)} in the configuration. Use a new train.out."
            )
    with torch.no_grad():
        for name, tensor in others.items():
            rest[name].copy_(tensor)
