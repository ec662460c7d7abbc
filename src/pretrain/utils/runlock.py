"""Lock of a run directory, which the system releases when the process ends.

It uses `flock` on a file in the run directory that names the holder. There are no leases or clocks, and no stale locks.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import stat
import weakref
from pathlib import Path

from pretrain.errors import CheckpointError, RunLocked
from pretrain.utils import directories, files

__all__ = ["RunLock", "is_held"]

NAME = "run.lock"
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """Lock a run directory for this process; a context manager.

    On entry leftovers of interrupted saves are removed, because no other process can be writing.

    Raises:
        RunLocked: another live process holds the lock; the error has `pid`, `host` and `since`.
        CheckpointError: the directory cannot be written, or run.lock in it is no plain file.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(os.path.abspath(run_dir))
        self._descriptor = -1

    def acquire(self) -> RunLock:
        """Acquire the lock without waiting, or raise an error; does nothing if this object holds it already."""
        if self._descriptor >= 0:
            return self
        path = self.run_dir / NAME
        _refuse_others(path)
        with files.writing(self.run_dir):
            while self._descriptor < 0:
                directories.make_directories(self.run_dir)
                try:
                    descriptor = files.IO.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
                except FileNotFoundError:
                    if os.path.lexists(self.run_dir):
                        raise
                    continue  # a run that failed before it began has removed it
                try:
                    self._try(descriptor, path)
                except BaseException:
                    os.close(descriptor)
                    raise
            self._say_who()
            _held.add(self)
            directories.sweep(self.run_dir, exclusive=True)
        return self

    def _try(self, descriptor: int, path: Path) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _locked(self.run_dir, descriptor) from None
            files.note(
                f"{self.run_dir}: this file system cannot lock files ({error.strerror}), so a second run here would "
                "not be refused. Start only one."
            )
        # The previous holder may have removed the file between our open and lock; then `acquire` tries again.
        with contextlib.suppress(FileNotFoundError):
            ours, named = os.fstat(descriptor), os.lstat(path)
            if (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino):
                self._descriptor = descriptor
                return
        os.close(descriptor)

    def _say_who(self) -> None:
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(who).encode(), 0)

    def release(self) -> None:
        """Release the lock and remove the lock file."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.run_dir / NAME)
            self._drop()

    def _drop(self) -> None:
        """Close the descriptor; in a forked child this does not release the lock of the parent."""
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        with contextlib.suppress(OSError):
            os.close(descriptor)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(run_dir: str | Path) -> bool:
    """Whether this process holds the lock of `run_dir`."""
    path = Path(os.path.abspath(run_dir))
    return any(lock.run_dir == path for lock in _held)


def _refuse_others(path: Path) -> None:
    """Raise CheckpointError if something that is no plain file stands in the place of the lock file."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # there is none, or opening it says why not
        return
    if stat.S_ISREG(mode):
        return
    kind = "a directory" if stat.S_ISDIR(mode) else "a special file"
    if stat.S_ISLNK(mode):
        kind = f"a symbolic link to {os.readlink(path)}"
    raise CheckpointError(
        f"{path} is {kind}, but a run locks its directory by a plain file of that name, which it makes and removes "
        "itself. pretrain has not made what is there: remove it or move it away, and start again."
    )


def _locked(run_dir: Path, descriptor: int) -> CheckpointError:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return RunLocked(int(who["pid"]), str(who["host"]), str(who["since"]), run_dir)
    except (ValueError, KeyError, TypeError):  # the holder has not written its name yet
        return RunLocked(
            0,
            "an unknown host",
            "an unknown time (the lock file does not name its holder)",
            run_dir,
        )


def _forget_in_child() -> None:
    for lock in list(_held):
        lock._drop()


os.register_at_fork(after_in_child=_forget_in_child)
