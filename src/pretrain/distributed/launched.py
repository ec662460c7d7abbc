"""Detection of a launcher, without importing torch."""

from __future__ import annotations

import os

__all__ = ["launched"]


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
