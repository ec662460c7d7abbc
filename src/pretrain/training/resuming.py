"""Settings of a run across its commands: whether one has begun in a directory, what may change, and what is kept.

The settings of a run are in its ``run.yaml``. They name the same run again, whatever a later version chooses by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import training
from pretrain.checkpoint.manifest import ADAPTER_CONFIG, run_checkpoints
from pretrain.checkpoint.manifest import NAME as MANIFEST
from pretrain.checkpoint.resolve import RESULT
from pretrain.config.run import Sections
from pretrain.config.spelling import option
from pretrain.errors import ConfigError
from pretrain.models import own_family
from pretrain.training.parallelize import flat
from pretrain.training.state import Changed
from pretrain.utils.directories import keep_foreign
from pretrain.utils.files import note
from pretrain.utils.hub_names import hub_name

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = [
    "check_free",
    "check_same_run",
    "has_begun",
    "keep_settings",
    "record_resume",
    "resolve_checkpoint",
    "resumable",
    "run_key",
    "settings_before",
]

_PLACES = ("data.train", "data.valid", "data.test", "data.tokenizer")


def has_begun(out: Path) -> bool:
    """Whether there is a checkpoint, complete or not: its contents are verified when it is opened."""
    return os.path.isdir(out) and bool(run_checkpoints(out))


def settings_before(settings: Any) -> Any:
    """Return the settings with which the run in ``train.out`` began; None if none has begun there."""
    out = Path(settings.train.out)
    if settings.train.out and has_begun(out):
        with contextlib.suppress(ConfigError):  # a run of another kind, which is refused later
            return type(settings).load(out / "run.yaml")
    return None


def resumable(settings: Sections) -> set[str]:
    """Return the settings that may change when a run is resumed."""
    return {
        f"{section}.{spec.name}"
        for section, kind in settings.SECTIONS.items()
        for spec in dataclasses.fields(kind)
        if spec.metadata.get("resumable")
    }


def run_key(settings: Mapping[str, Any], data: str) -> str:
    """Return the hash of settings and data by which a run is named, eight hexadecimal digits."""
    text = json.dumps([settings, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_free(out: Path) -> None:
    """Refuse an output directory with files that a new run would hide or replace.

    Raises:
        ConfigError: it holds a model or prepared data, or the result of a run whose checkpoints are gone.
    """
    if os.path.exists(out) and not out.is_dir():
        raise ConfigError(f"{out} is a file. Name a directory with {option('out')}.")
    configurations = {"config.json": "a model", ADAPTER_CONFIG: "an adapter"}
    for name, what in (configurations | {MANIFEST: "a model or prepared data"}).items():
        if os.path.exists(out / name):
            raise ConfigError(
                f"{out} holds {what} ({name}), and a run in it would be taken for that. Name a new directory with "
                f"{option('out')}."
            )
    finished = any(os.path.exists(out / RESULT / name) for name in configurations)
    if finished and not has_begun(out):
        raise ConfigError(
            f"{out} holds the result of a run ({RESULT}) whose checkpoints are gone, so it cannot be resumed, and a "
            f"new run would overwrite it. Name a new directory with {option('out')}; it can start from "
            f"{out / RESULT}."
        )


def check_same_run(settings: Sections, out: Path) -> Changed:
    """Refuse to resume a run with settings that cannot change, and return those that did and may.

    Raises:
        ConfigError: a setting that affects the result differs, or the directory holds another kind of run.
    """
    written = out / "run.yaml"
    if not os.path.exists(written) or not has_begun(out):
        check_free(out)
        return {}
    try:
        before, now = flat(type(settings).of_run(out).to_dict()), flat(settings.to_dict())
    except ConfigError as error:
        raise ConfigError(
            f"{out} holds a run of another kind ({error}). Name a new directory with {option('out')}."
        ) from error
    free = resumable(settings)
    changed = {
        key: (before.get(key), now.get(key))
        for key in before | now
        if before.get(key) != now.get(key)
    }
    shaping = {
        key: values
        for key, values in changed.items()
        if key not in free and not (key in _PLACES and _same_place(*values))
    }
    if shaping:
        text = "; ".join(
            f"{key} is {new!r}, was {old!r}" for key, (old, new) in sorted(shaping.items())
        )
        raise ConfigError(
            f"{out} holds a run with other settings, which cannot change when it is resumed: {text}. Name a new "
            f"directory with {option('out')}, or use the settings in {written}."
        )
    return changed


def _same_place(old: Any, new: Any) -> bool:
    """Whether two paths lead to the same data.

    Prepared rows in another place are taken for those of a path that leads nowhere from here, because the checkpoint
    knows their fingerprint and refuses others.
    """
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    moved = not Path(old).exists() and (Path(new) / MANIFEST).is_file()
    return moved or (Path(new).exists() and os.path.realpath(old) == os.path.realpath(new))


def keep_settings(settings: Sections, out: Path) -> Changed:
    """Write the settings of a run that begins, and return those with which one that is resumed differs from before.

    Called under the lock of the run, so that a second command cannot overwrite the settings of the first.
    """
    changed = check_same_run(settings, out)
    if not has_begun(out):
        keep_foreign(out / "run.yaml", b"# digest ")
        settings.save(out / "run.yaml")
    return changed


def record_resume(trainer: Trainer, settings: Sections) -> None:
    """Print and keep the settings with which a run goes on, and log another length; its checkpoint is accepted."""
    out, changed = trainer.out, trainer.changed
    for key, (old, new) in changed.items():
        note(f"{out} is resumed with {key} {new!r} (was {old!r})")
    # Of the settings that may change, only the length shapes the weights: the learning rate falls to its end.
    planned, longer = trainer.planned, {"train.limit", "train.epochs"} & changed.keys()
    if longer and planned != trainer.state.total_steps:
        trainer.journal.write({"event": "resumed", "step": trainer.state.step, "planned": planned})
    settings.save(out / "run.yaml")


def resolve_checkpoint(settings: Any) -> Any:
    """Return the checkpoint of the settings of a run; a model of the Hub is fetched, and named with its commit.

    A run that is resumed keeps the commit with which it began.
    """
    checkpoint, family = settings.model.checkpoint, settings.model.family
    if not checkpoint or hub_name(checkpoint) is None:
        return checkpoint
    if family is not None and ":" in family:
        own_family(family)
    before = settings_before(settings)
    return training.starting_model.resolve_source(
        checkpoint, None if before is None else before.model.checkpoint
    )
