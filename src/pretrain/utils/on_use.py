"""Names of a package that are imported when they are first used, so that a run loads only what it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["on_use"]


def on_use(package: str, places: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: the package.
        places: module -> names of it that the package has too; a module of the package is a name itself.
    """

    def find(name: str) -> Any:
        for place, names in places.items():
            if place == f"{package}.{name}":
                return importlib.import_module(place)
            if name in names:
                return getattr(importlib.import_module(place), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
