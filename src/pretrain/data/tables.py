"""Tables of labelled rows from files, lists, data frames and data sets, with the location of every row."""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from pretrain.config.spelling import either, option, option_name, reads_with
from pretrain.data.json_shapes import (
    captions_of,
    is_rows,
    may_hold_splits,
    splits_of,
    unoriented,
)
from pretrain.data.paths import find_files
from pretrain.data.readers import (
    COMPRESSIONS,
    TABLE_FORMATS,
    has_transform,
    plain_value,
    table_kind,
)
from pretrain.data.shard_folders import (
    HELD_OUT,
    TRAIN,
    absent_shards,
    parts_of_shards,
    pattern_of,
    shards_of,
    split_for,
    splits_among,
)
from pretrain.data.table_readers import (
    cell_form,
    conll_sentences,
    conllu_sentences,
    csv_rows,
    json_rows,
    json_value,
    open_parquet,
    without_headers,
)
from pretrain.errors import DataError, did_you_mean
from pretrain.utils.files import note

__all__ = [
    "Chunk", "Table", "held_out_splits", "in_chunks", "parts_of_file", "read_table", "shortened", "shown", "splits",
    "stream_chunks",
]  # fmt: skip

_EXAMPLE = '{"text": "...", "label": "..."}'
_TRANSPOSED = 1024  # rows of a delimited file that are turned into columns at once
_ENTRY = {"bytes", "path"}  # keys of an entry of the datasets library: an image, a recording
_NAME = re.compile(r"[^\W\d][\w .#/-]{0,40}")  # a cell that may be the name of a column
_NUMBER = re.compile(r"[+-]?\d[\d.,]*([eE][+-]?\d+)?")


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Immutable columns of equal length.

    Args:
        name: name for messages: ``reviews.csv``, ``a list of 12 rows``.
        columns: values by column, unconverted; the cells of a CSV file stay strings.
        label_names: class names, by column, of the columns that contain class numbers (``datasets.ClassLabel``); a key
            of mappings in a column is called ``column.key``.
        places: location of each row in its source: a line number, or an index from 0; None: row i has index i.
        origin: name of the source in :meth:`where`.
        unit: ``line`` or ``row`` of a file, or the name of an index of an object in memory.
        hint: a sentence to add to the error if no column is recognised.
        orders: by column, all values that a categorical column of pandas may hold, in the order that it declares.
        remarks: by column, lines to print where it is chosen for a role.
    """

    name: str
    columns: dict[str, list[Any]]
    label_names: dict[str, list[str]] = field(default_factory=dict)
    places: Sequence[int] | None = None
    origin: str = ""
    unit: str = "row"
    hint: str = ""
    orders: Mapping[str, list[Any]] = field(default_factory=dict)
    remarks: Mapping[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise DataError if the columns, or the places, differ in length."""
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self.origin or self.name}: the columns differ in length: {lengths}. Every row needs a value in each "
                "column; otherwise give a list of objects, one for each row."
            )
        if self.places is not None and len(self.places) != len(self):
            raise DataError(
                f"{self.name}: {len(self.places)} places for {len(self)} rows; give one place for each row."
            )

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
        return replace(self, columns=columns, places=list(places))

    def with_columns(
        self, columns: dict[str, list[Any]], label_names: dict[str, list[str]]
    ) -> Table:
        """Return a table with other columns of the same rows."""
        return replace(self, columns=columns, label_names=label_names)

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
    if isinstance(value, set | frozenset):  # whose order depends on the seed of Python's hashes
        value = sorted(value, key=str)
    # An image is its content, wherever it lies.
    return f"{type(value).__name__}:{getattr(value, 'digest', value)}"


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
        name: name for messages of a source that has none; of ``inputs``, which are answered by position, rows that
            repeat the header are kept.
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
        A table of at least one row. JSON is a list of objects, an object of columns, what ``to_json`` of pandas
        writes (but ``orient="values"``, which has no names), or an object of splits, of which `name` chooses one; in
        the layout of SQuAD it has the columns ``id, context, question, answers``. ``.conll`` has ``tokens, ner_tags``
        and ``.conllu`` has ``tokens, pos_tags``. Values are not converted, except
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
    named = any(part in TRAIN for part in source)
    kinds = (str, Path, Table) if named else (Path, Table)
    if all(
        isinstance(value, kinds) or _is_data(value) or (named and is_rows(value))
        for value in source.values()
    ):
        return {str(part): value for part, value in source.items()}
    return {}


def held_out_splits(source: Any) -> dict[str, tuple[str, Any]]:
    """Return the name and source of the splits for ``valid`` and ``test``, if a dict of splits has them."""
    parts = splits(source)
    if split_for(parts, "train") is None:
        return {}
    found = {use: split_for(parts, use) for use in HELD_OUT}
    return {use: (part, parts[part]) for use, part in found.items() if part is not None}


def _is_data(value: Any) -> bool:
    frame = hasattr(value, "columns") and (hasattr(value, "iloc") or hasattr(value, "to_dicts"))
    return hasattr(value, "column_names") or frame


def _resolve(source: Any, name: str, options: dict[str, Any]) -> Table:
    if isinstance(source, Table):
        return source
    if parts := splits(source):
        part = next(iter(parts)) if len(parts) == 1 else split_for(parts, "train")
        if part is None:
            raise DataError(
                f"{name} has the splits {', '.join(parts)} and none called 'train'; give one of them, as "
                f"data[{next(iter(parts))!r}]."
            )
        _tell_unused(name, part, parts, name)
        return _resolve(parts[part], name, options)
    if isinstance(source, str | Path):
        if shards := shards_of(source):
            return _of_split(source, shards, name, options)
        files = _table_files(source)
        if len(files) > 1:
            return _joined(files, name, options)
        return _read_file(files[0], name, **options)
    extra = [key for key, value in options.items() if value is not None and key != "columns"]
    tuples = isinstance(source, list | tuple) and source and isinstance(source[0], list | tuple)
    if extra or (options["columns"] is not None and not tuples):
        key = extra[0] if extra else "names"
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
        types = zip(source.columns, source.dtypes, strict=True)
        return _made("a polars frame", source.to_dict(as_series=False), len(source), types)
    if hasattr(source, "column_names") and hasattr(source, "to_pylist"):
        names = distinct("the arrow table", list(source.column_names))
        columns = [column.to_pylist() for column in source.columns]
        return _made("an arrow table", dict(zip(names, columns, strict=True)), source.num_rows)
    if hasattr(source, "column_names"):
        return _dataset(source, name)
    raise DataError(
        f"{name} is a {type(source).__name__}, which is no table. Give the path of a file (.csv .tsv .jsonl .json "
        ".parquet .conll), a list of dicts, a dict of lists, a pandas frame or a datasets.Dataset."
    )


# ----------------------------------------------------------------------------------------------- objects


def _rows(source: Sequence[Any], name: str, columns: Sequence[str] | None) -> Table:
    names = None if columns is None else distinct("columns", list(columns))
    fields = (
        _fields(row, names, f"row {k} of {name} (index {k - 1})") for k, row in enumerate(source, 1)
    )
    named = (
        (f"row {k} of a list (index {k - 1})", plain_value(row)) for k, row in enumerate(fields, 1)
    )
    called = f"a list of {len(source):,} rows"
    return Table(called, columns_of_rows(named, name), origin="a list", unit="index")


def _fields(row: Any, names: Sequence[str] | None, where: str) -> Mapping[Any, Any]:
    """Return a row of a list as a mapping, for a tuple from the names of the columns.

    Raises:
        DataError: the row has no columns, or others than the names say.
    """
    if names is not None:
        if not isinstance(row, list | tuple) or len(row) != len(names):
            size = f" of {len(row)} values" if isinstance(row, list | tuple) else ""
            raise DataError(
                f"{where} is a {type(row).__name__}{size}, but {option('names', names)} names {len(names)}."
            )
        return dict(zip(names, row, strict=True))
    row = row._asdict() if hasattr(row, "_asdict") else row
    if isinstance(row, Mapping):
        if len({str(key) for key in row}) < len(row):
            raise DataError(
                f"{where} has keys that are the same column as text: {shortened(list(row))}. Rename one of them."
            )
        return row
    cure = 'Give dicts: [{"text": "...", "label": "..."}, ...].'
    if isinstance(row, str | Path) and Path(row).suffix:
        cure = "Several files are not joined here: give one path."
    elif isinstance(row, list | tuple):
        cure = f"Name the columns: {option('names', numbered_names(len(row)))}, or give dicts."
    raise DataError(
        f"{where} is {type(row).__name__} {shortened(row)}, which has no columns. {cure}"
    )


def _columns(source: Mapping[Any, Any], name: str) -> Table:
    made: dict[str, list[Any]] = {}
    orders = _orders((str(key), getattr(column, "dtype", None)) for key, column in source.items())
    for key, column in source.items():
        column = column.tolist() if hasattr(column, "tolist") else column
        if not isinstance(column, list | tuple):
            raise DataError(
                f"{name} is a dict whose key {key!r} holds {type(column).__name__} {shortened(column)}. "
                "Give a list for every column, or a list of dicts, one for each row."
            )
        if str(key) in made:
            raise DataError(f"{name} has the column {str(key)!r} twice.")
        made[str(key)] = [plain_value(value) for value in column]
    count = len(next(iter(made.values()), ()))
    called = f"a dict of {count:,} rows"
    return Table(called, made, origin="a dict of columns", unit="index", orders=orders)


def _frame(frame: Any) -> Table:
    columns = {}
    for k, name in enumerate(distinct("the pandas frame", [str(name) for name in frame.columns])):
        series = frame.iloc[:, k]
        pairs = zip(series.tolist(), series.isna().tolist(), strict=True)
        columns[name] = [None if absent else value for value, absent in pairs]
    types = zip(columns, frame.dtypes, strict=True)
    return _made("a pandas frame", columns, len(frame), types, unit="position")


def _orders(types: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    """Return the declared values of each column whose type has them: a categorical of pandas, an ``Enum`` of polars."""
    found = {name: getattr(dtype, "categories", None) for name, dtype in types}
    lists = {name: getattr(v, "tolist", getattr(v, "to_list", None)) for name, v in found.items()}
    return {name: plain_value(values()) for name, values in lists.items() if values is not None}


def _made(
    what: str,
    columns: Mapping[str, list[Any]],
    count: int,
    types: Iterable[tuple[str, Any]] = (),
    unit: str = "index",
) -> Table:
    made = {name: [plain_value(value) for value in column] for name, column in columns.items()}
    called = f"{what} of {count:,} rows"
    return Table(called, made, origin=what, unit=unit, orders=_orders(types))


def _dataset(dataset: Any, name: str) -> Table:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "with_format"):
        raise DataError(
            f"{name} is a streamed data set ({type(dataset).__name__}), whose rows cannot be counted or split. Load it "
            "without streaming=True."
        )
    made = stored = dataset.with_format("arrow")[:].to_pydict()
    features = getattr(dataset, "features", None) or {}
    if has_transform(dataset):
        note(f"{name}: the transform of the data set is applied once to each row")
        rows = ((f"row {i}", plain_value(row)) for i, row in enumerate(dataset))
        # What the transform leaves out, as many do with images, is read as it is stored.
        made = stored | columns_of_rows(rows, name)
    # A feature describes the stored column: names of classes do not belong to numbers that were changed.
    kept = {key: feature for key, feature in features.items() if made[key] == stored[key]}
    called = f"a data set of {len(dataset):,} rows"
    return Table(
        called, _in_modes(made, kept), _class_names(kept), origin="a data set", unit="index"
    )


# -------------------------------------------------------------------------------------------------- files


def _table_files(source: str | Path) -> list[Path]:
    """Return the file of a path or pattern, or several parquet files of a pattern."""
    spelled = str(source)
    if spelled.startswith("hub:"):
        raise DataError(
            f"{spelled!r}: a data set of the hub cannot be given by name here. "
            + _loaded(f"load_dataset({spelled.removeprefix('hub:')!r})", "['train']")
        )
    folder = os.path.expanduser(spelled)
    if os.path.isdir(folder):
        try:
            inside = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise DataError(f"{spelled} cannot be read: {error.strerror}.") from error
        cure = f"Give one of its files; it holds {', '.join(inside[:8]) or 'nothing'}."
        if {"dataset_info.json", "dataset_dict.json"} & set(inside):
            split = "['train']" * ("dataset_dict.json" in inside)
            cure = f"The datasets library saved it. {_loaded(f'load_from_disk({folder!r})', split)}"
        raise DataError(f"{spelled} is a folder, not a file of rows. {cure}")
    found = find_files(spelled)
    if len(found) > 1 and any(table_kind(file) != "parquet" for file in found):
        names = ", ".join(p.name for p in found[:4])
        raise DataError(
            f"{spelled!r} matches {len(found)} files ({names}{', ...' if len(found) > 4 else ''}). Give one, or join "
            "them first; only parquet files are joined here."
        )
    if len(several := splits_among(found)) > 1:
        note(f"{spelled}: the files of the splits {', '.join(several)} are read as one table")
    return found


def _loaded(call: str, split: str) -> str:
    """Return advice to give what a function of the datasets library returns, or a file of it on the command line."""
    written = f"import datasets; datasets.{call}{split}.to_parquet('rows.parquet')"
    return either(
        f'Write its rows to a file, and give that: python -c "{written}".',
        f"Load it and give the result: datasets.{call}.",
    )


def _tell_unused(source: str | Path, split: str, parts: Mapping[str, Any], name: str) -> None:
    """Print which splits are not used; those to hold out are, where the rows ``name`` are those of training."""
    held = {split, *(split_for(parts, use) for use in HELD_OUT)} if name == "train" else {split}
    if rest := [part for part in parts if part not in held]:
        note(
            f"{source}: the split {split!r} is used of {len(parts)} splits (not used: {', '.join(rest)})"
        )


def _of_split(
    folder: str | Path, shards: Mapping[str, list[Path]], name: str, options: dict[str, Any]
) -> Table:
    """Return the rows of the split of a folder that is meant for the rows ``name``, else those of training."""
    uses = {"train": ("train",), "validation": ("validation", "train"), "test": ("test", "train")}
    wanted = (split_for(shards, use) for use in uses.get(name, ("test", "validation", "train")))
    split = next(filter(None, wanted), None)
    if split is None and len(shards) > 1:
        raise DataError(
            f"{folder} has the splits {', '.join(shards)}, and none that is called as the {name} rows usually are. "
            f"Give the files of one: {pattern_of(*next(iter(shards.items())))!r}."
        )
    split = next(iter(shards)) if split is None else split
    if name not in ("validation", "test") or split != split_for(shards, name):
        _tell_unused(folder, split, shards, name)
    if count := absent_shards(shards[split]):
        note(
            f"{folder}: {count:,} files of the split {split!r} are not there, by the number that their names state"
        )
    return _joined(shards[split], name, options)


@dataclass(frozen=True, eq=False, repr=False)
class _Joined(Table):
    """The rows of several files, whose ``places`` count through all of them; ``starts`` has the first of each."""

    starts: Sequence[int] = ()
    files: Sequence[Path] = ()

    def where(self, i: int) -> str:
        """Return the file of row `i` and its number there."""
        place = i if self.places is None else self.places[i]
        k = bisect_right(self.starts, place) - 1
        return f"row {place - self.starts[k] + 1} of {self.files[k]}"


def _joined(files: Sequence[Path], name: str, options: dict[str, Any]) -> Table:
    """Return the rows of parquet files with the same columns, one after the other.

    Raises:
        DataError: two differ in their columns, or in the names or order of classes, or lie in several folders.
    """
    if apart := next((file for file in files if file.parent != files[0].parent), None):
        raise DataError(
            f"{files[0]} and {apart} lie in different folders, from which paths in their rows are read. Only files of "
            "one folder are joined; give those of one."
        )
    tables = [_read_file(file, name, **options) for file in files]
    first = tables[0]
    for table in tables[1:]:
        for what, own, other in (
            ("columns", set(table.names), set(first.names)),
            ("names of classes", table.label_names, first.label_names),
            ("categories", table.orders, first.orders),
        ):
            if own != other:
                raise DataError(
                    f"{table.origin} and {first.origin} differ in their {what}: {shortened(own)} and "
                    f"{shortened(other)}. Only files of one data set are joined; give one of them, or write them again."
                )
    columns = {
        name: list(chain.from_iterable(t.columns[name] for t in tables)) for name in first.names
    }
    starts = [0, *accumulate(map(len, tables))][:-1]
    called = f"{files[0].name} and {len(files) - 1} more" if len(files) > 1 else first.name
    return _Joined(
        called,
        columns,
        first.label_names,
        origin=first.origin,
        orders=first.orders,
        starts=starts,
        files=files,
    )


def _read_file(
    path: Path, name: str, format: str | None, encoding: str | None, **form: Any
) -> Table:
    """Read a file; ``form`` are the arguments of :func:`read_table` for CSV and TSV."""
    kind = _kind(path, format)
    if kind in ("csv", "tsv"):
        return _delimited_table(path, kind, encoding, **form, keep=name == "inputs")
    if any(value is not None for value in form.values()):
        told = ", ".join(map(option_name, ("names", "delimiter", "quoting")))
        raise DataError(
            f"{told} are for CSV and TSV files; {path} is read as {kind}, which has names for its columns."
        )
    if kind == "jsonl":
        return _json_lines(path, encoding)
    if kind == "json":
        return _json(path, name, encoding)
    if kind == "parquet":
        return _parquet(path)
    sentences = conll_sentences if kind == "conll" else conllu_sentences
    found = list(sentences(path, encoding))
    tag = "ner_tags" if kind == "conll" else "pos_tags"
    columns = {"tokens": [words for _, words, _ in found], tag: [tags for _, _, tags in found]}
    return _of_file(path, columns, [line for line, _, _ in found])


def _of_file(
    path: Path, columns: dict[str, list[Any]], lines: Sequence[int] | None = None, **more: Any
) -> Table:
    unit = "row" if lines is None else "line"
    return Table(path.name, columns, places=lines, origin=str(path), unit=unit, **more)


_READERS = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), "pandas.read_excel({!r})"),
    **dict.fromkeys((".html", ".htm"), "pandas.read_html({!r})[0]"),
    **{f".{kind}": f"pandas.read_{kind}({{!r}})" for kind in ("xml", "feather", "orc", "hdf")},
    **dict.fromkeys((".pkl", ".pickle"), "pandas.read_pickle({!r})"),
    ".h5": "pandas.read_hdf({!r})", ".dta": "pandas.read_stata({!r})", ".sav": "pandas.read_spss({!r})",
    ".sas7bdat": "pandas.read_sas({!r})", ".arrow": "datasets.Dataset.from_file({!r})",
}  # fmt: skip
_ARCHIVES = (".zip", ".7z", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def _kind(path: Path, format: str | None) -> str:
    known = sorted(set(TABLE_FORMATS.values()))
    kind = table_kind(path) if format is None else format.lower().removeprefix(".")
    if format is None and path.name.lower().endswith(_ARCHIVES):
        raise DataError(
            f"{path} is a compressed archive, and no table. Unpack it, and give the folder or the file in it; only a "
            ".tar of images that is not compressed is read as it is."
        )
    if format is None and (reader := _READERS.get(path.suffix.lower())):
        call = reader.format(str(path))
        written = f"import {call.split('.')[0]}; {call}.to_csv('rows.csv', index=False)"
        cure = either(f'Write it to a file that is: python -c "{written}".', f"Give {call}.")
        raise DataError(f"{path} is not read as a table. {cure}")
    if format is None and not kind:
        raise DataError(
            f"the name of {path} ends in no known suffix. Rename it to end in {' '.join(TABLE_FORMATS)} (plain or "
            f"{' '.join(COMPRESSIONS)})"
            + f", or set the format: {option('format', 'tsv')}, one of {', '.join(known)}"
            * reads_with("format")
            + "."
        )
    if kind not in known:
        raise DataError(f"{option('format', format)} is not known.{did_you_mean(kind, known)}")
    return kind


def _delimited(
    path: Path,
    kind: str,
    encoding: str | None,
    columns: Sequence[str] | None = None,
    header: bool | None = None,
    delimiter: str | None = None,
    quoting: bool | None = None,
    *,
    keep: bool = False,
) -> tuple[list[str], Iterator[tuple[int, list[str]]], str]:
    """Return the names of the columns, (line, cells) of the rows, and the hint of :class:`Table`.

    ``keep`` is that of ``without_headers``.
    """
    between, quoted = cell_form(path, kind, delimiter, quoting, encoding)
    if kind == "tsv" and quoting is None and quoted:
        note(
            f"{path}: cells are enclosed in double quotes where needed, as a CSV writer does, and read so"
            + f"; {option('quoting', False)} keeps the quotes" * reads_with("quoting")
        )
    headless = header is False or (columns is not None and not header)
    rows = csv_rows(
        path,
        delimiter=between,
        quoting=quoted,
        first="the first row" if headless else "the header",
        encoding=encoding,
        cure=f" If quotes are ordinary characters in this file: {option('quoting', False)}."
        * reads_with("quoting"),
    )
    number, top = next(rows, (1, []))
    if not top:
        raise DataError(f"{path} is empty: no header and no rows.")
    names, top_is_row = _header(path, number, top, columns, header)
    rows = (
        chain([(number, top)], rows) if top_is_row else without_headers(path, top, rows, keep=keep)
    )
    return names, rows, "" if top_is_row or header else _header_hint(path, top, between)


def _delimited_table(path: Path, kind: str, encoding: str | None, **form: Any) -> Table:
    names, rows, hint = _delimited(path, kind, encoding, **form)
    lines: list[int] = []
    columns: dict[str, list[Any]] = {name: [] for name in names}
    while some := list(islice(rows, _TRANSPOSED)):
        lines += [line for line, _ in some]
        turned = zip(*(cells for _, cells in some), strict=True)
        for column, cells in zip(columns.values(), turned, strict=True):
            column.extend(cells)
    if form.get("columns") is not None and form.get("header") is None and _is_header(columns):
        tops = [column[0] for column in columns.values()]
        note(
            f"{path}: the first line looks like a header, and is read as a row because names are given: {shown(tops)}"
            + f"; {option('header', True)} leaves it out" * reads_with("header")
        )
    return _of_file(path, columns, lines, hint=hint)


def _is_header(columns: Mapping[str, Sequence[str]]) -> bool:
    """Whether the first row looks like names: words above a column of numbers, or of values that all occur again."""
    tops = [column[0].strip() for column in columns.values() if column]
    if not tops or not all(_NAME.fullmatch(top) for top in tops):
        return False
    for column in columns.values():
        below = Counter(column[1:])
        numbers = all(_NUMBER.fullmatch(cell.strip()) for cell in below)
        if column[0] not in below and below and (numbers or min(below.values()) > 1):
            return True
    return False


def _header(
    path: Path, number: int, top: list[str], columns: Sequence[str] | None, header: bool | None
) -> tuple[list[str], bool]:
    """Return the names of the columns and whether the first row is already data."""
    if columns is None:
        if header is False:
            return numbered_names(len(top)), True
        named = zip((cell.strip() for cell in top), numbered_names(len(top)), strict=True)
        return distinct(f"{path}:{number}", [name or number for name, number in named]), False
    names = distinct("columns", list(columns))
    if len(names) != len(top):
        raise DataError(
            f"{option('names', names)} names {len(names)} columns, but the rows of {path} have {len(top)}: "
            f"{shown(top)}. Give a name for every column."
        )
    same = [cell.strip().casefold() for cell in top] == [name.casefold() for name in names]
    return names, not (same if header is None else header)


def numbered_names(count: int) -> list[str]:
    """Return ``column_1``, ``column_2``, ...: names for unnamed columns."""
    return [f"column_{k}" for k in range(1, count + 1)]


def distinct(where: str, names: list[str]) -> list[str]:
    """Return `names`; raise DataError if one occurs twice."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DataError(
            f"{where} names the column {twice[0]!r} twice: {shown(names)}. Names must differ; if this line is a row "
            f"and not a header, {_give_names([...])}."
        )
    return names


def shortened(value: Any) -> str:
    """Return the ``repr`` of a value for a message, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shown(cells: Sequence[str], most: int = 8) -> str:
    """Return the first cells or names, long ones shortened, for a message."""
    short = ", ".join(repr(c if len(c) <= 40 else c[:37] + "...") for c in cells[:most])
    return f"{short}, ... ({len(cells):,} in all)" if len(cells) > most else short


def _header_hint(path: Path, top: list[str], delimiter: str) -> str:
    text = f"The first line of {path} was taken for the header: {shown(top)}."
    if len(top) == 1:
        other = next((mark for mark in ("\t", ";", "|", ",") if mark in top[0]), None)
        if other and other != delimiter:
            cure = f"write {delimiter!r} there"
            if reads_with("delimiter"):
                cure = f"say so: {option('delimiter', other)}"
            return f"{text} If {other!r} stands between columns, {cure}."
    usual = ["text", "label"] if len(top) > 1 and len(top[0]) > len(top[1]) else ["label", "text"]
    names = [*usual, *numbered_names(9)[2:]][: len(top)]
    names += [...] if len(top) > len(names) else []  # type: ignore[list-item]
    return f"{text} If it is a row, {_give_names(names)}."


def _give_names(names: Sequence[Any]) -> str:
    """Return how to name the columns of a file without a header; an ellipsis is for the user to fill in."""
    if not reads_with("names"):
        return "put a line with the names of the columns before it"
    return f"name the columns, in their order in the file: {option('names', names)}"


def columns_of_rows(rows: Iterable[tuple[str, Any]], source: str) -> dict[str, list[Any]]:
    """Turn (location, object) pairs into columns.

    A key that is missing from some rows is None there, which is reported in one line.

    Raises:
        DataError: a row is not an object; names the location.
    """
    columns: dict[str, list[Any]] = {}
    lacking: dict[str, tuple[int, str]] = {}
    count = 0
    for where, row in rows:
        for name, value in _object(row, where).items():
            if name not in columns:
                columns[name] = [None] * count
                if count:
                    lacking[name] = (count, "the first row")
            columns[name].append(value)
        count += 1
        if len(row) != len(columns):
            for name, column in columns.items():
                if len(column) < count:
                    column.append(None)
                    number, place = lacking.get(name, (0, where))
                    lacking[name] = (number + 1, place)
    if lacking:
        told = [
            f"{name!r} ({number:,} of {count:,} rows, first: {place})"
            for name, (number, place) in lacking.items()
        ]
        more = f" and {len(told) - 3} other columns" if len(told) > 3 else ""
        note(f"{source}: rows that lack a column get None in it: {', '.join(told[:3])}{more}")
    return columns


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds {type(row).__name__}, not an object with named columns. Write each row as "
            f"{_EXAMPLE}"
            + "; a file that is one array has the name .json" * isinstance(row, list)
            + "."
        )
    return row


def _json_lines(path: Path, encoding: str | None = None) -> Table:
    lines: list[int] = []

    def rows() -> Iterator[tuple[str, Any]]:
        for line, row in json_rows(path, note, _EXAMPLE, encoding):
            lines.append(line)
            yield f"{path}:{line}", row

    columns = columns_of_rows(rows(), str(path))
    return _of_file(path, columns, lines)


def _json(path: Path, name: str, encoding: str | None) -> Table:
    try:
        value = json_value(path, encoding)
    except DataError as error:
        if getattr(error.__cause__, "msg", "") == "Extra data":  # several values: JSON lines
            return _json_lines(path, encoding)
        raise
    data: Any = value.get("data") if isinstance(value, dict) else None
    first = data[0] if isinstance(data, list) and data else None
    if isinstance(first, dict) and "paragraphs" in first:
        return _squad(path, data)
    if captions := captions_of(value, path):
        return _of_file(path, captions)
    if parts := splits_of(value):
        return _json_split(path, parts, name)
    rows = unoriented(value, path)
    if rows is value and isinstance(data, list):
        rows = unoriented(data, path)
    return _json_table(path, rows)


def parts_of_file(source: Any) -> list[str]:
    """Return which of ``train``, ``valid`` and ``test`` a JSON file of splits or a folder of shards has, or none."""
    if not may_hold_splits(source):
        return parts_of_shards(source)
    try:
        parts = splits_of(json_value(Path(source).expanduser(), None))
    except DataError:  # it is raised again where the rows are read
        return []
    return [use for use in ("train", *HELD_OUT) if split_for(parts, use)]


def _json_split(path: Path, parts: dict[str, Any], name: str) -> Table:
    """Return the rows of a file of splits that are wanted as ``name``: its own split, else that of training."""
    wanted = split_for(parts, name)
    if name in ("validation", "test") and wanted is not None:
        return _json_table(path, parts[wanted], f", split {wanted!r}")
    if len(parts) > 1 and split_for(parts, "train") is None:
        raise DataError(
            f"{path} has the splits {', '.join(parts)} and none called 'train'. Write the one that is meant to a file "
            "of its own."
        )
    tables = {split: _json_table(path, rows, f", split {split!r}") for split, rows in parts.items()}
    return _resolve(tables, name, {})


def _json_table(path: Path, value: Any, part: str = "") -> Table:
    if isinstance(value, list):
        named = ((f"row {k} of {path}{part}", row) for k, row in enumerate(value, start=1))
        return _of_file(path, columns_of_rows(named, f"{path}{part}"))
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        return _of_file(path, value)
    keys = f" with the keys {shown(list(value))}" if isinstance(value, dict) else ""
    raise DataError(
        f"{path} holds {type(value).__name__}{keys}, which is no table. Write a list of objects, an object of columns "
        "of equal length, an object of splits, or questions in the layout of SQuAD (pandas: to_json(path, "
        "orient='records'))."
    )


def _squad(path: Path, articles: list[Any]) -> Table:
    """Return the questions of a SQuAD file (Rajpurkar et al. 2016, 2018), one per row.

    The answers of an unanswerable question are empty lists.
    """
    rows: list[tuple[str, Any]] = []
    where = ""
    try:
        for a, article in enumerate(articles):
            for p, paragraph in enumerate(article["paragraphs"]):
                where = f"data[{a}].paragraphs[{p}]"
                context = paragraph["context"]
                for q, question in enumerate(paragraph["qas"]):
                    where = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    found = [] if question.get("is_impossible") else question.get("answers") or []
                    answers = {
                        "text": [answer["text"] for answer in found],
                        "answer_start": [answer["answer_start"] for answer in found],
                    }
                    row = {"id": question.get("id"), "context": context}
                    rows.append(
                        (where, row | {"question": question["question"], "answers": answers})
                    )
    except (KeyError, TypeError, AttributeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else "is not built like SQuAD"
        raise DataError(
            f"{path}: {where or 'data'} {what}. Expected data[].paragraphs[] with context and qas[], each of these "
            "with question and answers[] of text and answer_start."
        ) from error
    return _of_file(path, columns_of_rows(rows, str(path)))


def _parquet(path: Path) -> Table:
    with open_parquet(path) as file:
        table = file.read()
        names = distinct(str(path), list(table.schema.names))
        try:
            columns = {name: table.column(name).to_pylist() for name in names}
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} holds text that is not UTF-8 (byte {error.start} of a cell); write the file again with valid "
                "strings."
            ) from error
    features = _features(table.schema.metadata)
    names_of, orders = _class_names(features), _declared(table)
    return _of_file(path, _in_modes(columns, features), label_names=names_of, orders=orders)


def _declared(table: Any) -> dict[str, list[Any]]:
    """Return the values of each column that was categorical in pandas; a dictionary alone is a form of storage."""
    try:
        described = json.loads((table.schema.metadata or {})[b"pandas"])["columns"]
        counts = {
            entry["name"]: entry["metadata"]["num_categories"]
            for entry in described
            if entry["pandas_type"] == "categorical"
        }
    except (KeyError, ValueError, TypeError):
        return {}
    orders = {}
    for name in counts.keys() & set(table.schema.names):
        chunks = table.column(name).unify_dictionaries().chunks
        declared = getattr(chunks[0], "dictionary", None) if chunks else None
        if declared is not None and len(declared) == counts[name]:
            orders[name] = declared.to_pylist()
    return orders


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return the descriptions, by column, that the datasets library stores in the metadata of a parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return features if isinstance(features, dict) else {}
    except (KeyError, ValueError, TypeError):
        return {}  # written by another library, or in another layout: the values are used as they are


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: found for key in features for name, found in _names_in(features[key], key)}


def _in_modes(columns: dict[str, list[Any]], features: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return columns whose images know the mode that their feature converts them to, under ``mode``."""
    modes = {name: _described(feature).get("mode") for name, feature in features.items()}
    return columns | {
        name: [{**v, "mode": mode} if isinstance(v, Mapping) else v for v in columns[name]]
        for name, mode in modes.items()
        if isinstance(mode, str) and name in columns
    }


def _described(feature: Any) -> Mapping[str, Any]:
    """Return the fields of a feature of the datasets library, an object or its description in a file."""
    if isinstance(feature, dict) and "_type" in feature:
        return feature
    fields: Mapping[str, Any] = getattr(feature, "__dict__", {})
    return fields


def _names_in(feature: Any, column: str) -> Iterator[tuple[str, list[str]]]:
    """Yield column and class names of each ``ClassLabel`` in a feature."""
    held = _described(feature)
    if isinstance(feature, list):  # an earlier form of a sequence
        yield from _names_in(next(iter(feature), None), column)
    elif isinstance(names := held.get("names"), list | tuple):
        yield column, [str(name) for name in names]
    elif "feature" in held:
        yield from _names_in(held["feature"], column)
    elif isinstance(feature, dict) and not held:
        for key, inner in feature.items():
            yield from _names_in(inner, f"{column}.{key}")


# ------------------------------------------------------------------------------------------------- chunks


@dataclass
class Chunk:
    """A chunk of rows of a file.

    Attributes:
        rows: the rows as in the file; a row of JSON lines has only its own keys.
        table: the same rows as columns; missing values are None.
    """

    rows: list[dict[str, Any]]
    table: Table

    def with_columns(self, names: Iterable[str]) -> Table:
        """Return the table with a column of None for each of ``names`` that no row of this chunk has."""
        columns = self.table.columns
        missing = {name: [None] * len(self.rows) for name in names if name not in columns}
        return self.table.with_columns({**columns, **missing}, self.table.label_names)


def in_chunks(table: Table, size: int) -> Iterator[Chunk]:
    """Yield the rows of a table in chunks of ``size``; values that text cannot hold, such as images, become names."""
    for start in range(0, len(table), size):
        part = table.take(range(start, min(start + size, len(table))))
        rows = [{name: _in_a_file(value) for name, value in row.items()} for row in part.rows()]
        yield Chunk(rows, part)


def _in_a_file(value: Any) -> Any:
    """Return a value of a row as a text file can hold it; other values, such as bytes and dates, become text."""
    if isinstance(value, Mapping):
        if _ENTRY <= set(value) <= {*_ENTRY, "mode"}:
            return _in_a_file(value["bytes"] if value["path"] is None else value["path"])
        return {key: _in_a_file(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_in_a_file(one) for one in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{memoryview(value).nbytes:,} bytes"
    plain = isinstance(value, str | int | float | None) or hasattr(value, "dtype")
    return value if plain else str(value)


def stream_chunks(
    path: Path,
    size: int,
    *,
    columns: Sequence[str] | None = None,
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of a file in chunks of ``size``; CSV, TSV and JSON lines are streamed, other formats read whole.

    All of its rows are yielded, also those that repeat the header, because answers are joined to rows by their order.
    ``columns``, ``delimiter``, ``quoting`` and ``encoding`` are those of :func:`read_table`.

    Raises:
        DataError: the file does not exist or has no rows, or a row is invalid (the error names its line).
    """
    kind, hint = table_kind(path), ""
    if kind not in ("csv", "tsv", "jsonl"):
        whole = read_table(path, delimiter=delimiter, quoting=quoting, encoding=encoding)
        yield from in_chunks(whole, size)
        return
    [file] = _table_files(path)
    rows: Iterator[tuple[int, dict[str, Any]]]
    if kind == "jsonl":
        found = json_rows(file, note, _EXAMPLE, encoding)
        rows = ((line, _object(row, f"{file}:{line}")) for line, row in found)
    else:
        names, cells, hint = _delimited(
            file, kind, encoding, columns, delimiter=delimiter, quoting=quoting, keep=True
        )
        rows = ((line, dict(zip(names, row, strict=True))) for line, row in cells)
    empty = True
    while some := list(islice(rows, size)):
        empty = False
        keys = dict.fromkeys(name for _, row in some for name in row)
        cells_of = {key: [row.get(key) for _, row in some] for key in keys}
        table = _of_file(file, cells_of, [line for line, _ in some], hint=hint)
        yield Chunk([row for _, row in some], table)
    if empty:
        raise DataError(f"{path} holds no rows. Check that it is the right file.")
