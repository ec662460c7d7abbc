"""Directories that appear whole or not at all, and the litter of saves that were killed.

A directory is filled under a name of our own pattern beside its place, then renamed. Only names of that pattern are
ever swept.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.errors import CheckpointError
from pretrain.utils import files
from pretrain.utils.files import (
    fsync_directory,
    note,
    temporary_name,
    write_file,
    writing,
)

__all__ = [
    "appears",
    "check_writable",
    "discard",
    "make_directories",
    "moved_aside",
    "publish",
    "remove_tree",
    "spared",
    "sweep",
    "temporary_directory",
    "temporary_name",
]

# new: being written. old: moved aside for its successor. gone: rotated out, being deleted.
_TEMPORARY = re.compile(r"^\.pretrain-(new|old|gone)-(\d{1,10})-[0-9a-f]{8}-(.+)$")
GRACE = 8.0  # seconds in which a network file system must show what another host has made
_active: set[str] = set()  # temporary directories that a thread of this process is filling
_told: set[str] = set()  # what could not be cleared away, and was named


@contextlib.contextmanager
def spared(path: Path) -> Iterator[None]:
    """What cannot be cleared away inside is named on stderr, once, and left for the next save.

    It is no reason to end a run: whatever counts is durable by then, or is not touched by it.
    """
    try:
        yield
    except FileNotFoundError:  # somebody else has cleared it away
        pass
    except OSError as error:
        if str(path) not in _told:
            _told.add(str(path))
            where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
            note(
                f"{path} cannot be cleared away: {error.strerror or error}{where}. It stays until a later save "
                "can do it; on a network file system a program that still has one of its files open is in the way."
            )


def remove_tree(path: Path) -> None:
    """Delete a directory of ours through `IO`; links inside are unlinked, never followed.

    Raises:
        OSError: the first thing that could not be deleted; everything else is gone all the same.
    """
    failure: OSError | None = None
    for entry in sorted(os.scandir(path), key=lambda item: item.name):
        try:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            else:
                files.IO.unlink(Path(entry.path))
        except FileNotFoundError:  # somebody else was quicker
            continue
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    files.IO.rmdir(path)


def appears(path: Path) -> bool:
    """Whether a directory that another host has made is seen here; waits for at most `GRACE` seconds."""
    end = time.monotonic() + GRACE
    while True:
        with contextlib.suppress(OSError):
            # Reading the directory above asks the server; that a name is absent may be cached.
            if path.name in os.listdir(path.parent) and path.is_dir():
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


@contextlib.contextmanager
def temporary_directory(target: Path) -> Iterator[Path]:
    """Make a sibling directory to fill and `publish`; what is not published is removed again."""
    path = temporary_name(target, "new")
    _active.add(str(path))
    try:
        files.IO.mkdir(path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # gone under this name once published
        _active.discard(str(path))


def publish(temporary: Path, target: Path) -> None:
    """Give a finished directory its name, durably; an older one of that name is kept until then."""
    if not os.path.lexists(target):
        files.IO.rename(temporary, target)
        fsync_directory(target.parent)
        return
    aside = temporary_name(target, "old")
    files.IO.rename(
        target, aside
    )  # killed here: `sweep` gives the name back, `latest` reads it where it is
    try:
        files.IO.rename(temporary, target)
    except OSError:
        files.IO.rename(aside, target)
        raise
    fsync_directory(target.parent)
    with spared(aside):
        remove_tree(aside)


def discard(path: Path) -> None:
    """Delete a directory so that no half of it ever stands under its name; what cannot be deleted is `spared`."""
    gone = temporary_name(path, "gone")
    with spared(path):
        files.IO.rename(path, gone)
        with spared(gone):
            remove_tree(gone)


def moved_aside(directory: Path) -> dict[str, Path]:
    """Directories whose replacement was cut short: original name -> where they lie now."""
    found = {}
    for name in sorted(os.listdir(directory)):
        match = _TEMPORARY.match(name)
        if match and match[1] == "old" and not os.path.lexists(directory / match[3]):
            found[match[3]] = directory / name
    return found


def sweep(directory: Path, *, name: str | None = None, exclusive: bool = False) -> list[str]:
    """Clear away what killed saves left in `directory`; touches only names of our own pattern.

    What cannot be deleted is `spared`.

    Args:
        directory: where checkpoints are written.
        name: only leftovers of this target.
        exclusive: the caller holds the lock, so nobody else can be writing; otherwise leftovers of a
            process that is still alive stay.
    """
    swept = []
    aside = moved_aside(directory)
    for entry in sorted(os.listdir(directory)):
        match, path = _TEMPORARY.match(entry), directory / entry
        if not match or (name is not None and match[3] != name) or str(path) in _active:
            continue
        pid = int(match[2])
        if not exclusive and pid != os.getpid() and _alive(pid):
            continue
        with spared(path):
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode):
                files.IO.unlink(path)
            elif not stat.S_ISDIR(mode):
                continue
            elif aside.get(match[3]) == path:
                files.IO.rename(path, directory / match[3])
            else:
                remove_tree(path)
            swept.append(entry)
    return swept


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def check_writable(run_dir: str | Path, needed_bytes: int = 0) -> None:
    """Refuse at the start what would fail at the first save: no permission, no space, not a directory.

    Args:
        run_dir: made if absent.
        needed_bytes: free bytes that the run will need, `(keep + 1) * estimated_size(model)`.

    Raises:
        CheckpointError: with the path, and the bytes needed and free.
    """
    path = Path(os.path.abspath(run_dir))
    if os.path.lexists(path) and not path.is_dir():
        raise CheckpointError(f"{run_dir} is not a directory. Choose another output directory.")
    with writing(path, needed_bytes):
        make_directories(path)
        probe = temporary_name(path / "probe", "new")
        try:
            write_file(probe, b"pretrain")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(probe)
        if (free := files.free_bytes(path)) < needed_bytes:
            raise CheckpointError(
                f"Too little space for the checkpoints of this run: {run_dir} needs {needed_bytes:,} bytes, "
                f"{free:,} bytes are free. Free some space, lower `keep`, or choose another disk."
            )


def make_directories(path: Path) -> None:
    """Make a directory and its parents, each durable in the one above it."""
    if not path.is_dir():
        make_directories(path.parent)
        with contextlib.suppress(FileExistsError):
            files.IO.mkdir(path)
        fsync_directory(path.parent)
