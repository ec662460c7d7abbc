"""Rows of a fine-tuning run: reading, roles, splits, duplicates between splits, encoding.

Problems that usually go unnoticed (confused columns, truncated rows, labels that occur only in validation, training
rows that recur in the test) are errors here, or one line in ``notes``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.spelling import option
from pretrain.data.labelled import (
    Role,
    choose_columns,
    column_names,
    drop_duplicates,
    field_names,
    is_missing,
    roles_table,
    split,
)
from pretrain.data.labels import exact_number, printed_list, printed_mapping, spelled
from pretrain.data.shard_folders import shards_of
from pretrain.data.tables import shown, splits
from pretrain.errors import DataError
from pretrain.inference.columns import has_columns, roles_with
from pretrain.utils.files import muted

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.data.task_rows import TaskRows
    from pretrain.finetuning.settings import TuneConfig
    from pretrain.objectives.tasks import Learned, Task

__all__ = ["Data", "check_labelled", "encode", "open_data"]

_TEXTS = {"question", "text", "caption"}  # of which one image may have several


@dataclass
class Data:
    """Rows by role, and their metadata.

    Attributes:
        train, valid, test: tables whose columns are named by role; ``test`` may be None, ``valid`` empty.
        learned: labels and options that are derived from the training rows.
        names: part -> source of its rows.
        notes: lines to print.
        fingerprint: SHA-256 over the content of all rows, in order.
        columns: role -> column of the training rows.
        recurring: part -> number of training rows whose text recurs in it; they were left out. A row that recurs in
            both parts counts in each.
        left_out: number of training rows that were left out because of this.
    """

    train: Table
    valid: Table
    test: Table | None
    learned: Learned
    names: dict[str, str]
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    recurring: dict[str, int] = field(default_factory=dict)
    left_out: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each part."""
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: len(table) for name, table in parts.items() if table is not None}


def open_data(
    settings: TuneConfig,
    objects: Mapping[str, Any],
    task: type[Task],
    labels: Sequence[str] | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Data:
    """Read the sources that the settings name, or the objects that were given instead.

    Args:
        settings: settings of the run.
        objects: ``train``, ``valid`` and ``test`` if they are not paths: lists, frames, data sets.
        task: task class, which defines the required columns and derives the labels.
        labels: classes of the checkpoint, if it already has the head of the task.
        begun: what ``begun_as`` returns for the run.

    Raises:
        DataError: nothing to read, a missing column, or invalid labels; the message names the row.
    """
    section = settings.data
    source = objects.get("train", section.train)
    if source is None:
        raise DataError("There are no training rows: name a file, or give a list of dicts.")
    whole = _read(source, section, "train", task)
    roles, columns = _columns_read(whole, task, _named_columns(whole, task, settings), begun or {})
    train = roles_table(whole, columns)
    options = dict(settings.task.options)
    if labels is not None and "labels" not in options:
        options["checkpoint_labels"] = labels
    options |= begun or {}
    learned = task.learn(train, options)
    tidied = train = task.tidy(train, learned, options)
    notes, names = list(learned.notes), {"train": whole.name}
    groups = _groups(whole, section.group, "training", required=True)

    def held_out(source: Any, what: str) -> Table:
        read = _read(source, section, what, task)
        if groups is not None:
            others = _groups(read, section.group, what)
            notes.extend(_shared_groups(groups, others, section.group, what))
        return task.tidy(_by_role(read, roles, columns), learned, options)

    valid_source = objects.get("valid", section.valid)
    if isinstance(valid_source, int | float):
        names["valid"] = f"{float(valid_source):.0%} of {whole.name}"
        train, valid = _split(train, float(valid_source), learned, settings, groups, notes)
    else:
        valid = held_out(valid_source, "validation")
        names["valid"] = valid.name
    test = None
    test_source, spare = _test_of(source, objects, section)
    if test_source is not None:
        test = held_out(test_source, "test")
    elif spare is not None:
        try:  # the test split of a public data set often has no labels
            test = check_labelled(held_out(spare, "test"), tidied, task)
        except DataError as error:
            notes.append(f"the test split is not used: {error}")
    if test is not None:
        names["test"] = test.name
    all_rows = train
    train, recurring = _without_recurring(train, valid, test, task, notes)
    if len(learned.labels or ()) > 1:
        notes.extend(_lost_classes(all_rows, train, "training"))
    if isinstance(valid_source, int | float) and valid_source > 0 and not len(valid):
        notes.append("too few rows for a validation split: nothing is held out")
    return Data(
        train,
        valid,
        test,
        learned,
        names,
        notes,
        _fingerprint(train, valid, test),
        columns,
        recurring,
        len(all_rows) - len(train),
    )


def _test_of(source: Any, objects: Mapping[str, Any], section: Any) -> tuple[Any, Any]:
    """Return the source of test rows, or that of a test split which is used if it has labels."""
    given, spare = objects.get("test", section.test), objects.get("spare_test")
    own = isinstance(source, str | Path) and str(given) == str(source)
    return (None, source) if own and shards_of(source) else (given, spare)


def _split(
    train: Table,
    share: float,
    learned: Learned,
    settings: TuneConfig,
    groups: Sequence[Hashable] | None,
    notes: list[str],
) -> tuple[Table, Table]:
    """Hold out a share of the rows: as whole groups, which without ``groups`` are the rows of one image."""
    by = settings.data.group
    if groups is None and share and (groups := _same_image(train)) is not None:
        by = "image"
    train, valid = split(train, learned.strata, share, settings.train.seed, groups)
    if groups is not None and len(valid):
        notes.append(
            f"{len(valid) / (len(train) + len(valid)):.1%} of the rows are held out, as whole groups by {by!r} "
            f"({len(set(groups)):,} in all)"
        )
    return train, valid


def _without_recurring(
    train: Table, valid: Table, test: Table | None, task: type[Task], notes: list[str]
) -> tuple[Table, dict[str, int]]:
    """Drop training rows whose text recurs in held-out rows; return the rest, and how many recur, by part.

    An image recurs with whatever question: answers to others tell what it shows.
    """
    roles = [role.name for role in task.roles if role.name in train.names and not role.target]
    roles = ["image"] if {"image", "question"} <= set(roles) else roles
    all_rows, recurring = train, {}
    for part, other, part_name in (("valid", valid, "validation"), ("test", test, "test")):
        if other is not None and len(other):
            _, count = drop_duplicates(all_rows, other, roles, part_name)
            with muted():  # the call above has printed it, and the report repeats it
                train, _ = drop_duplicates(train, other, roles, part_name)
            if count:
                recurring[part] = count
                notes.append(
                    f"{count:,} training rows recur in the {part_name} rows and were left out"
                )
    if not len(train):
        raise DataError(
            "No training row is left: all of them recur among the validation or test rows. Give other held-out rows."
        )
    return train, recurring


def check_labelled(test: Table, train: Table | None, task: type[Task]) -> Table:
    """Return the rows of a test split.

    Without training rows (None), these are taken to have targets other than -1 and -100.

    Raises:
        DataError: a column of targets is empty in all rows, or holds only the -1 or -100 that marks hidden labels, as
            no training row does.
    """
    for role in task.roles:
        names = set(test.names) if train is None else set(test.names) & set(train.names)
        if not role.target or role.name not in names:
            continue
        cells, known = (
            [cell for cell in column if not _holds_only(is_missing, cell)]
            for column in (
                test.columns[role.name],
                ["a target"] if train is None else train.columns[role.name],
            )
        )
        hidden, meant = ([_holds_only(_is_hidden, c) for c in found] for found in (cells, known))
        empty = role.required and not cells and bool(known)
        if empty or (cells and all(hidden) and not any(meant)):
            raise DataError(
                f"{role.name} {'is empty' if empty else 'holds only -1 or -100'} in all {len(test):,} rows of "
                f"{test.name}, as in public test splits whose answers are held back"
            )
    return test


def _is_hidden(value: Any) -> bool:
    return isinstance(value, int | float | str) and exact_number(spelled(value)) in (-1, -100)


def _holds_only(kind: Callable[[Any], bool], cell: Any) -> bool:
    """Whether a target is of a kind, or a list or mapping that holds nothing else, also a printed one."""
    if isinstance(cell, str) and (items := printed_mapping(cell) or printed_list(cell)) is not None:
        cell = items
    if isinstance(cell, Mapping):
        cell = list(cell.values())
    return (
        all(_holds_only(kind, item) for item in cell)
        if isinstance(cell, list | tuple)
        else kind(cell)
    )


def _groups(
    table: Table, column: str | None, part: str, *, required: bool = False
) -> list[Hashable] | None:
    """The group of every row; a row without one is a group of its own. None if there is no such column.

    A number is one group in any spelling, because the cells of a text file are texts.

    Raises:
        DataError: there is no such column, and it is required.
    """
    if column is None or column not in table.columns:
        if column is not None and required:
            raise DataError(
                f"{table.name} has no column {column!r} for {option('group', column)}; columns present: "
                f"{column_names(table.names)}."
            )
        return None
    cells = table.columns[column]
    return [(part, i) if is_missing(cell) else _group(cell) for i, cell in enumerate(cells)]


def _group(cell: Any) -> Hashable:
    if not isinstance(cell, str | int | float):
        return json.dumps(cell, default=str)
    text = spelled(cell)
    number = exact_number(text)
    return text if number is None else number


def _same_image(table: Table) -> list[str] | None:
    """The image of every row, if rows with texts share images, which would be seen in training; else None."""
    if "image" not in table.names or not _TEXTS & set(table.names):
        return None
    column = table.columns["image"]
    digests = [getattr(image, "digest", f"row {i}") for i, image in enumerate(column)]
    return digests if len(set(digests)) < len(digests) else None


def _columns_read(
    table: Table, task: type[Task], given: Mapping[str, Any], begun: Mapping[str, Any]
) -> tuple[Sequence[Role], dict[str, Any]]:
    """Return the roles that are looked for and the column of each.

    A run goes on with those that it has, whatever names are known or columns are refused since.
    """
    if not (recorded := begun.get("begun_columns")):
        columns = choose_columns(table, task.roles, given)
        task.check_unread(table, columns)
        return task.roles, columns
    roles = [role for role in task.roles if role.required or role.name in {**given, **recorded}]
    return roles, choose_columns(table, roles, given)


def _named_columns(table: Table, task: type[Task], settings: TuneConfig) -> dict[str, Any]:
    """Columns that the settings name; if all ``labels`` are names of columns, each label is one column."""
    columns, labels = dict(settings.data.columns), settings.task.options.get("labels")
    role = next((role for role in task.roles if role.many), None)
    if (
        role is not None
        and role.name not in columns
        and isinstance(labels, list | tuple)
        and not any(known in table.columns for known in role.known)
        and all(label in table.columns for label in labels)
    ):
        columns[role.name] = list(labels)
    return columns


def _shared_groups(
    groups: Sequence[Hashable], others: Sequence[Hashable] | None, column: str | None, what: str
) -> list[str]:
    """Note on the groups that occur both in the training rows and in held-out rows."""
    if not (both := set(groups) & set(others or ())):
        return []
    count = sum(group in both for group in groups)
    return [
        f"{len(both):,} groups by {column!r} occur both in {count:,} training rows and in the {what} rows, so the "
        f"{what} figure does not measure unseen groups"
    ]


def _read(source: Any, section: Any, name: str, task: type[Task]) -> Table:
    options = section.reading(source)
    rows = splits(source).get("train", source)
    if isinstance(rows, list | tuple) and rows and isinstance(rows[0], list | tuple):
        fields = field_names(rows[0], task.roles, section.columns)
        options["columns"] = section.names or fields or _tuple_names(rows[0], task)
    return task.gathered(task.read(source, name=name, **options), section.columns)


def _tuple_names(row: Sequence[Any], task: type[Task]) -> list[str] | None:
    """Names for rows that are tuples: the required roles of the task, or all of them, whichever number matches."""
    every = [role.name for role in task.roles if role.name in role.known]
    needed = [role.name for role in task.roles if role.required and role.name in role.known]
    return next((names for names in (needed, every) if len(names) == len(row)), None)


def _by_role(table: Table, every: Sequence[Role], columns: Mapping[str, Any]) -> Table:
    """Held-out rows by role: the columns of the training rows if present, else those recognised by name.

    What the model reads is the same in all rows: a second text is read if the training rows have one, and must then be
    there.
    """
    known = {role: column for role, column in columns.items() if has_columns(table, column)}
    return roles_table(table, choose_columns(table, roles_with(every, columns), known))


def _fingerprint(*tables: Table | None) -> str:
    parts = [table.fingerprint if table is not None and len(table) else None for table in tables]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def encode(task: Task, table: Table, part_name: str, max_cut: float, notes: list[str]) -> TaskRows:
    """Encode rows as examples; add to ``notes`` what was truncated and what was dropped.

    Raises:
        DataError: more than ``max_cut`` of the rows do not fit, or none gives an example.
    """
    rows = task.encode(table)
    for reason, places in rows.dropped.items():
        some = ", ".join(table.where(i) for i in places[:3]) + ", ..." * (len(places) > 3)
        notes.append(f"{len(places):,} {part_name} rows left out, {reason}: {some}")
    if getattr(task, "labels", ()) and rows.dropped:
        notes.extend(_lost_classes(table, table.take(sorted(set(rows.owners))), part_name))
    room = task.model.backbone.max_length
    longer = f"set {option('max_length', room)}, which this model has positions for, "
    cure = f"{longer if task.max_length < room else ''}{task.shorten}"
    if not len(rows):
        why = "; ".join(f"{reason}: {len(places_of)}" for reason, places_of in rows.dropped.items())
        raise DataError(
            f"None of the {len(table):,} {part_name} rows can be used ({why or 'there are none'})."
            + (f" {cure[0].upper()}{cure[1:]}." if rows.cut else "")
        )
    for remark, places in rows.remarks.items():
        notes.append(f"{len(set(places)):,} of {len(table):,} {part_name} rows: {remark}")
    if rows.cut:
        share = len(rows.cut) / len(table)
        text = f"{len(rows.cut):,} of {len(table):,} {part_name} rows ({share:.2%}) exceed {task.max_length} tokens"
        if share > max_cut and not task.beyond_chosen:
            raise DataError(
                f"{text} and would be cut, the first is {table.where(rows.cut[0])}. "
                f"{cure[0].upper()}{cure[1:]}, or allow it with {option('max_cut', round(min(1.0, share + 0.005), 2))}."
            )
        notes.append(f"{text} and are {task.beyond}")
    return rows


def _lost_classes(table: Table, left: Table, what: str) -> list[str]:
    """Return a note on the classes whose rows are all left out, if there are any."""
    names = table.label_names.get("label")

    def classes(cells: Sequence[Any]) -> set[str]:
        every = (cell if isinstance(cell, list | tuple) else [cell] for cell in cells)
        found = {item for items in every for item in items if isinstance(item, str | int | float)}
        return {names[item] if names and type(item) is int else str(item) for item in found}

    lost = sorted(classes(table.columns.get("label", ())) - classes(left.columns.get("label", ())))
    if not lost:
        return []
    return [
        f"no {what} row of the class{'es' * (len(lost) > 1)} {shown(lost)} is left: what was left out held them all"
    ]
