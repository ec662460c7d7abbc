"""Settings of a fine-tuning run from the keyword arguments of ``finetune``, which name no section."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import Any

from pretrain.config.aliases import NAMES, use_value
from pretrain.config.spelling import option
from pretrain.data.tables import held_out_splits
from pretrain.errors import ConfigError, did_you_mean
from pretrain.finetuning.settings import TuneConfig, TuneData, TuneTrain
from pretrain.objectives import TASKS, task_class
from pretrain.objectives.tasks import Task

__all__ = ["from_keywords"]


def from_keywords(
    config: Any, model: Any, task: str | None, keywords: Mapping[str, Any]
) -> tuple[TuneConfig, dict[str, Any]]:
    """Build settings from a YAML file or mapping and from keyword arguments without their sections.

    Args:
        config: a file, a mapping of sections, a ``TuneConfig`` or None.
        model: path of a checkpoint, or an object (a ``Model``), which is only mentioned in the settings.
        task: name of the task; None takes the config's.
        keywords: columns by role (``text="review"``), options of the task, or fields of any section; or whole
            sections (``optim={...}``).

    Returns:
        The settings, and the data that were given as objects: ``train``, ``valid``, ``test``.

    Raises:
        ConfigError: no model, no task, or an unknown keyword (the nearest is suggested).
    """
    base = TuneConfig.load(config)
    sections: dict[str, Any] = {}
    name = use_value("task.name", task) or base.task.name
    if not name:
        raise ConfigError(
            f"No task is given. Name one: {option('task', 'classification')}, or another of {', '.join(TASKS)}."
        )
    sections["task"] = {"name": name}
    if model is not None:
        sections["model"] = {"checkpoint": os.fspath(model) if _is_path(model) else "a model"}
    elif not base.model.checkpoint:
        raise ConfigError(
            f"No checkpoint to fine-tune is given. Name one: {option('model', 'DIRECTORY')}."
        )
    cls = task_class(name)
    roles = {role.name for role in cls.roles}
    options = set(inspect.signature(cls.__init__).parameters) - {"self", "model", "max_length"}
    options |= {"labels", *cls.row_options}
    places = {
        f.name: key
        for key in ("parallel", "data", "train", "optim", "method")
        for f in dataclasses.fields(TuneConfig.SECTIONS[key])
        if f.init
    }
    # The columns and options of the base settings are merged with these two.
    columns, task_options, objects = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for key, value in _with_held_out_splits(keywords).items():
        if value is None:
            continue
        if _is_section(key, value):
            sections.setdefault(key, {}).update(value)
        elif key == "spare_test":
            objects[key] = value
        elif key in ("train", "valid", "test") and not isinstance(value, str | int | float):
            objects[key] = os.fspath(value) if _is_path(value) else value
        elif key in roles:
            columns[key] = value
        elif key in options:
            task_options[key] = _with_text_keys(value)
        elif key in places:
            sections.setdefault(places[key], {})[key] = value
        elif any(key in entry.names for entry in NAMES):  # read, or answered, by TuneConfig.load
            sections[key] = value
        else:
            all_names = sorted({*roles, *options, *places})
            raise ConfigError(
                f"{key} is no column, option or setting of the task {name}."
                + did_you_mean(key, all_names)
            )
    sections["task"]["options"] = {**task_options, **sections["task"].get("options", {})}
    section = sections.setdefault("data", {})
    section["columns"] = {**columns, **section.get("columns", {})}
    for key, value in objects.items():
        if key == "spare_test":
            continue
        sections["data"][key] = value if isinstance(value, str) else f"a {type(value).__name__}"
    _use_parts(cls, base, sections, objects)
    return TuneConfig.load(base, sections), {
        k: v for k, v in objects.items() if not isinstance(v, str) or k == "spare_test"
    }


def _with_text_keys(value: Any) -> Any:
    """Return a mapping with keys of text, as in YAML: numbers as keys are those of classes."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def _use_parts(
    task: type[Task], base: TuneConfig, sections: dict[str, Any], objects: Mapping[str, Any]
) -> None:
    """Take held-out rows from the source of the training rows, if it has such parts and no others are given."""
    data = sections["data"]
    train = objects.get("train", data.get("train", base.data.train))
    is_given = {"valid": base.data.valid != TuneData().valid, "test": base.data.test is not None}
    for part in task.parts(train):
        if part in is_given and not is_given[part] and part not in data and part not in objects:
            data[part] = os.fspath(train)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_section(key: str, value: Any) -> bool:
    """Whether a keyword is a section of settings; training rows, given as ``train``, may be a mapping too."""
    if key not in TuneConfig.SECTIONS or not isinstance(value, Mapping):
        return False
    return key != "train" or set(value) <= {f.name for f in dataclasses.fields(TuneTrain) if f.init}


def _with_held_out_splits(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Add the held-out splits of the rows as ``valid`` and ``spare_test``, which is used if it has labels."""
    splits = dict(keywords)
    for key, (_, part) in held_out_splits(splits.get("train")).items():
        if splits.get(key) is None:
            splits["spare_test" if key == "test" else key] = part
    return splits
