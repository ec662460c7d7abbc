"""Rows of images with masks: folders of both, arrays, and columns of paths, bytes or arrays.

A mask holds one whole number for each pixel of its image: that of the class, or 255 for a pixel without one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.images.decode import BrokenImage, Picture, in_threads
from pretrain.data.images.rows import (
    ImageTable,
    check_exists,
    image_files,
    note_names,
    part_for,
    parts_of,
    pictures,
    read_images,
)
from pretrain.data.labelled import Role
from pretrain.data.tables import Table
from pretrain.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = [
    "MASK",
    "UNLABELLED",
    "Mask",
    "mask_folders",
    "pixel_features",
    "read_masked",
    "read_numbers",
    "surroundings",
]

UNLABELLED = 255  # the usual number of pixels without a class
MASK = Role(
    "mask",
    (
        *("mask", "masks", "segmentation", "annotation", "label", "labels", "mask_path", "mask_file"),
        *("segmentation_mask", "semantic_mask", "segmentation_maps", "mask_image"),
    ),
    help="the mask: an image whose pixels are numbers of classes",
    target=True,
    file=True,
)  # fmt: skip
_IMAGES = ("images", "image", "imgs", "img", "JPEGImages")
_MASKS = ("masks", "mask", "labels", "annotations", "SegmentationClass")


class Mask:
    """The class of every pixel of an image, (H, W) bytes, kept compressed; 255 is a pixel without a class."""

    def __init__(self, values: NDArray[np.uint8]) -> None:
        self.shape = values.shape
        self._content = zlib.compress(np.ascontiguousarray(values).tobytes(), 1)

    @property
    def values(self) -> NDArray[np.uint8]:
        """The classes, (H, W)."""
        flat = np.frombuffer(zlib.decompress(self._content), np.uint8)
        return flat.reshape(self.shape)

    @property
    def digest(self) -> str:
        """SHA-256 over shape and classes."""
        return hashlib.sha256(f"{self.shape} ".encode() + self.values.tobytes()).hexdigest()


def read_masked(source: Any, *, name: str = "data", **options: Any) -> Table:
    """Read rows of images with masks; sources without masks are read like those of ``read_images``, see there.

    Those with masks are a folder with the folders ``images`` and ``masks``, whose files belong together by their names
    without the ending, or with such a folder for each part (``train``, ``val``, ``test``).

    Raises:
        DataError: as there; or an image and a mask do not belong together.
    """
    found = mask_folders(source, name=name)
    return read_images(source, name=name, **options) if found is None else _paired(*found)


def mask_folders(source: Any, *, name: str = "data") -> tuple[Path, Path, Path] | None:
    """Return the folder that is read for the rows ``name``, and in it those of images and of masks, or None."""
    path = Path(os.path.expanduser(source)) if isinstance(source, str | Path) else None
    if path is None or not os.path.isdir(path):
        return None
    part = part_for(path, name)
    folder = part if isinstance(part, Path) else path
    images, masks = (_folder_of(folder, names) for names in (_IMAGES, _MASKS))
    return None if images is None or masks is None else (folder, images, masks)


def _folder_of(path: Path, names: Sequence[str]) -> Path | None:
    inside = {p.name.lower(): p for p in sorted(path.iterdir()) if p.is_dir()}
    return next((inside[n.lower()] for n in names if n.lower() in inside), None)


def _paired(path: Path, images: Path, masks: Path) -> Table:
    """Return the images with a mask of the same name without the ending; the others are named in a line."""
    if parts := parts_of(images):
        raise DataError(
            f"{images} holds the parts {', '.join(parts)}. Put them above: train/images and train/masks, val/images "
            "and val/masks."
        )
    found = [_by_stem(folder) for folder in (images, masks)]
    both = [stem for stem in found[0] if stem in found[1]]
    for own, other, what in (
        (found[0], found[1], "images without a mask"),
        (found[1], found[0], "masks without an image"),
    ):
        alone = [str(file) for stem, file in own.items() if stem not in other]
        note_names(path, alone, f"{what} are left out")
    if not both:
        raise DataError(
            f"{images} and {masks} have no two files of one name (without the ending). Name each mask like its image: "
            "images/a.jpg, masks/a.png."
        )
    columns: dict[str, list[Any]] = {
        role: [Picture(files[stem], str(files[stem])) for stem in both]
        for role, files in zip(("image", "mask"), found, strict=True)
    }
    return ImageTable(path.name or str(path), columns, origin=str(path))


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in image_files(folder):
        stem = str(file.relative_to(folder).with_suffix(""))
        if stem in files:
            raise DataError(
                f"{folder} has two files of the name {stem}: {files[stem].name} and {file.name}. Keep one of them."
            )
        files[stem] = file
    return files


def read_numbers(table: Table) -> Iterator[tuple[int, Any]]:
    """Decode the masks of a table.

    Args:
        table: has a column ``mask``.

    Returns:
        For each row its index, and the numbers of the pixels (H, W), the ``BrokenImage`` that says why there are none,
        or None for an empty cell. A ``Mask`` is given as it is.

    Raises:
        DataError: a file does not exist, which a wrong folder causes for many; names the first.
    """
    column = table.columns["mask"]
    held: list[Any] = [None] * len(column)
    others = [i for i, value in enumerate(column) if not isinstance(value, Mask)]
    for i, picture in zip(others, pictures(table.take(others), "mask"), strict=True):
        held[i] = picture

    def read(i: int) -> Any:
        if isinstance(column[i], Mask):
            return column[i]
        if held[i] is None:
            return None
        try:
            return held[i].numbers()
        except BrokenImage as error:
            return error

    for i, found in enumerate(in_threads(read, range(len(column)))):
        if isinstance(found, BrokenImage):
            check_exists(table, i, held[i], found)
        yield i, found


def pixel_features(
    *tables: Table, images: int = 200, pixels: int = 50_000
) -> list[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    """Return features and classes of pixels drawn from the images of each table, for classical methods.

    The features are the colour of a pixel, and those of its surroundings at two sizes (Gaussian blur).

    Args:
        *tables: the columns ``image`` and ``mask``, the latter of ``Mask``.
        images: most images of a table, at even distances.
        pixels: most pixels of a table, as many from each image.
    """
    found = []
    for table in tables:
        rows = [i for i, mask in enumerate(table.columns["mask"]) if isinstance(mask, Mask)]
        rows = rows[:: max(1, -(-len(rows) // images))]
        part = table.take(rows)
        features, classes = [np.zeros((0, 9), np.float32)], [np.zeros(0, np.uint8)]
        for i, picture in enumerate(pictures(part)):
            mask = part.columns["mask"][i].values.reshape(-1)
            known = np.flatnonzero(mask != UNLABELLED)
            drawn = np.random.default_rng(i).permutation(known)[: max(1, pixels // len(rows))]
            with contextlib.suppress(BrokenImage):
                if picture is not None:
                    features.append(surroundings(picture.read()[0])[drawn])
                    classes.append(mask[drawn])
        found.append((np.concatenate(features), np.concatenate(classes)))
    return found


def surroundings(image: Image) -> NDArray[np.float32]:
    """Return the colours of all pixels of an image, sharp and blurred twice, (H · W, 9)."""
    from PIL import ImageFilter

    image = image.convert("RGB")
    seen = [image, *(image.filter(ImageFilter.GaussianBlur(r)) for r in (2, 8))]
    return np.concatenate([np.asarray(one, np.float32).reshape(-1, 3) for one in seen], axis=1)
