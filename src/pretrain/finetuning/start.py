"""Initial model of a fine-tuning run: a checkpoint with the head of the task, or the same architecture from scratch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.loading import configuration
from pretrain.config.spelling import option_name
from pretrain.errors import ConfigError, ModelError, PretrainError
from pretrain.models import family_class
from pretrain.models.backbone import Backbone
from pretrain.models.base import Model, check_head
from pretrain.models.config import placeholders
from pretrain.models.heads import LABELLED, SequenceHead, kind_of_class, labels_named_by
from pretrain.nn.buffers import stored_tensors
from pretrain.training.resuming import has_begun
from pretrain.training.starting_model import open_source
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.objectives.tasks import Task

__all__ = [
    "automatic_lr",
    "begun_as",
    "classes_of",
    "earlier_lr",
    "freeze",
    "starting_model",
    "used_unloaded_weights",
    "write_counts",
]

_NO_LENGTH = 10**20  # what transformers writes where there is none is larger
_LR_OF_BASE, _LR_BOUNDS, _LR_OF_ADAPTERS = 3.6e-5, (1e-5, 2e-3), 4e-3


def starting_model(
    source: Any,
    task: type[Task],
    labels: Sequence[str] | None,
    *,
    seed: int = 0,
    scratch: bool = False,
    whole: bool = True,
    quiet: bool = False,
) -> Model:
    """Open a checkpoint, or copy a model, with the head that the task needs.

    Head weights of the checkpoint are kept if they fit (the pooler of a published BERT; the whole head of a classifier
    with the same labels); the rest is initialised from the seed and listed in one line.

    Args:
        source: a directory, or a ``Model``, which is not modified.
        task: task whose head is needed; with ``head_kind`` None the existing head is kept.
        labels: classes of a head with labels.
        seed: seed of all new weights.
        scratch: initialise all weights anew, for the from-scratch arm of a comparison.
        whole: read all weights now; if False, several ranks leave them on disk, see ``open_source``.
        quiet: do not print what was loaded.

    Raises:
        ModelError: the family has no such head, or the model no tokenizer.
        CheckpointError: the source cannot be opened.
    """
    kind = task.head_kind
    if isinstance(source, Model):
        model = _copied(source, kind, labels)
    elif isinstance(source, str | os.PathLike):
        model = open_source(os.fspath(source), head=kind, whole=whole or scratch, quiet=True)
    else:
        raise ConfigError(
            f"model is {type(source).__name__}; give a checkpoint directory, or what pretrain.load returns."
        )
    if model.head_kind in LABELLED and labels is not None:
        _set_labels(model, tuple(labels))
    if scratch:
        model.init_weights(seed)
        model.fresh = frozenset(name for name, _ in model.named_parameters())
    elif model.fresh:
        model.init_weights(seed, model.fresh)
    if isinstance(model.head, SequenceHead) and "head.classifier.weight" in model.fresh:
        model.head.reads_padding = False  # whatever the replaced head was trained with
    _set_padding(model, task)
    _set_length(model)
    model.card = None
    if not quiet:
        new = "all" if scratch else ", ".join(sorted(model.fresh)) or "none"
        size = f"{model.backbone.model_type} with {model.num_parameters():,} parameters"
        note(f"{size}, newly initialised: {new}")
    return model


def check_fits(source: Any, task: type[Task]) -> None:
    """Check that a checkpoint or model can have the head of a task, from its configuration only.

    Raises:
        ModelError: its family has no such head.
    """
    kind, family, _ = _known(source)
    if task.head_kind in (None, kind) or family is None:
        return
    if task.head_kind not in family.successors:
        try:
            check_head(family, task.head_kind)
        except ModelError as error:
            raise ModelError(f"The task {task.name} does not fit this model. {error}") from error


def classes_of(source: Any, task: type[Task]) -> tuple[str, ...] | None:
    """Classes of a checkpoint that already has the head of the task; None if it has not, or its classes are unnamed."""
    if task.head_kind not in LABELLED:
        return None
    kind, _, labels = _known(source)
    return labels if kind == task.head_kind and len(labels) > 1 else None


def _known(source: Any) -> tuple[str | None, type[Backbone] | None, tuple[str, ...]]:
    """Return the kind of head of a model or checkpoint, its family and its classes, of which placeholders are none.

    Of a checkpoint only the configuration is read. What that does not tell is left out: opening it will say why.
    """
    kind: str | None = None
    family: type[Backbone] | None = None
    labels: tuple[str, ...] = ()
    if isinstance(source, Model):
        kind, family, labels = source.head_kind, type(source.backbone), tuple(source.labels or ())
    elif isinstance(source, str | os.PathLike) and (config := configuration(os.fspath(source))):
        unread = (PretrainError, ValueError, TypeError, LookupError)
        with contextlib.suppress(*unread):
            kind = kind_of_class(str((config.get("architectures") or [""])[0]))
        with contextlib.suppress(*unread):
            family = family_class(str(config["model_type"]), path_allowed=False)
        with contextlib.suppress(*unread):
            labels = labels_named_by(config) if config.get("id2label") else ()
    return kind, family, () if labels == placeholders(len(labels)) else labels


def _recorded(path: str | os.PathLike[str], key: str) -> Mapping[str, Any]:
    """Return a mapping that a checkpoint records of its training; empty if there is none."""
    block = configuration(os.fspath(path)).get("pretrain")
    record = block.get(key) if isinstance(block, Mapping) else None
    return record if isinstance(record, Mapping) else {}


def begun_as(out: Path | None, task: type[Task], source: Any = None) -> dict[str, Any]:
    """Return what is known of a run that has begun: ``begun_labels``, ``begun_objective`` and ``begun_columns``.

    A run that begins with a directory ``source`` whose head was trained for the same task goes on with its objective.
    """
    if out is None or not has_begun(out):
        is_path = isinstance(source, str | os.PathLike)
        record = _recorded(source, "objective") if is_path else {}
        return {"begun_objective": record} if record.get("name") == task.__name__ else {}
    kind, _, labels = _known(out)
    facts: dict[str, Any] = {
        "begun_objective": _recorded(out, "objective"),
        "begun_columns": _recorded(out, "columns"),
    }
    return facts | ({"begun_labels": labels} if labels and kind == task.head_kind else {})


def write_counts(model: Model) -> dict[int, int]:
    """Return how often each parameter has been written in place, by its ``id``."""
    return {id(p): p._version for p in model.parameters()}


def used_unloaded_weights(task: Task, before: dict[int, int]) -> bool:
    """Whether the constructor of a task wrote to, copied or replaced weights that have not been loaded yet.

    ``before`` are the ``write_counts`` of its model before the task was built.
    """
    if task.model.start is None:
        return False
    empty = [t for t in (*task.parameters(), *task.buffers()) if t.is_meta]
    replaced = any(id(p) not in before for p in task.model.parameters())
    named = {id(b) for b in task.model.buffers()}
    return replaced or any(before.get(id(t), -1) != t._version for t in empty if id(t) not in named)


def _copied(source: Model, kind: str | None, labels: Sequence[str] | None) -> Model:
    """Copy a model with the requested head; the original is not modified."""
    if kind is None or kind == source.head_kind:
        return copy.deepcopy(source)
    if kind in type(source.backbone).successors:
        model = Model.from_hf_config(source.hf_config(), kind)
        model.load_disk_state(source.disk_view())
        # A processor of images with texts has one of images, which is all that such a successor needs.
        processor = getattr(source.processor, "images", source.processor)
        model.processor, model.source = copy.deepcopy(processor), source.source
        return model.eval()
    backbone = copy.deepcopy(source.backbone)
    model = Model.build(
        type(backbone),
        backbone.config,
        head=kind,
        labels=labels,
        tokenizer=copy.deepcopy(source.processor),
    )
    model.backbone, model.source = backbone, source.source
    if model.head is not None:
        model.head.to_empty(device="cpu")
    fresh = {name for name in stored_tensors(model) if name.startswith("head.")}
    model.init_weights(0, fresh)
    model.fresh = frozenset(fresh)
    model.generation_config = dict(source.generation_config)
    model.extra_config = copy.deepcopy(source.extra_config)
    return model.eval()


def _set_labels(model: Model, labels: tuple[str, ...]) -> None:
    """Set the class names; another number of classes, or other names, need a new last layer."""
    if model.labels == labels:
        return
    head: Any = model.head
    made_up = model.labels == placeholders(len(labels))
    fits = len(model.labels or ()) == len(labels)
    if not fits or not (made_up or "head.classifier.weight" in model.fresh):
        from torch import nn

        old = head.classifier
        head.classifier = nn.Linear(old.in_features, len(labels), bias=old.bias is not None)
        head.unit = 1.0  # as another task has trained it
        new = {name for name, _ in model.named_parameters() if name.startswith("head.classifier.")}
        model.init_weights(0, new)
        model.fresh = model.fresh | new
    model.labels = labels


def _set_padding(model: Model, task: type[Task]) -> None:
    """Name a token that pads, without which other libraries do not batch texts, and its id in a sequence classifier.

    It is the one that the tokenizer states, else that of the model, else the end of a text, if that is a special token.
    """
    config, tokenizer = model.backbone.config, model.tokenizer
    classifies = model.head_kind == "sequence-classification"
    if not classifies and model.head_kind != "token-classification" and task.name != "embedding":
        return
    if tokenizer is None:
        raise ModelError(
            "The checkpoint has no tokenizer, so it cannot be fine-tuned on text. Put the tokenizer.json that it was "
            "trained with into its directory, or save it with its tokenizer."
        )
    stated, end = "pad" in tokenizer.stated_roles, tokenizer.eos_id
    pad = tokenizer.pad_id if stated or end is None else end
    if pad is None:
        return
    if classifies and config.pad_id is None:
        model.backbone.config = dataclasses.replace(config, pad_id=pad)
        if not stated:
            name = next(name for name, index in tokenizer.vocab.items() if index == pad)
            tokenizer.roles["pad"] = name
        if isinstance(getattr(model.head, "pad_id", 0), type(None)):
            model.head.pad_id = pad  # type: ignore[union-attr]
    else:
        # A classifier of transformers looks for the id of the model: another padding would be read as text.
        model.tokenizer = tokenizer.padded(config.pad_id, *[end] * (not classifies))


def _set_length(model: Model) -> None:
    """State the positions of a model that reads whole texts, if its tokenizer states no length.

    Pipelines of transformers cut texts at it, and without it do not cut them, although they are asked to.
    """
    heads = ("sequence-classification", "token-classification", "question-answering")
    if model.tokenizer is None or model.head_kind not in heads:
        return
    stated = model.tokenizer.config.get("model_max_length")
    if not isinstance(stated, int | float) or stated >= _NO_LENGTH:
        model.tokenizer.config["model_max_length"] = int(model.backbone.max_length)


def freeze(model: Model, what: str | int) -> int:
    """Freeze part of a model; return the number of frozen parameters.

    Args:
        model: model to freeze in place.
        what: ``"backbone"``, ``"embeddings"``, a number of lowest blocks (with the embeddings), or ``""`` for
            nothing.

    Raises:
        ConfigError: ``what`` is none of these, or more blocks than there are.
    """
    if what in ("", 0, "0"):
        return 0
    backbone = model.backbone
    blocks = backbone.blocks()
    if what == "backbone":
        modules = [backbone]
    elif what == "embeddings":
        modules = list(backbone.embeddings())  # type: ignore[arg-type]
    elif str(what).isdigit() and int(what) <= len(blocks):
        modules = [*backbone.embeddings(), *blocks[: int(what)]]  # type: ignore[list-item]
    else:
        raise ConfigError(
            f'{option_name("freeze")} is {what!r}; it must be "backbone", "embeddings" or a number of blocks up to '
            f"{len(blocks)}."
        )
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def automatic_lr(model: Model, *, adapter: bool = False) -> float:
    """Peak learning rate of AdamW by the size of the model: 3.6e-5 * (768 / width) ** 1.5 * (12 / layers) ** 0.5.

    Models of the usual shape have a layer for every 64 of width: BERT-base gets 3.6e-5 and BERT-large 1.7e-5, as in
    appendix A.3 of their paper (1810.04805), two layers of 128 get 1.3e-3. Deeper and thinner ones do best between what
    the width alone and the width times the depth would give them (docs/lab-log.md). The rate is at most 2e-3, above
    which models of 64 no longer gain, and at least 1e-5, with which larger ones are fine-tuned. The rate of an adapter
    is ten times as high, and at most 4e-3: at 1.3e-2 adapters of two layers of 128 did not learn.
    """
    width, layers = int(model.backbone.config.hidden_size), len(model.backbone.blocks())
    low, high = _LR_BOUNDS
    lr = min(max(_LR_OF_BASE * (768 / width) ** 1.5 * (12 / layers) ** 0.5, low), high)
    return float(f"{min(10 * lr, _LR_OF_ADAPTERS) if adapter else lr:.2g}")


def earlier_lr(model: Model, *, adapter: bool = False) -> float:
    """Automatic rate of the first runs, which did not keep theirs, to resume them."""
    lr = 3e-5 * (768 / int(model.backbone.config.hidden_size)) ** 1.5
    return float(f"{lr * (10 if adapter else 1):.2g}")
