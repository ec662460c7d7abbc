"""Readers of tables: JSON, CSV, Parquet and CoNLL files. Rows come with their line, and every error names the place."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pretrain.config.spelling import option, reads_with
from pretrain.data.encodings import COMPRESSIONS, not_decodable, open_packed
from pretrain.data.readers import (
    ESCAPED,
    MAX_WHOLE,
    Fault,
    Piece,
    Reading,
    cell_text,
    decode_line,
    lines,
    no_column,
    plain_value,
    text_of,
)  # fmt: skip
from pretrain.errors import DataError
from pretrain.utils.files import note

__all__ = [
    "Sentence", "arrow_modules", "cell_form", "conll_sentences", "conllu_sentences", "csv_rows", "delimited_texts",
    "delimiter_of", "json_rows", "json_texts", "json_value", "open_parquet", "parquet_texts",
    "without_headers",
]  # fmt: skip

Sentence = tuple[int, list[str], list[str]]  # line of the first word, words, tags


# --------------------------------------------------------------------------------------------------------- JSON


def _no_constant(name: str) -> None:
    raise DataError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise DataError(f"the key {twice!r} stands twice in one object")
    return row


def _parse_json(text: str) -> Any:
    """Parse JSON strictly; lone surrogates are replaced.

    Raises:
        DataError: an object has a key twice, or a value is NaN or infinite.
        ValueError: the text is not JSON.
    """
    value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    escapes = "\\ud" in text or "\\uD" in text
    return plain_value(value) if escapes else value


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
        complete, fault = line.endswith(b"\n"), None
        try:
            content = line.decode("utf-8")
        except UnicodeDecodeError as error:
            fault = partial(
                not_decodable, path, number, error.start + 1, line[error.start], encoding
            )
            if complete:
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
        if fault is None:
            yield number, row
        elif undecodable is None:
            raise fault()
        else:
            undecodable(fault)


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
    if text.startswith(("//", "#")):
        return "the line is a comment, which JSON does not have"
    further = getattr(error, "msg", "") == "Extra data"
    if further and content[place] == ",":
        return "a comma stands behind the object, as in an array (remove it; an array has the name .json)"
    if content[place : place + 1] in ("}", "]", ",") and content[:place].rstrip().endswith(","):
        return (
            "a comma stands before the end of an object or a list, where a further item must follow"
        )
    if re.match(r"[\[{]\s*\w+\s*:", text):
        return "the names of an object stand without double quotes"
    if text in ("{", "[") or (text[:1] in ("{", "[") and place >= len(content.rstrip())):
        return "the object goes on in the next line, or is cut off"
    if text[:1] not in ("{", "[", '"') and ("," in text or "\t" in text):
        return "the line looks like a row of a table (name the file .csv or .tsv)"
    return "something follows the value" if further else getattr(error, "msg", "") or str(error)


def json_value(path: Path, encoding: str | None, limit: int | None = None) -> Any:
    """Return the value of a file that holds one JSON value; a file longer than ``limit`` bytes is an error."""
    text = text_of(path, encoding, limit)
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


def json_texts(path: Path, how: Reading) -> Iterator[Piece]:
    """Yield the documents in a column of JSON lines, or of a ``.json`` file that holds one value."""
    if _is_one_value(path, how.encoding):
        places = enumerate(_values(json_value(path, how.encoding, MAX_WHOLE), how.text), start=1)
        rows = ((f"{path}, row {number}", row) for number, row in places)
    else:
        example = f'{{"{how.text}": "..."}}'
        found = json_rows(path, how.notes, example, how.encoding, how.undecodable)
        head = [*islice(found, 2)]
        if len(head) == 1 and _named_json(path):  # an object of columns may stand on one line
            head = [(head[0][0], row) for row in _values(head[0][1], how.text)]
        rows = ((f"{path}:{number}", row) for number, row in chain(head, found))
    for where, row in rows:
        yield cell_text(row, how.text, where), True


def _is_one_value(path: Path, encoding: str | None) -> bool:
    """Whether a file holds a single JSON value over several lines, mostly an array, instead of one object per line."""
    first = next((line.strip() for _, line in lines(path, encoding) if line.strip()), b"")
    if first.startswith(b"["):
        return True
    return first == b"{" and _named_json(path)


def _named_json(path: Path) -> bool:
    return path.with_suffix("").name != path.name and ".json" in path.suffixes[-2:]


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


# ------------------------------------------------------------------------------------------------- CSV and TSV

_DELIMITERS = ",;\t|"
# A cell of a row in which tabs stand between cells.
_CELL = re.compile(r'(?:^|\t)("[^"]*(?:""[^"]*)*"|[^"\t]*)')

_SAMPLED = 50  # lines by which a delimiter is chosen
# The first line in which Excel names the delimiter; it is no row.
_DECLARED = re.compile(rb'"?sep=([^"\w\r\n])"?\r?\n?', re.IGNORECASE)


def _lines(path: Path, encoding: str | None) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a table; the line that names its delimiter is blank."""
    for number, line in lines(path, encoding):
        yield number, b"\n" if number == 1 and _DECLARED.fullmatch(line) else line


def _widths(texts: Iterable[str], mark: str, quoting: bool) -> Iterator[int]:
    """Yield how many cells each row has with a delimiter; ends early where the text is no CSV."""
    if not quoting:
        bare = (re.sub(r'"[^"]*"', "", text).strip("\r\n") for text in texts)
        yield from (text.count(mark) + 1 for text in bare if text)
        return
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with suppress(csv.Error):
        yield from (len(row) for row in csv.reader(texts, delimiter=mark) if row)


def delimiter_of(
    path: Path, kind: str, encoding: str | None = None, quoting: bool | None = None
) -> str:
    """Return the delimiter of a file: the one that its first line declares, else the one that fits its first rows.

    That is, of the marks in the first row, the one by which most rows have as many cells as it, then the most
    frequent one, then the usual one of ``csv`` or ``tsv``. Tabs in the first row of a ``tsv`` stand between its cells.
    """
    usual = "\t" if kind == "tsv" else ","
    head = [line for _, line in islice(lines(path, encoding), _SAMPLED)]
    if head and (declared := _DECLARED.fullmatch(head[0])):
        return str(declared[1], "latin-1")
    texts = [line.decode("utf-8", "replace") for line in head]
    best, most = usual, (0, 0)
    for mark in dict.fromkeys([usual, *_DELIMITERS]):
        widths = [*_widths(texts, mark, kind == "csv" and quoting is not False)]
        if len(texts) == _SAMPLED:  # the last row may go on
            widths = widths[:1] + widths[1:-1]
        if widths[:1] <= [1]:
            continue
        # The usual mark is right where it divides all rows alike, whatever other marks texts hold.
        if mark == usual and (mark == "\t" or len({*widths}) == 1 < len(widths)):
            return usual
        fit = (widths.count(widths[0]), widths[0])
        if fit > most:
            best, most = mark, fit
    return best


def _other_delimiter(path: Path, delimiter: str, quoting: bool, encoding: str | None) -> str:
    """Return the advice to use the delimiter by which all rows have the same number of cells; empty if none fits."""
    for mark in _DELIMITERS.replace(delimiter, ""):
        texts = (line.decode("utf-8", "replace") for _, line in _lines(path, encoding))
        widths = _widths(texts, mark, quoting)
        width = next(widths, 1)
        if width > 1 and all(other == width for other in widths):
            cure = f"write {delimiter!r} there"
            if reads_with("delimiter"):
                cure = f"say so: {option('delimiter', mark)}"
            return f" If {mark!r} stands between columns, every row has {width} of them; {cure}."
    return ""


def cell_form(
    path: Path, kind: str, delimiter: str | None, quoting: bool | None, encoding: str | None
) -> tuple[str, bool]:
    """Return the delimiter of a file and whether quotes enclose cells; arguments that are None are detected.

    Raises:
        DataError: the delimiter is not a single character, or is a quote or a line end.
    """
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise DataError(f"{option('delimiter', delimiter)}: it must be one character, such as ';'.")
    between = delimiter or delimiter_of(path, kind, encoding, quoting)
    if quoting is None:
        quoting = kind == "csv" or _written_with_quotes(path, between, encoding)
    return between, quoting


def _written_with_quotes(path: Path, delimiter: str, encoding: str | None) -> bool:
    """Whether quotes enclose cells, as CSV writers use them, or are ordinary characters.

    They enclose cells if every cell with a quote is entirely quoted with inner quotes doubled, and either all cells of
    the file are quoted or only those that need it, at least one of them because of a delimiter, a line end or a quote.
    Otherwise quotes are part of the text.
    """
    needed, needless, all_quoted, seen, odd = False, False, True, False, False
    pending: list[str] = []
    for _, raw in _lines(path, encoding):
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
        for number, line in _lines(path, encoding)
    )
    if quoting:
        rows = _quoted_rows(path, decoded, delimiter, cure)
    else:
        rows = _plain_rows(decoded, delimiter)
    width = 0
    for number, row in rows:
        if width and len(row) != width:
            what = {",": "comma", "\t": "tab", ";": "semicolon"}.get(delimiter, repr(delimiter))
            advice = f"Quotes are ordinary characters in this file, so no text may hold a {what} or a line end."
            if quoting:
                advice = (
                    f"A text that holds a {what}, a quote or a line end must stand in double quotes; correct the "
                    "quoting of this row."
                )
            advice += _other_delimiter(path, delimiter, quoting, encoding)
            raise DataError(
                f"{path}:{number} has {len(row)} columns, but {first} has {width}. {advice}"
            )
        width = len(row)
        yield number, row


def without_headers(
    path: Path, header: Sequence[str], rows: Iterator[tuple[int, list[str]]], *, keep: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Leave out rows that repeat a header of several names, as files that were joined have, and say so at the end.

    Its names may have blanks around them, or the byte order mark of a joined file. With ``keep`` they are only said.
    """
    names, repeated = _bare(header), list[int]()
    for number, row in rows:
        found = len(row) > 1 and _bare(row[:1]) == names[:1] and _bare(row) == names
        repeated += [number] * found
        if keep or not found:
            yield number, row
    if repeated:
        lines = ", ".join(map(str, repeated[:3])) + ", ..." * (len(repeated) > 3)
        done = "kept, so that every row has its answer" if keep else "left out"
        note(f"{path}: rows that repeat the header are {done}: line {lines}", once=True)


def _bare(cells: Sequence[str]) -> list[str]:
    """Return the names of a header; quotes remain in the first cell where a byte order mark precedes them."""
    return [cell.replace("\ufeff", "").strip().strip('"') for cell in cells]


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
        for row in reader:
            if row:
                yield first, row
            first = reader.line_num + 1
    except csv.Error as error:
        message = str(error)
        cause = next((cause for part, cause in _CSV_CAUSES.items() if part in message), message)
        raise DataError(
            f"{path}:{first} begins a row that is not valid CSV: {cause} (found at line {reader.line_num}).{cure}"
        ) from error


def delimited_texts(path: Path, kind: str, how: Reading) -> Iterator[Piece]:
    """Yield the documents in a column of a file of the kind ``csv`` or ``tsv``."""
    delimiter, quoting = cell_form(path, kind, None, None, how.encoding)
    rows = csv_rows(
        path, delimiter=delimiter, quoting=quoting, encoding=how.encoding, escaped=how.undecodable is not None
    )  # fmt: skip
    _, top = next(rows, (1, []))
    if not top:
        return
    header = [cell.strip() for cell in top]
    if how.text not in header:
        raise no_column(f"{path}:1", how.text, [plain_value(name) for name in header])
    place = header.index(how.text)
    for number, row in without_headers(path, top, rows):
        cell = row[place]
        if how.undecodable is not None and (found := ESCAPED.search(cell)):
            byte = len(cell[: found.start()].encode("utf-8", "surrogateescape")) + 1
            how.undecodable(
                partial(not_decodable, path, number, byte, ord(found[0]) - 0xDC00, how.encoding)
            )
            continue
        yield cell, True


# ------------------------------------------------------------------------------------------------------ Parquet


def arrow_modules(doing: str) -> tuple[Any, Any]:
    """Import ``pyarrow`` and ``pyarrow.parquet``, for reading or writing.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"{doing} .parquet files needs pyarrow: pip install pyarrow (datasets brings it)"
        ) from error


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a ``pyarrow.parquet.ParquetFile``; a compressed one is decompressed in memory.

    Raises:
        DataError: pyarrow is not installed, or the file is invalid.
    """
    arrow, parquet = arrow_modules("reading")
    try:
        with parquet.ParquetFile(_unpacked(path)) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}.") from error


def _unpacked(path: Path) -> Path | io.BytesIO:
    if path.suffix.lower() not in COMPRESSIONS:
        return path
    with open_packed(path) as stream:
        data = stream.read(MAX_WHOLE + 1)
    if len(data) > MAX_WHOLE:
        raise DataError(
            f"{path} holds more than {MAX_WHOLE >> 20} MiB, too much to be decompressed in memory. Decompress the "
            "file first; parquet files are compressed inside."
        )
    return io.BytesIO(data)


def parquet_texts(path: Path, how: Reading) -> Iterator[Piece]:
    """Yield the documents in a column of a parquet file."""
    column = how.text
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
    the last its tag; columns in between (part of speech, chunk) are ignored. If the first of three or more
    counts the words of each sentence, the second is the word, and of two columns the tags may be the first; a line says
    so. ``-DOCSTART-`` lines, which begin a document, are skipped, and so are comments: lines before the words of a
    sentence whose first word is ``#`` and whose last is no tag of any other line; their number is printed.

    Raises:
        DataError: a line has another number of columns than the first one, or an empty word or tag; names the line.
    """
    blocks = [*_without_comments(path, _blocks(path, encoding))]
    word, tag = _word_and_tag(path, _in_cells(path, blocks))
    for rows in _in_cells(path, blocks):
        for number, line, cells in rows:
            if not cells[word].strip() or not cells[tag].strip():
                raise DataError(
                    f"{path}:{number} has an empty {'tag' if cells[word].strip() else 'word'}: {line[:60]!r}. Correct "
                    "this line, or leave it blank to end the sentence."
                )
        words = [cells[word] for *_, cells in rows]
        yield rows[0][0], words, [cells[tag].strip() for *_, cells in rows]


_Block = list[tuple[int, str]]  # lines that follow each other, with their numbers
_Cells = list[tuple[int, str, list[str]]]  # the lines of a sentence, with their numbers and cells


def _in_cells(path: Path, blocks: Iterable[_Block]) -> Iterator[_Cells]:
    """Yield the lines of each sentence with their cells."""
    width, tabs = 0, True
    for rows in blocks:
        read: _Cells = []
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
            read.append((number, line, cells))
        if read:
            yield read


_TAG = re.compile(r"O|[BIESLU]-\S+")


def _word_and_tag(path: Path, sentences: Iterable[_Cells]) -> tuple[int, int]:
    """Return the indices of the columns of words and tags; what is unusual is told in a line.

    Most files are known to be usual from their first sentence, and are read no further.
    """
    counted, several, width = True, False, 0
    marks, lasts = set[str](), set[str]()
    for rows in sentences:
        width, firsts = len(rows[0][-1]), [cells[0].strip() for *_, cells in rows]
        counts = ([str(k + first) for k in range(len(rows))] for first in (0, 1))
        counted = width > 2 and counted and firsts in counts
        if not counted and (width > 2 or not all(map(_TAG.fullmatch, firsts))):
            return 0, -1
        several |= len(rows) > 1
        marks.update(firsts if width == 2 else ())
        lasts.update(cells[-1].strip() for *_, cells in rows if width == 2)
    if counted and several:
        note(
            f"{path}: the first column counts the words of each sentence, so the words are those of the second, "
            "and the tags those of the last"
        )
        return 1, -1
    usual = lasts != {"O"} and all(map(_TAG.fullmatch, lasts))
    if marks - {"O"} and not usual and len(lasts) > 1:
        note(
            f"{path}: the first column has tags such as {max(marks - {'O'})!r}, so the words are the second"
        )
        return 1, 0
    return 0, -1


def _without_comments(path: Path, blocks: Iterable[_Block]) -> Iterator[_Block]:
    """Yield the blocks of a CoNLL file without the comments at their beginning."""
    parted = []
    tags: set[str] = set()
    for rows in blocks:
        cells = [line.split() or [line] for _, line in rows]
        words = next((k for k, row in enumerate(cells) if row[0] != "#"), len(rows))
        tags.update(row[-1] for row in cells[words:])
        parted.append((rows, [row[-1] for row in cells[:words]]))
    skipped: list[int] = []
    for rows, lasts in parted:
        comments = {k for k, last in enumerate(lasts) if last not in tags}
        skipped += [rows[k][0] for k in comments]
        if kept := [row for k, row in enumerate(rows) if k not in comments]:
            yield kept
    if skipped:
        note(
            f"{path}: lines that begin with # and end in no tag are taken for comments: {len(skipped):,}, the first is "
            f"line {min(skipped)}"
        )


def conllu_sentences(path: Path, encoding: str | None = None) -> Iterator[Sentence]:
    """Yield the sentences of a CoNLL-U file: word forms and universal part-of-speech tags (column UPOS).

    Comment lines, multiword tokens (``1-2``) and empty nodes (``8.1``) are skipped.

    Raises:
        DataError: a line does not have ten columns; names the line.
    """
    for rows in _blocks(path, encoding):
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
            yield rows[0][0], words, tags


def _blocks(path: Path, encoding: str | None) -> Iterator[_Block]:
    """Yield the lines of each block between blank lines."""
    rows: _Block = []
    for number, raw in lines(path, encoding):
        line = decode_line(path, number, raw, encoding).removesuffix("\n").removesuffix("\r")
        if line.strip(" \t"):
            rows.append((number, line))
        elif rows:
            yield rows
            rows = []
    if rows:
        yield rows
