"""The documents of a source as the tests compare them."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.data.sources import Source


def documents(source: Source) -> Iterator[str]:
    parts: list[str] = []
    for text, end in source.pieces():
        parts.append(text)
        if end:
            yield "".join(parts)
            parts.clear()
