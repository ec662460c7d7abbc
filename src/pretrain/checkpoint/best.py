"""The files of a run that record a choice: ``best.json`` (best checkpoint) and ``sweep.json`` (learning rates).

Each holds a digest of itself and repeats values of ``training/state.json`` of the newest checkpoint. If a file is
damaged or disagrees, this is reported and the values in the state are used. Files of older versions have no digest;
they hold one key and are accepted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint import manifest
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils.files import note, read_bytes, replace_file, writing
from pretrain.utils.strict_json import parse_json, sealed, unsealed

__all__ = [
    "BEST",
    "COMPARISON",
    "SWEEP",
    "TRIALS",
    "best_checkpoint",
    "rates_of_run",
    "run_state",
    "state_of",
    "write_choice",
]

BEST, SWEEP = "best.json", "sweep.json"
COMPARISON, TRIALS = "comparison.json", "trials.json"  # see ``pretrain.finetuning.trials``
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
        record = manifest.read_manifest(checkpoint).files[manifest.STATE]
        path = checkpoint / manifest.STATE
        state = parse_json(read_bytes(path, record), path)
    except (CheckpointError, OSError, KeyError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("run"), dict) else {}


def best_checkpoint(run_dir: Path, checkpoints: Sequence[Path], result_step: float | None) -> str:
    """Return the name of the best checkpoint of a run, by best.json or else the training state; "" without checkpoints.

    Args:
        run_dir: the run.
        checkpoints: its checkpoints, highest step first.
        result_step: step of the checkpoint that the result of the run was made from, which may be gone; None without a
            result.
    """
    path, known = run_dir / BEST, {checkpoint.name for checkpoint in checkpoints}
    if result_step is not None:
        known.add(f"checkpoint-{result_step}")
    state, newest = next(((s, c.name) for c in checkpoints if (s := run_state(c))), ({}, ""))
    best = state.get("best_step")
    expected = f"checkpoint-{best}" if type(best) is int and best > 0 else newest
    expected = expected if expected in known else newest
    instead = (
        f"going by the training state in {newest}, {expected} is used"
        if newest
        else "the newest checkpoint is used"
    )
    try:
        recorded = _read(path, "checkpoint").get("checkpoint")
        if recorded is None:
            return expected
        if not isinstance(recorded, str) or recorded not in known:
            raise CheckpointCorrupt(path, "a checkpoint of this run", repr(recorded)[:60])
        if expected and "best_step" in state and recorded != expected:
            raise CheckpointCorrupt(path, expected, recorded)
        return recorded
    except CheckpointError as error:
        note(f"{error} This file names the best checkpoint of the run; {instead} instead.")
        return expected


def rates_of_run(run_dir: Path) -> dict[str, float]:
    """Return the learning rates that a run began with: ``lr``, and ``muon_lr`` if it was kept; empty if unknown."""
    path = run_dir / SWEEP
    states = map(state_of, manifest.run_checkpoints(run_dir))
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
