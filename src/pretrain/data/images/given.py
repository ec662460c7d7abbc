"""Images that a caller gives to a model: paths, folders, arrays, bytes, images of Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.images.rows import (
    IMAGES,
    Medium,
    from_list,
    is_address,
    is_image_source,
    read_images,
)
from pretrain.data.tables import Table
from pretrain.errors import DataError

__all__ = ["given_images", "given_table", "is_one"]

_CHANNELS = 4  # of one input, at most
# Keys of an undecoded entry of the datasets library, and of how it is read.
_ENTRY = {"bytes", "path", "mode"}


def given_images(
    inputs: Any, channels: int, medium: Medium = IMAGES, read: Callable[..., Table] = read_images
) -> tuple[Table, bool] | None:
    """Return images as a table with the column ``image``, and whether they are one; None for rows and tables.

    Args:
        inputs: one image (a path, bytes, an open file, an array or nested lists (H, W) or (H, W, C), an image of
            Pillow, a mapping with ``bytes`` and ``path``) or recording (a path, bytes, an open file, an array
            (samples,) or (samples, channels), a mapping with ``array`` and ``sampling_rate`` or with ``bytes`` and
            ``path``), several in a list or an array, or the path of a folder or an archive.
        channels: channels of the model, by which an array (3, H, W) is told from three images.
        medium: what the files hold.
        read: reads a folder or file; called with its path and the name of the rows.

    Raises:
        DataError: a path that does not exist, or an address.
    """
    if hasattr(inputs, "read") and not hasattr(inputs, "encoding"):
        inputs = inputs.read()  # an open file of bytes
    if getattr(getattr(inputs, "dtype", None), "kind", "b") in "OUST" and inputs.ndim == 1:
        inputs = list(inputs)  # a column of pandas
        if inputs and not isinstance(inputs[0], Mapping):
            return None
    if isinstance(inputs, list) and is_one(inputs, medium):
        return given_table([from_list(inputs)], medium), True
    array = getattr(inputs, "ndim", 0) if hasattr(inputs, "dtype") else 0
    least = medium.dimensions[0]  # of an array of one item
    if isinstance(inputs, str | Path) and is_address(str(inputs)):
        return given_table([str(inputs)], medium), True  # refused as one in a list
    if isinstance(inputs, str | Path):
        return _of_path(Path(inputs), medium, read)
    colours = array == 3 and (inputs.shape[0] == channels == 3 or inputs.shape[-1] in (1, 3, 4))
    of_medium = isinstance(inputs, Mapping) and _is_cell(inputs, medium)
    # The last dimension of audio is that of a few channels, or of samples.
    joint = array == least + 1 and inputs.shape[-1] <= _CHANNELS < inputs.shape[0]
    one = array == least or (colours if medium is IMAGES else joint) or of_medium
    if one or hasattr(inputs, "getbands") or isinstance(inputs, bytes | bytearray | memoryview):
        return given_table([inputs], medium), True
    if array in (least + 1, least + 2):
        return given_table(list(inputs), medium), False
    listed = isinstance(inputs, list | tuple) and inputs
    if listed and (not isinstance(inputs[0], Mapping) or _is_cell(inputs[0], medium)):
        return given_table(list(inputs), medium), False
    return None


def _is_cell(value: Mapping[str, Any], medium: Medium) -> bool:
    """Whether a mapping is one input, such as an undecoded entry of the ``datasets`` library, and no row of columns."""
    entry = "bytes" in value and value.keys() <= _ENTRY
    return medium.holds(value) or (entry and isinstance(value["bytes"], bytes | None))


def is_one(value: Any, medium: Medium) -> bool:
    """Whether an array or nested lists are one input by their shape: (H, W) or (n,), with at most 4 channels."""
    if isinstance(value, list) and value and isinstance(value[0], list | int | float):
        try:
            value = from_list(value)
        except (ValueError, OverflowError):
            return False
    tensor = hasattr(value, "detach")
    numbers = tensor or getattr(getattr(value, "dtype", None), "kind", "O") != "O"
    if not numbers or not medium.holds(value):
        return False
    return bool(value.ndim == medium.dimensions[0] or value.shape[-1] <= _CHANNELS)


def given_table(given: Sequence[Any], medium: Medium = IMAGES) -> Table:
    """Return images of a caller, or what another medium holds, as a table of one column.

    Raises:
        DataError: a path that does not exist.
    """
    _check_paths(given, medium)
    held = [
        medium.make(v, f"{medium.column} {i}") if hasattr(v, "dtype") or medium.holds(v) else v
        for i, v in enumerate(given, start=1)
    ]
    return Table("inputs", {medium.column: held}, origin="the inputs", unit="index")


def _of_path(path: Path, medium: Medium, read: Callable[..., Table]) -> tuple[Table, bool] | None:
    """Return the rows of a folder or file; None for a table with one row for each."""
    if is_image_source(path, medium):
        table = read(path, name="data")
        several = path.is_dir() or path.suffix.lower() in (".npz", ".tar")
        return table, not several and len(table) == 1
    if not path.suffix:  # neither an image nor a table
        _check_paths([path], medium)
    return None


def _check_paths(given: Sequence[Any], medium: Medium) -> None:
    """Refuse paths of a caller that do not exist, because one wrong folder makes all of them wrong."""
    for i, path in enumerate(given, start=1):
        named = isinstance(path, str | Path) and str(path).strip() and not is_address(str(path))
        if named and not os.path.exists(os.path.expanduser(path)):
            raise DataError(f"{medium.column} {i}: there is no file {str(path)[:200]!r}.")
