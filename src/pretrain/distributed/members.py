"""State of the processes of a run, as known to the watchdog."""

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
    """Progress of the main thread, which alone writes here, except for ``written``."""

    phase: str = "start"
    step: int = 0
    waiting: bool = False
    count: int = 0  # number of all marks
    first: int = 0  # ``count`` at which the step began
    writer: threading.Thread | None = None  # thread of this process that the main thread waits for
    written: int = 0  # progress reports of such threads, which alone write it

    @property
    def signs(self) -> int:
        """A number that changes with every sign of progress."""
        return self.count + self.written


@dataclass(frozen=True)
class Limits:
    """Intervals and time limits, in seconds.

    Attributes:
        interval: between two heartbeats.
        glance: between two checks whether there is progress to report.
        silence: without a heartbeat until a process counts as lost.
        timeout: without progress of any process until the run counts as hung.
        slow: factors on ``timeout`` by phase.
    """

    interval: float
    glance: float
    silence: float
    timeout: float
    slow: dict[str, float]


@dataclass
class Member:
    """The known state of one process; times are of the monotonic clock unless noted otherwise."""

    rank: int
    host: str
    pid: int
    space: str  # process id namespace: only in the own one a process id can be looked up
    seen: float
    progressed: float
    wire: Wire | None = None
    phase: str = "start"
    step: int = 0
    within: int = 0  # marks since the step began
    count: int = 0
    said: float = 0.0  # when it sent its last heartbeat, in seconds since 1970 by its own clock
    moved: float = 0.0  # the same for the last heartbeat that reported progress
    waiting: bool = False
    done: bool = False
    error: Record | None = None
    failed: float = 0.0
    tentative: bool = False  # the error may only follow from the loss of another process
    stack: str | None = None

    @property
    def alive(self) -> bool:
        """Whether the process may still answer."""
        return not self.done and (self.wire is None or not self.wire.gone)

    def take(self, beat: list[Any], now: float) -> None:
        """Update the state from a heartbeat."""
        phase, self.step, self.within, count, self.waiting, self.said = beat
        self.phase = str(phase)[:80]
        if count != self.count or not self.moved:
            self.count, self.progressed, self.moved = count, now, self.said

    def about(self, kind: str, what: str) -> Record:
        """Return a record of its loss; the time in it is of its own clock, so that it is the same on all ranks."""
        at = (self.moved if kind == "hung" else self.said) or time.time()
        when = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
        who = {"rank": self.rank, "host": self.host, "pid": self.pid}
        place = {"phase": self.phase, "step": self.step}
        return who | place | {"kind": kind, "what": what, "since": when}
