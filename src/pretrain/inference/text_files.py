"""Vectors of all texts of a file, written in their order, and search among the texts of a file."""

from __future__ import annotations

import contextlib
import io
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.config.spelling import SEARCH, STREAM, option, smaller_batch, using
from pretrain.data.labelled import choose_columns, roles_table
from pretrain.data.readers import decode_line, file_format, lines, table_kind
from pretrain.data.row_writer import RowWriter
from pretrain.data.table_readers import arrow_modules
from pretrain.data.tables import stream_chunks
from pretrain.data.task_rows import TaskRows
from pretrain.errors import DataError, naming_memory
from pretrain.inference.fill import cut_texts, embed_counting
from pretrain.inference.predict import check_target, opened_model, row_bar
from pretrain.inference.vectors import Hit, search
from pretrain.objectives.classification import TEXT
from pretrain.objectives.tasks import read_texts
from pretrain.utils.files import Sink, note, replacing

__all__ = ["embed_file", "search_file", "texts_of_file"]

_CHUNK = 1024  # rows of a file in memory at a time
_COLUMN = "embedding"


@dataclass
class _Part:
    """Some rows of a file: the rows as they are, and the texts of those that have one, with their places."""

    rows: list[dict[str, Any]]
    places: list[int]
    texts: list[str]


def texts_of_file(
    path: Path, column: str | None = None, *, quiet: bool = False, **reading: Any
) -> Iterator[_Part]:
    """Yield the rows of a file, 1,024 at a time.

    Args:
        path: a table (.csv .tsv .jsonl, which are streamed, .json .parquet, which are read whole) or lines (.txt .md),
            plain or compressed.
        column: the column of the text; None: the one with a conventional name.
        quiet: do not print which columns are not used.
        **reading: ``delimiter``, ``quoting``, ``encoding`` of ``read_table``.

    Raises:
        DataError: the file has another format or no rows, a row is invalid, or no column holds the text.
    """
    if not table_kind(path):
        yield from _lines_of(path, column, reading.get("encoding"))
        return
    chosen: dict[str, Any] = {}
    for chunk in stream_chunks(path, _CHUNK, **reading):
        if not chosen:
            chosen = choose_columns(chunk.table, [TEXT], {"text": column}, quiet=quiet)
        table = roles_table(chunk.with_columns(chosen.values()), chosen)
        places = read_texts(table, ["text"], TaskRows())
        texts = table.columns["text"]
        yield _Part(chunk.rows, places, [texts[i] for i in places])


def _lines_of(path: Path, column: str | None, encoding: str | None) -> Iterator[_Part]:
    if file_format(path) != "text":
        raise DataError(
            f"{path} is neither a table (.csv .tsv .jsonl .json .parquet) nor a file of lines (.txt .md). Rename it if "
            "it is one of these."
        )
    if column is not None:
        raise DataError(
            f"{option('text', column)} names a column, but {path} holds lines; leave it out."
        )
    rest = lines(path, encoding)
    empty = True
    while some := list(islice(rest, _CHUNK)):
        empty = False
        texts = [decode_line(path, number, line, encoding).rstrip("\r\n") for number, line in some]
        places = [i for i, text in enumerate(texts) if text.strip()]
        yield _Part([{"text": text} for text in texts], places, [texts[i] for i in places])
    if empty:
        raise DataError(f"{path} is empty. Check that it is the right file.")


@using(STREAM)
def embed_file(
    checkpoint: Any,
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: str | None = None,
    normalize: bool | None = None,
    pooling: str | Sequence[str] | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    batch_rows: int = 32,
    device: str = "auto",
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
    progress: bool = True,
) -> Path:
    """Write the vectors of all texts of a file to another file, in order; files of any length are streamed.

    A row without a text keeps its place and has no vector: null, or in an array, zeros; the number of such rows is
    printed.

    Args:
        checkpoint: a run, a model directory, or a ``Model``.
        file: lines (.txt .md), or a table (.csv .tsv .jsonl, read row by row, .json .parquet, read whole), plain or
            compressed.
        out: ``.npy`` (an array (rows, D) in fp32), or ``.jsonl`` or ``.parquet`` (the rows with their vectors under
            ``embedding``). The file appears once it is complete. For ``.npy`` the input is read twice, because the
            head of the file states the number of rows.
        text: the column of the text in a table; None: the one with a conventional name.
        normalize: scale every vector to length one; None: as the model's directory says.
        pooling: see ``embed``.
        prompt: prefix of every text.
        prompt_name: name of a prompt of the model's directory.
        batch_rows: texts in one forward pass.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
        delimiter: cell delimiter of .csv or .tsv; None: as :func:`pretrain.data.tables.read_table` finds it.
        quoting: whether double quotes enclose cells of .csv or .tsv; see there.
        encoding: encoding of a text file; None: UTF-8, or that of a byte order mark.
        progress: show a progress bar in a terminal or notebook.

    Returns:
        Path of the output.

    Raises:
        DataError: a broken row (with its line), a missing column, an output that cannot be written.
        ConfigError: another ending of the output, an unknown pooling or prompt.
        ModelError: as ``embed`` does.
        TrainingError: too little memory.
    """
    source, target = Path(os.path.expanduser(file)), Path(os.path.expanduser(out))
    check_target(source, target, tuple(_WRITERS))
    reading = {"delimiter": delimiter, "quoting": quoting, "encoding": encoding}
    parts = texts_of_file(source, text, quiet=not progress, **reading)
    first = next(parts)  # an unreadable file raises before the model is loaded
    count = 0
    if target.suffix.lower() == ".npy":
        again = texts_of_file(source, text, quiet=True, **reading)
        count = sum(len(part.rows) for part in again)
    model = opened_model(checkpoint, device, quiet=not progress)
    options: dict[str, Any] = {
        "normalize": normalize, "pooling": pooling, "prompt": prompt, "prompt_name": prompt_name,
        "batch_size": batch_rows,
    }  # fmt: skip
    counts: Counter[str] = Counter()
    with (
        naming_memory("embedding", lambda: smaller_batch(batch_rows)),
        _written(target),
        row_bar(progress, count or None) as bar,
    ):
        vectors = _embedded(model, chain([first], parts), counts, bar, options)
        _WRITERS[target.suffix.lower()](target, count, vectors)
    if counts["cut"]:
        note(cut_texts(model, counts["cut"], counts["texts"]))
    if empty := counts["rows"] - counts["texts"]:
        note(f"{empty:,} of {counts['rows']:,} rows have no text and get no vector")
    return target


_Embedded = Iterator[tuple[_Part, NDArray[np.float32]]]


def _embedded(
    model: Any, parts: Iterator[_Part], counts: Counter[str], bar: Any, options: dict[str, Any]
) -> _Embedded:
    """Yield the parts with the vectors of their texts, and count rows, texts and cut texts."""
    for part in parts:
        vectors, cut = embed_counting(model, part.texts, **options)
        counts.update(rows=len(part.rows), texts=len(part.texts), cut=cut)
        yield part, vectors.numpy()
        bar.update(len(part.rows))


@using(SEARCH)
def search_file(
    checkpoint: Any,
    query: str,
    file: str | os.PathLike[str],
    *,
    text: str | None = None,
    top_k: int = 10,
    prompt_name: str | None = None,
    device: str = "auto",
) -> list[Hit]:
    """Return the texts of a file that are nearest to a query; ``index`` of a hit is its row in the file, from 0.

    The other arguments are those of ``embed_file`` and ``search``. Rows without a text are never found.
    """
    parts = texts_of_file(Path(file), text, quiet=True)
    first = next(parts)  # an unreadable file raises before the model is loaded
    model = opened_model(checkpoint, device, quiet=True)
    rows = array("q")  # the row of each text

    def texts() -> Iterator[str]:
        start = 0
        for part in chain([first], parts):
            rows.extend(start + place for place in part.places)
            start += len(part.rows)
            yield from part.texts

    hits = search(model, query, texts(), top_k, prompt_name=prompt_name)
    return [replace(hit, index=rows[hit.index]) for hit in hits]


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error


def _write_array(path: Path, count: int, parts: _Embedded) -> None:
    """Write an array of ``count`` rows; those without a text are zeros."""
    written = 0
    with replacing(path) as file:
        for part, vectors in parts:
            every = np.zeros((len(part.rows), vectors.shape[1]), "<f4")
            every[part.places] = vectors
            if not written:
                shape = (count, vectors.shape[1])
                head = io.BytesIO()
                np.lib.format.write_array_header_1_0(
                    head, {"descr": "<f4", "fortran_order": False, "shape": shape}
                )
                file.write(head.getvalue())
            file.write(every.tobytes())
            written += len(every)
        if written != count:
            raise DataError(
                f"The input of {path} had {count:,} rows when they were counted and {written:,} when they were "
                "embedded: another program writes to it. Try again when it is complete."
            )


def _write_json_lines(path: Path, count: int, parts: _Embedded) -> None:
    """Write the rows with their vectors as lists; nine digits reproduce a number of fp32 exactly."""
    with RowWriter(path, []) as output:
        for part, vectors in parts:
            found = dict(zip(part.places, vectors, strict=True))
            for i, row in enumerate(part.rows):
                if _COLUMN in row:
                    raise DataError(_taken(path))
                vector = [float(f"{value:.9g}") for value in found[i]] if i in found else None
                output.write(row, {_COLUMN: vector})


def _write_parquet(path: Path, count: int, parts: _Embedded) -> None:
    """Write the rows with their vectors as lists of fixed size; the first part decides the types of the columns."""
    arrow, parquet = arrow_modules("writing")
    schema: Any = None
    with replacing(path) as file, contextlib.ExitStack() as stack:
        output: Any = None
        for part, vectors in parts:
            if schema is None:
                schema = arrow.Table.from_pylist(part.rows).schema
                if _COLUMN in schema.names:
                    raise DataError(_taken(path))
            later = sorted({name for row in part.rows for name in row} - set(schema.names))
            try:
                if later:
                    raise ValueError(f"the column {later[0]!r} is new")
                table = arrow.Table.from_pylist(part.rows, schema=schema)
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"The rows of {path.name} do not all have the columns and types of the first {_CHUNK:,}: {error}. "
                    "Write .jsonl, whose rows may differ."
                ) from error
            every = np.zeros((len(part.rows), vectors.shape[1]), np.float32)
            every[part.places] = vectors
            missing = np.ones(len(every), bool)
            missing[part.places] = False
            column = arrow.FixedSizeListArray.from_arrays(
                arrow.array(every.ravel()), every.shape[1], mask=arrow.array(missing)
            )
            table = table.append_column(_COLUMN, column)
            if output is None:
                output = stack.enter_context(parquet.ParquetWriter(Sink(file), table.schema))
            output.write_table(table)


def _taken(path: Path) -> str:
    return (
        f"The rows already have a column {_COLUMN!r}, so their vectors cannot be written to {path.name}. Rename it, or "
        "write .npy."
    )


_WRITERS = {".npy": _write_array, ".jsonl": _write_json_lines, ".parquet": _write_parquet}
