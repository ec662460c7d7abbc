"""Evaluation of a language model, or another pre-trained one, by its own objective on held-out rows."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pretrain.checkpoint import load
from pretrain.checkpoint.resolve import run_with_settings
from pretrain.config import DataConfig, RunConfig
from pretrain.config.run import naming_paths
from pretrain.config.spelling import column, option, option_name
from pretrain.data.encodings import check_encoding
from pretrain.data.loader import Examples
from pretrain.data.prepare import Prepared, prepare
from pretrain.data.readers import file_format
from pretrain.data.row_source import SOURCES, RowSource, open_rows
from pretrain.data.shards import read_manifest
from pretrain.data.sources import options_read, resolve_sources
from pretrain.errors import ConfigError, DataError, TokenizerError
from pretrain.models.base import Model
from pretrain.objectives import (
    OBJECTIVES,
    Objective,
    arguments,
    build_objective,
    objective_class,
    objective_for,
)
from pretrain.training.early import prepared_in
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.plan import row_length
from pretrain.training.precision import (
    choose_device,
    choose_precision,
    evaluation_setting,
    recorded_precision,
)
from pretrain.training.restore import load_others
from pretrain.training.run import check_labels, check_tokenizer, open_data
from pretrain.training.starting_model import local_directory
from pretrain.utils.files import note

__all__ = ["evaluate", "names_function", "no_run"]

# The import path of a function that returns rows, package.module:function; a hub source begins with "hub:".
_FUNCTION = re.compile(r"(?!hub:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ROWS = 16  # rows in one forward pass of an evaluation


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
    load_others(built, local_directory(path))
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
        raise TokenizerError(
            f"{path} has no tokenizer, so text cannot be turned into its ids. To evaluate it on rows of another kind, "
            f"name a function that returns them: {option('data', 'package.module:FUNCTION')}; without one, the "
            "held-out rows of its run are used."
        )
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
