"""Watchdog thread: heartbeats, failure detection, and the end of a run that has lost a process.

Rank 0 decides for all ranks, and collects their stacks before it announces the verdict. Only the loss of rank 0 itself
is detected by every rank separately. The training loop uses `pretrain.distributed.lifeline`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from pretrain.distributed import record
from pretrain.distributed.json_socket import Message
from pretrain.distributed.members import Limits, Member, Place
from pretrain.distributed.record import Record

__all__ = ["EXIT_LOST", "Watch"]

EXIT_LOST = 75  # EX_TEMPFAIL: starting the same command again may help

_STACKS = 2.0  # seconds to wait for stacks
_SUSPECT = 0.5  # seconds to wait for news of a lost process before a failed collective counts as the first failure
_BOUND = 4.5  # seconds from a verdict to the end of the process, whatever blocks
_GOODBYE = 2.0  # seconds to wait for the others at a normal end
_OTHERS = 64  # lost processes that are named besides the first one


class Watch:
    """Sends heartbeats to the connected ranks, and detects lost, failed and hung processes by theirs.

    Args:
        me: this process.
        others: the connected ranks: all others on rank 0, rank 0 on the others.
        place: progress of the main thread.
        limits: intervals and time limits.
        size: number of processes.
        run: name of this attempt.
        run_dir: directory where the failure record is written, or None.
    """

    def __init__(
        self,
        me: Member,
        others: dict[int, Member],
        place: Place,
        limits: Limits,
        size: int,
        run: str,
        run_dir: Path | None,
    ) -> None:
        self.me, self.others, self.place, self.limits = me, others, place, limits
        self.size, self.run, self.run_dir = size, run, run_dir
        self.settled = threading.Event()  # set when no further verdict will be made
        self.closing = self._reported = False
        self._told: Record | None = None
        self._notice: Record | None = None
        self._guard: threading.Timer | None = None
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        for member in others.values():
            assert member.wire is not None
            self._selector.register(member.wire, selectors.EVENT_READ, member)
        self._turned = _clock()
        self.thread = threading.Thread(target=self._guarded, name="lifeline", daemon=True)

    # ----------------------------------------------------------------------------------- called by other threads

    def wake(self) -> None:
        """Wake the thread, so that it reacts to a change at once."""
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def release(self) -> None:
        """Close all descriptors: at the end, and in a forked child, whose copies would hide the death of its parent."""
        for sock in (self._waker, self._woken):
            sock.close()
        for member in self.others.values():
            if member.wire is not None:
                member.wire.close()
        with contextlib.suppress(OSError):
            self._selector.close()

    # ----------------------------------------------------------------------------------- the loop

    def _guarded(self) -> None:
        try:
            self._loop()
        except Exception:  # a bug here must not leave a run without a watchdog
            text = traceback.format_exc().strip().replace("\n", " | ")
            self._leave(self.me.about("raised", f"its watchdog failed: {text}"))
        self.settled.set()
        self.release()

    def _loop(self) -> None:
        beat = 0.0
        for member in self.others.values():  # messages that arrived at the end of the meeting
            for message in member.wire.receive() if member.wire is not None else ():
                self._take(member, message)
        while not self.closing:
            now = _clock()
            if now >= beat or self.place.signs != self.me.count:
                self._beat(now)
                beat = now + self.limits.interval
            self._turn(min(beat, now + self.limits.glance))
            if self._decide():
                return
        self._send({"bye": True})
        self.me.done = True
        end = _clock() + _GOODBYE
        while _clock() < end and any(member.alive for member in self.others.values()):
            self._turn(end)

    def _beat(self, now: float) -> None:
        place = self.place
        within = place.count - place.first
        beat = [place.phase, place.step, within, place.signs, place.waiting, time.time()]
        self.me.take(beat, now)
        self.me.seen = now
        self._send({"beat": beat})

    def _send(self, message: Message) -> None:
        for member in self.others.values():
            if member.wire is not None and not member.wire.gone:
                member.wire.send(message)

    def _turn(self, until: float) -> None:
        """Wait for messages until the given time at most, and process them."""
        ready = self._selector.select(max(0.0, until - _clock()))
        now = _clock()
        late = now - self._turned - 2 * self.limits.interval
        if late > 0:  # this process was stopped itself: do not count that time against any process
            for member in (self.me, *self.others.values()):
                member.seen += late
                member.progressed += late
        self._turned = now
        for key, _ in ready:
            if key.data is None:
                with contextlib.suppress(OSError):
                    self._woken.recv(4096)
                continue
            sender: Member = key.data
            assert sender.wire is not None
            for message in sender.wire.receive():
                self._take(sender, message)
            if sender.wire.gone:
                self._selector.unregister(sender.wire)
        for member in self.others.values():
            if member.wire is not None:
                member.wire.flush()

    def _take(self, member: Member, message: Message) -> None:
        member.seen = _clock()
        if "beat" in message:
            member.take(message["beat"], member.seen)
        elif "fail" in message:
            member.error, member.failed = message["fail"], member.seen
            member.tentative = bool(message.get("tentative"))
        elif "want" in message:
            self._notice = message["want"]
            self._bound()
            if member.wire is not None:
                member.wire.send({"stack": record.main_stack(self.place.writer)})
        elif "stack" in message:
            member.stack = str(message["stack"])
        elif "record" in message:
            self._told = message["record"]
        elif "bye" in message:
            member.done = True
            if self.me.rank == 0 and member.wire is not None:
                member.wire.send({"bye": True})  # so that it need not wait for rank 0 to end

    # ----------------------------------------------------------------------------------- verdicts

    def _decide(self) -> bool:
        """Act on the current state; return True if nothing is left to watch."""
        now, me, others = _clock(), self.me, list(self.others.values())
        if self._told is not None:
            return self._leave(self._told)
        for member in others:
            if member.wire is not None and member.wire.gone and not member.done:
                if member.error is None:
                    return self._lost(member, "died" if member.wire.ended else "silent")
                return self._conclude(member.error)
        if me.error is not None and me.rank and not self._reported:
            self._reported = True
            self._send({"fail": me.error, "tentative": me.tentative})
        if me.rank == 0:
            failed = [one for one in (me, *others) if one.error is not None]
            certain = [one for one in failed if not one.tentative or now - one.failed > _SUSPECT]
            if certain:
                return self._conclude(min(certain, key=lambda one: one.failed).error)
        silent = [one for one in others if not one.done and now - one.seen > self.limits.silence]
        if silent:
            return self._lost(min(silent, key=lambda one: one.seen), "silent")
        if me.rank == 0 and self._stands_still(now):
            return self._conclude(None)
        return all(one.done for one in others)

    def _stands_still(self, now: float) -> bool:
        members = [one for one in (self.me, *self.others.values()) if not one.done]
        factor = max(self.limits.slow.get(one.phase, 1.0) for one in members)
        return now - max(one.progressed for one in members) > factor * self.limits.timeout

    def _lost(self, member: Member, kind: str) -> bool:
        wire = member.wire
        what = wire.gone if wire is not None else ""
        if kind == "silent":
            what = what or f"nothing was heard from it for {self.limits.silence:g} seconds"
            state = record.process_state(member.pid) if member.space == self.me.space else ""
            what += f" (its process is {state})" if state else ""
        found = member.about(kind, what)
        if self._notice is not None and member.rank == 0:  # announced before rank 0 was lost
            found = self._notice
        return self._conclude(found)

    def _conclude(self, found: Record | None) -> bool:
        """Collect the stacks, complete the record, send it to all ranks, and leave; ``found`` is None for a hang."""
        self._bound()
        me, now = self.me, _clock()
        me.stack = record.main_stack(self.place.writer)
        if me.rank == 0:
            named = None if found is None else found["rank"]
            self._send({"want": found})
            asked = [m for m in self.others.values() if m.rank != named and not m.done]
            heard = [m for m in asked if now - m.seen < 2.5 * self.limits.interval]
            end = now + _STACKS
            while _clock() < end and any(m.alive and m.stack is None for m in heard):
                self._turn(end)
            if found is None:
                found = self._hung()
            also = [self._also(m, now) for m in asked if m.rank != found["rank"]]
            found["also"] = [one for one in also if one is not None][:_OTHERS]
        assert found is not None  # only rank 0 detects hangs
        found["run"] = self.run
        self._send({"record": found})
        end = _clock() + 0.5
        while _clock() < end and not all(
            m.wire is None or m.wire.gone or m.wire.flush() for m in self.others.values()
        ):
            time.sleep(0.01)
        return self._leave(found)

    def _also(self, member: Member, now: float) -> Record | None:
        """Return an entry for a process that was lost together with the first one, as when a host fails, or None."""
        if member.wire is not None and member.wire.gone and member.error is None:
            return {"rank": member.rank, "host": member.host, "what": member.wire.gone}
        if now - member.seen > max(2 * self.limits.interval, self.limits.silence / 2):
            return {"rank": member.rank, "host": member.host, "what": "it is silent"}
        return None

    def _hung(self) -> Record:
        """Return the record of the process that is furthest behind, preferring those that do not wait for others."""

        def waits(member: Member) -> bool:
            return member.waiting or record.is_waiting(member.stack or "")

        members = [m for m in (self.me, *self.others.values()) if not m.done]
        first = min(members, key=lambda m: (waits(m), m.step, m.within, m.rank))
        idle = f"nobody made progress for {_clock() - max(m.progressed for m in members):.0f} seconds, and "
        if not waits(first):
            what = idle + "this process is the one that does not wait for another"
        elif len({(m.step, m.within) for m in members}) > 1:
            what = idle + "this process is behind the others"
        else:
            what = idle + "all wait for each other: the stacks show in which operation"
        found = first.about("hung", what)
        found["stack"] = first.stack or "(no answer)"
        return found

    # ----------------------------------------------------------------------------------- the end

    def _bound(self) -> None:
        """Start a timer that ends this process, in case a disk or a pipe blocks the remaining work."""
        if self._guard is None:
            self._guard = threading.Timer(_BOUND, os._exit, (EXIT_LOST,))
            self._guard.daemon = True
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down already
                self._guard.start()

    def _leave(self, found: Record) -> bool:
        """Print and write the record and end this process; return True if the process ends by an error of its own."""
        own_error = found["rank"] == self.me.rank and found["kind"] == "raised"
        if self.me.error is not None and (own_error or not self.me.tentative):
            if self._guard is not None:
                self._guard.cancel()
            if self.me.rank == 0:
                self._write(found)
            self.settled.set()
            return True
        self._bound()
        own = self.me.stack or record.main_stack(self.place.writer)
        record.say(found, self.me.rank, self.size, own, EXIT_LOST)
        if self.me.rank == 0:
            self._write(found)
        elif self._told is None:  # rank 0 is lost; on a shared disk the first survivor writes
            time.sleep(min(1.0, 0.05 * (self.me.rank - 1)))
            self._write(found)
        with contextlib.suppress(RuntimeError):
            clean = threading.Thread(target=self._clean_up, daemon=True)
            clean.start()
            clean.join(1.0)
        os._exit(EXIT_LOST)

    def _write(self, found: Record) -> None:
        if self.run_dir is None:
            return
        stacks = {m.rank: m.stack for m in (self.me, *self.others.values()) if m.stack}
        if found.get("stack"):
            stacks[found["rank"]] = found["stack"]
        record.write(self.run_dir, found, stacks)

    def _clean_up(self) -> None:
        """Kill the worker processes and flush the output buffers."""
        for child in multiprocessing.active_children():
            with contextlib.suppress(Exception):
                child.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


def _clock() -> float:
    return time.monotonic()
