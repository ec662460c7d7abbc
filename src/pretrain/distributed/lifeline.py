"""The watchdog: when one process of a run dies, stops, hangs or fails, all others leave within seconds, saying who.

A collective operation waits for ever for a process that does not come. So every process has a thread that holds a
connection of its own: rank 0 with everybody, everybody with rank 0. A closed connection means that a process died;
no beat for ``silence`` seconds, that it is stopped or cut off; beats without progress of anybody for ``timeout``
seconds, that one of them hangs: the one that is behind the others and waits for nobody. What was found is printed by
all survivors in the same words and written to ``failure.json`` in the run directory. Then they end with exit code 75
through `os._exit`, since nothing else ends a thread inside a collective.
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

# Phases in which progress may take longer: factors on ``timeout``.
SLOW = {"start": 4.0, "data": 2.0, "evaluate": 2.0, "save": 4.0}

_BEAT = 1.0  # seconds
_GLANCE = 0.2
_BEATS_PER_SECOND = 128  # that rank 0 shall handle; with more ranks each beats more slowly
_SILENCE = 30.0
_SETTLE = 3.0  # seconds to wait until the others know of an error
_GOODBYE = 3.0


class Lifeline:
    """Watch over the processes of a run; a context manager, which tells the others of an exception that leaves it.

    Building one connects all processes. With one process nothing is done at all. What an earlier attempt has left in
    ``failure.json`` goes when the processes have come to a normal end.

    Args:
        store: key-value store that all share, with keys of this attempt only (`torch.distributed.Store`).
        rank, size: of this process, and how many there are.
        run_dir: where ``failure.json`` is written; None: nowhere.
        timeout: seconds without progress of anybody after which the process that is behind counts as hung.
        silence: seconds without a beat after which a process counts as lost; not given, 30, or ``timeout`` if that
            is less; at least three beats.
        patience: seconds to wait for all to connect.

    Raises:
        DistributedError: not all connect in time.
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
        """Say what this process does now; every call counts as progress. It costs less than a microsecond.

        Args:
            phase: any word; `SLOW` names those that may last.
            step: optimizer step.
        """
        place = self._place
        place.count += 1
        if step != place.step:
            place.first = place.count
        place.phase, place.step = phase, step

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits for others."""
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
        """Inside, the main thread waits for a thread of its own that writes a checkpoint.

        What that thread does then counts as progress, see ``written``, and should the run hang, its stack says whether
        this process waits for others.
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
        """A sign of life of a thread that writes.

        It counts only while the main thread waits for that thread: else it would hide that the main thread hangs.
        """
        place = self._place
        if place.writer is threading.current_thread():
            place.written += 1

    def fail(self, error: BaseException, *, end_within: float | None = 5.0) -> None:
        """Tell the others what ended this process; they print it and leave.

        Returns when they know it. An error that only follows from the loss of another process (a collective that
        broke) does not return: this process then ends like the other survivors.

        Args:
            error: what was raised.
            end_within: seconds after which this process is ended with exit code 1, should its own way out block (as
                the teardown of a process group can); None: never.
        """
        watch = self._watch
        if watch is None or watch.settled.is_set():
            return
        text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:4000]
        me, place = watch.me, self._place
        me.phase, me.step, me.said = place.phase, place.step, time.time()
        me.tentative, me.failed = _may_follow(error), time.monotonic()
        found = me.about("raised", text) | {"stack": record.stack_of(error.__traceback__)}
        me.error = found  # last, for the thread looks at it
        if end_within is not None:
            _end_within(end_within)
        watch.wake()
        watch.settled.wait(_SETTLE)

    def close(self) -> None:
        """Say goodbye: a normal end, after which nothing is detected any more. Twice is once."""
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
        # Not at the start: whoever starts a run again and again still wants to know why.
        if watch is not None and watch.me.rank == 0 and watch.run_dir is not None and not failed:
            record.forget(watch.run_dir)


class WriterPeers(Peers):
    """Peers for a thread that writes checkpoints behind the training; the watchdog hears of what it does.

    Args:
        rank: of this process.
        size: how many there are.
        group: of `torch.distributed`, which carries tensors on the CPU and is this thread's own.
        watchdog: gives that of this process, or None while nothing is watched.
    """

    def __init__(
        self, rank: int, size: int, group: Any, watchdog: Callable[[], Lifeline | None]
    ) -> None:
        def moved() -> None:
            if (lifeline := watchdog()) is not None:
                lifeline.written()

        # Not a method: an object that refers to itself keeps its group beyond the end of torch.
        super().__init__(rank, size, group, moved)
        self._watchdog = watchdog
        self.moved: Callable[[], None] = moved  # says that the calling thread has come further

    def awaiting(self, writer: threading.Thread) -> contextlib.AbstractContextManager[None]:
        """Inside, the main thread waits for the one that writes; see `Lifeline.awaiting`."""
        lifeline = self._watchdog()
        return contextlib.nullcontext() if lifeline is None else lifeline.awaiting(writer)


def _process_space() -> str:
    """A name that two processes share when the process numbers of one mean the same to the other."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"unknown {os.getpid()}"


def _may_follow(error: BaseException | None) -> bool:
    """Whether an error may be the consequence of the loss of another process: a broken collective is a RuntimeError."""
    if isinstance(error, OSError) and not isinstance(error, PretrainError):
        return True
    while error is not None:
        if isinstance(error, RuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_within(seconds: float) -> None:
    # Python's own threads stand still while the interpreter is taken down; this one is written in C.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        global _nowhere
        _nowhere = _nowhere or open(os.devnull, "w")  # noqa: SIM115  # must stay open until the end
        faulthandler.dump_traceback_later(seconds, exit=True, file=_nowhere)


_nowhere: Any = None
