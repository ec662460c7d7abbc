"""Shapes in which a JSON file holds rows: orientations of pandas, an object of splits, and the captions of COCO."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.data.encodings import open_text
from pretrain.data.readers import table_kind
from pretrain.data.shard_folders import SPLITS, TRAIN
from pretrain.errors import DataError

__all__ = [
    "captions_of",
    "is_rows",
    "may_hold_splits",
    "splits_of",
    "unoriented",
]

_HEAD = 4096  # bytes, in which the first key of a file stands
_FIRST_SPLIT = re.compile(rf'(?:\ufeff)?\s*{{\s*"(?:{"|".join(SPLITS)})\w*"\s*:\s*[\[{{]')
_INDEX = re.compile(r"-?\d[\d.:TZ+\- ]*")  # a key of an index of pandas: a number or a date
_CURE = "Write a list of objects (pandas: to_json(path, orient='records'))."


def may_hold_splits(source: Any) -> bool:
    """Whether a source is a JSON file that may hold splits, by its first key; the file is not read further."""
    if not isinstance(source, str | Path) or table_kind(Path(source)) != "json":
        return False
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        return False
    try:
        with open_text(path) as stream:
            head = stream.read(_HEAD)
    except DataError:  # it is reported when the rows are read
        return False
    return bool(_FIRST_SPLIT.match(head.decode("utf-8", "replace")))


def splits_of(value: Any) -> dict[str, Any]:
    """Return the splits, each with rows or columns, of an object with ``train`` or with usual names only; else {}."""
    if not isinstance(value, dict) or not (set(value) & set(TRAIN) or set(value) <= set(SPLITS)):
        return {}
    full = {split: rows for split, rows in value.items() if rows != []}
    return full if full and all(map(is_rows, full.values())) else {}


def is_rows(value: Any) -> bool:
    """Whether a value is a table (a list of dicts or tuples, or a dict of columns) and not a single column."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(column, list | tuple) for column in value.values())
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping | tuple)


def captions_of(value: Any, path: Path) -> dict[str, list[Any]] | None:
    """Return the columns ``image`` and ``caption``, a list for each image, of a file of COCO's captions; else None.

    Raises:
        DataError: a caption has no image, or an entry lacks a key.
    """
    has = {"images": {"id", "file_name"}, "annotations": {"caption"}}
    if not isinstance(value, dict) or not all(isinstance(value.get(k), list) for k in has):
        return None
    if not all(any(isinstance(x, dict) and has[k] & {*x} for x in value[k]) for k in has):
        return None
    try:
        files = {one["id"]: str(one["file_name"]) for one in value["images"]}
        captions: dict[str, list[Any]] = {file: [] for file in files.values()}
        for one in value["annotations"]:
            captions[files[one["image_id"]]].append(one["caption"])
    except (KeyError, TypeError) as error:
        wrong = f"has a wrong entry ({error})"
        if isinstance(error, KeyError):
            wrong = f"{error} is missing or no image has it as its id"
        raise DataError(
            f"{path} looks like a file of COCO's captions, but {wrong}. Each annotation needs image_id and caption, "
            "each image id and file_name."
        ) from error
    if len(files) < len(value["images"]):
        raise DataError(
            f"{path}: two images have one id, so their captions cannot be told apart. Give each its own."
        )
    return {"image": [*captions], "caption": [*captions.values()]}


def unoriented(value: Any, path: Path) -> Any:
    """Return what pandas wrote by columns, by index or split as a list of rows or an object of columns.

    Any other value is returned as it is.

    Raises:
        DataError: the rows are ambiguous, have no names, or differ in length.
    """
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        raise DataError(f"{path} holds lists without the names of their columns. {_CURE}")
    if not isinstance(value, dict) or not value:
        return value
    if {"columns", "data"} <= set(value) <= {"columns", "index", "data"}:
        return _split(value, path)
    if not all(isinstance(inner, dict) and inner for inner in value.values()):
        return value
    first = next(iter(value.values()))
    outer, inner = (all(map(_INDEX.fullmatch, keys)) for keys in (value, first))
    if outer and not inner:
        return list(value.values())
    columnar = all(column.keys() == first.keys() for column in value.values())
    if inner and not outer and columnar:
        return {name: [column[key] for key in first] for name, column in value.items()}
    raise DataError(
        f"{path} holds an object of objects, {next(iter(value))!r} and then {next(iter(first))!r}, of which the keys "
        f"do not show whether they are rows or columns. {_CURE}"
    )


def _split(value: dict[str, Any], path: Path) -> Any:
    names, rows = value["columns"], value["data"]
    held = isinstance(names, list) and isinstance(rows, list)
    if not held or not all(isinstance(row, list) for row in rows):
        return value
    names = list(map(str, names))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path} names the column {twice!r} twice. Rename one of them.")
    for k, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(
                f"row {k} of {path} has {len(row)} values, but 'columns' names {len(names)}. Correct this row."
            )
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}
