"""``prepare`` for images: each is decoded once, scaled if that is asked for, and written to checksummed files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.flat_files import sums_name, write_sums
from pretrain.data.images.boxes import PLACES, annotations_of
from pretrain.data.images.decode import (
    MOST_PIXELS,
    SUFFIXES,
    FileItem,
    in_threads,
    to_channels,
)
from pretrain.data.images.masks import MASK, mask_folders
from pretrain.data.images.rows import (
    files_below,
    is_image_source,
    note_names,
    note_rows,
    parts_of,
    pictures,
    read_all,
    read_images,
)
from pretrain.data.images.source import IMAGE
from pretrain.data.images.stored import FORMAT, KIND, PreparedImages
from pretrain.data.labelled import choose_columns
from pretrain.data.labels import is_missing
from pretrain.data.manifests import (
    IMAGE_FILES,
    IMAGE_PARTS,
    MANIFEST,
    file_record,
    image_file_names,
    write_sealed,
)
from pretrain.data.readers import found_in_folders
from pretrain.data.tables import Table
from pretrain.data.workdir import build, foreign
from pretrain.errors import CheckpointCorrupt, ConfigError, DataError
from pretrain.utils.files import muted, note
from pretrain.utils.strict_json import parse_json

__all__ = ["holds_images", "prepare_images"]

_USES = {"": "train", "train": "train", "valid": "validation", "test": "test"}


def holds_images(source: Any) -> bool:
    """Whether a source is of images by its name: an archive, arrays, or a folder of them that holds no text to learn.

    A ``.txt`` beside an image is its caption, and a table called ``metadata`` names its images.
    """
    path = Path(os.path.expanduser(source)) if isinstance(source, str | Path) else None
    if path is None or not is_image_source(path):
        return False
    if not path.is_dir() or PreparedImages.find(path) is not None:
        return True
    found, others, _ = files_below(path)
    captions = {file.with_suffix(".txt") for file in found}
    texts = (
        found_in_folders(file) and file.stem != "metadata" and file not in captions
        for file in others
    )
    archives = any(file.suffix.lower() == ".tar" for file in others)
    return bool(found or archives) and not any(texts)


def prepare_images(
    source: Any,
    target: Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    say: Callable[[str], None] = note,
) -> PreparedImages:
    """Decode the images of a source into a directory that is read like the source; a second call finds it again.

    Args:
        source: what ``read_images`` reads, with a column of images.
        target: the directory.
        size: height and width that all images are scaled to, as a run with ``data.source_args.size`` scales them; None
            keeps their own.
        channels: 1 (grey) or 3 (RGB); None keeps those of each image.
        say: prints a line.

    Raises:
        DataError: no image can be read, a path does not exist, or there is something else in the directory.
        ConfigError: an option is wrong.
    """
    size, channels = (int(n) if isinstance(n, np.integer) else n for n in (size, channels))
    whole = size is None or (type(size) is int and 0 < size <= math.isqrt(MOST_PIXELS))
    if not whole or channels not in (None, 1, 3):
        raise ConfigError(
            f"size is {size!r} and channels is {channels!r}; size must be a whole number from 1 to "
            f"{math.isqrt(MOST_PIXELS):,}, and channels 1 or 3."
        )
    _check_replaceable(target)
    found = {part: _rows(source, part, size) for part in parts_of(source) or [""]}
    place = os.path.expanduser(source) if isinstance(source, str | Path) else ""
    if place and os.path.realpath(place) == os.path.realpath(target):
        raise DataError(
            f"{target} is the source itself, which would be lost. Choose another `out`."
        )
    options = {"size": size, "channels": channels}
    digest = hashlib.sha256(json.dumps([FORMAT, options]).encode())
    for part, (table, columns) in found.items():
        names = in_threads(
            lambda picture: "" if picture is None else picture.digest, pictures(table)
        )
        content = [part, list(names), columns, table.label_names]
        digest.update(json.dumps(content, sort_keys=True).encode())
    fingerprint = digest.hexdigest()
    ready = _existing(target, fingerprint, say)
    if ready is not None:
        return ready
    name = Path(source).name if isinstance(source, str | Path) else type(source).__name__
    head = {"format": FORMAT, "kind": KIND, "fingerprint": fingerprint, "options": options}

    def fill(work: Path) -> None:
        _write(work, found, size, channels, {**head, "source": name})

    prepared = PreparedImages.find(
        build(target, fingerprint, say, lambda at: _existing(at, fingerprint, lambda _: None), fill)
    )
    assert prepared is not None
    return prepared


def _check_replaceable(target: Path) -> None:
    """Refuse what would be lost: only directories that prepare of images wrote are replaced.

    Raises:
        DataError: there is a file, or a directory with other files, or with the manifest of something else.
    """
    if target.exists() and not target.is_dir():
        raise DataError(f"{target} is a file; `out` must be a directory.")
    held = set(os.listdir(target)) if target.is_dir() else set()
    if not held:
        return
    if "train.tokens.bin" in held and foreign(target) is None:
        raise DataError(f"{target} holds prepared text. Choose another `out`, or delete it first.")
    strange = foreign(target) or min(held - IMAGE_FILES - {MANIFEST}, default=None)
    if strange is None:
        try:
            manifest = parse_json((target / MANIFEST).read_bytes(), target / MANIFEST)
        except (OSError, CheckpointCorrupt):
            ok = any(
                image_file_names(part)[0] in held for part in IMAGE_PARTS
            )  # a damaged file among our own
        else:
            kind = manifest.get("kind") if isinstance(manifest, dict) else None
            ok = kind == KIND and len(held) > 1
        if not ok:
            strange = MANIFEST if MANIFEST in held else min(held)
    if strange is not None:
        raise DataError(
            f"{target} exists and is not prepared data: {strange!r} in it was not written by prepare of images, and "
            "would be lost. Choose another `out`."
        )


def _existing(target: Path, fingerprint: str, say: Callable[[str], None]) -> PreparedImages | None:
    """Return what is in the directory, if it was made of the same content with the same options."""
    _check_replaceable(target)
    try:
        prepared = PreparedImages.find(target)
    except DataError as error:
        say(f"{error} Preparing it again.")
        return None
    if prepared is None:
        return None
    if prepared.fingerprint != fingerprint:
        say(f"{target} was prepared from other sources or options: preparing it again")
        return None
    say(f"prepared images found in {target}: nothing to do")
    return prepared


def _rows(source: Any, part: str, size: int | None) -> tuple[Table, dict[str, list[Any]]]:
    """Return the rows of a part with their images under ``image``, and their other columns, ready for JSON."""
    with muted():  # reading would print the same notes again
        folders = mask_folders(source, name=_USES[part]) is not None
        boxes = not folders and _has_boxes(source, _USES[part])
    if folders or boxes:
        raise _beside(source, "boxes" if boxes else "masks or other annotations")
    table = read_images(source, name=_USES[part])
    column = choose_columns(table, (IMAGE,), {}, quiet=True)["image"]
    columns, lost = dict[str, list[Any]](), list[str]()
    for name, values in table.columns.items():
        if name == column:
            continue
        for line in table.remarks.get(name, ()):
            note(line)
        if any(isinstance(value, FileItem) for value in values) or _has_masks(table, name):
            raise _beside(table.name, "masks")
        if size is not None and name.lower() in PLACES:
            raise DataError(
                f"{table.name}: the column {name!r} holds places in pixels, which scaling would move. Leave size out."
            )
        try:
            columns[name] = json.loads(json.dumps(values, default=lambda value: value.tolist()))
        except (TypeError, ValueError, AttributeError):
            lost.append(name)
    note_names(table.name, lost, "columns are not stored, because JSON has no such values")
    held = table.with_columns({"image": pictures(table, column), **columns}, table.label_names)
    return held, columns


def _beside(source: Any, what: str) -> DataError:
    return DataError(
        f"{source} holds {what} beside the images, and prepare writes one image for each row, without them. Train on "
        "the source itself."
    )


def _has_boxes(source: Any, use: str) -> bool:
    """Return whether files of boxes lie beside the images; a file of XML without any says something else."""
    if (found := annotations_of(source, name=use)) is None:
        return False
    files = found[1]
    return isinstance(files, Mapping) or any(
        file.is_file() and b"<bndbox" in file.read_bytes() for file in files
    )


def _has_masks(table: Table, name: str) -> bool:
    """Return whether a column is called like one of masks, and its first value is an image and no label."""
    if name.lower() not in MASK.known:
        return False
    values = table.columns[name]
    first = next((i for i, v in enumerate(values) if not is_missing(v)), None)
    try:
        one = None if first is None else pictures(table.take([first]), name)[0]
    except DataError:
        return False
    if one is None or not isinstance(one.source, Path):
        return one is not None
    return one.source.suffix.lower() in SUFFIXES or one.source.is_file()


def _write(
    work: Path,
    found: Mapping[str, tuple[Table, dict[str, list[Any]]]],
    size: int | None,
    channels: int | None,
    head: dict[str, Any],
) -> None:
    def values(image: Any) -> Any:
        image = image if channels is None else to_channels(image, channels)
        return np.asarray(image if size is None else image.resize((size, size), resample=2))

    parts, files = dict[str, Any](), dict[str, Any]()
    for part, (table, columns) in found.items():
        names, told, rows = image_file_names(part), dict[str, list[int]](), 0
        with (work / names[0]).open("wb") as pixels, (work / names[1]).open("w") as lines:
            for i, picture, array, text in read_all(table, values, required=True):
                if text is not None:
                    told.setdefault(f"{'left out, ' * (array is None)}{text}", []).append(i)
                if array is None:
                    continue
                row = {"name": str(picture), "shape": array.shape, "sha256": picture.digest}
                row["row"] = {name: column[i] for name, column in columns.items()}
                lines.write(json.dumps(row) + "\n")
                pixels.write(array.tobytes())
                rows += 1
        note_rows(table, told, "rows")
        if rows < len(table):
            note(
                f"{table.name}: the other rows are numbered anew, so the fraction that a run holds out may be another "
                "one than that of the source"
            )
        if not rows:
            raise DataError(f"None of the images of {table.name} can be read.")
        write_sums(work / names[0])
        written = [name for name in (*names, sums_name(names[0])) if (work / name).is_file()]
        files |= {name: file_record(work / name) for name in written}
        kept = {name: names for name, names in table.label_names.items() if name in columns}
        parts[part] = {
            "rows": rows, "left_out": len(table) - rows, "columns": list(columns), "label_names": kept,
        }  # fmt: skip
    write_sealed(work / MANIFEST, {**head, "parts": parts, "files": files})
