"""A run whose directory is taken away while it goes on: noticed within a second, and saved beside it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pretrain.checkpoint.best import SWEEP
from pretrain.training.logging import RunLog
from pretrain.utils import runlock
from pretrain.utils.directories import make_directories
from pretrain.utils.files import replace_file, writing

__all__ = ["Home"]

_INTERVAL = 1.0  # seconds between two looks


class Home:
    """The directory of a run, held open so that it is still known when it has another name or none.

    Args:
        path: the run directory, with its lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._next = 0.0
        self._kept: dict[str, bytes] = {}
        for name in ("run.yaml", SWEEP):
            with contextlib.suppress(OSError):
                self._kept[name] = (self.path / name).read_bytes()

    def lost(self, *, now: bool = False) -> bool:
        """Whether the run directory is no longer where it was; looks once a second unless ``now``."""
        if not now and time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _INTERVAL
        # Not by its inode, which some network file systems change: a saver may have made an empty one of that name.
        return not any(os.path.lexists(self.path / name) for name in (runlock.NAME, "log.jsonl"))

    def fate(self) -> str:
        """What happened to it, as far as the system says."""
        with contextlib.suppress(OSError):
            now = os.readlink(f"/proc/self/fd/{self._descriptor}")
            if os.fstat(self._descriptor).st_nlink and os.path.isdir(now):
                return f"renamed to {now}"
        return "deleted or renamed"

    def refuge(self) -> Path:
        """The name of a directory beside it that is free."""
        names = (self.path.with_name(f"{self.path.name}.rescued-{k}") for k in count(1))
        return next(name for name in names if not os.path.lexists(name))

    def furnish(self, refuge: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write what a run needs beside its checkpoints: settings and log."""
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
        """Let go of the directory."""
        os.close(self._descriptor)
