"""Processor of images with texts: a tokenizer and an image processor, in one directory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pretrain.data.images.processor import ImageProcessor
from pretrain.data.tokenizer import Tokenizer

__all__ = ["PairProcessor"]


class PairProcessor:
    """What turns texts into ids and images into pixel values.

    Args:
        tokenizer: a ``pretrain.Tokenizer``, or None.
        images: an ``ImageProcessor``, or None.
    """

    def __init__(self, tokenizer: Any, images: Any) -> None:
        self.tokenizer, self.images = tokenizer, images

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of both."""
        parts = [part.fingerprint for part in (self.tokenizer, self.images) if part is not None]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write the files of both."""
        for part in (self.tokenizer, self.images):
            if part is not None:
                part.save(directory)

    @classmethod
    def from_directory(cls, directory: str | Path) -> PairProcessor | None:
        """Read what a directory has; None if it has neither.

        Raises:
            TokenizerError, ConfigError: a file is not valid.
        """
        tokenizer = None
        names = ("tokenizer.json", "vocab.txt", "vocab.json")
        if any((Path(directory) / name).exists() for name in names):
            tokenizer = Tokenizer.from_directory(directory)
        images = ImageProcessor.from_directory(directory)
        return None if tokenizer is None and images is None else cls(tokenizer, images)
