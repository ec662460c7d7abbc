"""Tables of labelled rows from files, lists, data frames and data sets, with the location of every row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.config.spelling import option
from pretrain.data.delimited import Content, distinct, numbered_names
from pretrain.data.paths import find_files
from pretrain.data.table_files import columns_of_rows, read_table_file, unhalved
from pretrain.errors import DataError
from pretrain.utils.files import note

__all__ = ["Table", "held_out_splits", "read_table", "splits"]

_TRAIN = ("train", "training")
HELD_OUT = {
    "valid": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Immutable columns of equal length.

    Args:
        name: name for messages: ``reviews.csv``, ``a list of 12 rows``.
        columns: values by column, unconverted; the cells of a CSV file stay strings.
        label_names: class names, by column, of the columns that contain class numbers (``datasets.ClassLabel``).
        places: location of each row in its source: a line number, or an index from 0; None: row i has index i.
        origin: name of the source in :meth:`where`.
        unit: ``line`` or ``row`` of a file, or the name of an index of an object in memory.
        hint: a sentence to add to the error if no column is recognised.
    """

    name: str
    columns: dict[str, list[Any]]
    label_names: dict[str, list[str]] = field(default_factory=dict)
    places: Sequence[int] | None = None
    origin: str = ""
    unit: str = "row"
    hint: str = ""

    def __post_init__(self) -> None:
        """Raise DataError if the columns, or the places, differ in length."""
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.name}: the columns differ in length: {lengths}.")
        if self.places is not None and len(self.places) != len(self):
            raise DataError(f"{self.name}: {len(self.places)} places for {len(self)} rows.")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def __repr__(self) -> str:
        """Return the name, size and columns in one line."""
        return f"Table({self.name!r}: {len(self):,} rows; columns {', '.join(self.columns)})"

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.columns)

    def row(self, i: int) -> dict[str, Any]:
        """Return row `i`, counted from 0."""
        return {name: column[i] for name, column in self.columns.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows."""
        return (self.row(i) for i in range(len(self)))

    def where(self, i: int) -> str:
        """Return the location of row `i` in its source: ``reviews.csv, line 13`` or ``row 12 of a list (index 11)``."""
        place = i if self.places is None else self.places[i]
        origin = self.origin or self.name
        if self.unit == "line":
            return f"{origin}, line {place}"
        counter = "" if self.unit == "row" else f" ({self.unit} {place})"
        return f"row {place + 1} of {origin}{counter}"

    def take(self, indices: Sequence[int]) -> Table:
        """Return the rows `indices`, in that order; :meth:`where` still returns their original locations."""
        places = indices if self.places is None else [self.places[i] for i in indices]
        columns = {name: [column[i] for i in indices] for name, column in self.columns.items()}
        return self.with_columns(columns, self.label_names, places=list(places))

    def with_columns(
        self,
        columns: dict[str, list[Any]],
        label_names: dict[str, list[str]],
        *,
        places: Sequence[int] | None = None,
    ) -> Table:
        """Return a table with other columns and the same source, and the same `places` unless given."""
        kept = self.places if places is None else places
        return Table(self.name, columns, label_names, kept, self.origin, self.unit, self.hint)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and values, in hex; it depends on the order of the rows but not on that of the columns."""
        digest = hashlib.sha256(json.dumps(self.label_names, sort_keys=True).encode())
        for name in sorted(self.columns):
            digest.update(f"\0{json.dumps(name)}\0{len(self)}".encode())
            for value in self.columns[name]:
                text = json.dumps(value, sort_keys=True, default=_spelled)
                digest.update(f"\n{text}".encode())
        return digest.hexdigest()


def _spelled(value: Any) -> str:
    return f"{type(value).__name__}:{value}"


def read_table(
    source: Any,
    *,
    name: str = "data",
    format: str | None = None,
    columns: Sequence[str] | None = None,
    header: bool | None = None,
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> Table:
    """Read labelled rows; all of them are held in memory.

    Args:
        source: a path or a glob that matches one file: ``.csv .tsv .jsonl .ndjson .json .parquet .conll .conllu``,
            plain, ``.gz`` or ``.zst``; a list of dicts; a dict of lists; a pandas frame; a ``datasets.Dataset``; a
            dict of splits, of which ``train`` is used (see :func:`splits`); a list of tuples with `columns`; a Table.
        name: name for messages of a source that has none.
        format: one of ``csv tsv jsonl json parquet conll conllu``, for a file whose suffix does not show its format.
        columns: names of the columns of a CSV or TSV file without a header, or of a list of tuples. A first line with
            exactly these names is still treated as the header.
        header: whether the first line of a CSV or TSV file has names; None: it does unless `columns` are given.
        delimiter: character between cells; None: comma in CSV and tab in TSV, or detected from the first line.
        quoting: whether double quotes enclose cells; None: in CSV they do. In TSV they do if the whole file is quoted
            like a CSV writer does (quotes around exactly the cells that contain a tab, comma, quote or line end, with
            inner quotes doubled, or around every cell); otherwise each line is a row and quotes are characters.
        encoding: encoding of a text file, such as ``cp1252``; None: UTF-8, or the encoding of the byte order mark.

    Returns:
        A table of at least one row. JSON in the layout of SQuAD has the columns ``id, context, question, answers``,
        ``.conll`` has ``tokens, ner_tags`` and ``.conllu`` has ``tokens, pos_tags``. Values are not converted, except
        that NumPy values become Python values and missing values of pandas become None.

    Raises:
        DataError: nothing is found, the source is of another type or has no rows, or a file is invalid (the error
            names the line and byte or column).
    """
    options = {
        "format": format, "columns": columns, "header": header, "delimiter": delimiter, "quoting": quoting,
        "encoding": encoding,
    }  # fmt: skip
    table = _resolve(source, name, options)
    if not table.columns or not len(table):
        what = f"columns {', '.join(table.names)}, but no rows" if table.columns else "no rows"
        raise DataError(
            f"{table.name} holds {what}. Check that it is the right source. {table.hint}".strip()
        )
    return table


def splits(source: Any) -> dict[str, Any]:
    """Return the splits of a ``datasets.DatasetDict`` or of a dict from split to source; empty for a single source."""
    if not isinstance(source, Mapping) or not source:
        return {}
    # Strings are taken for paths only if a training split is named: the value of {"text": "a.b"} is no path.
    named = any(part in _TRAIN for part in source)
    kinds = (str, Path, Table) if named else (Path, Table)
    if all(
        isinstance(value, kinds) or _is_data(value) or (named and _is_rows(value))
        for value in source.values()
    ):
        return {str(part): value for part, value in source.items()}
    return {}


def held_out_splits(source: Any) -> dict[str, tuple[str, Any]]:
    """Return the name and source of the splits for ``valid`` and ``test``, if a dict of splits has them."""
    parts, found = splits(source), {}
    if not any(part in _TRAIN for part in parts):
        return {}
    for use, names in HELD_OUT.items():
        name = next((name for name in names if name in parts), None)
        if name is not None:
            found[use] = (name, parts[name])
    return found


def _is_rows(value: Any) -> bool:
    """Whether a value is a table (a list of dicts or tuples, or a dict of columns) and not a single column."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(column, list | tuple) for column in value.values())
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping | tuple)


def _is_data(value: Any) -> bool:
    frame = hasattr(value, "columns") and (hasattr(value, "iloc") or hasattr(value, "to_dicts"))
    return hasattr(value, "column_names") or frame


def _resolve(source: Any, name: str, options: dict[str, Any]) -> Table:
    if isinstance(source, Table):
        return source
    parts = splits(source)
    if parts:
        part = next(
            (p for p in (*_TRAIN, *parts) if p in parts and (p in _TRAIN or len(parts) == 1)), None
        )
        if part is None:
            raise DataError(
                f"{name} has the splits {', '.join(parts)} and none called 'train'; give one of them, as "
                f"data[{next(iter(parts))!r}]."
            )
        used = (
            [part, *(of for of, _ in held_out_splits(source).values())]
            if name == "train"
            else [part]
        )
        if rest := [p for p in parts if p not in used]:
            note(f"{name}: the split {part!r} is taken of {len(parts)} ({', '.join(rest)} left)")
        return _resolve(parts[part], name, options)
    if isinstance(source, str | Path):
        return _file(source, options)
    extra = [key for key, value in options.items() if value is not None and key != "columns"]
    tuples = isinstance(source, list | tuple) and source and isinstance(source[0], list | tuple)
    if extra or (options["columns"] is not None and not tuples):
        key = extra[0] if extra else "columns"
        raise DataError(
            f"{option(key)} is for files, but {name} is a {type(source).__name__}; leave it out."
        )
    if isinstance(source, Mapping):
        return _columns(source, name)
    if isinstance(source, list | tuple):
        return _rows(source, name, options["columns"])
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return _frame(source)
    if hasattr(source, "to_dicts") and hasattr(source, "columns"):
        return _made(source.to_dict(as_series=False), len(source), "a polars frame")
    if hasattr(source, "column_names") and hasattr(source, "to_pylist"):
        names = distinct("the arrow table", list(source.column_names))
        columns = [column.to_pylist() for column in source.columns]
        return _made(dict(zip(names, columns, strict=True)), source.num_rows, "an arrow table")
    if hasattr(source, "column_names"):
        return _dataset(source, name)
    raise DataError(
        f"{name} is a {type(source).__name__}, which is no table. Give the path of a file (.csv .tsv .jsonl .json "
        ".parquet .conll), a list of dicts, a dict of lists, a pandas frame or a datasets.Dataset."
    )


# ------------------------------------------------------------------------------------------------ sources


def _file(source: str | Path, options: dict[str, Any]) -> Table:
    spelled = str(source)
    if spelled.startswith("hub:"):
        raise DataError(
            f"{spelled!r}: rows of the hub are not fetched here. Load them first and give the result: "
            f"datasets.load_dataset({spelled.removeprefix('hub:')!r})."
        )
    folder = os.path.expanduser(spelled)
    if os.path.isdir(folder):
        try:
            inside = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise DataError(f"{spelled} cannot be read: {error.strerror}.") from error
        saved = {"dataset_info.json", "dataset_dict.json"} & set(inside)
        cure = (
            "It was saved by the datasets library: give datasets.load_from_disk(...) of it"
            if saved
            else f"Give one of its files; it holds {', '.join(inside[:8]) or 'nothing'}"
        )
        raise DataError(f"{spelled} is a folder, not a file of rows. {cure}.")
    found = find_files(spelled)
    if len(found) > 1:
        names = ", ".join(p.name for p in found[:4])
        raise DataError(
            f"{spelled!r} matches {len(found)} files ({names}{', ...' if len(found) > 4 else ''}). Give one, or join "
            "them first."
        )
    content = read_table_file(found[0], **options)
    unit = "row" if content.places is None else "line"
    return _table(found[0].name, content, origin=str(found[0]), unit=unit)


def _table(name: str, content: Content, *, origin: str, unit: str) -> Table:
    return Table(
        name, content.columns, content.label_names, content.places, origin, unit, content.hint
    )


def _plain(value: Any) -> Any:
    """Convert NumPy values to Python values, and replace lone surrogates in strings, recursively."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() else unhalved(value)
    if value is None or kind in (int, float, bool):
        return value
    if kind is list or kind is tuple:
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def _rows(source: Sequence[Any], name: str, columns: Sequence[str] | None) -> Table:
    if columns is not None:
        names = distinct("columns", list(columns))
        for k, row in enumerate(source):
            if not isinstance(row, list | tuple) or len(row) != len(names):
                size = f" of {len(row)} values" if isinstance(row, list | tuple) else ""
                raise DataError(
                    f"row {k + 1} of {name} (index {k}) is a {type(row).__name__}{size}, but "
                    f"{option('names', names)} names {len(names)}."
                )
        source = [dict(zip(names, row, strict=True)) for row in source]
    for k, row in enumerate(source):
        if isinstance(row, Mapping):
            continue
        if isinstance(row, str | Path) and Path(row).suffix:
            cure = "Several files are not joined here: give one path."
        elif isinstance(row, list | tuple):
            names = numbered_names(len(row))
            cure = f"Name the columns: {option('names', names)}, or give dicts."
        else:
            cure = 'Give dicts: [{"text": "...", "label": "..."}, ...].'
        raise DataError(
            f"row {k + 1} of {name} (index {k}) is {_brief(row)}, which has no columns. {cure}"
        )
    named = ((f"row {k + 1} of a list (index {k})", _plain(row)) for k, row in enumerate(source))
    made, count = columns_of_rows(named, name)
    called = f"a list of {count:,} rows"
    return Table(called, made, origin="a list", unit="index")


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _columns(source: Mapping[Any, Any], name: str) -> Table:
    made: dict[str, list[Any]] = {}
    for key, column in source.items():
        column = column.tolist() if hasattr(column, "tolist") else column
        if not isinstance(column, list | tuple):
            raise DataError(
                f"{name} is a dict whose key {key!r} holds {_brief(column)}. Give a list for every column, or a list "
                "of dicts, one for each row."
            )
        if str(key) in made:
            raise DataError(f"{name} has the column {str(key)!r} twice.")
        made[str(key)] = [_plain(value) for value in column]
    lengths = {key: len(column) for key, column in made.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{name}: the columns differ in length: {lengths}. Every row needs a value in each column."
        )
    count = next(iter(lengths.values()), 0)
    return Table(f"a dict of {count:,} rows", made, origin="a dict of columns", unit="index")


def _frame(frame: Any) -> Table:
    names = distinct("the pandas frame", [str(name) for name in frame.columns])
    made = {}
    for k, name in enumerate(names):
        series = frame.iloc[:, k]
        missing = series.isna().tolist()
        pairs = zip(series.tolist(), missing, strict=True)
        made[name] = [None if absent else _plain(value) for value, absent in pairs]
    return Table(
        f"a pandas frame of {len(frame):,} rows", made, origin="a pandas frame", unit="position"
    )


def _made(columns: dict[str, list[Any]], count: int, what: str) -> Table:
    plain = {name: [_plain(value) for value in column] for name, column in columns.items()}
    return Table(f"{what} of {count:,} rows", plain, origin=what, unit="index")


def _dataset(dataset: Any, name: str) -> Table:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "with_format"):
        raise DataError(
            f"{name} is a streamed data set ({type(dataset).__name__}), whose rows cannot be counted or split. Load it "
            "without streaming=True."
        )
    made = dataset.with_format("arrow")[:].to_pydict()
    features = getattr(dataset, "features", None) or {}
    label_names = {}
    for key, feature in features.items():
        inner = feature
        while inner is not None and not hasattr(inner, "names"):
            inner = getattr(inner, "feature", None)
        if inner is not None:
            label_names[key] = [str(label) for label in inner.names]
    called = f"a data set of {len(dataset):,} rows"
    return Table(called, made, label_names, origin="a data set", unit="index")
