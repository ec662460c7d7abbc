"""The one directory format: a Hugging Face directory with a manifest, and a training folder to resume from.

    checkpoint-1200/
      config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json  README.md
                       or adapter_config.json and adapter_model.safetensors, as peft writes them
      training/        optimizer.safetensors, state.json: may be deleted, never read by `load`
      manifest.json    size and SHA-256 of every file, written last

It is written into a temporary sibling, flushed, verified and renamed; the checkpoint before it stays until then.
Nothing is pickled, and no pickle is ever opened. Every file is treated as a stranger's.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.adapters.layout import adapter_view
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.storage import directories, files, manifest, reading
from pretrain.storage.adapters import adapter_facts
from pretrain.storage.directories import check_writable
from pretrain.storage.files import note
from pretrain.storage.manifest import latest, rotate, verify
from pretrain.storage.reading import inspect, load, state_of
from pretrain.storage.runlock import RunLock, is_held
from pretrain.storage.strict_json import names_only, parse_json, to_json
from pretrain.storage.tensors import read_tensors, write_tensors
from pretrain.storage.writing import finite_json, total_bytes, write_model

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "RunLock",
    "TrainingState",
    "check_writable",
    "estimated_size",
    "inspect",
    "latest",
    "load",
    "read_training",
    "rotate",
    "save_checkpoint",
    "save_model",
    "state_of",
    "verify",
]

MAX_SHARD_BYTES = 5_000_000_000
_STEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OVERWRITABLE = re.compile(
    r"(config|generation_config|manifest|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|"
    r"(vocab|merges)\.txt|chat_template\.jinja|README\.md|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"adapter_config\.json|adapter_model\.safetensors|pretrain\.json"
)


@dataclass
class TrainingState:
    """What resuming needs besides the weights.

    Attributes:
        tensors: file stem -> parameter name -> tensor; `{"optimizer": {"exp_avg.blocks.0...": ...}}`.
        state: plain values for JSON with text keys; every float comes back bit for bit, infinities and NaN too.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ saving


def save_model(
    model: Model, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write a model so that `load` and transformers open it; one with an adapter so that `load` and peft do.

    An adapted model is written without its base, which `adapter_config.json` names as it was named to `load`; its
    config.json is called pretrain.json there (not inside a run), or transformers would take the directory for whole.

    Args:
        model: weights, head, configuration, and a tokenizer if it has one.
        directory: new, empty, or an older model directory, which is replaced as a whole unless it has `training/`.
        max_shard_bytes: larger weights are split over several files with an index.

    Returns:
        The directory, durable on the disk.

    Raises:
        CheckpointError: the place cannot be written, holds other files, or a weight is not finite.
    """
    target = Path(os.path.abspath(directory))
    _refuse_target(target, model)
    with files.writing(target):
        directories.make_directories(target.parent)
        directories.sweep(target.parent, name=target.name)
    config = _config(model, None)
    _write(target, model, config, step=None, training=None, max_shard_bytes=max_shard_bytes)
    return target


def save_checkpoint(
    run_dir: str | Path,
    model: Model,
    *,
    step: int,
    tokens: int,
    pretrain_block: Mapping[str, Any],
    training: TrainingState | None = None,
    keep: int = 2,
    protect: Collection[int] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `run_dir/checkpoint-<step>`, then delete the old ones that are no longer wanted.

    When this returns, the checkpoint is on the disk, verified, and survives a power cut.

    Args:
        run_dir: the run; made if absent.
        model: see `save_model`.
        step: optimizer steps so far.
        tokens: tokens seen so far.
        pretrain_block: objective, data fingerprint, sources, metrics, ...; goes into config.json.
        training: what resuming needs, or None.
        keep: how many complete checkpoints stay.
        protect: steps that are never deleted (the best one).
        max_shard_bytes: see `save_model`.

    Returns:
        Path of the checkpoint.

    Raises:
        CheckpointError: disk full, no permission, or a weight is not finite; earlier checkpoints are untouched.
    """
    if keep < 1 or step < 0:
        raise CheckpointError(
            f"keep is {keep} and step is {step}; at least 1 checkpoint stays, steps count from 0."
        )
    run = Path(os.path.abspath(run_dir))
    target = run / f"checkpoint-{step}"
    with files.writing(run):
        directories.make_directories(run)
        directories.sweep(run, exclusive=is_held(run))
    if os.path.islink(target):
        raise CheckpointError(
            f"{target} is a link. Remove it; a checkpoint is written to its own directory."
        )
    block = {**pretrain_block, "step": step, "tokens_seen": tokens}
    config = _config(model, block)
    _write(target, model, config, step=step, training=training, max_shard_bytes=max_shard_bytes)
    with files.writing(run):
        rotate(run, keep=keep, protect={*protect, step}, newest=step)
    return target


def estimated_size(model: Model, *, copies: float = 3.0) -> int:
    """Bytes that a checkpoint of this model will take: `copies` of its weights in fp32 and the small files."""
    return int(4 * copies * sum(parameter.numel() for parameter in model.parameters())) + (16 << 20)


def _config(model: Model, block: Mapping[str, Any] | None) -> dict[str, Any]:
    config = dict(model.hf_config())
    if block is not None:
        versions = {"pretrain": __version__, "torch": str(torch.__version__)}
        config["pretrain"] = {"versions": versions, **block}
    if model.adapter is not None:
        config["pretrain"] = {**(config.get("pretrain") or {}), "adapter": adapter_facts(model)}
    return dict(finite_json(names_only(config)))


def _refuse_target(target: Path, model: Model) -> None:
    if not os.path.lexists(target):
        return
    base = model.adapter.base if model.adapter is not None else None
    if base is not None and os.path.realpath(base) == os.path.realpath(target):
        raise CheckpointError(
            f"{target} holds the base of this adapter, without which it is worth nothing. Choose another directory, "
            f"or merge the adapter before saving."
        )
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(
            f"{target} exists and is not a directory. Choose another name for the model."
        )
    with files.writing(target):
        names = sorted(os.listdir(target))
    for name in names:
        if not _OVERWRITABLE.fullmatch(name):
            raise CheckpointError(
                f"{target} holds {name!r}, which is no part of a saved model, and would be lost when the directory is "
                f"replaced. Choose a new directory, or move it away."
            )


def _write(
    target: Path,
    model: Model,
    config: dict[str, Any],
    *,
    step: int | None,
    training: TrainingState | None,
    max_shard_bytes: int,
) -> None:
    """Fill a temporary directory, verify it, and give it its name."""
    weights = model.disk_view() if model.adapter is None else adapter_view(model)
    _refuse_non_finite(model)
    state = to_json(_encode(training.state, "state")) if training else b""
    tensors = training.tensors if training else {}
    needed = (
        sum(total_bytes(group) for group in (weights.layout, *tensors.values()))
        + len(state)
        + (1 << 20)
    )
    with files.writing(target, needed):
        if files.free_bytes(target.parent) < needed:
            raise OSError(28, "No space left on device", str(target))
        with directories.temporary_directory(target) as temporary:
            records = {}
            in_run = step is not None
            for name, record in write_model(
                temporary, model, config, weights, max_shard_bytes, in_run=in_run
            ):
                records[name] = record
            if training is not None:
                folder = temporary / manifest.TRAINING
                files.IO.mkdir(folder)
                for stem, group in sorted(tensors.items()):
                    if not _STEM.fullmatch(stem):
                        raise CheckpointError(
                            f"training file {stem!r}: use letters, digits, '_' and '-'."
                        )
                    name = f"{manifest.TRAINING}/{stem}.safetensors"
                    records[name] = write_tensors(temporary / name, group, slashes=True)
                records[f"{manifest.TRAINING}/state.json"] = files.write_file(
                    folder / "state.json", state
                )
                files.fsync_directory(folder)
            about = manifest.environment(torch.get_num_threads(), str(torch.__version__))
            manifest.write_manifest(temporary, step, records, about)
            files.fsync_directory(temporary)
            manifest.check_files(temporary, manifest.read_manifest(temporary))
            directories.publish(temporary, target)


def _refuse_non_finite(model: Model) -> None:
    for name, tensor in model.named_parameters():
        if not reading.is_finite(tensor):
            raise CheckpointError(
                f"The weight {name!r} holds NaN or infinity, so the model is not saved. The last checkpoint is "
                f"untouched; lower the learning rate or look for the step where the loss became non-finite."
            )


# ------------------------------------------------------------------------------------------------ resuming


def read_training(path: str | Path, *, quiet: bool = False) -> TrainingState:
    """Read the training folder of a checkpoint, every byte verified while it is read.

    Args:
        path: a checkpoint, or a run (its newest complete checkpoint).
        quiet: do not name differences in library versions and thread count, which can change the last bits.

    Raises:
        CheckpointError: the folder was deleted, so the run cannot be resumed from here.
        CheckpointCorrupt: a file is not what the manifest says.
    """
    directory = manifest.checked_directory(path)
    if not os.path.lexists(directory / manifest.NAME) and (newest := latest(directory)) is not None:
        directory = newest
    listed = manifest.read_manifest(directory)
    folder = directory / manifest.TRAINING
    if not listed.training or not os.path.lexists(folder):
        raise CheckpointError(
            f"{directory} has no {manifest.TRAINING}/ folder (it was deleted, or the model was saved alone), so a run "
            f"cannot be resumed from it: optimizer state and position in the data are gone. Its weights are whole; "
            f"to go on from them, start a new run with model.checkpoint={directory.name} and a new output directory."
        )
    if not quiet:
        _note_environment(directory, listed.environment)
    found = TrainingState()
    with files.reading(directory):
        for name, record in listed.training.items():
            file = directory / name
            if name.endswith(".safetensors"):
                found.tensors[file.stem] = read_tensors(file, record, slashes=True)
            elif file.name == "state.json":
                found.state = _decode(parse_json(files.read_bytes(file, record), file))
    return found


def _note_environment(directory: Path, then: Mapping[str, Any]) -> None:
    now = manifest.environment(torch.get_num_threads(), str(torch.__version__))
    changed = [
        f"{key} {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]
    ]
    if changed:
        note(
            f"{directory.name} was written with other settings ({', '.join(changed)}): the last bits may differ."
        )


def _encode(value: Any, where: str) -> Any:
    """Plain values for JSON; numbers that JSON lacks are written as {"$float": "inf"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{where}: the key {key!r} must be a text, for JSON has no other keys."
                )
        return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which cannot be stored; tensors go into `tensors`."
    )


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"$float"}:
            if value["$float"] not in ("inf", "-inf", "nan"):
                raise CheckpointCorrupt("state.json", "inf, -inf or nan", value["$float"])
            return float(value["$float"])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
