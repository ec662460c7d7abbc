"""The directory of a run: a new one is removed if the run fails before it begins, and one that is lost is left.

A run whose directory is deleted or renamed while it goes on saves beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pretrain.checkpoint.best import COMPARISON, SWEEP
from pretrain.checkpoint.manifest import candidates
from pretrain.training.logging import RunLog
from pretrain.utils import runlock
from pretrain.utils.directories import make_directories, unused
from pretrain.utils.files import note, replace_file, writing

__all__ = ["Home", "Unbegun"]

_WRITTEN = ("run.yaml", SWEEP, "log.jsonl")  # what a run writes before it begins
_INTERVAL = 1.0  # seconds between two checks


class Unbegun:
    """The directory of a run that is about to begin; nothing is done for one that existed before.

    Args:
        path: directory of the run, before anything makes it.
        leads: whether this is rank zero, which writes there.
    """

    def __init__(self, path: Path, leads: bool) -> None:
        self.path, self._new = path, leads and not os.path.lexists(path)

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """Remove what the run has written if it fails inside; the caller holds the lock, so no other run writes."""
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
    def removed(self) -> Iterator[None]:
        """Remove the directory if the run fails inside and left it empty; the lock has been released by then."""
        try:
            yield
        except BaseException:
            if self._new:
                with contextlib.suppress(
                    OSError
                ):  # it holds something, or another run has locked it
                    os.rmdir(self.path)
            raise

    def _has_begun(self) -> bool:
        try:
            return bool(candidates(self.path)) or (self.path / "log.jsonl").stat().st_size > 0
        except FileNotFoundError:
            return False
        except OSError:  # too many open files, a disk that is gone: what cannot be seen is kept
            return True


class Home:
    """The run directory, held open so that it can be identified after it was renamed or deleted.

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

    def fate(self) -> str:
        """Return what happened to the directory, as far as the system tells."""
        with contextlib.suppress(OSError):
            now = os.readlink(f"/proc/self/fd/{self._descriptor}")
            if os.fstat(self._descriptor).st_nlink and os.path.isdir(now):
                return f"renamed to {now}"
        return "deleted or renamed"

    def refuge(self) -> Path:
        """Return an unused path for a directory beside it."""
        return unused(self.path.with_name(f"{self.path.name}.rescued-{k}") for k in count(1))

    def restore(self) -> None:
        """Write the settings again, and say so, where their file was removed or replaced while the run was going on."""
        for name, data in self._kept.items():
            path = self.path / name
            if path.is_file():
                continue
            with writing(path):
                aside = unused(path.with_name(f"{name}.other{k or ''}") for k in count())
                moved = os.path.lexists(path)
                if moved:
                    os.rename(path, aside)
                replace_file(path, data)
            kept = f" What stood there is kept as {aside.name}." if moved else ""
            note(f"{path} was removed while the run was going on, and is written again.{kept}")

    def furnish(self, refuge: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write what a run needs besides its checkpoints to the new directory: settings and log."""
        with writing(refuge):
            make_directories(refuge)
            for name, data in self._kept.items():
                replace_file(refuge / name, data)
        log = RunLog(refuge / "log.jsonl", None)
        for record in records:
            log.write(record)
        log.sync()
        log.close()

    def close(self) -> None:
        """Close the directory."""
        os.close(self._descriptor)
