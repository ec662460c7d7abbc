"""Files of labelled rows: CSV, TSV, JSON, JSON lines, SQuAD, Parquet and CoNLL, plain or compressed.

A reader returns columns of equal length and, where it can, the line of every row, so that later errors can name it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.config.spelling import option
from pretrain.data.archives import COMPRESSIONS, open_packed
from pretrain.data.conll import conll_sentences, conllu_sentences
from pretrain.data.delimited import Content, distinct, read_delimited, shown
from pretrain.data.readers import (
    decode_line,
    import_parquet,
    json_rows,
    lines,
    parse_json,
    whole_characters,
)
from pretrain.errors import DataError, did_you_mean
from pretrain.utils.files import note

__all__ = ["TABLE_FORMATS", "columns_of_rows", "read_table_file", "unhalved"]

TABLE_FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet", ".conll": "conll", ".conllu": "conllu",
}  # fmt: skip
_MAX_WHOLE = 1 << 30  # size limit, in bytes, of files that cannot be read line by line


def read_table_file(
    path: Path,
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    header: bool | None = None,
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> Content:
    """Read a file; see :func:`pretrain.data.tables.read_table` for the arguments.

    Raises:
        DataError: the file is invalid; names the file, and the line and byte or column.
    """
    kind = _kind(path, format)
    if kind in ("csv", "tsv"):
        return read_delimited(path, kind, columns, header, delimiter, quoting, encoding)
    if columns is not None or header is not None or delimiter is not None or quoting is not None:
        raise DataError(
            f"columns, header, delimiter and quoting are for CSV and TSV files; {path} is read as {kind}, which has "
            "names for its columns."
        )
    if kind == "jsonl":
        return _json_lines(path, encoding)
    if kind == "json":
        return _json(path, encoding)
    if kind == "parquet":
        return _parquet(path)
    sentences = list(
        conll_sentences(path, encoding) if kind == "conll" else conllu_sentences(path, encoding)
    )
    tag = "ner_tags" if kind == "conll" else "pos_tags"
    return Content(
        {"tokens": [words for _, words, _ in sentences], tag: [tags for _, _, tags in sentences]},
        [start for start, _, _ in sentences],
    )


def _kind(path: Path, format: str | None) -> str:
    known = sorted(set(TABLE_FORMATS.values()))
    if format is not None:
        kind = format.lower().removeprefix(".")
        if kind not in known:
            raise DataError(f"{option('format', format)} is not known.{did_you_mean(kind, known)}")
        return kind
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = TABLE_FORMATS.get(suffixes[-1], "") if suffixes else ""
    if not kind:
        raise DataError(
            f"the name of {path} does not say how its rows are written. Name it {' '.join(TABLE_FORMATS)} (plain or "
            f"{' '.join(COMPRESSIONS)}), or say it: {option('format', 'tsv')}, one of {', '.join(known)}."
        )
    return kind


# -------------------------------------------------------------------------------------------------- JSON


def columns_of_rows(
    rows: Iterable[tuple[str, Any]], source: str
) -> tuple[dict[str, list[Any]], int]:
    """Turn (location, object) pairs into columns and the number of rows.

    A key that is missing from some rows is None there, which is reported in one line.

    Raises:
        DataError: a row is not an object, or has a key twice; names the location.
    """
    columns: dict[str, list[Any]] = {}
    lacking: dict[str, tuple[int, str]] = {}
    count = 0
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{where} holds {type(row).__name__}, not an object with named columns. Write each row as "
                '{"text": "...", "label": "..."}.'
            )
        for name, value in row.items():
            key = name if type(name) is str else str(name)
            if key not in columns:
                columns[key] = [None] * count
                if count:
                    lacking[key] = (count, "the first row")
            columns[key].append(value)
        count += 1
        if len(row) != len(columns):
            for name, column in columns.items():
                if len(column) < count:
                    column.append(None)
                    number, place = lacking.get(name, (0, where))
                    lacking[name] = (number + 1, place)
                elif len(column) > count:
                    raise DataError(f"{where} has the key {name!r} twice, as text and as a number.")
    if lacking:
        told = [
            f"{name!r} ({number:,} of {count:,} rows, first: {place})"
            for name, (number, place) in lacking.items()
        ]
        more = f" and {len(told) - 3} other columns" if len(told) > 3 else ""
        note(f"{source}: None stands where rows have no {', '.join(told[:3])}{more}")
    return columns, count


def unhalved(value: Any) -> Any:
    """Return `value` with all lone surrogates in its strings replaced."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [unhalved(item) for item in value]
    if isinstance(value, dict):
        return {unhalved(name): unhalved(item) for name, item in value.items()}
    return value


def _json_lines(path: Path, encoding: str | None = None) -> Content:
    places: list[int] = []

    def rows() -> Iterator[tuple[str, Any]]:
        for number, row in json_rows(path, note, '{"text": "...", "label": "..."}', encoding):
            places.append(number)
            yield f"{path}:{number}", unhalved(row)

    columns, _ = columns_of_rows(rows(), str(path))
    return Content(columns, places)


def _read_whole(path: Path) -> bytes:
    with open_packed(path, 1 << 20) as stream:
        data = stream.read(_MAX_WHOLE + 1)
    if len(data) > _MAX_WHOLE:
        raise DataError(
            f"{path} is longer than {_MAX_WHOLE >> 20} MiB, too long to be parsed as a whole. Write it as JSON lines "
            "(.jsonl), which are read row by row."
        )
    return data


def _json(path: Path, encoding: str | None = None) -> Content:
    text = "".join(
        decode_line(path, number, line, encoding) for number, line in lines(path, encoding)
    )
    if not text.strip():
        raise DataError(f"{path} is empty.")
    try:
        value = unhalved(parse_json(text))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON lines in a file named .json
            return _json_lines(path, encoding)
        raise DataError(
            f"{path}:{error.lineno}:{error.colno} is not valid JSON: {error.msg}. Often a comma or a bracket is "
            "missing there, or the file was cut while being written."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}. Correct the file.") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
        if value and isinstance(value[0], dict) and "paragraphs" in value[0]:
            return _squad(path, value)
    if isinstance(value, list):
        named = ((f"row {k} of {path}", row) for k, row in enumerate(value, start=1))
        return Content(columns_of_rows(named, str(path))[0])
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{path} holds lists of different lengths: {lengths}. As columns of a table they must be equal; "
                "otherwise write a list of objects."
            )
        return Content(value)
    keys = f" with the keys {shown(list(value))}" if isinstance(value, dict) else ""
    raise DataError(
        f"{path} holds {type(value).__name__}{keys}, which is no table. Write a list of objects, an object of columns "
        "of equal length, or questions in the layout of SQuAD (pandas: to_json(path, orient='records'))."
    )


def _squad(path: Path, articles: list[Any]) -> Content:
    """Return the questions of a SQuAD file (Rajpurkar et al. 2016, 2018), one per row.

    The answers of an unanswerable question are empty lists.
    """
    rows: list[tuple[str, Any]] = []
    where = ""
    try:
        for a, article in enumerate(articles):
            for p, paragraph in enumerate(article["paragraphs"]):
                where = f"data[{a}].paragraphs[{p}]"
                context = paragraph["context"]
                for q, question in enumerate(paragraph["qas"]):
                    where = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    found = [] if question.get("is_impossible") else question.get("answers") or []
                    answers = {
                        "text": [answer["text"] for answer in found],
                        "answer_start": [answer["answer_start"] for answer in found],
                    }
                    row = {"id": question.get("id"), "context": context}
                    rows.append(
                        (where, row | {"question": question["question"], "answers": answers})
                    )
    except (KeyError, TypeError, AttributeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else "is not built like SQuAD"
        raise DataError(
            f"{path}: {where or 'data'} {what}. Expected data[].paragraphs[] with context and qas[], each of these "
            "with question and answers[] of text and answer_start."
        ) from error
    return Content(columns_of_rows(rows, str(path))[0])


# ----------------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> Content:
    arrow, parquet = import_parquet()
    packed = path.suffix.lower() in COMPRESSIONS
    try:
        source = io.BytesIO(_read_whole(path)) if packed else path
        with parquet.ParquetFile(source) as file:
            table = file.read()
            names = distinct(str(path), list(table.schema.names))
            columns = {name: table.column(name).to_pylist() for name in names}
            return Content(columns, None, _class_names(table.schema.metadata))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} holds text that is not UTF-8 (byte {error.start} of a cell); write the file again with valid "
            "strings."
        ) from error
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}.") from error


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the class names, by column, that the datasets library stores in the metadata of a parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: found for name, kind in features.items() if (found := _names_in(kind))}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}  # written by another library, or in another layout: the values are used as they are


def _names_in(feature: Any) -> list[str]:
    while isinstance(feature, dict):
        if feature.get("_type") == "ClassLabel":
            return [str(name) for name in feature["names"]]
        feature = feature.get("feature")
    return []
