"""An audit hook that notes every file which this process opens for writing, and whether through links."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

WATCHED: list[tuple[str, bool]] | None = None  # (path, through links) of what is opened for writing
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        path, _, flags = arguments
        if flags & _WRITES:
            WATCHED.append((os.fspath(path), not flags & (os.O_NOFOLLOW | os.O_EXCL)))


sys.addaudithook(_watch)


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[str, bool]]]:
    global WATCHED
    WATCHED = found = []
    try:
        yield found
    finally:
        WATCHED = None
