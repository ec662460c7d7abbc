"""The files of a run that record a choice: ``best.json`` (best checkpoint) and ``sweep.json`` (learning rate).

Each holds a digest of itself and repeats a value of ``training/state.json`` of the newest checkpoint. If a file is
damaged or disagrees, this is reported and the value in the state is used. Files of older versions have no digest; they
hold one key and are accepted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint import manifest
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils.files import note, read_bytes, replace_file, writing
from pretrain.utils.strict_json import parse_json, sealed, unsealed

__all__ = [
    "BEST",
    "COMPARISON",
    "RESULT",
    "SWEEP",
    "best_first",
    "opened",
    "run_state",
    "swept_rate",
    "with_training",
    "write_choice",
]

BEST, SWEEP = "best.json", "sweep.json"
COMPARISON = "comparison.json"  # see ``pretrain.finetuning.kept``
RESULT = "model"  # directory inside a run, see ``pretrain.checkpoint.result``
STATE = f"{manifest.TRAINING}/state.json"
_LIMIT = 4096  # bytes


def write_choice(path: Path, body: Mapping[str, Any]) -> None:
    """Write ``best.json``, ``sweep.json`` or ``comparison.json`` with its digest, atomically."""
    with writing(path):
        replace_file(path, sealed(body))


def _read(path: Path, key: str) -> Any:
    """Return the value stored in the file under ``key``; None if there is no file.

    Raises:
        CheckpointCorrupt: the file is damaged.
    """
    if not os.path.lexists(path):
        return None
    data = read_bytes(path, limit=_LIMIT)
    body = parse_json(data, path)
    # A file with the key alone was written by an older version, without a digest.
    if not isinstance(body, dict) or set(body) != {key}:
        body = unsealed(data, path)
    if set(body) != {key}:
        raise CheckpointCorrupt(path, f"only the key {key!r}", ", ".join(body)[:80] or "none")
    return body[key]


def run_state(checkpoint: Path) -> dict[str, Any]:
    """Return the verified run state of a checkpoint; empty if its training folder was deleted or is damaged."""
    try:
        record = manifest.read_manifest(checkpoint).files[STATE]
        state = parse_json(read_bytes(checkpoint / STATE, record), checkpoint / STATE)
        run = state["run"]
    except (CheckpointError, OSError, KeyError, TypeError):
        return {}
    return run if isinstance(run, dict) else {}


def best_first(run_dir: Path) -> list[Path]:
    """Return the directories of a run that hold its model, in the order in which loading tries them.

    The best one comes first: the result of the run, or, while a run that was resumed has a better checkpoint, that
    checkpoint. The other checkpoints follow with the highest step first.
    """
    found, result = manifest.candidates(run_dir), _result(run_dir)
    path, known = run_dir / BEST, {checkpoint.name for checkpoint in found}
    known |= {f"checkpoint-{step}" for step in result.values()}
    state, newest = next(((s, c.name) for c in found if (s := run_state(c))), ({}, ""))
    best = state.get("best_step")
    expected = f"checkpoint-{best}" if type(best) is int and best > 0 else newest
    name = expected = expected if expected in known else newest
    instead = (
        f"going by the training state in {newest}, {expected} is used"
        if newest
        else "the newest checkpoint is used"
    )
    try:
        recorded = _read(path, "checkpoint")
        if recorded is not None:
            if not isinstance(recorded, str) or recorded not in known:
                raise CheckpointCorrupt(path, "a checkpoint of this run", repr(recorded)[:60])
            if expected and "best_step" in state and recorded != expected:
                raise CheckpointCorrupt(path, expected, recorded)
            name = recorded
    except CheckpointError as error:
        note(f"{error} This file names the best checkpoint of the run; {instead} instead.")
    checkpoints = sorted(found, key=lambda checkpoint: checkpoint.name != name)
    better = any((manifest.step_of(name) or 0) > step for step in result.values())
    return [*checkpoints, *result] if better else [*result, *checkpoints]


def opened(path: Path) -> Path:
    """Return the directory that opening ``path`` opens: of a run the best one, else ``path`` itself."""
    own = any(os.path.lexists(path / name) for name in ("config.json", manifest.ADAPTER_CONFIG))
    return path if own else next(iter(best_first(path)), path)


def with_training(path: Path) -> Path:
    """Return the checkpoint that holds the training folder of the model that opening ``path`` opens."""
    directory = opened(path)
    step = _result(directory.parent).get(directory)
    if step == math.inf:  # loading skips a damaged result, too
        others = (one for one in best_first(directory.parent) if one != directory)
        return next(others, directory)
    made_from = directory.parent / f"checkpoint-{step}"
    return made_from if made_from.is_dir() else directory


def _result(run_dir: Path) -> dict[Path, float]:
    """Return the result of a run, if there is one, with its step; infinite if it is damaged, so that it is reported."""
    result = run_dir / RESULT
    if result.is_symlink() or not os.path.lexists(result / manifest.NAME):
        return {}
    try:
        return {result: manifest.read_manifest(result).step or 0}
    except (CheckpointError, OSError):
        return {result: math.inf}


def swept_rate(run_dir: Path) -> float | None:
    """Return the learning rate chosen by the sweep at the start of the run; None if the sweep must be run (again)."""
    path = run_dir / SWEEP
    states = map(run_state, manifest.candidates(run_dir))
    rate = next((state["lr"] for state in states if _is_rate(state.get("lr"))), None)
    try:
        recorded = _read(path, "lr")
        if recorded is not None and not _is_rate(recorded):
            raise CheckpointCorrupt(path, "a learning rate above 0", repr(recorded)[:60])
        if None not in (rate, recorded) and recorded != rate:
            raise CheckpointCorrupt(path, f"the rate {rate} of the newest checkpoint", recorded)
    except CheckpointError as error:
        then = "the rate of the newest checkpoint is used" if rate else "the sweep is run again"
        note(f"{error} This file holds the learning rate of the sweep; {then}.")
        return rate
    return rate if recorded is None else recorded


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf
