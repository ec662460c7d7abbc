"""Tasks of fine-tuning by their names, and their options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pretrain.config.aliases import VALUES, Advice
from pretrain.config.spelling import option, option_name
from pretrain.errors import ConfigError, did_you_mean
from pretrain.objectives import TASKS, check_arguments, objective_class
from pretrain.objectives.base import Objective
from pretrain.objectives.tasks import Task

__all__ = ["check_options", "task_class"]

# name -> class of the tasks that the caller of this process has named.
_OWN_TASKS: dict[str, type[Task]] = {}


def task_class(
    name: str | type[Task], *, path_allowed: bool = True, others: Iterable[str] = ()
) -> type[Task]:
    """Return the class of a task.

    An own class becomes known to this process: models whose config.json records its ``name`` are used with it.

    Args:
        name: a key of ``TASKS``, the import path of a class, or a class.
        path_allowed: False if the name comes from a file, because a file must never select code to import.
        others: names that the caller knows besides, for the message.

    Raises:
        ConfigError: there is no such task.
    """
    if not isinstance(name, str | type):
        raise ConfigError(
            f"The task is a {type(name).__name__}, {name!r:.60}; give a name, one of {', '.join(TASKS)}, or a "
            "class."
        )
    if isinstance(name, type):
        found: type[Objective] = name
    elif name in _OWN_TASKS:
        return _OWN_TASKS[name]
    elif name not in TASKS and not (path_allowed and re.search("[.:]", name)):
        aliases = [word for word, ours in VALUES["task.name"].items() if type(ours) is not Advice]
        raise ConfigError(
            f"There is no task {name!r}."
            + did_you_mean(name, [*TASKS, *others], aliases)
            + f" If it is your own, name its class: {option('task', 'package.module:Class')}."
        )
    else:
        found = objective_class(TASKS.get(name, name))
    if not issubclass(found, Task):
        raise ConfigError(
            f"{name!r} is an objective but not a subclass of pretrain.objectives.tasks.Task."
        )
    if found.name not in TASKS:
        _OWN_TASKS[found.name] = found
    return found


def check_options(
    task: type[Task], options: Mapping[str, Any], spell: Callable[[str], str] = option_name
) -> None:
    """Check the options of a task against its signature; errors spell them as the user wrote them, by ``spell``.

    Raises:
        ConfigError: an unknown option (the nearest is suggested), or a value of the wrong type.
    """
    if "max_length" in options:
        raise ConfigError(
            f"{spell('max_length')} is not an option of the task, but of the data: {option('max_length')}."
        )
    check_arguments(task, options, spell, task.row_options)
