"""Delimited files: CSV and TSV with or without a header, with or without quoting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config.spelling import option
from pretrain.data.readers import csv_rows, delimiter_of, lines
from pretrain.errors import DataError
from pretrain.utils.files import note

__all__ = ["Content", "cell_form", "distinct", "numbered_names", "read_delimited", "shown"]

_CELL = re.compile(r'"([^"]*(?:""[^"]*)*)"(?=\t|\Z)|([^"\t]*)(?=\t|\Z)')


@dataclass
class Content:
    """Columns of equal length; ``places`` are the line numbers of the rows, or None if rows have only an index."""

    columns: dict[str, list[Any]]
    places: list[int] | None = None
    label_names: dict[str, list[str]] = field(default_factory=dict)
    hint: str = ""  # added to the error if no column is recognised


def numbered_names(count: int) -> list[str]:
    """Return ``column_1``, ``column_2``, ...: names for unnamed columns."""
    return [f"column_{k}" for k in range(1, count + 1)]


def read_delimited(
    path: Path,
    kind: str,
    columns: Sequence[str] | None,
    header: bool | None,
    delimiter: str | None,
    quoting: bool | None,
    encoding: str | None = None,
) -> Content:
    """Read a delimited file; see :func:`pretrain.data.tables.read_table` for the arguments."""
    given = quoting
    between, quoting = cell_form(path, kind, delimiter, quoting, encoding)
    if kind == "tsv" and given is None and quoting:
        note(
            f"{path}: cells are enclosed in double quotes where needed, as a CSV writer does, and read so; "
            f"{option('quoting', False)} keeps the quotes"
        )
    headless = header is False or (columns is not None and not header)
    first = "the first row" if headless else "the header"
    rows = csv_rows(path, delimiter=between, quoting=quoting, first=first, encoding=encoding)
    try:
        number, top = next(rows, (1, []))
        if not top:
            raise DataError(f"{path} is empty: no header and no rows.")
        names, top_is_row = _header(path, number, top, columns, header)
        numbers, cells = [number] if top_is_row else [], [top] if top_is_row else []
        for number, row in rows:
            numbers.append(number)
            cells.append(row)
    except DataError as error:
        if quoting and isinstance(error.__cause__, Exception) and "not valid CSV" in str(error):
            raise DataError(
                f"{error} If quotes are ordinary characters in this file: {option('quoting', False)}."
            ) from error
        raise
    table = [list(column) for column in zip(*cells, strict=True)] if cells else [[] for _ in names]
    hint = "" if top_is_row or header else _header_hint(path, top, between)
    return Content(dict(zip(names, table, strict=True)), numbers, hint=hint)


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


def distinct(where: str, names: list[str]) -> list[str]:
    """Return `names`; raise DataError if one occurs twice."""
    seen: set[str] = set()
    twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(
            f"{where} names the column {twice[0]!r} twice: {shown(names)}. Names must differ; if this line is a row "
            f"and not a header, give the names: {option('names', [...])}."
        )
    return names


def shown(cells: Sequence[str]) -> str:
    """Return the first few cells of a row, long ones shortened, for a message."""
    short = [cell if len(cell) <= 40 else cell[:37] + "..." for cell in cells[:8]]
    return ", ".join(map(repr, short)) + (", ..." if len(cells) > 8 else "")


def _header_hint(path: Path, top: list[str], delimiter: str) -> str:
    text = f"The first line of {path} was taken for the header: {shown(top)}."
    if len(top) == 1:
        other = next((mark for mark in ("\t", ";", "|", ",") if mark in top[0]), None)
        if other and other != delimiter:
            return (
                f"{text} If {other!r} stands between columns, say so: {option('delimiter', other)}."
            )
    names = ["label", "text", *numbered_names(9)[2:]][: len(top)]
    names += [...] if len(top) > len(names) else []  # type: ignore[list-item]
    return f"{text} If it is a row, name the columns instead, for example {option('names', names)}."


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
        text = "".join(pending).removesuffix("\n").removesuffix("\r")
        pending.clear()
        cells = _cells(text.replace(delimiter, "\t") if delimiter != "\t" else text)
        if cells is None:
            return False
        for quoted, content in cells:
            all_quoted = all_quoted and (quoted or not content)
            if quoted and any(mark in content for mark in '\t\n"'):
                needed = True
            elif quoted and "," not in content:
                needless = True
    return seen and not pending and (all_quoted or (needed and not needless))


def _cells(row: str) -> list[tuple[bool, str]] | None:
    """Split a row into (quoted, content) cells; return None if a quote is where no CSV writer puts one."""
    cells, place = [], 0
    while True:
        match = _CELL.match(row, place)
        if match is None:
            return None
        cells.append((match[1] is not None, match[1] if match[1] is not None else match[2]))
        place = match.end() + 1
        if place > len(row):
            return cells
