"""The files of a run that record a choice: ``best.json`` (best checkpoint) and ``sweep.json`` (learning rates).

Each holds a digest of itself and repeats values of ``training/state.json`` of the newest checkpoint. If a file is
damaged or disagrees, this is reported and the values in the state are used. Files of older versions have no digest;
they hold one key and are accepted.
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
    "TRIALS",
    "best_first",
    "opened",
    "rates_of_run",
    "run_around",
    "run_state",
    "state_of",
    "training_checkpoint",
    "write_choice",
]

BEST, SWEEP = "best.json", "sweep.json"
COMPARISON, TRIALS = "comparison.json", "trials.json"  # see ``pretrain.finetuning.trials``
RESULT = "model"  # directory inside a run, see ``pretrain.checkpoint.result``
STATE = f"{manifest.TRAINING}/state.json"
_LIMIT = 4096  # bytes


def write_choice(path: Path, body: Mapping[str, Any]) -> None:
    """Write a file of this module or of kept trials with its digest, atomically."""
    with writing(path):
        replace_file(path, sealed(body))


def _read(path: Path, key: str, *more: str) -> dict[str, Any]:
    """Return the content of the file, which is ``key`` and may be ``more``; empty if there is no file.

    Raises:
        CheckpointCorrupt: the file is damaged.
    """
    if not os.path.lexists(path):
        return {}
    data = read_bytes(path, limit=_LIMIT)
    body: dict[str, Any] = parse_json(data, path)
    # A file with the key alone was written by an older version, without a digest.
    if not isinstance(body, dict) or set(body) != {key}:
        body = unsealed(data, path)
    if not {key} <= set(body) <= {key, *more}:
        raise CheckpointCorrupt(path, f"only the key {key!r}", ", ".join(body)[:80] or "none")
    return body


def run_state(checkpoint: Path) -> dict[str, Any]:
    """Return the verified run state of a checkpoint; empty if its training folder was deleted or is damaged."""
    run: dict[str, Any] = state_of(checkpoint).get("run", {})
    return run


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Return all plain values of the state of training, under the same conditions."""
    try:
        record = manifest.read_manifest(checkpoint).files[STATE]
        state = parse_json(read_bytes(checkpoint / STATE, record), checkpoint / STATE)
    except (CheckpointError, OSError, KeyError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("run"), dict) else {}


def best_first(run_dir: Path) -> list[Path]:
    """Return the directories of a run that hold its model, in the order in which loading tries them.

    The best one comes first: the result of the run, or, while a run that was resumed has a better checkpoint, that
    checkpoint. The other checkpoints follow with the highest step first.
    """
    found, result = manifest.candidates(run_dir), _result(run_dir)
    model = run_dir / RESULT
    names = ("config.json", manifest.ADAPTER_CONFIG)
    # Without checkpoints the directory is no run, and a folder with this name may be anything.
    if found and not result and any(os.path.lexists(model / name) for name in names):
        note(
            f"{model} has no {manifest.NAME}, which the result of a run has. It is not used; a checkpoint of the run "
            "is."
        )
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
        recorded = _read(path, "checkpoint").get("checkpoint")
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


def run_around(path: Path) -> Path | None:
    """Return the run that ``path`` is or is a checkpoint or the result of, whether that exists or not; else None."""
    inside = path.name == RESULT or manifest.step_of(path.name) is not None
    run = path.parent if inside else path
    return run if run.is_dir() and (manifest.candidates(run) or _result(run)) else None


def training_checkpoint(path: Path) -> Path:
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


def rates_of_run(run_dir: Path) -> dict[str, float]:
    """Return the learning rates that a run began with: ``lr``, and ``muon_lr`` if it was kept; empty if unknown."""
    path = run_dir / SWEEP
    states = map(state_of, manifest.candidates(run_dir))
    state = next((s for s in states if _is_rate(s.get("run", {}).get("lr"))), {})
    rates = {"lr": state["run"]["lr"]} if state else {}
    optim = state.get("optim", {})  # earlier versions did not keep it
    if optim.get("name") == "muon":
        rates["muon_lr"] = optim["muon_lr"]
    try:
        recorded = _read(path, "lr", "muon_lr")
        if recorded and not _is_rate(recorded["lr"]):
            raise CheckpointCorrupt(path, "a learning rate above 0", repr(recorded["lr"])[:60])
        for name in rates.keys() & recorded.keys():
            if recorded[name] != rates[name]:
                expected = f"the {name} {rates[name]} of the newest checkpoint"
                raise CheckpointCorrupt(path, expected, recorded[name])
    except CheckpointError as error:
        then = "that of the newest checkpoint is used" if rates else "the sweep is run again"
        note(f"{error} This file holds the learning rate of the sweep; {then}.")
        return rates
    return rates | recorded


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf
