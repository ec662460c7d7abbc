"""Readers of single files: text in bounded blocks, plain or compressed, with the location of every error.

A reader yields pieces ``(text, end)``, where ``end`` is True for the last piece of a document, so that a plain-text
document of any size is read in constant memory.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pretrain.config.spelling import column as column_option
from pretrain.data.archives import COMPRESSIONS
from pretrain.data.encodings import check_encoding, not_decodable, open_text
from pretrain.errors import DataError, did_you_mean

__all__ = [
    "COMPRESSIONS", "FORMATS", "Piece", "Reading", "csv_rows", "decode_line", "delimiter_of", "file_format",
    "found_in_folders", "import_parquet", "json_rows", "lines", "parse_json", "read_file", "whole_characters",
]  # fmt: skip

Piece = tuple[str, bool]

FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv",
    ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".html": "html", ".htm": "html",
}  # fmt: skip
_BLOCK = 1 << 20
_MAX_LINE = 512 << 20
_MAX_WHOLE = 1 << 30  # size limit, in bytes, of files that cannot be read in pieces


@dataclass(frozen=True)
class Reading:
    """Options for reading files of documents.

    Args:
        text: column of the text in tables.
        separator: text between documents in plain text; None: a file is one document.
        encoding: encoding of text and tables; None is UTF-8, or the encoding of the byte order mark.
        notes: called with one sentence about anything that is skipped.
        undecodable: called for each document that cannot be decoded, which is then skipped; it receives a function
            that returns the error. None: such a document raises the error.
    """

    text: str = "text"
    separator: str | None = None
    encoding: str | None = None
    notes: Callable[[str], None] = lambda note: None
    undecodable: Callable[[Callable[[], DataError]], None] | None = None


def file_format(path: Path) -> str | None:
    """Return the format that the suffix of a file name denotes, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def found_in_folders(path: Path) -> bool:
    """Whether a search of folders includes this file; ``.json`` is excluded, being mostly used for settings."""
    return bool(file_format(path)) and ".json" not in [s.lower() for s in path.suffixes[-2:]]


def read_file(path: Path, how: Reading) -> Iterator[Piece]:
    """Yield the documents of a file in pieces.

    Raises:
        DataError: the file cannot be read; names the file, and the line and byte or column.
    """
    kind = file_format(path) or "text"
    if kind == "text":
        blocks = _decoded(path, how)
        if how.separator is None:
            return _whole(blocks, how)
        return _separated(blocks, _line_feeds(how.separator), how)
    if kind == "html":
        return _html(path, how)
    if kind == "jsonl":
        return _jsonl(path, how)
    if kind in ("csv", "tsv"):
        return _delimited(path, kind, how)
    return _parquet(path, how.text)


# --------------------------------------------------------------------------------------------------- plain text

# Surrogates that stand for invalid bytes until the document that contains them is skipped.
_ESCAPED = re.compile("[\udc80-\udcff]")


def _line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(path: Path, how: Reading) -> Iterator[tuple[str, _Fault | None]]:
    """Yield the text of a file in blocks, without a byte order mark and with line feeds as line ends.

    If documents may be skipped, a block with invalid bytes is yielded with these bytes escaped as surrogates, together
    with a description of the first of them.
    """
    decoder: Any = codecs.getincrementaldecoder("utf-8")("strict")
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    offset = line_start = 0
    line = 1
    with open_text(path, how.encoding) as stream:
        while True:
            block = stream.read(_BLOCK)
            state = decoder.getstate()
            pending = state[0]
            if offset == 0 and block.startswith(codecs.BOM_UTF8):
                block, offset, line_start = block[3:], 3, 3
            fault = None
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                data = pending + block
                place = offset - len(pending) + error.start
                at = line + data.count(b"\n", 0, error.start)
                newline = data.rfind(b"\n", 0, error.start)
                start = offset - len(pending) + newline + 1 if newline >= 0 else line_start
                fault = _Fault(path, at, place - start + 1, data[error.start], how.encoding, place)
                if how.undecodable is None:
                    raise fault() from error
                decoder.setstate(state)
                decoder.errors = "surrogateescape"
                text = decoder.decode(block, final=not block)
                decoder.errors = "strict"
            line += block.count(b"\n")
            newline = block.rfind(b"\n")
            if newline >= 0:
                line_start = offset + newline + 1
            offset += len(block)
            text = ends.decode(text, final=not block)
            if text or fault:
                yield text, fault
            if not block:
                return


@dataclass(frozen=True)
class _Fault:
    """A byte that cannot be decoded; calling it returns the error, for which the encoding of the file is guessed."""

    path: Path
    line: int
    byte: int
    value: int
    encoding: str | None
    offset: int | None = None

    def __call__(self) -> DataError:
        return not_decodable(
            self.path, self.line, self.byte, self.value, self.encoding, offset=self.offset
        )


def _whole(blocks: Iterator[tuple[str, _Fault | None]], how: Reading) -> Iterator[Piece]:
    previous: str | None = None
    for block, fault in blocks:
        if fault is not None:
            if previous is not None or how.undecodable is None:
                raise fault()  # earlier pieces of this document may have been yielded already
            how.undecodable(fault)
            return
        if previous:
            yield previous, False
        previous = block
    yield previous or "", True


def _separated(
    blocks: Iterator[tuple[str, _Fault | None]], separator: str, how: Reading
) -> Iterator[Piece]:
    """Split a stream of text at ``separator``; a document longer than a block is yielded in several pieces."""
    rest, begun, whole = "", False, True
    keep = len(separator) - 1
    last: _Fault | None = None

    def left_out(part: str) -> bool:
        """Whether a document is skipped because it cannot be decoded; raise if pieces of it were already yielded."""
        if last is None or not _ESCAPED.search(part):
            return False
        if not whole or how.undecodable is None:
            raise last()
        how.undecodable(last)
        return True

    for block, fault in blocks:
        last = fault or last
        *parts, rest = (rest + block).split(separator)
        for part in parts:
            begun = True
            if not left_out(part):
                yield part, True
            whole = True
        if len(rest) > _BLOCK:
            cut = len(rest) - keep
            whole = False
            left_out(rest)
            yield rest[:cut], False
            rest, begun = rest[cut:], False
    # A separator at the very end ends the last document and does not begin another one.
    if (rest or not begun) and not left_out(rest):
        yield rest, True


# -------------------------------------------------------------------------------------------------------- lines


def lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) in UTF-8, with the line end included.

    Raises:
        DataError: a line is longer than 512 MiB, or the file cannot be read.
    """
    number = 0
    with open_text(path, encoding) as stream:
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


def decode_line(path: Path, number: int, line: bytes, encoding: str | None = None) -> str:
    """Return the text of a line; raise DataError with line and byte if it cannot be decoded."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(path, number, error.start + 1, line[error.start], encoding)() from error


def _text_of(path: Path, encoding: str | None) -> str:
    """Return the whole text of a file whose format cannot be read in pieces."""
    parts, size = [], 0
    for number, line in lines(path, encoding):
        size += len(line)
        if size > _MAX_WHOLE:
            raise DataError(
                f"{path} is longer than {_MAX_WHOLE >> 20} MiB, too long to be read as a whole. Write it as JSON lines "
                "(.jsonl) or plain text, which are read in pieces."
            )
        parts.append(decode_line(path, number, line, encoding))
    return "".join(parts)


# --------------------------------------------------------------------------------------------------------- HTML

_UNSEEN = frozenset({"script", "style", "template"})
_INLINE = frozenset(
    {
        *(
            "a",
            "abbr",
            "b",
            "bdi",
            "bdo",
            "cite",
            "code",
            "data",
            "del",
            "dfn",
            "em",
            "font",
            "i",
            "ins",
            "kbd",
        ),
        *(
            "label",
            "mark",
            "q",
            "s",
            "samp",
            "small",
            "span",
            "strong",
            "sub",
            "sup",
            "time",
            "tt",
            "u",
            "var",
            "wbr",
        ),
    }
)


class _HtmlText(HTMLParser):
    """Extracts the text of an HTML page: block elements on their own lines, whitespace collapsed as in a browser."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._unseen = self._kept = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._unseen += tag in _UNSEEN
        self._kept += tag == "pre"
        if tag not in _INLINE:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen - 1)
        if tag == "pre":
            self._kept = max(0, self._kept - 1)
        if tag not in _INLINE:
            self._parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._parts.append(data if self._kept else re.sub(r"[ \t\n\r\f]+", " ", data))

    def text(self) -> str:
        """Return the text parsed so far."""
        text = re.sub(
            r" *\n *| {2,}", lambda m: "\n" if "\n" in m[0] else " ", "".join(self._parts)
        )
        return re.sub(r"\n{3,}", "\n\n", text).strip()


def _html(path: Path, how: Reading) -> Iterator[Piece]:
    encoding = how.encoding
    if encoding is None:
        encoding = _charset(path)
    try:
        page = _text_of(path, encoding)
    except DataError as error:
        if how.undecodable is None or not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        fault = error
        how.undecodable(lambda: fault)
        return
    parser = _HtmlText()
    try:
        parser.feed(page)
        parser.close()
    except (AssertionError, ValueError) as error:
        raise DataError(f"{path} is no HTML that can be read: {error}.") from error
    yield parser.text(), True


def _charset(path: Path) -> str | None:
    """Return the encoding that an HTML page declares, or None if it declares none or one unknown to Python."""
    head = b"".join(
        line for _, line in zip(range(40), (line for _, line in lines(path)), strict=False)
    )
    found = re.search(rb"<meta[^>]{0,200}charset=[\"']?([\w-]{2,40})", head, re.IGNORECASE)
    try:
        return check_encoding(found[1].decode()) if found else None
    except DataError:
        return None


# --------------------------------------------------------------------------------------------------------- JSON


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
    """Parse JSON strictly.

    Raises:
        DataError: an object has a key twice, or a value is NaN or infinite.
        ValueError: the text is not JSON.
    """
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)


def json_rows(
    path: Path,
    notes: Callable[[str], None],
    example: str,
    encoding: str | None = None,
    undecodable: Callable[[Callable[[], DataError]], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a file of JSON lines; blank lines and an incomplete last line are skipped.

    Args:
        path: the file.
        notes: called with a sentence about an incomplete last line.
        example: an example of a line, for error messages.
        encoding: None is UTF-8.
        undecodable: called for each line that cannot be decoded, which is then skipped; None: it is an error.

    Raises:
        DataError: a line is invalid; names the line and column.
    """
    for number, line in lines(path, encoding):
        complete = line.endswith(b"\n")
        try:
            content = line.decode("utf-8")
        except UnicodeDecodeError as error:
            if complete:
                fault = _Fault(path, number, error.start + 1, line[error.start], encoding)
                if undecodable is None:
                    raise fault() from error
                undecodable(fault)
                continue
            content = line.decode("utf-8", "replace")
        if not content.strip():
            continue
        try:
            row = parse_json(content)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}. Correct or remove this line.") from error
        except (ValueError, RecursionError) as error:
            if not complete and number > 1:
                notes(
                    f"{path}:{number}: the last line is torn (the file was cut while being written); left out"
                )
                return
            where = f":{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{path}:{number}{where} is not valid JSON: {_json_cause(content, error)}. Expected one JSON object "
                f"on each line, such as {example}."
            ) from error
        if not complete:
            decode_line(path, number, line, encoding)
        yield number, row


def _json_cause(content: str, error: Exception) -> str:
    """Return the likely cause of a JSON error in plain words, or the parser's message if none is recognised."""
    text = content.strip()
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    assert isinstance(error, ValueError)
    place = getattr(error, "pos", 0)
    if re.match(r"[\[{]\s*u?'", text):
        return "names and texts stand in single quotes, as Python prints them, where JSON has double quotes"
    if place < len(content) and content[place] < " ":
        return "a tab, a line end or another control character stands in a text and must be written \\t, \\n"
    if text in ("{", "[") or (text[:1] in ("{", "[") and place >= len(content.rstrip())):
        return "the object goes on in the next line, or is cut off"
    if text[:1] not in ("{", "[", '"') and ("," in text or "\t" in text):
        return "the line looks like a row of a table (name the file .csv or .tsv)"
    return str(error)


def _jsonl(path: Path, how: Reading) -> Iterator[Piece]:
    if _is_one_value(path, how.encoding):
        yield from _json_value(path, how)
        return
    rows = json_rows(path, how.notes, f'{{"{how.text}": "..."}}', how.encoding, how.undecodable)
    for number, row in rows:
        yield _cell(row, how.text, f"{path}:{number}"), True


def _is_one_value(path: Path, encoding: str | None) -> bool:
    """Whether a file holds a single JSON value over several lines, mostly an array, instead of one object per line."""
    first = next((line.strip() for _, line in lines(path, encoding) if line.strip()), b"")
    if first.startswith(b"["):
        return True
    return (
        first == b"{" and path.with_suffix("").name != path.name and ".json" in path.suffixes[-2:]
    )


def _json_value(path: Path, how: Reading) -> Iterator[Piece]:
    """Yield the texts of an array of objects, of an object with such an array in ``data``, or of an object of columns.

    A single object is one document, and strings in an array are documents themselves.
    """
    text = _text_of(path, how.encoding)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno} is not valid JSON: {_json_cause(text, error)}. Often a comma or a "
            "bracket is missing there, or the file was cut while being written."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {_json_cause(text, error)}.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}. Correct the file.") from error
    if isinstance(value, dict) and how.text not in value and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict) and isinstance(value.get(how.text), list):
        value = [{how.text: item} for item in value[how.text]]
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield whole_characters(row) if isinstance(row, str) else _cell(row, how.text, where), True


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
    """Replace lone surrogates: a JSON escape can denote one, but it is not a character and has no UTF-8 encoding."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _no_column(where: str, column: str, present: list[str]) -> DataError:
    names = ", ".join(map(repr, present)) or "none"
    hint = did_you_mean(column, present) if present else ""
    hint = hint if "mean" in hint else ""
    return DataError(
        f"{where} has no column {column!r}; columns present: {names}.{hint} Choose one with {column_option('text')}."
    )


# ------------------------------------------------------------------------------------------------- CSV and TSV

_DELIMITERS = ",;\t|"


def delimiter_of(path: Path, kind: str, encoding: str | None = None) -> str:
    """Return the delimiter in the first non-empty line of a file: the usual one of its kind, or else another one.

    Args:
        path: the file.
        kind: ``csv`` or ``tsv``.
        encoding: None is UTF-8.
    """
    usual = "\t" if kind == "tsv" else ","
    for _, line in lines(path, encoding):
        bare = re.sub(r'"[^"]*"', "", line.decode("utf-8", "replace")).strip("\r\n")
        if bare:
            found = [usual, *_DELIMITERS]
            return next((mark for mark in found if mark in bare), usual)
    return usual


def csv_rows(
    path: Path,
    *,
    delimiter: str = ",",
    quoting: bool = True,
    first: str = "the header",
    encoding: str | None = None,
    escaped: bool = False,
) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of every row, the first row included; blank lines are skipped.

    Args:
        path: the file.
        delimiter: the character between cells.
        quoting: whether double quotes enclose cells; if not, every line is a row and quotes are ordinary characters.
        first: name of the first row in error messages; all rows must have as many cells as it.
        encoding: None is UTF-8.
        escaped: return undecodable bytes as lone surrogates instead of raising.

    Raises:
        DataError: a row has another number of cells, or a quote is not closed; names the line.
    """
    decoded = (
        line.decode("utf-8", "surrogateescape")
        if escaped
        else decode_line(path, number, line, encoding)
        for number, line in lines(path, encoding)
    )
    rows = _quoted_rows(path, decoded, delimiter) if quoting else _plain_rows(decoded, delimiter)
    width = 0
    for number, row in rows:
        if width and len(row) != width:
            what = {",": "comma", "\t": "tab", ";": "semicolon"}.get(delimiter, repr(delimiter))
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
    # Even without quoting, the csv module treats a carriage return inside a line as the end of the row.
    for number, line in enumerate(decoded, start=1):
        content = line.removesuffix("\n").removesuffix("\r")
        if content:
            yield number, content.split(delimiter)


# Part of an error message of the csv module -> the cause as the user can see it in the file.
_CSV_CAUSES = {
    "unexpected end of data": "a double quote that is opened in it is never closed",
    "expected after": "a double quote stands inside a quoted text and is not doubled",
    "new-line character": "a carriage return stands inside a line, outside of quotes: the line ends are mixed",
    "field larger": "a cell is larger than 2 GiB; probably a double quote is not closed",
    "line contains NUL": "it holds a NUL character",
}


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
        said = str(error)
        cause = next((cause for part, cause in _CSV_CAUSES.items() if part in said), said)
        raise DataError(
            f"{path}:{first} begins a row that is not valid CSV: {cause} (found at line {reader.line_num})."
        ) from error


def _delimited(path: Path, kind: str, how: Reading) -> Iterator[Piece]:
    from pretrain.data.delimited import _written_with_quotes

    delimiter = delimiter_of(path, kind, how.encoding)
    quoting = kind == "csv" or _written_with_quotes(path, delimiter, how.encoding)
    rows = csv_rows(
        path, delimiter=delimiter, quoting=quoting, encoding=how.encoding, escaped=how.undecodable is not None
    )  # fmt: skip
    _, header = next(rows, (1, []))
    if not header:
        return
    header = [cell.strip() for cell in header]
    if how.text not in header:
        raise _no_column(f"{path}:1", how.text, [whole_characters(name) for name in header])
    place = header.index(how.text)
    for number, row in rows:
        cell = row[place]
        if how.undecodable is not None and (found := _ESCAPED.search(cell)):
            byte = len(cell[: found.start()].encode("utf-8", "surrogateescape")) + 1
            how.undecodable(_Fault(path, number, byte, ord(found[0]) - 0xDC00, how.encoding))
            continue
        yield cell, True


def import_parquet() -> tuple[Any, Any]:
    """Return the modules (pyarrow, pyarrow.parquet); raise DataError if pyarrow is not installed."""
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
