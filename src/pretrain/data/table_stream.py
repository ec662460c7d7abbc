"""Streaming of tables larger than memory: reading in chunks of rows and writing row by row, in order."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.data.archives import COMPRESSIONS
from pretrain.data.delimited import cell_form, distinct, numbered_names
from pretrain.data.paths import find_files
from pretrain.data.readers import csv_rows, json_rows
from pretrain.data.table_files import TABLE_FORMATS, unhalved
from pretrain.data.tables import Table, read_table
from pretrain.errors import DataError
from pretrain.utils.files import HashingFile, note, replacing

__all__ = ["WRITABLE", "Chunk", "RowWriter", "stream_chunks", "table_kind"]

WRITABLE = (".jsonl", ".csv", ".tsv")
_BUFFER = 64 << 10  # bytes
# Limit of the rows that wait for the first answer, whose keys determine the columns.
_MOST_WAITING = 100_000


def table_kind(path: Path) -> str:
    """Return the format that the suffix of a file name denotes, apart from compression, or "" if none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return TABLE_FORMATS.get(suffixes[-1], "") if suffixes else ""


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


def stream_chunks(
    path: Path,
    size: int,
    *,
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of a file in chunks of ``size``; CSV, TSV and JSON lines are streamed, other formats read whole.

    ``delimiter``, ``quoting`` and ``encoding`` are those of :func:`pretrain.data.tables.read_table`.

    Raises:
        DataError: the file does not exist or has no rows, or a row is invalid (the error names its line).
    """
    kind = table_kind(path)
    if kind not in ("csv", "tsv", "jsonl"):
        whole = read_table(path, delimiter=delimiter, quoting=quoting, encoding=encoding)
        for start in range(0, len(whole), size):
            part = whole.take(range(start, min(start + size, len(whole))))
            yield Chunk(list(part.rows()), part)
        return
    found = find_files(str(path))
    if len(found) != 1:
        raise DataError(f"{path} matches {len(found)} files. Give one.")
    if kind == "jsonl":
        rows = _json_lines(found[0], encoding)
    else:
        rows = _delimited(found[0], kind, delimiter, quoting, encoding)
    any_rows = False
    while some := list(islice(rows, size)):
        any_rows = True
        names = list(dict.fromkeys(name for _, row in some for name in row))
        columns = {name: [row.get(name) for _, row in some] for name in names}
        places = [place for place, _ in some]
        table = Table(path.name, columns, places=places, origin=str(path), unit="line")
        yield Chunk([row for _, row in some], table)
    if not any_rows:
        raise DataError(f"{path} holds no rows. Check that it is the right file.")


def _json_lines(path: Path, encoding: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in json_rows(path, note, '{"text": "..."}', encoding):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number} holds {type(row).__name__}, not an object with named columns. Write each row as "
                '{"text": "..."}.'
            )
        yield number, unhalved(row)


def _delimited(
    path: Path, kind: str, delimiter: str | None, quoting: bool | None, encoding: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    between, quoted = cell_form(path, kind, delimiter, quoting, encoding)
    rows = csv_rows(path, delimiter=between, quoting=quoted, encoding=encoding)
    number, top = next(rows, (1, []))
    named = zip((cell.strip() for cell in top), numbered_names(len(top)), strict=True)
    names = distinct(f"{path}:{number}", [name or spare for name, spare in named])
    for number, cells in rows:
        yield number, dict(zip(names, cells, strict=True))


class RowWriter:
    """Write rows with their predictions to a .jsonl, .csv or .tsv file, which is created atomically at the end.

    The columns of the answers follow those of the rows; ``label`` is written as ``predicted_label``, and any other name
    that the rows already have gets the same prefix. A row without an answer has empty cells, or nulls.

    Args:
        path: the file; an existing one is kept until the new one is complete.
        names: columns of the rows; a .csv or .tsv file cannot get further columns later.

    Raises:
        DataError: the file cannot be written, a row has a new column, or the rows already contain predictions.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, list(names)
        self.answers: dict[str, str] = {}  # key of an answer -> column
        self._waiting: list[Mapping[str, Any]] = []  # rows before the first answer
        self._stack = contextlib.ExitStack()
        self._lines: _Lines | None = None
        self._csv: Any = None

    def __enter__(self) -> RowWriter:
        with self._saying():
            self._lines = _Lines(self._stack.enter_context(replacing(self.path, buffer=_BUFFER)))
        if self.path.suffix.lower() != ".jsonl":
            mark = "," if self.path.suffix.lower() == ".csv" else "\t"
            self._csv = csv.writer(self._lines, delimiter=mark, lineterminator="\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._saying():
            if kind is not None:
                self._stack.__exit__(kind, error, trace)
                return
            with self._stack:  # an error in these last writes leaves no file either
                self._begin({})

    def write(self, row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Append a row and its answer, which is {} if there is none."""
        if not self.answers and not answer:
            self._waiting.append(row)
            if len(self._waiting) > _MOST_WAITING:
                raise DataError(
                    f"The first {_MOST_WAITING:,} rows hold no text. Is the right column read?"
                )
            return
        with self._saying():
            self._begin(answer)
            self._put(row, answer)

    def _begin(self, answer: Mapping[str, Any]) -> None:
        """Determine the columns from the first answer, and write the rows that waited for it."""
        if not self.answers:
            taken = set(self.names)
            self.answers = {
                key: f"predicted_{key}" if key == "label" or key in taken else key for key in answer
            }
            if twice := [column for column in self.answers.values() if column in taken]:
                raise DataError(
                    f"The rows have a column {twice[0]!r} already: they hold predictions. Give the file without them."
                )
            if self._csv is not None and (self._waiting or answer):
                self._csv.writerow([*self.names, *self.answers.values()])
        for row in self._waiting:
            self._put(row, {})
        self._waiting = []

    def _put(self, row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        assert self._lines is not None
        added = {column: answer.get(key) for key, column in self.answers.items()}
        if self._csv is None:
            self._lines.write(json.dumps({**row, **added}, ensure_ascii=False) + "\n")
            return
        if unknown := [name for name in row if name not in self.names]:
            raise DataError(
                f"A row has the column {unknown[0]!r}, which no row before it had, so the header of {self.path.name} "
                "lacks it. Write .jsonl, whose rows may differ."
            )
        cells = [row.get(name) for name in self.names] + list(added.values())
        self._csv.writerow([_cell(value) for value in cells])

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"Cannot write {self.path}: {error.strerror}.") from error


class _Lines:
    """Text adapter that writes UTF-8 to a binary file."""

    def __init__(self, file: HashingFile) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Append a string."""
        self._file.write(text.encode("utf-8"))


def _cell(value: Any) -> Any:
    """Return a value for a cell: lists and mappings as JSON, None as it is (an empty cell)."""
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, ensure_ascii=False)
