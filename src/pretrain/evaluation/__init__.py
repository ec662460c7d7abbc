"""Evaluation of any checkpoint: a language model on held-out text, a fine-tuned model on labelled rows.

Also tasks that need no training: similarity of texts, retrieval, minimal pairs.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint import load
from pretrain.checkpoint.download import fetch_config
from pretrain.checkpoint.resolve import run_with_settings
from pretrain.config.check import check_count
from pretrain.config.run import naming_paths
from pretrain.config.spelling import EVALUATE, option, option_name, smaller_batch, using
from pretrain.config.spelling import column as column_option
from pretrain.data.row_source import RowSource
from pretrain.distributed.slurm import is_task
from pretrain.errors import CheckpointError, ConfigError, DataError, ModelError, naming_memory
from pretrain.evaluation import language
from pretrain.evaluation.embeddings import retrieval, sts
from pretrain.evaluation.pairs import minimal_pairs
from pretrain.finetuning.measure import encoded, labelled, measure, reported_precision
from pretrain.finetuning.rows import open_data
from pretrain.finetuning.settings import TuneConfig, TuneTrain, from_memory
from pretrain.finetuning.start import begun_as, classes_of, starting_model
from pretrain.inference.predict import rebuilt, recorded_task, task_of
from pretrain.models.heads import LABELLED
from pretrain.objectives import task_class
from pretrain.objectives.tasks import Task
from pretrain.utils.files import muted, note

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["UNTRAINED", "evaluate"]

# Tasks that need no training -> their functions of model, rows, columns, batch size and limit.
UNTRAINED = {"sts": sts, "retrieval": retrieval, "minimal-pairs": minimal_pairs}

_ROWS = 64  # rows in one forward pass of a task that needs no training
_HEADS_OF_TASKS = (*LABELLED, "question-answering")


@using(EVALUATE)
def evaluate(
    checkpoint: str | os.PathLike[str],
    data: Any = None,
    *,
    columns: Mapping[str, str] | None = None,
    base: Model | str | Path | None = None,
    task: str | type[Task] | None = None,
    objective: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    batch_rows: int | None = None,
    limit: int = 0,
    precision: str = "auto",
    device: str = "auto",
) -> dict[str, float]:
    """Evaluate a checkpoint: a fine-tuned model by the metrics of its task, a language model by its loss on text.

    Args:
        checkpoint: a run, whose best model is used, a checkpoint, an adapter, any Hugging
            Face directory of a known family, or a model of the Hub (``"org/name"``).
        data: for a fine-tuned model labelled rows: a file, a list of dicts, a pandas frame, a ``datasets.Dataset``, or
            splits of them (the test rows are used, or else those of validation). For a language model a prepared
            directory, whose held-out rows are used, or sources, all text of which is used, documents that occur again
            too, in rows of the length that it was trained on. None uses the held-out rows of the run.
        columns: role -> column of labelled rows; by default those of the training rows, if present.
        base: the model before training, if an adapter or the task ``preference`` needs it and it is not found.
        task: class of the fine-tuned model's task, or its import path, if it is your own; or what to measure of any
            model, with rows in ``data``: ``sts`` (similarity of pairs), ``retrieval`` (search), ``minimal-pairs``
            (such as BLiMP). See the functions of these names in ``pretrain.evaluation``.
        objective: name of the objective of a language model, or the import path of your own; None chooses it by the
            head. It gets the arguments that it had in the run.
        separator: text between the documents of text files, for a language model; None is that of the run.
        encoding: encoding of the data, such as cp1252; None is that of the run, which text for a language model is read
            in only where a file is not UTF-8.
        batch_rows: rows in one forward pass.
        limit: maximum number of rows, spread evenly over the data; 0 uses all.
        precision: compute type: bf16, fp16, fp32, or auto for that of the run's evaluations, which is fp32 unless
            ``train.eval_precision`` is set otherwise.
        device: auto, cpu, cuda or mps.

    Returns:
        The metrics, including ``loss`` and ``targets`` (the number of evaluated answers or tokens); for the same rows
        they are those of the run's summary. Those of ``sts``, ``retrieval`` and ``minimal-pairs`` are documented there.

    Raises:
        PretrainError: no rows, rows that do not fit the model or have changed since, or a loss that is no number.
    """
    options = _counts(batch_rows, limit)
    path = _directory(checkpoint)
    untrained = UNTRAINED.get(task) if isinstance(task, str) else None
    given = {"separator": separator, "encoding": encoding}
    reading = {key: value for key, value in given.items() if value is not None}
    _check_rows(data, columns or {}, reading, None if untrained is None else task, objective)
    named_task = None if untrained or task is None else task_class(task, others=UNTRAINED)
    is_adapter = base is not None and fetch_config(path).is_adapter
    model = load(path, quiet=True, base=base if is_adapter else None)
    if untrained is not None:
        chosen, rows = reported_precision(None, precision, device), batch_rows or _ROWS
        with naming_memory("the evaluation", lambda: smaller_batch(rows)), chosen.autocast():
            return untrained(model.to(chosen.device), data, columns or {}, rows, limit)
    fine_tuned = recorded_task(model) is not None or model.head_kind in _HEADS_OF_TASKS
    fine_tuned |= (
        model.backbone.default_task is not None and data is not None and not _are_rows(data)
    )
    pretrained = data is None and (run := run_with_settings(path)) and _settings_of(run) is None
    if objective is not None or not fine_tuned or pretrained:
        options |= {"precision": precision, "device": device}
        text = _text_column(path, columns or {}, named_task)
        options["reading"] = reading | ({} if text is None else {"text": text})
        with naming_memory("the evaluation", lambda: smaller_batch(batch_rows or 16)):
            found = language.evaluate(path, data, objective=objective, model=model, **options)
        return _of_numbers(found, path)
    trained = task_of(model)
    if named_task is not None and not isinstance(trained, named_task):
        raise ConfigError(
            f"{path} was fine-tuned for the task {trained.name}, by whose figures it is measured, and not for "
            f"{named_task.name}. Leave {option('task')} out."
        )
    how = (base, precision, device, reading, options)
    return _of_numbers(_evaluate_task(path, trained, data, columns or {}, *how), path)


def _of_numbers(figures: dict[str, float], path: Path) -> dict[str, float]:
    """Return figures as they are; raise ModelError if the loss is no number, because then the others mean nothing."""
    if not math.isfinite(figures.get("loss", 0.0)):
        raise ModelError(
            f"{path}: the loss is not a number (NaN or infinite), so the other figures mean nothing. The weights of "
            "the model are damaged, or its values overflow: check the run that made it, or take an earlier checkpoint."
        )
    return figures


def _counts(batch_rows: int | None, limit: int | None) -> dict[str, Any]:
    """Return ``limit``, and ``batch_rows`` if it is given, as options; raise ConfigError if one is no such number."""
    for name, value, least in (("batch_rows", batch_rows, 1), ("limit", limit, 0)):
        if value is not None:
            check_count(option_name(name), value, least)
    return {"limit": limit} | ({} if batch_rows is None else {"batch_rows": batch_rows})


def _check_rows(
    data: Any,
    columns: Mapping[str, str],
    reading: Mapping[str, str],
    untrained: Any,
    objective: str | None,
) -> None:
    """Check that what says how rows are read comes with such rows; ``untrained`` is a task that needs no training.

    Raises:
        ConfigError: it does not, or a task that needs no training has no rows, or an objective.
    """
    if untrained is not None and (data is None or objective is not None):
        raise ConfigError(
            f"The task {untrained} is measured on rows of its own. Give {option('data')}, and no objective."
        )
    unread = data is None or _are_rows(data)
    if columns and unread:
        raise ConfigError(
            f"{column_option(*next(iter(columns.items())))} names a column of further rows, and no file or "
            f"list of them is given. Leave it out, or give them: {option('data')}."
        )
    if reading and (unread or untrained is not None):
        why = "none are given" if unread else f"the task {untrained} has rows of its own"
        raise ConfigError(
            f"{option(*next(iter(reading.items())))} says how text or labelled rows are read, and {why}. Leave it out."
        )


def _directory(checkpoint: Any) -> Path:
    """Return the path to a checkpoint.

    Raises:
        ConfigError: it is no path, but a model or the result of a run.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise ConfigError(
            f"evaluate opens a directory, and was given a {type(checkpoint).__name__}. Give the path of its run, or "
            "save it first: model.save(DIRECTORY)."
        )
    return Path(os.path.expanduser(checkpoint))


def _text_column(path: Path, columns: Mapping[str, str], task: type[Task] | None) -> str | None:
    """Return the column of the text for a language model; None if it is not named.

    Raises:
        ConfigError: a task, or another column, is named.
    """
    if task is not None:
        raise ConfigError(
            f"{path} is a language model, and was not fine-tuned for {task.name}. Leave {option('task')} out."
        )
    if set(columns) - {"text"}:
        raise ConfigError(
            f"{path} is a language model, which is evaluated on one column of text and not on labelled rows. Leave "
            f"{option('columns')} out, or name that of the text: {column_option('text', 'body')}."
        )
    return columns.get("text")


def _are_rows(data: Any) -> bool:
    """Whether the data are rows of pre-training: a ``RowSource``, or the import path of a function that returns one."""
    return isinstance(data, RowSource) or language.names_function(data)


def _evaluate_task(
    path: Path,
    trained: Task,
    data: Any,
    columns: Mapping[str, str],
    base: Any,
    precision: str,
    device: str,
    reading: Mapping[str, str],
    options: Mapping[str, Any],
) -> dict[str, float]:
    """Evaluate a fine-tuned model on labelled rows."""
    if "separator" in reading:
        raise ConfigError(
            f"{option('separator', reading['separator'])} is for the text of a language model, and {path} is measured "
            "on labelled rows. Leave it out."
        )
    run_dir = run_with_settings(path)
    settings = _settings_of(run_dir)
    trained.labels_given = settings is not None and bool(settings.task.options.get("labels"))
    if data is None:
        table = _held_out(path, run_dir, settings, trained)
    else:
        section = None if settings is None else settings.data
        table = labelled(data, trained, columns, section, reading.get("encoding"))
    train = TuneTrain() if settings is None else settings.train
    known = trained.model.provenance
    of_run = None if settings is None else train
    chosen = reported_precision(of_run, precision, device, known.get("eval_precision"))
    rows = encoded(trained, table, lambda: _before_training(path, trained, settings, base))
    recorded = known.get("batch_rows")
    if settings is not None or type(recorded) is not int or recorded < 1:
        recorded = train.batch_rows  # of the run, else the default
    return measure(trained, rows, chosen, coupled_rows=recorded, **options)


def _settings_of(run_dir: Path | None) -> TuneConfig | None:
    """The settings of a fine-tuning run; None if ``run_dir`` is not one."""
    if run_dir is None or not is_task(run_dir / "run.yaml"):
        return None
    return TuneConfig.of_run(run_dir)


def _held_out(path: Path, run_dir: Path | None, settings: TuneConfig | None, task: Task) -> Table:
    """The held-out rows of a run, read and split as the run did.

    Raises:
        DataError: there are none, they were in memory, or the source has changed since.
    """
    if run_dir is None or settings is None:
        raise DataError(language.no_run(path))
    give = f"Give labelled rows: {option('data')}"
    sources = (settings.data.train, settings.data.valid, settings.data.test)
    if any(map(from_memory, sources)):
        raise DataError(
            f"The rows of {path} were objects in memory and cannot be read again. {give}."
        )
    with muted():  # the run has already printed its notes
        source, labels = settings.model.checkpoint, None
        if not from_memory(source):
            with contextlib.suppress(CheckpointError):  # what it was trained from may be gone
                labels = classes_of(source, type(task))
        with naming_paths(run_dir, settings):
            begun = begun_as(run_dir, type(task))
            data = open_data(settings, {}, type(task), labels, begun)
    if task.model.provenance.get("fingerprint") != data.fingerprint:
        raise DataError(
            f"The rows of {', '.join(dict.fromkeys(data.names.values()))} are not those that {path} was trained and "
            f"measured on: a file has changed since. Restore it, or give labelled rows: {option('data')}."
        )
    if not len(data.valid):
        raise DataError(f"The run {path} has no held-out rows. {give}.")
    note(f"{len(data.valid):,} held-out rows of the run: {data.names['valid']}")
    return data.valid


def _before_training(path: Path, task: Task, settings: TuneConfig | None, base: Any) -> Task:
    """The task around the model before training.

    Raises:
        ModelError: that model is not known.
    """
    source = base
    if source is None and settings is not None and not from_memory(settings.model.checkpoint):
        source = settings.model.checkpoint
    if source is None and task.model.adapter is not None:
        source = task.model.adapter.base
    if source is None:
        raise ModelError(
            f"The metrics of the task {task.name} compare {path} with the model before training, but that model is "
            f"not recorded. Give it: {option('base')}."
        )
    return rebuilt(task, starting_model(source, type(task), None, quiet=True))
