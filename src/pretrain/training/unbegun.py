"""The new directory of a run that fails before its first log line or checkpoint: nothing of it is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpoint.best import SWEEP
from pretrain.checkpoint.manifest import candidates

__all__ = ["Unbegun"]

_WRITTEN = ("run.yaml", SWEEP, "log.jsonl")  # what a run writes before it begins


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
