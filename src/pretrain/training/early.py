"""Checks of a run that need no data, made before the data are read, so that mistakes show early."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pretrain import training
from pretrain.checkpoint.manifest import NAME as MANIFEST
from pretrain.config import DataConfig, RunConfig
from pretrain.config.aliases import VALUES
from pretrain.config.spelling import option
from pretrain.data.prepare import Prepared
from pretrain.data.row_source import RowSource
from pretrain.data.sources import resolve_sources
from pretrain.distributed.launched import count_devices
from pretrain.errors import ConfigError, ModelError
from pretrain.models import build, family_class
from pretrain.models.base import Model, check_head
from pretrain.objectives import OBJECTIVES, check_monitor, check_objective, objective_class
from pretrain.training.logging import check_loggers
from pretrain.training.precision import choose_device
from pretrain.utils.hub_names import hub_name

__all__ = [
    "PLAIN_SIZE",
    "check_checkpoint",
    "check_early",
    "check_overrides",
    "check_trained_head",
    "prepared_in",
    "tokens_per_row",
]

# The automatic size where the rows are no text, or the text has not been read yet.
PLAIN_SIZE = "small"


def check_early(settings: RunConfig, rows: RowSource | None = None, devices: int | str = 1) -> None:
    """Check whatever needs no data, before they are read: devices, objective, loggers, family, size, fields, positions.

    Raises:
        ConfigError, ModelError: one of them cannot be used.
        CheckpointError: there is no such checkpoint.
    """
    if rows is not None and not hasattr(rows, "train"):
        raise ConfigError(
            f"rows= is {type(rows).__name__} {str(rows)[:60]!r}; it must be a RowSource: "
            "rows=pretrain.RowSource(train, valid). Labelled rows are for pretrain.finetune; a text is named by "
            'data=..., a folder of images by data={"source": "images", "source_args": {"train": ...}}.'
        )
    if rows is not None and (devices != 1 or settings.data.source is not None):
        raise ConfigError(
            "rows= is an object in the memory of this process: other processes (devices) cannot read it, and it cannot "
            "be combined with data.source. Leave it out, write a function that returns the rows, and name that: "
            'data={"source": "package.module:function"}.'
        )
    model, objective = settings.model, settings.objective
    choose_device(settings.parallel.device)
    count_devices(devices, settings.parallel.device)
    chosen = check_objective(objective.class_path, objective.init_args)
    check_monitor(chosen, objective.class_path, settings.train.monitor)
    check_loggers(settings.train.loggers)
    if model.checkpoint is not None:
        if hub_name(model.checkpoint) is None:  # others are fetched first
            if not os.path.exists(model.checkpoint):
                training.starting_model.open_source(model.checkpoint)  # raises
            check_checkpoint(settings, rows)
        return
    family = family_class(model.family)
    try:
        check_head(family, chosen.head_kind)
    except ModelError as error:
        raise ModelError(f"{error}{objective_advice(family.architectures)}") from error
    check_overrides(model.overrides)
    if settings.data.source is None:  # rows of a function may determine further fields
        size = PLAIN_SIZE if model.size == "auto" else model.size
        family.config_class.from_size(size, **model.overrides)
        if rows is None and family.unit_name == "tokens":
            # The pad id, which the tokenizer sets, takes positions away in some families.
            fields = {"pad_id": 0, **model.overrides}
            check_positions(settings, build(model.family, size, device="meta", **fields))


def objective_advice(heads: Collection[str | None]) -> str:
    """Return the advice to train a model with an objective that fits one of ``heads``, which it has or can have."""
    names = {ours: name for name, ours in reversed(VALUES["objective.class_path"].items())}
    kinds = {name: objective_class(name).head_kind for name in OBJECTIVES}
    fit = [name for name, kind in kinds.items() if kind is not None and kind in heads]
    words = [option("objective", names.get(name, name)) for name in fit]
    return f" Train this one with {' or '.join(words)}." * bool(words)


def check_checkpoint(settings: RunConfig, rows: RowSource | None = None) -> None:
    """Check from its config.json that a checkpoint has the head of the objective, and positions for the rows.

    Raises:
        ConfigError: it has not.
    """
    checkpoint = settings.model.checkpoint
    if (
        checkpoint is not None
        and (model := training.starting_model.outline(checkpoint)) is not None
    ):
        check_trained_head(settings, model)
        if rows is None and settings.data.source is None:
            check_positions(settings, model)


def check_trained_head(settings: RunConfig, model: Model) -> None:
    """Check that the model of a checkpoint has the head that the objective trains."""
    wanted = objective_class(settings.objective.class_path).head_kind
    if wanted is not None and model.head_kind != wanted:
        raise ConfigError(
            f"{settings.model.checkpoint} has the head {model.head_kind!r}, and {settings.objective.class_path} "
            f"trains {wanted!r}.{objective_advice([model.head_kind])} Or choose another checkpoint."
        )


def check_positions(settings: RunConfig, model: Model) -> None:
    """Check that rows of text are not longer than the positions of the model.

    Raises:
        ConfigError: they are.
        DataError: there is no such text.
    """
    length, room = tokens_per_row(settings.data), model.backbone.max_length
    if model.backbone.unit_name != "tokens" or not room or length <= room:
        return
    more, shorter = "", "Prepare the data anew with shorter rows"
    if prepared_in(settings.data.train) is None:
        resolve_sources(settings.data.train)  # one that is not there is the mistake to name
        shorter = "Make the rows shorter"
    if settings.model.checkpoint is None:
        more = f", or build a model with more positions (model.overrides.max_positions {length})"
    raise ConfigError(
        f"The rows have {length} tokens, but the {model.backbone.model_type} model has {room} positions. {shorter}, "
        f"{option('row_length', room)}{more}."
    )


def tokens_per_row(data: DataConfig) -> int:
    """Return the tokens of a row of text: of prepared data as they were prepared, else as they will be."""
    prepared = prepared_in(data.train)
    return data.row_length if prepared is None else prepared.manifest["options"]["row_length"]


def prepared_in(data: Any) -> Prepared | None:
    """Open the directory of prepared text that data are; None if they are something else."""
    if isinstance(data, str | os.PathLike) and os.path.isfile(
        Path(os.path.expanduser(data), MANIFEST)
    ):
        return Prepared.open(Path(data))
    return None


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse fields of a model that are settings elsewhere."""
    for key in ("seed", "head", "size", "family", "tokenizer", "labels"):
        if key in overrides:
            raise ConfigError(
                f"model.overrides.{key} is no field of a model's config; it is set elsewhere (model.family, "
                "model.size, train.seed, data.tokenizer, objective)."
            )
