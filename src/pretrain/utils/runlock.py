"""One run, one directory: a lock that the system itself gives back when the process dies.

`flock` on a file in the run directory, which also says who holds it. No lease, no clock, no stale lock.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from pretrain.errors import CheckpointError, RunLocked
from pretrain.utils import directories, files

__all__ = ["RunLock", "is_held"]

NAME = "run.lock"
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """Hold a run directory for this process; a context manager.

    On entry leftovers of killed saves are swept, since nobody else can be writing.

    Raises:
        RunLocked: another live process holds it; the error has `pid`, `host` and `since`.
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(os.path.abspath(run_dir))
        self._descriptor = -1

    def acquire(self) -> RunLock:
        """Take the lock at once or raise; taking it twice with one object is one lock."""
        if self._descriptor >= 0:
            return self
        path = self.run_dir / NAME
        with files.writing(self.run_dir):
            directories.make_directories(self.run_dir)
            while self._descriptor < 0:
                descriptor = files.IO.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
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
                f"{self.run_dir}: this file system cannot lock ({error.strerror}); start only one run here."
            )
        with contextlib.suppress(
            FileNotFoundError
        ):  # the holder removed the file between our open and lock
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
        """Give the directory back and remove the lock file."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.run_dir / NAME)
            self._drop()

    def _drop(self) -> None:
        """Close our copy; in a forked child this leaves the parent's lock as it is."""
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


def _locked(run_dir: Path, descriptor: int) -> CheckpointError:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return RunLocked(int(who["pid"]), str(who["host"]), str(who["since"]), run_dir)
    except (ValueError, KeyError, TypeError):  # taken this instant, not signed yet
        return RunLocked(0, "an unknown host", "now", run_dir)


def _forget_in_child() -> None:
    for lock in list(_held):
        lock._drop()


os.register_at_fork(after_in_child=_forget_in_child)
