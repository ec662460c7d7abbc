"""Paths: files of a path, glob or folder, content hashes of files, and the cache directory."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pretrain.data.readers import COMPRESSIONS, FORMATS, found_in_folders
from pretrain.errors import DataError, nearest
from pretrain.utils.files import replace_file

__all__ = [
    "FileHashes",
    "cache_home",
    "find_files",
    "hidden",
    "path_from",
    "shortened_path",
    "skipped_files_note",
    "tar_files",
    "walk",
]  # fmt: skip

_GLOB = "*?["
_ROWS = " In Python, texts themselves are given as rows: [{'text': '...'}, ...]."
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # {00000..00099}, as WebDataset spells several archives


class FileHashes:
    """Content hashes of files, cached by path, size, times and inode.

    A hash is cached only if the file was at least two seconds old when it was hashed, because a file that is rewritten
    within one tick of the file system clock keeps its modification time.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if memory is not None:
            try:
                known = json.loads(memory.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}
            except (OSError, ValueError):
                self._known = {}  # an unreadable cache only costs time

    def of(self, path: Path) -> str:
        """Return the hash of a file's bytes."""
        try:
            status = path.stat()
            key = str(path.resolve())
            entry = self._known.get(key)
            # Size and mtime can be preserved on a changed file (cp -p, tar); ctime and inode cannot.
            mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if isinstance(entry, list) and len(entry) == 5 and entry[:4] == mark:
                return str(entry[4])
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > 2_000_000_000:
            self._known[key] = [*mark, digest.hexdigest()]
            self._changed = True
        return digest.hexdigest()

    def save(self) -> None:
        """Write the cache file, if there is one and it changed; errors are ignored."""
        if self.memory is None or not self._changed:
            return
        try:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.memory, json.dumps(self._known).encode())
        except OSError:
            return


def find_files(name: str) -> list[Path]:
    """Return the files of a path, folder or pattern, sorted; a folder that a pattern matches is read like one named.

    Links are followed, and no folder is read twice.

    Raises:
        DataError: there are none, or a folder cannot be read.
    """
    try:
        return _find(name)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise _is_text(name) from error
        # The name contains NUL or "~" with an unknown user, or a folder is not readable.
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        place = getattr(error, "filename", None) or name
        raise DataError(f"{shortened_path(place)!r} cannot be read: {reason}.") from error


def walk(
    folder: Path, visited: set[tuple[int, int]] | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, each with the names of its files; hidden ones and those of macOS are left out.

    Links are followed. A folder to which several paths lead, such as a link to a folder above it, is read once.

    Args:
        folder: the first folder.
        visited: device and inode of the folders that have been read, which are left out and added to.

    Raises:
        DataError: a folder cannot be read; without it a run would silently train on less data.
    """

    def refuse(error: OSError) -> None:
        place = shortened_path(error.filename)
        raise DataError(f"{place!r} cannot be read: {error.strerror or error}.") from error

    visited = set() if visited is None else visited
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (at := _identity(Path(place))) in visited:
            folders.clear()
            continue
        visited.add(at)
        folders[:] = sorted(name for name in folders if not hidden(name))
        yield Path(place), [name for name in names if not hidden(name)]


def hidden(name: str) -> bool:
    """Whether a name in a folder is hidden, or one that archives of macOS add."""
    return name.startswith(".") or name == "__MACOSX"


def path_from(folder: Path, file: Path) -> str:
    """Return the path of a file as a table in a folder names it: relative to the folder, or absolute on another drive.

    Links to folders are followed, because ``..`` leads out of the folder that a link names.
    """
    absolute = os.path.join(os.path.realpath(file.parent), file.name)
    try:
        return Path(os.path.relpath(absolute, os.path.realpath(folder))).as_posix()
    except ValueError:
        return absolute


def shortened_path(name: Any) -> str:
    """Return a path for a message, shortened, because users may give a whole text in place of a path."""
    return str(name) if len(str(name)) <= 200 else f"{str(name)[:200]}..."


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _matches(path: Path) -> list[Path]:
    """Return a file or folder, or the files and folders that match a pattern, sorted."""
    if path.is_file() or path.is_dir():
        return [path]
    return sorted(map(Path, glob.glob(str(path), recursive=True)))


def _entries(matches: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield files, and those below folders, each once; the second value says whether it is one of ``matches`` itself.

    Such a file is read whatever its suffix is.
    """
    visited, yielded = set[tuple[int, int]](), set[tuple[int, int, str]]()
    named = ((match, True) for match in matches if match.is_file())
    below = (
        (place / name, False)
        for match in matches
        if match.is_dir()
        for place, names in walk(match, visited)
        for name in names
    )
    for file, is_named in chain(named, below):
        # Several paths lead into a folder if there is a link to it.
        key = (*_identity(file.parent), file.name)
        if key not in yielded:
            yielded.add(key)
            yield file, is_named


def skipped_files_note(name: str) -> str:
    """Return a sentence that counts, by suffix, the files in folders that :func:`find_files` skips, or ""."""
    counts = Counter(
        file.suffix.lower() or "without a suffix"
        for file, is_named in _entries(_matches(Path(os.path.expanduser(name))))
        if not is_named and not found_in_folders(file)
    )
    if not counts:
        return ""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in ranked[:8])
    more = ", ..." if len(counts) > 8 else ""
    return f"{counts.total():,} files of {name} are no text and passed over: {kinds}{more}"


def _find(name: str) -> list[Path]:
    path = Path(os.path.expanduser(name))
    matches = _matches(path)
    found = sorted(
        file
        for file, is_named in _entries(matches)
        if is_named or (found_in_folders(file) and file.is_file())
    )
    if found:
        return found
    if folders := [match for match in matches if match.is_dir()]:
        what = (
            f"the folder {name!r} holds" if folders == [path] else f"the folders of {name!r} hold"
        )
        if any((folder / "manifest.json").is_file() for folder in folders):
            raise DataError(
                f"{what} prepared rows, which are used alone and not mixed with text: name the text that they were "
                "made of."
            )
        kinds = " ".join(sorted(set(FORMATS) - {".json"}))
        raise DataError(
            f"{what} no file that can be read ({kinds}, plain or {' '.join(COMPRESSIONS)}; name a .json file to have "
            "it read)."
        )
    is_pattern = any(char in name for char in _GLOB)
    if "\n" in name or (len(name) > 255 and not is_pattern):
        raise _is_text(name)
    if is_pattern:
        raise DataError(
            f"no file matches {name!r} (looked from {Path.cwd()}). Quote the pattern, and check the folder."
        )
    parent = path.parent
    if not parent.is_dir():
        raise DataError(f"no such file: {name!r}; there is no folder {str(parent)!r} either.")
    near = nearest(path.name, sorted(os.listdir(parent)))
    hint = f" Did you mean {str(parent / near)!r}?" if near else f" Looked in {parent.resolve()}."
    if not near and " " in name:
        hint += _ROWS
    raise DataError(f"no such file, folder or pattern: {name!r}.{hint}")


def _is_text(name: str) -> DataError:
    return DataError(f"no such file, but a text of {len(name):,} characters: {name[:40]!r}.{_ROWS}")


def cache_home() -> Path:
    """Return the cache directory: ``$PRETRAIN_CACHE`` or ``~/.cache/pretrain``."""
    chosen = os.environ.get("PRETRAIN_CACHE")
    return Path(os.path.expanduser(chosen)) if chosen else Path.home() / ".cache" / "pretrain"


def tar_files(name: str | Path) -> list[Path]:
    """Return the archives of a path, a pattern (``train-*.tar``) or a range (``train-{000..099}.tar``), in order.

    Raises:
        DataError: there are none, or one of the range is missing.
    """
    spelled = os.path.expanduser(str(name))
    if (found := _RANGE.search(spelled)) is None:
        paths = [Path(spelled)] if os.path.exists(spelled) else []
        paths = paths or [Path(file) for file in sorted(glob.glob(spelled))]
    else:
        low, high, width = int(found[1]), int(found[2]), len(found[1])
        paths = [
            Path(spelled[: found.start()] + f"{i:0{width}}" + spelled[found.end() :])
            for i in range(low, high + 1)
        ]
        if missing := [path for path in paths if not path.is_file()]:
            raise DataError(
                f"{name}: {len(missing):,} of {len(paths):,} archives do not exist, such as {missing[0]}. Correct the "
                "range, or copy them again."
            )
    if not paths:
        raise DataError(f"{name} names no file.")
    return paths
