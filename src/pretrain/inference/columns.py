"""Columns of labelled rows for a fine-tuned model: those that its config.json records, and those that are given."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pretrain.data.labelled import Role, choose_columns
from pretrain.data.tables import Table
from pretrain.errors import DataError
from pretrain.objectives.tasks import Task
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "columns_of",
    "columns_read",
    "columns_wanted",
    "has_columns",
    "names_of_training",
    "recorded_mapping",
    "roles_known",
    "roles_read",
    "roles_with",
    "say_unread",
]


def recorded_mapping(model: Model, key: str) -> Mapping[str, Any]:
    """Return a mapping that config.json records of the training: ``objective``, or role -> column in ``columns``."""
    recorded = model.provenance.get(key)
    return recorded if isinstance(recorded, Mapping) else {}


def columns_of(model: Model, table: Table, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return role -> column: the caller's choice, or else the column of the training data if the table has it."""
    remembered = {
        role: column
        for role, column in recorded_mapping(model, "columns").items()
        if has_columns(table, column) and column not in given.values()
    }
    return {**remembered, **given}


def names_of_training(task: Task, table: Table, given: Mapping[str, Any]) -> list[str] | None:
    """Return the names that the training gave to columns without a header, if the table is of a file without one.

    Its first line is a header if the inputs are found by it, under names that are no values further below.
    """
    names = task.model.provenance.get("column_names")
    if (
        not table.hint
        or not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or len(names) != len(table.names)
        or set(names) & set(table.names)
    ):
        return None
    with contextlib.suppress(DataError):  # no column of some input
        roles, wanted = roles_known(task, given), columns_wanted(task, table, given)
        chosen = choose_columns(table, roles, wanted, quiet=True)
        if chosen and all(name not in table.columns[name] for name in chosen.values()):
            return None
    note(
        f"{table.name}: the first line is a row, and the columns are named as in training: {', '.join(names)}"
    )
    return names


def has_columns(table: Table, column: Any) -> bool:
    """Return whether a table has a column, or all of a list of columns."""
    names = column if isinstance(column, list) else [column]
    return all(isinstance(name, str) and name in table.columns for name in names)


def roles_read(task: Task | type[Task]) -> list[Role]:
    """Return the input roles of a task, without its targets."""
    return [role for role in task.roles if not role.target]


def columns_read(
    task: Task, table: Table, given: Mapping[str, Any], *, quiet: bool
) -> dict[str, Any]:
    """Return the columns of a table that the task reads: those of ``columns_of``, then those recognised by name."""
    roles = roles_known(task, given)
    say_unread(task, table, roles)
    return choose_columns(table, roles, columns_wanted(task, table, given), quiet=quiet)


def columns_wanted(task: Task, table: Table, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of ``columns_of`` whose roles the model reads, and those that are given."""
    known = {role.name for role in roles_known(task, given)}
    wanted = columns_of(task.model, table, given)
    return {role: c for role, c in wanted.items() if role in known or role in given}


def say_unread(task: Task, table: Table, roles: Sequence[Role]) -> None:
    """Name the columns that look like inputs of the task and belong to none of ``roles``."""
    known = {role.name for role in roles}
    for role in roles_read(task):
        if role.name not in known and (names := [n for n in role.known if n in table.columns]):
            note(f"the column {names[0]!r} is not read: the model was trained without {role.name}")


def roles_with(roles: Iterable[Role], known: Collection[str]) -> list[Role]:
    """Return roles without those of second inputs that are not known; those that are must be in all rows."""
    return [
        replace(role, required=True) if role.constant else role
        for role in roles
        if not role.constant or role.name in known
    ]


def roles_known(task: Task, given: Mapping[str, Any]) -> list[Role]:
    """Return the input roles that the model was trained with, as far as that is recorded, and those that are given.

    A second text that all training rows had is required: without it the answers would be those to another input.
    """
    recorded = recorded_mapping(task.model, "columns")
    if not recorded:
        return roles_read(task)
    return roles_with(roles_read(task), {*recorded, *given})
