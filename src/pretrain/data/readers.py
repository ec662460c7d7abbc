"""Readers of single files, one for each format: documents as text in bounded blocks, and rows of tables.

A document is read in pieces ``(text, end)``, where ``end`` is True for its last piece, so that a plain-text document of
any size is read in constant memory. Rows come with their line, and every error names the place in the file.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

from pretrain.config.spelling import column as column_option
from pretrain.config.spelling import option, reads_with
from pretrain.data.encodings import (
    COMPRESSIONS,
    check_encoding,
    not_decodable,
    open_packed,
    open_text,
)
from pretrain.errors import DataError, suggestion

__all__ = [
    "COMPRESSIONS", "FORMATS", "TABLE_FORMATS", "Piece", "Reading", "Sentence", "cell_form", "cell_text",
    "conll_sentences", "conllu_sentences", "csv_rows", "delimiter_of", "file_format", "found_in_folders", "json_rows",
    "json_value", "no_column", "open_parquet", "read_file", "table_kind", "whole_characters",
]  # fmt: skip

Piece = tuple[str, bool]
Sentence = tuple[int, list[str], list[str]]  # first line, words, tags
Fault = Callable[[], DataError]  # returns the error of an undecodable byte

FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv",
    ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".html": "html", ".htm": "html",
}  # fmt: skip
TABLE_FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet", ".conll": "conll", ".conllu": "conllu",
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
    undecodable: Callable[[Fault], None] | None = None


def _denoted(path: Path, formats: Mapping[str, str]) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return formats.get(suffixes[-1]) if suffixes else None


def file_format(path: Path) -> str | None:
    """Return the format of documents that the suffix of a file name denotes, or None."""
    return _denoted(path, FORMATS)


def table_kind(path: Path) -> str:
    """Return the format of tables that the suffix of a file name denotes, apart from compression, or ""."""
    return _denoted(path, TABLE_FORMATS) or ""


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


def _decoded(path: Path, how: Reading) -> Iterator[tuple[str, Fault | None]]:
    """Yield the text of a file in blocks, without a byte order mark and with line feeds as line ends.

    If documents may be skipped, a block with invalid bytes is yielded with these bytes escaped as surrogates, together
    with a description of the first of them.
    """
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    rest, line, offset, column = b"", 1, 0, 0  # column: bytes of the current line before `rest`
    with open_text(path, how.encoding) as stream:
        while True:
            block = stream.read(_BLOCK)
            data = rest + block
            if offset == 0 and data.startswith(codecs.BOM_UTF8):
                data, offset = data[3:], 3
            fault = None
            try:
                text, size = codecs.utf_8_decode(data, "strict", not block)
            except UnicodeDecodeError as error:
                at, start = error.start, data.rfind(b"\n", 0, error.start) + 1
                byte = at - start + 1 if start else column + at + 1
                number = line + data.count(b"\n", 0, at)
                fault = partial(
                    not_decodable, path, number, byte, data[at], how.encoding, offset=offset + at
                )
                if how.undecodable is None:
                    raise fault() from error
                text, size = codecs.utf_8_decode(data, "surrogateescape", not block)
            line += data.count(b"\n", 0, size)
            newline = data.rfind(b"\n", 0, size)
            column = size - newline - 1 if newline >= 0 else column + size
            offset, rest = offset + size, data[size:]
            text = ends.decode(text, final=not block)
            if text or fault:
                yield text, fault
            if not block:
                return


def _whole(blocks: Iterator[tuple[str, Fault | None]], how: Reading) -> Iterator[Piece]:
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
    blocks: Iterator[tuple[str, Fault | None]], separator: str, how: Reading
) -> Iterator[Piece]:
    """Split a stream of text at ``separator``; a document longer than a block is yielded in several pieces."""
    rest, begun, whole = "", False, True
    keep = len(separator) - 1
    last: Fault | None = None

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
        raise not_decodable(path, number, error.start + 1, line[error.start], encoding) from error


def _text_of(path: Path, encoding: str | None, limit: int | None = _MAX_WHOLE) -> str:
    """Return the whole text of a file whose format cannot be read in pieces."""
    parts, size = [], 0
    for number, line in lines(path, encoding):
        size += len(line)
        if limit is not None and size > limit:
            raise DataError(
                f"{path} is longer than {limit >> 20} MiB, too long to be read as a whole. Write it as JSON lines "
                "(.jsonl) or plain text, which are read in pieces."
            )
        parts.append(decode_line(path, number, line, encoding))
    return "".join(parts)


# --------------------------------------------------------------------------------------------------------- HTML

_UNSEEN = frozenset({"script", "style", "template"})
_INLINE = frozenset((
    "a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd", "label",
    "mark", "q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
))  # fmt: skip


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
    try:
        page = _text_of(path, how.encoding or _charset(path))
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
    head = b"".join(line for _, line in islice(lines(path), 40))
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


def _parse_json(text: str) -> Any:
    """Parse JSON strictly; lone surrogates are replaced.

    Raises:
        DataError: an object has a key twice, or a value is NaN or infinite.
        ValueError: the text is not JSON.
    """
    value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    escapes = "\\ud" in text or "\\uD" in text
    return whole_characters(value) if escapes else value


def json_rows(
    path: Path,
    notes: Callable[[str], None],
    example: str,
    encoding: str | None = None,
    undecodable: Callable[[Fault], None] | None = None,
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
                fault = partial(
                    not_decodable, path, number, error.start + 1, line[error.start], encoding
                )
                if undecodable is None:
                    raise fault() from error
                undecodable(fault)
                continue
            content = line.decode("utf-8", "replace")
        if not content.strip():
            continue
        try:
            row = _parse_json(content)
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
    return getattr(error, "msg", "") or str(error)


def json_value(path: Path, encoding: str | None, limit: int | None = None) -> Any:
    """Return the value of a file that holds one JSON value; a file longer than ``limit`` bytes is an error."""
    text = _text_of(path, encoding, limit)
    if not text.strip():
        raise DataError(f"{path} is empty.")
    try:
        return _parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno} is not valid JSON: {_json_cause(text, error)}. Often a comma or a "
            "bracket is missing there, or the file was cut while being written."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {_json_cause(text, error)}.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}. Correct the file.") from error


def _jsonl(path: Path, how: Reading) -> Iterator[Piece]:
    if _is_one_value(path, how.encoding):
        places = enumerate(_values(json_value(path, how.encoding, _MAX_WHOLE), how.text), start=1)
        rows = ((f"{path}, row {number}", row) for number, row in places)
    else:
        example = f'{{"{how.text}": "..."}}'
        found = json_rows(path, how.notes, example, how.encoding, how.undecodable)
        rows = ((f"{path}:{number}", row) for number, row in found)
    for where, row in rows:
        yield cell_text(row, how.text, where), True


def _is_one_value(path: Path, encoding: str | None) -> bool:
    """Whether a file holds a single JSON value over several lines, mostly an array, instead of one object per line."""
    first = next((line.strip() for _, line in lines(path, encoding) if line.strip()), b"")
    if first.startswith(b"["):
        return True
    return (
        first == b"{" and path.with_suffix("").name != path.name and ".json" in path.suffixes[-2:]
    )


def _values(value: Any, text: str) -> list[Any]:
    """Return the rows of an array of objects, of an object with such an array in ``data``, or of an object of columns.

    A single object is one row, and strings in an array are texts themselves.
    """
    if isinstance(value, dict) and text not in value and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict) and isinstance(value.get(text), list):
        return [{text: item} for item in value[text]]
    if isinstance(value, list):
        return [{text: item} if isinstance(item, str) else item for item in value]
    return [value]


def cell_text(row: Any, column: str, where: str) -> str:
    """Return the text of a row in a column, "" for None; raise DataError if there is none."""
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds {type(row).__name__}, not an object with a column {column!r}. Write one object a line."
        )
    if column not in row:
        raise no_column(where, column, list(row))
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text. Choose the column with "
            f"{column_option('text')}, or turn the values into strings."
        )
    return str(whole_characters(value))


def whole_characters(value: Any) -> Any:
    """Return a JSON value with all lone surrogates in its strings replaced.

    A JSON escape can denote one, but it is not a character and has no UTF-8 encoding.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(name): whole_characters(item) for name, item in value.items()}
    return value


def no_column(where: str, column: str, present: list[str]) -> DataError:
    """Return the error for a column that does not exist, with the nearest name of those present."""
    names = ", ".join(map(repr, present)) or "none"
    hint = suggestion(column, present)
    return DataError(
        f"{where} has no column {column!r}; columns present: {names}.{hint} Choose one with {column_option('text')}."
    )


# ------------------------------------------------------------------------------------------------- CSV and TSV

_DELIMITERS = ",;\t|"
_CELL = re.compile(
    r'(?:^|\t)("[^"]*(?:""[^"]*)*"|[^"\t]*)'
)  # of a row in which tabs stand between cells


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


def cell_form(
    path: Path, kind: str, delimiter: str | None, quoting: bool | None, encoding: str | None
) -> tuple[str, bool]:
    """Return the delimiter of a file and whether quotes enclose cells; arguments that are None are detected.

    Raises:
        DataError: the delimiter is not a single character, or is a quote or a line end.
    """
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise DataError(f"{option('delimiter', delimiter)}: it must be one character, such as ';'.")
    between = delimiter or delimiter_of(path, kind, encoding)
    if quoting is None:
        quoting = kind == "csv" or _written_with_quotes(path, between, encoding)
    return between, quoting


def _written_with_quotes(path: Path, delimiter: str, encoding: str | None = None) -> bool:
    """Whether quotes enclose cells, as CSV writers use them, or are ordinary characters.

    They enclose cells if every cell with a quote is entirely quoted with inner quotes doubled, and either all cells of
    the file are quoted or only those that need it, at least one of them because of a delimiter, a line end or a quote.
    Otherwise quotes are part of the text.
    """
    needed, needless, all_quoted, seen = False, False, True, False
    pending: list[str] = []
    odd = False
    for _, raw in lines(path, encoding):
        line = raw.decode("utf-8", "surrogateescape")
        seen = True
        if not pending and '"' not in line:
            all_quoted = all_quoted and not line.strip()
            continue
        pending.append(line)
        odd ^= bool(line.count('"') % 2)
        if odd:  # a quote is open: the cell continues on the next line
            continue
        row = "".join(pending).removesuffix("\n").removesuffix("\r").replace(delimiter, "\t")
        pending.clear()
        cells = _CELL.findall(row)
        if sum(map(len, cells)) + len(cells) - 1 < len(row):
            return False  # a quote is where no CSV writer puts one
        quoted = [cell[1:-1] for cell in cells if cell.startswith('"')]
        all_quoted = all_quoted and len(quoted) == sum(map(bool, cells))
        for content in quoted:
            if "\t" in content or "\n" in content or '"' in content:
                needed = True
            elif "," not in content:
                needless = True
        if needless and not all_quoted:
            return False
    return seen and not pending and (all_quoted or (needed and not needless))


def csv_rows(
    path: Path,
    *,
    delimiter: str = ",",
    quoting: bool = True,
    first: str = "the header",
    encoding: str | None = None,
    escaped: bool = False,
    cure: str = "",
) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of every row, the first row included; blank lines are skipped.

    Args:
        path: the file.
        delimiter: the character between cells.
        quoting: whether double quotes enclose cells; if not, every line is a row and quotes are ordinary characters.
        first: name of the first row in error messages; all rows must have as many cells as it.
        encoding: None is UTF-8.
        escaped: return undecodable bytes as lone surrogates instead of raising.
        cure: what the error of a quote that is not closed says at its end.

    Raises:
        DataError: a row has another number of cells, or a quote is not closed; names the line.
    """
    decoded = (
        line.decode("utf-8", "surrogateescape")
        if escaped
        else decode_line(path, number, line, encoding)
        for number, line in lines(path, encoding)
    )
    if quoting:
        rows = _quoted_rows(path, decoded, delimiter, cure)
    else:
        rows = _plain_rows(decoded, delimiter)
    width = 0
    for number, row in rows:
        if width and len(row) != width:
            what = {",": "comma", "\t": "tab", ";": "semicolon"}.get(delimiter, repr(delimiter))
            advice = (
                f"A text that holds a {what}, a quote or a line end must stand in double quotes; correct the quoting "
                "of this row."
                if quoting
                else f"Quotes are ordinary characters in this file, so no text may hold a {what} or a line end."
            )
            raise DataError(
                f"{path}:{number} has {len(row)} columns, but {first} has {width}. {advice}"
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
    path: Path, decoded: Iterator[str], delimiter: str, cure: str
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
            f"{path}:{first} begins a row that is not valid CSV: {cause} (found at line {reader.line_num}).{cure}"
        ) from error


def _delimited(path: Path, kind: str, how: Reading) -> Iterator[Piece]:
    delimiter, quoting = cell_form(path, kind, None, None, how.encoding)
    rows = csv_rows(
        path, delimiter=delimiter, quoting=quoting, encoding=how.encoding, escaped=how.undecodable is not None
    )  # fmt: skip
    _, header = next(rows, (1, []))
    if not header:
        return
    header = [cell.strip() for cell in header]
    if how.text not in header:
        raise no_column(f"{path}:1", how.text, [whole_characters(name) for name in header])
    place = header.index(how.text)
    for number, row in rows:
        cell = row[place]
        if how.undecodable is not None and (found := _ESCAPED.search(cell)):
            byte = len(cell[: found.start()].encode("utf-8", "surrogateescape")) + 1
            how.undecodable(
                partial(not_decodable, path, number, byte, ord(found[0]) - 0xDC00, how.encoding)
            )
            continue
        yield cell, True


# ------------------------------------------------------------------------------------------------------ Parquet


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a ``pyarrow.parquet.ParquetFile``; a compressed one is decompressed in memory.

    Raises:
        DataError: pyarrow is not installed, or the file is invalid.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            "reading .parquet files needs pyarrow: pip install pyarrow (datasets brings it)"
        ) from error
    try:
        with parquet.ParquetFile(_unpacked(path)) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}.") from error


def _unpacked(path: Path) -> Path | io.BytesIO:
    if path.suffix.lower() not in COMPRESSIONS:
        return path
    with open_packed(path) as stream:
        data = stream.read(_MAX_WHOLE + 1)
    if len(data) > _MAX_WHOLE:
        raise DataError(
            f"{path} holds more than {_MAX_WHOLE >> 20} MiB, too much to be decompressed in memory. Decompress the "
            "file first; parquet files are compressed inside."
        )
    return io.BytesIO(data)


def _parquet(path: Path, column: str) -> Iterator[Piece]:
    with open_parquet(path) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise no_column(str(path), column, names)
        batches = table.iter_batches(batch_size=256, columns=[column])
        values = (value for batch in batches for value in batch.column(0))
        for number, value in enumerate(values, start=1):
            where = f"{path}, row {number}"
            try:
                cell = value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: column {column!r} is not UTF-8 (byte {error.start} of the text); write the file again "
                    "with valid strings."
                ) from error
            yield cell_text({column: cell}, column, where), True


# -------------------------------------------------------------------------------------------------------- CoNLL

_CONLLU_COLUMNS = 10


def conll_sentences(path: Path, encoding: str | None = None) -> Iterator[Sentence]:
    """Yield the sentences of a file with one word and its tag on each line, a blank line between sentences.

    Columns are separated by tabs if the first line has a tab, and by whitespace otherwise. The first is the word and
    the last its tag; columns in between (part of speech, chunk) are ignored. ``-DOCSTART-`` lines, which begin a
    document, are skipped.

    Raises:
        DataError: a line has another number of columns than the first one, or an empty word or tag; names the line.
    """
    width, tabs = 0, True
    for start, rows in _blocks(path, encoding):
        words: list[str] = []
        tags: list[str] = []
        for number, line in rows:
            if not width:
                tabs = "\t" in line
            cells = line.split("\t") if tabs else line.split()
            if cells[:1] == ["-DOCSTART-"]:
                continue
            if len(cells) < 2:
                raise DataError(
                    f"{path}:{number} holds {line[:60]!r}, which has no tag. Each line is a word, a tab and its tag; a "
                    "blank line ends the sentence."
                )
            width = width or len(cells)
            if len(cells) != width:
                raise DataError(
                    f"{path}:{number} has {len(cells)} columns, but the lines before it have {width}: {line[:60]!r}. "
                    "Write the word first and its tag last, with a tab between."
                )
            if not cells[0].strip() or not cells[-1].strip():
                raise DataError(
                    f"{path}:{number} has an empty {'tag' if cells[0].strip() else 'word'}: {line[:60]!r}. Correct "
                    "this line, or leave it blank to end the sentence."
                )
            words.append(cells[0])
            tags.append(cells[-1].strip())
        if words:
            yield start, words, tags


def conllu_sentences(path: Path, encoding: str | None = None) -> Iterator[Sentence]:
    """Yield the sentences of a CoNLL-U file: word forms and universal part-of-speech tags (column UPOS).

    Comment lines, multiword tokens (``1-2``) and empty nodes (``8.1``) are skipped.

    Raises:
        DataError: a line does not have ten columns; names the line.
    """
    for start, rows in _blocks(path, encoding):
        words: list[str] = []
        tags: list[str] = []
        for number, line in rows:
            if line.startswith("#") and not words:
                continue
            cells = line.split("\t")
            if len(cells) != _CONLLU_COLUMNS:
                raise DataError(
                    f"{path}:{number} has {len(cells)} columns, but CoNLL-U has {_CONLLU_COLUMNS}, with tabs between: "
                    f"{line[:60]!r}. Files of two columns are read with "
                    + (option("format", "conll") if reads_with("format") else "a name in .conll")
                    + "."
                )
            if "-" in cells[0] or "." in cells[0]:
                continue
            words.append(cells[1])
            tags.append(cells[3])
        if words:
            yield start, words, tags


def _blocks(path: Path, encoding: str | None) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield (first line, lines with their numbers) of each block between blank lines."""
    rows: list[tuple[int, str]] = []
    for number, raw in lines(path, encoding):
        line = decode_line(path, number, raw, encoding).removesuffix("\n").removesuffix("\r")
        if line.strip(" \t"):
            rows.append((number, line))
        elif rows:
            yield rows[0][0], rows
            rows = []
    if rows:
        yield rows[0][0], rows
