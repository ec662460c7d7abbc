"""Labels: from what stands in a column to classes 0..k-1 with names, the same for training and every other part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.errors import DataError, did_you_mean
from pretrain.storage.files import note

__all__ = [
    "LabelMap",
    "finite_numbers",
    "is_missing",
    "make_label_map",
    "make_tag_map",
    "number_in",
]

_SHOWN = 3
_MANY = 1000
_FEW_ROWS = 20

Where = Callable[[int], str]


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class LabelMap:
    """The classes of a column.

    Args:
        labels: names of the classes; the place of a name is the id of its class.
        codes: the id of every spelling that a column may hold (as text), when it differs from the name.
    """

    labels: tuple[str, ...]
    codes: Mapping[str, int]

    @classmethod
    def learn(
        cls,
        values: Sequence[Any],
        given: Sequence[Any] | Mapping[Any, str] | None = None,
        *,
        names: Sequence[str] | None = None,
        where: Where | None = None,
        column: str = "label",
    ) -> LabelMap:
        """Find the classes in the training rows.

        Without `given` or `names`, text keeps its spelling and classes are sorted: numbers by size, text by character.

        Args:
            values: one text, whole number or bool for each row.
            given: names in the order of their ids, fixed by the caller, or a dict from value to name. Names for a
                column of numbers belong to 0..k-1 or, if k occurs and 0 does not, to 1..k.
            names: names of the classes whose numbers the column holds (``Table.label_names``).
            where: where a row stands, for errors.
            column: name of the column, for errors.

        Raises:
            DataError: missing labels, numbers that are not whole, one class only, a value that is not in `given`, or
                so many classes that the column looks like text.
        """
        at = where or (lambda i: f"row {i + 1}")
        texts = _spelled(values, at, column)
        if given is not None:
            made = _given(given, texts, column)
        elif names is not None:
            codes = {str(k): k for k in range(len(names))}
            spelled = {str(name): k for k, name in enumerate(names)}
            # Names that are numbers themselves would be taken for ids, so they are no spelling of a class.
            made = cls(tuple(spelled), codes if codes.keys() & spelled.keys() else codes | spelled)
        else:
            labels = _sorted_labels(texts, values, at, column)
            made = cls(labels, {label: k for k, label in enumerate(labels)})
        made._check(texts, at, column, "the labels given" if given is not None else "its classes")
        return made

    def ids(
        self, values: Sequence[Any], *, where: Where | None = None, column: str = "label"
    ) -> list[int]:
        """Return the class ids of a column; DataError for a missing label or one that training did not have."""
        at = where or (lambda i: f"row {i + 1}")
        texts = _spelled(values, at, column)
        self._check(texts, at, column, "the labels of the training rows")
        return [self.codes[text] for text in texts]

    def _check(self, texts: Sequence[str], at: Where, column: str, what: str) -> None:
        strange = [i for i, text in enumerate(texts) if text not in self.codes]
        if not strange:
            return
        unknown = list(dict.fromkeys(texts[i] for i in strange))
        first = texts[strange[0]]
        more = f" ({len(unknown)} such values: {_listed(unknown)})" if len(unknown) > 1 else ""
        near = did_you_mean(first, self.labels)
        near = near if "mean" in near else ""
        near += " In public test sets -1 marks a row without a label." if first == "-1" else ""
        raise DataError(
            f"{at(strange[0])}: {column} {_short(first)!r} is not among {what}: {_listed(self.labels)}.{near}{more} "
            "Correct the row, or list every label, in order, with labels=[...]."
        )


def make_label_map(
    values: Sequence[Any],
    given: Sequence[Any] | Mapping[Any, str] | None = None,
    *,
    names: Sequence[str] | None = None,
    where: Where | None = None,
    column: str = "label",
) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the classes and the class id of every row; see :meth:`LabelMap.learn`."""
    made = LabelMap.learn(values, given, names=names, where=where, column=column)
    return made.labels, made.ids(values, where=where, column=column)


def make_tag_map(
    rows: Sequence[Any],
    given: Sequence[Any] | Mapping[Any, str] | None = None,
    *,
    names: Sequence[str] | None = None,
    where: Where | None = None,
    column: str = "tags",
) -> tuple[LabelMap, list[list[int]]]:
    """Return the classes and ids of a column whose cells are lists: the tags of words, or several labels of a row.

    Raises:
        DataError: a cell that is no list, and as :meth:`LabelMap.learn`, with the place in the list.
    """
    at = where or (lambda i: f"row {i + 1}")
    flat: list[Any] = []
    places: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise DataError(
                f"{at(i)}: {column} holds {_short(repr(row))}, not a list of labels. Give a list for every row."
            )
        flat.extend(row)
        places.extend((i, k) for k in range(len(row)))

    def inside(j: int) -> str:
        return f"{at(places[j][0])}, item {places[j][1] + 1}"

    made = LabelMap.learn(flat, given, names=names, where=inside, column=column)
    ids = iter(made.ids(flat, where=inside, column=column))
    return made, [[next(ids) for _ in row] for row in rows]


# ------------------------------------------------------------------------------------------------- values


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(_short(label) for label in labels[:12])
    return f"{shown}, ... ({len(labels)} in all)" if len(labels) > 12 else shown


def _spelled(values: Sequence[Any], at: Where, column: str) -> list[str]:
    """Return every value as text; whole floats as integers, since a gap turns a column of integers into floats."""
    missing = [i for i, value in enumerate(values) if is_missing(value)]
    if missing:
        places = "; ".join(at(i) for i in missing[:_SHOWN])
        more = ", ..." if len(missing) > _SHOWN else ""
        raise DataError(
            f"{len(missing):,} of {len(values):,} rows have no {column}: {places}{more}. Label these rows or remove "
            "them; a row without an answer cannot be learned from."
        )
    texts: list[str] = []
    kinds: dict[str, int] = {}
    for i, value in enumerate(values):
        value = value.item() if hasattr(value, "dtype") and hasattr(value, "item") else value
        if isinstance(value, bool | str):
            kind, text = type(value).__name__, str(value)
        elif isinstance(value, int):
            kind, text = "number", str(value)
        elif isinstance(value, float):
            kind, text = "number", str(int(value)) if value.is_integer() else repr(value)
        else:
            cure = (
                "one label" if isinstance(value, list | tuple | dict) else "text or a whole number"
            )
            raise DataError(
                f"{at(i)}: {column} holds {type(value).__name__} {_short(repr(value))!r}; a row must have {cure}."
            )
        kinds.setdefault(kind, i)
        texts.append(text)
    if len(kinds) > 1:
        (one, i), (other, j) = list(kinds.items())[:2]
        raise DataError(
            f"{column} mixes kinds: {values[i]!r} is a {one} ({at(i)}), {values[j]!r} a {other} ({at(j)}). Write all "
            "labels in one way."
        )
    return texts


def number_in(text: str) -> float | None:
    """Return the finite number that a text spells, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def finite_numbers(
    values: Sequence[Any], where: Where, *, what: str, cure: str, bools: bool = False
) -> list[float]:
    """Return a column as finite numbers.

    Args:
        values: numbers, or texts that spell them.
        where: where a row stands, for errors.
        what: what the values are called: ``targets``.
        cure: the sentence that says what to do about those that are none.
        bools: False and True are 0 and 1.

    Raises:
        DataError: names the first rows whose value is no finite number.
    """
    found, wrong = [], []
    for i, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, bool) and not bools else float(value)
        except (TypeError, ValueError):
            number = math.nan
        found.append(number)
        if not math.isfinite(number):
            wrong.append(f"{where(i)}: {value!r}")
    if wrong:
        shown = "; ".join(wrong[:_SHOWN]) + "; ..." * (len(wrong) > _SHOWN)
        raise DataError(f"{len(wrong)} {what} are no finite numbers: {shown}. {cure}")
    return found


def _sorted_labels(
    texts: Sequence[str], values: Sequence[Any], at: Where, column: str
) -> tuple[str, ...]:
    counts = Counter(texts)
    distinct = list(counts)
    if not distinct:
        raise DataError(f"{column} has no rows, so there are no classes.")
    numbers = {text: number_in(text) for text in distinct}
    all_numbers = all(number is not None for number in numbers.values())
    parts = [t for t, number in numbers.items() if number is not None and not number.is_integer()]
    if parts and all_numbers:
        i = texts.index(parts[0])
        raise DataError(
            f"{column} holds numbers that are not whole, such as {values[i]!r} ({at(i)}), so it is a quantity and not "
            f'a class: use task="regression". If they are names of {len(distinct)} classes, list them: labels=[...].'
        )
    if len(distinct) == 1:
        raise DataError(
            f"all {len(texts):,} rows have the {column} {_short(distinct[0])!r}; two classes at least are needed to "
            "learn from. Check the column, or that the rows were not sorted and cut."
        )
    unique = len(distinct) == len(texts) and len(texts) >= _FEW_ROWS
    if unique or len(distinct) > max(_MANY, len(texts) / 2):
        i = texts.index(distinct[0])
        raise DataError(
            f"{column} has {len(distinct):,} different values in {len(texts):,} rows, such as "
            f"{_short(distinct[0])!r} ({at(i)}); it looks like text or an id and not like classes. Name the column of "
            'the label, for example label="category".'
        )
    folded: dict[str, str] = {}
    for text in distinct:
        twin = folded.setdefault(text.strip().casefold(), text)
        if twin != text:
            note(
                f"{column}: {twin!r} and {text!r} differ only in case or blanks and are two classes"
            )
    if all_numbers:
        return tuple(sorted(distinct, key=lambda text: (numbers[text] or 0.0, text)))
    return tuple(sorted(distinct))


def _given(given: Sequence[Any] | Mapping[Any, str], texts: Sequence[str], column: str) -> LabelMap:
    """Return the map that the caller's labels describe; see :meth:`LabelMap.learn` for numbers."""
    if isinstance(given, str) or not given:
        raise DataError(
            f"labels={given!r} must list the labels, as labels=['negative', 'positive']."
        )
    pairs = list(given.items()) if isinstance(given, Mapping) else [(name, name) for name in given]
    names = _spelled([name for _, name in pairs], lambda i: f"label {i + 1} of labels", "name")
    labels = tuple(dict.fromkeys(names))
    if len(labels) < len(names) and not isinstance(given, Mapping):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise DataError(f"labels={_listed(names)} names {twice!r} twice; list every class once.")
    if len(labels) < 2:
        raise DataError(
            f"labels={_listed(names)} names one class only; two at least are needed to learn from."
        )
    keys = _spelled([key for key, _ in pairs], lambda i: f"value {i + 1} of labels", "value")
    codes = {key: labels.index(name) for key, name in zip(keys, names, strict=True)}
    present = set(texts)
    if isinstance(given, Mapping) or present & codes.keys() or not present:
        return LabelMap(labels, codes)
    count = len(labels)
    from_zero, from_one = {str(k) for k in range(count)}, {str(k) for k in range(1, count + 1)}
    if present <= from_one and str(count) in present:
        return LabelMap(labels, {str(k + 1): k for k in range(count)})
    if present <= from_zero and "0" in present:
        return LabelMap(labels, {str(k): k for k in range(count)})
    if present <= from_zero:
        raise DataError(
            f"{column} holds the numbers {_listed(sorted(present))}, which could count the {count} labels from 0 or "
            "from 1. Say it with a dict: labels={"
            + f"1: {labels[0]!r}, 2: {labels[1]!r}, ..."
            + "}."
        )
    return LabelMap(labels, codes)
