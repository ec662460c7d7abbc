"""Evaluation of fine-tuned models: on labelled rows by one process, and on the ranks that shard a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.spelling import smaller_batch
from pretrain.data.encodings import check_encoding
from pretrain.data.labelled import choose_columns, roles_table
from pretrain.data.readers import needs_encoding
from pretrain.data.tables import held_out_splits, parts_of_file
from pretrain.errors import DataError, naming_memory
from pretrain.finetuning.rows import check_labelled, encode
from pretrain.inference.columns import columns_of, has_columns, roles_known, say_unread
from pretrain.nn.device import tokens_at_once
from pretrain.objectives.tasks import Task
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import (
    Precision,
    choose_device,
    choose_precision,
    evaluation_setting,
    recorded_precision,
)
from pretrain.training.restore import load_weights
from pretrain.utils.files import note

if TYPE_CHECKING:
    import torch

    from pretrain.data.tables import Table
    from pretrain.data.task_rows import TaskRows
    from pretrain.finetuning.settings import TuneConfig, TuneData, TuneTrain
    from pretrain.objectives.base import Objective
    from pretrain.training.state import Run
    from pretrain.training.trainer import Trainer

__all__ = [
    "encoded",
    "labelled",
    "measure",
    "measure_as_in_run",
    "measure_in_parts",
    "reported_precision",
]

_ROWS = 64  # maximum rows in one forward pass


def evaluation_rows(
    objective: Objective, rows: TaskRows, coupled_rows: int, device: torch.device
) -> int:
    """Number of examples in one forward pass of an evaluation.

    Metrics of a loss that couples the rows of a batch depend on the batch size, so that of training, ``coupled_rows``,
    is used; otherwise rows are only limited by memory, so that an evaluation needs no more than training does.
    """
    if objective.couples_examples:
        return coupled_rows
    return max(1, min(_ROWS, tokens_at_once(device) // max(1, rows.longest)))


def _to_measure(source: Any) -> list[tuple[Any, str, str]]:
    """Return what may be measured, the best first: of several splits, that of test and that of validation.

    Each is a source, a name for its rows, and the name of the split, which is empty if there are no splits.
    """
    held = held_out_splits(source)
    found = list(held) if held else parts_of_file(source)
    splits = (("test", "test"), ("valid", "validation"))
    parts = [
        (held[use][1], "data", name) if held else (source, name, name)
        for use, name in splits
        if use in found and (held or len(found) > 1)
    ]
    return parts or [(source, "data", "")]


def labelled(
    source: Any,
    task: Task,
    columns: Mapping[str, Any],
    section: TuneData | None = None,
    encoding: str | None = None,
) -> Table:
    """Read further labelled rows for a task, with columns named by role.

    Args:
        source: source of rows, as for ``read_table``.
        task: task around the model, which records the columns of its training rows.
        columns: role -> column, named by the caller; other columns are those of the training rows, if present, or
            recognised by name.
        section: settings of the run, which may define how its files are read.
        encoding: encoding of the source; None is that of the settings, unless the file is UTF-8.

    Of several splits, that of test is read, or that of validation if there is no other or its answers are held back.

    Raises:
        DataError: as for ``read_table``, or a column that the task needs is missing.
    """
    options = {} if section is None else section.reading(source)
    if encoding is not None:
        options["encoding"] = encoding
    elif (of_run := check_encoding(options.get("encoding"))) and os.path.isfile(source):
        # Nearly any bytes are text in an encoding of Windows, so UTF-8 would be misread without an error.
        options["encoding"] = of_run if needs_encoding(Path(source), of_run) else None
    (rows, name, split), *others = _to_measure(source)
    read = task.read(rows, name=name, **options)
    try:
        table = _by_role(read, task, columns, section)
        if others:
            check_labelled(table, None, type(task))
    except DataError as error:
        if not others:
            raise
        note(f"the test split is not used: {error}")
        ((rows, name, split),) = others
        table = _by_role(task.read(rows, name=name, **options), task, columns, section)
    if split:
        origin = source if isinstance(source, str | os.PathLike) else "the data"
        note(f"{origin}: the figures are those of the {split} split")
    return table


def _by_role(
    table: Table, task: Task, columns: Mapping[str, Any], section: TuneData | None
) -> Table:
    """Return the rows of a table with columns named by role, for an evaluation; see `labelled`."""
    named = dict(columns)
    table = task.gathered(table, {**(section.columns if section is not None else {}), **named})
    if section is not None:
        known = {role: c for role, c in section.columns.items() if has_columns(table, c)}
        named = {**known, **named}
    inputs = roles_known(task, named)
    say_unread(task, table, inputs)
    wanted = {role.name: role for role in inputs}
    roles = [
        wanted.get(role.name, role) for role in task.roles if role.target or role.name in wanted
    ]
    chosen = choose_columns(table, roles, columns_of(task.model, table, named))
    trained = task.model.provenance.get("columns") or chosen
    for role in roles:
        if role.doubtful and role.name in set(chosen) - set(trained) - set(named):
            note(
                f"{table.name}: {chosen[role.name]!r} is read as {role.name}, which the model was trained without; the "
                "metrics depend on it"
            )
    return roles_table(table, chosen)


def measure(
    task: Task,
    rows: TaskRows,
    precision: Precision,
    *,
    coupled_rows: int,
    batch_rows: int | None = None,
    limit: int = 0,
) -> dict[str, float]:
    """Evaluate a task on encoded rows, on one process; ``batch_rows`` defaults to ``evaluation_rows``."""
    task.to(precision.device)
    batch_rows = batch_rows or evaluation_rows(task, rows, coupled_rows, precision.device)
    with naming_memory("the evaluation", lambda: smaller_batch(batch_rows)):
        return evaluate_rows(task, rows, precision, batch_rows=batch_rows, limit=limit)


def reported_precision(
    train: TuneTrain | None, name: str = "auto", device: str = "auto", recorded: object = None
) -> Precision:
    """Precision of reported metrics: the named one, else that of the run, else the recorded one, or fp32.

    ``recorded`` comes from a file and may be anything; half precision of a GPU is left where there is none.
    """
    chosen = choose_device(device)
    if name != "auto":
        return choose_precision(name, chosen)
    return recorded_precision(recorded if train is None else evaluation_setting(train), chosen)


def measure_as_in_run(task: Task, rows: TaskRows, settings: TuneConfig) -> dict[str, float]:
    """Evaluate a task on encoded rows, on one process, in the precision and the batches of its run."""
    train = settings.train
    precision = reported_precision(train, device=settings.parallel.device)
    return measure(task, rows, precision, coupled_rows=train.batch_rows)


def encoded(task: Task, table: Table, before_training: Callable[[], Task]) -> TaskRows:
    """Encode labelled rows for an evaluation; print which are truncated or dropped.

    ``before_training`` returns the task around the model before training, for tasks that compare with it.
    """
    notes: list[str] = []
    rows = encode(task, table, "evaluation", 1.0, notes)
    for line in notes:
        note(line)
    # Few tasks need the model before training, and its weights must be read from disk.
    if type(task).prepare_reference is not Task.prepare_reference:
        before_training().prepare_reference(rows)
    return rows


def measure_in_parts(
    trainer: Trainer, run: Run, parts: Sequence[TaskRows | None]
) -> list[dict[str, float]]:
    """Evaluate the best checkpoint on the sharded model, because no single rank may be able to hold all weights.

    All ranks must call it.

    Returns:
        The metrics of each part, the same on all ranks; empty for None.
    """
    chosen, strategy, world = run.best or run.checkpoint, trainer.setup.strategy, trainer.world
    assert chosen is not None
    world.mark("evaluate", run.step)
    load_weights(trainer.objective, chosen, {}, layout=strategy.layout, peers=world)
    figures: list[dict[str, float]] = []
    for rows in parts:
        if rows is None:
            figures.append({})
            continue
        batch_rows = evaluation_rows(
            trainer.objective, rows, trainer.train.batch_rows, trainer.device
        )
        precision = trainer.setup.eval_precision
        figures.append(
            evaluate_rows(
                trainer.objective, rows, precision, batch_rows=batch_rows, strategy=strategy
            )
        )
    return figures
