"""Images that a caller gives to a model: paths, folders, arrays, bytes, images of Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.images.decode import Picture
from pretrain.data.images.rows import is_image_source, read_images
from pretrain.data.tables import Table
from pretrain.errors import DataError

__all__ = ["given_images"]


def given_images(inputs: Any, channels: int) -> tuple[Table, bool] | None:
    """Return images as a table with the column ``image``, and whether they are one; None for rows and tables.

    Args:
        inputs: one image (a path, bytes, an array (H, W) or (H, W, C), an image of Pillow), several in a list or an
            array, or the path of a folder or an archive of images.
        channels: channels of the model, by which an array (3, H, W) is told from three images.

    Raises:
        DataError: a path that does not exist.
    """
    array = getattr(inputs, "ndim", 0) if hasattr(inputs, "dtype") else 0
    path = Path(inputs) if isinstance(inputs, str | Path) else None
    if path is not None and is_image_source(path):
        table = read_images(path)
        several = path.is_dir() or path.suffix.lower() in (".npz", ".tar")
        return table, not several and len(table) == 1
    if path is not None:
        if not path.suffix:  # neither an image nor a table
            _check_paths([path])
        return None
    colours = array == 3 and (inputs.shape[0] == channels == 3 or inputs.shape[-1] in (1, 3, 4))
    if array == 2 or colours or hasattr(inputs, "getbands") or isinstance(inputs, bytes):
        return _table([inputs]), True
    if array in (3, 4):
        return _table(list(inputs)), False
    if isinstance(inputs, list | tuple) and inputs and not isinstance(inputs[0], Mapping):
        return _table(list(inputs)), False
    return None


def _check_paths(images: Sequence[Any]) -> None:
    """Refuse paths of a caller that do not exist, because one wrong folder makes all of them wrong."""
    for i, path in enumerate(images, start=1):
        named = isinstance(path, str | Path) and str(path).strip() and "://" not in str(path)
        if named and not Path(path).expanduser().exists():
            raise DataError(f"image {i}: there is no file {str(path)[:200]!r}.")


def _table(images: Sequence[Any]) -> Table:
    """Return images of a caller as a table."""
    _check_paths(images)
    held = [
        Picture(v.numpy() if hasattr(v, "numpy") else v, f"image {i}")
        if hasattr(v, "dtype") or hasattr(v, "getbands")
        else v
        for i, v in enumerate(images, start=1)
    ]
    return Table("inputs", {"image": held}, origin="the inputs", unit="index")
