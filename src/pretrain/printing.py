"""Escaping of untrusted text before it is printed on a terminal.

Control characters can control a terminal, and direction and zero-width characters make a text look like another one.
Everything that is printed goes through `printable`; files keep the original text.
"""

from __future__ import annotations

import math
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

__all__ = ["aligned", "clock", "console", "in_notebook", "printable", "printable_pieces"]


def console() -> TextIO:
    """Return the stream of progress and notes: stderr, or stdout in a notebook, which shows the former in red."""
    return sys.stdout if in_notebook() else sys.stderr


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    module: Any = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if module is None else module.get_ipython()
    return any(cls.__name__ == "ZMQInteractiveShell" for cls in type(shell).__mro__)


def clock(seconds: float) -> str:
    """Format seconds: 90 -> "1:30"."""
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def printable(text: str, *, lines: bool = False) -> str:
    """Return the text with every non-printable character escaped as in Python's ``repr``.

    Args:
        text: any text, also with lone surrogates.
        lines: keep line breaks and expand tabs to spaces; else both become single spaces, so that the result is one
            line.
    """
    if lines:
        text = text.replace("\r\n", "\n").expandtabs()
        return "\n".join(map(_visible, text.split("\n")))
    return _visible(text.replace("\n", " ").replace("\t", " "))


def printable_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Return the pieces of a text so that together they are its ``printable(text, lines=True)``."""
    line = held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""  # a line break, if "\n" follows
        text = line + text.removesuffix(held).replace("\r\n", "\n")
        # How wide a tab is depends on the line before it.
        shown = text.expandtabs()[len(line.expandtabs()) :]
        line = text.rpartition("\n")[2]
        if shown:
            yield printable(shown, lines=True)
    if held:
        yield printable(held, lines=True)


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def aligned(rows: Sequence[Sequence[str]], left: int = 0, between: str = "  ") -> list[str]:
    """Return a table as lines: the first ``left`` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return [
        between.join(
            side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
