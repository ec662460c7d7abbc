"""Paths: files of a path, glob or folder, content hashes of files, and the cache directory."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pretrain.data.readers import COMPRESSIONS, FORMATS, found_in_folders
from pretrain.errors import DataError, nearest
from pretrain.utils.files import replace_file

__all__ = ["FileHashes", "cache_home", "find_files", "passed_over", "tar_files"]

_GLOB = "*?["
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
            digest = hashlib.blake2b(digest_size=16)
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
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
    """Return the files of a path, glob or folder, sorted; raise DataError if there are none."""
    try:
        return _find(name)
    except (OSError, RuntimeError, ValueError) as error:
        # The name is too long, contains NUL or "~" with an unknown user, or a folder is not readable.
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        place = str(getattr(error, "filename", None) or name)
        short = place if len(place) <= 200 else place[:200] + "..."
        raise DataError(f"{short!r} cannot be read: {reason}.") from error


def _walk(folder: Path) -> list[Path]:
    """Return the files of supported formats below a folder, excluding hidden ones."""

    def refuse(error: OSError) -> None:
        raise error  # skipping unreadable folders would silently train on less data

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(place) / name for name in names if not name.startswith("."))
        found += [path for path in paths if found_in_folders(path) and path.is_file()]
    return sorted(found)


def passed_over(name: str) -> str:
    """Return a sentence that counts, by suffix, the files of a folder that :func:`find_files` skips, or ""."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return ""
    counts: Counter[str] = Counter()
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others = (Path(name) for name in names if not name.startswith("."))
        counts.update(
            path.suffix.lower() or "without a suffix"
            for path in others
            if not found_in_folders(path)
        )
    if not counts:
        return ""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in ranked[:8])
    more = ", ..." if len(counts) > 8 else ""
    return f"{counts.total():,} files of {name} are no text and passed over: {kinds}{more}"


def _find(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _walk(path)
        if not found:
            kinds = " ".join(sorted(set(FORMATS) - {".json"}))
            prepared = (path / "manifest.json").is_file()
            raise DataError(
                f"the folder {name!r} holds prepared rows, which are used alone and not mixed with text: name the text "
                "that they were made of."
                if prepared
                else f"the folder {name!r} holds no file that can be read ({kinds}, plain or {' '.join(COMPRESSIONS)}; "
                "name a .json file to have it read)."
            )
        return found
    if any(char in name for char in _GLOB):
        found = sorted(
            Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()
        )
        if found:
            return found
        raise DataError(
            f"no file matches {name!r} (looked from {Path.cwd()}). Quote the pattern, and check the folder."
        )
    rows = " In Python, texts themselves are given as rows: [{'text': '...'}, ...]."
    if "\n" in name or len(name) > 255:
        raise DataError(
            f"no such file, but a text of {len(name):,} characters: {name[:40]!r}.{rows}"
        )
    parent = path.parent
    if not parent.is_dir():
        raise DataError(f"no such file: {name!r}; there is no folder {str(parent)!r} either.")
    near = nearest(path.name, sorted(os.listdir(parent)))
    hint = f" Did you mean {str(parent / near)!r}?" if near else f" Looked in {parent.resolve()}."
    if not near and " " in name:
        hint += rows
    raise DataError(f"no such file, folder or pattern: {name!r}.{hint}")


def cache_home() -> Path:
    """Return the cache directory: ``$PRETRAIN_CACHE`` or ``~/.cache/pretrain``."""
    chosen = os.environ.get("PRETRAIN_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "pretrain"


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
