"""Writing of rows to a parquet file, in chunks, of which the first fixes the columns and their types."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.data.table_readers import arrow_modules
from pretrain.errors import DataError
from pretrain.utils.files import HashingFile, Sink
from pretrain.utils.strict_json import without_nan

__all__ = ["ParquetRows"]

_CHUNK = 4096  # rows in memory


class ParquetRows:
    """Write rows to a parquet file.

    The first chunk fixes the columns and their types: numbers, texts, lists and structs. A column that has no such type
    there, because its values are of several kinds, objects of different keys, or all missing or empty, holds texts, in
    which all other values are JSON.

    Args:
        path: the file, for messages.
        file: what is written to.

    Raises:
        DataError: pyarrow is missing, or a later row has another column or type.
    """

    def __init__(self, path: Path, file: HashingFile) -> None:
        self._arrow, self._parquet = arrow_modules("writing")
        self._path, self._file = path, file
        self._stack = contextlib.ExitStack()
        self._rows: list[dict[str, Any]] = []
        self._last: list[str] = []
        self._writer: Any = None

    def write(self, row: Mapping[str, Any], answers: Mapping[str, Any]) -> None:
        """Append a row; the columns of its answers follow all others."""
        self._last = list(answers)
        self._rows.append({**row, **answers})
        if len(self._rows) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        if self._writer is None:
            names.sort(key=self._last.__contains__)
            columns = {name: self._first(self._column(name)) for name in names}
            schema = self._arrow.schema([(name, column.type) for name, column in columns.items()])
            self._writer = self._stack.enter_context(
                self._parquet.ParquetWriter(Sink(self._file), schema)
            )
        else:
            schema = self._writer.schema
            if new := next((name for name in names if name not in schema.names), None):
                raise self._changed(f"the column {new!r} is new")
            columns = {field.name: self._later(field) for field in schema}
        self._writer.write_table(self._arrow.Table.from_pydict(columns, schema=schema))
        self._rows = []

    def _column(self, name: str) -> list[Any]:
        return [without_nan(row.get(name)) for row in self._rows]

    def _first(self, values: list[Any]) -> Any:
        with contextlib.suppress(self._arrow.ArrowException, OverflowError, TypeError, ValueError):
            column = self._arrow.array(values)
            if self._is_definite(column.type) and column.to_pylist() == values:
                return column
        return self._texts(values)

    def _is_definite(self, kind: Any) -> bool:
        """Whether the type is known to the last part: lists that are all empty have no type of their items."""
        types = self._arrow.types
        if types.is_list(kind):
            return self._is_definite(kind.value_type)
        if types.is_struct(kind):
            return kind.num_fields > 0 and all(self._is_definite(field.type) for field in kind)
        return not types.is_null(kind)

    def _later(self, field: Any) -> Any:
        values = self._column(field.name)
        if self._arrow.types.is_string(field.type):
            return self._texts(values)
        try:
            column = self._arrow.array(values, type=field.type)
        except (self._arrow.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise self._changed(f"column {field.name!r}: {error}") from error
        if _full(column.to_pylist()) != _full(values):
            raise self._changed(f"objects in the column {field.name!r} have other keys")
        return column

    def _texts(self, values: list[Any]) -> Any:
        return self._arrow.array([_text(value) for value in values], type=self._arrow.string())

    def _changed(self, what: str) -> DataError:
        return DataError(
            f"The rows of {self._path.name} do not all have the columns and types of the first {_CHUNK:,}: {what}. "
            "Write .jsonl, whose rows may differ."
        )

    def __enter__(self) -> ParquetRows:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        with self._stack:
            if kind is None and (self._rows or self._writer is None):
                self._flush()


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _full(value: Any) -> Any:
    """Return a value without the keys that have no value."""
    if isinstance(value, Mapping):
        return {key: _full(one) for key, one in value.items() if one is not None}
    return [_full(one) for one in value] if isinstance(value, list) else value
