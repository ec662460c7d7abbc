"""Writing of rows with their predictions to a table, row by row, in order."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from pretrain.data.encodings import COMPRESSIONS, compressing
from pretrain.data.parquet_rows import ParquetRows
from pretrain.data.readers import table_kind
from pretrain.errors import DataError
from pretrain.utils.files import Sink, replacing, temporary_name
from pretrain.utils.imports import pillow
from pretrain.utils.strict_json import without_nan

__all__ = ["WRITABLE", "RowWriter"]

_TEXT = (".jsonl", ".csv", ".tsv")
WRITABLE = (*_TEXT, ".parquet", *(f"{kind}{suffix}" for suffix in COMPRESSIONS for kind in _TEXT))
_BUFFER = 64 << 10  # bytes
# Most rows that are held back until the first answer, whose keys determine the columns.
_MOST_WAITING = 100_000
_MASK = re.compile(r"\d{6,}\.png")


class RowWriter:
    """Write rows with their predictions to a file of `WRITABLE`, which is created atomically at the end.

    The columns of the answers follow those of the rows; ``label`` is written as ``predicted_label``, and any other name
    that the rows already have gets the same prefix. A row without an answer has empty cells, or nulls. Masks are files
    in a folder beside the table, ``NAME.masks``, which replaces an earlier one together with the table.

    Args:
        path: the file; an existing one is kept until the new one is complete.
        names: columns of the rows; a .csv or .tsv file cannot get further columns later.

    Raises:
        DataError: the file cannot be written, a row has a new column, or the rows already contain predictions.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, list(names)
        self.masks = 0  # number of masks that have been written as files
        self._folder = path.with_name(f"{path.name}.masks")
        self._new, self._old = (temporary_name(self._folder, "new") for _ in range(2))
        self.answers: dict[str, str] = {}  # key of an answer -> column
        self._waiting: list[Mapping[str, Any]] = []  # rows before the first answer
        self._stack = contextlib.ExitStack()
        self._lines: Any = None
        self._csv: Any = None
        self._parquet: ParquetRows | None = None

    def __enter__(self) -> RowWriter:
        with self._saying(), contextlib.ExitStack() as stack:
            stack.push(self._finish_masks)  # runs last, when the table is complete or removed
            file = stack.enter_context(replacing(self.path, buffer=_BUFFER))
            kind = table_kind(self.path)
            if kind == "parquet":
                self._parquet = stack.enter_context(ParquetRows(self.path, file))
            else:
                stream = stack.enter_context(compressing(self.path, Sink(file)))
                self._lines = codecs.getwriter("utf-8")(cast(Any, stream))
            if kind in ("csv", "tsv"):
                mark = "," if kind == "csv" else "\t"
                self._csv = csv.writer(self._lines, delimiter=mark, lineterminator="\n")
            self._stack = stack.pop_all()
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
                if self.masks:
                    with contextlib.suppress(FileNotFoundError):
                        self._folder.rename(self._old)
                    self._new.rename(self._folder)

    def _finish_masks(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the earlier masks; after an exception the new ones, and put the earlier ones back."""
        if kind is not None and self._old.exists():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._old.rename(self._folder)
        elif kind is not None and self.masks and not self._new.exists():
            shutil.rmtree(self._folder, ignore_errors=True)
        for rest in (self._new, self._old):
            shutil.rmtree(rest, ignore_errors=True)

    def write(self, row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Append a row and its answer, which is {} if there is none."""
        if not self.answers and not answer:
            self._waiting.append(row)
            if len(self._waiting) > _MOST_WAITING:
                raise DataError(
                    f"The first {_MOST_WAITING:,} rows hold no text. Check that the right column is read."
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
                    f"The rows already have a column {twice[0]!r}, probably of earlier predictions; remove or "
                    "rename it."
                )
            if self._csv is not None and (self._waiting or answer):
                self._csv.writerow([*self.names, *self.answers.values()])
        for row in self._waiting:
            self._put(row, {})
        self._waiting = []

    def _put(self, row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        added = {column: self._plain(answer.get(key)) for key, column in self.answers.items()}
        if self._parquet is not None:
            self._parquet.write(row, added)
            return
        if self._csv is None:
            self._lines.write(_json({**row, **added}) + "\n")
            return
        if unknown := [name for name in row if name not in self.names]:
            raise DataError(
                f"A row has the column {unknown[0]!r}, which no row before it had, so the header of {self.path.name} "
                "lacks it. Write .jsonl, whose rows may differ."
            )
        cells = [row.get(name) for name in self.names] + list(added.values())
        self._csv.writerow([_cell(value) for value in cells])

    def _plain(self, value: Any) -> Any:
        """Write a mask, bytes (H, W), to a file and return its path beside the output; other values as they are."""
        if getattr(value, "ndim", 0) != 2:
            return value
        if not self.masks:
            found = self._folder.iterdir() if self._folder.exists() else iter(())
            if other := next((p.name for p in found if not _MASK.fullmatch(p.name)), None):
                raise DataError(
                    f"{self._folder} holds {other}, which is no mask of earlier predictions, and the folder would be "
                    "replaced. Move it, or name another output."
                )
            self._new.mkdir()
        name = f"{self.masks:06}.png"
        pillow().fromarray(value).save(self._new / name)
        self.masks += 1
        return f"{self._folder.name}/{name}"

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"Cannot write {self.path}: {error.strerror}.") from error


def _cell(value: Any) -> Any:
    """Return a value for a cell: lists and mappings as JSON, None as it is (an empty cell)."""
    if value is None or isinstance(value, str | int | float):
        return value
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(without_nan(value), ensure_ascii=False, allow_nan=False)
