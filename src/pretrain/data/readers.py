"""Readers of single files: text in bounded blocks, plain or compressed, with the place of every fault.

A reader yields pieces ``(text, end)``: ``end`` is True for the last piece of a document, so that a document of
any size passes through constant memory.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from pretrain.data.archives import COMPRESSIONS, open_packed
from pretrain.errors import DataError, did_you_mean
from pretrain.settings.spelling import column as column_option

__all__ = [
    "COMPRESSIONS", "FORMATS", "Piece", "csv_rows", "decode_line", "file_format", "found_in_folders", "import_parquet",
    "json_rows", "lines", "parse_json", "read_file", "whole_characters",
]  # fmt: skip

Piece = tuple[str, bool]

FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
_BLOCK = 1 << 20
_MAX_LINE = 512 << 20
_MAGIC = {b"\x1f\x8b": "gzip data (name it .gz)", b"(\xb5/\xfd": "zstandard data (name it .zst)",
          b"PAR1": "parquet data (name it .parquet)", b"PK\x03\x04": "a zip archive (unpack it)"}  # fmt: skip


def file_format(path: Path) -> str | None:
    """Return ``text``, ``jsonl``, ``csv``, ``parquet``, or None for a name that says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def found_in_folders(path: Path) -> bool:
    """Whether a folder is searched for files of this name: ``.json`` is more often a setting than text."""
    return bool(file_format(path)) and ".json" not in [s.lower() for s in path.suffixes[-2:]]


def read_file(
    path: Path, *, text: str, separator: str | None, notes: Callable[[str], None]
) -> Iterator[Piece]:
    """Yield the documents of a file in pieces.

    Args:
        path: the file.
        text: column of the text in tables.
        separator: what stands between documents in plain text; None: the file is one document.
        notes: told in one sentence about anything that was left out.

    Raises:
        DataError: with file, line and byte or column.
    """
    kind = file_format(path) or "text"
    if kind == "text":
        blocks = _decoded(path)
        return _whole(blocks) if separator is None else _separated(blocks, separator)
    if kind == "jsonl":
        return _jsonl(path, text, notes)
    if kind == "csv":
        return _csv(path, text)
    return _parquet(path, text)


def _refuse_binary(path: Path, head: bytes) -> None:
    for magic, meaning in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path} is not text: it holds {meaning}.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8.")
    place = head.find(b"\0")
    if place >= 0:
        raise DataError(
            f"{path} is a binary file: byte {place} is NUL. Give text files, or convert this one to UTF-8 text."
        )


def _bad_utf8(path: Path, line: int, byte: int, offset: int, value: int) -> DataError:
    return DataError(
        f"{path}:{line}:{byte} is not UTF-8: byte 0x{value:02x} (byte {byte} of line {line}, offset {offset} of the "
        "file). The file has another encoding or is damaged; convert it, for example: iconv -f LATIN1 -t UTF-8."
    )


def _decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks; a byte order mark is dropped, everything else is kept as it is."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = line_start = 0
    line = 1
    with open_packed(path, _BLOCK) as stream:
        while True:
            block = stream.read(_BLOCK)
            pending = decoder.getstate()[0]
            if offset == 0:
                _refuse_binary(path, block[:8192])
                if block.startswith(codecs.BOM_UTF8):
                    block, offset, line_start = block[3:], 3, 3
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                data = pending + block
                place = offset - len(pending) + error.start
                line += data.count(b"\n", 0, error.start)
                newline = data.rfind(b"\n", 0, error.start)
                start = offset - len(pending) + newline + 1 if newline >= 0 else line_start
                raise _bad_utf8(path, line, place - start + 1, place, data[error.start]) from error
            line += block.count(b"\n")
            newline = block.rfind(b"\n")
            if newline >= 0:
                line_start = offset + newline + 1
            offset += len(block)
            if text:
                yield text
            if not block:
                return


def _whole(blocks: Iterator[str]) -> Iterator[Piece]:
    previous = ""
    for block in blocks:
        if previous:
            yield previous, False
        previous = block
    yield previous, True


def _separated(blocks: Iterator[str], separator: str) -> Iterator[Piece]:
    """Cut a stream of text at ``separator``; a document longer than a block comes in several pieces."""
    rest, begun = "", False
    keep = len(separator) - 1
    for block in blocks:
        *parts, rest = (rest + block).split(separator)
        for part in parts:
            yield part, True
            begun = True
        if len(rest) > _BLOCK:
            cut = len(rest) - keep
            yield rest[:cut], False
            rest, begun = rest[cut:], False
    if (
        rest or not begun
    ):  # a separator at the very end closes the last document and opens no new one
        yield rest, True


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) with the line's end still on it; no line is held that is too long for one row."""
    number = 0
    with open_packed(path, _BLOCK) as stream:
        _refuse_binary(path, cast(io.BufferedReader, stream).peek(8192)[:8192])
        while True:
            line = stream.readline(_MAX_LINE + 1)
            if not line:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > _MAX_LINE:
                raise DataError(
                    f"{path}:{number} is longer than {_MAX_LINE >> 20} MiB, too long for one row of a table; put one "
                    "document on each line, or give such texts as .txt, which is read in pieces."
                )
            yield number, line


def decode_line(path: Path, number: int, line: bytes) -> str:
    """Return the text of a line; raise DataError with line and byte unless it is UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}:{error.start + 1} is not UTF-8: byte 0x{line[error.start]:02x} (byte {error.start + 1} "
            f"of line {number}). The file has another encoding or is damaged; convert it to UTF-8."
        ) from error


def _no_constant(name: str) -> None:
    raise DataError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DataError(f"the key {name!r} stands twice in one object")
            seen.add(name)
    return row


def parse_json(text: str) -> Any:
    """Parse JSON strictly: DataError for a key that stands twice and for NaN, ValueError for what is no JSON."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)


def json_rows(path: Path, notes: Callable[[str], None], example: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a file of JSON lines; blank lines are passed over, a torn last line is told to `notes`.

    Raises:
        DataError: with line and column; `example` shows how a line should look.
    """
    for number, line in lines(path):
        content = (
            decode_line(path, number, line)
            if line.endswith(b"\n")
            else line.decode("utf-8", "replace")
        )
        if not content.strip():
            continue
        try:
            row = parse_json(content)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}. Correct or remove this line.") from error
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n") and number > 1:
                notes(
                    f"{path}:{number}: the last line is torn (the file was cut while being written); left out"
                )
                return
            where = f":{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{path}:{number}{where} is not valid JSON: {error}. Expected one JSON object on each line, such as "
                f"{example}."
            ) from error
        if not line.endswith(b"\n"):
            decode_line(path, number, line)
        yield number, row


def _jsonl(path: Path, column: str, notes: Callable[[str], None]) -> Iterator[Piece]:
    for number, row in json_rows(path, notes, f'{{"{column}": "..."}}'):
        yield _cell(row, column, f"{path}:{number}"), True


def _cell(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds {type(row).__name__}, not an object with a column {column!r}. Write one object a line."
        )
    if column not in row:
        raise _no_column(where, column, list(row))
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text. Choose the column with "
            f"{column_option('text')}, or turn the values into strings."
        )
    return whole_characters(value)


def whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs: a JSON escape can spell one, but it is no character and has no UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _no_column(where: str, column: str, present: list[str]) -> DataError:
    names = ", ".join(map(repr, present)) or "none"
    hint = did_you_mean(column, present) if present else ""
    hint = hint if "mean" in hint else ""
    return DataError(
        f"{where} has no column {column!r}; columns present: {names}.{hint} Choose one with {column_option('text')}."
    )


def csv_rows(
    path: Path, *, delimiter: str = ",", quoting: bool = True, first: str = "the header"
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it begins, cells) of every row, the first one included; blank lines are passed over.

    Args:
        path: the file.
        delimiter: the character between cells.
        quoting: whether double quotes enclose cells; if not, every line is a row and quotes are ordinary characters.
        first: what an error calls the first row, to which the others must be equal in width.

    Raises:
        DataError: a row of another width, or quotes that do not close, with the line.
    """
    decoded = (decode_line(path, number, line) for number, line in lines(path))
    rows = _quoted_rows(path, decoded, delimiter) if quoting else _plain_rows(decoded, delimiter)
    width = 0
    for number, row in rows:
        if width and len(row) != width:
            what = {",": "comma", "\t": "tab"}.get(delimiter, repr(delimiter))
            cure = (
                f"A text that holds a {what}, a quote or a line end must stand in double quotes; correct the quoting "
                "of this row."
                if quoting
                else f"Quotes are ordinary characters in this file, so no text may hold a {what} or a line end."
            )
            raise DataError(
                f"{path}:{number} has {len(row)} columns, but {first} has {width}. {cure}"
            )
        width = len(row)
        yield number, row


def _plain_rows(decoded: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # The csv module, even without quoting, takes a carriage return inside a line for the end of a row.
    for number, line in enumerate(decoded, start=1):
        content = line.removesuffix("\n").removesuffix("\r")
        if content:
            yield number, content.split(delimiter)


def _quoted_rows(
    path: Path, decoded: Iterator[str], delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(decoded, delimiter=delimiter, strict=True)
    first = 1
    try:
        while True:
            first = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if row:
                yield first, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{first} begins a row that is not valid CSV: {error} (found at line {reader.line_num}). Often a "
            "double quote is not closed, or one inside a quoted text is not doubled."
        ) from error


def _csv(path: Path, column: str) -> Iterator[Piece]:
    rows = csv_rows(path)
    _, header = next(rows, (1, []))
    if not header:
        return
    if column not in header:
        raise _no_column(f"{path}:1", column, header)
    place = header.index(column)
    for _, row in rows:
        yield row[place], True


def import_parquet() -> tuple[Any, Any]:
    """Return the modules (pyarrow, pyarrow.parquet); DataError where they are not installed."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            "reading .parquet files needs pyarrow: pip install pyarrow (datasets brings it)"
        ) from error
    return arrow, parquet


def _parquet(path: Path, column: str) -> Iterator[Piece]:
    arrow, parquet = import_parquet()
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise _no_column(str(path), column, names)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    where = f"{path}, row {number}"
                    try:
                        cell = value.as_py()
                    except UnicodeDecodeError as error:
                        raise DataError(
                            f"{where}: column {column!r} is not UTF-8 (byte {error.start} of the text); write the "
                            "file again with valid strings."
                        ) from error
                    yield _cell({column: cell}, column, where), True
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}.") from error
