"""Run directory: removal of a new one after a failed start, and fallback for one that is deleted, emptied or renamed.

A new directory is removed if the run fails before its first step. A run whose directory disappears saves its last
checkpoint in a fallback directory beside it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pretrain.checkpoint.best import COMPARISON, SWEEP
from pretrain.checkpoint.manifest import run_checkpoints
from pretrain.training.logging import RunLog
from pretrain.utils import runlock
from pretrain.utils.directories import make_directories, name_aside, unused
from pretrain.utils.files import note, replace_file, writing

__all__ = ["NewRunDirectory", "RunDirectory"]

_WRITTEN = ("run.yaml", SWEEP, "log.jsonl")  # what a run writes before it begins
_INTERVAL = 1.0  # seconds between two checks


class NewRunDirectory:
    """A run directory that is not expected to exist yet, for clean-up; one that exists already is left as it is.

    Args:
        path: directory of the run, before it is created.
        is_rank_zero: whether this is rank zero, which writes there.
    """

    def __init__(self, path: Path, is_rank_zero: bool) -> None:
        self.path, self._new = path, is_rank_zero and not os.path.lexists(path)

    @contextlib.contextmanager
    def emptied_on_failure(self) -> Iterator[None]:
        """Remove the files of the run if it fails inside the block; the caller holds the lock, against other runs."""
        try:
            yield
        except BaseException:
            if self._new and not self._has_begun():
                for name in _WRITTEN:
                    with contextlib.suppress(OSError):
                        (self.path / name).unlink()
                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            raise

    @contextlib.contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove the directory if the run fails inside the block and left it empty; the lock is released by then."""
        try:
            yield
        except BaseException:
            if self._new:
                with contextlib.suppress(OSError):  # it is not empty, or another run has locked it
                    os.rmdir(self.path)
            raise

    def _has_begun(self) -> bool:
        try:
            return bool(run_checkpoints(self.path)) or (self.path / "log.jsonl").stat().st_size > 0
        except FileNotFoundError:
            return False
        except (
            OSError
        ):  # such as too many open files, or a lost disk: a directory that cannot be read is kept
            return True


class RunDirectory:
    """The run directory, held open so that a rename or deletion can be detected and named.

    Args:
        path: the run directory, which contains the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._next = 0.0
        self._kept: dict[str, bytes] = {}
        for name in ("run.yaml", SWEEP, COMPARISON):
            with contextlib.suppress(OSError):
                self._kept[name] = (self.path / name).read_bytes()

    def lost(self, *, now: bool = False) -> bool:
        """Whether the run directory is no longer at its path; checks at most once a second unless ``now``."""
        if not now and time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _INTERVAL
        # By its files: some network file systems change inodes, and a saver may have created an empty directory.
        return not any(os.path.lexists(self.path / name) for name in (runlock.NAME, "log.jsonl"))

    def what_happened(self) -> str:
        """Return "emptied", "renamed to PATH", or "deleted or renamed" where the system does not say which."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                return "emptied (run.lock and log.jsonl are gone)"
        with contextlib.suppress(OSError):
            now = os.readlink(f"/proc/self/fd/{self._descriptor}")
            if os.fstat(self._descriptor).st_nlink and os.path.isdir(now):
                return f"renamed to {now}"
        return "deleted or renamed"

    def fallback_path(self) -> Path:
        """Return an unused path beside the run directory, for the checkpoint of a run that has lost it."""
        return unused(self.path.with_name(f"{self.path.name}.rescued-{k}") for k in count(1))

    def way_back(self, fallback: Path) -> str:
        """Return the command that gives the fallback directory the name of the run; a directory of that name is kept.

        A directory that is empty is removed here, because `mv` would move the fallback directory into it.
        """
        with contextlib.suppress(OSError):
            os.rmdir(self.path)
        moves = [(fallback, self.path)]
        if os.path.lexists(self.path):
            moves.insert(0, (self.path, name_aside(self.path)))
        return " && ".join(f"mv {shlex.quote(str(a))} {shlex.quote(str(b))}" for a, b in moves)

    def restore(self) -> None:
        """Write the settings files that were removed or changed during the run again, and print a note for each."""
        for name, data in self._kept.items():
            path = self.path / name
            if _holds(path, data):
                continue
            with writing(path):
                aside = name_aside(path)
                moved = os.path.lexists(path)
                if moved:
                    os.rename(path, aside)
                replace_file(path, data)
            kept = f" What stood there is kept as {aside.name}." if moved else ""
            note(
                f"{path} was removed or changed by another program while the run was going on, and is written again."
                f"{kept}"
            )

    def write_settings_and_log(self, fallback: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write settings and log, which a run needs besides its checkpoints, to the fallback directory."""
        with writing(fallback):
            make_directories(fallback)
            for name, data in self._kept.items():
                replace_file(fallback / name, data)
        log = RunLog(fallback / "log.jsonl", None)
        for record in records:
            log.write(record)
        log.sync()
        log.close()

    def close(self) -> None:
        """Close the directory."""
        os.close(self._descriptor)


def _holds(path: Path, data: bytes) -> bool:
    """Whether there is a file with just these bytes."""
    with contextlib.suppress(OSError):
        return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    return False
