"""The hidden work directory of ``prepare``: locking, disk errors, cleanup, and the final rename."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pretrain.data.manifests import IMAGE_FILES, MANIFEST, TEXT_FILES
from pretrain.errors import DataError
from pretrain.utils import directories
from pretrain.utils.files import fsync_directory

__all__ = ["build", "disk_errors", "foreign", "publish", "sweep"]

_OURS = TEXT_FILES | IMAGE_FILES | {MANIFEST, "tokenizer"}
_OURS_INSIDE = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def foreign(target: Path) -> str | None:
    """Return the first entry of a directory that ``prepare`` did not write, or None if it may be replaced."""
    for name in sorted(os.listdir(target)):
        is_tokenizer = name == "tokenizer"
        if name not in _OURS or (target / name).is_dir() != is_tokenizer:
            return name
        strange = set(os.listdir(target / name)) - _OURS_INSIDE if is_tokenizer else None
        if strange:
            return f"{name}/{min(strange)}"
    return None


def _alive(pid: int) -> bool:
    # Our own pid means an earlier process with the same pid, since containers reuse pids.
    if pid == os.getpid() or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sweep(target: Path, say: Callable[[str], None]) -> None:
    """Clean up after a run that was killed between or after the renames of :func:`publish`.

    Old data that were moved aside are restored if ``target`` does not exist, and deleted otherwise.
    """
    pattern = re.compile(re.escape(f".{target.name}.old-") + r"(\d{1,10})")
    if not target.parent.is_dir():
        return
    for name in sorted(os.listdir(target.parent)):
        found = pattern.fullmatch(name)
        old = target.parent / name
        if not found or _alive(int(found[1])) or old.is_symlink() or not old.is_dir():
            continue
        if not target.exists():
            say(f"{old} was left by a killed run and is renamed back to {target}")
            old.rename(target)
        elif foreign(old) is None:
            shutil.rmtree(old, ignore_errors=True)


def unlink_links(work: Path) -> None:
    """Remove the work directory if it is a link, and links inside it, so that nothing is written through them."""
    if work.is_symlink():
        work.unlink()
    if work.is_dir():
        for entry in [*os.scandir(work)]:
            if entry.is_symlink():
                os.unlink(entry.path)


def remove_unused(folder: Path) -> None:
    """Remove the leftovers of a killed run, unless a running process holds their lock."""
    handle = _try_lock(folder / "lock", wait=False)
    if handle is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _try_lock(file: Path, *, wait: bool) -> int | None:
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        return None
    try:
        import fcntl
    except ImportError:  # no flock on this system: two runs must not share a directory there
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


@contextmanager
def hold(work: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock the work directory; a second process that prepares the same data waits for the first one to finish."""
    handle = _try_lock(work / "lock", wait=False)
    if handle is None:
        say(f"another process is preparing the same data in {work}: waiting for it")
        work.mkdir(exist_ok=True)
        handle = _try_lock(work / "lock", wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def build(
    out: Path,
    fingerprint: str,
    say: Callable[[str], None],
    ready: Callable[[Path], Any],
    begin: Callable[[Path], Any],
    finish: Callable[[Path, Any], None] = lambda work, begun: None,
) -> Path:
    """Build data in a hidden directory beside ``out``, rename it into place, and return where it is.

    Args:
        out: the directory.
        fingerprint: of the content and the options, by which a later run finds what a killed one has done.
        say: prints a line.
        ready: returns what is in the directory if another process has prepared it meanwhile, or None.
        begin: does what cannot be resumed, in the hidden directory; after an error that is removed.
        finish: does the rest, with what ``begin`` returned; after an error a later run goes on from there.
    """
    # Resolved, so that a link keeps pointing to the data and "." has a name.
    target = Path(os.path.realpath(out))
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.preparing-{fingerprint[:12]}"
    for stale in target.parent.glob(glob.escape(f".{target.name}.preparing-") + "[0-9a-f]" * 12):
        if stale != work:
            remove_unused(stale)
    unlink_links(work)
    work.mkdir(exist_ok=True)
    with hold(work, say):
        if ready(target) is not None:
            # Another process has prepared it while this one waited for the lock.
            shutil.rmtree(work, ignore_errors=True)
            return target
        work.mkdir(exist_ok=True)
        directories.sweep(work, exclusive=True)
        try:
            begun = begin(work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
            raise
        finish(work, begun)
        publish(work, target)
    # If `out` is the current directory, the rename has replaced that directory, so only the absolute path is valid.
    return out if (out / MANIFEST).is_file() else target


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Convert OSError into a DataError that says how to proceed."""
    try:
        yield
    except OSError as error:
        place = error.filename or target
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(p for p in (target, *target.parents) if p.exists())).free
            raise DataError(
                f"the disk is full while writing {place}: {free / 1e6:,.0f} MB are free. Finished work is kept; "
                "free disk space and run the same command again to continue."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(
                f"{place} cannot be written ({error.strerror}); choose another `out`, or change the permissions."
            ) from error
        raise DataError(f"{place}: {error.strerror or error} while preparing data.") from error


def publish(work: Path, target: Path) -> None:
    """Rename finished data to ``target``; data that were there before are deleted only after the rename.

    Raises:
        DataError: ``target`` contains a file that ``prepare`` did not write.
    """
    for name in ("journal.json", "scan.json", "states.bin"):
        (work / name).unlink(missing_ok=True)
    fsync_directory(work)
    old = None
    if target.exists():
        strange = foreign(target)
        if strange is not None:
            raise DataError(
                f"{target} is not replaced: {strange!r} appeared in it during preparation and was not written by "
                "prepare. Move it away, or choose another `out`."
            )
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
    (work / "lock").unlink(missing_ok=True)
    work.rename(target)
    fsync_directory(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
