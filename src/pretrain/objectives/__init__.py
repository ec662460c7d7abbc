"""What is trained: one file per objective, each a model together with its loss.

``OBJECTIVES`` gives the short names that a configuration may use; any other class is named by its import path.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError, did_you_mean
from pretrain.objectives.base import Loss, Objective

if TYPE_CHECKING:
    from pretrain.objectives.tasks import Task

__all__ = [
    "OBJECTIVES",
    "TASKS",
    "Loss",
    "Objective",
    "build_objective",
    "objective_class",
    "objective_for",
    "task_class",
]

# What a model can be fine-tuned for; a task of your own is named by its import path.
TASKS = {
    "classification": "pretrain.objectives.classification.Classification",
    "regression": "pretrain.objectives.regression.Regression",
    "token-classification": "pretrain.objectives.token_classification.TokenClassification",
    "question-answering": "pretrain.objectives.question_answering.QuestionAnswering",
    "chat": "pretrain.objectives.instruction.Instruction",
    "language-modelling": "pretrain.objectives.language_modelling.LanguageModelling",
    "embedding": "pretrain.objectives.embedding.Embedding",
    "preference": "pretrain.objectives.preference.Preference",
}
OBJECTIVES = {
    "NextToken": "pretrain.objectives.next_token.NextToken",
    "MaskedLM": "pretrain.objectives.masked_lm.MaskedLM",
}


def objective_class(class_path: str) -> type[Objective]:
    """Resolve a short name or an import path to the class.

    Raises:
        ConfigError: nothing of that name exists, or it is not an ``Objective``.
    """
    path = OBJECTIVES.get(class_path, class_path)
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(
            f"objective.class_path: no objective is called {class_path!r}."
            + did_you_mean(class_path, OBJECTIVES)
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"objective.class_path: cannot import {path!r} ({error}). Name a class by its full import path, "
            f"or use one of {', '.join(OBJECTIVES)}."
        ) from error
    if not (inspect.isclass(found) and issubclass(found, Objective)):
        raise ConfigError(
            f"objective.class_path: {path!r} is not a subclass of pretrain.Objective."
        )
    return found


def task_class(name: str) -> type[Task]:
    """Resolve the name of a task, or the import path of one, to its class.

    Raises:
        ConfigError: there is no such task.
    """
    from pretrain.objectives.tasks import Task

    if name not in TASKS and "." not in name:
        raise ConfigError(f"There is no task {name!r}." + did_you_mean(name, TASKS))
    found = objective_class(TASKS.get(name, name))
    if not issubclass(found, Task):
        raise ConfigError(f"{name!r} is an objective but no task: it does not say what rows mean.")
    return found


def objective_for(head_kind: str | None) -> str | None:
    """Short name of the objective that trains this kind of head, or None."""
    return next((n for n in OBJECTIVES if objective_class(n).head_kind == head_kind), None)


def build_objective(class_path: str, init_args: dict[str, Any], model: Any) -> Objective:
    """Build an objective around ``model``; unknown or missing arguments are named with their dotted key."""
    cls = objective_class(class_path)
    known = [
        name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "model")
    ]
    for key in init_args:
        if key not in known:
            raise ConfigError(
                f"objective.init_args.{key}: {cls.__name__} has no such argument."
                + did_you_mean(key, known)
            )
    hints = inspect.get_annotations(cls.__init__)
    for key, value in init_args.items():
        _check_type(f"objective.init_args.{key}", value, hints.get(key))
    try:
        inspect.signature(cls).bind(model, **init_args)
    except TypeError as error:
        raise ConfigError(f"objective.init_args: {cls.__name__}: {error}.") from error
    return cls(model, **init_args)


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Hold a value against a plain annotation, a type or its name; what is not plain is left to the class."""
    name = hint if isinstance(hint, str) else getattr(hint, "__name__", "")
    kinds: dict[str, tuple[type, ...]] = {
        "float": (int, float),
        "int": (int,),
        "bool": (bool,),
        "str": (str,),
    }
    if name in kinds and (
        not isinstance(value, kinds[name]) or (isinstance(value, bool) and name != "bool")
    ):
        raise ConfigError(f"{key} is {value!r}; it must be of type {name}.")
