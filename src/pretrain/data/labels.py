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
        texts = _spelled(values, where, column)
        if "-100" in texts and not given:
            raise DataError(
                f"{where(texts.index('-100'))}: {column} -100 is no class: in rows that are tokens already it marks "
                "those without a label. Give whole words or texts with a label each, and leave these out."
            )
        what = "its classes"
        if given is not None:
            made, what = _given(given, texts, column, names), _GIVEN
        elif checkpoint is not None:
            made = _of_checkpoint(checkpoint, texts, where, column, names)
            what = "the classes of the checkpoint"
        elif names is not None:
            made = cls.numbered(names)
        else:
            labels = _sorted_labels(texts, values, where, column)
            labels = _in_order(labels, order or (), column)
            made = cls(labels, {label: k for k, label in enumerate(labels)})
        made._ids(values, names, made._spellings, where, column, what)
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
        return self._ids(values, names, spellings, where, column, "the labels of the training rows")

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
        self,
        values: Sequence[Any],
        names: Sequence[str] | None,
        spellings: Mapping[str, int],
        at: Where,
        column: str,
        what: str,
    ) -> list[int]:
        texts, find = _spelled(values, at, column), _id_finder(spellings)
        numeric = not any(isinstance(value, str) for value in values[:1])
        of_names: dict[str, tuple[str, int | None]] = {}
        same = False
        if names is not None:
            own = [str(name).strip() for name in names]
            same = self._has_shared(own)
            pairs = list(zip(own, self.named(own), strict=True))
            # Where one side has numbers in place of names, there is nothing to compare, and numbers count.
            nameless = any(map(_nameless, (own, self.labels)))
            counted = self._numbered and all(str(i) in self.codes for i in range(len(own)))
            if any(k is not None for _, k in pairs) or not (nameless or counted):
                of_names = {str(i): pair for i, pair in enumerate(pairs)}
                of_names |= {} if numeric else dict(zip(own, pairs, strict=True))
            elif not nameless:
                note(
                    f"{column}: none of the classes {_listed(own)} is called as the labels that were given, so their "
                    f"numbers count: {_listed(self.labels)}",
                    once=True,
                )

        def read(text: str) -> tuple[str, int | None]:
            if text in of_names:
                return of_names[text]
            outside = bool(of_names) and numeric and number_in(text) is not None
            return text, None if outside else find(text)

        found = {text: read(text) for text in dict.fromkeys(texts)}
        told = [found[text][0] for text in texts]
        strange = [i for i, text in enumerate(texts) if found[text][1] is None]
        if strange:
            raise DataError(
                self._unknown(told, strange, at, column, what, names if of_names else None)
            )
        self._check_mixed(told, spellings, at, column)
        self._check_shared(texts if same else told, at, column)
        return [k for text in texts if (k := found[text][1]) is not None]

    def _check_shared(self, texts: Sequence[str], at: Where, column: str) -> None:
        """Refuse a name that several classes have, as ``crane`` in checkpoints of ImageNet."""
        shared = {_plain(name): (name, numbers) for name, numbers in _shared(self.labels).items()}
        alone = {label.strip() for label in self.labels} - {name for name, _ in shared.values()}
        for i, text in enumerate(texts if shared else ()):
            if text not in alone and number_in(text) is None and _plain(text) in shared:
                name, numbers = shared[_plain(text)]
                raise DataError(
                    f"{at(i)}: {column} {shortened(text)} does not tell which class is meant, because the classes "
                    f"{_all(numbers)} of the model are called {name!r}. Give the numbers of the classes, for all rows."
                )

    def _check_mixed(
        self, texts: Sequence[str], spellings: Mapping[str, int], at: Where, column: str
    ) -> None:
        by_name = {text: i for i, text in enumerate(texts) if text in self.labels}
        by_number = {text: i for i, text in enumerate(texts) if text not in self.labels}
        numbers = {str(k) for k in range(len(self.labels))}
        counted = not numbers & set(self.labels) and numbers | set(self.labels) <= spellings.keys()
        if by_name and counted and any(text.isdigit() for text in by_number):
            (name, i) = next(iter(by_name.items()))
            (number, j) = next((t, j) for t, j in by_number.items() if t.isdigit())
            raise DataError(
                f"{column} mixes names and numbers of classes: {name!r} ({at(i)}) and {number!r} ({at(j)}). Write "
                "all labels in one way."
            )

    def _unknown(
        self,
        texts: Sequence[str],
        strange: Sequence[int],
        at: Where,
        column: str,
        what: str,
        names: Sequence[str] | None,
    ) -> str:
        unknown = list(dict.fromkeys(texts[i] for i in strange))
        first = texts[strange[0]]
        more = f" ({len(unknown)} such values: {_listed(unknown)})" if len(unknown) > 1 else ""
        near = suggestion(first, self.labels)
        near += f" In public test sets {first} marks a row without a label." * (
            first in _UNLABELLED
        )
        cure = (
            f"Correct the row, or list every label, in order: {option('labels', [...])}."
            if trains()
            else "Correct the row, or leave it out: the model knows no other classes."
        )
        joined = any(mark in text for text in unknown for mark in (*_MARKS, " "))
        alien = len(strange) == len(texts) and not (joined or suggestion(first, self.labels))
        if what == _GIVEN and names is None and alien:
            near = ""
            keys = sorted(map(_key, unknown), key=_order)
            pairs = dict(zip(keys, self.labels[:12], strict=False))
            cure = (
                "None of the labels is among the values, and nothing says which value is which label. Give a dict of "
                f"value and label: {option('labels', pairs)}."
            )
        if names is not None and first in (own := [str(name).strip() for name in names]):
            cure = (
                f"The numbers of the column stand for the classes {_listed(own)}, which are recognised by their names. "
                "Rename them in their source as the labels are called."
            )
        return (
            f"{at(strange[0])}: {column} {shortened(first)} is not among {what}: {_listed(self.labels)}.{near}{more} "
            f"{cure}"
        )


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


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(_short(label) for label in labels[:12])
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
    return (
        str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    )


def _key(text: str) -> Any:
    """Return a value of a column as the key of a dict of labels."""
    number = exact_number(text)
    return text if number is None else number


def _order(key: Any) -> tuple[bool, Any]:
    return isinstance(key, str), key


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


def _spelled(values: Sequence[Any], at: Where, column: str) -> list[str]:
    """Return every value as a string, see `spelled`; refuse a column with missing values or values of several kinds."""
    missing = [i for i, value in enumerate(values) if is_missing(value)]
    if missing:
        places = "; ".join(at(i) for i in missing[:_SHOWN])
        more = ", ..." if len(missing) > _SHOWN else ""
        raise DataError(
            f"{len(missing):,} of {len(values):,} rows have no {column}: {places}{more}. Label these rows or remove "
            "them; training and evaluation need a label in every row."
        )
    texts: list[str] = []
    kinds: dict[str, int] = {}
    for i, value in enumerate(values):
        value = value.item() if hasattr(value, "dtype") and hasattr(value, "item") else value
        value = _whole(value)
        if isinstance(value, bool | str):
            kind = type(value).__name__
        elif isinstance(value, int | float):
            kind = "number"
        else:
            cure = (
                "one label" if isinstance(value, list | tuple | dict) else "text or a whole number"
            )
            raise DataError(
                f"{at(i)}: {column} holds {type(value).__name__} {shortened(value)}; a row must have {cure}."
            )
        kinds.setdefault(kind, i)
        texts.append(spelled(value))
    if len(kinds) > 1:
        (one, i), (other, j) = list(kinds.items())[:2]
        raise DataError(
            f"{column} mixes kinds: {values[i]!r} is a {one} ({at(i)}), {values[j]!r} a {other} ({at(j)}). Write all "
            "labels in one way."
        )
    return texts


def blanks_note(values: Iterable[Any], column: str) -> list[str]:
    """Return a line about labels with surrounding whitespace, which is stripped; an empty list if there are none."""
    padded = [value for value in values if isinstance(value, str) and value != value.strip()]
    return (
        [f"{column}: blanks around {len(padded):,} labels, such as {padded[0]!r}, are left out"]
        if padded
        else []
    )


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
    found, wrong, large, at_fault = [], [], [], []
    for i, value in enumerate(_decimal_points(values, where, what)):
        try:
            number = math.nan if isinstance(value, bool) and not bools else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        found.append(number)
        if not math.isfinite(number):
            wrong.append(f"{where(i)}: {shortened(values[i])}")
            at_fault.append(values[i])
        elif abs(number) > LARGEST:
            large.append(f"{where(i)}: {number:g}")
    for places, fault in (
        (wrong, "are no finite numbers"),
        (large, f"are larger than single precision can train on ({LARGEST:g})"),
    ):
        if places:
            shown = "; ".join(places[:_SHOWN]) + "; ..." * (len(places) > _SHOWN)
            comma = any(
                isinstance(v, str) and "," in v and _COMMA.fullmatch(v.strip()) for v in at_fault
            )
            mixed = "A comma is a decimal one only where all numbers could have it: write points. "
            raise DataError(f"{len(places):,} {what} {fault}: {shown}. {mixed * comma}{cure}")
    return found


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
    texts = {
        i: v.strip() for i, v in enumerate(values) if isinstance(v, str) and "," in v and v.strip()
    }
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
        return [
            v.replace(".", "").replace(",", ".") if i in texts else v for i, v in enumerate(values)
        ]
    if point:
        return [v.replace(",", "") if i in texts else v for i, v in enumerate(values)]
    return values


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
        quantity = f": use {option('task', 'regression')}" * trains()
        raise DataError(
            f"{column} holds numbers that are not whole, such as {values[i]!r} ({at(i)}), so it is a quantity and not "
            f"a class{quantity}. If they are names of {len(distinct)} classes, list them: "
            f"{option('labels', [...])}."
        )
    values_of = {number: text for text, number in numbers.items() if number is not None}
    # With -1, 0 and 1 alone, -1 is a class: the sentiment of a text is often written so.
    if all_numbers and len(values_of) > 3 and sorted(values_of) == [*range(-1, len(values_of) - 1)]:
        text = values_of[-1]
        raise DataError(
            f"{at(texts.index(text))}: {column} {text} is no class: beside classes that are numbered from 0, it marks "
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
        i = texts.index(distinct[0])
        raise DataError(
            f"{column} has {len(distinct):,} different values in {len(texts):,} rows, such as "
            f"{shortened(distinct[0])} ({at(i)}); it looks like text or an id and not like classes. Name the column of "
            f"the label, for example {column_option('label', 'category')}."
        )
    folded: dict[str | float, str] = {}
    for text in distinct:
        twin = folded.setdefault(_plain(text), text)
        if twin != text:
            note(
                f"{column}: {twin!r} and {text!r} differ only in case, blanks, accents, invisible characters or the "
                "form of a number and are two classes"
            )
    if all_numbers:
        return tuple(sorted(distinct, key=lambda text: (numbers[text] or 0.0, text)))
    return tuple(sorted(distinct))


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
    given: Sequence[Any] | Mapping[Any, str],
    texts: Sequence[str],
    column: str,
    names: Sequence[str] | None = None,
) -> LabelMap:
    """Return the label map for the caller's labels; see :meth:`LabelMap.learn` for columns of numbers."""
    if isinstance(given, str) or not given:
        raise DataError(
            f"{option('labels', given)} must list the labels, as {option('labels', ['negative', 'positive'])}."
        )
    if isinstance(given, Mapping):
        numbers = dict[Any, Any](given)
        if all(type(k) is int for k in numbers.values()) and {*numbers.values()} == {
            *range(len(numbers))
        }:
            # From names to numbers, as label2id of transformers, in place of the reverse.
            given = sorted(numbers, key=numbers.__getitem__)
    pairs = list(given.items()) if isinstance(given, Mapping) else [(name, name) for name in given]
    spelled = _spelled([name for _, name in pairs], lambda i: f"label {i + 1} of labels", "name")
    labels = tuple(dict.fromkeys(spelled))
    if len(labels) < len(spelled) and not isinstance(given, Mapping):
        twice = next(name for k, name in enumerate(spelled) if name in spelled[:k])
        raise DataError(f"labels={_listed(spelled)} names {twice!r} twice; list every class once.")
    if len(labels) < 2:
        raise DataError(
            f"labels={_listed(spelled)} names one class only; training needs at least two."
        )
    keys = _spelled([key for key, _ in pairs], lambda i: f"value {i + 1} of labels", "value")
    codes = {key: labels.index(name) for key, name in zip(keys, spelled, strict=True)}
    find = _id_finder(codes)
    if names is not None:
        return LabelMap(labels, _renamed(names, codes, find, isinstance(given, Mapping)))
    present, count = {_plain(text) for text in texts}, len(labels)
    if isinstance(given, Mapping) or not present or any(find(text) is not None for text in texts):
        return LabelMap(labels, codes)
    if count == 2 and present <= {"false", "true"}:
        return LabelMap(labels, {"False": 0, "True": 1})
    from_zero, from_one = set(range(count)), set(range(1, count + 1))
    if present <= from_one and count in present:
        return LabelMap(labels, {str(k + 1): k for k in range(count)})
    if present <= from_zero and 0 in present:
        return LabelMap(labels, {str(k): k for k in range(count)})
    if present <= from_zero:
        raise DataError(
            f"{column} holds the numbers {_listed(sorted(set(texts)))}, which could count the {count} labels from 0 or "
            f"from 1. Give a dict of number and label: {option('labels', {1: labels[0], 2: labels[1], ...: ...})}."
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
    checkpoint: Sequence[str],
    texts: Sequence[str],
    at: Where,
    column: str,
    names: Sequence[str] | None,
) -> LabelMap:
    """Return the label map of a checkpoint that is already a classifier.

    Raises:
        DataError: the column has labels that the checkpoint does not have.
    """
    labels = tuple(str(label) for label in checkpoint)
    codes = {label.strip(): k for k, label in enumerate(labels)}
    numbers, find = _positions(labels), _id_finder(codes)
    if names is not None:
        own = [str(name).strip() for name in names]
        found = {str(i): k for i, name in enumerate(own) if (k := find(name)) is not None}
        if len(found) == len(own):
            if own == [
                label.strip() for label in labels
            ]:  # where several classes have one name, too
                found = {str(i): i for i in range(len(own))}
            return LabelMap(labels, (found if _positions(own) else {}) | codes)
        texts, at = own, lambda i: f"class {i}"
    elif all(find(text) is not None for text in texts):
        return LabelMap(labels, codes)
    elif all(_id_finder(numbers | codes)(text) is not None for text in texts):
        return LabelMap(labels, numbers | codes)
    i = next(i for i, text in enumerate(texts) if find(text) is None)
    raise DataError(
        f"{at(i)}: {column} {shortened(texts[i])} is not among the classes of the checkpoint, which is a classifier "
        f"already: {_listed(labels)}. Labels must be these names or their numbers from 0; to train other classes "
        f"with a new output layer, list them: {option('labels', [*list(dict.fromkeys(texts))[:3], ...])}."
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
    vectors = _Vectors(values, where, names, labels, known, form, strict)
    found = _read(values, vectors, separator, always=always, single=single)
    items = [item for row in found.rows or () for item in row]
    if (
        found.form is None
        and names is found.names is None
        and items
        and all(map(_is_number, items))
    ):
        found.form = "numbers"
    return found


def _is_number(item: Any) -> bool:
    number = number_in(item) if isinstance(item, str) else item
    return isinstance(number, int | float) and not isinstance(number, bool)


def _read(
    values: Sequence[Any], vectors: _Vectors, separator: str | None, *, always: bool, single: bool
) -> MultiLabelColumn:
    where = vectors.where
    lists = [i for i, value in enumerate(values) if _is_list(value)]
    mappings = [i for i, value in enumerate(values) if isinstance(value, Mapping)]
    if mappings and len(mappings) == len(values):
        return _from_mappings(values, where)
    if lists:
        if len(lists) < len(values):
            i = next(i for i, value in enumerate(values) if not _is_list(value))
            raise DataError(
                f"{where(i)}: label holds {shortened(values[i])}, but other rows have lists of labels. Give every "
                f"row a list, {_EMPTY} where no class fits."
            )
        # The order of a set depends on the seed of Python's hashes.
        rows = [sorted(v, key=str) if isinstance(v, set | frozenset) else v for v in values]
        return _from_lists([[_whole(item) for item in row] for row in rows], vectors)
    texts = ["" if is_missing(value) else value for value in values]
    notes: list[str] = []
    if any(texts) and all(isinstance(text, str) for text in texts):
        as_numbers = vectors.form == "numbers" and vectors.strict and separator != ""
        if as_numbers and all(printed_list(text) is None for text in texts):
            if (found := vectors.numbers([text.strip() for text in texts], separator)) is not None:
                return found
        elif separator != "" and (
            hot := _written_vectors(texts, vectors, separator, always=always, single=single)
        ):
            return hot
        if separator is None and not single:
            cells = {text.strip() for text in texts if text.strip()}
            chosen = [_choices(text) for text in texts]
            known = vectors.known is not None and cells <= {*vectors.known}
            if not known and any(found is not None for found in chosen):
                pairs = zip(texts, chosen, strict=True)  # a lone choice is written as its name
                rows = [[text] * bool(text) if found is None else found for text, found in pairs]
                return _from_lists(rows, vectors)
            mapped = [printed_mapping(text) for text in texts]
            if all(isinstance(found, dict) for found in mapped):
                return _from_mappings(mapped, where)
            parsed = [printed_list(text) for text in texts]
            if any(found is not None for found in parsed):
                parsed = [printed_list(text, lone=True) for text in texts]
                return _from_printed(texts, parsed, vectors)
            separator, notes = _separator(texts, vectors.known, always, vectors.form)
        if separator:
            return MultiLabelColumn([_parts(text, separator) for text in texts], None, notes)
    if always:
        return MultiLabelColumn([[] if is_missing(value) else [value] for value in values])
    return MultiLabelColumn(None, None, notes)


def is_on(value: Any) -> bool | None:
    """Return True for 1, True, "1" and "true", False for 0, False, "0" and "false", and None for any other value."""
    if isinstance(value, bool | int | float | Decimal):
        return bool(value) if value in (0, 1) else None
    return _SPELLED.get(value.strip().lower()) if isinstance(value, str) else None


# -------------------------------------------------------------------------------------------- lists and vectors


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset)


def _from_mappings(values: Sequence[Any], where: Where) -> MultiLabelColumn:
    """Read mappings from every name to 0 or 1, such as spaCy's ``cats``."""
    names = list(dict.fromkeys(str(name) for value in values for name in value))
    rows = []
    for i, value in enumerate(values):
        on = {str(name): is_on(mark) for name, mark in value.items() if mark is not None}
        if strange := [name for name, mark in on.items() if mark is None]:
            raise DataError(
                f"{where(i)}: label gives {strange[0]!r} the value {shortened(value[strange[0]])}; a mapping of "
                "labels must hold 0 or 1 for each. Round fractions, or give a list of the labels that fit."
            )
        rows.append([k for k, name in enumerate(names) if on.get(name)])
    return MultiLabelColumn(rows, tuple(names))


@dataclass(frozen=True)
class _Vectors:
    """What tells vectors of zeros and ones from lists; the arguments are those of `read_several`.

    Args:
        values: the cells, as they are.
        known: values that a cell may contain: the labels and their other spellings.
    """

    values: Sequence[Any]
    where: Where
    names: Sequence[str] | None
    labels: Sequence[str] | None
    known: Collection[str] | None
    form: str | None
    strict: bool

    def read(self, rows: list[list[Any]]) -> MultiLabelColumn | None:
        """Return the labels of rows that are vectors; None if they list names or class numbers."""
        items = [item for row in rows for item in row if not is_missing(item)]
        texts = bool(items) and all(isinstance(x, str) and is_on(x) is not None for x in items)
        if texts:
            rows = [[None if is_missing(x) else int(bool(is_on(x))) for x in row] for row in rows]
            repeated = any(len(set(row)) < len(row) for row in rows)
            known, widths = self.known or (), {len(row) for row in rows if row}
            misfit = self.labels is not None and widths != {len(self.labels)}
            if not (self.form or repeated) and (misfit or {*map(str.strip, items)} <= {*known}):
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
        sure = [i for i, row in enumerate(rows) if any(isinstance(x, bool | float) for x in row)]
        widths = {len(row) for row in rows if row}
        if any(is_missing(item) for row in rows for item in row):
            sure = [i for i in sure if any(isinstance(x, bool) for x in rows[i])]
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
        pairs = widths == {2} and all(x in (0, 1) for x in items)
        if self.form == "vectors" or (not all(rows) and (sure or repeated or pairs)):
            self._check(rows, widths)
        if len(widths) > 1 or not all(x in (0, 1) for x in items):
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

    def _check(self, rows: list[list[Any]], widths: set[int]) -> None:
        """Refuse rows that are no vectors, in a column that is known to hold vectors."""
        width = max(widths) if self.labels is None else len(self.labels)
        reason = (
            f"with {option('label_form', 'vectors')}, given or found in the training rows,"
            if self.form
            else "where other rows have vectors" + _or_numbers(rows)
        )
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
            strange = next((item for item in items if not item.isdecimal()), None)
            named = self.known is not None and {*items} <= {*self.known}
            if twice is None and (named or strange is None):
                continue
            fault = (
                f"{twice} stands there twice"
                if strange is None or named
                else f"{shortened(strange)} is none"
            )
            raise DataError(
                f"{self.where(i)}: label is {shortened(self.values[i])}, and with {option('label_form', 'numbers')} it "
                f"must hold the numbers of classes, each once: {fault}. Correct the row; if it is a vector of zeros "
                f"and ones, set {option('label_form', 'vectors')}, and if it holds names, leave the option out."
            )

    def numbers(self, texts: Sequence[str], separator: str | None) -> MultiLabelColumn | None:
        """Read texts as class numbers, which the caller said that they are; None if they are single values or names.

        Raises:
            DataError: a text has no class numbers, or one of them twice.
        """
        marks = (*_MARKS, None) if separator is None else (separator.strip() or None,)
        for mark in marks:
            rows = [[part.strip() for part in text.split(mark) if part.strip()] for text in texts]
            if all(part.isdecimal() for row in rows for part in row):
                break
        else:
            mark, rows = "", [[text] if text else [] for text in texts]
            if self.known is not None:
                return None
        self._check_numbers(rows)
        found = MultiLabelColumn(rows)
        joined = next((text for text, row in zip(texts, rows, strict=True) if len(row) > 1), None)
        if joined is None:
            return None
        found.notes.append(
            f"label: {mark or ' '!r} stands between class numbers, such as {shortened(joined)}"
        )
        return found


def _or_numbers(rows: Sequence[Sequence[Any]]) -> str:
    """Return how to read vectors as class numbers; nothing if a row repeats a number, so that it has none."""
    repeated = any(len(set(row)) < len(row) for row in rows)
    return "" if repeated else f" ({option('label_form', 'numbers')} reads class numbers)"


def _from_lists(rows: list[list[Any]], vectors: _Vectors) -> MultiLabelColumn:
    if (hot := vectors.read(rows)) is not None:
        return hot
    missing = sum(is_missing(item) for row in rows for item in row)
    found = MultiLabelColumn([[item for item in row if not is_missing(item)] for row in rows])
    if missing:
        found.notes.append(
            f"label: {missing:,} items of the lists hold nothing (None, NaN or blanks) and are left out"
        )
    return found


# ------------------------------------------------------------------------------------------------ text cells

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PLAIN = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|True|False|true|false|None|null|nan|NaN"
_ITEM = re.compile(rf"(?:np\.\w+|numpy\.\w+)\(\s*({_QUOTED}|{_PLAIN})\s*\)|({_QUOTED}|{_PLAIN})")
_WRAPPED = re.compile(
    r"(?:array|tensor|set|frozenset|list)\((.*?)(?:,\s*dtype=[\w.'<>]+)?\)", re.DOTALL
)
_WORDS = {
    "true": True, "True": True, "false": False, "False": False, "None": None, "null": None, "nan": None, "NaN": None,
}  # fmt: skip
_BETWEEN = re.compile(r"\s*,\s*|\s+")


def printed_list(text: str, *, lone: bool = False) -> list[Any] | None:
    """Return the items of a list that Python, JSON, NumPy or PostgreSQL (``{joy,love}``) prints; None for other text.

    A single name without quotes, ``[joy]``, is a list only if it may be a `lone` one.
    """
    text = text.strip()
    if match := _WRAPPED.fullmatch(text):
        text = match[1].strip() or "[]"
    if len(text) < 2 or text[0] + text[-1] not in ("[]", "()", "{}"):
        return None
    inside, items, place = text[1:-1].strip(), [], 0
    while place < len(inside):
        match = _ITEM.match(inside, place)
        if match is None:
            return _bare_words(inside, lone) if text[0] in "[{" else None
        items.append(_item(match[1] or match[2]))
        between = _BETWEEN.match(inside, match.end())
        if between is None and match.end() < len(inside):
            return _bare_words(inside, lone) if text[0] in "[{" else None
        place = between.end() if between else match.end()
    return items


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


def printed_mapping(text: str) -> Any:
    """Return a mapping, or a list of mappings, printed by Python, JSON or NumPy; None for any other text."""
    text = text.strip()
    if not text.startswith(("{", "[{")):
        return None
    for read in (json.loads, _printed_by_python):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            found = read(text)
            inside = found if isinstance(found, list) else [found]
            return found if all(isinstance(item, dict) for item in inside) else None
    return None


def unprinted(text: str) -> Any:
    """Return the list that a text prints, perhaps one of lists, or the text."""
    if (items := printed_list(text)) is not None:
        return items
    if text.strip().startswith("[["):
        for read in (json.loads, _printed_by_python):
            with contextlib.suppress(
                ValueError, TypeError, SyntaxError, MemoryError, RecursionError
            ):
                return read(text)
    return text


def _bare_words(inside: str, lone: bool) -> list[Any] | None:
    """Return the items of a list of unquoted names, such as ``[joy, love]``, or None."""
    parts = [part.strip() for part in inside.split(",")]
    several = len(parts) > 1 or lone
    return parts if several and all(parts) and not re.search(r"""['"\[\](){}:]""", inside) else None


def _choices(text: str) -> list[Any] | None:
    """Return what Label Studio writes into a cell for several choices, ``{"choices": ["joy", "love"]}``, or None."""
    printed = printed_mapping(text) if "choices" in text else None
    names = printed.get("choices") if isinstance(printed, dict) and len(printed) == 1 else None
    return names if isinstance(names, list) else None


def _item(token: str) -> Any:
    if token[0] in "'\"":
        try:
            return ast.literal_eval(token)
        except (ValueError, SyntaxError):
            return token[1:-1]
    if token in _WORDS:
        return _WORDS[token]
    return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)


def _from_printed(
    texts: Sequence[str],
    parsed: Sequence[list[Any] | None],
    vectors: _Vectors,
) -> MultiLabelColumn:
    """Read a column of printed lists; raise DataError if it has other text too."""
    where, labels = vectors.where, vectors.labels
    lists = [i for i, found in enumerate(parsed) if found is not None]
    other = next((i for i, found in enumerate(parsed) if found is None), None)
    if other is not None:
        if labels is not None and all(text in labels for text in texts):
            return MultiLabelColumn(None)
        raise DataError(
            f"{where(other)}: label holds {shortened(texts[other])}, but {where(lists[0])} holds the printed list "
            f"{shortened(texts[lists[0]])}. Write every row as a list, {_EMPTY} where no class fits."
        )
    found = _from_lists([list(items or ()) for items in parsed], vectors)
    found.notes.insert(
        0, f"label: printed lists, such as {shortened(texts[0])}, are read as lists of labels"
    )
    return found


def _written_vectors(
    texts: Sequence[str],
    vectors: _Vectors,
    separator: str | None,
    *,
    always: bool,
    single: bool,
) -> MultiLabelColumn | None:
    """Read texts that are all vectors of zeros and ones, printed or with a mark between the places; None if not."""
    cells = {text.strip() for text in texts}
    if vectors.known is not None and cells <= {*vectors.known}:
        return None
    parsed = [printed_list(cell) for cell in texts]
    undecided = separator is vectors.form is None
    if all(items is not None for items in parsed):
        lists = [items or [] for items in parsed]
        if undecided and single and not _one_hot(lists, vectors.labels):
            return None
        found = _from_printed(texts, parsed, vectors)
        return found if separator or found.form == "vectors" else None
    marks = (*_MARKS, None, "") if vectors.form != "numbers" else (*_MARKS, None)
    for mark in marks if separator is None else (separator.strip() or None,):
        split = {
            cell: [part.strip() for part in (cell.split(mark) if mark != "" and cell else cell)]
            for cell in cells
        }
        if any(is_on(part) is None for row in split.values() for part in row if part):
            continue
        widest = max(map(len, split.values()))
        if widest < 2:
            continue
        if any(len(row) > 1 and cell in (vectors.known or ()) for cell, row in split.items()):
            return None
        rows = [list(split[text.strip()]) for text in texts]
        if undecided and not _told_as_vectors(rows, mark, vectors.labels, always, single):
            return None
        if (hot := vectors.read(rows)) is None:
            return None
        hot.notes.insert(
            0,
            f"label: texts such as {shortened(next(filter(None, texts)))} are read as vectors of zeros and ones"
            f"{_or_numbers(rows)} ({option('label_separator', '')} reads one class for each text)",
        )
        return hot
    return None


def _one_hot(rows: Sequence[Sequence[Any]], labels: Collection[str] | None) -> bool:
    """Whether rows are vectors with a single 1, of three places or more or of the labels that are known."""
    if len({len(row) for row in rows}) > 1 or (len(rows[0]) < 3 and labels is None):
        return False
    return all(
        [is_on(x) for x in row].count(True) == 1 and None not in map(is_on, row) for row in rows
    )


def _told_as_vectors(
    rows: Sequence[Sequence[str]],
    mark: str | None,
    labels: Collection[str] | None,
    always: bool,
    single: bool,
) -> bool:
    """Whether texts of zeros and ones are vectors where the caller gave neither a form nor a separator.

    A pair with a comma can be a decimal, and one with a blank a name: they are vectors if the caller has decided on
    sets of classes or on the labels, and those with a blank also if a row has two zeros.
    """
    widths = {len(row) for row in rows if row}
    if mark == "":
        return not single and _told_as_digits(rows, widths, labels)
    if single:
        return _one_hot(rows, labels)
    if mark == "," and widths <= {1, 2}:
        return always or len(labels or ()) == 2
    if mark is None and not always and labels is None:
        nothing = any(row and not any(map(is_on, row)) for row in rows)
        return len(widths) == 1 and (widths != {2} or nothing)
    return True


def _told_as_digits(
    rows: Sequence[Sequence[str]], widths: Collection[int], labels: Collection[str] | None
) -> bool:
    """Whether texts such as ``010`` are vectors of the labels that are known.

    Raises:
        DataError: they look like vectors, and nothing says what they are.
    """
    alike = len(widths) == 1 and min(widths) > 2 and any(row[:1] == ["0"] for row in rows)
    if labels is None and alike and len({*map(tuple, rows)}) > 2:
        raise DataError(
            f"label holds {''.join(rows[0])!r}, which can be a vector of {len(rows[0])} zeros and ones, or a class: "
            f"{option('label_form', 'vectors')} reads vectors, {option('label_separator', '')} one class for each text."
        )
    return labels is not None and alike and {*widths} == {len(labels)}


def _parts(text: str, mark: str) -> list[str]:
    if mark == "><":  # tags such as <python><pandas>
        return [part.strip() for part in text.strip()[1:-1].split("><") if part.strip()]
    return list(dict.fromkeys(part.strip() for part in text.split(mark) if part.strip()))


def _separator(
    texts: Sequence[str], labels: Collection[str] | None, always: bool, form: str | None
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
        for mark in (*_MARKS, *_RARER):
            if all(cell in known or set(_parts(cell, mark)) <= known for cell in cells):
                return mark, []
    if cells and all(re.fullmatch(r"(<[^<>]+>)+", cell) for cell in cells):
        return "><", []
    notes = []
    for mark in _MARKS:
        split = _split_at(mark, cells)
        joined = sorted(cell for cell, parts in split.items() if len(parts) > 1)
        if not joined:
            continue
        parts, share = _recurring(split, joined)
        either = _either(mark)
        pairs = {re.sub(r"\s*,\s*", ",", cell) for cell in cells}
        decimals = all(re.fullmatch(r"[+-]?\d+(,\d+)?", cell) for cell in cells)
        if mark == "," and form is None and pairs <= _PAIRS:
            quantity = f"; if it is a number with a decimal comma, {option('task', 'regression')}"
            raise DataError(
                f"label holds {shortened(joined[0])}, which can be a vector of two places, or two class numbers. Set "
                f"{option('label_form', 'vectors')} or {option('label_form', 'numbers')}, or "
                f"{option('label_separator', '')} for one class for each text{quantity * (decimals and trains())}."
            )
        if mark == "," and form is None and decimals:
            quantity = f" ({option('task', 'regression')})" * trains()
            raise DataError(
                f"label holds {shortened(joined[0])}, which can be a number with a decimal comma{quantity}, several "
                f"class numbers ({option('label_separator', mark)}) or a class ({option('label_separator', '')}). Set "
                "one of the options."
            )
        numbers = all(part.isdecimal() for parts in split.values() for part in parts)
        if share >= _RECURRING or numbers or (always and share > 0):
            text = f"label: {mark!r} stands between several labels of a row, such as {shortened(joined[0])}"
            return mark, [f"{text} ({either})"]
        if share > 0:
            raise DataError(
                f"label holds {shortened(joined[0])} and other texts with {mark!r}, some of whose parts are labels "
                f"of other rows too, so they can be several labels or one: {either}."
            )
        if all(number_in(part) is None for part in parts):
            notes.append(
                f"label: {len(joined)} classes have {mark!r} in their name, such as {shortened(joined[0])}; each is "
                f"one class ({option('label_separator', mark)} reads several labels)"
            )
    mark, more = _rarer_separator(cells, always)
    return mark, notes + more


def _rarer_separator(cells: Collection[str], always: bool) -> tuple[str, list[str]]:
    """Detect a separator that names have in them more often, such as a blank; the result is that of `_separator`.

    Raises:
        DataError: all parts of the texts with such a mark stand alone in other rows, or all are numbers and some do.
    """
    notes = []
    every = {*cells}
    for mark in _RARER:
        marked = sorted(cell for cell in cells if mark in cell)
        parts = (part for cell in marked for part in _parts(cell, mark))
        joined = next((cell for cell in marked if len(_parts(cell, mark)) > 1), None)
        if joined is None or (mark in _IN_SIGNS and not any(c.isalpha() for c in "".join(marked))):
            continue
        lone = all(part in every for part in parts)  # which ends at the first part that is no label
        if lone or (any(map(str.isdecimal, cells)) and _all_numbers(cells, mark)):
            if always:
                text = f"label: {mark!r} stands between several labels of a row, such as {shortened(joined)}"
                return mark, [f"{text} ({_either(mark)})"]
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
                f"label: {len(several)} classes are made of parts of each other, such as {shortened(joined)}; each is "
                f"one class ({option('label_separator', mark)} reads several labels)"
            )
    return "", notes


def _all_numbers(cells: Iterable[str], mark: str) -> bool:
    return all(part.isdecimal() for cell in cells for part in _parts(cell, mark))


def _split_at(mark: str, cells: Iterable[str]) -> dict[str, list[str]]:
    return {cell: _parts(cell, mark) for cell in cells if len(cell) < 1000}


def _recurring(split: Mapping[str, Sequence[str]], joined: Sequence[str]) -> tuple[set[str], float]:
    """Return the parts of joined cells, and the share of them that occur in other cells too."""
    holders = Counter(part for parts in split.values() for part in parts)
    parts = {part for cell in joined for part in split[cell]}
    return parts, sum(holders[part] > 1 for part in parts) / len(parts)


def _either(mark: str) -> str:
    return (
        f"{option('label_separator', mark)} reads several labels, {option('label_separator', '')} one class for "
        "each text" + f", as does {option('problem', 'single_label')}" * trains()
    )
