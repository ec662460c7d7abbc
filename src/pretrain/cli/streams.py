"""The standard streams of a command, opened once for all commands, and the lines of standard input."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys

from pretrain.errors import DataError

__all__ = ["open_streams", "text_of"]


def open_streams() -> None:
    """Make the standard streams such that a command can use all of them, whatever the locale and the shell say.

    A closed stream becomes one that is at its end and refuses to be written: the first file that is opened would get
    its descriptor, and with it what libraries print. Bytes of input that are no text become lone surrogates, which
    `text_of` finds, and a byte order mark is no part of it. Characters that the output cannot encode are escaped.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDONLY)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = codecs.lookup(sys.stdin.encoding).name
        with contextlib.suppress(io.UnsupportedOperation):  # some of it has been read
            sys.stdin.reconfigure(
                encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="surrogateescape"
            )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def text_of(line: str, number: int) -> str:
    """Return line ``number`` of standard input, which is opened by `open_streams`.

    Raises:
        DataError: a byte of it is invalid in the encoding of standard input.
    """
    bad = re.search("[\udc80-\udcff]", line)
    if bad is None:
        return line
    encoding = sys.stdin.encoding.removesuffix("-sig").upper()
    raise DataError(
        f"Line {number} of standard input is not {encoding}: character {bad.start() + 1} is the byte "
        f"0x{ord(bad[0]) - 0xDC00:02x}. Convert the input with iconv, or name its encoding in the "
        "environment variable PYTHONIOENCODING."
    )
