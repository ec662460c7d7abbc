"""Labels: class ids 0..k-1 with names for the values of a column, columns of several labels per row, and numbers.

Several labels per row are published as lists of names or of class numbers, vectors of zeros and ones, printed forms of
both in a text file, names joined by a separator, and mappings from name to 0 or 1. The form is determined for a whole
column, not cell by cell.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from pretrain.config.spelling import column as column_option
from pretrain.config.spelling import option, trains
from pretrain.data.tables import shortened, shown
from pretrain.errors import DataError, suggestion
from pretrain.utils.files import note

__all__ = [
    "LABEL_FORMS",
    "LabelMap",
    "MultiLabelColumn",
    "NameList",
    "blanks_note",
    "exact_number",
    "finite_numbers",
    "flattened",
    "in_digits",
    "is_missing",
    "is_on",
    "listed",
    "make_tag_map",
    "number_in",
    "printed_list",
    "printed_mapping",
    "read_several",
    "spelled",
    "unlabelled_note",
    "unprinted",
]  # fmt: skip

_EMPTY = "[] (zeros, where the lists are vectors of 0 and 1)"
_SHOWN = 3
_MANY = 1000
_FEW_ROWS = 20
_UNUSED = 10  # values of an order without a row that are classes, besides as many as have rows
LARGEST = 1e37  # largest target; differences and sums over a batch still fit single precision

_UNLABELLED = ("-1", "-")  # the second is that of SNLI, where the annotators disagreed
_PRINTED_AS_MISSING = {
    "nan",
    "NaN",
    "None",
    "null",
    "NULL",
    "N/A",
    "n/a",
    "NA",
    "<NA>",
    "#N/A",
    "?",
}
_MARKS = ("|", ";", ",")  # separators of names in one cell
# Marks that names have in them more often.
_RARER = ("\n", "\t", "，", "、", "；", "•", "#", "/", "+", "&", ":", " ")
_IN_SIGNS = "#/+&:"  # those that stand within times, fractions and signs: 12:30, 1/2, +/-
_GIVEN = "the labels given"
_PAIRS = {"0,0", "0,1", "1,0", "1,1"}
_MANY_CELLS = 10_000  # different labels, more of which are not searched for parts that only recur
_RECURRING = 0.9  # share of the parts of joined cells that must occur in other cells too
LABEL_FORMS = ("vectors", "numbers")  # what lists of zeros and ones can be
_SPELLED = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}

Where = Callable[[int], str]
_Parsed = Sequence[list[Any] | None]  # what each text prints, None where it is no list


def _row(i: int) -> str:
    return f"row {i + 1}"


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class LabelMap:
    """The classes of a column.

    A value is looked up as it is written, then without regard to case, blanks and the form of a number, if one class
    alone is meant. Where there are two, 0 and 1, or False and True, the one pair stands for the other.

    Args:
        labels: names of the classes; the index of a name is the id of its class.
        codes: the class id of every value (as text) that a column may contain. A name without a code is accepted too,
            unless it is a number.
        chosen: whether the caller is known to have named the classes. Where that is so, by this or by codes without a
            label, and the codes tell no name of a source, the numbers of a source with other names count.
    """

    labels: tuple[str, ...]
    codes: Mapping[str, int]
    chosen: bool = False

    @classmethod
    def learn(
        cls,
        values: Sequence[Any],
        given: Sequence[Any] | Mapping[Any, str] | None = None,
        *,
        names: Sequence[str] | None = None,
        checkpoint: Sequence[str] | None = None,
        order: Sequence[Any] | None = None,
        where: Where = _row,
        column: str = "label",
    ) -> LabelMap:
        """Determine the classes from the training rows.

        Without `given`, `names` and `checkpoint`, the classes are those of `order` (``Table.orders``), or else the
        distinct values, sorted by size if all are numbers and by character otherwise. Values of `order` without a row
        are classes if they are at most ten more than those with one: many are left from the rows of another selection.

        Args:
            values: one string, integer or bool per row.
            given: names in the order of their ids, or a dict from value to name, set by the caller. Names for a column
                of numbers belong to 0..k-1 or, if k occurs and 0 does not, to 1..k.
            names: names of the classes whose numbers the column contains (``Table.label_names``).
            checkpoint: names of the classes of the checkpoint that is fine-tuned, whose order is kept; the column
                contains these names or their numbers.
            order: all values that the column may hold, in the order that its source declares.
            where: returns the location of a row, for error messages.
            column: name of the column, for error messages.

        Raises:
            DataError: labels are missing, numbers are not whole, there is only one class, a value is not in `given`,
                or there are so many classes that the column looks like text.
        """
        cells = _Cells(values, where, column)
        if "-100" in cells.texts and not given:
            raise DataError(
                f"{cells.place(cells.texts.index('-100'))} -100 is no class: in rows that are tokens already it marks "
                "those without a label. Give whole words or texts with a label each, and leave these out."
            )
        what = "its classes"
        if given is not None:
            made, what = _given(given, cells, names), _GIVEN
        elif checkpoint is not None:
            made, what = _of_checkpoint(checkpoint, cells, names), "the classes of the checkpoint"
        elif names is not None:
            made = cls.numbered(names)
        else:
            labels = _in_order(_sorted_labels(cells), order or (), column)
            made = cls(labels, {label: k for k, label in enumerate(labels)})
        made._ids(cells, names, made._spellings, what)
        return made

    @classmethod
    def numbered(cls, names: Sequence[str]) -> LabelMap:
        """Return classes for a column that contains either their numbers or their names.

        Raises:
            DataError: two classes have one name.
        """
        spelled = {str(name).strip(): k for k, name in enumerate(names)}
        if shared := _shared(texts := [str(name) for name in names]):
            name, numbers = next(iter(shared.items()))
            raise DataError(
                f"Of the names of the classes, {_listed(texts)}, the classes {_all(numbers)} have the same, {name!r}. "
                "Give each class a name of its own."
            )
        return cls(tuple(spelled), _positions(names) | spelled)

    def ids(
        self,
        values: Sequence[Any],
        *,
        names: Sequence[str] | None = None,
        where: Where = _row,
        column: str = "label",
    ) -> list[int]:
        """Return the class ids of a column; the arguments are those of `learn`, and ``names`` may be in another order.

        Raises:
            DataError: a label is missing, or did not occur in training.
        """
        spellings = self._spellings
        if self.codes.keys() == self._own.keys():
            # A loaded model has only class names; their numbers are equivalent.
            spellings |= _positions(self.labels)
        cells = _Cells(values, where, column)
        return self._ids(cells, names, spellings, "the labels of the training rows")

    def named(self, names: Sequence[str]) -> list[int | None]:
        """Return the class id of each class of another source by its name; None of a name that is not known here."""
        # Codes that are numbers count values of a column, while a name that is a number can only be that of a label.
        numbers = {text: k for text, k in self._own.items() if number_in(text) is not None}
        find = _id_finder({**self._spellings, **numbers})
        own = [str(name).strip() for name in names]
        return [*range(len(own))] if self._has_shared(own) else [find(name) for name in own]

    def _has_shared(self, own: Sequence[str]) -> bool:
        """Whether a source has the classes of the model in their order, several of one name, so that places count.

        Without such a name, the codes count: the caller may have exchanged two names.
        """
        return bool(_shared(self.labels)) and own == [label.strip() for label in self.labels]

    def spelled(self) -> list[str]:
        """Return a text for each class that `ids` reads: its label, or its number where several have one name."""
        numbers = {k: text for text, k in self.codes.items() if number_in(text) is not None}
        counted = bool(_shared(self.labels)) and len(numbers) == len(self.labels)
        return [numbers[k] if counted else label for k, label in enumerate(self.labels)]

    @property
    def _own(self) -> dict[str, int]:
        return {label.strip(): k for k, label in enumerate(self.labels)}

    @property
    def _spellings(self) -> dict[str, int]:
        return {t: k for t, k in self._own.items() if number_in(t) is None} | dict(self.codes)

    @property
    def _numbered(self) -> bool:
        """Whether the caller named classes that the source of the training rows had by their numbers alone."""
        names = {text for text in self.codes if number_in(text) is None}
        given = self.chosen or not any(
            t in self.codes or number_in(t) is not None for t in self._own
        )
        return len(names) < len(self.codes) and names <= self._own.keys() and given

    def _ids(
        self, cells: _Cells, names: Sequence[str] | None, spellings: Mapping[str, int], what: str
    ) -> list[int]:
        """Return the class ids of a column, whose source calls its classes ``names``; ``what`` is for messages."""
        find = _id_finder(spellings)
        own = None if names is None else [str(name).strip() for name in names]
        of_names = {} if own is None else self._of_source(own, cells)

        def read(text: str) -> tuple[str, int | None]:
            if text in of_names:
                return of_names[text]
            outside = bool(of_names) and cells.numeric and number_in(text) is not None
            return text, None if outside else find(text)

        found = {text: read(text) for text in dict.fromkeys(cells.texts)}
        told = [found[text][0] for text in cells.texts]
        strange = [i for i, text in enumerate(cells.texts) if found[text][1] is None]
        if strange:
            raise DataError(self._unknown(cells, told, strange, what, own if of_names else None))
        self._check_mixed(cells, told, spellings)
        same = own is not None and self._has_shared(own)
        self._check_shared(cells, cells.texts if same else told)
        return [k for text in cells.texts if (k := found[text][1]) is not None]

    def _of_source(self, own: Sequence[str], cells: _Cells) -> dict[str, tuple[str, int | None]]:
        """Return the name and class id of what a column of the classes ``own`` may hold; {} if numbers count."""
        pairs = list(zip(own, self.named(own), strict=True))
        # Where one side has numbers in place of names, there is nothing to compare, and numbers count.
        nameless = any(map(_nameless, (own, self.labels)))
        counted = self._numbered and all(str(i) in self.codes for i in range(len(own)))
        if any(k is not None for _, k in pairs) or not (nameless or counted):
            by_number = {str(i): pair for i, pair in enumerate(pairs)}
            return by_number | ({} if cells.numeric else dict(zip(own, pairs, strict=True)))
        if not nameless:
            note(
                f"{cells.column}: none of the classes {_listed(own)} is called as the labels that were given, so "
                f"their numbers count: {_listed(self.labels)}",
                once=True,
            )
        return {}

    def _check_shared(self, cells: _Cells, texts: Sequence[str]) -> None:
        """Refuse a name that several classes have, as ``crane`` in checkpoints of ImageNet."""
        shared = {_plain(name): (name, numbers) for name, numbers in _shared(self.labels).items()}
        alone = {label.strip() for label in self.labels} - {name for name, _ in shared.values()}
        for i, text in enumerate(texts if shared else ()):
            if text not in alone and number_in(text) is None and _plain(text) in shared:
                name, numbers = shared[_plain(text)]
                raise DataError(
                    f"{cells.place(i)} {shortened(text)} does not tell which class is meant, because the classes "
                    f"{_all(numbers)} of the model are called {name!r}. Give the numbers of the classes, for all rows."
                )

    def _check_mixed(
        self, cells: _Cells, texts: Sequence[str], spellings: Mapping[str, int]
    ) -> None:
        """Refuse names beside numbers where both are spellings of the classes."""
        labels, numbers = set(self.labels), {str(k) for k in range(len(self.labels))}
        if numbers & labels or not numbers | labels <= spellings.keys():
            return
        name = next((i for i, text in enumerate(texts) if text in labels), None)
        number = next((i for i, t in enumerate(texts) if t not in labels and t.isdigit()), None)
        if name is not None and number is not None:
            raise DataError(
                f"{cells.column} mixes names and numbers of classes: {texts[name]!r} ({cells.where(name)}) and "
                f"{texts[number]!r} ({cells.where(number)}). Write all labels in one way."
            )

    def _unknown(
        self,
        cells: _Cells,
        texts: Sequence[str],
        strange: Sequence[int],
        what: str,
        own: Sequence[str] | None,
    ) -> str:
        """Return the message about ``texts``, of which the rows ``strange`` have no class."""
        unknown = list(dict.fromkeys(texts[i] for i in strange))
        first = texts[strange[0]]
        more = f" ({len(unknown)} such values: {_listed(unknown)})" if len(unknown) > 1 else ""
        similar = suggestion(first, self.labels)
        unlabelled = f" In public test sets {first} marks a row without a label."
        near = similar + unlabelled * (first in _UNLABELLED)
        cure = "Correct the row, or leave it out: the model knows no other classes."
        if trains():
            cure = f"Correct the row, or list every label, in order: {option('labels', [...])}."
        joined = any(mark in text for text in unknown for mark in (*_MARKS, " "))
        alien = len(strange) == len(texts) and not (joined or similar)
        if what == _GIVEN and own is None and alien:
            near = ""
            numbers = {text: exact_number(text) for text in unknown}
            keys = [text if number is None else number for text, number in numbers.items()]
            keys.sort(key=lambda key: (isinstance(key, str), key))
            pairs = dict(zip(keys, self.labels[:12], strict=False))
            cure = (
                "None of the labels is among the values, and nothing says which value is which label. Give a dict of "
                f"value and label: {option('labels', pairs)}."
            )
        if own is not None and first in own:
            cure = (
                f"The numbers of the column stand for the classes {_listed(own)}, which are recognised by their names. "
                "Rename them in their source as the labels are called."
            )
        return (
            f"{cells.place(strange[0])} {shortened(first)} is not among {what}: {_listed(self.labels)}.{near}{more} "
            f"{cure}"
        )


class _Cells:
    """The labels of a column as texts, and the location of their rows; the arguments are those of `LabelMap.learn`.

    Raises:
        DataError: a value is missing, or the values are of several kinds or of one that is no label.
    """

    def __init__(self, values: Sequence[Any], where: Where, column: str) -> None:
        self.values, self.where, self.column = values, where, column
        self.numeric = not any(isinstance(value, str) for value in values[:1])
        if missing := [i for i, value in enumerate(values) if is_missing(value)]:
            places = "; ".join(where(i) for i in missing[:_SHOWN]) + ", ..." * (
                len(missing) > _SHOWN
            )
            raise DataError(
                f"{len(missing):,} of {len(values):,} rows have no {column}: {places}. Label these rows or remove "
                "them; training and evaluation need a label in every row."
            )
        self.texts: list[str] = []
        kinds: dict[str, int] = {}
        for i, value in enumerate(values):
            value = value.item() if hasattr(value, "dtype") and hasattr(value, "item") else value
            value = _whole(value)
            if not isinstance(value, bool | str | int | float):
                several = isinstance(value, list | tuple | dict)
                cure = "one label" if several else "text or a whole number"
                raise DataError(
                    f"{self.place(i)} holds {type(value).__name__} {shortened(value)}; a row must have {cure}."
                )
            kind = type(value).__name__ if isinstance(value, bool | str) else "number"
            kinds.setdefault(kind, i)
            self.texts.append(spelled(value))
        if len(kinds) > 1:
            (one, i), (other, j) = list(kinds.items())[:2]
            raise DataError(
                f"{column} mixes kinds: {values[i]!r} is a {one} ({where(i)}), {values[j]!r} a {other} ({where(j)}). "
                "Write all labels in one way."
            )

    def place(self, i: int) -> str:
        """Return how a message about the label of row `i` begins: ``reviews.csv, line 13: label``."""
        return f"{self.where(i)}: {self.column}"


def make_tag_map(
    rows: Sequence[Any],
    given: Sequence[Any] | Mapping[Any, str] | None = None,
    *,
    names: Sequence[str] | None = None,
    checkpoint: Sequence[str] | None = None,
    where: Where = _row,
    column: str = "tags",
) -> tuple[LabelMap, list[list[int]]]:
    """Return the classes and ids of a column of lists: the tags of words, or several labels per row.

    Raises:
        DataError: a cell is not a list, or as in :meth:`LabelMap.learn`, with the position in the list.
    """
    flat, inside = flattened(rows, where, column)
    made = LabelMap.learn(
        flat, given, names=names, checkpoint=checkpoint, where=inside, column=column
    )
    ids = iter(made.ids(flat, names=names, where=inside, column=column))
    return made, [[next(ids) for _ in row] for row in rows]


def flattened(
    rows: Sequence[Any], where: Where = _row, column: str = "tags"
) -> tuple[list[Any], Where]:
    """Return the items of all lists of a column, and a function that returns the location of an item.

    Raises:
        DataError: a cell is not a list.
    """
    flat: list[Any] = []
    places: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise DataError(
                f"{where(i)}: {column} holds {shortened(row)}, not a list of labels. Give a list for every row."
            )
        flat.extend(row)
        places.extend((i, k) for k in range(len(row)))

    def inside(j: int) -> str:
        return f"{where(places[j][0])}, item {places[j][1] + 1}"

    return flat, inside


# ------------------------------------------------------------------------------------------------- values


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(label if len(label) <= 60 else label[:57] + "..." for label in labels[:12])
    return f"{shown}, ... ({len(labels)} in all)" if len(labels) > 12 else shown


def _whole(value: Any) -> Any:
    """Return a whole ``Decimal``, as which databases export class numbers, as an integer, and other values as they are.

    Labels of classes alone are read so: targets and other cells keep their type, by which runs know their rows.
    """
    decimal = isinstance(value, Decimal) and value.is_finite() and value.adjusted() < 18
    return int(value) if decimal and value == int(value) else value


def spelled(value: Any) -> str:
    """Return a value as text; whole floats as integers, since missing values turn integers into floats."""
    value = _whole(value)
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value).strip()


def exact_number(text: str) -> int | float | None:
    """Return the finite number that a text spells, or None; all digits of an integer count."""
    return int(text) if re.fullmatch(r"[+-]?\d{1,300}", text) else number_in(text)


def _plain(text: str) -> str | float:
    """Return what the spellings of one value have in common: its number, or its visible characters without case."""
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")
    number = exact_number(text)
    folded = unicodedata.normalize("NFKC", visible).casefold()
    return " ".join(folded.split()) if number is None else number


def _id_finder(spellings: Mapping[str, int]) -> Callable[[str], int | None]:
    """Return a function from a text to its class id, as `LabelMap` looks it up; None if none or several are meant."""
    alike: dict[str | float, set[int]] = {}
    for text, k in spellings.items():
        alike.setdefault(_plain(text), set()).add(k)
    numbers, bools = {key for key in alike if not isinstance(key, str)}, {"false", "true"}
    if numbers == {0, 1} and not bools & alike.keys():
        alike |= {"false": alike[0], "true": alike[1]}
    elif not numbers and bools <= alike.keys():
        alike |= {0: alike["false"], 1: alike["true"]}

    def find(text: str) -> int | None:
        if text in spellings:
            return spellings[text]
        found = alike.get(_plain(text), set())
        return next(iter(found)) if len(found) == 1 else None

    return find


def _positions(names: Sequence[str]) -> dict[str, int]:
    """Return number -> class id; none if a name is a number itself, for which a number could be mistaken."""
    if any(number_in(str(name)) is not None for name in names):
        return {}
    return {str(k): k for k in range(len(names))}


def _shared(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the names that several classes have, with the numbers of these."""
    by_name: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        by_name.setdefault(name.strip(), []).append(k)
    return {name: numbers for name, numbers in by_name.items() if len(numbers) > 1}


def _all(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _nameless(names: Sequence[str]) -> bool:
    """Whether the classes have only numbers from 0, as they are or as transformers writes them (``LABEL_0``)."""
    return all(name == f"LABEL_{k}" or exact_number(name) == k for k, name in enumerate(names))


def blanks_note(values: Iterable[Any], column: str) -> list[str]:
    """Return a line about labels with surrounding whitespace, which is stripped; an empty list if there are none."""
    padded = [value for value in values if isinstance(value, str) and value != value.strip()]
    if not padded:
        return []
    return [f"{column}: blanks around {len(padded):,} labels, such as {padded[0]!r}, are left out"]


def unlabelled_note(values: Sequence[Any], labels: Sequence[str], column: str) -> list[str]:
    """Return lines about classes that mark missing labels elsewhere: ``-`` beside names, and what pandas prints."""
    printed = [label for label in labels if label in _PRINTED_AS_MISSING]
    if printed and len(labels) > len(printed):
        return [
            f"{column}: {shown(printed)} {'are classes' if len(printed) > 1 else 'is a class'} here, and is often what "
            "is written for a missing label; such rows are then to be left out"
        ]
    count = sum(isinstance(value, str) and value.strip() == "-" for value in values)
    if not count or not any(character.isalpha() for label in labels for character in label):
        return []
    return [
        f"{column}: '-' is a class, of {count:,} of {len(values):,} rows; in SNLI it marks those whose annotators "
        "disagreed, which are to be left out"
    ]


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
        values: numbers, or strings that spell them.
        where: returns the location of a row, for error messages.
        what: name of the values in messages: ``targets``.
        cure: a sentence on how to correct invalid values, for the error message.
        bools: accept False and True as 0 and 1.

    Raises:
        DataError: a value is not a finite number, or exceeds ``LARGEST``; names the first such rows.
    """
    found = []
    for value in _decimal_points(values, where, what):
        try:
            found.append(math.nan if isinstance(value, bool) and not bools else float(value))
        except (TypeError, ValueError, OverflowError):
            found.append(math.nan)
    if all(abs(number) <= LARGEST for number in found):
        return found
    wrong = [i for i, number in enumerate(found) if not math.isfinite(number)]
    large = [i for i, number in enumerate(found) if LARGEST < abs(number) < math.inf]
    rows, fault = wrong, "are no finite numbers"
    if not wrong:
        rows, fault = large, f"are larger than single precision can train on ({LARGEST:g})"
    places = [
        f"{where(i)}: {shortened(values[i]) if wrong else f'{found[i]:g}'}" for i in rows[:_SHOWN]
    ]
    shown = "; ".join(places) + "; ..." * (len(rows) > _SHOWN)
    texts = (values[i].strip() for i in wrong if isinstance(values[i], str))
    comma = any("," in text and _COMMA.fullmatch(text) for text in texts)
    mixed = "A comma is a decimal one only where all numbers could have it: write points. " * comma
    raise DataError(f"{len(rows):,} {what} {fault}: {shown}. {mixed}{cure}")


# Numbers with a decimal comma and optional points between thousands; and with a decimal point and optional commas.
_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?([eE][+-]?\d+)?")
_POINT = re.compile(r"[+-]?\d{1,3}(,\d{3})*(\.\d+)?([eE][+-]?\d+)?")


# Blanks and apostrophes between thousands, as in ``1 234,5`` and ``1'234.5``.
_THOUSANDS = re.compile(r"[+-]?\d{1,3}([ \u00a0\u2009\u202f'\u2019]\d{3})+([.,]\d+)?")


def in_digits(value: Any) -> Any:
    """Return a number that a text spells without blanks and apostrophes between thousands, and with an ASCII minus."""
    if not isinstance(value, str) or (value.isascii() and " " not in value and "'" not in value):
        return value
    text = value.strip().replace("\u2212", "-")
    text = re.sub("[ \u00a0\u2009\u202f'\u2019]", "", text) if _THOUSANDS.fullmatch(text) else text
    return value if text == value.strip() else text


def _decimal_points(values: Sequence[Any], where: Where, what: str) -> Sequence[Any]:
    """Return numbers in Python's spelling: decimal commas become points, and thousands separators are removed.

    Raises:
        DataError: the commas are ambiguous, as in ``1,234``.
    """
    values = [in_digits(value) for value in values]
    texts = {i: v.strip() for i, v in enumerate(values) if isinstance(v, str) and "," in v}
    if not texts:
        return values
    every = [v.strip() for v in values if isinstance(v, str) and v.strip()]
    # In a column with decimal commas, a number with a point but no comma would be ambiguous, so it is not accepted.
    comma = all(_COMMA.fullmatch(text) and ("," in text or "." not in text) for text in every)
    point = all(_POINT.fullmatch(text) or number_in(text) is not None for text in every)
    if comma and point:
        i = next(iter(texts))
        raise DataError(
            f"{where(i)}: {values[i]!r} can be a number with a decimal comma or with a comma between thousands, and "
            f"nothing in the {what} says which. Write a decimal point, and no commas between thousands."
        )
    if comma:
        note(
            f"{what}: {len(texts):,} numbers are read with a decimal comma, such as {next(iter(texts.values()))}"
        )
    elif not point:
        return values
    spelling = str.maketrans({".": "", ",": "."} if comma else {",": ""})
    return [v.translate(spelling) if i in texts else v for i, v in enumerate(values)]


def _sorted_labels(cells: _Cells) -> tuple[str, ...]:
    """Return the classes that the values of a column are.

    Raises:
        DataError: the values are a quantity, a text or all equal, or one marks rows without a label.
    """
    texts, column = cells.texts, cells.column
    counts = Counter(texts)
    distinct = list(counts)
    if not distinct:
        raise DataError(f"{column} has no rows, so there are no classes.")
    numbers = {text: x for text in distinct if (x := number_in(text)) is not None}
    if len(numbers) < len(distinct):
        numbers = {}  # some are names, so that none counts classes
    parts = [text for text, number in numbers.items() if not number.is_integer()]
    if parts:
        i = texts.index(parts[0])
        quantity = f": use {option('task', 'regression')}" * trains()
        raise DataError(
            f"{column} holds numbers that are not whole, such as {cells.values[i]!r} ({cells.where(i)}), so it is a "
            f"quantity and not a class{quantity}. If they are names of {len(distinct)} classes, list them: "
            f"{option('labels', [...])}."
        )
    values_of = {number: text for text, number in numbers.items()}
    # With -1, 0 and 1 alone, -1 is a class: the sentiment of a text is often written so.
    if len(values_of) > 3 and sorted(values_of) == [*range(-1, len(values_of) - 1)]:
        text = values_of[-1]
        raise DataError(
            f"{cells.place(texts.index(text))} {text} is no class: beside classes that are numbered from 0, it marks "
            f"a row without a label, as {counts[text]:,} of {len(texts):,} rows are. Leave these rows out; if it is a "
            f"class, list all: {option('labels', [text, values_of[0], ...])}."
        )
    if len(distinct) == 1:
        raise DataError(
            f"all {len(texts):,} rows have the {column} {shortened(distinct[0])}; training needs at least two "
            "classes. Check that the column is the right one, and that these rows are not the head of a sorted file."
        )
    unique = len(distinct) == len(texts) and len(texts) >= _FEW_ROWS
    if unique or len(distinct) > max(_MANY, len(texts) / 2):
        raise DataError(
            f"{column} has {len(distinct):,} different values in {len(texts):,} rows, such as "
            f"{shortened(distinct[0])} ({cells.where(0)}); it looks like text or an id and not like classes. Name the "
            f"column of the label, for example {column_option('label', 'category')}."
        )
    folded: dict[str | float, str] = {}
    for text in distinct:
        twin = folded.setdefault(_plain(text), text)
        if twin != text:
            note(
                f"{column}: {twin!r} and {text!r} differ only in case, blanks, accents, invisible characters or the "
                "form of a number and are two classes"
            )
    return tuple(sorted(distinct, key=lambda text: (numbers.get(text, 0.0), text)))


def _in_order(labels: tuple[str, ...], order: Sequence[Any], column: str) -> tuple[str, ...]:
    """Return the labels in the order that their source declares, with its other values unless they are many."""
    declared = tuple(dict.fromkeys(spelled(value) for value in order if not is_missing(value)))
    used = set(labels)
    if not used <= set(declared):
        return labels
    unused = [value for value in declared if value not in used]
    if len(unused) <= len(labels) + _UNUSED:
        return declared
    note(
        f"{column}: {len(unused):,} of the {len(declared):,} values that the column declares have no row and are no "
        f"classes; {option('labels', ['name', ...])} names all that are",
        once=True,
    )
    return tuple(value for value in declared if value in used)


def _given(
    given: Sequence[Any] | Mapping[Any, str], cells: _Cells, names: Sequence[str] | None
) -> LabelMap:
    """Return the label map for the caller's labels; see :meth:`LabelMap.learn` for columns of numbers."""
    if isinstance(given, str) or not given:
        raise DataError(
            f"{option('labels', given)} must list the labels, as {option('labels', ['negative', 'positive'])}."
        )
    if isinstance(given, Mapping):
        numbers = dict[Any, Any](given)
        whole = all(type(k) is int for k in numbers.values())
        if whole and {*numbers.values()} == {*range(len(numbers))}:
            # From names to numbers, as label2id of transformers, in place of the reverse.
            given = sorted(numbers, key=numbers.__getitem__)
    mapped = isinstance(given, Mapping)
    values, called = [*given], [*given.values()] if isinstance(given, Mapping) else [*given]
    spelled = _Cells(called, lambda i: f"label {i + 1} of labels", "name").texts
    labels = tuple(dict.fromkeys(spelled))
    if len(labels) < len(spelled) and not mapped:
        twice = next(name for k, name in enumerate(spelled) if name in spelled[:k])
        raise DataError(f"labels={_listed(spelled)} names {twice!r} twice; list every class once.")
    if len(labels) < 2:
        raise DataError(
            f"labels={_listed(spelled)} names one class only; training needs at least two."
        )
    keys = _Cells(values, lambda i: f"value {i + 1} of labels", "value").texts
    codes = {key: labels.index(name) for key, name in zip(keys, spelled, strict=True)}
    find = _id_finder(codes)
    if names is not None:
        return LabelMap(labels, _renamed(names, codes, find, mapped))
    present, count = {_plain(text) for text in cells.texts}, len(labels)
    if mapped or not present or any(find(text) is not None for text in cells.texts):
        return LabelMap(labels, codes)
    if count == 2 and present <= {"false", "true"}:
        return LabelMap(labels, {"False": 0, "True": 1})
    for first, telling in ((1, count), (0, 0)):
        if telling in present and present <= {*range(first, first + count)}:
            return LabelMap(labels, {str(k + first): k for k in range(count)})
    if present <= {*range(count)}:
        raise DataError(
            f"{cells.column} holds the numbers {_listed(sorted(set(cells.texts)))}, which could count the {count} "
            "labels from 0 or from 1. Give a dict of number and label: "
            f"{option('labels', {1: labels[0], 2: labels[1], ...: ...})}."
        )
    return LabelMap(labels, codes)


def _renamed(
    names: Sequence[str],
    codes: Mapping[str, int],
    find: Callable[[str], int | None],
    mapped: bool,
) -> dict[str, int]:
    """Return the codes of a column of the numbers of ``names``, which the caller's labels reorder or rename.

    ``find`` looks a value up in ``codes``, those of the caller, who gave a dict from values to labels if ``mapped``.
    """
    own = [str(name).strip() for name in names]
    found = [find(name) for name in own]
    if None in found and mapped and any(str(k) in codes for k in range(len(own))):
        found = [codes.get(str(k)) for k in range(len(own))]
    elif len(own) == len(codes) and not mapped and all(n in (None, k) for k, n in enumerate(found)):
        found = [*range(len(own))]
    known = {str(k): n for k, n in enumerate(found) if n is not None}
    by_number = known if _positions(own) else {}
    return by_number | dict(codes) | {own[int(k)]: n for k, n in known.items()}


def _of_checkpoint(
    checkpoint: Sequence[str], cells: _Cells, names: Sequence[str] | None
) -> LabelMap:
    """Return the label map of a checkpoint that is already a classifier.

    Raises:
        DataError: the column has labels that the checkpoint does not have.
    """
    labels = tuple(str(label) for label in checkpoint)
    codes = {label.strip(): k for k, label in enumerate(labels)}
    texts, at = cells.texts, cells.where
    if names is not None:
        texts, at = [str(name).strip() for name in names], lambda i: f"class {i}"
        if texts == [label.strip() for label in labels]:  # where several classes have one name, too
            return LabelMap(labels, _positions(texts) | codes)
    found = [*map(_id_finder(codes), texts)]
    if None not in found:
        numbered = names is not None and bool(_positions(texts))
        by_number = {str(i): k for i, k in enumerate(found) if numbered and k is not None}
        return LabelMap(labels, by_number | codes)
    both = _positions(labels) | codes
    if names is None and None not in map(_id_finder(both), texts):
        return LabelMap(labels, both)
    i = found.index(None)
    raise DataError(
        f"{at(i)}: {cells.column} {shortened(texts[i])} is not among the classes of the checkpoint, which is a "
        f"classifier already: {_listed(labels)}. Labels must be these names or their numbers from 0; to train "
        f"other classes with a new output layer, list them: {option('labels', [*list(dict.fromkeys(texts))[:3], ...])}."
    )


# ------------------------------------------------------------------------------------- several labels per row


@dataclass
class MultiLabelColumn:
    """A multi-label column: any number of labels per row.

    Attributes:
        rows: names or numbers of the classes of each row; None if each row has a single label.
        names: names of the classes in order, if the rows contain class numbers and the form defines their names.
        notes: lines to print.
        form: ``"vectors"`` of zeros and ones, class ``"numbers"``, or None for names and mappings.
    """

    rows: list[list[Any]] | None
    names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    form: str | None = None


class NameList(list[str]):
    """The names of the classes of a row, in whatever form its source had them; no vector, even if they are 0 and 1."""


def read_several(
    values: Sequence[Any],
    where: Where,
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    spellings: Collection[str] = (),
    separator: str | None = None,
    always: bool = False,
    single: bool = False,
    form: str | None = None,
    strict: bool = False,
) -> MultiLabelColumn:
    """Read a column in which rows may have any number of labels.

    Args:
        values: the cells.
        where: returns the location of a row, for error messages.
        names: names of the classes whose numbers the column contains (``datasets.ClassLabel``).
        labels: names of the classes, if known.
        spellings: values that a cell may contain besides the names.
        separator: text between names in one cell; "" if names are never joined; None detects it from the column.
        always: treat the column as multi-label in any form; a single name is a list of one label.
        single: treat texts as one class each, unless all are vectors with a single 1, of three places or more or of
            the labels.
        form: what lists of zeros and ones are, ``"vectors"`` or class ``"numbers"``; None decides by the column.
        strict: the caller gave the form, so that vectors are refused where it is ``"numbers"``; else a row that can
            only be a vector is read as one.

    Raises:
        DataError: the column mixes forms, is ambiguous, or has an invalid vector; names the row.
    """
    if values and all(isinstance(value, NameList) for value in values):
        return MultiLabelColumn([list(value) for value in values])
    values = [_whole(value) for value in values]
    known = None if labels is None else {str(label).strip() for label in (*labels, *spellings)}
    column = _Column(values, where, names, labels, known, separator, always, single, form, strict)
    found = column.read()
    items = [item for row in found.rows or () for item in row]
    unnamed = found.form is None and names is found.names is None
    if unnamed and items and all(map(_is_number, items)):
        found.form = "numbers"
    return found


def _is_number(item: Any) -> bool:
    number = number_in(item) if isinstance(item, str) else item
    return isinstance(number, int | float) and not isinstance(number, bool)


def is_on(value: Any) -> bool | None:
    """Return True for 1, True, "1" and "true", False for 0, False, "0" and "false", and None for any other value."""
    if isinstance(value, bool | int | float | Decimal):
        return bool(value) if value in (0, 1) else None
    return _SPELLED.get(value.strip().lower()) if isinstance(value, str) else None


@dataclass(frozen=True)
class _Column:
    """The cells of a column, and what the caller knows of it; the arguments are those of `read_several`.

    Each method that returns a `MultiLabelColumn` or None reads the column in some form, and None says that it does not
    have that form.

    Args:
        known: values that a cell may contain: the labels and their other spellings; None if there are no labels.
    """

    values: Sequence[Any]
    where: Where
    names: Sequence[str] | None
    labels: Sequence[str] | None
    known: Collection[str] | None
    separator: str | None
    always: bool
    single: bool
    form: str | None
    strict: bool

    def read(self) -> MultiLabelColumn:
        """Return the labels of each row."""
        values = self.values
        if values and all(isinstance(value, Mapping) for value in values):
            return self._mappings(values)
        other = [
            i for i, v in enumerate(values) if not isinstance(v, list | tuple | set | frozenset)
        ]
        if len(other) < len(values):
            if other:
                i = other[0]
                raise DataError(
                    f"{self.where(i)}: label holds {shortened(values[i])}, but other rows have lists of labels. Give "
                    f"every row a list, {_EMPTY} where no class fits."
                )
            # The order of a set depends on the seed of Python's hashes.
            rows = [sorted(v, key=str) if isinstance(v, set | frozenset) else v for v in values]
            return self._lists([[_whole(item) for item in row] for row in rows])
        texts = ["" if is_missing(value) else value for value in values]
        found = MultiLabelColumn(None)
        if any(texts) and all(isinstance(text, str) for text in texts):
            found = self._texts(texts)
        if found.rows is None and self.always:
            return MultiLabelColumn([[] if is_missing(value) else [value] for value in values])
        return found

    def _texts(self, texts: Sequence[str]) -> MultiLabelColumn:
        """Read texts that may each hold several labels; no rows if each is one label."""
        separator, notes = self.separator, list[str]()
        parsed = [printed_list(text) for text in texts]
        cells = {text.strip() for text in texts if text.strip()}
        named = not self.strict and self.known is not None and cells <= {*self.known}
        if separator != "" and not named:
            numbers = self.form == "numbers" and self.strict
            if numbers and all(items is None for items in parsed):
                found = self._written_numbers(texts)
            else:
                found = self._written_vectors(texts, parsed)
            if found is not None:
                return found
        if separator is None and not named and not self.single:
            if (found := self._printed(texts, parsed)) is not None:
                return found
            separator, notes = self._detect_separator(cells)
        rows = [_parts(text, separator) for text in texts] if separator else None
        return MultiLabelColumn(rows, None, notes)

    # Lists and mappings.

    def _mappings(self, values: Sequence[Any]) -> MultiLabelColumn:
        """Read mappings from every name to 0 or 1, such as spaCy's ``cats``."""
        names = list(dict.fromkeys(str(name) for value in values for name in value))
        rows = []
        for i, value in enumerate(values):
            on = {str(name): is_on(mark) for name, mark in value.items() if mark is not None}
            if strange := [name for name, mark in on.items() if mark is None]:
                raise DataError(
                    f"{self.where(i)}: label gives {strange[0]!r} the value {shortened(value[strange[0]])}; a mapping "
                    "of labels must hold 0 or 1 for each. Round fractions, or give a list of the labels that fit."
                )
            rows.append([k for k, name in enumerate(names) if on.get(name)])
        return MultiLabelColumn(rows, tuple(names))

    def _lists(self, rows: list[list[Any]]) -> MultiLabelColumn:
        """Read lists, which are vectors of zeros and ones or hold names or class numbers."""
        if (hot := self._vectors(rows)) is not None:
            return hot
        missing = sum(is_missing(item) for row in rows for item in row)
        found = MultiLabelColumn([[item for item in row if not is_missing(item)] for row in rows])
        if missing:
            found.notes.append(
                f"label: {missing:,} items of the lists hold nothing (None, NaN or blanks) and are left out"
            )
        return found

    def _vectors(self, rows: list[list[Any]]) -> MultiLabelColumn | None:
        """Read rows that are vectors of zeros and ones."""
        items = [item for row in rows for item in row if not is_missing(item)]
        if items and all(isinstance(x, str) and is_on(x) is not None for x in items):
            rows = [[None if is_missing(x) else int(bool(is_on(x))) for x in row] for row in rows]
            repeated = any(len(set(row)) < len(row) for row in rows)
            widths = {len(row) for row in rows if row}
            misfit = self.labels is not None and widths != {len(self.labels)}
            named = {*map(str.strip, items)} <= {*(self.known or ())}
            if not (self.form or repeated) and (misfit or named):
                return None
        width = self._width(rows)
        if not width:
            return None
        labels = self.labels
        if labels is None and self.names is not None and len(self.names) == width:
            labels = self.names
        if labels is not None and len(labels) != width:
            raise DataError(
                f"{self.where(0)}: label is a vector of {width} zeros and ones, and there are {len(labels)} labels: "
                f"{', '.join(map(str, labels[:12]))}. Give one label for each place, in order: "
                f"{option('labels', [...])}."
            )
        called = tuple(map(str, range(width) if labels is None else labels))
        hot = [[k for k, on in enumerate(row) if on] for row in rows]
        found = MultiLabelColumn(hot, called, form="vectors")
        if labels is None:
            found.notes.append(
                f"label: vectors of {width} zeros and ones, one place for each label; the labels are called 0 to "
                f"{width - 1} ({option('labels', ['name', ...])} names them)"
            )
        return found

    def _width(self, rows: list[list[Any]]) -> int:
        """Return the length of the rows if they are vectors of zeros and ones; 0 if they list names or class numbers.

        Class numbers are integers that do not repeat within a row, so bools, floats and repeated zeros indicate
        vectors. Rows of two numbers 0 or 1, which could be either, are read as vectors, unless the training rows had
        class numbers: as class numbers, nearly all rows would have both classes.
        """
        items = [item for row in rows for item in row if not is_missing(item)]
        if not items or (self.names is not None and not self._as_vectors(rows, items)):
            return 0
        if self.form == "numbers" and self.strict:
            self._check_numbers(rows)
            return 0
        if not all(isinstance(x, bool | int | float) for x in items):
            return 0
        # Missing items turn integers into floats.
        sure_types = bool if any(is_missing(x) for row in rows for x in row) else bool | float
        sure = [i for i, row in enumerate(rows) if any(isinstance(x, sure_types) for x in row)]
        widths = {len(row) for row in rows if row}
        repeated = [i for i, row in enumerate(rows) if len(set(row)) < len(row)]
        if self.form == "numbers" and not (sure or repeated):
            return 0
        if strange := [i for i in sure if any(x not in (0, 1) for x in rows[i])]:
            i = strange[0]
            value = next(x for x in rows[i] if x not in (0, 1))
            raise DataError(
                f"{self.where(i)}: label is a list with the number {value!r}. A list must hold names, integer numbers "
                "of classes, or a vector of zeros and ones; fractions cannot be trained on, so round them."
            )
        binary = all(x in (0, 1) for x in items)
        evident = sure or repeated or (binary and widths == {2})
        if self.form == "vectors" or (not all(rows) and evident):
            self._check_vectors(rows, widths)
        if len(widths) > 1 or not binary:
            if wrong := sure or repeated:
                i, sizes = wrong[0], sorted(widths)
                what = f"other rows have lists of {sizes[0]} to {sizes[-1]} items"
                if len(widths) == 1:
                    what = "other rows hold numbers above 1"
                raise DataError(
                    f"{self.where(i)}: label is {shortened(rows[i])}, looking like a vector of zeros and ones, but "
                    f"{what}. Give vectors of one length, or the list of the classes that fit."
                )
            return 0
        width = widths.pop()
        if width == 1 and sure:
            raise DataError(
                f"{self.where(0)}: label is a vector of one place, which is one class only. Give two classes: 0 and "
                "1, or two names."
            )
        return width if width > 1 else 0

    def _as_vectors(self, rows: Sequence[Sequence[Any]], items: Sequence[Any]) -> bool:
        """Whether numbers of named classes are to be read as vectors, as the caller says.

        Raises:
            DataError: they look like vectors, in which a number can recur, and the caller has not said what they are.
        """
        # Known labels are those of a run that has begun, perhaps with repeated numbers.
        asked = self.form is None and self.labels is None
        alike = asked and len({len(row) for row in rows}) == 1 and all(x in (0, 1) for x in items)
        twice = [i for i, row in enumerate(rows) if alike and len(set(row)) < len(row)]
        if twice:
            raise DataError(
                f"{self.where(twice[0])}: label is {shortened(self.values[twice[0]])}, which looks like a vector of "
                f"zeros and ones, but the column is declared to hold the numbers of {shown(list(self.names or ()))}, "
                f"each of which a row has once. {option('label_form', 'vectors')} reads vectors; else leave out the "
                "repeated numbers."
            )
        return self.form == "vectors" and self.strict

    def _check_vectors(self, rows: list[list[Any]], widths: set[int]) -> None:
        """Refuse rows that are no vectors, in a column that is known to hold vectors."""
        width = max(widths) if self.labels is None else len(self.labels)
        reason = f"where other rows have vectors{_or_numbers(rows)}"
        if self.form:
            reason = f"with {option('label_form', 'vectors')}, given or found in the training rows,"
        for i, row in enumerate(rows):
            if len(row) != width or any(x not in (0, 1) for x in row if not is_missing(x)):
                raise DataError(
                    f"{self.where(i)}: label is {shortened(self.values[i])}, and {reason} it must be a vector of "
                    f"{width} zeros and ones. Write it so, or give the names of the labels."
                )

    def _check_numbers(self, rows: Sequence[Sequence[Any]]) -> None:
        """Refuse rows that are no class numbers where the caller said that they are."""
        for i, row in enumerate(rows):
            items = [spelled(item) for item in row if not is_missing(item)]
            twice = next((item for k, item in enumerate(items) if item in items[:k]), None)
            named = self.known is not None and {*items} <= {*self.known}
            strange = next((x for x in items if not (named or x.isdecimal())), None)
            if twice is None and strange is None:
                continue
            fault = f"{twice} stands there twice"
            if strange is not None:
                fault = f"{shortened(strange)} is none"
            raise DataError(
                f"{self.where(i)}: label is {shortened(self.values[i])}, and with {option('label_form', 'numbers')} it "
                f"must hold the numbers of classes, each once: {fault}. Correct the row; if it is a vector of zeros "
                f"and ones, set {option('label_form', 'vectors')}, and if it holds names, leave the option out."
            )

    # Texts of numbers.

    def _written_numbers(self, texts: Sequence[str]) -> MultiLabelColumn | None:
        """Read texts with a mark between class numbers, which the caller said that they are.

        Raises:
            DataError: a text has no class numbers, or one of them twice.
        """
        divided = _divided(texts, self._marks(), str.isdecimal)
        if divided is None and self.known is not None:
            return None
        mark, places = divided or ("", [[text.strip()] for text in texts])
        rows = [[part for part in row if part] for row in places]
        self._check_numbers(rows)
        joined = next((text for text, row in zip(texts, rows, strict=True) if len(row) > 1), None)
        if joined is None:
            return None
        between = f"label: {mark or ' '!r} stands between class numbers, such as {shortened(joined.strip())}"
        return MultiLabelColumn(rows, notes=[between])

    def _marks(self) -> tuple[str | None, ...]:
        """Return what may stand between numbers, None for blanks: the separator that is given, or the usual ones."""
        return (*_MARKS, None) if self.separator is None else (self.separator.strip() or None,)

    def _written_vectors(self, texts: Sequence[str], parsed: _Parsed) -> MultiLabelColumn | None:
        """Read texts that are all vectors of zeros and ones, printed or with a mark between the places."""
        undecided = self.separator is self.form is None
        if all(items is not None for items in parsed):
            if undecided and self.single and not self._one_hot([items or [] for items in parsed]):
                return None
            found = self._printed_lists(texts, parsed)
            return found if self.separator or found.form == "vectors" else None
        digits = self.separator is None and self.form != "numbers"  # such as 010
        marks = (*self._marks(), *[""] * digits)
        divided = _divided(texts, marks, lambda part: is_on(part) is not None)
        if divided is None:
            return None
        mark, rows = divided
        joined = {text.strip() for text, row in zip(texts, rows, strict=True) if len(row) > 1}
        if joined & {*(self.known or ())} or (undecided and not self._told_as_vectors(rows, mark)):
            return None
        if (hot := self._vectors(rows)) is None:
            return None
        hot.notes.insert(
            0,
            f"label: texts such as {shortened(next(filter(None, texts)))} are read as vectors of zeros and ones"
            f"{_or_numbers(rows)} ({option('label_separator', '')} reads one class for each text)",
        )
        return hot

    def _one_hot(self, rows: Sequence[Sequence[Any]]) -> bool:
        """Whether rows are vectors with a single 1, of three places or more or of the labels that are known."""
        if len({len(row) for row in rows}) > 1 or (len(rows[0]) < 3 and self.labels is None):
            return False
        marks = [[is_on(x) for x in row] for row in rows]
        return all(row.count(True) == 1 and None not in row for row in marks)

    def _told_as_vectors(self, rows: Sequence[Sequence[str]], mark: str | None) -> bool:
        """Whether texts of zeros and ones are vectors where the caller gave neither a form nor a separator.

        A pair with a comma can be a decimal, and one with a blank a name: they are vectors if the caller has decided on
        sets of classes or on the labels, and those with a blank also if a row has two zeros.
        """
        widths = {len(row) for row in rows if row}
        if mark == "":
            return not self.single and self._told_as_digits(rows, widths)
        if self.single:
            return self._one_hot(rows)
        if mark == "," and widths <= {1, 2}:
            return self.always or len(self.labels or ()) == 2
        if mark is None and not self.always and self.labels is None:
            nothing = any(row and not any(map(is_on, row)) for row in rows)
            return len(widths) == 1 and (widths != {2} or nothing)
        return True

    def _told_as_digits(self, rows: Sequence[Sequence[str]], widths: set[int]) -> bool:
        """Whether texts such as ``010`` are vectors of the labels that are known.

        Raises:
            DataError: they look like vectors, and nothing says what they are.
        """
        alike = len(widths) == 1 and min(widths) > 2 and any(row[:1] == ["0"] for row in rows)
        if self.labels is None and alike and len({*map(tuple, rows)}) > 2:
            raise DataError(
                f"label holds {''.join(rows[0])!r}, which can be a vector of {len(rows[0])} zeros and ones, or a "
                f"class: {option('label_form', 'vectors')} reads vectors, {option('label_separator', '')} one class "
                "for each text."
            )
        return self.labels is not None and alike and widths == {len(self.labels)}

    # Texts of names.

    def _printed(self, texts: Sequence[str], parsed: _Parsed) -> MultiLabelColumn | None:
        """Read texts that print lists or mappings."""
        chosen = [_choices(text) for text in texts]
        if any(found is not None for found in chosen):
            pairs = zip(texts, chosen, strict=True)  # a lone choice is written as its name
            return self._lists([[t] * bool(t) if found is None else found for t, found in pairs])
        mapped = [printed_mapping(text) for text in texts]
        if all(isinstance(found, dict) for found in mapped):
            return self._mappings(mapped)
        if all(items is None for items in parsed):
            return None
        return self._printed_lists(texts, [printed_list(text, lone=True) for text in texts])

    def _printed_lists(self, texts: Sequence[str], parsed: _Parsed) -> MultiLabelColumn:
        """Read a column of printed lists; raise DataError if it has other text too."""
        lists = [i for i, found in enumerate(parsed) if found is not None]
        other = next((i for i, found in enumerate(parsed) if found is None), None)
        if other is not None:
            raise DataError(
                f"{self.where(other)}: label holds {shortened(texts[other])}, but {self.where(lists[0])} holds the "
                f"printed list {shortened(texts[lists[0]])}. Write every row as a list, {_EMPTY} where no class fits."
            )
        found = self._lists([list(items or ()) for items in parsed])
        found.notes.insert(
            0,
            f"label: printed lists, such as {shortened(texts[0])}, are read as lists of labels",
        )
        return found

    def _detect_separator(self, cells: set[str]) -> tuple[str, list[str]]:
        """Detect the separator of names in one cell from the whole column; return it ("" for none) and lines to print.

        A mark is a separator if at least 90 % of the parts of cells with it also occur in other cells.

        Raises:
            DataError: fewer of the parts do, but some, so the column is ambiguous.
        """
        if (known := self.known) is not None:
            for mark in (*_MARKS, *_RARER):
                if all(cell in known or {*_parts(cell, mark)} <= {*known} for cell in cells):
                    return mark, []
        if all(re.fullmatch(r"(<[^<>]+>)+", cell) for cell in cells):
            return "><", []
        notes = []
        for mark in _MARKS:
            split = _split_at(mark, cells)
            joined = sorted(cell for cell, parts in split.items() if len(parts) > 1)
            if not joined:
                continue
            if mark == "," and self.form is None:
                _check_commas(cells, joined[0])
            parts, share = _recurring(split, joined)
            numbers = all(part.isdecimal() for parts in split.values() for part in parts)
            if share >= _RECURRING or numbers or (self.always and share > 0):
                return mark, [_stands_between(mark, joined[0])]
            if share > 0:
                raise DataError(
                    f"label holds {shortened(joined[0])} and other texts with {mark!r}, some of whose parts are "
                    f"labels of other rows too, so they can be several labels or one: {_either(mark)}."
                )
            if all(number_in(part) is None for part in parts):
                notes.append(
                    f"label: {len(joined)} classes have {mark!r} in their name, such as {shortened(joined[0])}; each "
                    f"is one class ({option('label_separator', mark)} reads several labels)"
                )
        mark, more = self._detect_rarer(cells)
        return mark, notes + more

    def _detect_rarer(self, cells: set[str]) -> tuple[str, list[str]]:
        """Detect a separator that names have in them more often, such as a blank; see `_detect_separator`.

        Raises:
            DataError: all parts of the texts with such a mark stand alone in other rows, or all are numbers and some
                do.
        """
        notes = []
        for mark in _RARER:
            marked = sorted(cell for cell in cells if mark in cell)
            joined = next((cell for cell in marked if len(_parts(cell, mark)) > 1), None)
            signs = mark in _IN_SIGNS and not any(c.isalpha() for c in "".join(marked))
            if joined is None or signs:
                continue
            parts = (part for cell in marked for part in _parts(cell, mark))
            lone = all(
                part in cells for part in parts
            )  # which ends at the first part that is no label
            if lone or (any(map(str.isdecimal, cells)) and _all_numbers(cells, mark)):
                if self.always:
                    return mark, [_stands_between(mark, joined)]
                raise DataError(
                    f"label holds {shortened(joined)}, whose parts are labels of other rows too, so it can be several "
                    f"labels with {mark!r} between them, or one: {_either(mark)}."
                )
            if len(cells) > _MANY_CELLS:
                continue
            split = _split_at(mark, cells)
            several = [cell for cell, found in split.items() if len(found) > 1]
            if not several:  # only very long texts have the mark
                continue
            distinct, share = _recurring(split, several)
            if share >= _RECURRING and len(several) > len(distinct):
                notes.append(
                    f"label: {len(several)} classes are made of parts of each other, such as {shortened(joined)}; each "
                    f"is one class ({option('label_separator', mark)} reads several labels)"
                )
        return "", notes


def _or_numbers(rows: Sequence[Sequence[Any]]) -> str:
    """Return how to read vectors as class numbers; nothing if a row repeats a number, so that it has none."""
    repeated = any(len(set(row)) < len(row) for row in rows)
    return "" if repeated else f" ({option('label_form', 'numbers')} reads class numbers)"


def _check_commas(cells: Iterable[str], joined: str) -> None:
    """Refuse numbers with commas, such as ``joined``, that can be vectors, class numbers or decimals."""
    decimals = all(re.fullmatch(r"[+-]?\d+(,\d+)?", cell) for cell in cells)
    if {re.sub(r"\s*,\s*", ",", cell) for cell in cells} <= _PAIRS:
        quantity = f"; if it is a number with a decimal comma, {option('task', 'regression')}"
        raise DataError(
            f"label holds {shortened(joined)}, which can be a vector of two places, or two class numbers. Set "
            f"{option('label_form', 'vectors')} or {option('label_form', 'numbers')}, or "
            f"{option('label_separator', '')} for one class for each text{quantity * (decimals and trains())}."
        )
    if decimals:
        quantity = f" ({option('task', 'regression')})" * trains()
        raise DataError(
            f"label holds {shortened(joined)}, which can be a number with a decimal comma{quantity}, several class "
            f"numbers ({option('label_separator', ',')}) or a class ({option('label_separator', '')}). Set one of the "
            "options."
        )


def _divided(
    texts: Sequence[str], marks: Iterable[str | None], fits: Callable[[str], bool]
) -> tuple[str | None, list[list[str]]] | None:
    """Return the first mark that divides a text, if all parts of all texts fit or hold nothing, and the parts.

    The mark None stands for blanks, and "" divides a text into its characters. None is returned if no mark does so.
    """
    for mark in marks:
        split = {text: _places(text, mark) for text in {*texts}}
        parts = (part for row in split.values() for part in row if part)
        if any(len(row) > 1 for row in split.values()) and all(map(fits, parts)):
            return mark, [split[text] for text in texts]
    return None


def _places(text: str, mark: str | None) -> list[str]:
    parts = text.split(mark) if mark != "" and text else text.strip()
    return [part.strip() for part in parts]


def _parts(text: str, mark: str) -> list[str]:
    if mark == "><":  # tags such as <python><pandas>
        return [part.strip() for part in text.strip()[1:-1].split("><") if part.strip()]
    return list(dict.fromkeys(part.strip() for part in text.split(mark) if part.strip()))


def _all_numbers(cells: Iterable[str], mark: str) -> bool:
    return all(part.isdecimal() for cell in cells for part in _parts(cell, mark))


def _split_at(mark: str, cells: Iterable[str]) -> dict[str, list[str]]:
    return {cell: _parts(cell, mark) for cell in cells if len(cell) < 1000}


def _recurring(split: Mapping[str, Sequence[str]], joined: Sequence[str]) -> tuple[set[str], float]:
    """Return the parts of joined cells, and the share of them that occur in other cells too."""
    holders = Counter(part for parts in split.values() for part in parts)
    parts = {part for cell in joined for part in split[cell]}
    return parts, sum(holders[part] > 1 for part in parts) / len(parts)


def _stands_between(mark: str, joined: str) -> str:
    between = f"label: {mark!r} stands between several labels of a row, such as {shortened(joined)}"
    return f"{between} ({_either(mark)})"


def _either(mark: str) -> str:
    return (
        f"{option('label_separator', mark)} reads several labels, {option('label_separator', '')} one class for "
        "each text" + f", as does {option('problem', 'single_label')}" * trains()
    )


# ------------------------------------------------------------------------------------------------ printed texts

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PLAIN = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|True|False|true|false|None|null|nan|NaN"
_ITEM = re.compile(rf"(?:np\.\w+|numpy\.\w+)\(\s*({_QUOTED}|{_PLAIN})\s*\)|({_QUOTED}|{_PLAIN})")
# Atomic groups, so that a long text that is no list is given up at its first strange character; none that captures,
# for which Python 3.11 may raise SystemError in a possessive repeat.
_VALUE = rf"(?:np\.\w+|numpy\.\w+)\(\s*(?:{_QUOTED}|{_PLAIN})\s*\)|{_QUOTED}|{_PLAIN}"
_ITEMS = re.compile(rf"(?:(?>{_VALUE})(?>\s*,\s*|\s+|\Z))*+")
_WRAPPED = re.compile(
    r"(?:array|tensor|set|frozenset|list)\((.*?)(?:,\s*dtype=[\w.'<>]+)?\)", re.DOTALL
)
_WORDS = {
    "true": True, "True": True, "false": False, "False": False, "None": None, "null": None, "nan": None, "NaN": None,
}  # fmt: skip


def printed_list(text: str, *, lone: bool = False) -> list[Any] | None:
    """Return the items of a list that Python, JSON, NumPy or PostgreSQL (``{joy,love}``) prints; None for other text.

    Names may stand without quotes, ``[joy, love]``, but a single one, ``[joy]``, is a list only if it may be a `lone`
    one.
    """
    text = text.strip()
    if match := _WRAPPED.fullmatch(text):
        text = match[1].strip() or "[]"
    if len(text) < 2 or text[0] + text[-1] not in ("[]", "()", "{}"):
        return None
    inside = text[1:-1].strip()
    if _ITEMS.fullmatch(inside):
        return [_item(match[1] or match[2]) for match in _ITEM.finditer(inside)]
    names = [part.strip() for part in inside.split(",")]
    several = len(names) > 1 or lone
    bare = text[0] != "(" and several and all(names) and not re.search(r"""['"\[\](){}:]""", inside)
    return names if bare else None


def _item(token: str) -> Any:
    if token[0] in "'\"":
        try:
            return ast.literal_eval(token)
        except (ValueError, SyntaxError):
            return token[1:-1]
    if token in _WORDS:
        return _WORDS[token]
    return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)


def listed(cell: Any) -> Any:
    """Return the list of texts that is printed in a cell of a CSV file; any other value as it is."""
    printed = isinstance(cell, str) and cell.lstrip().startswith(("['", '["'))
    texts = printed_list(cell) if printed else None
    return cell if texts is None else texts


class _Unwrapped(ast.NodeTransformer):
    """Replaces what NumPy prints around a value, such as ``array([1], dtype=int32)``, by the value."""

    def visit_Call(self, node: ast.Call) -> Any:
        name = re.sub(r"^(np|numpy)\.", "", ast.unparse(node.func))
        known = re.fullmatch(r"array|str_|bool_?|u?int\d+|float\d+", name)
        return self.visit(node.args[0]) if known and len(node.args) == 1 else node


def _printed_by_python(text: str) -> Any:
    return ast.literal_eval(_Unwrapped().visit(ast.parse(text, mode="eval")))


def _nested(text: str) -> Any:
    """Return the value that JSON, Python or NumPy prints so, or None."""
    for read in (json.loads, _printed_by_python):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return read(text)
    return None


def printed_mapping(text: str) -> Any:
    """Return a mapping, or a list of mappings, printed by Python, JSON or NumPy; None for any other text."""
    text = text.strip()
    found = _nested(text) if text.startswith(("{", "[{")) else None
    inside = found if isinstance(found, list) else [found]
    return found if all(isinstance(item, dict) for item in inside) else None


def unprinted(text: str) -> Any:
    """Return the list that a text prints, perhaps one of lists, or the text."""
    items = printed_list(text)
    if items is None and text.strip().startswith("[["):
        items = _nested(text)
    return text if items is None else items


def _choices(text: str) -> list[Any] | None:
    """Return what Label Studio writes into a cell for several choices, ``{"choices": ["joy", "love"]}``, or None."""
    printed = printed_mapping(text) if "choices" in text else None
    names = printed.get("choices") if isinstance(printed, dict) and len(printed) == 1 else None
    return names if isinstance(names, list) else None
