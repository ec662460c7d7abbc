"""Rows of any kind - images, pairs, graphs - that a user's own function provides instead of prepared text.

The function is named in a configuration by its import path (``data.source``), or its result is given to
``pretrain.train`` in Python. A checkpoint never names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from pretrain.config.spelling import within
from pretrain.data.loader import Examples
from pretrain.errors import DataError
from pretrain.utils.imports import call_named, import_named

__all__ = ["SOURCES", "RowSource", "hash_rows", "open_rows"]


def hash_rows(rows: Examples) -> hashlib._Hash:
    """Return a SHA-256 over up to 64 rows, evenly spread; objects in them count by their type only."""
    digest, count = hashlib.sha256(), len(rows)
    for i in sorted({j * count // 64 for j in range(64)} if count else ()):
        row: Any = rows[i]
        items = row.items() if isinstance(row, Mapping) else [("", row)]
        for key, value in sorted(items, key=lambda item: str(item[0])):
            array = _array_of(value)
            digest.update(f"{key} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest


def _array_of(value: Any) -> np.ndarray:
    """Return a value of a row as an array of numbers or text; lists of unequal lengths and mappings as their JSON."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        array = np.ascontiguousarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if not array.dtype.hasobject:  # its bytes would be addresses in memory
            return array
    return np.ascontiguousarray(
        json.dumps(value, default=lambda item: type(item).__name__, skipkeys=True)
    )


@dataclass
class RowSource:
    """Rows for training and for evaluation, with what reads their raw form.

    Attributes:
        train: rows, a sequence of mappings of arrays, such as ``{"pixel_values": (3, 32, 32)}``.
        valid: held-out rows of the same kind; empty for none.
        processor: what turns raw inputs into such arrays (a tokenizer, an image processor); saved beside the weights.
        overrides: fields of the model's config that the rows determine, such as an image size.
        name: what the checkpoint records as the origin of the rows.
    """

    train: Examples
    valid: Examples = ()
    processor: Any = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    name: str = "rows"
    # Rows of tokens are measured against their unigram baseline, others are not.
    unigram_entropy: ClassVar[None] = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the number of rows and up to 64 training rows: a resumed run refuses changed data."""
        digest = hash_rows(self.train)
        digest.update(f"{len(self.train)} {len(self.valid)}".encode())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint records about the rows."""
        return {"fingerprint": self.fingerprint, "sources": [{"name": self.name, "share": 1.0}]}


# Sources of this package that have a short name.
SOURCES = {
    "images": "pretrain.data.images.source:labelled_images",
    "audio": "pretrain.data.audio.rows:labelled_audio",
    "image_text": "pretrain.data.images.captions:captioned_images",
}


def open_rows(path: str, arguments: Mapping[str, Any]) -> RowSource:
    """Call the user's function or class and return its rows.

    Args:
        path: a key of ``SOURCES``, or its import path, ``package.module:function``.
        arguments: its keyword arguments.

    Raises:
        ConfigError: it cannot be imported, or an argument is unknown (the nearest is suggested) or missing.
        DataError: it does not return a ``RowSource``.
    """
    make = import_named(SOURCES.get(path, path), "data.source")
    with within("data.source_args"):
        found = call_named(make, arguments, lambda key: f"data.source_args.{key}")
    if not isinstance(found, RowSource):
        raise DataError(
            f"data.source: {path} returned {type(found).__name__}, and must return a pretrain.RowSource(train, valid)."
        )
    return found
