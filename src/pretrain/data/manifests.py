"""The manifest of prepared data: a JSON object with a digest of itself, which lists the files and their checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.data import flat_files
from pretrain.data.flat_files import sums_name
from pretrain.errors import DataError
from pretrain.utils.files import replace_file

__all__ = [
    "IMAGE_FILES",
    "IMAGE_PARTS",
    "MANIFEST",
    "TEXT_FILES",
    "check_files",
    "file_record",
    "image_file_names",
    "read_sealed",
    "unsealed",
    "write_sealed",
]

MANIFEST = "manifest.json"


def _with_sums(names: Iterable[str]) -> frozenset[str]:
    return frozenset(file for name in names for file in (name, sums_name(name)))


# The files beside the manifest. An untrusted one must not make us read others, above all none outside its directory.
TEXT_FILES = _with_sums(
    f"{split}.{kind}.bin"
    for split in ("train", "valid")
    for kind in ("tokens", "documents", "segments", "rows")
)
# Part of a data set of images, "" for rows that are in no part -> how its files begin.
IMAGE_PARTS = {"": "all", "train": "train", "valid": "valid", "test": "test"}


def image_file_names(part: str) -> tuple[str, str]:
    """Return the names of the files of pixels and of rows of a part."""
    return f"{IMAGE_PARTS[part]}.pixels.bin", f"{IMAGE_PARTS[part]}.rows.jsonl"


_PIXELS, _ROWS = zip(*map(image_file_names, IMAGE_PARTS), strict=True)
IMAGE_FILES = _with_sums(_PIXELS) | frozenset(_ROWS)
_LISTED = TEXT_FILES | IMAGE_FILES
_TOKENIZER = re.compile(r"tokenizer/[A-Za-z0-9_-][A-Za-z0-9._-]*")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object together with its digest, atomically; see ``read_sealed``."""
    whole = {**value, "digest": _digest(value)}
    text = json.dumps(whole, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    # File names that are not UTF-8 contain lone surrogates, which are valid JSON when escaped as \\udcXX.
    replace_file(path, text.encode("utf-8", errors="backslashreplace"))


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the object in a file that ``write_sealed`` wrote.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is damaged.
    """
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def unsealed(value: Any) -> dict[str, Any]:
    """Return the object without its digest, given the parsed content of a file of ``write_sealed``.

    Raises:
        ValueError: the content is no object, or does not match its digest.
    """
    if not isinstance(value, dict) or value.pop("digest", None) != _digest(value):
        raise ValueError("the content does not agree with its digest")
    return value


def _digest(value: dict[str, Any]) -> str:
    # Hash the value as it is read back: JSON turns tuples into lists and keys into strings.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file for the manifest."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def check_files(folder: Path, files: dict[str, Any], *, full: bool = False) -> None:
    """Compare the files of a directory with its manifest.

    Args:
        folder: the prepared directory.
        files: the size and SHA-256 of each file by name.
        full: hash the large files too.

    Raises:
        DataError: a file is missing, truncated or changed, or the manifest has an invalid name or record.
    """
    again = "Prepare the data again (delete the directory first)."
    for name, record in files.items():
        if name not in _LISTED and not _TOKENIZER.fullmatch(name):
            raise DataError(
                f"{folder}/manifest.json lists {name!r}, which is not a file of prepared data; the manifest was "
                f"changed or written by another program. {again}"
            )
        if not isinstance(record, dict) or not {"size", "sha256"} <= set(record):
            raise DataError(
                f"{folder}/manifest.json does not give size and SHA-256 of {name!r}; it is damaged. {again}"
            )
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing from the prepared data. {again}")
        size = path.stat().st_size
        if size != record["size"]:
            raise DataError(
                f"{path} has {size} bytes, its manifest says {record['size']}; it was truncated or changed. {again}"
            )
        if (full or size <= flat_files.IN_MEMORY) and _sha256(path) != record["sha256"]:
            raise DataError(
                f"{path} does not have the SHA-256 of its manifest; it was changed or damaged. {again}"
            )
