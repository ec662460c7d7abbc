"""Rows of images: folders by class, archives, arrays in ``.npz`` and IDX files, and columns of paths, bytes or arrays.

A source is read into a ``Table`` like one of text: the column ``image`` holds ``Picture`` objects, the column ``label``
the classes. Nothing is decoded here. A ``Medium`` says what other files, such as recordings, have instead of images.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import math
import os
import re
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.images.decode import (
    SUFFIXES,
    BrokenFile,
    FileItem,
    Picture,
    Slice,
    Stored,
    in_numpy,
    in_threads,
)
from pretrain.data.images.stored import Pixels, PreparedImages
from pretrain.data.paths import hidden, tar_files, walk
from pretrain.data.readers import table_kind
from pretrain.data.shard_folders import HELD_OUT, parts_of_shards, shards_of
from pretrain.data.tables import Table, read_table, shown
from pretrain.errors import CheckpointCorrupt, DataError
from pretrain.printing import console
from pretrain.utils.files import is_muted, note
from pretrain.utils.strict_json import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from pretrain.data.labelled import Role

__all__ = [
    "IMAGES",
    "USUAL_FOLDERS",
    "Medium",
    "check_exists",
    "decoded",
    "files_below",
    "from_list",
    "image_files",
    "in_usual_folder",
    "is_address",
    "is_image_source",
    "note_names",
    "note_rows",
    "part_for",
    "parts_of",
    "pictures",
    "pixel_vectors",
    "read_all",
    "read_images",
]

_TRAIN = ("train", "training")
_PARTS = dict.fromkeys(_TRAIN, "train") | {
    name: use for use, names in HELD_OUT.items() for name in names
}
# Use of rows -> the names of parts that are read for it; the first one that a source has is taken.
_FOR = {
    "train": ("train",),
    "validation": ("valid",),
    "test": ("test",),
    "data": ("test", "valid", "train"),
}
# Where the images of a table or of annotations usually lie, from its folder.
USUAL_FOLDERS = ("", "images", "JPEGImages", "../images", "../JPEGImages")
_LABELS = ("labels", "label", "y", "targets")
_MASKS = ("masks", "mask", "segmentation", "segmentations")
_CLASSES = ("class_names", "classes", "label_names", "names")
# Tables that name the images of a folder in a column, as the datasets library reads them.
_METADATA, _FILE_NAME = ("metadata.csv", "metadata.jsonl", "metadata.parquet"), "file_name"
_MOST_CAPTION = 1 << 16  # characters of the text beside an image
_SMALL = 32  # side of images for classical methods
_KEPT = 1 << 30  # bytes of decoded images that are kept; the others are decoded at every use
_MOST_TEXT = 1 << 20  # bytes of a member of an archive that is no image
_MANY = 3000  # images from which progress is shown
_MOST_BYTES = 8 << 30  # of all arrays of a file together, which are held in memory
_IDX = re.compile(r"(.*)images(.idx3)(.ubyte)(\.gz)?$")


class ImageTable(Table):
    """A table whose rows are named in messages by the path of their image or other file."""

    def where(self, i: int) -> str:
        """Return the name of the file of row `i`."""
        columns = (c for c in self.columns.values() if len(c) and isinstance(c[0], FileItem))
        items = next(columns, None)
        return super().where(i) if items is None else str(items[i])


@dataclass(frozen=True)
class Medium:
    """What the rows of a source hold beside their labels, such as images: how it is recognised, read and called.

    Attributes:
        column: column of a table, ``image``.
        many: plural for messages, ``images``.
        item: class of the values of the column.
        stored: class of the values of training rows, made of an item, its decoded form and ``keep``.
        suffixes: endings of file names.
        arrays: names of the array in a ``.npz`` file; the first is the usual one.
        dimensions: numbers of dimensions that an array of one row may have.
        shapes: shape of an array of all rows, for messages.
        cell: what a cell may be, for messages.
        beside: roles of further columns, which say how the items are read.
    """

    column: str
    many: str
    item: type[FileItem]
    stored: Callable[..., Any]
    suffixes: frozenset[str]
    arrays: tuple[str, ...]
    dimensions: tuple[int, ...]
    shapes: str
    cell: str
    beside: tuple[Role, ...] = ()

    @property
    def endings(self) -> str:
        """Some of the endings of file names, for messages."""
        suffixes = sorted(self.suffixes)
        return ", ".join(suffixes[:6]) + ", ..." * (len(suffixes) > 6)

    def holds(self, value: Any) -> bool:
        """Whether a value in memory is one item."""
        return isinstance(value, FileItem) or (
            getattr(value, "ndim", 0) in self.dimensions and hasattr(value, "dtype")
        )

    def make(self, value: Any, name: str) -> FileItem:
        """Return a value in memory, a path or the bytes of a file as an item."""
        return self.item(in_numpy(value), name)

    def from_mapping(self, value: Mapping[str, Any], name: str) -> FileItem | str | None:
        """Return an entry of the ``datasets`` library as an item, or the path that it names."""
        content, path = value.get("bytes"), value.get("path")
        return self.item(content, f"{path} ({name})" if path else name) if content else path

    def completed(self, item: FileItem, cell: Any, row: Mapping[str, Any]) -> FileItem:
        """Return an item with the reading options that its cell and the columns ``beside`` it give."""
        return item

    def column_of(
        self, path: Path, arrays: Mapping[str, Any], roles: Mapping[str, str]
    ) -> list[Any]:
        """Return the items of the arrays of a ``.npz`` file."""
        return _array_items(self, path, arrays[roles[self.column]])


class _Images(Medium):
    def holds(self, value: Any) -> bool:
        return hasattr(value, "getbands") or super().holds(value)

    def completed(self, item: FileItem, cell: Any, row: Mapping[str, Any]) -> FileItem:
        mode = cell.get("mode") if isinstance(cell, Mapping) else None
        return item if mode is None else Picture(item.source, item.name, str(mode))


IMAGES = _Images(
    "image", "images", Picture, Stored, SUFFIXES, ("images", "image", "x", "data", "arr_0"), (2, 3),
    "(rows, height, width) or (rows, height, width, channels)",
    "a path, the bytes of a file, an array (height, width, channels) or an image of Pillow",
)  # fmt: skip


def is_image_source(path: Path, medium: Medium = IMAGES) -> bool:
    """Whether a path is a folder, a file of arrays or an image, and no table with one row for each image."""
    suffix = path.suffix.lower()
    own = medium is IMAGES and (suffix == ".tar" or bool(_IDX.match(path.name)))
    return os.path.isdir(path) or suffix == ".npz" or suffix in medium.suffixes or own


def read_images(
    source: Any, *, name: str = "data", medium: Medium = IMAGES, **options: Any
) -> Table:
    """Read rows of images, or of another medium.

    Args:
        source: a folder with one folder of images for each class, or with such a folder for each part (``train``,
            ``val``, ``test``), where a ``.txt`` of the name of an image is its caption; a folder with
            ``metadata.csv``, ``.jsonl`` or ``.parquet``; a ``.json`` file of COCO's captions; a ``.tar`` of samples, or
            several (``train-*.tar``); a ``.npz`` file of ``images`` and ``labels`` (for parts ``train_images``, ...)
            and, if there are any, ``class_names``; an IDX file with its labels beside it; one image; or whatever
            ``read_table`` reads, with a column of paths (relative to the file), bytes, arrays or images of Pillow.
        name: what the rows are for, ``train``, ``validation``, ``test`` or ``data``, by which a part is chosen.
        medium: what the files hold.
        **options: see ``read_table``.

    Raises:
        DataError: there are no images, or the source cannot be read.
    """
    if _holds_shards(source, medium):
        return read_table(source, name=name, **options)
    if isinstance(source, str | Path) and is_image_source(Path(os.path.expanduser(source)), medium):
        if extra := [key for key, value in options.items() if value is not None]:
            raise DataError(
                f"{extra[0]} is for files of rows, but {source} holds {medium.many}. Leave it out."
            )
        path = Path(os.path.expanduser(source))
        if not os.path.exists(path) and path.suffix.lower() != ".tar":
            raise DataError(f"{source} does not exist.")
        table = _table(path, part_for(path, name, medium), medium)
        if not len(table):
            raise DataError(f"{source} holds no {medium.many} ({medium.endings}).")
        return table
    try:
        table = read_table(_wrapped(source, medium), name=name, **options)
    except DataError as error:
        named = isinstance(source, str | Path) and os.path.isfile(os.path.expanduser(source))
        if not named or options.get("format") or table_kind(Path(source)):
            raise
        raise DataError(
            f"{error} Of {medium.many} the endings {medium.endings} are read: convert others to one of them."
        ) from error
    named = medium.column in table.columns and table.origin.lower().endswith(".json")
    return in_usual_folder(table, medium.column) if named else table


def part_for(path: Path, name: str, medium: Medium = IMAGES) -> Any:
    """Return which part of a source is read for the rows ``name``: a folder, or what ``_table`` reads of a file.

    Raises:
        DataError: there is none for these rows.
    """
    found = _parts(path, medium)
    part = next((part for part in _FOR.get(name, ("train",)) if part in found), None)
    if part is None and "" not in found:
        raise DataError(
            f"{path} has the parts {', '.join(found)}, and none for the {name} rows. Name another source."
        )
    if len(found) > 1 and name == "data":
        note(f"{path}: the part {part!r} is used of {', '.join(found)}")
    if part and isinstance(found[part], Path) and name in ("train", "data"):
        used = {folder.name for folder in found.values()}
        if others := [n for n in _folders(path, sorted(os.listdir(path))) if n not in used]:
            note(f"{path}: not read, because they are no parts: {shown(others, 4)}")
    return found[part or ""]


def parts_of(source: Any, medium: Medium = IMAGES) -> list[str]:
    """Return the parts of a source of images: of ``train``, ``valid`` and ``test``; empty for one without parts."""
    if not isinstance(source, str | Path):
        return []
    path = Path(os.path.expanduser(source))
    if not is_image_source(path, medium) or not os.path.exists(path):
        return []
    own = [part for part in _parts(path, medium) if part]
    return own or (parts_of_shards(path) if _holds_shards(path, medium) else [])


def _holds_shards(source: Any, medium: Medium) -> bool:
    """Whether a folder is read as parquet files by split; those beside images or archives only describe them."""
    if not shards_of(source):
        return False
    images, others, _ = files_below(Path(os.path.expanduser(source)), medium)
    # Beside archives, img2dataset writes a table of each.
    return not images and not any(file.suffix.lower() == ".tar" for file in others)


def pictures(table: Table, role: str = "", medium: Medium = IMAGES) -> list[Any]:
    """Return the images of a column; None where a cell is empty.

    Args:
        table: a text in the column is a path, relative to the file that the table was read from.
        role: the column; that of the medium if empty.
        medium: what the cells are.

    Raises:
        DataError: a cell is no image; names the row.
    """
    folder = Path(table.origin).parent if table.origin and Path(table.origin).is_file() else None
    column = table.columns[role or medium.column]
    items = [_picture(value, table, i, folder, medium) for i, value in enumerate(column)]
    further = [role.name for role in medium.beside if role.name in table.columns]
    return [
        item
        and medium.completed(item, column[i], {name: table.columns[name][i] for name in further})
        for i, item in enumerate(items)
    ]


def decoded(
    table: Table, *, required: bool, medium: Medium = IMAGES
) -> Iterator[tuple[int, Any, str | None]]:
    """Decode every image of a table once, so that a broken one is found before it is needed.

    Args:
        table: has a column ``image``.
        required: a file that does not exist is an error, not a row that is left out.
        medium: what the files hold.

    Returns:
        For each row its index, the image (``medium.stored``), and a remark on it; or None and the reason why there is
        none. The first images, up to a gigabyte, are kept in their decoded form.

    Raises:
        DataError: a file does not exist, which a wrong folder causes for many; names the first.
    """
    room = _KEPT
    for i, picture, image, text in read_all(table, medium=medium, required=required, lazily=True):
        if image is None:
            yield i, None, text
            continue
        keep = room > 0 and not isinstance(image, Pixels)
        stored = medium.stored(picture, image, keep=keep)
        room -= stored.nbytes
        yield i, stored, text


def check_exists(table: Table, i: int, item: FileItem, error: BrokenFile) -> None:
    """Refuse a file that does not exist, which a wrong folder causes for many.

    Raises:
        DataError: this is why the item cannot be read; names the row.
    """
    if isinstance(error.__cause__, FileNotFoundError):
        raise DataError(
            f"{table.where(i)}: there is no file {item.source}. Paths are relative to the file that names them; "
            "correct them, or leave the row out."
        ) from error


def note_rows(table: Table, remarks: Mapping[str, list[int]], what: str) -> None:
    """Print one line for each remark (text -> the numbers of its rows); ``what`` names the rows."""
    for text, places in remarks.items():
        first = ", ".join(table.where(i) for i in places[:3]) + ", ..." * (len(places) > 3)
        note(f"{len(places):,} {what} {text}: {first}")


def note_names(place: Any, names: Sequence[str], what: str) -> None:
    """Print the number and the first names of the files that a remark ``what`` is about, if there are any."""
    if names:
        note(f"{place}: {len(names):,} {what}: {shown(names, 4)}")


def read_all(
    table: Table,
    then: Callable[[Any], Any] = lambda image: image,
    medium: Medium = IMAGES,
    *,
    required: bool = False,
    lazily: bool = False,
) -> Iterator[tuple[int, Any, Any, str | None]]:
    """Decode the images of a table, files in several threads and many under a bar of progress.

    Args:
        table: has a column ``image``.
        then: what is kept of a decoded image.
        medium: what the files hold.
        required: a file that does not exist is an error.
        lazily: what is decoded already is not read, and stands for itself (``Pixels``).

    Returns:
        For each row its index; its picture; what is kept of it, and a remark on it, or None and the reason why there is
        none, in words that hold for other rows too.

    Raises:
        DataError: a required file does not exist; names the row.
    """
    from tqdm import tqdm

    def read(picture: FileItem | None) -> Any:
        if picture is None:
            return None, f"no {medium.column}"
        if lazily and isinstance(picture.source, Pixels):
            return picture.source, None
        try:
            image, remark = picture.read()
        except BrokenFile as error:
            return error
        return then(image), remark

    held = pictures(table, medium=medium)
    files = any(item is not None and item.is_file for item in held)
    found = (in_threads if files else map)(read, held)
    quiet = len(held) < _MANY or is_muted()
    with tqdm(
        total=len(held), unit=medium.column, disable=quiet, leave=False, file=console()
    ) as bar:
        for i, (picture, result) in enumerate(zip(held, found, strict=True)):
            bar.update()
            if isinstance(result, BrokenFile):
                if required:
                    check_exists(table, i, picture, result)
                result = None, f"broken {medium.column} ({result.cause})"
            yield i, picture, *result


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
        [(i, small) for i, _, small, _ in read_all(table, scaled) if small is not None]
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


def _picture(
    value: Any, table: Table, i: int, folder: Path | None, medium: Medium
) -> FileItem | None:
    if isinstance(value, Mapping):
        value = medium.from_mapping(value, table.where(i))
    if isinstance(value, FileItem):
        return value
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str | Path):
        if is_address(str(value)):
            raise DataError(
                f"{table.where(i)}: {str(value)[:80]!r} is an address, and nothing is downloaded here. Store the "
                f"{medium.many} beside the file, and name their paths."
            )
        path = Path(os.path.expanduser(value))
        return medium.item(
            path if folder is None or path.is_absolute() else folder / path, str(value)
        )
    if isinstance(value, bytes | bytearray | memoryview):
        return medium.item(bytes(value), f"the {medium.column} in {table.where(i)}")
    if isinstance(value, list) or str(getattr(value, "dtype", "")) == "object":
        with contextlib.suppress(ValueError, OverflowError):
            value = from_list(list(value))
    if medium.holds(value):
        return medium.make(value, f"the {medium.column} in {table.where(i)}")
    raise DataError(
        f"{table.where(i)}: {type(value).__name__} {str(value)[:40]!r} is no {medium.column}. Give {medium.cell}."
    )


def is_address(text: str) -> bool:
    """Whether a text is the address of something in a network, and not a path."""
    return bool(re.match(r"[A-Za-z]\w+:/", text))


def from_list(value: list[Any]) -> NDArray[Any]:
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


def in_usual_folder(table: Table, column: str | None) -> Table:
    """Resolve paths that lie in a usual folder beside the file that names them."""
    origin = Path(table.origin) if table.origin else None
    if column is None or origin is None or not origin.is_file():
        return table
    cells = table.columns[column]
    first = next((v for v in cells if isinstance(v, str) and v.strip()), None)
    if first is None:
        return table
    # COCO's captions_val2017.json stands in a folder beside val2017.
    places = (*USUAL_FOLDERS, f"../{origin.stem.rpartition('_')[2]}")
    # Unlike Path.is_file, it raises no error for what is too long for a path, such as an image in base64.
    name = next((n for n in places if os.path.isfile(origin.parent / n / first)), "")
    if not name:
        return table
    # Relative to the file, as all paths of a table are.
    held = [str(Path(name, v)) if isinstance(v, str) and v.strip() else v for v in cells]
    return table.with_columns({**table.columns, column: held}, table.label_names)


def _wrapped(source: Any, medium: Medium) -> Any:
    """Replace the arrays and images of a source in memory by items, which tables do not take apart."""

    def _held(value: Any, name: str) -> Any:
        return medium.make(value, name) if medium.holds(value) else value

    least = medium.dimensions[0] + 1
    if isinstance(source, Mapping):
        return {
            key: [_held(v, f"{medium.column} {i}") for i, v in enumerate(column, start=1)]
            if getattr(column, "ndim", 0) >= least or isinstance(column, list | tuple)
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


# ------------------------------------------------------------------------------------------------- files


def _parts(path: Path, medium: Medium) -> dict[str, Any]:
    """Return part -> what ``_table`` reads of it; the part "" is a source without parts."""
    if path.is_dir():
        try:
            if medium is IMAGES and (kept := PreparedImages.find(path)) is not None:
                return {part: (kept, part) for part in kept.parts}
            inside = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        folders = _folders(path, inside)
        if {"dataset_info.json", "dataset_dict.json"} & set(inside):
            raise DataError(
                f"{path} was saved by the datasets library: give datasets.load_from_disk(...) of it."
            )
        found: dict[str, Path] = {}
        named = _parts_named(folders)
        uses = set(named.values())
        if not named or not (len(named) == len(folders) or ("train" in uses and len(uses) > 1)):
            return {"": path}
        for name, part in named.items():
            other = found.setdefault(part, path / name)
            if other.name != name:
                raise DataError(
                    f"{path} has two folders for one part, {other.name} and {name}. Keep one, or name the folder that "
                    "is meant."
                )
        return found
    if path.suffix.lower() == ".npz":
        return _npz_parts(path, medium)
    if medium is IMAGES and path.suffix.lower() == ".tar":
        return {"": "tar"}
    if medium is IMAGES and _IDX.match(path.name):
        return {"": "idx"}
    return {"": "file"}


def _parts_named(folders: Sequence[str]) -> dict[str, str]:
    """Return folder -> part of those called as one, such as ``val``; if there are none, of ``val_set`` and alike."""
    for ending in ("", r"[_\- ]?set"):
        words = {name: re.sub(f"{ending}$", "", name.lower()) for name in folders}
        if found := {name: _PARTS[word] for name, word in words.items() if word in _PARTS}:
            return found
    return {}


def _like_parts(names: Iterable[str]) -> bool:
    """Whether all names have a word for a part (``seg_train``, ``val2017``), and mean training and other rows."""
    words = [re.findall(r"[a-z]+", name.lower()) for name in names]
    uses = [{_PARTS[word] for word in held if word in _PARTS} for held in words]
    several = set().union(*uses)
    return all(uses) and "train" in several and len(several) > 1


def _folders(path: Path, names: Iterable[str]) -> list[str]:
    """Return the folders among the names in a folder, without hidden ones and those that archives of macOS add."""
    return [n for n in names if not hidden(n) and (path / n).is_dir()]


def _table(path: Path, part: Any, medium: Medium) -> Table:
    if isinstance(part, Path):
        return _folder(part, medium)
    if isinstance(part, tuple):
        kept, name = part
        columns, names = kept.columns(name)
        columns["image"] = [Picture(pixels, called) for pixels, called in columns["image"]]
        return ImageTable(str(kept.manifest["source"]), columns, names, origin=str(kept.path))
    if part == "idx":
        return _idx(path)
    if part == "tar":
        return ImageTable(path.name, _read_tars(tar_files(path)), origin=str(path))
    if part == "file":
        only = medium.item(path, str(path))
        return ImageTable(path.name, {medium.column: [only]}, origin=str(path))
    return _npz(path, part, medium)


def image_files(path: Path, medium: Medium = IMAGES) -> list[Path]:
    """Return the images below a folder, in order; the other files are counted and named in a line."""
    found, others, irregular = files_below(path, medium)
    _say_left_out(path, medium, [file.name for file in others], irregular)
    return found


def _say_left_out(path: Path, medium: Medium, others: list[str], irregular: list[str]) -> None:
    note_names(path, others, f"files are no {medium.many} by their names and are left out")
    note_names(path, irregular, "entries are no regular files and are left out")


def _folder(path: Path, medium: Medium) -> Table:
    """Return the images below a folder: those that a table in it names, those of its archives, or all.

    The first folder of a path is the class, if all images lie in one. A text beside an image is its caption.
    """
    if (named := _named_files(path, medium)) is not None:
        return named
    found, others, irregular = files_below(path, medium)
    texts = {file for file in others if file.suffix.lower() == ".txt" and file.is_file()}
    tars = [file for file in others if file.suffix.lower() == ".tar" and file.is_file()]
    if medium is IMAGES and tars and not found:
        return ImageTable(path.name or str(path), _read_tars(tars), origin=str(path))
    beside = [text if (text := file.with_suffix(".txt")) in texts else None for file in found]
    captions = set(beside)
    left = [file.name for file in others if file not in captions]
    _say_left_out(path, medium, left, irregular)
    columns: dict[str, list[Any]] = {
        medium.column: [medium.item(file, str(file)) for file in found]
    }
    inside, remarks = [file.relative_to(path).parts for file in found], list[str]()
    if inside and all(len(parts) > 1 for parts in inside):
        columns["label"] = [parts[0] for parts in inside]
        classes = sorted(set(columns["label"]))
        if _like_parts(classes):
            remarks.append(
                f"{path}: the folders {shown(classes, 4)} are taken for classes; if they are parts of the data, name "
                "one of them for each use, or call them train, val and test"
            )
        if len(classes) == 1 and all(len(parts) > 2 for parts in inside):
            remarks.append(
                f"{path}: all {medium.many} lie in {inside[0][0]!r}, which is taken for their class; if the folders in "
                f"it are the classes, name {path / inside[0][0]}"
            )
        empty = set(_folders(path, os.listdir(path)))
        if empty := empty.difference(classes):
            note(
                f"{path}: no {medium.many} in {shown(sorted(empty), 4)}, so there is no such class"
            )
    elif any(len(parts) > 1 for parts in inside):
        loose = sum(len(parts) == 1 for parts in inside)
        note(
            f"{path}: {loose:,} {medium.many} lie outside of folders, so the folders are not taken for classes; move "
            "each into the folder of its class to have labels"
        )
    if any(beside):
        columns["caption"] = _captions(path, beside)
    return ImageTable(path.name or str(path), columns, origin=str(path), remarks={"label": remarks})


def files_below(path: Path, medium: Medium = IMAGES) -> tuple[list[Path], list[Path], list[str]]:
    """Return the images below a folder, its other files, and the names of what is no file, all in natural order."""
    found, others, irregular = list[Path](), list[Path](), list[str]()
    for place, names in walk(path):
        for name in sorted(names, key=_natural):
            image = Path(name).suffix.lower() in medium.suffixes
            if (place / name).is_file():
                (found if image else others).append(place / name)
            elif image:  # a pipe, which would block, or a link to nothing
                irregular.append(name)
            else:
                others.append(place / name)
    return found, others, irregular


def _named_files(path: Path, medium: Medium) -> Table | None:
    """Return the rows of the table in a folder that names its images, or None."""
    for name in _METADATA:
        if not (path / name).is_file():
            continue
        table = read_table(path / name)
        if _FILE_NAME in table.columns:
            named = {os.path.normpath(path / str(value)) for value in table.columns[_FILE_NAME]}
            files = files_below(path, medium)[0]
            rest = [file.name for file in files if os.path.normpath(file) not in named]
            note_names(path, rest, f"{medium.many} are not named in {name}")
            others = {key: held for key, held in table.columns.items() if key != _FILE_NAME}
            items = pictures(table, _FILE_NAME, medium)
            return table.with_columns({**others, medium.column: items}, table.label_names)
    return None


def _captions(path: Path, texts: list[Path | None]) -> list[list[str] | None]:
    """Return the lines of the text beside each image, of which each is a caption.

    A text that is not read leaves its image without a caption, because not every task asks for one; a line names those.
    """
    found = list[list[str] | None]()
    unread, cut = list[str](), list[str]()
    for text in texts:
        content: str | None = None
        if text is not None:
            try:
                with open(text, encoding="utf-8-sig") as file:
                    content = file.read(_MOST_CAPTION + 1)
            except (OSError, UnicodeDecodeError):
                unread.append(text.name)
            else:
                cut += [text.name] * (len(content) > _MOST_CAPTION)
        found.append(None if content is None else _lines(content[:_MOST_CAPTION]))
    because = "cannot be read as UTF-8, so these files have no caption"
    note_names(path, unread, f"texts beside a file {because}")
    long = f"are longer than {_MOST_CAPTION:,} characters, and are cut"
    note_names(path, cut, f"texts beside a file {long}")
    return found


def _lines(text: str) -> list[str]:
    """Return the lines of a text; `splitlines` would also divide it at eight other characters, such as U+2028."""
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def _natural(name: str) -> list[Any]:
    """Sort key by which img2 comes before img10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def _npz_parts(path: Path, medium: Medium) -> dict[str, dict[str, str]]:
    """Return part -> role -> name of the array, by the names of the arrays in the file."""
    names = _npz_names(path)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.lower().split("_")
        part = next((_PARTS[w] for w in words if w in _PARTS), "")
        rest = "_".join(w for w in words if w not in _PARTS)
        known = [(medium.column, medium.arrays), ("label", _LABELS)]
        known += [("mask", _MASKS)] * (medium is IMAGES)
        for role, names_of_role in known:
            if rest in names_of_role:
                found.setdefault(part, {}).setdefault(role, name)
    found = {part: roles for part, roles in found.items() if medium.column in roles}
    if not found:
        usual = medium.arrays[0]
        raise DataError(
            f"{path} has the arrays {shown(names, 8)}, and none called {usual}. Expected: {usual} {medium.shapes}, "
            f"labels (rows,) and, if there are any, class_names; for several parts train_{usual}, train_labels, "
            f"val_{usual}, ..."
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
            f"{path} holds {size:,} bytes of arrays; at most {_MOST_BYTES:,} are read. Write them as files in "
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


def _npz(path: Path, roles: Mapping[str, str], medium: Medium) -> Table:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: _npz_array(file, name)
                for name in _npz_names(path)
                if name in roles.values()
                or not (medium.column in name or set(name.lower().split("_")) & set(_PARTS))
            }
    except DataError:
        raise
    # Damaged files raise errors of zipfile, zlib, struct and numpy; large ones a MemoryError.
    except Exception as error:
        raise DataError(f"{path} cannot be read: {str(error) or type(error).__name__}.") from error
    images = medium.column_of(path, arrays, roles)
    del arrays[roles[medium.column]]
    labels, masks = (arrays.pop(roles[r]) if r in roles else None for r in ("label", "mask"))
    names = next((arrays[n] for n in arrays if n.lower() in _CLASSES), None)
    table = _arrays(path, medium, images, labels, names, arrays)
    if masks is None:
        return table
    if len(masks) != len(images):
        raise DataError(f"{path} holds {len(images):,} images and {len(masks):,} masks.")
    held = [Picture(mask, f"mask {i} of {path.name}") for i, mask in enumerate(masks)]
    known = {} if names is None else {"mask": [str(n) for n in names.tolist()]}
    return table.with_columns({**table.columns, "mask": held}, {**table.label_names, **known})


def _array_items(medium: Medium, path: Path, images: Any) -> list[Any]:
    """Return the items of an array of all rows, such as (N, H, W) or (N, H, W, C)."""
    if images.ndim - 1 not in medium.dimensions or not images.size:
        raise DataError(
            f"{path}: the {medium.many} have the shape {images.shape}; expected {medium.shapes}."
        )
    if medium is IMAGES and images.dtype == np.uint8 and int(images.max()) == 1:
        note(f"{path}: all values are 0 and 1, which are read as black and white")
        images = images * np.uint8(255)
    called = f"{medium.column} {{}} of {path.name}"
    return [medium.item(image, called.format(i)) for i, image in enumerate(images)]


def _arrays(
    path: Path,
    medium: Medium,
    images: list[Any],
    labels: Any,
    names: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Table:
    """Return items with their labels and other columns of as many values."""
    columns = {medium.column: images}
    if labels is not None:
        if labels.ndim and len(labels) != len(images):
            raise DataError(
                f"{path} holds {len(images):,} {medium.many} and {len(labels):,} labels."
            )
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
            f"{path}: the labels have the shape {labels.shape}; expected one for each row, or 0 and 1 for each class."
        )
    found: list[Any] = labels.tolist()
    return found


def _idx(path: Path) -> Table:
    """Return the images of an IDX file (of MNIST) with the labels in the file beside it, if there is one."""
    name = _IDX.match(path.name)
    assert name is not None
    beside = path.with_name(f"{name[1]}labels{name[2].replace('3', '1')}{name[3]}{name[4] or ''}")
    images = _array_items(IMAGES, path, _idx_array(path, 3))
    return _arrays(path, IMAGES, images, _idx_array(beside, 1) if beside.is_file() else None)


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


# ------------------------------------------------------------- archives, as WebDataset writes them


def _read_tars(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the samples of archives as columns: ``image``, ``caption`` (.txt), ``label`` (.cls) and those of .json.

    The members of one name are one sample, their endings its columns. Images stay in the archives, and are read from
    there when they are needed.

    Raises:
        DataError: a file is no archive, is compressed, damaged, or cut off.
    """
    rows, passed = list[dict[str, Any]](), Counter[str]()
    for path in paths:
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    if member.isfile() and key:
                        sample = samples.setdefault(f"{folder}/{key}".lstrip("./"), {})
                        _add(sample, path, archive, member, ending.lower(), passed)
                _check_end(archive)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"{path} cannot be read as an archive: {error}. It must be one .tar that is not compressed; if it "
                "is damaged or cut off, copy it again."
            ) from error
        rows += samples.values()
    kept = [row for row in rows if "image" in row]
    if lost := len(rows) - len(kept):
        note(f"{lost:,} of {len(rows):,} samples have no image and are left out")
    if passed:
        named = ", ".join(f".{ending} ({count:,})" for ending, count in passed.most_common(4))
        dotted = "; the name of a sample ends at its first dot" * any("." in e for e in passed)
        note(f"members that are not read: {named}{', ...' * (len(passed) > 4)}{dotted}")
    names = dict.fromkeys(name for row in kept for name in row)
    return {name: [row.get(name) for row in kept] for name in names}


def _check_end(archive: tarfile.TarFile) -> None:
    """Check that an archive that has been read ends as one: with a block of zeros, and nothing else behind it.

    ``tarfile`` also stops, without an error, at a header that is damaged or cut off.

    Raises:
        ReadError: it does not.
    """
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    found = file.read(tarfile.BLOCKSIZE)
    if len(found) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without the block of zeros that closes an archive")
    while found:
        if found.strip(b"\0"):
            raise tarfile.ReadError(
                f"{archive.offset:,} bytes from its start the header of a member is damaged, or another archive follows"
            )
        found = file.read(1 << 20)


def _add(
    sample: dict[str, Any], path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str,
    passed: Counter[str],
) -> None:  # fmt: skip
    """Add one member to its sample; ``passed`` counts, by ending, those that are not read."""
    if f".{ending}" in SUFFIXES and "image" not in sample:
        place = Slice(path, member.offset_data, member.size)
        sample["image"] = Picture(place, f"{path.name}/{member.name}")
        return
    held = archive.extractfile(member) if ending in ("txt", "cls", "json") else None
    content = b"" if held is None or member.size > _MOST_TEXT else held.read()
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        passed[f"{ending} not in UTF-8"] += 1
        return
    if ending == "txt" and text:
        sample["caption"] = _lines(text)
    elif ending == "cls" and text:
        sample["label"] = int(text) if re.fullmatch(r"\d{1,9}", text) else text
    elif ending == "json" and (found := _mapping(content)) is not None:
        # Members of their own take precedence, in whichever order they stand.
        sample |= {key: value for key, value in found.items() if key not in (*sample, "image")}
    else:
        passed[ending] += 1


def _mapping(content: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(content, "a member")
    except CheckpointCorrupt:
        return None
    return found if isinstance(found, dict) else None
