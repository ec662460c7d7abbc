"""Text on a terminal: escaped, because it cannot be trusted, and wrapped between words.

Control characters can control a terminal, and direction and zero-width characters make a text look like another one.
Everything that is printed goes through `printable`; files keep the original text. On a terminal, long lines are wrapped
between words.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

__all__ = [
    "Console", "aligned", "clock", "coloured", "columns", "console", "discard", "duration", "in_notebook", "printable",
    "printable_pieces", "show", "wrapped",
]  # fmt: skip

_COLUMNS = 80  # of a terminal that does not say its width


class Console:
    """A stream of lines that no result depends on: it raises nothing, and prints nothing once it has failed for good.

    Attributes:
        stream: the stream.
        lost: why it prints nothing any more; "" as long as it does.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream: Any = stream
        self.lost = "" if stream is not None else "there is no stream"

    def write(self, text: str) -> int:
        """Write a text, or nothing; return its length."""
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or nothing."""
        self._do("flush")

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that can be written."""
        return bool(self._do("isatty"))

    def _do(self, name: str, *values: str) -> Any:
        if not self.lost:
            try:
                return getattr(self.stream, name)(*values)
            except BlockingIOError:  # its reader is slow: only this text is lost
                return None
            except UnicodeEncodeError as error:
                as_bytes = [text.encode(error.encoding, "backslashreplace") for text in values]
                return self._do(name, *(data.decode(error.encoding) for data in as_bytes))
            except (OSError, ValueError) as error:  # no reader, a full disk; a closed file
                self.lost = getattr(error, "strerror", None) or str(error)
                # Else Python would exit with code 120, as the rest of the buffer cannot be written.
                atexit.register(discard, self.stream)
        return None

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.stream, name)


def discard(stream: TextIO) -> None:
    """Let the descriptor of a stream lead nowhere, and with it what its buffer holds."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # it may have none
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_console = Console(None)


def console() -> Console:
    """Return the stream of progress and notes: stderr, or stdout in a notebook, which shows the former in red."""
    global _console
    stream = sys.stdout if in_notebook() else sys.stderr
    if _console.stream is not stream:
        _console = Console(stream)
    return _console


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    module: Any = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if module is None else module.get_ipython()
    return any(cls.__name__ == "ZMQInteractiveShell" for cls in type(shell).__mro__)


def columns(stream: TextIO | Console) -> int | None:
    """Return the columns of a terminal, None for a stream that is none."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def coloured(stream: TextIO | Console) -> bool:
    """Return whether a stream is a terminal that shows colours, and its user wants them."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def show(text: str) -> None:
    """Print a text of one or more lines, escaped and wrapped, on the `console`."""
    stream = console()
    print(wrapped(printable(text, lines=True), columns(stream)), file=stream, flush=True)


def wrapped(text: str, room: int | None) -> str:
    """Wrap lines between words so that each fits into ``room`` columns (None: any).

    Paths stay whole, and so do lines that are indented by four: they are commands, to be copied.
    """
    return "\n".join(
        part
        for line in text.split("\n")
        for part in (
            [line]
            if room is None or len(line) < room or line.startswith("    ")
            else _parts(line, room)
        )
    )


def _parts(line: str, room: int) -> list[str]:
    return textwrap.wrap(
        line,
        max(1, room - 1),
        subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4),
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def clock(seconds: float) -> str:
    """Format seconds: 90 -> "1:30"."""
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Format seconds roughly, with their unit: 700 -> "12 minutes"."""
    for unit, size in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0), ("second", 1.0)):
        if seconds >= 2 * size or size == 1:
            count = max(1, round(seconds / size))
            return f"{count} {unit}{'s' * (count != 1)}"
    raise AssertionError


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
