"""Atomic publishing of directories, and removal of the leftovers of interrupted saves.

A directory is written beside its target under a temporary name with a fixed pattern, then renamed. Only names of that
pattern are ever removed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
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
    "keep_foreign",
    "make_directories",
    "moved_aside",
    "name_aside",
    "publish",
    "removal_errors_reported",
    "remove_tree",
    "replace",
    "sweep",
    "temporary_directory",
    "temporary_name",
    "unused",
]

# new: being written. old: moved aside while it is replaced. gone: rotated out, being deleted.
_TEMPORARY = re.compile(r"^\.pretrain-(new|old|gone)-(\d{1,10})-[0-9a-f]{8}-(.+)$")
_START = 1 << 20  # bytes of a file in which its mark is looked for
GRACE = 8.0  # seconds to wait until a network file system shows what another host has created
_active: set[str] = set()  # temporary directories that threads of this process are writing
_reported: set[str] = set()  # paths that could not be removed and have been reported


@contextlib.contextmanager
def removal_errors_reported(path: Path) -> Iterator[None]:
    """Report an OSError of a removal inside the block on stderr, once per path, instead of raising it.

    The next save tries again. Such an error must not end a run: the checkpoints to keep are durable by then, or not
    affected.
    """
    try:
        yield
    except FileNotFoundError:  # another process has removed it
        pass
    except OSError as error:
        if str(path) not in _reported:
            _reported.add(str(path))
            where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
            note(
                f"{path} cannot be removed: {error.strerror or error}{where}. The next saves try again; on a network "
                "file system, a program that still has one of its files open prevents it."
            )


def remove_tree(path: Path) -> None:
    """Delete a directory tree through `IO`; links inside are unlinked, never followed.

    Raises:
        OSError: the first entry that could not be deleted; all others have been deleted.
    """
    failure: OSError | None = None
    for entry in sorted(os.scandir(path), key=lambda item: item.name):
        try:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            else:
                files.IO.unlink(Path(entry.path))
        except FileNotFoundError:  # another process has removed it
            continue
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    files.IO.rmdir(path)


def unused(paths: Iterable[Path]) -> Path:
    """Return the first of some paths at which there is nothing, not even a broken link."""
    return next(path for path in paths if not os.path.lexists(path))


def name_aside(path: Path) -> Path:
    """Return the unused name beside a path to which what stands there is moved: ``NAME.other``, ``NAME.other1``, ..."""
    return unused(path.with_name(f"{path.name}.other{k or ''}") for k in itertools.count())


def keep_foreign(path: Path, mark: bytes) -> None:
    """Rename a file that will be replaced, unless ``mark`` in it tells that it was written here, and say so.

    A run may be told to write into a directory of the user's, with a README.md or the run.yaml that it is started from.
    """
    # Where it cannot be renamed it cannot be replaced, which has its own error.
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_file():
            return
        with path.open("rb") as file:
            start = file.read(_START)
        if start and mark not in start:
            aside = name_aside(path)
            os.rename(path, aside)
            note(f"{path} was not written by a run. It is kept as {aside.name}, and replaced.")


def appears(path: Path) -> bool:
    """Whether what another host has created is visible here; waits for at most `GRACE` seconds."""
    end = time.monotonic() + GRACE
    while True:
        with contextlib.suppress(OSError):
            # Listing the parent queries the server, whereas a negative lookup of the name may be cached.
            if path.name in os.listdir(path.parent) and path.exists():
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


@contextlib.contextmanager
def temporary_directory(target: Path) -> Iterator[Path]:
    """Create a sibling directory to write to and `publish`; it is removed again unless published."""
    path = temporary_name(target, "new")
    _active.add(str(path))
    try:
        files.IO.mkdir(path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # does nothing once it is published (renamed)
        _active.discard(str(path))


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished directory to its target, durably; an existing target is kept until then."""
    if not os.path.lexists(target):
        files.IO.rename(temporary, target)
        fsync_directory(target.parent)
        return
    aside = temporary_name(target, "old")
    # If the process is killed after this rename, `sweep` restores the name, and `latest` reads the directory in place.
    files.IO.rename(target, aside)
    try:
        files.IO.rename(temporary, target)
    except OSError:
        files.IO.rename(aside, target)
        raise
    fsync_directory(target.parent)
    with removal_errors_reported(aside):
        remove_tree(aside)


def replace(temporary: Path, target: Path) -> None:
    """Like `publish`, but readers find one of the two under the name at every moment, where the system can swap names.

    Without such a call (it is Linux's, on most local file systems) there is a moment between the two renames of
    `publish`.
    """
    if not os.path.lexists(target) or not files.IO.exchange(temporary, target):
        publish(temporary, target)
        return
    fsync_directory(target.parent)
    with removal_errors_reported(temporary):
        remove_tree(temporary)


def discard(path: Path) -> None:
    """Delete a directory, renaming it first so that it is never seen half deleted; errors are only reported."""
    gone = temporary_name(path, "gone")
    with removal_errors_reported(path):
        files.IO.rename(path, gone)
        with removal_errors_reported(gone):
            remove_tree(gone)


def moved_aside(directory: Path) -> dict[str, Path]:
    """Return the directories whose replacement was interrupted: original name -> current path."""
    found = {}
    for name in sorted(os.listdir(directory)):
        match = _TEMPORARY.match(name)
        if match and match[1] == "old" and not os.path.lexists(directory / match[3]):
            found[match[3]] = directory / name
    return found


def sweep(directory: Path, *, name: str | None = None, exclusive: bool = False) -> list[str]:
    """Remove the leftovers of interrupted saves from `directory`; only names of the temporary pattern are touched.

    A directory whose replacement was interrupted gets its name back. Errors are handled by `removal_errors_reported`.

    Args:
        directory: directory in which checkpoints are written.
        name: remove only leftovers of this target.
        exclusive: the caller holds the run lock, so no other process can be writing; otherwise leftovers of
            processes that are still alive are kept.

    Returns:
        The names that were removed or restored.
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
        with removal_errors_reported(path):
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
    """Check before training that the first save will not fail: permissions, free space, and that it is a directory.

    Args:
        run_dir: the run directory; created if absent.
        needed_bytes: free bytes that the run will need, `(keep + 1) * estimated_size(model)`.

    Raises:
        CheckpointError: the text names the path, and the bytes needed and free.
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
    """Create a directory and its missing parents durably, flushing the parent of each."""
    if not path.is_dir():
        make_directories(path.parent)
        with contextlib.suppress(FileExistsError):
            files.IO.mkdir(path)
        fsync_directory(path.parent)
