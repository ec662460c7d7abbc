"""Saving and restoring the state of a trainer."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint import TrainingState
from pretrain.checkpoint.manifest import TRAINING
from pretrain.checkpoint.model_directory import ModelDirectory
from pretrain.checkpoint.peers import SINGLE_PROCESS, Peers
from pretrain.checkpoint.resolve import RESULT, training_state_directory
from pretrain.checkpoint.result import restore_best
from pretrain.checkpoint.sharded_loading import load_slices, read_training_slices
from pretrain.data.shards import Rows
from pretrain.errors import CheckpointCorrupt, CheckpointError, TrainingError
from pretrain.models.heads import labels_named_by
from pretrain.nn.device import local
from pretrain.nn.layout import ShardLayout
from pretrain.objectives import Objective, arguments
from pretrain.training.state import RunState
from pretrain.utils.strict_json import as_json
from pretrain.utils.tensors import hash_tensors

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = [
    "identity",
    "load_others",
    "load_weights",
    "origin",
    "other_tensors",
    "restore",
    "training_state",
]

_READ_OTHERWISE = (
    " If nobody changed it, this version of pretrain reads its files otherwise (see CHANGELOG.md): tokens that are "
    "meant to be special must be listed, as strings, in additional_special_tokens of its tokenizer_config.json."
)


def identity(trainer: Trainer) -> dict[str, Any]:
    """Return what must be unchanged on resume, so that no row is repeated or skipped."""
    return {
        "rows": len(trainer.train_data),
        "rows of an epoch": trainer.setup.plan.epoch_rows,
        "data": trainer.fingerprint,
        "train.seed": trainer.train.seed,
        "train.batch_rows": trainer.train.batch_rows,
        **trainer.origin,
    }


def optimizer_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of the optimizer, which a run keeps to its end."""
    settings: dict[str, Any] = as_json(asdict(trainer.optim))
    return settings


def origin(objective: Objective, base: str | None) -> dict[str, Any]:
    """Return what a run takes from its starting models, by name.

    The table holds the config, the tokenizer or other processor, the chat templates if the objective writes rows by
    them, a hash of each frozen module of the objective, and ``base``, the hash of the weights that the run starts from,
    if that is known.
    """
    model = objective.model
    config = {f"model.{key}": value for key, value in asdict(model.backbone.config).items()}
    tokenizer = None if model.processor is None else model.processor.fingerprint
    # Hash of names and weights, by which a changed teacher is detected.
    frozen = {
        child: hash_tensors(objective.get_submodule(child).state_dict())
        for child in objective.frozen
    }
    facts = {"tokenizer": tokenizer, **as_json(config), **frozen}
    if model.tokenizer is not None and hasattr(objective, "template"):
        templates = [model.tokenizer.chat_template, model.tokenizer.named_templates]
        text = json.dumps(templates, sort_keys=True).encode()
        facts["chat templates"] = hashlib.sha256(text).hexdigest()
    if base is not None:
        facts["base weights"] = base
    return facts


def training_state(trainer: Trainer) -> TrainingState:
    """Return the state that `restore` needs: this rank's shards of the tensors, and plain values."""
    setup = trainer.setup
    tensors = {"optimizer": setup.optimizers.state()}
    if setup.average.decay:
        tensors["weights"] = setup.average.other()
    others = other_tensors(trainer.objective)
    if others:
        tensors["objective"] = others
    state: dict[str, Any] = {"run": trainer.state.to_json(), "identity": identity(trainer)}
    state["optim"], state["micro_rows"] = optimizer_settings(trainer), trainer.train.micro_rows
    state["unit"] = getattr(trainer.objective.model.head, "unit", 1.0)
    return TrainingState(tensors=tensors, state=state)


def restore(trainer: Trainer, checkpoint: Path) -> RunState:
    """Restore a trainer from a checkpoint, which may have been written by another number of ranks.

    Args:
        trainer: with its set-up.
        checkpoint: its files have been verified by ``latest_on_all_ranks``.

    Raises:
        TrainingError: the checkpoint belongs to another model, objective, data set or order; see `check_same`.
        CheckpointError: the checkpoint lacks state that resuming needs.
    """
    setup = trainer.setup
    layout = setup.strategy.layout if trainer.world.size > 1 else None
    # `latest_on_all_ranks` has verified all bytes, each file on one rank.
    training = read_training_slices(checkpoint, layout, trainer.world, verified=True)
    check_same(trainer, checkpoint, training.state)
    # Earlier versions kept the rows of micro-batches and evaluations in the settings only.
    before = {key: old for key, (old, _) in trainer.changed.items()}
    configured = trainer.train.micro_rows
    size = training.state.get("micro_rows", before.get("train.micro_rows", configured))
    if trainer.micro_rows_matter and size != configured:
        raise TrainingError(
            f"{checkpoint} was trained with train.micro_rows {size} and this run has {configured}. The size is part of "
            "the result where a model has running statistics, and with parallel.reproducible. Restore the setting, or "
            "use a new train.out."
        )
    head: Any = trainer.objective.model.head
    if hasattr(head, "unit"):
        # Tensors in training/ are in the unit of the head of that run; earlier versions had no unit.
        head.unit = float(training.state.get("unit", 1.0))
    state = RunState.from_json(training.state["run"])
    if isinstance(trainer.train_data, Rows) and state.recut != trainer.train.recut:
        how = "elsewhere in every epoch" if state.recut else "as in the first epoch"
        trainer.say(f"long documents are cut {how}, as the run began (train.recut {state.recut})")
    if configured and configured != size:
        state.micro_rows = (
            0  # the given size takes the place of one that was found when memory ran out
        )
    if state.eval_rows is None and trainer.eval_data is not None:
        rows = len(trainer.eval_data)
        state.eval_rows = min(before.get("train.eval_rows", trainer.train.eval_rows) or rows, rows)
    if trainer.eval_data is not None and trainer.objective.figures_changed(trainer.eval_data):
        state.eval_rows = 0
        trainer.say(
            f"{checkpoint.name} was evaluated by an earlier version, whose figures of these held-out rows cannot be "
            "compared, so the best begins afresh"
        )
    setup.scaler.load(state.scale)
    others = training.tensors.get("objective", {})
    load_weights(
        trainer.objective, checkpoint, others, layout=layout, peers=trainer.world, verified=True
    )
    for stem in ["optimizer", "weights"] if setup.average.decay else ["optimizer"]:
        if stem not in training.tensors:
            raise CheckpointError(
                f"{checkpoint}/training lacks {stem}.safetensors: the run was made with another optim.ema. Use the "
                "old value or a new train.out."
            )
    if setup.average.decay:
        setup.average.load(training.tensors["weights"])
    elif "weights" in training.tensors:
        raise CheckpointError(
            f"{checkpoint} holds the average of the weights, and this run keeps none (optim.ema is 0), so it would go "
            "on from other weights than those of its moments. Use the old value or a new train.out."
        )
    setup.optimizers.load(training.tensors["optimizer"])
    keep_best(trainer, state)
    return state


def keep_best(trainer: Trainer, state: RunState) -> None:
    """Make a best checkpoint that was deleted again from the result, or let the best begin afresh, and say so.

    Otherwise the next end of the run would replace the result by a worse checkpoint, and checkpoints would be compared
    with one that nobody has any more.
    """
    if not (state.best_step and trainer.train.best):
        return
    name = f"checkpoint-{state.best_step}"
    found = trainer.world.broadcast_result(lambda: restore_best(trainer.out, state.best_step))
    if found == "restored":
        trainer.say(
            f"{name}, the best of the run, is not there any more; it is made again from {trainer.out / RESULT}, which "
            "was made from it"
        )
    elif found == "lost":
        state.best_score, state.loss_at_best, state.best_step = math.inf, None, 0
        trainer.say(
            f"{name}, the best of the run, is not there, and {trainer.out / RESULT} is not an unchanged copy of it, so "
            "the best begins afresh"
        )


def check_same(trainer: Trainer, checkpoint: Path, recorded: Mapping[str, Any]) -> None:
    """Check that a trainer goes on as a run began, by what its checkpoint keeps; earlier versions kept less.

    Another precision is only said, because a run may go on where ``train.precision`` "auto" means another.

    Args:
        trainer: of the run that is resumed.
        checkpoint: for messages.
        recorded: of `training_state`, the plain values.

    Raises:
        TrainingError: data, order, model, optimizer or objective differ.
    """
    before = recorded.get("identity", {})
    for key, value in identity(trainer).items():
        old = before.get(key, value)
        if old == value:
            continue
        if key in trainer.origin:
            raise TrainingError(
                f"{checkpoint} holds another model: it was trained with {key} {_short(old)}, but the model that "
                f"this run starts from has {_short(value)}, so it was changed since. Restore it, or use a new "
                f"train.out.{_READ_OTHERWISE if key == 'tokenizer' else ''}"
            )
        # Rows that are drawn anew have no fingerprint, and earlier versions kept none of rows without a stated one.
        if None not in (old, value):
            raise TrainingError(
                f"{checkpoint} was trained with {key} {old!r} and this run has {value!r}: going on would "
                "repeat some rows and skip others. Restore what was changed, or use a new train.out."
            )
    before = recorded.get("optim", {})  # earlier versions did not keep it
    for key, value in optimizer_settings(trainer).items():
        if before.get(key, value) != value:
            raise TrainingError(
                f"{checkpoint} was trained with optim.{key} {before[key]!r} and this run has {value!r}, which its "
                "moments, its schedule or its averages do not fit. Restore the setting, or use a new train.out."
            )
    check_objective(trainer.objective, checkpoint)
    computed, precision = recorded["run"].get("facts", {}).get("precision"), trainer.setup.precision
    if computed not in (None, precision.name):
        trainer.say(
            f"{checkpoint.name} was computed in {computed}, and the run goes on in {precision.name} "
            f"({precision.reason})"
        )


def check_objective(objective: Objective, checkpoint: Path) -> None:
    """Check that an objective is of the class, and has the arguments, that config.json in a checkpoint records.

    Raises:
        TrainingError: it is not, or has not. Frozen modules are told by their weights, not by where they came from.
    """
    config = ModelDirectory(checkpoint, verify=False).json("config.json")
    block, labels = config.get("pretrain", {}), labels_named_by(config)
    recorded, now = block.get("objective"), objective.record()
    if not isinstance(recorded, Mapping) or "name" not in recorded:
        return
    before, now = _values(objective, recorded, now), _values(objective, now, recorded)
    known = (before.keys() & now.keys()).difference(objective.frozen)
    for key in sorted(known, key=lambda key: (key != "name", key)):
        if not objective.same_argument(key, before[key], now[key], labels):
            raise TrainingError(
                f"{checkpoint} was trained by {before['name']} with {key} {_short(before[key])} and this run has "
                f"{_short(now[key])}, so it would go on with another loss. Restore the objective, or use a new "
                "train.out."
            )
    objective.continue_from(recorded)


def _values(
    objective: Objective, record: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments and facts of a record of an objective, with the defaults that it leaves out.

    With ``init_args`` it leaves out nothing else; without them, only what ``describe`` tells in the ``other`` record
    is known to be a default.
    """
    init_args = record.get("init_args")
    facts = {key: value for key, value in record.items() if key != "init_args"}
    defaults = {
        key: as_json(p.default)
        for key, p in arguments(type(objective))[0].items()
        if p.default is not p.empty and (init_args is not None or key in other)
    }
    return defaults | dict(init_args or {}) | facts


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def other_tensors(objective: Objective) -> dict[str, Tensor]:
    """Return the tensors of the objective's own trained modules, such as those of a generator or a decoder."""
    state, others = objective.state_dict(keep_vars=True), ("model", *objective.frozen)
    left_out = tuple(f"{name}." for name in others)
    return {name: t.detach() for name, t in state.items() if not name.startswith(left_out)}


def load_others(objective: Objective, path: Path) -> None:
    """Load the weights of the objective's own trained modules, if it has any, to evaluate what opening ``path`` opens.

    Raises:
        CheckpointError: the checkpoint has no training folder, which holds them, or they do not fit.
    """
    wanted = other_tensors(objective)
    if not wanted:
        return
    checkpoint = training_state_directory(path)
    if not os.path.lexists(checkpoint / TRAINING):
        raise CheckpointError(
            f"{checkpoint} has no {TRAINING}/ folder, in which the weights are that {type(objective).__name__} trained "
            f"beside the model ({', '.join(sorted({name.partition('.')[0] for name in wanted}))}), so it cannot be "
            "evaluated with this objective. The model itself is complete."
        )
    training = read_training_slices(
        checkpoint, None, SINGLE_PROCESS, quiet=True, stems=("objective",)
    )
    tensors = training.tensors.get("objective", {})
    for name, tensor in wanted.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint}/training has no {name!r} of shape {tuple(tensor.shape)}, which "
                f"{type(objective).__name__} needs. It was trained with another objective or other arguments; "
                "evaluate it with those of its run."
            )
        with torch.no_grad():
            tensor.copy_(tensors[name])


def load_weights(
    objective: Objective,
    checkpoint: Path,
    others: Mapping[str, Tensor],
    *,
    layout: ShardLayout | None = None,
    peers: Peers = SINGLE_PROCESS,
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
