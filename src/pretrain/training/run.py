"""Training from a configuration: builds the data, model, objective and trainer.

``train`` is called by the command line and from Python. Calling it again resumes the run: everything it builds is a
function of the configuration, and the trainer continues from the newest checkpoint in the output directory.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pretrain.data
from pretrain import training, utils
from pretrain.checkpoint.resolve import resolve_model_directory
from pretrain.config import DataConfig, ModelConfig, RunConfig
from pretrain.config.run import began_without
from pretrain.config.spelling import TRAIN, using
from pretrain.data.encodings import check_encoding
from pretrain.data.prepare import Prepared, prepare
from pretrain.data.row_source import RowSource, open_rows
from pretrain.data.tokenizer import HUB_FILES, Tokenizer
from pretrain.distributed.world import current_world
from pretrain.errors import ConfigError, DataError, TokenizerError
from pretrain.models import build, family_class, own_family
from pretrain.models.base import Model
from pretrain.objectives import Objective, build_objective, objective_class
from pretrain.training.closing import closing_lines
from pretrain.training.early import (
    PLAIN_SIZE,
    check_checkpoint,
    check_early,
    check_overrides,
    check_trained_head,
    prepared_in,
)
from pretrain.training.parallelize import flat
from pretrain.training.resuming import (
    check_same_run,
    keep_settings,
    record_resume,
    resolve_checkpoint,
    resumable,
    run_key,
    settings_before,
)
from pretrain.training.state import Run, isolated_torch_state
from pretrain.training.trainer import Hook, Trainer
from pretrain.utils.files import muted, note
from pretrain.utils.hub_names import hub_name

__all__ = ["train"]

# The vocabulary is padded to a multiple of this, which is faster on matrix units; small ones are not padded.
_VOCAB_MULTIPLE = 64
# Automatic model sizes, below so many tokens of training text.
_SIZES = {"tiny": 5e6, "mini": 5e7, "small": 1e9, "medium": 5e9, "base": math.inf}
# Settings that are left to be chosen where they have this value.
_AUTOMATIC = (
    ("model", "size", "auto"), ("train", "limit", "auto"), ("train", "batch_rows", 0), ("optim", "lr", "auto"),
)  # fmt: skip


@using(TRAIN)
@isolated_torch_state()
def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None = None,
    *,
    devices: int | str = 1,
    hooks: Sequence[Hook | Callable[[Mapping[str, Any]], None]] = (),
    rows: RowSource | None = None,
    **sections: Any,
) -> Run:
    """Prepare the data, build the model and train it, or resume where an earlier call stopped.

    Args:
        config: a YAML file, a mapping of sections, a ``RunConfig``, or None for the defaults.
        devices: number of processes to start on this machine, also from a notebook; ``"auto"`` is one for each GPU.
            With 1 the run takes place in this process, which may be one of those that torchrun started.
        hooks: called after steps with a read-only record.
        rows: rows of any kind, instead of those that ``data`` names; for ``devices=1``. Name a function by
            ``data.source`` to have them from the command line too.
        **sections: overrides by section, ``data={"train": "books"}``, by dotted key, by a section's main setting,
            ``data="books", model="gpt2:small"``, or by the name of a setting alone, ``lr=6e-4``.

    Returns:
        The run: its directory, last metrics and history.

    Raises:
        PretrainError: a setting, the data or the output directory cannot be used; the message says what to do.
    """
    settings = RunConfig.load(config, sections or None)
    keep_automatic(settings)
    check_early(settings, rows, devices)
    if devices != 1:
        if not settings.train.out:
            resolve_by_data(settings, rows_of(settings, quiet=False))
        if (run := training.on_devices("train", settings, devices, hooks=hooks)) is not None:
            return run
    world = current_world()
    with muted(not world.is_rank_zero):
        settings.model.checkpoint = resolve_checkpoint(settings)
        check_checkpoint(settings, rows)
        settings.data.tokenizer = resolve_tokenizer(settings)
        if settings.train.out:
            check_same_run(settings, Path(settings.train.out))
        data = world.main_process_first(
            lambda: rows or rows_of(settings, quiet=not world.is_rank_zero),
            "prepare the data",
        )
        resolve_by_data(settings, data)
        objective = make_objective(settings, data)
        trainer = Trainer(
            objective,
            data.train,
            optim=settings.optim,
            train=settings.train,
            parallel=settings.parallel,
            eval_data=data.valid,
            hooks=hooks,
            about=about(settings, data),
            base=None
            if settings.model.checkpoint is None
            else training.starting_model.hash_weights(objective.model, opened=True),
            world=world,
        )
        settings.train = trainer.train

        def end(run: Run) -> None:
            if world.is_rank_zero:
                for line in closing_lines(run, objective, trainer.about.get("unigram_nats")):
                    trainer.say(line)

        return trainer.fit(
            lambda: keep_settings(settings, trainer.out),
            end,
            lambda: record_resume(trainer, settings),
        )


def resolve_by_data(settings: RunConfig, data: Prepared | RowSource) -> None:
    """Choose by the data what the settings leave open: the size of the model, and the directory of the run."""
    settings.model.size = resolve_size(settings.model, data)
    if not settings.train.out:
        settings.train.out = run_name(settings, data)
        keep_automatic(settings)


def resolve_size(model: ModelConfig, data: Prepared | RowSource) -> str:
    """Return the model size of the settings; an automatic one by the tokens of the training text.

    That size depends on the text only, never on the machine, so that a run can be repeated and resumed anywhere.
    """
    if model.size != "auto" or model.checkpoint is not None:
        return model.size
    tokens = data.train.num_tokens if isinstance(data, Prepared) else 0
    size = next((size for size, below in _SIZES.items() if 0 < tokens < below), PLAIN_SIZE)
    return size if size in family_class(model.family).config_class.size_names() else PLAIN_SIZE


def keep_automatic(settings: RunConfig) -> None:
    """Take from the run in ``train.out`` what the settings leave to be chosen, so that its choices outlive the rules.

    A run of an earlier version goes on with the cuts of its documents, whatever the settings say.

    A run that names no directory is found by its size: with another rule for the size it is another run.
    """
    before = settings_before(settings)
    if before is None:
        return
    for section, name, unset in _AUTOMATIC:
        part = getattr(settings, section)
        if getattr(part, name) == unset:
            setattr(part, name, getattr(getattr(before, section), name))
    if began_without(Path(settings.train.out) / "run.yaml", "train.recut"):
        settings.train.recut = False


def run_name(settings: RunConfig, data: Prepared | RowSource) -> str:
    """Return the directory of a run that names none: by model, settings that cannot change on resuming, and data."""
    model, free = settings.model, resumable(settings)
    plain = {k: v for k, v in flat(settings.to_dict()).items() if k not in free}
    # Settings that could not change on resuming in earlier versions, so that their runs keep their names.
    plain["train.micro_rows"] = 0
    if plain["train.recut"]:  # which earlier versions did not have
        del plain["train.recut"]
    start = model.checkpoint or f"{model.family.rpartition(':')[2]}-{model.size}"
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.normpath(start))).lower()
    return f"runs/{name}-{run_key(plain, data.about()['fingerprint'])}"


def rows_of(settings: RunConfig, *, quiet: bool) -> Prepared | RowSource:
    """Return the rows that the settings name: of a function, of a prepared directory, or of text."""
    data = settings.data
    if data.source is not None:
        return open_rows(data.source, data.source_args)
    return open_data(settings, quiet=quiet)


def resolve_tokenizer(settings: RunConfig) -> str:
    """Return ``data.tokenizer``; one of the Hub is fetched, and named with its commit as by ``resolve_checkpoint``."""
    tokenizer, before = settings.data.tokenizer, settings_before(settings)
    if hub_name(tokenizer) is None:
        return tokenizer
    earlier = None if before is None else before.data.tokenizer
    return current_world().broadcast_result(
        lambda: utils.hub_files.pinned(tokenizer, earlier, HUB_FILES)
    )


def open_data(settings: RunConfig, *, quiet: bool = False) -> Prepared:
    """Open the prepared directory that ``data.train`` names, or prepare (or find in the cache) the text it names."""
    data = settings.data
    if (prepared := prepared_in(data.train)) is not None:
        say_differences(settings, prepared)
        return prepared
    tokenizer = data.tokenizer
    if settings.model.checkpoint is not None and tokenizer == "bpe":
        tokenizer = str(
            resolve_model_directory(
                training.starting_model.local_directory(settings.model.checkpoint)
            )
        )
    prepared_text: Prepared = prepare(
        data.train,
        source="text",
        tokenizer=tokenizer,
        vocab_size=data.vocab_size,
        row_length=data.row_length,
        valid=data.valid,
        text=data.text,
        separator=data.separator,
        encoding=data.encoding,
        workers=data.workers,
        cache_dir=data.cache,
        quiet=quiet,
    )
    return prepared_text


def say_differences(settings: RunConfig, prepared: Prepared) -> None:
    """Print which settings of this run are overruled by prepared data, which are used as they are."""
    options, defaults = {"encoding": None, **prepared.manifest["options"]}, DataConfig()
    keys = ("row_length", "vocab_size", "tokenizer", "valid", "text", "separator", "encoding")
    overruled = [
        f"data.{key} {options[key]!r} (not {wanted!r})"
        for key in keys
        if (wanted := getattr(settings.data, key)) != getattr(defaults, key)
        and key in options
        and options[key] != (check_encoding(wanted) if key == "encoding" else wanted)
    ]
    if overruled:
        note(f"{prepared.path} was prepared with {', '.join(overruled)}; these values are used")


def make_objective(settings: RunConfig, data: Prepared | RowSource) -> Objective:
    """Return the objective of the settings around the model to train; see ``make_model``."""
    model, chosen = make_model(settings, data), settings.objective
    # The class gets a copy, so that run.yaml has what the user gave, whatever the class does with it.
    given = copy.deepcopy(chosen.init_args)
    return build_objective(chosen.class_path, given, model, settings.train.seed)


def make_model(settings: RunConfig, data: Prepared | RowSource) -> Model:
    """Return the model to train: newly initialised, or from ``model.checkpoint``; its processor is that of the data.

    Raises:
        TokenizerError: the tokenizer of the data does not match the checkpoint.
        ConfigError: the checkpoint has no head for the objective, or ``model.overrides`` is not valid.
    """
    checkpoint, text = settings.model.checkpoint, data if isinstance(data, Prepared) else None
    words = getattr(data.processor, "tokenizer", None) if text is None else text.tokenizer
    if checkpoint is not None:
        if ":" in settings.model.family:  # others are recorded in the checkpoint
            own_family(settings.model.family)
        model = training.starting_model.open_source(checkpoint)
        _say_unused(settings.model, model)
        check_trained_head(settings, model)
        check_labels(model, data)
        if words is not None:
            remedy = "Prepare them with data." if text is not None else "Name it: data.source_args."
            check_tokenizer(words, model, checkpoint, f"{remedy}tokenizer=")
        if text is not None and len(text.tokenizer) > model.backbone.vocab_size:
            raise TokenizerError(
                f"The data's tokenizer has {len(text.tokenizer)} tokens, but {checkpoint} has a vocabulary of "
                f"{model.backbone.vocab_size} ids. Prepare the data with the checkpoint's own tokenizer."
            )
        if text is not None:
            model.tokenizer = text.tokenizer
        elif model.processor is None:
            model.processor = data.processor
        return model
    check_overrides(settings.model.overrides)
    family, overrides = family_class(settings.model.family), settings.model.overrides
    if not isinstance(data, Prepared):
        check_images(settings, data)
        # What the rows determine of a model: its labels, and the fields that the config of the family has.
        fields = {"labels", *(spec.name for spec in dataclasses.fields(family.config_class))}
        fixed = {name: value for name, value in data.overrides.items() if name in fields}
        if family.padded:  # other libraries pad to that of the family
            fixed.pop("max_positions", None)
        overrides = {**fixed, **overrides}
    if words is not None:
        overrides = vocabulary_of(words, overrides)
    model = build(
        settings.model.family,
        resolve_size(settings.model, data),
        head=objective_class(settings.objective.class_path).head_kind,
        seed=settings.train.seed,
        # With several ranks, memory is allocated after sharding only.
        device="meta" if current_world().size > 1 else "cpu",
        **overrides,
    )
    model.processor = data.processor
    return model


def _say_unused(section: ModelConfig, model: Model) -> None:
    """Print which settings of a new model are not used, because a checkpoint says what the model is."""
    family = section.family
    unused = {
        "family": family != ModelConfig.family
        and ":" not in family
        and family != model.backbone.model_type,
        "size": section.size != ModelConfig.size,
        "overrides": bool(section.overrides),
    }
    named = [
        f"model.{name} {getattr(section, name)!r}" for name, is_set in unused.items() if is_set
    ]
    if named:
        note(f"the model is that of {section.checkpoint}; not used: {', '.join(named)}")


def check_labels(model: Model, data: Prepared | RowSource) -> None:
    """Check that the classes of rows have the numbers that they have in the model.

    Raises:
        DataError: the rows have other classes than the head of the model, or the same ones in another order.
    """
    labels = None if isinstance(data, Prepared) else data.overrides.get("labels")
    if labels is None or model.labels is None:
        return
    same = labels == len(model.labels) if isinstance(labels, int) else tuple(labels) == model.labels
    if not same:
        theirs = f"{labels} labels" if isinstance(labels, int) else f"the labels {_listed(labels)}"
        raise DataError(
            f"The rows have {theirs}, and the model {_listed(model.labels)}: the numbers of the rows would mean other "
            "classes. If only the order differs, name the labels in that of the model: "
            f"data.source_args.labels=[{', '.join(model.labels)}]."
        )


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:20]) + ", ..." * (len(labels) > 20)


def check_tokenizer(
    tokenizer: Tokenizer, model: Model, checkpoint: str | Path, remedy: str
) -> None:
    """Check that data were encoded by the tokenizer of a model, if it has one; ``remedy`` ends before its path.

    Raises:
        TokenizerError: they were not.
    """
    expected = model.tokenizer
    if expected is not None and tokenizer.fingerprint != expected.fingerprint:
        directory = training.starting_model.local_directory(checkpoint)
        raise TokenizerError(
            f"The data were prepared with another tokenizer ({len(tokenizer)} tokens) than that of {checkpoint} "
            f"({len(expected)} tokens): every id would mean something else. {remedy}{directory}"
        )


def check_images(settings: RunConfig, data: RowSource) -> None:
    """Check that the model is built for the images that the processor of the rows returns.

    Raises:
        ConfigError: ``model.overrides`` names another size, or another number of channels.
    """
    images = getattr(data.processor, "images", data.processor)
    if not isinstance(images, pretrain.data.images.ImageProcessor):
        return
    returned = {"num_channels": ("channels", images.channels)}
    if images.size is not None and images.size[0] == images.size[1]:
        returned["image_size"] = ("size", images.size[0])
    for name, (argument, value) in returned.items():
        wanted = settings.model.overrides.get(name, value)
        if wanted != value:
            raise ConfigError(
                f"model.overrides.{name} is {wanted}, but the processor of the rows returns {value}. Set it where the "
                f"images are read: data.source_args.{argument}={wanted}, and leave model.overrides.{name} out."
            )


def vocabulary_of(tokenizer: Tokenizer, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of a model's config, with vocabulary size and special ids of the tokenizer as defaults.

    Raises:
        ConfigError: the overridden vocabulary is smaller than the tokenizer's.
    """
    vocab = len(tokenizer)
    config: dict[str, Any] = {
        "vocab_size": vocab if vocab < 1024 else -(-vocab // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        **overrides,
    }
    if isinstance(config["vocab_size"], int) and config["vocab_size"] < vocab:
        raise ConfigError(
            f"model.overrides.vocab_size is {config['vocab_size']}, but the tokenizer has {vocab} tokens. Leave "
            "it out, or prepare the data with a smaller data.vocab_size."
        )
    return config


def about(settings: RunConfig, data: Prepared | RowSource) -> dict[str, Any]:
    """Return what a checkpoint records about its origin."""
    start = settings.model.checkpoint
    return data.about() | (
        training.starting_model.recorded_origin(start) if start else {"parent": None}
    )
