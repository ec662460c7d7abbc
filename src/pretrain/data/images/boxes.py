"""Rows of images with boxes: files of COCO, folders of Pascal VOC, tables with one box or one image in a row.

In a row, ``boxes`` are lists of left, top, right and bottom in pixels of the image, ``label`` has the class of each.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.data.images.decode import Picture
from pretrain.data.images.rows import (
    USUAL_FOLDERS,
    ImageTable,
    image_files,
    in_usual_folder,
    note_names,
    part_for,
    pictures,
    read_images,
)
from pretrain.data.labelled import Role
from pretrain.data.paths import walk
from pretrain.data.tables import Table, shown
from pretrain.errors import CheckpointCorrupt, DataError
from pretrain.utils.files import note, read_bytes
from pretrain.utils.strict_json import parse_json

__all__ = [
    "BOXES",
    "PLACES",
    "SIZE",
    "BoxTable",
    "Corners",
    "DatasetsBox",
    "Extent",
    "annotations_of",
    "gathered_boxes",
    "read_boxes",
    "stated_size",
]

BOXES = Role(
    "boxes", ("boxes", "box", "bboxes", "bbox"), help="the boxes of the image", target=True
)
SIZE = Role(
    "image_size", ("image_size",), False, "width and height of the image that the boxes belong to"
)

_SIDES = (
    ("xmin", "x_min", "x1", "left"),
    ("ymin", "y_min", "y1", "top"),
    ("xmax", "x_max", "x2", "right"),
    ("ymax", "y_max", "y2", "bottom"),
)
_EXTENT = ("width", "height")  # of the image, beside columns of sides
_OBJECTS = "objects"  # column of the datasets library: {"bbox": [...], "category": [...]}
# Columns that hold places in pixels.
PLACES = frozenset((_OBJECTS, *BOXES.known, *(name for names in _SIDES for name in names)))
_KEYS = (("bbox", "boxes"), ("category", "label", "labels", "categories"))  # keys in such a mapping
_MOST_BYTES = 1 << 30  # bytes of a file of annotations


@dataclass(frozen=True, eq=False, repr=False)
class BoxTable(ImageTable):
    """Rows of a file that lists its classes, those without a box among them.

    Args:
        categories: their names.
    """

    categories: tuple[str, ...] = ()


def read_boxes(source: Any, *, name: str = "data", **options: Any) -> Table:
    """Read rows of images with boxes; sources without boxes are read like those of ``read_images``, see there.

    Those with boxes are a .json file in the layout of COCO, and a folder with such a file (``_annotations.coco.json``)
    or with .xml files of Pascal VOC, or with such a folder for each part (``train``, ``val``, ``test``).

    Raises:
        DataError: as there; or an annotation cannot be read.
    """
    found = annotations_of(source, name=name)
    if found is None:
        return read_images(source, name=name, **options)
    path, held = found
    return _coco(path, held) if isinstance(held, Mapping) else _voc(path, held)


def annotations_of(source: Any, *, name: str = "data") -> tuple[Path, Any] | None:
    """Return a file of COCO and its content, or a folder and its files of Pascal VOC; None if there is neither.

    Raises:
        DataError: a file of COCO is damaged, or there are several.
    """
    path = Path(os.path.expanduser(source)) if isinstance(source, str | Path) else None
    if path is not None and os.path.isdir(path):
        part = part_for(path, name)
        folder = part if isinstance(part, Path) else path
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".json")
        found = [(file, content) for file in files if (content := _coco_content(file))]
        if len(found) > 1:
            raise DataError(
                f"{folder} has several files of COCO: {shown([f.name for f, _ in found], 4)}. Name the one that is "
                "meant."
            )
        if found:
            return found[0]
        beside = (place / name for place, names in walk(folder) for name in names)
        if xml := sorted(file for file in beside if file.suffix.lower() == ".xml"):
            return folder, xml
    one = path is not None and path.suffix.lower() == ".json" and os.path.isfile(path)
    if path is not None and one and (content := _coco_content(path)):
        return path, content
    return None


def gathered_boxes(
    table: Table, columns: Mapping[str, Any], known: Mapping[str, Sequence[str]]
) -> Table:
    """Return a table with one row for each image, from one with one box in a row, or with a column ``objects``.

    Args:
        table: the rows as they were read.
        columns: role -> column, as the caller named them.
        known: role -> names by which its column is recognised.
    """
    chosen = {
        role: columns.get(role) or next((n for n in names if n in table.columns), None)
        for role, names in known.items()
    }
    image, label = chosen["image"], chosen["label"]
    cells = table.columns.get(_OBJECTS)
    if cells is not None and chosen["boxes"] is None:
        return in_usual_folder(_from_objects(table, cells), image)
    sides = [next((n for n in names if n in table.columns), None) for names in _SIDES]
    if image is None or None in sides or chosen["boxes"] is not None:
        return in_usual_folder(table, image)
    groups: dict[Any, list[int]] = {}
    for i, identity in enumerate(_identities(pictures(table, image))):
        groups.setdefault(identity, []).append(i)
    first = table.take([rows[0] for rows in groups.values()])
    gathered: dict[str, list[Any]] = {"boxes": []}
    if label is not None:
        gathered[label] = []
    for rows in groups.values():
        values = [Corners(table.columns[str(side)][i] for side in sides) for i in rows]
        # A row without numbers is an image in which nothing was found.
        held = [k for k, box in enumerate(values) if any(v not in (None, "") for v in box)]
        gathered["boxes"].append([values[k] for k in held])
        if label is not None:
            gathered[label].append([table.columns[label][rows[k]] for k in held])
    kept = {n: column for n, column in first.columns.items() if n not in sides}
    if set(_EXTENT) <= set(kept) and SIZE.name not in kept:
        sizes = [
            stated_size([table.columns[name][i] for name in _EXTENT]) for i in range(len(table))
        ]
        if _of_images(sizes, [*groups.values()], gathered["boxes"]):
            kept[SIZE.name] = [sizes[rows[0]] for rows in groups.values()]
    return in_usual_folder(first.with_columns({**kept, **gathered}, table.label_names), image)


def _identities(images: Sequence[Picture | None]) -> Iterator[Any]:
    """Yield, for each row, what the rows of one image have in common: the path of its file, or else its content."""
    digests: dict[int, str] = {}  # one object in several rows is read once
    for row, picture in enumerate(images):
        if picture is None:
            yield row
        elif isinstance(picture.source, str | Path):
            yield str(picture.source)
        else:
            if (known := id(picture.source)) not in digests:
                digests[known] = picture.digest
            yield digests[known]


def _of_images(
    sizes: Sequence[Any], groups: Sequence[Sequence[int]], boxes: Sequence[Sequence[Any]]
) -> bool:
    """Whether columns of width and height are those of the images, and not of the boxes."""
    for rows, inside in zip(groups, boxes, strict=True):
        stated = {sizes[i] for i in rows}
        if len(stated) > 1 or None in stated:
            return False
        ((width, height),) = stated
        try:
            if any(float(box[2]) > width + 1 or float(box[3]) > height + 1 for box in inside):
                return False
        except (TypeError, ValueError):
            return False
    return True


def _from_objects(table: Table, cells: Sequence[Any]) -> Table:
    """Return the boxes of the datasets library, whose form is that of COCO: left, top, width, height."""
    boxes, labels = list[Any](), list[Any]()
    for i, cell in enumerate(cells):
        found, names = _object_lists(cell, table.where(i))
        if len(found) != len(names):
            raise DataError(
                f"{table.where(i)}: {len(found)} boxes (bbox) and {len(names)} classes (category) in {_OBJECTS}."
            )
        boxes.append([DatasetsBox(box) for box in found])
        labels.append(list(names))
    columns = {n: column for n, column in table.columns.items() if n != _OBJECTS}
    known = dict(table.label_names)
    if (key := next((k for k in _KEYS[1] if f"{_OBJECTS}.{k}" in known), None)) is not None:
        known["label"] = known.pop(f"{_OBJECTS}.{key}")
    return table.with_columns({**columns, "boxes": boxes, "label": labels}, known)


def _object_lists(cell: Any, where: str) -> list[Sequence[Any]]:
    """Return the boxes and the classes of one cell, which may be JSON text; an empty cell has none.

    Raises:
        DataError: it has another form; names the row.
    """
    given = cell
    if isinstance(cell, str):
        with contextlib.suppress(CheckpointCorrupt):
            cell = parse_json(cell.encode(), where) if cell.strip() else None
    cell = cell.tolist() if hasattr(cell, "tolist") else cell
    if isinstance(cell, list) and all(isinstance(one, Mapping) for one in cell):
        cell = {key: [one.get(key) for one in cell] for key in (cell[0] if cell else ())}
    if cell is None or (isinstance(cell, Mapping) and not cell):
        return [[], []]
    if isinstance(cell, Mapping) and any(key in cell for keys in _KEYS for key in keys):
        parts: list[Any] = [next((cell[k] for k in keys if k in cell), None) for keys in _KEYS]
        parts = [part.tolist() if hasattr(part, "tolist") else part for part in parts]
        if all(part is None or isinstance(part, list | tuple) for part in parts):
            return [part or [] for part in parts]
    raise DataError(
        f"{where}: {_OBJECTS} is {str(given)[:60]!r}. Expected is a mapping, or JSON text of one, with bbox, which "
        "lists left, top, width and height of each box, and category, which lists their classes."
    )


class Corners(list[Any]):
    """Left, top, right and bottom of a box, where its file says what its numbers are."""


class Extent(Corners):
    """Corners of a box whose file has left, top, width and height."""


class DatasetsBox(Extent):
    """Corners of a box of the datasets library, whose numbers usually are left, top, width and height.

    Attributes:
        given: the box as it stands; in some data sets its numbers are corners already.
    """

    def __init__(self, box: Any) -> None:
        super().__init__(_corners(box))
        self.given = box


def _corners(box: Any) -> Extent:
    """Return left, top, right, bottom of left, top, width, height; other values as they are, to be refused."""
    if not isinstance(box, Iterable) or isinstance(box, str):
        return Extent([box])
    try:
        left, top, width, height = map(float, box)
    except (TypeError, ValueError):
        return Extent(box)
    return Extent([left, top, left + width, top + height])


def stated_size(cell: Any) -> tuple[int, int] | None:
    """Return width and height as an annotation states them; None if it does not, or states 0, as some programs do."""
    try:
        width, height = (int(float(value)) for value in cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


# ------------------------------------------------------------------------------------------------ COCO


def _coco_content(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a file of COCO, or None if it is another one.

    Raises:
        DataError: it looks like one, and is damaged or cut off.
    """
    with open(path, "rb") as file:
        if not file.read(4096).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{"):
            return None
    keys, held = ("images", "annotations", "categories"), read_bytes(path, limit=_MOST_BYTES)
    held = held.removeprefix(codecs.BOM_UTF8)
    try:
        content = parse_json(held, path, limit=_MOST_BYTES)
    except CheckpointCorrupt as error:
        with contextlib.suppress(CheckpointCorrupt):
            parse_json(held.split(b"\n", 1)[0], path)
            return None  # one object in each line
        if any(f'"{key}"'.encode() in held for key in keys):
            raise DataError(
                f"{path} looks like a file of COCO, and is damaged or cut off: {error} Copy it again, or move it away."
            ) from error
        return None
    known = isinstance(content, Mapping) and all(isinstance(content.get(k), list) for k in keys)
    return content if known else None


def _by_id(path: Path, content: Mapping[str, Any], part: str, key: str) -> dict[Any, str]:
    """Return id -> name of a part of a file of COCO.

    Raises:
        DataError: two of them have one id, so that their boxes cannot be told apart.
    """
    found: dict[Any, str] = {}
    for one in content[part]:
        other = found.setdefault(one["id"], str(one[key]))
        if other != str(one[key]):
            raise DataError(
                f"{path}: the id {one['id']!r} stands for two {part}, {other!r} and {str(one[key])!r}. Ids must "
                "differ, also where files were joined; give each its own, here and in the annotations."
            )
    return found


def _coco(path: Path, content: Mapping[str, Any]) -> Table:
    try:
        names = _by_id(path, content, "categories", "name")
        files = _by_id(path, content, "images", "file_name")
        extents = {one["id"]: [one.get(name) for name in _EXTENT] for one in content["images"]}
        # Several ids may stand for one file, whose boxes would else be background in the rows of the other ids.
        by_file: dict[str, Any] = {}
        first = {key: by_file.setdefault(file, key) for key, file in files.items()}
        boxes: dict[Any, list[Any]] = {key: [] for key in by_file.values()}
        labels: dict[Any, list[str]] = {key: [] for key in by_file.values()}
        again, crowds = len(files) - len(by_file), 0
        given: dict[Any, Any] = {}  # a box of a file -> the id that gave it first
        for one in content["annotations"]:
            if one.get("iscrowd"):
                crowds += 1
                continue
            image, label, box = first[one["image_id"]], one["category_id"], _corners(one["bbox"])
            # The text of a box is made only where it is needed: files of COCO have a million of them.
            if (
                again
                and given.setdefault((image, label, str(box)), one["image_id"]) != one["image_id"]
            ):
                continue
            labels[image].append(names[label])
            boxes[image].append(box)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} looks like a file of COCO, but {error} is missing or no image or category has it as its id. Each "
            "annotation needs image_id, category_id and bbox, each image id and file_name, each category id and name."
        ) from error
    if crowds:
        note(f"{path}: {crowds:,} boxes around crowds (iscrowd) are left out")
    if again:
        note(
            f"{path}: {again:,} images are listed again under another id; the boxes of one file stand together"
        )
    columns: dict[str, list[Any]] = {
        "image": [*by_file],
        "boxes": [*boxes.values()],
        "label": [*labels.values()],
        SIZE.name: [extents[key] for key in by_file.values()],
    }
    table = BoxTable(path.name, columns, origin=str(path), categories=tuple(names.values()))
    return in_usual_folder(table, "image")


# ------------------------------------------------------------------------------------------ Pascal VOC


def _image_of(file: Path, *alike: Sequence[Path]) -> Path | None:
    """Return the image of an annotation: the one beside it, or in a usual folder there, or else the only one.

    Args:
        file: the annotation.
        *alike: images of the name that it gives, and those of its own name without the ending.

    Raises:
        DataError: several images are as near; the message names two.
    """
    places = [os.path.normpath(file.parent / name) for name in USUAL_FOLDERS]
    near = [
        [image for image in found if os.path.normpath(image.parent) == place]
        for place in places
        for found in alike
    ]
    found = next(filter(None, [*near, *alike]), [])
    if len(found) > 1:
        raise DataError(
            f"{file}: its image may be {found[0]} or {found[1]}. Put each annotation beside its image, or give the "
            "images different names."
        )
    return found[0] if found else None


def _voc(path: Path, annotations: Sequence[Path]) -> Table:
    images = image_files(path)
    names, stems = defaultdict[str, list[Path]](list), defaultdict[str, list[Path]](list)
    for image in images:
        names[image.name].append(image)
        stems[image.stem].append(image)
    columns: dict[str, list[Any]] = {"image": [], "boxes": [], "label": [], SIZE.name: []}
    without = list[str]()
    for file in annotations:
        content = read_bytes(file, limit=1 << 24)
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            raise DataError(f"{file} declares a document type or entities, which are not read.")
        try:
            root = ElementTree.fromstring(content)
            boxes = [
                Corners(
                    float(one.findtext(f"bndbox/{side}", ""))
                    for side in ("xmin", "ymin", "xmax", "ymax")
                )
                for one in root.iter("object")
            ]
            labels = [(one.findtext("name") or "").strip() for one in root.iter("object")]
        except (ElementTree.ParseError, ValueError) as error:
            raise DataError(f"{file} is no annotation of Pascal VOC: {error}.") from error
        name = (root.findtext("filename") or "").strip()
        found = _image_of(file, names.get(name, []), stems.get(file.stem, []))
        if found is None:
            without.append(file.name)
            continue
        columns["image"].append(Picture(found, str(found)))
        columns["boxes"].append(boxes)
        columns["label"].append(labels)
        columns[SIZE.name].append([root.findtext(f"size/{name}") for name in _EXTENT])
    note_names(path, without, "annotations without an image are left out")
    used = {str(picture) for picture in columns["image"]}
    alone = [file.name for file in images if str(file) not in used]
    note_names(path, alone, "images without an annotation are left out")
    if not used:
        raise DataError(
            f"{path} holds {len(annotations):,} annotations, and none of the images that they name. Put the images "
            "into the folder images or JPEGImages beside them."
        )
    return ImageTable(path.name or str(path), columns, origin=str(path))
