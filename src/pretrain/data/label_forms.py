"""Reading of multi-label columns, in any published form, as a list of class names or numbers per row.

The forms are lists of names or of class numbers, vectors of zeros and ones, printed forms of both in a text file, names
joined by a separator, and mappings from name to 0 or 1. The form is determined for a whole column, not cell by cell.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.config.spelling import option
from pretrain.data.labels import is_missing, number_in
from pretrain.errors import DataError

__all__ = ["Several", "is_on", "printed_list", "read_several"]

Where = Callable[[int], str]

_MARKS = ("|", ";", ",")  # separators of names in one cell
_RECURRING = 0.9  # share of the parts of joined cells that must occur in other cells too
_SPELLED = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


@dataclass
class Several:
    """A multi-label column: any number of labels per row.

    Attributes:
        rows: names or numbers of the classes of each row; None if each row has a single label.
        names: names of the classes in order, if the rows contain class numbers and the form defines their names.
        notes: lines to print.
    """

    rows: list[list[Any]] | None
    names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)


def read_several(
    values: Sequence[Any],
    where: Where,
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    spellings: Collection[str] = (),
    separator: str | None = None,
    always: bool = False,
    column: str = "label",
) -> Several:
    """Read a column in which rows may have any number of labels.

    Args:
        values: the cells.
        where: returns the location of a row, for error messages.
        names: names of the classes whose numbers the column contains (``datasets.ClassLabel``).
        labels: names of the classes, if known.
        spellings: values that a cell may contain besides the names.
        separator: text between names in one cell; "" if names are never joined; None detects it from the column.
        always: treat the column as multi-label in any form; a single name is a list of one label.
        column: name of the column, for error messages.

    Raises:
        DataError: the column mixes forms, is ambiguous, or has an invalid vector; names the row.
    """
    lists = [i for i, value in enumerate(values) if _is_list(value)]
    mappings = [i for i, value in enumerate(values) if isinstance(value, Mapping)]
    if mappings and len(mappings) == len(values):
        return _from_mappings(values, where, column)
    if lists:
        if len(lists) < len(values):
            i = next(i for i, value in enumerate(values) if not _is_list(value))
            raise DataError(
                f"{where(i)}: {column} holds {_short(values[i])}, but other rows have lists of labels. Give every "
                "row a list, [] where no class fits."
            )
        return _from_lists([list(value) for value in values], where, names, labels, column)
    texts = ["" if is_missing(value) else value for value in values]
    notes: list[str] = []
    if any(texts) and all(isinstance(text, str) for text in texts):
        if separator is None:
            parsed = [printed_list(text) for text in texts]
            if any(found is not None for found in parsed):
                return _from_printed(texts, parsed, where, names, labels, column)
            known = None if labels is None else {str(label) for label in (*labels, *spellings)}
            separator, notes = _separator(texts, known, column, always)
        if separator:
            return Several([_parts(text, separator) for text in texts], None, notes)
    if always:
        return Several([[] if is_missing(value) else [value] for value in values])
    return Several(None, None, notes)


def is_on(value: Any) -> bool | None:
    """Return True for 1, True, "1" and "true", False for 0, False, "0" and "false", and None for any other value."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    return _SPELLED.get(value.strip().lower()) if isinstance(value, str) else None


# -------------------------------------------------------------------------------------------- lists and vectors


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset)


def _from_mappings(values: Sequence[Any], where: Where, column: str) -> Several:
    """Read mappings from every name to 0 or 1, such as spaCy's ``cats``."""
    names = list(dict.fromkeys(str(name) for value in values for name in value))
    rows = []
    for i, value in enumerate(values):
        on = {str(name): is_on(mark) for name, mark in value.items() if mark is not None}
        if strange := [name for name, mark in on.items() if mark is None]:
            raise DataError(
                f"{where(i)}: {column} gives {strange[0]!r} the value {_short(value[strange[0]])}; as a mapping of "
                "labels it holds 0 or 1 for each. Round shares, or give a list of the labels that fit."
            )
        rows.append([k for k, name in enumerate(names) if on.get(name)])
    return Several(rows, tuple(names))


def _from_lists(
    rows: list[list[Any]],
    where: Where,
    names: Sequence[str] | None,
    labels: Sequence[str] | None,
    column: str,
) -> Several:
    width = _vector_width(rows, where, names, labels, column)
    if width:
        if labels is not None and len(labels) != width:
            raise DataError(
                f"{where(0)}: {column} is a vector of {width} zeros and ones, and there are {len(labels)} labels: "
                f"{', '.join(map(str, labels[:12]))}. Give one label for each place, in order: "
                f"{option('labels', [...])}."
            )
        known = tuple(map(str, range(width) if labels is None else labels))
        found = Several([[k for k, on in enumerate(row) if on] for row in rows], known)
        if labels is None:
            found.notes.append(
                f"{column}: vectors of {width} zeros and ones, one place for each label; the labels are called 0 to "
                f"{width - 1} ({option('labels', ['name', ...])} names them)"
            )
        return found
    missing = sum(is_missing(item) for row in rows for item in row)
    found = Several([[item for item in row if not is_missing(item)] for row in rows])
    if missing:
        found.notes.append(
            f"{column}: {missing:,} items of the lists hold nothing (None, NaN or blanks) and are left out"
        )
    return found


def _vector_width(
    rows: list[list[Any]],
    where: Where,
    names: Sequence[str] | None,
    labels: Sequence[str] | None,
    column: str,
) -> int:
    """Return the length of the rows if they are vectors of zeros and ones, or 0 if they list names or class numbers.

    Class numbers are integers that do not repeat within a row, so bools, floats and repeated zeros indicate vectors.
    Rows of two numbers 0 or 1, which could be either, are read as vectors: as class numbers, nearly all rows would have
    both classes.
    """
    items = [item for row in rows for item in row if not is_missing(item)]
    if names is not None or not items or not all(isinstance(x, bool | int | float) for x in items):
        return 0
    sure = [i for i, row in enumerate(rows) if any(isinstance(x, bool | float) for x in row)]
    widths = {len(row) for row in rows}
    if any(is_missing(item) for row in rows for item in row):
        sure = [i for i in sure if any(isinstance(x, bool) for x in rows[i])]
    if strange := [i for i in sure if any(x not in (0, 1) for x in rows[i])]:
        i = strange[0]
        value = next(x for x in rows[i] if x not in (0, 1))
        raise DataError(
            f"{where(i)}: {column} is a list with the number {value!r}. Labels are names, whole numbers of classes, or "
            "a vector of zeros and ones; shares of labels are not trained on, so round them."
        )
    if len(widths) > 1 or not all(x in (0, 1) for x in items):
        wrong = sure or [i for i, row in enumerate(rows) if len(set(row)) < len(row)]
        if wrong:
            i, sizes = wrong[0], sorted(widths)
            what = f"other rows have lists of {sizes[0]} to {sizes[-1]} items"
            if len(widths) == 1:
                what = "other rows hold numbers above 1"
            raise DataError(
                f"{where(i)}: {column} is {_short(rows[i])}, like a vector of zeros and ones, but {what}. Give vectors "
                "of one length, or the list of the classes that fit."
            )
        return 0
    width = widths.pop()
    if width == 1 and sure:
        raise DataError(
            f"{where(0)}: {column} is a vector of one place, which is one class only. Give two classes: 0 and 1, or "
            "two names."
        )
    return width if width > 1 else 0


# ------------------------------------------------------------------------------------------------ text cells

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PLAIN = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|True|False|true|false|None|null|nan|NaN"
_ITEM = re.compile(rf"(?:np\.\w+|numpy\.\w+)\(\s*({_QUOTED}|{_PLAIN})\s*\)|({_QUOTED}|{_PLAIN})")
_WRAPPED = re.compile(
    r"(?:array|tensor|set|frozenset|list)\((.*?)(?:,\s*dtype=[\w.'<>]+)?\)", re.DOTALL
)
_WORDS = {"true": True, "True": True, "false": False, "False": False}
_BETWEEN = re.compile(r"\s*,\s*|\s+")


def printed_list(text: str) -> list[Any] | None:
    """Return the items of a list, tuple, set or array printed by Python, JSON or NumPy; None for any other text."""
    text = text.strip()
    if match := _WRAPPED.fullmatch(text):
        text = match[1].strip() or "[]"
    if len(text) < 2 or text[0] + text[-1] not in ("[]", "()", "{}"):
        return None
    inside, items, place = text[1:-1].strip(), [], 0
    while place < len(inside):
        match = _ITEM.match(inside, place)
        if match is None:
            return _bare_words(inside) if text[0] == "[" else None
        items.append(_item(match[1] or match[2]))
        between = _BETWEEN.match(inside, match.end())
        if between is None and match.end() < len(inside):
            return _bare_words(inside) if text[0] == "[" else None
        place = between.end() if between else match.end()
    return items


def _bare_words(inside: str) -> list[Any] | None:
    """Return the items of a list of unquoted names, such as ``[joy, love]``, or None."""
    parts = [part.strip() for part in inside.split(",")]
    bare = len(parts) > 1 and all(parts) and not re.search(r"""['"\[\](){}:]""", inside)
    return parts if bare else None


def _item(token: str) -> Any:
    if token[0] in "'\"":
        try:
            return ast.literal_eval(token)
        except (ValueError, SyntaxError):
            return token[1:-1]
    if token in _WORDS:
        return _WORDS[token]
    if token in ("None", "null", "nan", "NaN"):
        return None
    return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)


def _from_printed(
    texts: Sequence[str],
    parsed: Sequence[list[Any] | None],
    where: Where,
    names: Sequence[str] | None,
    labels: Sequence[str] | None,
    column: str,
) -> Several:
    """Read a column of printed lists; raise DataError if it has other text too."""
    lists = [i for i, found in enumerate(parsed) if found is not None]
    other = next((i for i, found in enumerate(parsed) if found is None), None)
    if other is not None:
        if labels is not None and all(text in labels for text in texts):
            return Several(None)
        raise DataError(
            f"{where(other)}: {column} holds {_short(texts[other])}, but {where(lists[0])} holds the printed list "
            f"{_short(texts[lists[0]])}. Write every row as a list, [] where no class fits."
        )
    found = _from_lists([list(items or ()) for items in parsed], where, names, labels, column)
    found.notes.insert(
        0, f"{column}: printed lists, such as {_short(texts[0])}, are read as lists of labels"
    )
    return found


def _parts(text: str, mark: str) -> list[str]:
    if mark == "><":  # tags such as <python><pandas>
        return [part.strip() for part in text.strip()[1:-1].split("><") if part.strip()]
    return list(dict.fromkeys(part.strip() for part in text.split(mark) if part.strip()))


def _separator(
    texts: Sequence[str], labels: Collection[str] | None, column: str, always: bool
) -> tuple[str, list[str]]:
    """Detect the separator of names in one cell from the whole column; return it ("" for none) and lines to print.

    A mark is a separator if at least 90 % of the parts of cells with it also occur in other cells.

    Raises:
        DataError: fewer of the parts do, but some, so the column is ambiguous.
    """
    cells = {text.strip() for text in texts if text.strip()}
    if labels is not None:
        known = {str(label).strip() for label in labels}
        if cells <= known:
            return "", []
        for mark in _MARKS:
            if all(cell in known or set(_parts(cell, mark)) <= known for cell in cells):
                return mark, []
    if cells and all(re.fullmatch(r"(<[^<>]+>)+", cell) for cell in cells):
        return "><", []
    notes = []
    for mark in _MARKS:
        split = {cell: _parts(cell, mark) for cell in cells if len(cell) < 1000}
        joined = sorted(cell for cell, parts in split.items() if len(parts) > 1)
        if not joined:
            continue
        holders = Counter(part for parts in split.values() for part in parts)
        parts = {part for cell in joined for part in split[cell]}
        share = sum(holders[part] > 1 for part in parts) / len(parts)
        either = (
            f"{option('label_separator', mark)} reads several labels, "
            f"{option('problem', 'single_label')} one class for each text"
        )
        if mark == "," and all(re.fullmatch(r"[+-]?\d+(,\d+)?", cell) for cell in cells):
            raise DataError(
                f"{column} holds {_short(joined[0])}, which can be a number with a decimal comma "
                f"({option('task', 'regression')}) or several class numbers "
                f"({option('label_separator', mark)}). Say which."
            )
        numbers = all(part.isdecimal() for parts in split.values() for part in parts)
        if share >= _RECURRING or numbers or (always and share > 0):
            text = f"{column}: {mark!r} stands between several labels of a row, such as {_short(joined[0])} ({either})"
            return mark, [text]
        if share > 0:
            raise DataError(
                f"{column} holds {_short(joined[0])} and other texts with {mark!r}, some of whose parts are labels of "
                f"other rows too, so they can be several labels or one: {either}."
            )
        if all(number_in(part) is None for part in parts):
            notes.append(
                f"{column}: {len(joined)} classes have {mark!r} in their name, such as {_short(joined[0])}; each is "
                f"one class ({option('label_separator', mark)} reads several labels)"
            )
    return "", notes


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
