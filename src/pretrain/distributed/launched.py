"""Was this process started as one of several? Asked where torch is not imported yet."""

from __future__ import annotations

import os

__all__ = ["launched"]


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
