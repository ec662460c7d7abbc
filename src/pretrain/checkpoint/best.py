"""The small files of a run that name a choice: ``best.json`` (a checkpoint) and ``sweep.json`` (a learning rate).

Each holds a digest of itself and says again what ``training/state.json`` of the newest checkpoint knows, so damage is
named and the state is believed. Files from before there were digests hold one key and are read as they are.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint import manifest
from pretrain.config.check import name_change
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils.files import note, read_bytes, replace_file, writing
from pretrain.utils.strict_json import parse_json, sealed, unsealed

__all__ = ["BEST", "SWEEP", "best_first", "run_state", "swept_rate", "write_choice"]

BEST, SWEEP = "best.json", "sweep.json"
STATE = f"{manifest.TRAINING}/state.json"
_LIMIT = 4096  # bytes
_TASK = re.compile(r"^task:", re.M)  # in run.yaml: the run was fine-tuned


def write_choice(path: Path, body: Mapping[str, Any]) -> None:
    """Write ``best.json`` or ``sweep.json`` with its digest, whole or not at all."""
    with writing(path):
        replace_file(path, sealed(body))


def _read(path: Path, key: str) -> Any:
    """What the file says; None where there is none.

    Raises:
        CheckpointCorrupt: it is damaged.
    """
    if not os.path.lexists(path):
        return None
    data = read_bytes(path, limit=_LIMIT)
    body = parse_json(data, path)
    if not isinstance(body, dict) or set(body) != {
        key
    }:  # without a digest: an older version wrote it
        body = unsealed(data, path)
    if set(body) != {key}:
        raise CheckpointCorrupt(path, f"the key {key!r} alone", ", ".join(body)[:80] or "none")
    return body[key]


def run_state(checkpoint: Path) -> dict[str, Any]:
    """The state of the run in a checkpoint, verified; empty where its training folder was deleted or is damaged."""
    try:
        record = manifest.read_manifest(checkpoint).files[STATE]
        state = parse_json(read_bytes(checkpoint / STATE, record), checkpoint / STATE)
        run = state["run"]
    except (CheckpointError, OSError, KeyError, TypeError):
        return {}
    return run if isinstance(run, dict) else {}


def best_first(run_dir: Path) -> list[Path]:
    """The checkpoints of a run in the order in which they are opened: the chosen one, then the highest step first.

    A run that was fine-tuned chose the one that was best on the held-out rows; of others the newest counts.
    """
    found = manifest.candidates(run_dir)
    path, known = run_dir / BEST, {checkpoint.name for checkpoint in found}
    state, newest = next(((s, c.name) for c in found if (s := run_state(c))), ({}, ""))
    best = state.get("best_step")
    expected = f"checkpoint-{best}" if type(best) is int and best > 0 else newest
    expected = expected if expected in known else newest
    said = f"the state of training in {newest} says {expected}" if newest else "the newest is taken"
    name = expected if _was_tuned(run_dir) else ""
    try:
        recorded = _read(path, "checkpoint")
        if recorded is not None:
            if not isinstance(recorded, str) or recorded not in known:
                raise CheckpointCorrupt(path, "a checkpoint of this run", repr(recorded)[:60])
            if expected and "best_step" in state and recorded != expected:
                raise CheckpointCorrupt(path, expected, recorded)
            name = recorded
    except CheckpointError as error:
        note(f"{error} It says which checkpoint of the run is the best; {said}, which is believed.")
        name = expected
    return sorted(found, key=lambda checkpoint: checkpoint.name != name)


def _was_tuned(run_dir: Path) -> bool:
    path = run_dir / "run.yaml"
    if not os.path.lexists(path):
        return False
    try:
        text = read_bytes(path, limit=1 << 20).decode("utf-8", errors="replace")
    except (CheckpointError, OSError) as error:
        note(f"{error} It says whether the run was fine-tuned; it is taken for one that was not.")
        return False
    name_change(path, text)
    return _TASK.search(text) is not None


def swept_rate(run_dir: Path) -> float | None:
    """The learning rate that the run chose when it began; None where it has to be looked for (again)."""
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
        then = "that of the newest checkpoint is taken" if rate else "the rates are tried again"
        note(f"{error} It holds the learning rate that the sweep chose; {then}.")
        return rate
    return rate if recorded is None else recorded


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf
