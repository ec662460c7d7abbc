"""Images for pre-training: the rows that ``data.source: images`` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.images.processor import ImageProcessor
from pretrain.data.images.rows import (
    IMAGES,
    Medium,
    decoded,
    note_rows,
    parts_of,
    pictures,
    read_images,
)
from pretrain.data.labelled import Role, choose_columns, drop_duplicates, roles_table, split
from pretrain.data.labels import LabelMap
from pretrain.data.row_source import RowSource
from pretrain.data.tables import Table
from pretrain.errors import ConfigError, DataError
from pretrain.utils.files import note

__all__ = ["IMAGE", "file_examples", "labelled_images", "processor_for", "rows_by_class"]

IMAGE = Role(
    "image",
    (
        *("image", "img", "images", "picture", "photo", "file_name", "filename", "file", "path"),
        *("image_path", "filepath", "file_path", "image_file"),
    ),
    help="the image: a path, bytes or an array",
    file=True,
)
_LABEL = Role("label", ("label", "labels", "class", "category", "target"), help="the class")
_USUAL = 224  # size of the images of published models
_PATCHES, _MOST = 8, 16  # along a side of the images of a new model: about, and at most


def labelled_images(
    train: str,
    valid: float | str | None = None,
    *,
    size: int | None = None,
    channels: int = 3,
    seed: int = 0,
    labels: bool | Sequence[str] = True,
) -> RowSource:
    """Return rows of images, with one class each for the objective ``ImageClassification``, or without for others.

    Args:
        train: a folder of images by class, a ``.npz`` file, or a table with a column of paths; see
            ``pretrain.data.images.rows.read_images``.
        valid: held-out rows: such a source, or a fraction of the rows, stratified by class. None: the part ``val`` of
            the source, if it has one, else a tenth.
        size: height and width that the model reads; None: those of the images if all are squares of one size of at most
            224, else 224.
        channels: 3 for RGB, 1 for grey.
        seed: seed of the split.
        labels: whether the rows have classes; False reads the images alone, for ``MaskedImage``. A list names the
            classes in the order of a checkpoint that is trained on.

    Returns:
        Rows with ``image`` and, if asked for, ``labels``; the image processor; and the labels and sizes that the model
        needs.

    Raises:
        DataError: no images, no labels, or an image that does not exist.
    """
    rows, held_rows, known = rows_by_class(train, valid, IMAGE, IMAGES, seed=seed, labels=labels)
    processor, sizes = processor_for(rows, size, channels)
    return RowSource(
        rows,
        held_rows,
        processor=processor,
        overrides={**({} if known is None else {"labels": known.labels}), **sizes},
        name=Path(train).name,
    )


def processor_for(
    rows: list[dict[str, Any]], size: int | None, channels: int
) -> tuple[ImageProcessor, dict[str, int]]:
    """Return the image processor of a new model for rows with ``image``, and the fields of its config.

    Raises:
        ConfigError: the size is no whole number above 0.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise ConfigError(f"data.source_args.size is {size!r}; it must be a whole number above 0.")
    side, patch = _sizes(_common_size(rows) if size is None else size)
    half = (0.5,) * channels
    processor = ImageProcessor(size=side, image_mean=half, image_std=half)
    return processor, {"image_size": side, "patch_size": patch, "num_channels": channels}


def rows_by_class(
    train: str,
    valid: float | str | None,
    role: Role,
    medium: Medium,
    *,
    seed: int,
    labels: bool | Sequence[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], LabelMap | None]:
    """Read training rows and held-out rows of images or of another medium.

    Args:
        train: see ``labelled_images``.
        valid: see there.
        role: the column of the rows, called as that of the medium.
        medium: what the files hold.
        seed: see there.
        labels: see there.

    Returns:
        The rows, with ``labels`` if asked for; the held-out ones; and the classes, or None.
    """
    whole = _by_role(read_images(train, name="train", medium=medium), role, medium, bool(labels))
    if valid is None:
        valid = train if "valid" in parts_of(train, medium) else 0.1
    names, known, strata = whole.label_names.get("label"), None, None
    if labels:
        order = None if isinstance(labels, bool) else list(labels)
        known = LabelMap.learn(
            whole.columns["label"], names=names, checkpoint=order, where=whole.where
        )
    if isinstance(valid, str):
        rest = read_images(valid, name="validation", medium=medium)
        held = _by_role(rest, role, medium, bool(labels))
    else:
        if known is not None:
            strata = known.ids(whole.columns["label"], names=names, where=whole.where)
        whole, held = split(whole, strata, float(valid), seed)
    whole, _ = drop_duplicates(whole, held, [role.name], "validation")
    rows, held_rows = (
        _examples(table, known, medium, what)
        for table, what in ((whole, "training"), (held, "validation"))
    )
    if not rows:
        raise DataError(f"None of the {medium.many} of {train} can be read.")
    return rows, held_rows, known


def _by_role(table: Table, role: Role, medium: Medium, labels: bool) -> Table:
    roles = (role, *medium.beside, *[_LABEL] * labels)
    found = roles_table(table, choose_columns(table, roles, {}))
    columns = {**found.columns, role.name: pictures(found, medium=medium)}
    return found.with_columns(columns, found.label_names)


def _examples(
    table: Table, known: LabelMap | None, medium: Medium, what: str
) -> list[dict[str, Any]]:
    """Return the rows whose files can be read, with the numbers of their classes if they have some."""
    names, ids = table.label_names.get("label"), None
    if known is not None:
        ids = known.ids(table.columns["label"], names=names, where=table.where)
    return file_examples(
        table,
        what,
        lambda i: {} if ids is None else {"labels": np.asarray(ids[i], np.int64)},
        medium,
    )


def file_examples(
    table: Table,
    what: str,
    others: Callable[[int], dict[str, Any]],
    medium: Medium = IMAGES,
) -> list[dict[str, Any]]:
    """Return the rows whose files can be read; the others are counted and named in a line for each reason.

    Args:
        table: has a column ``image``, or that of another medium.
        what: what the rows are for, for messages.
        others: returns the other fields of a row by its index.
        medium: what the files hold.
    """
    rows, remarks = [], dict[str, list[int]]()
    for i, image, text in decoded(table, required=True, medium=medium):
        if text is not None:
            remarks.setdefault(f"{'left out, ' * (image is None)}{text}", []).append(i)
        if image is not None:
            rows.append({medium.column: image, **others(i)})
    note_rows(table, remarks, f"{what} rows")
    return rows


def _common_size(rows: list[dict[str, Any]]) -> int:
    """Return the side of the images if all are squares of one size of at most 224, else 224."""
    sizes = Counter(row["image"].size for row in rows)
    (width, height), _ = sizes.most_common(1)[0]
    return width if len(sizes) == 1 and width == height <= _USUAL else _USUAL


def _sizes(side: int) -> tuple[int, int]:
    """Return the sides of the images and of their patches, by which there are about eight along an image.

    The sides of published models keep their patches of 16. Smaller images have at most 16 patches along a side; if no
    divisor of at most 16 gives that, the images are scaled down a little, which is said.
    """
    if side >= _USUAL:
        return side, 16
    divisors = [d for d in range(1, 17) if side % d == 0 and side // d <= _MOST]
    if divisors:
        return side, min(divisors, key=lambda d: (abs(side / d - _PATCHES), d))
    scaled = side // _PATCHES * _PATCHES
    note(
        f"images of {side} x {side} pixels have no patches of a suitable size; they are scaled to {scaled} x {scaled} "
        f"(data.source_args.size), with patches of {scaled // _PATCHES}"
    )
    return scaled, scaled // _PATCHES
