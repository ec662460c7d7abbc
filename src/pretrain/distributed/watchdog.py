"""The watchdog: ends all processes of a run within seconds when one of them dies, stops, hangs or fails, naming it.

A collective waits forever for a missing process. Every process therefore has a thread with a connection of its own to
the key-value store of the rendezvous, where it publishes a heartbeat with its phase, step and progress, once a second
(more rarely with more than 1024 ranks), and at once after progress, an error or its end.

State of a process, as the others see it, and the verdict that follows:

| state | seen in | verdict | by | after |
|---|---|---|---|---|
| not there | ``beat/RANK`` is missing at the start | `DistributedError` | all | ``patience`` |
| running | heartbeats with progress (`mark` was called) | none | | |
| stalled | heartbeats of all ranks, progress of none | ``hung`` | rank 0 | ``timeout`` times `SLOW` |
| silent | no heartbeat | ``silent`` | rank 0; of rank 0 all | ``silence`` |
| ended | its process is gone, and it was not ``done`` | ``died`` | its host | at once |
| failed | a heartbeat with ``error`` | ``raised`` | rank 0; if it ended its host | at once |
| ``tentative`` | an ``error`` that may follow from a loss | ``raised`` | rank 0 | 0.5 s, if all others are heard |
| | and a rank that was not heard since then | ``silent`` of that one | rank 0 | 2.5 heartbeats |
| done | a heartbeat with ``done`` (`close` was called) | none, unwatched | | |

The hung process is the one that is behind the others and does not wait for another. Of several errors the first one
that is not tentative decides.

State of the verdict, which is the value of the key ``notice``:

| value | written by | then every other one |
|---|---|---|
| ``run``, the name of this attempt | the first process | does nothing |
| and ``want``, the loss (null: a hang) | the ``judge``, to claim the verdict | writes ``stack/RANK``, exits by 4.5 s |
| and ``record``, the loss completed | the judge, with the stacks, after 2 s at most | writes ``left/RANK``, exits |

If the record does not follow within 3 s, the judge is lost as well, and the others exit with ``want`` as their record.
If the store itself is lost or does not answer for ``silence`` seconds, each process exits by itself and names rank 0:
rank 0 or its launcher hosts the store.

To exit is to print the record, which is the same on all ranks, and to end with exit code 75 through `os._exit`, since
nothing else ends a thread inside a collective. The judge, or the first survivor without one, also writes
``failure.json`` in the run directory. A process whose own error is the record is left to end by that error.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import multiprocessing
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.distributed import record
from pretrain.distributed.record import Record
from pretrain.distributed.store import absent, ranks
from pretrain.errors import DistributedError, PretrainError

__all__ = ["EXIT_LOST", "SLOW", "Watchdog"]

EXIT_LOST = 75  # EX_TEMPFAIL: starting the same command again may help

# Phases that may take longer without progress: factors on ``timeout``.
SLOW = {"start": 4.0, "data": 2.0, "evaluate": 2.0, "save": 4.0}

_BEAT = 1.0  # seconds between heartbeats
_POLL = 0.1  # seconds between reads of the heartbeats of others
_PER_SECOND = 1024  # requests that the store must answer; with more ranks each one reads and writes less often
_SILENCE = 30.0  # seconds without a heartbeat, by default
_CAUSE_WAIT = 0.5  # seconds to wait for news of a lost process before a failed collective counts as the first failure
_STACKS = 2.0  # seconds to wait for stacks
_EXIT_AFTER = 4.5  # seconds from a verdict to the end of the process, whatever blocks
_ERROR_WAIT = 4.0  # seconds to wait until the others know of an error
_CLOSE_WAIT = 2.0  # seconds that rank 0, which may host the store, waits for the others at the end
_OTHERS = 64  # lost processes that are named besides the first one
_CLOSED = re.compile("closed|reset|broken pipe|refused", re.IGNORECASE)


@dataclass(slots=True)
class MainThreadProgress:
    """Progress of the main thread, which is the only writer."""

    phase: str = "start"
    step: int = 0
    marks: int = 0  # number of calls of `Watchdog.mark`
    step_start: int = 0  # ``marks`` when the step began


@dataclass
class Member:
    """The last heartbeat of a process, with times by the clock of this watchdog, in seconds.

    Attributes:
        beat: as made by `Watchdog._heartbeat`.
        heard_at: when it arrived.
        progress_at: when the last heartbeat with progress arrived.
        progress_sent_at: when its rank sent that, by its own clock.
        failed_at: when the first heartbeat with an error arrived.
    """

    beat: dict[str, Any] = field(default_factory=dict)
    heard_at: float = 0.0
    progress_at: float = 0.0
    progress_sent_at: float = 0.0
    failed_at: float = 0.0

    def update(self, raw: bytes, now: float) -> Member:
        """Update the state from a heartbeat, unless it is the one that is known."""
        beat, last = json.loads(raw), self.beat
        if beat != last:
            if beat["signs"] != last.get("signs"):
                self.progress_at, self.progress_sent_at = now, beat["time"]
            if beat["error"] and not last.get("error"):
                self.failed_at = now
            self.beat, self.heard_at = beat, now
        return self

    def loss(self, kind: str, what: str) -> Record:
        """Return the record of its loss; its time is by the clock of the lost rank, so all ranks print the same."""
        at = self.progress_sent_at if kind == "hung" else self.beat["time"]
        since = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
        last_known = {key: self.beat[key] for key in ("rank", "host", "pid", "phase", "step")}
        return last_known | {"kind": kind, "what": what, "since": since}


class Watchdog:
    """Watchdog of the processes of a run; a context manager that reports an exception that leaves it to the others.

    The constructor waits for all processes. With one process nothing is done at all. The ``failure.json`` of an earlier
    attempt is removed when the processes have come to a normal end.

    Args:
        store: key-value store shared by all ranks, with keys of this attempt only (`torch.distributed.Store`).
        rank, size: rank of this process, and the world size.
        run_dir: directory of ``failure.json``; None to write none.
        timeout: seconds without progress of any process after which the process that is behind counts as hung.
        silence: seconds without a heartbeat after which a process counts as lost; by default 30, or ``timeout`` if
            that is less; at least three heartbeats.
        patience: seconds to wait for all processes.

    Raises:
        DistributedError: not all processes come in time.
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
        self.rank, self.size, self.timeout = rank, size, timeout
        self.run_dir = None if run_dir is None else Path(os.path.abspath(run_dir))
        self._progress = MainThreadProgress()
        self._thread: threading.Thread | None = None
        if size == 1:
            return
        self._interval = max(_BEAT, size / _PER_SECOND)
        self._poll_interval = max(_POLL, size / _PER_SECOND)
        silence = min(timeout, _SILENCE) if silence is None else silence
        self._silence = max(silence, 3 * self._interval)
        self._clock = 0.0  # seconds; does not advance while this process is stopped
        self._store_answered_at = 0.0
        host, pid = socket.gethostname(), os.getpid()
        self._identity = {"rank": rank, "host": host, "pid": pid, "space": _process_space()}
        self._error: Record | None = None
        self._tentative = False  # the error may only follow from the loss of another process
        self._finished = threading.Event()  # no further verdict will be made
        self._wake = threading.Event()
        self._closing = False
        self._exit_timer: threading.Timer | None = None
        self._stack_sent_at: float | None = None
        self._store = store.clone()  # another connection: the main thread may block the first one
        self._members = {r: Member() for r in (range(size) if rank == 0 else (0, rank))}
        self._notice, self._raw_notice = dict[str, Any](), b""
        self._neighbours = self._wait_for_ranks(patience)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        threading.Thread(target=self._advance_clock, name="watchdog-clock", daemon=True).start()

    # ------------------------------------------------------------------ called by the main thread

    def mark(self, phase: str, step: int) -> None:
        """Set the current phase and step; every call counts as progress and costs less than a microsecond.

        Args:
            phase: any word; `SLOW` names the phases with a longer time limit.
            step: optimizer step.
        """
        progress = self._progress
        progress.marks += 1
        if step != progress.step:
            progress.step_start = progress.marks
        progress.phase, progress.step = phase, step

    def fail(self, error: BaseException, *, end_within: float | None = 5.0) -> None:
        """Report the error that ends this process to the others, which print it and exit.

        Returns when they know it, after 4 seconds at most. For an error that only follows from the loss of another
        process (a failed collective) it does not return: this process then ends like the other survivors.

        Args:
            error: the exception.
            end_within: seconds after which this process is ended with exit code 1 if its shutdown blocks (as the
                teardown of a process group can); None for never.
        """
        # A forked child has no such thread.
        if self._thread is None or not self._thread.is_alive() or self._finished.is_set():
            return
        text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:4000]
        loss = Member(self._heartbeat()).loss("raised", text)
        self._tentative = _may_follow_from_loss(error)
        self._error = loss | {"stack": record.stack_of(error.__traceback__)}
        if end_within is not None:
            _end_within(end_within)
        self._wake.set()
        self._finished.wait(_ERROR_WAIT)

    def close(self) -> None:
        """End the watchdog normally, after which nothing is detected any more; a second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            self._closing = True
            self._wake.set()
            thread.join(_CLOSE_WAIT + 1.0)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        way: TracebackType | None,
    ) -> None:
        watched = self._thread is not None
        failed = error is not None and not (isinstance(error, SystemExit) and not error.code)
        if failed and error is not None:
            self.fail(error)
        self.close()
        # Not at the start: a user who restarts a failing run several times still needs the record.
        if watched and self.rank == 0 and self.run_dir is not None and not failed:
            with contextlib.suppress(OSError):
                (self.run_dir / record.FILE).unlink()

    # ------------------------------------------------------------------ heartbeats

    def _heartbeat(self) -> dict[str, Any]:
        """Return the heartbeat; ``within`` counts the marks of the current step, ``signs`` those of all steps."""
        now = self._progress
        progress = {"phase": now.phase, "step": now.step, "within": now.marks - now.step_start}
        end = {"error": self._error, "tentative": self._tentative, "done": self._closing}
        return self._identity | progress | {"signs": now.marks, "time": time.time()} | end

    def _send_heartbeat(self) -> None:
        raw = json.dumps(self._heartbeat()).encode()
        self._store.set(f"beat/{self.rank}", raw)
        self._members[self.rank].update(raw, self._clock)

    def _get(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of keys that exist."""
        store = self._store
        return list(store.multi_get(keys) if store.has_extended_api() else map(store.get, keys))

    def _read_store(self) -> None:
        """Read the notice and the heartbeats."""
        keys = ["notice", *(f"beat/{rank}" for rank in self._members)]
        self._raw_notice, *beats = self._get(keys)
        for member, raw in zip(self._members.values(), beats, strict=True):
            member.update(raw, self._clock)
        self._notice = json.loads(self._raw_notice)
        self._store_answered_at = self._clock

    def _all_members(self) -> list[Member]:
        """Return the members of all ranks; ranks other than 0 read the heartbeats that they do not watch."""
        if self.rank == 0:
            return list(self._members.values())
        beats = self._get([f"beat/{rank}" for rank in range(self.size)])
        return [Member().update(raw, self._clock) for raw in beats]

    def _wait_for_ranks(self, patience: float) -> dict[int, int]:
        """Wait until all ranks are there, and return the process ids of the other ranks on this host."""
        store = self._store
        try:
            store.compare_set("notice", "", json.dumps({"run": secrets.token_hex(6)}))
            self._send_heartbeat()
            if late := absent(store, "beat", range(self.size), patience):
                raise DistributedError(
                    f"The watchdog of rank {self.rank} of {self.size} waited {patience:g} seconds for rank "
                    f"{ranks(late)}. Look at what these ranks printed."
                )
            self._read_store()
            beats = [member.beat for member in self._all_members()]
        except RuntimeError as error:  # raised by the store
            raise DistributedError(
                f"The watchdog of rank {self.rank} of {self.size} lost the store of the rendezvous: {error}. Look at "
                "what rank 0 and the launcher on its host printed."
            ) from error
        here = [beat for beat in beats if beat["space"] == self._identity["space"]]
        return {beat["rank"]: beat["pid"] for beat in here if beat["rank"] != self.rank}

    def _advance_clock(self) -> None:
        """Advance the clock, and end the process if the store does not answer the watching thread."""
        before = time.monotonic()
        while not self._finished.wait(self._poll_interval):
            now = time.monotonic()
            # At most one interval, so that the time in which this process was stopped counts against no rank.
            self._clock += min(now - before, self._interval)
            before = now
            unanswered = self._clock - self._store_answered_at > self._silence
            if unanswered and self._exit_timer is None and not self._closing:
                what = (
                    "no heartbeat came from it, and no answer from the store that it or its launcher "
                    "hosts,"
                )
                self._exit_without_store("silent", self._for_silence(0, what), unanswered=True)

    def _watch(self) -> None:
        try:
            self._loop()
        except RuntimeError as error:  # raised by the store
            if not self._closing:
                text = f"the store that it or its launcher hosts was lost: {error}".splitlines()[0]
                self._exit_without_store("died" if _CLOSED.search(text) else "silent", text)
        except Exception:  # a bug here must not leave a run without a watchdog
            text = traceback.format_exc().strip().replace("\n", " | ")
            own = Member(self._heartbeat())
            self._report_and_exit(own.loss("raised", f"its watchdog failed: {text}"))
        self._finished.set()

    def _loop(self) -> None:
        due, error_sent = 0.0, False
        while not self._closing:
            progressed = self._progress.marks != self._members[self.rank].beat["signs"]
            new_error = self._error is not None and not error_sent
            if self._clock >= due or new_error or progressed:
                error_sent |= new_error
                self._send_heartbeat()
                due = self._clock + self._interval
            self._read_store()
            if self._decide():
                return
            self._wake.wait(self._poll_interval)
            self._wake.clear()
        self._send_heartbeat()
        end = time.monotonic() + _CLOSE_WAIT
        while self.rank == 0 and time.monotonic() < end:
            self._read_store()
            if all(member.beat["done"] for member in self._members.values()):
                break
            time.sleep(0.02)

    # ------------------------------------------------------------------ verdicts

    def _decide(self) -> bool:
        """Follow the verdict, or look for a loss; return True if this process ends by an error of its own."""
        if "want" in self._notice:
            return self._follow_verdict()
        now = self._clock
        others = [member for rank, member in self._members.items() if rank != self.rank]
        watched = [member for member in others if not member.beat["done"]]
        loss = (
            self._ended_process(now) or self._first_error(now) or self._silent_process(watched, now)
        )
        if loss is not None or self._all_ranks_stalled(now):
            return self._publish_verdict(loss)
        self._closing |= not watched
        return False

    def _follow_verdict(self) -> bool:
        """Send the stack to the process that has claimed the verdict, and exit once there is a record; as `_decide`."""
        loss, finished = self._notice["want"], self._notice.get("record")
        if finished is not None:
            self._store.set(f"left/{self.rank}", "")
            return self._report_and_exit(finished)
        self._start_exit_timer()
        if self._stack_sent_at is None:
            self._stack_sent_at = self._clock
            self._store.set(f"stack/{self.rank}", record.main_stack())
        elif self._clock - self._stack_sent_at > 1.5 * _STACKS and loss is not None:
            # The process that claimed the verdict is lost as well.
            return self._report_and_exit(loss)
        return False

    def _ended_process(self, now: float) -> Record | None:
        """Return the error of a process of this host that has ended before the run, or else the record of its end."""
        for rank in [rank for rank in self._neighbours if self._pid_state(rank) == record.ENDED]:
            member = Member().update(self._get([f"beat/{rank}"])[0], now)
            if member.beat["error"] or not member.beat["done"]:
                died = member.loss("died", "its process ended before the run did")
                return member.beat["error"] or died
            del self._neighbours[rank]
        return None

    def _silent_process(self, watched: Sequence[Member], now: float) -> Record | None:
        """Return the record of the process that has not been heard for longest, if that is too long."""
        silent = min(watched, key=lambda member: member.heard_at, default=None)
        if silent is None or now - silent.heard_at <= self._silence:
            return None
        return silent.loss("silent", self._for_silence(silent.beat["rank"]))

    def _first_error(self, now: float) -> Record | None:
        """On rank 0, return the first error, once it is certain that it does not follow from the loss of a process.

        Otherwise it follows from the loss of a process that is not heard any more since then, which is returned.
        """
        members = self._members.values()
        failed = [member for member in members if member.beat["error"]]
        if self.rank or not failed:
            return None
        first = min(failed, key=lambda m: (m.beat["tentative"], m.failed_at))
        error: Record = first.beat["error"]
        since = now - first.failed_at
        unheard = [
            member
            for member in members
            if not (
                member.beat["error"] or member.beat["done"] or member.heard_at > first.failed_at
            )
        ]
        if not first.beat["tentative"] or (since > _CAUSE_WAIT and not unheard):
            return error
        if unheard and since > 2.5 * self._interval:
            what = f"no heartbeat came from it since rank {error['rank']} failed: {error['what']}"
            return unheard[0].loss("silent", what)
        return None

    def _all_ranks_stalled(self, now: float) -> bool:
        """Return on rank 0 whether no rank has made progress for the time-out of the slowest phase."""
        running = [member for member in self._members.values() if not member.beat["done"]]
        if self.rank or not running:
            return False
        factor = max(SLOW.get(member.beat["phase"], 1.0) for member in running)
        return now - max(member.progress_at for member in running) > factor * self.timeout

    def _pid_state(self, rank: int) -> str:
        """Return `record.process_state` of another rank, "" if it is on another host."""
        pid = self._neighbours.get(rank)
        return "" if pid is None else record.process_state(pid)

    def _for_silence(self, rank: int, what: str = "no heartbeat came from it") -> str:
        """Return the text that something did not come from a rank for ``silence`` seconds."""
        state = self._pid_state(rank)
        its = f" (its process is {state})" if state else ""
        return f"{what} for {self._silence:g} seconds{its}"

    def _exit_without_store(self, kind: str, what: str, *, unanswered: bool = False) -> None:
        """Report and exit without the store, which rank 0 or its launcher hosts.

        Args:
            kind: kind of the loss of rank 0, unless another loss is known.
            what: what has happened to rank 0.
            unanswered: the store does not answer. A dead store ends rank 0 as well, so the end of rank 0 is not the
                cause.
        """
        first = self._members[0]
        known = self._notice.get("want") or first.beat["error"]
        if known is None and not unanswered and self._pid_state(0) == record.ENDED:
            kind, what = "died", f"its process ended, and {what}"
        self._report_and_exit(known or first.loss(kind, what))

    def _publish_verdict(self, loss: Record | None) -> bool:
        """Claim the verdict, collect the stacks, complete the record, send it to all ranks, and exit.

        Args:
            loss: the record of the first loss; None for a hang.

        Returns:
            As ``_decide``; False if another process has claimed the verdict.
        """
        store = self._store
        claim = json.dumps(self._notice | {"want": loss, "judge": self.rank})
        if store.compare_set("notice", self._raw_notice.decode(), claim) != claim.encode():
            return False
        self._start_exit_timer()
        self._notice["want"] = loss
        members = {m.beat["rank"]: m for m in self._all_members() if not m.beat["done"]}
        gone = self._gone(members)
        lost = None if loss is None else loss["rank"]
        asked = [rank for rank in members if rank not in (lost, self.rank, *gone)]
        unanswered = absent(store, "stack", asked, _STACKS)
        stacks = {self.rank: record.main_stack()}
        for rank in asked:
            if rank not in unanswered:
                stacks[rank] = store.get(f"stack/{rank}").decode()
        loss = loss or self._hang(list(members.values()), stacks)
        also = [
            {"rank": rank, "host": members[rank].beat["host"], "what": what}
            for rank, what in gone.items()
            if rank != loss["rank"] and not members[rank].beat["error"]
        ]
        loss |= {"run": self._notice["run"], "also": also[:_OTHERS]}
        store.set("notice", json.dumps(self._notice | {"record": loss}))
        absent(store, "left", asked, 0.5)  # this process may host the store
        return self._report_and_exit(loss, stacks)

    def _gone(self, members: Mapping[int, Member]) -> dict[int, str]:
        """Return the ranks that will not send a stack, such as those of a lost host, and why."""
        gone, silence = {}, max(2 * self._interval, self._silence / 2)
        for rank, member in members.items():
            if self._pid_state(rank) == record.ENDED:
                gone[rank] = "its process ended"
            elif self._clock - member.heard_at > silence:
                gone[rank] = "it is silent"
        return gone

    def _hang(self, members: Sequence[Member], stacks: dict[int, str]) -> Record:
        """Return the record of the process that is furthest behind, preferring those that do not wait for others."""

        def order(member: Member) -> tuple[bool, int, int, int]:
            beat = member.beat
            waits = record.is_waiting(stacks.get(beat["rank"], ""))
            return waits, beat["step"], beat["within"], beat["rank"]

        hung = min(members, key=order)
        idle = self._clock - max(member.progress_at for member in members)
        what = f"no process made progress for {idle:.0f} seconds, and "
        if not order(hung)[0]:
            what += "this process does not wait for another"
        elif len({order(member)[1:3] for member in members}) > 1:
            what += "this process is behind the others"
        else:
            what += "all wait for each other: the stacks show in which operation"
        return hung.loss("hung", what) | {"stack": stacks.get(hung.beat["rank"], "(no answer)")}

    # ------------------------------------------------------------------ the end

    def _start_exit_timer(self) -> None:
        """Start a timer that ends this process, in case a disk, a pipe or the store blocks the remaining work."""
        if self._exit_timer is None:
            self._exit_timer = threading.Timer(_EXIT_AFTER, os._exit, (EXIT_LOST,))
            self._exit_timer.daemon = True
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down already
                self._exit_timer.start()

    def _report_and_exit(self, loss: Record, stacks: dict[int, str] | None = None) -> bool:
        """Print and write the record and end this process; return True if the process ends by an error of its own.

        Args:
            loss: the record.
            stacks: stacks by rank, if this process has collected them; it then writes the record.
        """
        loss = {"also": [], "run": self._notice["run"]} | loss
        own_error = loss["rank"] == self.rank and loss["kind"] == "raised"
        ends_itself = self._error is not None and (own_error or not self._tentative)
        if not ends_itself:
            self._start_exit_timer()
            own_stack = (stacks or {}).get(self.rank) or record.main_stack()
            record.say(loss, self.rank, self.size, own_stack, EXIT_LOST)
            if stacks is None and "record" not in self._notice:  # nobody has collected them
                time.sleep(min(1.0, 0.05 * self.rank))  # on a shared disk the first survivor writes
                stacks = {self.rank: own_stack}
        if stacks is not None and self.run_dir is not None:
            record.write(self.run_dir, loss, stacks)
        if ends_itself:
            if self._exit_timer is not None:
                self._exit_timer.cancel()
            self._finished.set()
            return True
        with contextlib.suppress(RuntimeError):
            cleaner = threading.Thread(target=_clean_up, daemon=True)
            cleaner.start()
            cleaner.join(1.0)
        os._exit(EXIT_LOST)


def _clean_up() -> None:
    """Kill the worker processes and flush the output buffers."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _process_space() -> str:
    """Return a name that is equal for two processes that find each other by process id and are on one host."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.readlink('/proc/self/ns/net')}"
    return socket.gethostname()


def _may_follow_from_loss(error: BaseException | None) -> bool:
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
        global _devnull
        _devnull = _devnull or open(os.devnull, "w")  # noqa: SIM115  # must stay open until the end
        faulthandler.dump_traceback_later(seconds, exit=True, file=_devnull)


_devnull: Any = None
