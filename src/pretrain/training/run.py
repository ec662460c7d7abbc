"""Training and evaluation from a configuration: builds the data, model, objective and trainer.

``train`` is called by the command line and from Python. Calling it again resumes the run: everything it builds is a
function of the configuration, and the trainer continues from the newest checkpoint in the output directory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pretrain.checkpoint import load
from pretrain.checkpoint.download import fetch_model, terms
from pretrain.checkpoint.manifest import ADAPTER_CONFIG, run_checkpoints
from pretrain.checkpoint.manifest import NAME as MANIFEST
from pretrain.checkpoint.resolve import RESULT, resolve_model_directory, run_with_settings
from pretrain.config import DataConfig, ModelConfig, RunConfig
from pretrain.config.run import Sections, began_without, is_lost
from pretrain.config.spelling import TRAIN, column, option, option_name, using
from pretrain.data.encodings import check_encoding
from pretrain.data.loader import Examples
from pretrain.data.prepare import Prepared, prepare
from pretrain.data.readers import file_format
from pretrain.data.row_source import SOURCES, RowSource, open_rows
from pretrain.data.shards import read_manifest
from pretrain.data.sources import options_read, resolve_sources
from pretrain.data.tokenizer import HUB_FILES, Tokenizer
from pretrain.distributed.world import current_world
from pretrain.errors import ConfigError, DataError, PretrainError, TokenizerError
from pretrain.models import build, family_class, own_family
from pretrain.models.base import Model
from pretrain.objectives import (
    OBJECTIVES,
    Objective,
    arguments,
    build_objective,
    objective_class,
    objective_for,
)
from pretrain.training.closing import closing_lines
from pretrain.training.early import (
    PLAIN_SIZE,
    check_checkpoint,
    check_early,
    check_overrides,
    check_trained_head,
    prepared_in,
)
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.launch import on_devices
from pretrain.training.parallelize import flat
from pretrain.training.plan import row_length
from pretrain.training.precision import (
    choose_device,
    choose_precision,
    evaluation_setting,
    recorded_precision,
)
from pretrain.training.restore import load_others
from pretrain.training.starting_model import hash_weights, open_source, origin, resolve_source
from pretrain.training.state import Changed, Run, isolated_torch_state
from pretrain.training.trainer import Hook, Trainer
from pretrain.utils.directories import keep_foreign
from pretrain.utils.files import muted, note
from pretrain.utils.hub_files import pinned
from pretrain.utils.hub_names import hub_name

__all__ = ["evaluate", "train"]

# The import path of a function that returns rows, package.module:function; a hub source begins with "hub:".
_FUNCTION = re.compile(r"(?!hub:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# The vocabulary is padded to a multiple of this, which is faster on matrix units; small ones are not padded.
_VOCAB_MULTIPLE = 64
# Automatic model sizes, below so many tokens of training text.
_SIZES = {"tiny": 5e6, "mini": 5e7, "small": 1e9, "medium": 5e9, "base": math.inf}
_PLACES = ("data.train", "data.valid", "data.test", "data.tokenizer")
_ROWS = 16  # rows in one forward pass of an evaluation


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
        if (run := on_devices("train", settings, devices, hooks=hooks)) is not None:
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
            else hash_weights(objective.model, opened=True),
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
    if settings.model.size == "auto":
        settings.model.size = before.model.size
    if settings.train.limit == "auto":
        settings.train.limit = before.train.limit
    if not settings.train.batch_rows:
        settings.train.batch_rows = before.train.batch_rows
    if settings.optim.lr == "auto":
        settings.optim.lr = before.optim.lr
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


def run_key(settings: Mapping[str, Any], data: str) -> str:
    """Return the hash of settings and data by which a run is named, eight hexadecimal digits."""
    text = json.dumps([settings, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def resumable(settings: Sections) -> set[str]:
    """Return the settings that may change when a run is resumed."""
    return {
        f"{section}.{spec.name}"
        for section, kind in settings.SECTIONS.items()
        for spec in dataclasses.fields(kind)
        if spec.metadata.get("resumable")
    }


def rows_of(settings: RunConfig, *, quiet: bool) -> Prepared | RowSource:
    """Return the rows that the settings name: of a function, of a prepared directory, or of text."""
    data = settings.data
    if data.source is not None:
        return open_rows(data.source, data.source_args)
    return open_data(settings, quiet=quiet)


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
    return resolve_source(checkpoint, None if before is None else before.model.checkpoint)


def resolve_tokenizer(settings: RunConfig) -> str:
    """Return ``data.tokenizer``; one of the Hub is fetched, and named with its commit as by ``resolve_checkpoint``."""
    tokenizer, before = settings.data.tokenizer, settings_before(settings)
    if hub_name(tokenizer) is None:
        return tokenizer
    earlier = None if before is None else before.data.tokenizer
    return current_world().broadcast_result(lambda: pinned(tokenizer, earlier, HUB_FILES))


def settings_before(settings: Any) -> Any:
    """Return the settings with which the run in ``train.out`` began; None if none has begun there."""
    out = Path(settings.train.out)
    if settings.train.out and has_begun(out):
        with contextlib.suppress(ConfigError):  # a run of another kind, which is refused later
            return type(settings).load(out / "run.yaml")
    return None


def _local_directory(checkpoint: str | Path) -> Path:
    """Return the path of a checkpoint; of a model of the Hub that of its directory in the cache."""
    return Path(checkpoint) if hub_name(checkpoint) is None else fetch_model(checkpoint)[0]


def has_begun(out: Path) -> bool:
    """Whether there is a checkpoint, complete or not: its contents are verified when it is opened."""
    return os.path.isdir(out) and bool(run_checkpoints(out))


def open_data(settings: RunConfig, *, quiet: bool = False) -> Prepared:
    """Open the prepared directory that ``data.train`` names, or prepare (or find in the cache) the text it names."""
    data = settings.data
    if (prepared := prepared_in(data.train)) is not None:
        say_differences(settings, prepared)
        return prepared
    tokenizer = data.tokenizer
    if settings.model.checkpoint is not None and tokenizer == "bpe":
        tokenizer = str(resolve_model_directory(_local_directory(settings.model.checkpoint)))
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
    head = objective_class(settings.objective.class_path).head_kind
    tokenizer = data.tokenizer if isinstance(data, Prepared) else None
    if settings.model.checkpoint is not None:
        if (
            ":" in settings.model.family
        ):  # an objective of the user; one of ours is recorded in the checkpoint
            own_family(settings.model.family)
        model = open_source(settings.model.checkpoint)
        _say_unused(settings.model, model)
        check_trained_head(settings, model)
        if tokenizer is None:
            check_labels(model, data)
            if (words := getattr(data.processor, "tokenizer", None)) is not None:
                check_tokenizer(
                    words, model, settings.model.checkpoint,
                    "Name it: data.source_args.tokenizer=",
                )  # fmt: skip
            model.processor = data.processor if model.processor is None else model.processor
            return model
        check_tokenizer(
            tokenizer, model, settings.model.checkpoint, "Prepare them with data.tokenizer="
        )
        if len(tokenizer) > model.backbone.vocab_size:
            raise TokenizerError(
                f"The data's tokenizer has {len(tokenizer)} tokens, but {settings.model.checkpoint} has a vocabulary "
                f"of {model.backbone.vocab_size} ids. Prepare the data with the checkpoint's own tokenizer."
            )
        model.tokenizer = tokenizer
        return model
    check_overrides(settings.model.overrides)
    family = family_class(settings.model.family)
    if isinstance(data, Prepared):
        overrides = vocabulary_of(data.tokenizer, settings.model.overrides)
    else:
        check_images(settings, data)
        # What the rows determine of a model: its labels, and the fields that the config of the family has.
        fields = {"labels", *(spec.name for spec in dataclasses.fields(family.config_class))}
        fixed = {name: value for name, value in data.overrides.items() if name in fields}
        overrides = {**fixed, **settings.model.overrides}
        if family.padded and "max_positions" not in settings.model.overrides:
            overrides.pop("max_positions", None)  # other libraries pad to that of the family
        if (words := getattr(data.processor, "tokenizer", None)) is not None:
            overrides = vocabulary_of(words, overrides)
    model = build(
        settings.model.family,
        resolve_size(settings.model, data),
        head=head,
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
        raise TokenizerError(
            f"The data were prepared with another tokenizer ({len(tokenizer)} tokens) than that of {checkpoint} "
            f"({len(expected)} tokens): every id would mean something else. {remedy}{_local_directory(checkpoint)}"
        )


def check_images(settings: RunConfig, data: RowSource) -> None:
    """Check that the model is built for the images that the processor of the rows returns.

    Raises:
        ConfigError: ``model.overrides`` names another size, or another number of channels.
    """
    from pretrain.data.images.processor import ImageProcessor

    images = getattr(data.processor, "images", data.processor)
    if not isinstance(images, ImageProcessor):
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
    return data.about() | {"parent": origin(start), **terms(start or "")}


def evaluate(
    checkpoint: str | os.PathLike[str],
    data: Any = None,
    *,
    objective: str | None = None,
    batch_rows: int | None = None,
    limit: int = 0,
    precision: str = "auto",
    device: str = "auto",
    model: Model | None = None,
    reading: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, float]:
    """Evaluate a checkpoint on held-out text with its own objective.

    Args:
        checkpoint: a run, a checkpoint or any Hugging Face directory of a known family.
        data: a prepared directory, a ``RowSource`` or the import path of a function that returns one (the held-out
            rows are used), or sources of text (all of it is used); None uses the held-out rows of the run that
            contains the checkpoint.
        objective: name of the objective; None chooses it by the head of the checkpoint.
        batch_rows: rows per forward pass; None is 16, or that of training if the loss compares the rows of a batch.
        limit: maximum number of rows; 0 uses all.
        precision: compute type; auto is ``train.eval_precision`` of the run, or fp32 if the checkpoint is in no run.
        device: device to run on.
        model: model of the checkpoint, if it is already open.
        reading: how text is read: ``text`` (its column in a table), ``separator`` and ``encoding``; where the latter
            two are not given, the separator is that of the run that contains the checkpoint, and its encoding is that
            of the files that are not UTF-8.

    Returns:
        ``loss`` (nats per target), ``perplexity``, ``accuracy``, ``targets`` and, for next-token models,
        ``bits_per_byte``.

    Raises:
        PretrainError: there are no data, or they do not fit the model.
    """
    path = Path(checkpoint)
    model = load(path, quiet=True) if model is None else model
    recorded = model.extra_config.get("pretrain", {}).get("objective")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    name = objective or objective_for(model.head_kind)
    if (
        name is None and recorded.get("name") in OBJECTIVES
    ):  # such an objective trains models without a head
        name = recorded["name"]
    if name is None:
        raise ConfigError(
            f"{path} has the head {model.head_kind!r}, which no language objective evaluates. If the objective is your "
            f"own, name its class: {option('objective')}, as package.module:Class."
        )
    if objective is None and recorded.get("name") not in (None, objective_class(name).__name__):
        note(
            f"{path} was trained with {recorded['name']}, and is measured with {objective_class(name).__name__}; "
            f"name another with {option('objective')}"
        )
    run_dir = run_with_settings(path)
    before = _settings_of(run_dir)
    rows = _held_out(path, run_dir, data, model, reading)
    if len(rows) == 0:
        raise DataError(
            "The data hold no held-out rows. Prepare them with a larger share for validation."
        )
    built = _objective_of(path, before, name, recorded, model)
    load_others(built, _local_directory(path))
    longest, room = row_length(rows, built), model.backbone.max_length
    if room and longest > room and built.unit_name == "tokens":
        raise DataError(
            f"The rows have {longest} tokens and the model {model.backbone.max_length} positions. Prepare "
            f"the data with row_length={model.backbone.max_length} or less."
        )
    where = choose_device(device)
    chosen = recorded_precision(evaluation_setting(before.train), where)
    if precision != "auto":
        chosen = choose_precision(precision, where)
    built.to(where)
    if batch_rows is None:
        batch_rows = _ROWS
        if built.couples_examples and run_dir is not None:
            batch_rows = RunConfig.of_run(run_dir).train.batch_rows or _ROWS
    return evaluate_rows(built, rows, chosen, batch_rows=batch_rows, limit=limit)


def _objective_of(
    path: Path, before: RunConfig, name: str, recorded: Mapping[str, Any], model: Model
) -> Objective:
    """Return an objective with the arguments of the run that wrote a checkpoint, if that had the same class.

    Args:
        path: the checkpoint.
        before: settings of the run that wrote it.
        name: of the objective, or its import path.
        recorded: what config.json says of the objective of the run; earlier versions kept there what ``describe`` of
            the class returns, and the other arguments in the settings of the run alone.
        model: of the checkpoint.

    Raises:
        ConfigError: an argument is needed that is recorded nowhere, or one does not fit the class.
    """
    options: dict[str, Any] = {}
    cls = objective_class(name)
    accepted, anything = arguments(cls)
    if recorded.get("name") == cls.__name__:
        if isinstance(init_args := recorded.get("init_args"), Mapping):
            options = dict(init_args)
        else:  # a description may hold facts that are no arguments
            chosen = before.objective
            names = (recorded if anything else accepted).keys() - {"name", "task"}
            options = {key: value for key, value in recorded.items() if key in names}
            if re.split("[.:]", chosen.class_path)[-1] == cls.__name__:
                options |= chosen.init_args
    lacking = [k for k, p in accepted.items() if p.default is p.empty and k not in options]
    if lacking:
        raise ConfigError(
            f"{cls.__name__} needs {', '.join(lacking)}, and neither config.json in {path} nor the run.yaml of its run "
            "has a value. Give the arguments defaults, or let its method describe() return them with its name before "
            "training."
        )
    return build_objective(name, options, model)


def _settings_of(run_dir: Path | None) -> RunConfig:
    """Return the settings of a run; the defaults if there is none, or it is one of fine-tuning, with other sections."""
    if run_dir is not None:
        with contextlib.suppress(ConfigError):
            return RunConfig.of_run(run_dir)
    return RunConfig()


def _held_out(
    path: Path, run_dir: Path | None, data: Any, model: Model, reading: Mapping[str, str]
) -> Examples:
    """Return the held-out rows for ``evaluate``, checked against the checkpoint's tokenizer; text is read so."""
    if data is None:
        if run_dir is None:
            raise DataError(no_run(path))
        settings = RunConfig.of_run(run_dir)
        if settings.data.source in SOURCES:
            with naming_paths(run_dir, settings):
                source = open_rows(settings.data.source, settings.data.source_args)
            return _held_out_rows(run_dir, source, model)
        if settings.data.source is not None:
            raise DataError(
                f"The rows of {run_dir} come from the function {settings.data.source}. pretrain calls no function that "
                f"only a file names: name it yourself, {option('data', settings.data.source)}."
            )
        with naming_paths(run_dir, settings):
            prepared = open_data(settings)
        if _changed(model, prepared.fingerprint):
            raise DataError(
                f"The text of {run_dir} has changed since the run, so its held-out rows are not the same, and may "
                f"be rows that it was trained on. Restore it, or name the text to measure on: {option('data')}."
            )
        rows: Examples = prepared.valid
    elif isinstance(data, RowSource):
        return _held_out_rows(None, data, model)
    elif names_function(data):
        named = DataConfig() if run_dir is None else RunConfig.of_run(run_dir).data
        same = named.source == data
        source = open_rows(data, named.source_args if same else {})
        return _held_out_rows(run_dir if same else None, source, model)
    elif (opened := prepared_in(data)) is not None:
        for key, value in reading.items():
            role = "names a column of a table" if key == "text" else "says how text is read"
            spelt = column(key, value) if key == "text" else option(key, value)
            raise ConfigError(f"{spelt} {role}, and {data} holds prepared text. Leave it out.")
        prepared, rows = opened, opened.valid
    else:
        prepared = _read_as_training(path, run_dir, data, model, reading)
        rows = prepared.train
    remedy = "Prepare them with that one: pretrain prepare ... --tokenizer "
    check_tokenizer(prepared.tokenizer, model, path, remedy)
    return rows


def _read_as_training(
    path: Path, run_dir: Path | None, data: Any, model: Model, reading: Mapping[str, str]
) -> Prepared:
    """Return all of a text as training rows, read as ``reading`` says and else as the text of the run was."""
    if model.tokenizer is None:
        raise TokenizerError(f"{path} has no tokenizer, so text cannot be turned into its ids.")
    before = _reading_of(run_dir, model)
    text, encoding = reading.get("text", "text"), reading.get("encoding")
    separator = reading.get("separator", before.get("separator"))
    legacy = check_encoding(before.get("encoding")) if encoding is None else None
    sources, weights = resolve_sources(
        data, text=text, separator=separator, encoding=encoding, legacy=legacy
    )
    not_given, adopted = options_read(sources) - {"text", *reading}, []
    if "separator" in not_given and separator is not None:
        adopted.append(option("separator", separator))
    elif "separator" not in reading:
        separator = None
    if "encoding" in not_given and legacy is not None:
        files = sum(len(getattr(source, "legacy_files", ())) for source in sources)
        which = "for those files alone that are not UTF-8 and do not say their encoding"
        adopted.append(f"{option('encoding', legacy)} {which}: {files or 'none'}")
    if adopted:
        note(f"the text is read as that of training was, with {', '.join(adopted)}")
    if not_given and "lost" in before:
        note(
            f"{before['lost']} If prepared text was there, it alone says how it was read; give the "
            f"{' and '.join(map(option_name, sorted(not_given)))} of this text if it is not "
            f"{'read so' if adopted else 'in UTF-8, one document in a file'}"
        )
    prepared: Prepared = prepare(
        sources if weights is None else dict(zip(sources, weights, strict=True)),
        source="text",
        tokenizer=model.tokenizer,
        row_length=min(before["row_length"], model.backbone.max_length or 1 << 20),
        valid=0.0,
        quiet=True,
        keep_duplicates=True,
        text=text,
        separator=separator,
        encoding=encoding,
    )
    # All text is evaluated, so notes on training data (no validation rows) would be misleading.
    for line in prepared.manifest.get("notes", ()):
        if not line.startswith("no validation rows"):
            note(line)
    return prepared


@contextlib.contextmanager
def naming_paths(run_dir: Path, settings: Sections) -> Iterator[None]:
    """Say of an error inside the block that a path of a run does not lead from here, where that is the cause.

    Args:
        run_dir: directory of the run.
        settings: its settings, as ``of_run`` read them.

    Raises:
        DataError: in place of an error that names a relative path of the settings which does not exist.
    """
    try:
        yield
    except PretrainError as error:
        lost = [path for path in settings.paths() if is_lost(path) and path in str(error)]
        if not lost:
            raise
        raise DataError(
            f"{lost[0]!r}, which {run_dir / 'run.yaml'} names, is not there. It is relative to the directory in which "
            f"the run was started, and the command runs in {Path.cwd()}: run it there, or put the file back."
        ) from error


def names_function(data: Any) -> bool:
    """Whether data are the import path of a function that returns rows."""
    return isinstance(data, str) and _FUNCTION.fullmatch(data) is not None


def _held_out_rows(run_dir: Path | None, data: RowSource, model: Model) -> Examples:
    """Return the held-out rows of a source; if they are those of a run, say whether they have changed since."""
    check_labels(model, data)
    if run_dir is not None and _changed(model, data.fingerprint):
        note(
            f"the rows of {run_dir} have changed since the model was trained; a held-out share is drawn anew, so rows "
            "that it was trained on may be among the held-out ones"
        )
    return data.valid


def _changed(model: Model, fingerprint: str | None) -> bool:
    """Whether rows are others than those that a model was trained with, as far as that is recorded."""
    block = model.extra_config.get("pretrain")
    recorded = block.get("fingerprint") if isinstance(block, Mapping) else None
    return recorded not in (None, fingerprint)


def no_run(path: Path) -> str:
    """Return the error message for a checkpoint that is in no run, or one without settings, when no data are named."""
    run_dir = next((p for p in (path, path.parent) if (p / "log.jsonl").is_file()), None)
    why = "is not in a run directory of pretrain"
    if run_dir is not None:
        why = f"is of a run whose settings are gone (run.yaml is missing in {run_dir})"
    return (
        f"{path} {why}, so its held-out rows are not known. Name the data: "
        f"pretrain evaluate {path} --data FILE, in Python pretrain.evaluate({str(path)!r}, data)."
    )


def _reading_of(run_dir: Path | None, model: Model) -> dict[str, Any]:
    """Return how the text was read that a model was trained on.

    Returns:
        ``row_length`` (tokens), by its config.json or the settings of its run, and by the latter ``separator`` and
        ``encoding`` where they were set; ``lost`` is an error, if the prepared text that may say so cannot be read.
    """
    data, block = _settings_of(run_dir).data, model.extra_config.get("pretrain")
    options, lost = vars(data), {}
    if run_dir is not None and isinstance(data.train, str):
        try:
            if manifest := read_manifest(Path(data.train)):
                options = manifest["options"]
            elif file_format(Path(data.train)) is None:
                resolve_sources(data.train)  # a prepared directory may have stood there
        except DataError as error:
            lost = {"lost": str(error)}
    length = block.get("row_length") if isinstance(block, Mapping) else None
    if type(length) is not int or length < 2:
        length = options["row_length"]
    set_there = {key: options.get(key) for key in ("separator", "encoding")}
    return (
        {"row_length": length} | {k: v for k, v in set_there.items() if isinstance(v, str)} | lost
    )
