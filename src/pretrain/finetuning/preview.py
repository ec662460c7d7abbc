"""``pretrain.data(...)``: preview of labelled rows as fine-tuning reads them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.config.spelling import FINETUNE, using
from pretrain.data.overview import Overview
from pretrain.finetuning.rows import Data, open_data
from pretrain.finetuning.settings import from_keywords
from pretrain.finetuning.start import classes_of, starting_model
from pretrain.objectives import check_options, task_class

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.data.task_rows import TaskRows
    from pretrain.objectives.tasks import Task

__all__ = ["look"]

_EXAMPLES = 3


@using(FINETUNE)
def look(
    data: Any,
    task: str = "classification",
    model: Any = None,
    *,
    tokenizer: Any = None,
    valid: Any = None,
    test: Any = None,
    **keywords: Any,
) -> Overview:
    """Show class balance, lengths, rows that will be truncated, and three examples as the model reads them.

    Args:
        data: rows, as for ``pretrain.finetune``.
        task: name of the task.
        model: the checkpoint that will be fine-tuned; its tokenizer and positions measure the rows. Without one
            lengths are in words.
        tokenizer: another name for ``model``.
        valid: held-out rows, or the fraction that is held out.
        test: test rows.
        **keywords: columns by role (``text="review"``), options of the task, ``max_length``.

    Returns:
        An overview that can be printed in a terminal and is rendered in a notebook.

    Raises:
        PretrainError: the rows cannot be used; the message says what to do.
    """
    model = tokenizer if model is None else model
    given = {"train": data, "valid": valid, "test": test, **keywords}
    settings, objects = from_keywords(None, "none" if model is None else model, task, given)
    cls = task_class(settings.task.name)
    check_options(cls, settings.task.options)
    found = open_data(settings, objects, cls, classes_of(model, cls))
    notes = list(found.notes)
    classes = {
        name: _classes(getattr(found, name), found)
        for name in found.counts
        if found.learned.labels and len(found.learned.labels) > 1
    }
    common: dict[str, Any] = {
        "name": found.names["train"],
        "task": task,
        "rows": found.counts,
        "classes": {name: counts for name, counts in classes.items() if counts},
        "notes": notes,
    }
    if model is None:
        words = [_words(row.values()) for row in found.train.rows()]
        notes.append("lengths are in words: name a model to count its tokens and see its examples")
        return Overview(
            **common, tokenizer="words", lengths=words, max_length=0, cut=0, examples=[]
        )
    ready = starting_model(model, cls, found.learned.labels, quiet=True)
    options = {**found.learned.options, **settings.task.options}
    options = {k: v for k, v in options.items() if k not in cls.row_options}
    made = cls(ready, max_length=settings.data.max_length, **options)
    rows = made.encode(found.train)
    for reason, places in rows.dropped.items():
        notes.append(
            f"{len(places):,} rows are left out: {reason} ({found.train.where(places[0])})"
        )
    for remark, places in rows.remarks.items():
        notes.append(f"{len(set(places)):,} rows: {remark} ({found.train.where(places[0])})")
    return Overview(
        **common,
        beyond=made.beyond,
        tokenizer=os.path.basename(str(model)) if isinstance(model, str | os.PathLike) else "model",
        lengths=rows.lengths,
        max_length=made.max_length,
        cut=len(rows.cut),
        examples=_examples(made, found.train, rows),
    )


def _examples(task: Task, table: Table, rows: TaskRows) -> list[list[tuple[str, bool]]]:
    """A few examples as the model reads them; an answer for the whole text is appended to it."""
    chosen = _spread(len(rows))
    truth = task.truth(table.take([rows.owners[i] for i in chosen])) if chosen else None
    shown = []
    for k, i in enumerate(chosen):
        pieces = task.show(rows[i])
        if truth is not None and not any(trained for _, trained in pieces):
            pieces.append((f" → {truth[k]}", True))
        shown.append(pieces)
    return shown


def _classes(table: Table, data: Data) -> dict[str, int]:
    """Number of rows of each class, in the order of the labels; empty if rows have lists of labels."""
    values = table.columns.get("label", [])
    if any(isinstance(value, list | tuple | Mapping) for value in values):
        return {}
    codes = data.learned.options.get("codes", {})
    labels = data.learned.labels or ()
    counts = Counter(codes.get(str(value), str(value)) for value in values)
    return {label: counts.get(k, counts.get(label, 0)) for k, label in enumerate(labels)}


def _words(values: Any) -> int:
    return sum(len(value.split()) for value in values if isinstance(value, str))


def _spread(count: int) -> Sequence[int]:
    """A few indices, spread evenly over the whole range."""
    return sorted({i * count // _EXAMPLES for i in range(_EXAMPLES)} if count else ())
