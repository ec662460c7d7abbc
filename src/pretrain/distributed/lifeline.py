"""The watchdog: ends all processes of a run within seconds when one of them dies, stops, hangs or fails, naming it.

A collective waits forever for a missing process. Every process therefore has a thread with a connection of its own:
rank 0 is connected with all ranks, each other rank with rank 0. A closed connection means that a process died; no
heartbeat for ``silence`` seconds, that it is stopped or disconnected; heartbeats without progress of any process for
``timeout`` seconds, that one of them hangs: the one that is behind the others and does not wait for another. All
survivors print the same record, and it is written to ``failure.json`` in the run directory. Then they end with exit
code 75 through `os._exit`, since nothing else ends a thread inside a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.distributed import network, record
from pretrain.distributed.meeting import meet
from pretrain.distributed.members import Limits, Member, Place
from pretrain.distributed.point_to_point import Peers
from pretrain.distributed.watch import EXIT_LOST, Watch
from pretrain.errors import PretrainError

__all__ = ["EXIT_LOST", "SLOW", "Lifeline", "WriterPeers"]

# Phases that may take longer without progress: factors on ``timeout``.
SLOW = {"start": 4.0, "data": 2.0, "evaluate": 2.0, "save": 4.0}

_BEAT = 1.0  # seconds between heartbeats
_GLANCE = 0.2  # seconds between checks for progress
_BEATS_PER_SECOND = 128  # limit for rank 0; with more ranks each one sends heartbeats less often
_SILENCE = 30.0  # seconds without a heartbeat, by default
_SETTLE = 3.0  # seconds to wait until the others know of an error
_GOODBYE = 3.0  # seconds to wait for the thread at a normal end


class Lifeline:
    """Watchdog of the processes of a run; a context manager that reports an exception that leaves it to the others.

    The constructor connects all processes. With one process nothing is done at all. The ``failure.json`` of an earlier
    attempt is removed when the processes have come to a normal end.

    Args:
        store: key-value store shared by all ranks, with keys of this attempt only (`torch.distributed.Store`).
        rank, size: rank of this process, and the world size.
        run_dir: directory of ``failure.json``; None to write none.
        timeout: seconds without progress of any process after which the process that is behind counts as hung.
        silence: seconds without a heartbeat after which a process counts as lost; by default 30, or ``timeout`` if
            that is less; at least three heartbeats.
        patience: seconds to wait for all processes to connect.

    Raises:
        DistributedError: not all processes connect in time.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
        silence: float | None = None,
        patience: float = 60.0,
    ) -> None:
        self._place = Place()
        self._watch: Watch | None = None
        if size == 1:
            return
        interval = max(_BEAT, size / _BEATS_PER_SECOND)
        wanted = min(timeout, _SILENCE) if silence is None else silence
        glance = max(_GLANCE, size / _BEATS_PER_SECOND)
        limits = Limits(interval, glance, max(wanted, 3 * interval), timeout, SLOW)
        host, pid, space = socket.gethostname(), os.getpid(), _process_space()
        hello = {"rank": rank, "host": host, "pid": pid, "space": space}
        run, found = meet(store, rank, size, hello, patience)
        now = time.monotonic()
        others = {}
        for other, (wire, said) in found.items():
            network.tune(wire.sock, limits.silence + 2 * interval)
            about = str(said.get("host"))[:255], int(said.get("pid", 0)), str(said.get("space"))
            others[other] = Member(other, *about, now, now, wire)
        me = Member(rank, host, pid, space, now, now)
        where = None if run_dir is None else Path(os.path.abspath(run_dir))
        self._watch = Watch(me, others, self._place, limits, size, run, where)
        self._watch.thread.start()
        own = weakref.ref(self)

        def release() -> None:
            lifeline = own()
            if lifeline is not None and lifeline._watch is not None:
                lifeline._watch.release()
                lifeline._watch = None

        os.register_at_fork(after_in_child=release)

    def mark(self, phase: str, step: int) -> None:
        """Set the current phase and step; every call counts as progress and costs less than a microsecond.

        Args:
            phase: any word; `SLOW` names the phases with a longer time limit.
            step: optimizer step.
        """
        place = self._place
        place.count += 1
        if step != place.step:
            place.first = place.count
        place.phase, place.step = phase, step

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark this process as waiting for others, inside the context."""
        place = self._place
        before = place.waiting
        place.waiting = True
        try:
            yield
        finally:
            place.waiting = before
            place.count += 1

    @contextlib.contextmanager
    def awaiting(self, writer: threading.Thread) -> Iterator[None]:
        """Mark the main thread as waiting for a thread of this process that writes a checkpoint, inside the context.

        Progress of that thread then counts as progress of the process, see ``written``. If the run hangs, the stack of
        that thread shows whether this process waits for others.
        """
        place = self._place
        before = place.phase
        place.phase, place.writer = "save", writer
        place.count += 1
        try:
            yield
        finally:
            place.phase, place.writer = before, None
            place.count += 1

    def written(self) -> None:
        """Report progress of the calling writer thread.

        It counts only while the main thread waits for that thread: otherwise it would hide that the main thread hangs.
        """
        place = self._place
        if place.writer is threading.current_thread():
            place.written += 1

    def fail(self, error: BaseException, *, end_within: float | None = 5.0) -> None:
        """Report the error that ends this process to the others, which print it and exit.

        Returns when they know it, after 3 seconds at most. For an error that only follows from the loss of another
        process (a failed collective) it does not return: this process then ends like the other survivors.

        Args:
            error: the exception.
            end_within: seconds after which this process is ended with exit code 1 if its shutdown blocks (as the
                teardown of a process group can); None for never.
        """
        watch = self._watch
        if watch is None or watch.settled.is_set():
            return
        text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:4000]
        me, place = watch.me, self._place
        me.phase, me.step, me.said = place.phase, place.step, time.time()
        me.tentative, me.failed = _may_follow(error), time.monotonic()
        found = me.about("raised", text) | {"stack": record.stack_of(error.__traceback__)}
        me.error = found  # set last, because the watchdog thread reads it
        if end_within is not None:
            _end_within(end_within)
        watch.wake()
        watch.settled.wait(_SETTLE)

    def close(self) -> None:
        """End the watchdog normally, after which nothing is detected any more; a second call does nothing."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.closing = True
            watch.wake()
            watch.thread.join(_GOODBYE)

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        way: TracebackType | None,
    ) -> None:
        watch = self._watch
        failed = error is not None and not (isinstance(error, SystemExit) and not error.code)
        if failed and error is not None:
            self.fail(error)
        self.close()
        # Not at the start: a user who restarts a failing run several times still needs the record.
        if watch is not None and watch.me.rank == 0 and watch.run_dir is not None and not failed:
            record.forget(watch.run_dir)


class WriterPeers(Peers):
    """Peers for a thread that writes checkpoints in the background and reports its progress to the watchdog.

    Args:
        rank: of this process.
        size: world size.
        group: process group of `torch.distributed` for CPU tensors, which only this thread uses.
        watchdog: returns the watchdog of this process, or None while there is none.
    """

    def __init__(
        self, rank: int, size: int, group: Any, watchdog: Callable[[], Lifeline | None]
    ) -> None:
        def moved() -> None:
            if (lifeline := watchdog()) is not None:
                lifeline.written()

        # Not a method: a reference cycle would keep the process group alive beyond the shutdown of torch.
        super().__init__(rank, size, group, moved)
        self._watchdog = watchdog
        self.moved: Callable[[], None] = moved  # reports progress of the calling thread

    def awaiting(self, writer: threading.Thread) -> contextlib.AbstractContextManager[None]:
        """Mark the main thread as waiting for the writer thread, inside the context; see `Lifeline.awaiting`."""
        lifeline = self._watchdog()
        return contextlib.nullcontext() if lifeline is None else lifeline.awaiting(writer)


def _process_space() -> str:
    """Return a name that is equal for two processes if they share a process id namespace."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"unknown {os.getpid()}"


def _may_follow(error: BaseException | None) -> bool:
    """Return whether an error may follow from the loss of another process: a failed collective is a RuntimeError."""
    if isinstance(error, OSError) and not isinstance(error, PretrainError):
        return True
    while error is not None:
        if isinstance(error, RuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_within(seconds: float) -> None:
    # Python threads do not run while the interpreter shuts down; the thread of faulthandler is written in C.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        global _nowhere
        _nowhere = _nowhere or open(os.devnull, "w")  # noqa: SIM115  # must stay open until the end
        faulthandler.dump_traceback_later(seconds, exit=True, file=_nowhere)


_nowhere: Any = None
