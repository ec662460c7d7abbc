"""Rows of images: folders by class, arrays in ``.npz`` and IDX files, and columns of paths, bytes or arrays.

A source is read into a ``Table`` like one of text: the column ``image`` holds ``Picture`` objects, the column ``label``
the classes. Nothing is decoded here.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.images.decode import SUFFIXES, BrokenImage, Picture, Stored, in_threads
from pretrain.data.tables import HELD_OUT, Chunk, Table, read_table, shown
from pretrain.errors import DataError
from pretrain.printing import console
from pretrain.utils.files import is_muted, note

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = [
    "decoded",
    "image_files",
    "is_image_source",
    "part_for",
    "parts_of",
    "pictures",
    "pixel_vectors",
    "read_images",
    "stream_images",
]

_TRAIN = ("train", "training")
_PARTS = dict.fromkeys(_TRAIN, "train") | {
    name: use for use, names in HELD_OUT.items() for name in names
}
# Which part of a source with several is read for which use; the first that it has.
_FOR = {
    "train": ("train",),
    "validation": ("valid",),
    "test": ("test",),
    "data": ("test", "valid", "train"),
}
_IMAGES, _LABELS = ("images", "image", "x", "data", "arr_0"), ("labels", "label", "y", "targets")
_MASKS = ("masks", "mask", "segmentation", "segmentations")
_CLASSES = ("class_names", "classes", "label_names", "names")
_SMALL = 32  # side of images for classical methods
_KEPT = 1 << 30  # bytes of decoded images that are kept; the others are decoded at every use
_MANY = 3000  # images from which progress is shown
_MOST_BYTES = 8 << 30  # of all arrays of a file together, which are held in memory
_IDX = re.compile(r"(.*)images(.idx3)(.ubyte)(\.gz)?$")


class ImageTable(Table):
    """A table whose rows are called by their image, such as the path of a file."""

    def where(self, i: int) -> str:
        """Return the name of the image of row `i`."""
        images = self.columns.get("image")
        return str(images[i]) if images is not None else super().where(i)


def is_image_source(path: Path) -> bool:
    """Whether a path is a folder, a file of arrays or an image, and no table with one row for each image."""
    suffix = path.suffix.lower()
    return path.is_dir() or suffix == ".npz" or suffix in SUFFIXES or bool(_IDX.match(path.name))


def read_images(source: Any, *, name: str = "data", **options: Any) -> Table:
    """Read rows of images.

    Args:
        source: a folder with one folder of images for each class, or with such a folder for each part (``train``,
            ``val``, ``test``); a ``.npz`` file of ``images`` and ``labels`` (for parts ``train_images``, ...) and,
            if there are any, ``class_names``; an IDX file with its labels beside it; one image; or whatever
            ``read_table`` reads, with a column of paths (relative to the file), bytes, arrays or images of Pillow.
        name: what the rows are for, ``train``, ``validation``, ``test`` or ``data``, by which a part is chosen.
        **options: see ``read_table``.

    Raises:
        DataError: there are no images, or the source cannot be read.
    """
    if isinstance(source, str | Path) and is_image_source(Path(os.path.expanduser(source))):
        if extra := [key for key, value in options.items() if value is not None]:
            raise DataError(
                f"{extra[0]} is for files of rows, but {source} holds images. Leave it out."
            )
        path = Path(os.path.expanduser(source))
        if not path.exists():
            raise DataError(f"{source} does not exist.")
        table = _table(path, part_for(path, name))
        if not len(table):
            raise DataError(f"{source} holds no images ({', '.join(sorted(SUFFIXES)[:6])}, ...).")
        return table
    return read_table(_wrapped(source), name=name, **options)


def part_for(path: Path, name: str) -> Any:
    """Return which part of a source is read for the rows ``name``: a folder, or what ``_table`` reads of a file.

    Raises:
        DataError: there is none for these rows.
    """
    found = _parts(path)
    part = next((part for part in _FOR.get(name, ("train",)) if part in found), None)
    if part is None and "" not in found:
        raise DataError(
            f"{path} has the parts {', '.join(found)}, and none for the {name} rows. Name another source."
        )
    if len(found) > 1 and name == "data":
        note(f"{path}: the part {part!r} is used of {', '.join(found)}")
    if part and path.is_dir() and name in ("train", "data"):
        used = {folder.name for folder in found.values()}
        if others := [n for n in _folders(path, sorted(os.listdir(path))) if n not in used]:
            note(f"{path}: not read, because they are no parts: {shown(others, 4)}")
    return found[part or ""]


def parts_of(source: Any) -> list[str]:
    """Return the parts of a source of images: of ``train``, ``valid`` and ``test``; empty for one without parts."""
    if not isinstance(source, str | Path):
        return []
    path = Path(os.path.expanduser(source))
    if not is_image_source(path) or not path.exists():
        return []
    return [part for part in _parts(path) if part]


def stream_images(path: Path, size: int) -> Iterator[Chunk]:
    """Yield the images of a folder or file in chunks of ``size`` rows; their names stand in the column ``image``."""
    from pretrain.data.images.masks import read_masked  # it reads its rows by this module

    table = read_masked(path)
    for start in range(0, len(table), size):
        part = table.take(range(start, min(start + size, len(table))))
        yield Chunk(
            [
                {k: str(v) if isinstance(v, Picture) else v for k, v in row.items()}
                for row in part.rows()
            ],
            part,
        )


def pictures(table: Table, role: str = "image") -> list[Picture | None]:
    """Return the images of a column; None where a cell is empty.

    Args:
        table: a text in the column is a path, relative to the file that the table was read from.
        role: the column.

    Raises:
        DataError: a cell is no image; names the row.
    """
    folder = Path(table.origin).parent if table.origin and Path(table.origin).is_file() else None
    return [_picture(value, table, i, folder) for i, value in enumerate(table.columns[role])]


def decoded(table: Table, *, required: bool) -> Iterator[tuple[int, Stored | None, str | None]]:
    """Decode every image of a table once, so that a broken one is found before it is needed.

    Args:
        table: has a column ``image``.
        required: a file that does not exist is an error, not a row that is left out.

    Returns:
        For each row its index, the image, and a remark on it; or None and the reason why there is none. The first
        images, up to a gigabyte, are kept in their decoded form.

    Raises:
        DataError: a file does not exist, which a wrong folder causes for many; names the first.
    """
    room = _KEPT
    for i, picture, found in _read_all(table):
        if picture is None:
            yield i, None, "no image"
        elif isinstance(found, BrokenImage):
            if required and isinstance(found.__cause__, FileNotFoundError):
                raise DataError(
                    f"{table.where(i)}: there is no file {picture.source}. Paths are relative to the file that names "
                    "them; correct them, or leave the row out."
                ) from found
            yield i, None, f"broken image ({found.cause})"
        else:
            image, remark = found
            room -= image.width * image.height * len(image.getbands())
            yield i, Stored(picture, image, keep=room >= 0), remark


def _read_all(
    table: Table, then: Callable[[Image], Any] = lambda image: image
) -> Iterator[tuple[int, Picture | None, Any]]:
    """Decode the images of a table, files in several threads and many under a bar of progress.

    Args:
        table: has a column ``image``.
        then: what is kept of a decoded image.

    Returns:
        For each row its index; its picture, or None; and what is kept with the remark, or the ``BrokenImage``.
    """
    from tqdm import tqdm

    def read(picture: Picture | None) -> Any:
        if picture is None:
            return None
        try:
            image, remark = picture.read()
        except BrokenImage as error:
            return error
        return then(image), remark

    held = pictures(table)
    files = any(p is not None and isinstance(p.source, bytes | str | Path) for p in held)
    found = (in_threads if files else map)(read, held)
    quiet = len(held) < _MANY or is_muted()
    with tqdm(total=len(held), unit="image", disable=quiet, leave=False, file=console()) as bar:
        for i, (picture, result) in enumerate(zip(held, found, strict=True)):
            bar.update()
            yield i, picture, result


def pixel_vectors(*tables: Table) -> list[tuple[list[NDArray[np.float32]], list[int]]]:
    """Return, for each table, the pixels of its images between 0 and 1, and the rows that have a readable image.

    The vectors of all tables have one length: images are scaled to the size that all have, at most 32 x 32, and are in
    grey if all of them are.
    """
    square = (_SMALL, _SMALL)

    def scaled(image: Image) -> dict[tuple[int, int], Image]:
        """Scale to both sizes that may be asked for, so that the full image need not be kept."""
        own = (min(image.width, _SMALL), min(image.height, _SMALL))
        return {size: image.resize(size, 2) for size in dict.fromkeys((own, square))}

    found = [
        [(i, result[0]) for i, _, result in _read_all(table, scaled) if isinstance(result, tuple)]
        for table in tables
    ]
    images = [small for rows in found for _, small in rows]
    sizes = {next(iter(small)) for small in images}  # their own, which stands first
    side = sizes.pop() if len(sizes) == 1 else square
    mode = "L" if all(small[square].mode == "L" for small in images) else "RGB"

    def vector(small: Mapping[tuple[int, int], Image]) -> NDArray[np.float32]:
        pixels = np.asarray(small[side].convert(mode), np.float32)
        return pixels.reshape(-1) / np.float32(255)

    return [([vector(small) for _, small in rows], [i for i, _ in rows]) for rows in found]


def _picture(value: Any, table: Table, i: int, folder: Path | None) -> Picture | None:
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):  # an image of the datasets library
        content, path = value.get("bytes"), value.get("path")
        name = f"{path} ({table.where(i)})" if path else table.where(i)
        value = Picture(content, name) if content else path
        if isinstance(value, Picture):
            return value
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str | Path):
        if re.match(r"[a-z]+://", str(value)):
            raise DataError(
                f"{table.where(i)}: {str(value)[:80]!r} is an address, and nothing is downloaded here. Store the "
                "images beside the file, and name their paths."
            )
        path = Path(os.path.expanduser(value))
        return Picture(path if folder is None or path.is_absolute() else folder / path, str(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return Picture(bytes(value), f"the image in {table.where(i)}")
    if isinstance(value, list) or str(getattr(value, "dtype", "")) == "object":
        with contextlib.suppress(ValueError, OverflowError):
            value = _from_list(list(value))
    if hasattr(value, "getbands") or getattr(value, "ndim", 0) in (2, 3):
        return Picture(value, f"the image in {table.where(i)}")
    raise DataError(
        f"{table.where(i)}: {type(value).__name__} {str(value)[:40]!r} is no image. Give a path, the bytes of a file, "
        "an array (height, width, channels) or an image of Pillow."
    )


def _from_list(value: list[Any]) -> NDArray[Any]:
    """Return nested lists as an array; whole numbers from 0 to 255 become bytes, other numbers keep their type.

    Raises:
        ValueError: they hold something else than numbers, or rows of different lengths.
    """
    array = np.asarray(value)
    if array.dtype == object:  # arrays of arrays, which frames hold
        array = np.asarray([v.tolist() if hasattr(v, "tolist") else v for v in value])
    if array.dtype.kind not in "biuf":
        raise ValueError
    whole = array.dtype.kind in "iu" and array.size > 0
    return array.astype(np.uint8) if whole and array.min() >= 0 and array.max() <= 255 else array


def _wrapped(source: Any) -> Any:
    """Replace the arrays and images of a source in memory by ``Picture``, which tables do not take apart."""
    if isinstance(source, Mapping):
        return {
            key: [_held(v, f"image {i}") for i, v in enumerate(column, start=1)]
            if getattr(column, "ndim", 0) >= 3 or isinstance(column, list | tuple)
            else column
            for key, column in source.items()
        }
    if isinstance(source, list | tuple) and source and isinstance(source[0], Mapping):
        return [
            {k: _held(v, f"row {i} ({k})") for k, v in row.items()}
            if isinstance(row, Mapping)
            else row
            for i, row in enumerate(source, start=1)
        ]
    if isinstance(source, list | tuple) and source and isinstance(source[0], list | tuple):
        return [tuple(_held(v, f"row {i}") for v in row) for i, row in enumerate(source, start=1)]
    return source


def _held(value: Any, name: str) -> Any:
    image = hasattr(value, "getbands") or (
        getattr(value, "ndim", 0) in (2, 3) and hasattr(value, "dtype")
    )
    if not image:
        return value
    return Picture(value.numpy() if hasattr(value, "numpy") else value, name)


# ------------------------------------------------------------------------------------------------- files


def _parts(path: Path) -> dict[str, Any]:
    """Return part -> what ``_table`` reads of it; the part "" is a source without parts."""
    if path.is_dir():
        try:
            inside = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        folders = _folders(path, inside)
        if {"dataset_info.json", "dataset_dict.json"} & set(inside):
            raise DataError(
                f"{path} was saved by the datasets library: give datasets.load_from_disk(...) of it."
            )
        found: dict[str, Path] = {}
        named = [name for name in folders if name.lower() in _PARTS]
        uses = {_PARTS[name.lower()] for name in named}
        if not named or not (len(named) == len(folders) or ("train" in uses and len(uses) > 1)):
            return {"": path}
        for name in named:
            other = found.setdefault(_PARTS[name.lower()], path / name)
            if other.name != name:
                raise DataError(
                    f"{path} has two folders for one part, {other.name} and {name}. Keep one, or name the folder that "
                    "is meant."
                )
        return found
    if path.suffix.lower() == ".npz":
        return _npz_parts(path)
    if _IDX.match(path.name):
        return {"": "idx"}
    return {"": "file"}


def _folders(path: Path, names: Iterable[str]) -> list[str]:
    """Return the folders among the names in a folder, without hidden ones and those that archives of macOS add."""
    return [n for n in names if not _hidden(n) and (path / n).is_dir()]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _table(path: Path, part: Any) -> Table:
    if isinstance(part, Path):
        return _folder(part)
    if part == "idx":
        return _idx(path)
    if part == "file":
        return ImageTable(path.name, {"image": [Picture(path, str(path))]}, origin=str(path))
    return _npz(path, part)


def image_files(path: Path) -> list[Path]:
    """Return the images below a folder, in order; the other files are counted and named in a line."""
    found, others, irregular = list[Path](), list[str](), list[str]()
    visited = set[tuple[int, int]]()  # a link may lead back to a folder above it
    for root, folders, files in os.walk(path, followlinks=True):
        at = os.stat(root)
        if (at.st_dev, at.st_ino) in visited:
            folders.clear()
            continue
        visited.add((at.st_dev, at.st_ino))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(files, key=_natural):
            if _hidden(name):
                continue
            if Path(name).suffix.lower() not in SUFFIXES:
                others.append(name)
            elif Path(root, name).is_file():
                found.append(Path(root, name))
            else:  # a pipe, which would block, or a link to nothing
                irregular.append(name)
    for names, what in (
        (others, "files are no images by their names"),
        (irregular, "entries are no regular files"),
    ):
        if names:
            note(f"{path}: {len(names):,} {what} and are left out: {shown(names, 4)}")
    return found


def _folder(path: Path) -> Table:
    """Return the images below a folder; the first folder of a path is the class, if all images lie in one."""
    found = image_files(path)
    columns: dict[str, list[Any]] = {"image": [Picture(file, str(file)) for file in found]}
    inside = [file.relative_to(path).parts for file in found]
    if inside and all(len(parts) > 1 for parts in inside):
        columns["label"] = [parts[0] for parts in inside]
        empty = set(_folders(path, os.listdir(path)))
        if empty := empty - set(columns["label"]):
            note(f"{path}: no images in {shown(sorted(empty), 4)}, so there is no such class")
    elif any(len(parts) > 1 for parts in inside):
        loose = sum(len(parts) == 1 for parts in inside)
        note(
            f"{path}: {loose:,} images lie outside of folders, so the folders are not taken for classes; move each "
            "into the folder of its class to have labels"
        )
    return ImageTable(path.name or str(path), columns, origin=str(path))


def _natural(name: str) -> list[Any]:
    """Sort key by which img2 comes before img10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def _npz_parts(path: Path) -> dict[str, dict[str, str]]:
    """Return part -> role -> name of the array, by the names of the arrays in the file."""
    names = _npz_names(path)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.lower().split("_")
        part = next((_PARTS[w] for w in words if w in _PARTS), "")
        rest = "_".join(w for w in words if w not in _PARTS)
        for role, known in (("image", _IMAGES), ("label", _LABELS), ("mask", _MASKS)):
            if rest in known:
                found.setdefault(part, {}).setdefault(role, name)
    found = {part: roles for part, roles in found.items() if "image" in roles}
    if not found:
        raise DataError(
            f"{path} has the arrays {shown(names, 8)}, and none called images. Expected: images (rows, height, width) "
            "or (rows, height, width, channels), labels (rows,) and, if there are any, class_names; for several parts "
            "train_images, train_labels, val_images, ..."
        )
    return found


def _npz_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no .npz file: {error}. numpy.savez writes one.") from error
    if (size := sum(entry.file_size for entry in entries)) > _MOST_BYTES:
        raise DataError(
            f"{path} holds {size:,} bytes of arrays; at most {_MOST_BYTES:,} are read. Write the images as files in "
            "folders, which are read when they are needed."
        )
    return [e.filename.removesuffix(".npy") for e in entries if e.filename.endswith(".npy")]


def _npz_array(file: Any, name: str) -> NDArray[Any]:
    """Return an array of an opened ``.npz`` file.

    Raises:
        ValueError: it announces more values than it has bytes, for which memory would be taken.
    """
    entry = file.zip.getinfo(f"{name}.npy")
    with file.zip.open(entry) as member:
        version = np.lib.format.read_magic(member)
        if version > (2, 0):
            raise ValueError(f"{name} holds values of several fields")
        first = version == (1, 0)
        header = (
            np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        )
        shape, _, kind = header(member)
    if math.prod(shape) * kind.itemsize > entry.file_size:
        raise ValueError(f"{name} announces the shape {shape}, and has {entry.file_size:,} bytes")
    array: NDArray[Any] = file[name]
    return array


def _npz(path: Path, roles: Mapping[str, str]) -> Table:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: _npz_array(file, name)
                for name in _npz_names(path)
                if name in roles.values()
                or not ("image" in name or set(name.lower().split("_")) & set(_PARTS))
            }
    except DataError:
        raise
    # Damaged files raise errors of zipfile, zlib, struct and numpy; large ones a MemoryError.
    except Exception as error:
        raise DataError(f"{path} cannot be read: {str(error) or type(error).__name__}.") from error
    images, labels, masks = (
        arrays.pop(roles[r]) if r in roles else None for r in ("image", "label", "mask")
    )
    assert images is not None
    names = next((arrays[n] for n in arrays if n.lower() in _CLASSES), None)
    table = _arrays(path, images, labels, names, arrays)
    if masks is None:
        return table
    if len(masks) != len(images):
        raise DataError(f"{path} holds {len(images):,} images and {len(masks):,} masks.")
    held = [Picture(mask, f"mask {i} of {path.name}") for i, mask in enumerate(masks)]
    known = {} if names is None else {"mask": [str(n) for n in names.tolist()]}
    return table.with_columns({**table.columns, "mask": held}, {**table.label_names, **known})


def _arrays(
    path: Path, images: Any, labels: Any, names: Any = None, extra: Mapping[str, Any] | None = None
) -> Table:
    """Return the images of an array (N, H, W) or (N, H, W, C), with their labels and other columns of N values."""
    if images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"{path}: the images have the shape {images.shape}; expected (rows, height, width) or (rows, height, "
            "width, channels)."
        )
    if images.dtype == np.uint8 and int(images.max()) == 1:
        note(f"{path}: all values are 0 and 1, which are read as black and white")
        images = images * np.uint8(255)
    called = f"image {{}} of {path.name}"
    columns: dict[str, list[Any]] = {
        "image": [Picture(image, called.format(i)) for i, image in enumerate(images)]
    }
    if labels is not None:
        if labels.ndim and len(labels) != len(images):
            raise DataError(f"{path} holds {len(images):,} images and {len(labels):,} labels.")
        columns["label"] = _labels(path, labels)
    for name, values in (extra or {}).items():
        if values.ndim == 1 and len(values) == len(images) and name.lower() not in _CLASSES:
            columns[name] = values.tolist()
    if names is not None and names.ndim != 1:
        raise DataError(
            f"{path}: the names of the classes have the shape {names.shape}; expected one for each."
        )
    known = {} if names is None or labels is None else {"label": [str(n) for n in names.tolist()]}
    return ImageTable(path.name, columns, known, origin=str(path))


def _labels(path: Path, labels: Any) -> list[Any]:
    """Return class numbers or names; of an array (N, C) of 0 and 1 the numbers of the classes that are 1."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and np.isin(labels, (0, 1)).all():
        return [np.flatnonzero(row).tolist() for row in labels]
    if labels.ndim != 1:
        raise DataError(
            f"{path}: the labels have the shape {labels.shape}; expected one for each image, or 0 and 1 for each class."
        )
    found: list[Any] = labels.tolist()
    return found


def _idx(path: Path) -> Table:
    """Return the images of an IDX file (of MNIST) with the labels in the file beside it, if there is one."""
    name = _IDX.match(path.name)
    assert name is not None
    beside = path.with_name(f"{name[1]}labels{name[2].replace('3', '1')}{name[3]}{name[4] or ''}")
    return _arrays(path, _idx_array(path, 3), _idx_array(beside, 1) if beside.is_file() else None)


def _idx_array(path: Path, dimensions: int) -> Any:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != bytes([0, 0, 8, dimensions]) or len(head) < 4 + 4 * dimensions:
                raise DataError(f"{path} is no IDX file of bytes with {dimensions} dimensions.")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            if (size := int(np.prod(shape, dtype=object))) > _MOST_BYTES:
                raise DataError(f"{path} claims {size:,} bytes; at most {_MOST_BYTES:,} are read.")
            content = file.read(size + 1)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if len(content) != size:
        raise DataError(f"{path} is cut off: {shape} values were announced.")
    return np.frombuffer(content, np.uint8).reshape(shape)
