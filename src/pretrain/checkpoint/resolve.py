"""Which directory is opened: the answer for every path that the user gives as a model.

| path given | directory opened | its training state is in |
|---|---|---|
| ``RUN`` | the best of ``RUN``: ``RUN/model`` or a later checkpoint that is better | the checkpoint of that step |
| ``RUN/model`` | itself | the checkpoint that it was made from, while the run keeps that one |
| ``RUN/checkpoint-N`` | itself | itself |
| a directory with config.json or adapter_config.json | itself | itself, and only a checkpoint has one |
| ``org/name``, ``hub:org/name`` | its snapshot in the cache of the Hub | nowhere |

The columns are `resolve_model_directory` and `training_state_directory`. Where the best model of a run is damaged,
loading tries the others, in the order of `model_candidates`. Names on the Hub become directories before that: see
``fetch_model`` and ``fetch_config`` of ``pretrain.checkpoint.download``. Resuming is another question: a run goes on
from its newest complete checkpoint, whichever is its best (``latest_on_all_ranks``).
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from pretrain.checkpoint import manifest
from pretrain.checkpoint.best import best_checkpoint
from pretrain.errors import CheckpointError
from pretrain.utils.files import note

__all__ = [
    "RESULT",
    "enclosing_run",
    "model_candidates",
    "models_of_run",
    "resolve_model_directory",
    "run_by_name",
    "run_with_settings",
    "training_state_directory",
]

RESULT = "model"  # directory inside a run, see ``pretrain.checkpoint.result``


def resolve_model_directory(path: Path) -> Path:
    """Return the directory that opening ``path`` opens: of a run its best model, else ``path`` itself."""
    return next(iter(model_candidates(path)), path)


def model_candidates(path: Path) -> list[Path]:
    """Return the directories inside a run that opening ``path`` tries, in that order, before ``path`` itself.

    There is none unless ``path`` is a run: a directory with the configuration of a model is opened itself.
    """
    return [] if _has_configuration(path) else models_of_run(path)


def models_of_run(run_dir: Path) -> list[Path]:
    """Return the directories of a run that hold its model, best first; none if it is no run.

    The best one is the result of the run, or, while a run that was resumed has a better checkpoint, that checkpoint.
    The other checkpoints follow with the highest step first.
    """
    checkpoints = manifest.run_checkpoints(run_dir)
    result, step = run_dir / RESULT, _result_step(run_dir)
    # Without checkpoints the directory is no run, and a folder with this name may be anything.
    if checkpoints and step is None and _has_configuration(result):
        note(
            f"{result} has no {manifest.NAME}, which the result of a run has. It is not used; a checkpoint of the run "
            "is."
        )
    best = best_checkpoint(run_dir, checkpoints, step)
    checkpoints.sort(key=lambda checkpoint: checkpoint.name != best)
    if step is None:
        return checkpoints
    better = (manifest.step_of(best) or 0) > step
    return [*checkpoints, result] if better else [result, *checkpoints]


def training_state_directory(path: Path) -> Path:
    """Return the directory whose training folder belongs to the model that opening ``path`` opens."""
    directory = resolve_model_directory(path)
    run_dir = directory.parent
    step = _result_step(run_dir) if directory.name == RESULT else None
    if step == math.inf:  # loading skips a damaged result, too
        return next((model for model in models_of_run(run_dir) if model != directory), directory)
    made_from = run_dir / f"checkpoint-{step}"
    return made_from if made_from.is_dir() else directory


def enclosing_run(path: Path) -> Path | None:
    """Return the run that ``path`` is or lies in, whether ``path`` exists or not; None if that directory is no run."""
    run_dir = run_by_name(path)
    is_run = run_dir.is_dir() and (
        manifest.run_checkpoints(run_dir) or _result_step(run_dir) is not None
    )
    return run_dir if is_run else None


def run_by_name(path: Path) -> Path:
    """Return the parent of a path that is named like a checkpoint or a result, else ``path``; no file is looked at."""
    is_inside = path.name == RESULT or manifest.step_of(path.name) is not None
    return path.parent if is_inside else path


def run_with_settings(path: Path) -> Path | None:
    """Return the run whose settings apply: ``path`` or its parent, whichever has a run.yaml; None if neither has."""
    return next((p for p in (path, path.parent) if (p / "run.yaml").is_file()), None)


def _has_configuration(path: Path) -> bool:
    """Whether a directory has the configuration of a whole model or of an adapter."""
    return any(os.path.lexists(path / name) for name in ("config.json", manifest.ADAPTER_CONFIG))


def _result_step(run_dir: Path) -> float | None:
    """Return the step of the result of a run; None without a result, infinite if it is damaged: loading names that."""
    result = run_dir / RESULT
    if result.is_symlink() or not os.path.lexists(result / manifest.NAME):
        return None
    try:
        return manifest.read_manifest(result).step or 0
    except (CheckpointError, OSError):
        return math.inf
