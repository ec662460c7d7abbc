"""What the watchdog knows of the processes of a run."""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import dataclass
from typing import Any

from pretrain.distributed.json_socket import Wire
from pretrain.distributed.record import Record

__all__ = ["Limits", "Member", "Place"]


@dataclass(slots=True)
class Place:
    """Where the main thread is; it alone writes here, but for ``written``."""

    phase: str = "start"
    step: int = 0
    waiting: bool = False
    count: int = 0  # of all marks
    first: int = 0  # count at which the step began
    writer: threading.Thread | None = None  # the thread of its own that it waits for
    written: int = 0  # signs of life of such threads; they alone write it

    @property
    def signs(self) -> int:
        """A number that changes with every sign of life."""
        return self.count + self.written


@dataclass(frozen=True)
class Limits:
    """Seconds: between two beats, between two looks whether there is progress to tell of, until silence is a loss, and
    without progress of anybody, with factors by phase.
    """

    interval: float
    glance: float
    silence: float
    timeout: float
    slow: dict[str, float]


@dataclass
class Member:
    """What is known of one process; times are of the monotonic clock."""

    rank: int
    host: str
    pid: int
    space: str  # of process numbers: only in our own one a number means something
    seen: float
    progressed: float
    wire: Wire | None = None
    phase: str = "start"
    step: int = 0
    within: int = 0  # marks since the step began
    count: int = 0
    said: float = 0.0  # when it sent its last beat, in seconds since 1970 by its own clock
    moved: float = 0.0  # the same for the last one that told of progress
    waiting: bool = False
    done: bool = False
    error: Record | None = None
    failed: float = 0.0
    tentative: bool = False  # the error may only follow from the loss of another process
    stack: str | None = None

    @property
    def alive(self) -> bool:
        """It may still answer."""
        return not self.done and (self.wire is None or not self.wire.gone)

    def take(self, beat: list[Any], now: float) -> None:
        """Learn from a beat."""
        phase, self.step, self.within, count, self.waiting, self.said = beat
        self.phase = str(phase)[:80]
        if count != self.count or not self.moved:
            self.count, self.progressed, self.moved = count, now, self.said

    def about(self, kind: str, what: str) -> Record:
        """A record of its loss; the time in it is its own clock's, so that all tell the same."""
        at = (self.moved if kind == "hung" else self.said) or time.time()
        when = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
        who = {"rank": self.rank, "host": self.host, "pid": self.pid}
        place = {"phase": self.phase, "step": self.step}
        return who | place | {"kind": kind, "what": what, "since": when}
