"""A built-in classification data set: pieces of the standard library, labelled with their package.

The rows are split by file, so that no test row is adjacent to a training row, and the files of the test rows can be
excluded from pre-training too. Giveaways are removed: import statements are dropped, and the names of the packages are
replaced by one word wherever they occur.
"""

from __future__ import annotations

import random
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.data.sources import PythonSource
from pretrain.errors import DataError

__all__ = ["PACKAGES", "PythonWithout", "Snippets", "snippets"]

PACKAGES = (
    "asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "xml", "ctypes",
    "http", "urllib", "concurrent", "logging", "json", "sqlite3",
)  # fmt: skip
"""Packages to classify, in order of preference; some systems do not install all of them."""

_MASK = "package"
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+[\w.]+[ \t]+import[ \t]*(?:\([^)]*\)|.*(?:\\\n.*)*)|import[ \t]+\w.*)$",
    re.M,
)


class PythonWithout(PythonSource):
    """The built-in corpus without some of its modules.

    Args:
        left_out: the excluded modules, as paths relative to the library (``"xml/dom/minidom.py"``).
    """

    def __init__(self, left_out: Sequence[str]) -> None:
        super().__init__()
        self.left_out = frozenset(left_out)

    def files(self) -> list[Path]:
        """Return the remaining modules, sorted by name."""
        return [
            path
            for path in super().files()
            if path.relative_to(self.root).as_posix() not in self.left_out
        ]


@dataclass
class Snippets:
    """Labelled pieces of the standard library; a row is ``{"text", "label", "file"}``.

    Attributes:
        packages: the labels.
        train, valid, test: the rows of each split, with equally many of each package.
        held_out: modules of the validation and test rows.
    """

    packages: list[str]
    train: list[dict[str, str]] = field(default_factory=list)
    valid: list[dict[str, str]] = field(default_factory=list)
    test: list[dict[str, str]] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


def snippets(
    counts: tuple[int, int, int],
    *,
    seed: int = 0,
    lines: int = 6,
    packages: int = 8,
    source: PythonSource | None = None,
) -> Snippets:
    """Split modules of the standard library into labelled pieces.

    Args:
        counts: rows of each package for training, validation and test; packages with fewer are skipped.
        seed: determines the files of each split and the pieces of each file.
        lines: lines per piece; blank lines are dropped and not counted.
        packages: maximum number of packages.
        source: source of the modules; default: the library of the running Python.

    Raises:
        DataError: fewer than two packages have enough lines.
    """
    source = source or PythonSource()
    names = {path: path.relative_to(source.root).as_posix() for path in source.files()}
    grouped: dict[str, list[tuple[str, list[str]]]] = {name: [] for name in PACKAGES}
    mask = re.compile("|".join(PACKAGES), re.I)
    for path, name in names.items():
        package = name.partition("/")[0]
        if package in grouped and "/" in name:
            pieces = list(_pieces(path, lines, mask))
            if pieces:
                grouped[package].append((name, pieces))
    found = Snippets([])
    for package, files in grouped.items():
        parts = _parts(files, counts, random.Random(f"{seed} {package}"))
        if parts is None or len(found.packages) == packages:
            continue
        found.packages.append(package)
        for rows, part in zip((found.train, found.valid, found.test), parts, strict=True):
            rows += [{"text": text, "label": package, "file": file} for file, text in part]
    if len(found.packages) < 2:
        raise DataError(
            f"The standard library in {source.root} has fewer than two packages with {sum(counts)} pieces of "
            f"{lines} lines each (looked for: {', '.join(PACKAGES)}). Use a Python whose library lies there as .py "
            "files, or label rows of your own."
        )
    found.held_out = sorted({row["file"] for row in found.valid + found.test})
    for index, rows in enumerate((found.train, found.valid, found.test)):
        random.Random(f"{seed} {index}").shuffle(rows)
    return found


def _pieces(path: Path, lines: int, mask: re.Pattern[str]) -> Iterator[str]:
    """Yield non-overlapping pieces of consecutive lines of a module, without imports and names of packages."""
    try:
        with tokenize.open(path) as stream:
            text = stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return
    kept = [line for line in _IMPORT.sub("", text).splitlines() if line.strip()]
    for first in range(0, len(kept) - lines + 1, lines):
        yield mask.sub(_MASK, "\n".join(kept[first : first + lines]))


Part = list[tuple[str, str]]


def _parts(
    files: list[tuple[str, list[str]]], counts: tuple[int, int, int], rng: random.Random
) -> tuple[Part, Part, Part] | None:
    """Assign whole files to training, validation and test, and return ``counts`` pieces of each; None if too few."""
    files = list(files)
    rng.shuffle(files)
    total = sum(len(pieces) for _, pieces in files)
    parts: list[list[tuple[str, list[str]]]] = [[], [], []]
    # The remaining files, including those too long for test and validation, are for training.
    for index in (2, 1):
        wanted = max(counts[index], total * counts[index] // sum(counts) // 2)
        have = 0
        for file in list(files):
            if have < wanted and len(file[1]) <= max(wanted, total // 3):
                parts[index].append(file)
                files.remove(file)
                have += len(file[1])
    parts[0] = files
    chosen = [_pieces_in_turn(part, count, rng) for part, count in zip(parts, counts, strict=True)]
    if any(len(part) < count for part, count in zip(chosen, counts, strict=True)):
        return None
    return chosen[0], chosen[1], chosen[2]


def _pieces_in_turn(files: list[tuple[str, list[str]]], count: int, rng: random.Random) -> Part:
    """Return random pieces, taken from the files in turn, so that a long file does not dominate its package."""
    waiting = [(name, rng.sample(pieces, len(pieces))) for name, pieces in files]
    chosen: Part = []
    while waiting and len(chosen) < count:
        waiting = [(name, pieces) for name, pieces in waiting if pieces]
        chosen += [(name, pieces.pop()) for name, pieces in waiting]
    return chosen[:count]
