"""Training objectives, one per file: each combines a model with its loss.

``OBJECTIVES`` holds the short names that a configuration may use; any other class is named by its import path.
The functions on tasks of fine-tuning, which pre-training does without, are imported when they are used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

import torch

from pretrain.config.aliases import use_value
from pretrain.config.check import check_value
from pretrain.config.spelling import either
from pretrain.errors import ConfigError, did_you_mean, suggestion
from pretrain.objectives.base import Loss, Objective
from pretrain.utils.imports import call_named, import_named
from pretrain.utils.on_use import on_use
from pretrain.utils.strict_json import as_json

if TYPE_CHECKING:
    from pretrain.objectives.task_classes import check_options, task_class

__all__ = [
    "OBJECTIVES",
    "TASKS",
    "Loss",
    "Objective",
    "arguments",
    "build_objective",
    "check_arguments",
    "check_monitor",
    "check_objective",
    "check_options",
    "objective_class",
    "objective_for",
    "task_class",
]

__getattr__ = on_use(
    __name__, {"pretrain.objectives.task_classes": ("check_options", "task_class")}
)

# Built-in fine-tuning tasks; a custom task is named by its import path.
TASKS = {
    "classification": "pretrain.objectives.classification.Classification",
    "regression": "pretrain.objectives.regression.Regression",
    "token-classification": "pretrain.objectives.token_classification.TokenClassification",
    "question-answering": "pretrain.objectives.question_answering.QuestionAnswering",
    "chat": "pretrain.objectives.instruction.Instruction",
    "language-modelling": "pretrain.objectives.language_modelling.LanguageModelling",
    "embedding": "pretrain.objectives.embedding.Embedding",
    "preference": "pretrain.objectives.preference.Preference",
    "image-classification": "pretrain.objectives.image_classification.ImageClassification",
    "segmentation": "pretrain.objectives.segmentation.Segmentation",
    "object-detection": "pretrain.objectives.object_detection.ObjectDetection",
    "audio-classification": "pretrain.objectives.audio_classification.AudioClassification",
    "image-text-retrieval": "pretrain.objectives.image_text_retrieval.ImageTextRetrieval",
    "captioning": "pretrain.objectives.captioning.Captioning",
}
OBJECTIVES = {
    "NextToken": "pretrain.objectives.next_token.NextToken",
    "MaskedLM": "pretrain.objectives.masked_lm.MaskedLM",
    "MaskedImage": "pretrain.objectives.masked_image.MaskedImage",
    "NextPatch": "pretrain.objectives.next_patch.NextPatch",
    "LeJEPA": "pretrain.objectives.views.LeJEPA",
    "SimCLR": "pretrain.objectives.views.SimCLR",
    "MoCo": "pretrain.objectives.views.MoCo",
    "Contrastive": "pretrain.objectives.contrastive.Contrastive",
    "SigmoidContrastive": "pretrain.objectives.contrastive.SigmoidContrastive",
    "ImageClassification": "pretrain.objectives.image_classification.ImageClassification",
    "AudioClassification": "pretrain.objectives.audio_classification.AudioClassification",
}


def check_monitor(objective: type[Objective], name: str, monitor: str | None) -> None:
    """Check ``train.monitor`` before any data are read, if the class lists the figures of its evaluation.

    Raises:
        ConfigError: the evaluation of this objective or task, called ``name``, has no such figure.
    """
    known = vars(objective).get("figures")  # a derived class may report more than its base
    if monitor and known and monitor not in known:
        raise ConfigError(
            f"train.monitor is {monitor!r}, and the evaluation of {name} has only these figures: {', '.join(known)}."
            + suggestion(monitor, known)
        )


def objective_class(class_path: str) -> type[Objective]:
    """Resolve a short name or an import path to the class.

    Raises:
        ConfigError: nothing of that name exists, or it is not an ``Objective``.
    """
    class_path = use_value("objective.class_path", class_path)
    path = OBJECTIVES.get(class_path, class_path)
    if "." not in path and ":" not in path:
        if class_path in TASKS:
            raise ConfigError(
                f"objective.class_path: {class_path!r} is no objective of pre-training but a task of fine-tuning: "
                + either(
                    f"pretrain finetune --task {class_path}.", f"finetune(task={class_path!r})."
                )
            )
        raise ConfigError(
            f"objective.class_path: no objective is called {class_path!r}."
            + did_you_mean(class_path, OBJECTIVES)
            + " An objective of your own is named by its import path, package.module:Class."
        )
    found = import_named(path, "objective.class_path")
    if not (inspect.isclass(found) and issubclass(found, Objective)):
        raise ConfigError(
            f"objective.class_path: {path!r} is not a subclass of pretrain.Objective."
        )
    return found


def objective_for(head_kind: str | None) -> str | None:
    """Short name of the objective that trains this kind of head, or None; several train models without a head."""
    if head_kind is None:
        return None
    return next((n for n in OBJECTIVES if objective_class(n).head_kind == head_kind), None)


def check_objective(class_path: str, init_args: Mapping[str, Any]) -> type[Objective]:
    """Return the class of an objective whose arguments have been checked.

    Raises:
        ConfigError: there is no such objective, or an argument is unknown, missing or of the wrong type.
    """
    cls = objective_class(class_path)
    check_arguments(cls, init_args, _spell)
    try:
        inspect.signature(cls).bind(None, **init_args)
    except TypeError as error:
        raise ConfigError(f"objective.init_args: {cls.__name__}: {error}.") from error
    return cls


def _spell(key: str) -> str:
    return f"objective.init_args.{key}"


def build_objective(
    class_path: str, init_args: dict[str, Any], model: Any, seed: int = 0
) -> Objective:
    """Build an objective around ``model``, see `check_objective`; its own modules are initialised with ``seed``."""
    cls = check_objective(class_path, init_args)
    given = as_json(init_args)  # a class may change what it is given
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: Objective = call_named(cls, init_args, _spell, model)
    # config.json of those that are built in has only what their description lacks.
    if class_path not in OBJECTIVES or not given.keys() <= built.describe().keys():
        built.init_args = given
    return built


def arguments(cls: type[Objective]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the named arguments of an objective, beside the model, and whether it accepts any others."""
    parameters = inspect.signature(cls.__init__).parameters
    kinds = {p.kind for p in parameters.values()}
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {
        name: p
        for name, p in parameters.items()
        if name not in ("self", "model") and p.kind not in rest
    }
    return named, inspect.Parameter.VAR_KEYWORD in kinds


def check_arguments(
    cls: type[Objective],
    given: Mapping[str, Any],
    spell: Callable[[str], str],
    others: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Check arguments against the signature and annotations of a class.

    Args:
        cls: an objective, whose first argument is the model.
        given: its other arguments.
        spell: returns the spelling of an argument in errors.
        others: further accepted arguments and their types.

    Raises:
        ConfigError: an unknown argument, or a value that does not match a plain annotation.
    """
    known, anything = arguments(cls)
    for key, value in given.items():
        if key in others:
            check_value(spell(key), value, others[key])
        elif key in known:
            check_value(spell(key), value, _annotation(cls, known[key].annotation))
        elif not anything:
            near = did_you_mean(key, [*known, *others])
            raise ConfigError(f"{spell(key)}: {cls.__name__} has no such argument.{near}")


def _annotation(cls: type, written: Any) -> Any:
    """Resolve an annotation to a type; None if it is known to type checkers only."""
    module = sys.modules.get(cls.__init__.__module__)  # type: ignore[misc]
    alone = SimpleNamespace(__annotations__={"it": written})
    try:
        return get_type_hints(alone, dict(vars(module)) if module else {})["it"]
    except Exception:  # an annotation may be any expression
        return None
