"""Formats of files, and readers of text and HTML: documents in bounded blocks.

A document is read in pieces ``(text, end)``, where ``end`` is True for its last piece, so that a plain-text document of
any size is read in constant memory. Every error names the place in the file. Tables are read by
`pretrain.data.table_readers`.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pretrain.data
from pretrain.config.spelling import column as column_option
from pretrain.data.encodings import (
    COMPRESSIONS,
    encoding_of_pages,
    not_decodable,
    open_packed,
    open_text,
)
from pretrain.errors import DataError, suggestion

__all__ = [
    "COMPRESSIONS", "ESCAPED", "FORMATS", "MAX_WHOLE", "TABLE_FORMATS", "Fault", "Piece", "Reading", "cell_text",
    "decode_line", "file_format", "found_in_folders", "has_transform", "lines", "needs_encoding", "no_column",
    "plain_value", "read_file", "table_kind", "text_of",
]  # fmt: skip

Piece = tuple[str, bool]
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
MAX_WHOLE = 1 << 30  # size limit, in bytes, of files that cannot be read in pieces


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
        separator = how.separator.replace("\r\n", "\n").replace("\r", "\n")  # as in the blocks
        return _separated(blocks, separator, how)
    if kind == "html":
        return _html(path, how)
    if kind == "jsonl":
        return pretrain.data.table_readers.json_texts(path, how)
    if kind == "parquet":
        return pretrain.data.table_readers.parquet_texts(path, how)
    return pretrain.data.table_readers.delimited_texts(path, kind, how)


# --------------------------------------------------------------------------------------------------- plain text

# Surrogates that stand for invalid bytes until the document that contains them is skipped.
ESCAPED = re.compile("[\udc80-\udcff]")


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
        if last is None or not ESCAPED.search(part):
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


def lines(
    path: Path, encoding: str | None = None, *, page: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) in UTF-8, with the line end included; see :func:`open_text`.

    Raises:
        DataError: a line is longer than 512 MiB, or the file cannot be read.
    """
    number = 0
    with open_text(path, encoding, page=page) as stream:
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


def text_of(
    path: Path, encoding: str | None, limit: int | None = MAX_WHOLE, *, page: bool = False
) -> str:
    """Return the whole text of a file whose format cannot be read in pieces."""
    parts, size = [], 0
    for number, line in lines(path, encoding, page=page):
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
        page = text_of(path, how.encoding or _charset(path), page=True)
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


_HEAD = 1 << 16
_NO_TAGS = re.compile(rb"<!--.*?(?:-->|\Z)|<script\b.*?(?:</script|\Z)", re.IGNORECASE | re.DOTALL)
_DECLARED = re.compile(rb"<meta\b[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)


def _charset(path: Path) -> str | None:
    """Return the encoding that an HTML page declares, or None if it is UTF-8 or that of a byte order mark."""
    with open_packed(path) as stream:
        head = stream.read(_HEAD)
    if head.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    declared = _DECLARED.search(_NO_TAGS.sub(b"", head))
    return encoding_of_pages(declared[1].decode()) if declared else None


def needs_encoding(path: Path, encoding: str) -> bool:
    """Whether a file of text is read in ``encoding``, which is that of other files, and not as UTF-8.

    So are files that are not UTF-8, have no byte order mark and, as HTML, declare nothing; and all files if the
    encoding writes text in ASCII bytes, which are UTF-8 as well. ``encoding`` is a name by :func:`check_encoding`.
    """
    if encoding.startswith(("iso2022", "hz", "utf-7")):
        return True
    if file_format(path) == "html" and _charset(path):
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_text(path) as stream:
            while block := stream.read(_BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except (UnicodeDecodeError, DataError):  # such as the NUL bytes of UTF-16 without a mark
        return True
    return False


# --------------------------------------------------------------------------------------------------- rows


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
    return str(plain_value(value))


def has_transform(dataset: Any) -> bool:
    """Whether a ``datasets.Dataset`` computes its rows by a function (``with_transform``)."""
    return bool((getattr(dataset, "format", None) or {}).get("type") == "custom")


def plain_value(value: Any) -> Any:
    """Return a value of Python in place of NumPy's and pandas' (None for NA), at any depth, without lone surrogates.

    A JSON escape can denote a surrogate, but it is not a character and has no UTF-8 encoding.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if value is None or kind in (int, float, bool):
        return value
    if kind.__name__ in ("NAType", "NaTType"):
        return None
    if kind is list or kind is tuple:
        return [plain_value(item) for item in value]
    if isinstance(value, Mapping):
        return {plain_value(str(key)): plain_value(item) for key, item in value.items()}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return plain_value(value.tolist())
    return value


def no_column(where: str, column: str, present: list[str]) -> DataError:
    """Return the error for a column that does not exist, with the nearest name of those present."""
    names = ", ".join(map(repr, present)) or "none"
    hint = suggestion(column, present)
    return DataError(
        f"{where} has no column {column!r}; columns present: {names}.{hint} Choose one with {column_option('text')}."
    )
