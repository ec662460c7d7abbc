"""Labelled rows: roles of columns, stratified train/held-out split, removal of duplicates between the two.

Columns are recognised by names that are common in public data sets; nothing else is guessed.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pretrain.config.spelling import column as column_option
from pretrain.config.spelling import columns as columns_option
from pretrain.config.spelling import option
from pretrain.data.labels import (
    is_missing,
    is_on,
    make_tag_map,
    number_in,
    printed_list,
    printed_mapping,
)
from pretrain.data.tables import Table, shown
from pretrain.errors import ConfigError, DataError, did_you_mean, suggestion
from pretrain.utils.files import note

__all__ = [
    "Role", "choose_columns", "column_names", "drop_duplicates", "field_names", "is_missing", "label_strata",
    "make_tag_map", "normalised", "printed_messages", "roles_table", "split", "text_id",
]  # fmt: skip

_BINS = 10  # strata of a continuous target
_SHOWN = 30  # maximum number of columns named in a message
_SAMPLED = 50  # rows by which the column of a text is guessed in a message


@dataclass(frozen=True)
class Role:
    """The role of a column in a task.

    Args:
        name: the role, and the argument by which a user names the column: ``text``, ``label``.
        known: names by which a column is recognised, most common first.
        required: whether the task needs such a column.
        help: description for error messages: ``the text to classify``.
        target: the column holds the training target, which is absent at prediction.
        many: several columns may have this role together, each a label that a row has or not.
        constant: all rows of a model have the column, or none: it belongs to what is asked.
        beside: (column, other role, its column), the last recognised as that role and the first as this one only
            where a table has both: ``("sentence", "text", "question")``.
        file: a text in the column is the path of a file, relative to the file that the table was read from.
        doubtful: those of ``known`` that often name something else, by which only columns with texts are recognised.
    """

    name: str
    known: tuple[str, ...]
    required: bool = True
    help: str = ""
    target: bool = False
    many: bool = False
    constant: bool = False
    beside: tuple[tuple[str, str, str], ...] = ()
    file: bool = False
    doubtful: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ columns


def _spelled_as_in(table: Table, column: Any) -> Any:
    """Return the name of a column as the table spells it; columns of a data frame may be named by numbers."""
    if isinstance(column, list | tuple):
        return [_spelled_as_in(table, name) for name in column]
    return str(column) if isinstance(column, int) and str(column) in table.columns else column


def choose_columns(
    table: Table, roles: Sequence[Role], given: Mapping[str, Any], *, quiet: bool = False
) -> dict[str, Any]:
    """Return the column of every role that has one.

    Columns named by the user are used as given. Each other role, in order, gets the first unused column with one of
    its `known` names, in their order, an exact spelling before one that differs in case; but see ``Role.beside``.
    Unused columns are reported in one line.

    Args:
        table: the rows.
        roles: the roles of the task.
        given: role -> column, or a list of columns for a role with `many`, or None if the user did not name one.
        quiet: do not report unused columns.

    Raises:
        DataError: a role or column does not exist, a column is named for two roles, or a required role has no column;
            the error lists the columns and the call to write.
    """
    named = {
        role: _spelled_as_in(table, column) for role, column in given.items() if column is not None
    }
    by_name = {role.name: role for role in roles}
    for role in named:
        if role not in by_name:
            raise DataError(
                f"{column_option(role, named[role])}: this task has no column for {role!r}."
                f"{did_you_mean(role, by_name)}"
            )
    chosen: dict[str, Any] = {}
    for role, column in named.items():
        if isinstance(column, list | tuple) and not (by_name[role].many and len(column) > 1):
            raise DataError(
                f"{column_option(role, list(column))}: {role} takes one column"
                f"{', or several columns with 0 and 1 that each are a label' if by_name[role].many else ''}. Write "
                f"{column_option(role, str(next(iter(column), 'name')))}."
            )
        if len({str(name) for name in _listed(column)}) < len(_listed(column)):
            raise DataError(f"{column_option(role, column)} names a column twice; name each once.")
        for name in _listed(column):
            if name not in table.columns:
                raise DataError(_absent(table, role, str(name), roles))
            if name in _taken(chosen):
                other = next(r for r, column in chosen.items() if name in _listed(column))
                raise DataError(
                    f"the column {name!r} was named for both {other} and {role}; each needs a column of its own."
                )
        chosen[role] = list(column) if isinstance(column, list | tuple) else column
    _choose_together(table, by_name, chosen)
    for wanted in roles:
        if wanted.name not in chosen:
            found = _recognised(table, wanted, _taken(chosen))
            if found is not None:
                chosen[wanted.name] = found
    missing = [role for role in roles if role.required and role.name not in chosen]
    if missing:
        raise DataError(_missing(table, missing, chosen, named))
    taken = _taken(chosen)
    unused = [name for name in table.columns if name not in taken]
    if unused and not quiet:
        used = ", ".join(
            c if c == r else f"{', '.join(_listed(c))} as {r}" for r, c in chosen.items()
        )
        note(f"{table.name}: used {used}; columns not used: {column_names(unused)}")
    return {role.name: chosen[role.name] for role in roles if role.name in chosen}


def field_names(row: Any, roles: Sequence[Role], given: Mapping[str, Any]) -> list[str] | None:
    """Return the fields of a named tuple that are columns for all required roles (see `choose_columns`), else None."""
    if not hasattr(row, "_asdict"):
        return None
    columns = {name: [value] for name, value in row._asdict().items()}
    try:
        choose_columns(Table("a row", columns), roles, given, quiet=True)
    except DataError:
        return None
    return [*columns]


def _listed(column: Any) -> Sequence[str]:
    return column if isinstance(column, list | tuple) else [column]


def _taken(chosen: Mapping[str, Any]) -> set[str]:
    """Return the columns of all roles."""
    return {name for column in chosen.values() for name in _listed(column)}


def _folded(name: str) -> str:
    return name.strip().casefold()


def _recognised(table: Table, role: Role, taken: set[str]) -> str | None:
    free = [name for name in table.columns if name not in taken]
    other = [n for n in free if _folded(n) in role.doubtful and not _holds_texts(table.columns[n])]
    free = [name for name in free if name not in other]
    for known in role.known:
        if known in free:
            return known
        alike = [name for name in free if _folded(name) == _folded(known)]
        if len(alike) > 1:
            raise DataError(
                f"{table.name} has {' and '.join(map(repr, alike))}, both of which could be the {role.name}. Say "
                f"which: {column_option(role.name, alike[0])}."
            )
        if alike:
            return alike[0]
    return None


def _holds_texts(cells: Sequence[Any]) -> bool:
    """Whether any cell is a text, or a list with one, that is not blank; a printed number or mapping is none."""
    each = (value for cell in cells for value in (cell if isinstance(cell, list) else [cell]))
    return any(isinstance(value, str) and value.strip() and _is_text(value) for value in each)


def _is_text(value: str) -> bool:
    items = printed_list(value)
    if items is not None:
        return _holds_texts(items)
    return number_in(value) is None and printed_mapping(value) is None


def _choose_together(table: Table, roles: Mapping[str, Role], chosen: dict[str, Any]) -> None:
    """Add to ``chosen`` the columns that are recognised beside each other, unless a name goes before them."""
    for role in roles.values():
        for own, other, its in role.beside:
            named = chosen.get(other)
            taken = _taken(chosen) - {named}
            free = {_folded(name): name for name in table.columns if name not in taken}
            if role.name in chosen or not {own, its} <= free.keys():
                continue
            first = _recognised(table, roles[other], taken) if named is None else named
            if first == free[its] or (named is None and first == free[own]):
                chosen.update({other: free[its], role.name: free[own]})


def column_names(names: Sequence[str]) -> str:
    """Return the first column names, long ones shortened, for a message."""
    return shown(names, _SHOWN)


def _absent(table: Table, role: str, column: str, roles: Sequence[Role]) -> str:
    near = suggestion(column, table.columns)
    known = {_folded(name) for item in roles for name in item.known}
    strange = not known & {_folded(name) for name in table.columns}
    absent = f"{table.name} has no column {column!r} for {column_option(role, column)}"
    if table.hint and strange and not near:
        return f"{absent}. {table.hint}"
    return f"{absent}; columns present: {column_names(table.names)}.{near}"


def _missing(
    table: Table, missing: Sequence[Role], chosen: Mapping[str, str], named: Mapping[str, str]
) -> str:
    """Return the message that names the roles without a column, the columns present and the call to write."""
    taken = _taken(chosen)
    left = [name for name in table.columns if name not in taken]
    wanted = " and ".join(role.name + (f" ({role.help})" if role.help else "") for role in missing)
    guessed = _guessed(table, missing, left)
    marks = next((columns for columns in guessed.values() if isinstance(columns, list)), [])
    shortened = {
        r: [*c[:3], ...] if c is marks and len(c) > _SHOWN else c for r, c in guessed.items()
    }
    calls = columns_option({**named, **shortened})
    many = f"each of {column_names(marks)}, which hold 0 and 1, is a label" if marks else ""
    if table.hint and not chosen:
        other = f" If it is the header{' and' * bool(marks)} {many}".rstrip() + f", write {calls}."
        return f"{table.name} has no column for {wanted}. {table.hint}{other * (len(left) >= len(missing))}"
    looked = "; ".join(f"{role.name}: {', '.join(role.known)}" for role in missing)
    if len(left) < len(missing):
        found = f"Only {column_names(left)}" if left else "No column"
        cure = f"{found} is left for it; check that the right file was given."
    elif marks:
        cure = f"If {many}, write {calls}."
    elif len(left) == 1 and len(missing) == 1:
        cure = f"The only column left is {left[0]!r}; if it is the one, write {calls}."
    else:
        cure = f"Name it, for example {calls}."
    return (
        f"{table.name} has no column for {wanted}; columns present: {column_names(table.names)}. Recognised names are "
        f"{looked}. {cure}"
    )


def _guessed(table: Table, missing: Sequence[Role], left: Sequence[str]) -> dict[str, Any]:
    """Return columns as an example: that with the longest texts for an input, all of 0 and 1 for several labels."""
    many = any(role.many for role in missing)
    marks = [
        name for name in left if many and all(is_on(v) is not None for v in table.columns[name])
    ]
    free = [name for name in left if len(marks) < 2 or name not in marks]
    found: dict[str, Any] = {}

    def size(name: str) -> int:
        return sum(len(cell) for cell in table.columns[name][:_SAMPLED] if isinstance(cell, str))

    for role in missing:
        if role.many and len(marks) > 1:
            found[role.name] = marks
        elif free:
            found[role.name] = free[0] if role.target else max(free, key=size)
            free = [name for name in free if name != found[role.name]] or free
    return found


def roles_table(table: Table, chosen: Mapping[str, Any]) -> Table:
    """Return a table of the chosen columns, named after their roles; other columns are dropped.

    Several columns for one role become one column of lists: the indices of those that are 1 in the row. The remarks on
    the chosen columns are printed.

    Raises:
        DataError: such a column has a value other than 0 and 1; names the row.
    """
    columns, names, orders = {}, {}, {}
    for role, column in chosen.items():
        if isinstance(column, list):
            columns[role], names[role] = _one_column(table, column), list(column)
            continue
        columns[role] = table.columns[column]
        for line in table.remarks.get(column, ()):
            note(line)
        if column in table.label_names:
            names[role] = table.label_names[column]
        if column in table.orders:
            orders[role] = table.orders[column]
    return replace(table.with_columns(columns, names), orders=orders, remarks={})


def _one_column(table: Table, labels: Sequence[str]) -> list[Any]:
    rows: list[list[int]] = [[] for _ in range(len(table))]
    for k, label in enumerate(labels):
        for i, value in enumerate(table.columns[label]):
            on = is_on(value)
            if on is None:
                unlabelled = value in (-1, "-1", -1.0)
                hint = "In public test sets -1 marks a row without a label. " if unlabelled else ""
                raise DataError(
                    f"{table.where(i)}: the column {label!r} holds {value!r}, but a column that is a label holds 0 or "
                    f"1 in each row. {hint}Correct or remove the row."
                )
            if on:
                rows[i].append(k)
    return rows


# -------------------------------------------------------------------------------------------------- split


def label_strata(values: Sequence[Any]) -> list[Hashable]:
    """Return the stratum of every value of a label column, for a stratified split.

    Strings, integers and bools are their own stratum; continuous values are grouped into deciles; a list (the tags of
    words, several labels) belongs to its rarest label, so that rare entities are in both parts; all other values form
    one stratum.
    """
    if values and all(isinstance(v, str) for v in values):
        found = [number_in(v) for v in values]
        if None not in found and any(v is not None and not v.is_integer() for v in found):
            values = found
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    quantity = any(
        isinstance(v, float) and math.isfinite(v) and not v.is_integer() for v in numbers
    )
    if quantity:
        order = sorted(v for v in numbers if math.isfinite(v))
        count = min(_BINS, max(1, len(order) // 2))
        edges = [order[len(order) * k // count] for k in range(1, count)]
        return [sum(v >= edge for edge in edges) if not is_missing(v) else None for v in values]
    lists = [v for v in values if isinstance(v, list | tuple)]
    seen = Counter(item for v in lists for item in v if isinstance(item, Hashable))

    def key(value: Any) -> Hashable:
        if isinstance(value, list | tuple):
            items = [item for item in value if isinstance(item, Hashable)]
            return min(items, key=lambda item: (seen[item], str(item)), default=None)
        if isinstance(value, str | int | bool):
            return value
        return int(value) if isinstance(value, float) and math.isfinite(value) else None

    return [key(value) for value in values]


def split(
    table: Table,
    keys: Sequence[Hashable] | None,
    fraction: float,
    seed: int,
    groups: Sequence[Hashable] | None = None,
) -> tuple[Table, Table]:
    """Split the rows into training and held-out rows, stratified by class.

    Without groups, n x fraction rows of a class of n rows are held out, rounded down or up so that the total is right;
    at least one row of each class stays in training, and at least one row is held out. The choice depends only on
    `seed` and the positions of the rows; both parts keep the order of the rows.

    Args:
        table: the rows.
        keys: the class of each row; None: all rows are of one class.
        fraction: share of the rows to hold out, at least 0 and less than 1.
        seed: seed of the choice.
        groups: the group of each row. Rows of one group stay together, and the shares are met as closely as whole
            groups allow.

    Returns:
        (training rows, held-out rows)

    Raises:
        ConfigError: `fraction` is out of range.
        DataError: no row, or no group, can be held out without emptying a class.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(
            f"the held-out share is {fraction}, but must be from 0 to less than 1, such as 0.1 for a tenth."
        )
    keys = [None] * len(table) if keys is None else keys
    if len(keys) != len(table):
        raise DataError(
            f"{len(keys)} keys for the {len(table)} rows of {table.name}; give one key for each row."
        )
    if fraction == 0:
        return table, table.take([])
    held: set[int] = set()
    if groups is not None:
        held = _whole_groups(keys, groups, fraction, seed)
    else:
        classes: dict[Hashable, list[int]] = {}
        for i, key in enumerate(keys):
            classes.setdefault(key, []).append(i)
        counts = _shares([len(rows) for rows in classes.values()], fraction, seed)
        for count, rows in zip(counts, classes.values(), strict=True):
            held.update(sorted(rows, key=lambda i: _rank(seed, "row", i))[:count])
    if not held and groups is not None:
        raise DataError(
            f"{table.name}: none of the {len(set(groups)):,} groups can be held out without taking all rows of a "
            f"class. Give more groups, or the held-out rows themselves: {option('valid')}."
        )
    if not held:
        raise DataError(
            f"{table.name}: no row of {len(table)} can be held out, since every class needs one for training and none "
            "has two. Give more rows, or the held-out rows themselves: "
            f"{option('valid')}."
        )
    train = table.take([i for i in range(len(table)) if i not in held])
    return train, table.take(sorted(held))


def _whole_groups(
    keys: Sequence[Hashable], groups: Sequence[Hashable], fraction: float, seed: int
) -> set[int]:
    """Return the rows of groups that approximate the share of every class; each class keeps rows in training.

    Greedy: groups are visited by falling size, equal ones in random order, and a group is held out if that brings the
    counts of the classes closer to their shares.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    whole = Counter(keys)
    taken: Counter[Hashable] = Counter()
    held: set[int] = set()
    places = {group: k for k, group in enumerate(members)}
    order = sorted(members, key=lambda g: (-len(members[g]), _rank(seed, "group", places[g])))
    nearest: tuple[float, Hashable] | None = None

    def further(now: int, more: int, all_rows: int) -> float:
        wanted = all_rows * fraction
        return ((now + more - wanted) ** 2 - (now - wanted) ** 2) / all_rows

    for group in order:
        own = Counter(keys[i] for i in members[group])
        if any(taken[key] + count >= whole[key] for key, count in own.items()):
            continue
        # Change of the squared distance from the shares: of each class, and of all rows with the weight of all classes.
        change = len(whole) * further(len(held), len(members[group]), len(keys))
        change += sum(further(taken[key], count, whole[key]) for key, count in own.items())
        if change < 0:
            held.update(members[group])
            taken.update(own)
        elif nearest is None or change < nearest[0]:
            nearest = (change, group)
    if not held and nearest is not None:  # even the best group exceeds the share
        held.update(members[nearest[1]])
    return held


def _rank(seed: int, what: str, i: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{what}/{i}".encode(), digest_size=8).digest()


def _shares(sizes: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Apportion the held-out rows to classes by largest remainder (Hamilton's method), ties in random order."""
    total = max(1, round(sum(sizes) * fraction))
    shares = [round(size * fraction, 9) for size in sizes]  # 0.29 of 100 rows are 29
    counts = [min(math.floor(share), size - 1) for share, size in zip(shares, sizes, strict=True)]
    order = sorted(
        range(len(sizes)), key=lambda k: (counts[k] - shares[k], _rank(seed, "class", k))
    )
    missing = total - sum(counts)
    for k in order:
        if missing > 0 and counts[k] + 1 < sizes[k] and (counts[k] < shares[k] or not any(counts)):
            counts[k] += 1
            missing -= 1
    return counts


# --------------------------------------------------------------------------------------------- duplicates

_ASCII = {code: None for code in range(128) if not chr(code).isalnum() and not chr(code).isspace()}


def text_id(text: str) -> int:
    """64-bit hash of a text, without regard to differences in white space."""
    plain = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little", signed=True)


def normalised(text: str) -> str:
    """Return a text in normalised form for comparison: NFKC, case folded, only letters, their marks and digits.

    Spaces are removed, so that "top-up", "top up" and "topup" are equal, like "don't" and "dont". A text without
    letters and digits, such as a smiley, is only normalised by NFKC, case folded and stripped.
    """
    if text.isascii():
        kept = text.casefold().translate(_ASCII)
    else:
        folded = unicodedata.normalize("NFKC", text).casefold()
        kept = "".join(
            c for c in folded if c.isalnum() or c.isspace() or unicodedata.category(c)[0] == "M"
        )
    return "".join(kept.split()) or unicodedata.normalize("NFKC", text).casefold().strip()


def _compared(value: Any) -> str:
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, Mapping):
        return "\n".join(_compared(item) for item in value.values())
    if isinstance(value, list | tuple):
        words = all(isinstance(item, str) for item in value)
        return normalised(" ".join(value)) if words else "\n".join(map(_compared, value))
    if hasattr(value, "digest"):  # an image
        return str(value.digest)
    return "" if is_missing(value) else str(value)


def _keys(table: Table, names: Sequence[str]) -> list[bytes | None]:
    """Return a key for every row, equal for rows of equal content; None for an empty row, which is no duplicate."""
    columns = [table.columns[name] for name in names]
    texts = ("\0".join(map(_compared, cells)) for cells in zip(*columns, strict=True))
    return [
        hashlib.blake2b(t.encode("utf-8", "replace"), digest_size=16).digest()
        if t.strip("\0")
        else None
        for t in texts
    ]


def drop_duplicates(
    train: Table, other: Table, role_names: Sequence[str], what: str
) -> tuple[Table, int]:
    """Drop training rows whose text is also in `other`, so that held-out metrics are of unseen text.

    Args:
        train: the training rows.
        other: the held-out rows, which are not changed.
        role_names: the text columns, compared together.
        what: name of `other` in messages: ``validation``.

    Returns:
        (remaining training rows, number dropped); the number is also reported in one line.

    Raises:
        DataError: no training rows remain, as when the same source was given twice.
    """
    used = [name for name in role_names if name in train.columns and name in other.columns]
    if not used:
        return train, 0
    known = set(_keys(other, used)) - {None}
    kept = [i for i, key in enumerate(_keys(train, used)) if key not in known]
    count = len(train) - len(kept)
    if not count:
        return train, 0
    if not kept:
        raise DataError(
            f"all {len(train):,} training rows ({train.name}) also stand in the {what} rows ({other.name}): the "
            "same source was given twice, or its rows repeat each other."
        )
    note(
        f"{train.name}: {count:,} of {len(train):,} training rows also stand in the {what} rows and are left out"
    )
    return train.take(kept), count


def printed_messages(text: str) -> Any:
    """Return the list or object that a text prints as JSON or Python; any other text as it is."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = read(text.strip())
            return value if isinstance(value, list | dict) else text
    return text
