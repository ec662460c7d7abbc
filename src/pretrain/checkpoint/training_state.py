"""The training folder of a checkpoint: tensors by parameter name in safetensors files, plain values in state.json.

A group of tensors is stored in ``optimizer.safetensors``, or split into ``optimizer-0000i-of-0000n.safetensors``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import manifest
from pretrain.checkpoint.manifest import Manifest
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils import files
from pretrain.utils.files import note
from pretrain.utils.strict_json import parse_json, to_json

__all__ = [
    "TrainingState",
    "check_stem",
    "encoded_state",
    "open_training",
    "read_state",
    "shard_name",
    "tensor_files",
]

_STEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass
class TrainingState:
    """The state needed to resume training, besides the weights.

    Attributes:
        tensors: file stem -> key -> tensor; `{"optimizer": {"exp_avg/blocks.0...": ...}}`.
        state: plain values for JSON with string keys; floats are restored bit for bit, including infinities and NaN.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def by_key(self) -> dict[str, Tensor]:
        """Return all tensors, with the file stem before the key: ``optimizer/exp_avg/blocks.0...``.

        Raises:
            CheckpointError: a stem cannot be the name of a file.
        """
        found = dict[str, Tensor]()
        for stem, tensors in sorted(self.tensors.items()):
            check_stem(stem)
            found |= {f"{stem}/{key}": tensors[key] for key in sorted(tensors)}
        return found


def encoded_state(state: Mapping[str, Any]) -> bytes:
    """Return the content of state.json.

    Raises:
        CheckpointError: a value cannot be stored in JSON without change; the text names its place.
    """
    return to_json(_encode(state, "state"))


def check_stem(stem: str) -> None:
    """Raise CheckpointError if a name of a group of tensors cannot be used as the stem of a file name."""
    if not _STEM.fullmatch(stem) or _PART.fullmatch(stem):
        raise CheckpointError(
            f"{stem!r} cannot be the name of a group of tensors: use letters, digits, '_' and '-', without an ending "
            "like -00001-of-00002."
        )


def shard_name(stem: str, index: int, count: int) -> str:
    """Return the name of the ``index``-th of ``count`` safetensors files of a group, counted from 0."""
    return (
        f"{stem}.safetensors"
        if count == 1
        else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"
    )


def tensor_files(directory: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Return group of tensors -> its files, from the paths listed in a manifest.

    Raises:
        CheckpointCorrupt: not all files of a group are listed.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        path = Path(name)
        if path.suffix == ".safetensors":
            match = _PART.fullmatch(path.stem)
            groups.setdefault(match[1] if match else path.stem, []).append(name)
    for stem, listed in groups.items():
        expected = {shard_name(stem, i, len(listed)) for i in range(len(listed))}
        if (names_there := {Path(name).name for name in listed}) != expected:
            path = directory / manifest.TRAINING / min(expected - names_there)
            raise CheckpointCorrupt(path, f"all files of {stem!r} in the manifest", "some of them")
    return groups


# ------------------------------------------------------------------------------------------------ resuming


def open_training(directory: Path, *, quiet: bool = False) -> Manifest:
    """Return the manifest of a checkpoint to resume from; report changed library versions unless ``quiet``.

    Raises:
        CheckpointError: the training folder was deleted, or the model was saved without one.
    """
    listed = manifest.read_manifest(directory)
    check_training_folder(directory, listed)
    if not quiet:
        _note_environment(directory, listed.environment)
    return listed


def check_training_folder(directory: Path, listed: Manifest) -> None:
    """Raise CheckpointError if a checkpoint has no training folder, which a run needs to resume."""
    if not listed.training or not os.path.lexists(directory / manifest.TRAINING):
        raise CheckpointError(
            f"{directory} has no {manifest.TRAINING}/ folder (it was deleted, or the model was saved alone), so a run "
            f"cannot be resumed from it: optimizer state and position in the data are gone. The model is complete; to "
            f"continue from it, start a new run from {directory} in a new output directory."
        )


def read_state(directory: Path, listed: Manifest) -> dict[str, Any]:
    """Read the plain values in state.json, verified while they are read; empty if there is no file."""
    if manifest.STATE not in listed.training:
        return {}
    path = directory / manifest.STATE
    state = _decode(parse_json(files.read_bytes(path, listed.training[manifest.STATE]), path))
    if not isinstance(state, dict):
        raise CheckpointCorrupt(path, "a JSON object", type(state).__name__)
    return state


def _note_environment(directory: Path, then: Mapping[str, Any]) -> None:
    now = manifest.environment(torch.get_num_threads(), str(torch.__version__))
    changed = [
        f"{key} {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]
    ]
    if changed:
        note(
            f"{directory.name} was written in another environment ({', '.join(changed)}): results may differ in the "
            "last bits."
        )


def _encode(value: Any, where: str) -> Any:
    """Convert plain values for JSON; non-finite floats become e.g. {"$float": "inf"}."""
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
