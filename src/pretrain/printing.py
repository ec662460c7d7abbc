"""Text on a terminal: the one place where what others wrote is made harmless before it is printed.

Control characters can drive a terminal, and direction and zero-width characters make a text look like another one.
Everything that is printed goes through `printable`; files keep the true text.
"""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]


def printable(text: str, *, lines: bool = False) -> str:
    """A text in which every character is one that can be seen; others are spelt as in Python's ``repr``.

    Args:
        text: of anybody, also with halves of surrogate pairs.
        lines: keep its lines, and tabs as the blanks that they stand for; else all of it comes on one line.
    """
    if lines:
        text = text.replace("\r\n", "\n").expandtabs()
        return "\n".join(map(_visible, text.split("\n")))
    return _visible(text.replace("\n", " ").replace("\t", " "))


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )
