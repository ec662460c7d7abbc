"""Prepared images on disk: a manifest, and for each part the decoded pixels in a flat file and a table of the rows.

The files of a part are ``pixels`` (bytes, the images one after another, (H, W) or (H, W, 3)) and ``rows`` (JSON lines:
name, shape, SHA-256 of the original and the other columns of a row). A source without parts is the part ``all``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.flat_files import FlatFile
from pretrain.data.manifests import (
    IMAGE_PARTS,
    MANIFEST,
    check_files,
    image_file_names,
    read_sealed,
)
from pretrain.errors import DataError

__all__ = ["FORMAT", "KIND", "Pixels", "PreparedImages"]

KIND, FORMAT = "images", 1


@dataclass(frozen=True, eq=False)
class Pixels:
    """One image in a flat file, read and verified when it is needed.

    Attributes:
        file: the file.
        start: its first byte there.
        shape: (H, W) or (H, W, 3).
        row: number of its row, for messages.
        digest: SHA-256 of the content that it was decoded from; where it was changed, together with the options.
    """

    file: FlatFile
    start: int
    shape: tuple[int, ...]
    row: int
    digest: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.shape[1], self.shape[0]

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[np.uint8]:
        return self.file.range(self.start, math.prod(self.shape), self.row).reshape(self.shape)


@dataclass(frozen=True)
class PreparedImages:
    """Images that ``prepare`` has decoded; a source of images like a folder of them.

    Attributes:
        path: the directory.
        manifest: its manifest: ``fingerprint``, ``options``, ``parts``, ``files``, ``source``.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def find(cls, folder: Path) -> PreparedImages | None:
        """Open a directory; None if it holds no prepared images.

        Raises:
            DataError: a file is missing, truncated or changed, or the manifest is damaged.
        """
        if not any(os.path.isfile(folder / image_file_names(part)[0]) for part in IMAGE_PARTS):
            return None
        try:
            manifest = read_sealed(folder / MANIFEST)
            known = manifest["kind"] == KIND and manifest["format"] == FORMAT
            files, parts = manifest["files"], manifest["parts"]
            known &= isinstance(manifest["options"], dict)
            known &= set(parts) <= set(IMAGE_PARTS) and bool(parts)
            known &= {name for part in parts for name in image_file_names(part)} <= set(files)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder / MANIFEST, str(error) or type(error).__name__) from error
        if not known:
            raise _damaged(folder / MANIFEST, "it lists other files than this release reads")
        check_files(folder, files)
        return cls(folder, manifest)

    def columns(self, part: str) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
        """Return the columns of a part, with ``Pixels`` and names under ``image``, and the names of its classes.

        Raises:
            DataError: the table does not fit the pixels.
        """
        pixels, table = (self.path / name for name in image_file_names(part))
        stats, file = self.manifest["parts"][part], FlatFile(pixels, np.dtype(np.uint8))
        names = list(stats["columns"])
        columns: dict[str, list[Any]] = {name: [] for name in ("image", *names)}
        start, digest, options = 0, hashlib.sha256(), self.manifest["options"]
        changed = json.dumps(options, sort_keys=True) if any(options.values()) else ""
        try:
            with table.open("rb") as lines:
                for number, line in enumerate(lines):
                    digest.update(line)
                    row = json.loads(line)
                    shape = tuple(map(int, row["shape"]))
                    if len(shape) not in (2, 3) or min(shape) < 1 or shape[2:] not in ((), (3,)):
                        raise ValueError(f"row {number} has the shape {shape}")
                    content = str(row["sha256"])
                    if changed:  # other pixels than those of the file
                        content = hashlib.sha256(f"{content} {changed}".encode()).hexdigest()
                    found = Pixels(file, start, shape, number, content)
                    columns["image"].append((found, str(row["name"])))
                    for name in names:
                        columns[name].append(row["row"][name])
                    start += math.prod(shape)
            if start != len(file) or len(columns["image"]) != stats["rows"]:
                raise ValueError(
                    f"its images have {start:,} bytes, and {pixels.name} {len(file):,}"
                )
            if digest.hexdigest() != self.manifest["files"][table.name]["sha256"]:
                raise ValueError("it does not have the SHA-256 of the manifest")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise _damaged(table, str(error) or type(error).__name__) from error
        return columns, dict(stats["label_names"])

    @property
    def parts(self) -> list[str]:
        """The parts of the source, in their order; one without parts is ``""``."""
        return [part for part in IMAGE_PARTS if part in self.manifest["parts"]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of the source and the options."""
        return str(self.manifest["fingerprint"])

    def table(self) -> str:
        """Return the closing lines of ``prepare`` as text."""
        lines = [f"prepared {self.path}"]
        for part in self.parts:
            stats = self.manifest["parts"][part]
            pixels = self.manifest["files"][image_file_names(part)[0]]["size"]
            left = f", {stats['left_out']:,} left out" if stats["left_out"] else ""
            lines.append(
                f"{IMAGE_PARTS[part]:<6} {stats['rows']:,} images{left}, {pixels / 1e6:,.1f} MB of pixels; columns "
                f"{', '.join(['image', *stats['columns']])}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        rows = sum(self.manifest["parts"][part]["rows"] for part in self.parts)
        return f"PreparedImages({str(self.path)!r}: {rows:,} images)"


def _damaged(file: Path, fault: str) -> DataError:
    return DataError(
        f"{file} is damaged ({fault}); prepare the images again, or copy the file again."
    )
