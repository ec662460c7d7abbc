"""What a run must remember to go on as if it had never stopped."""

from __future__ import annotations

import atexit
import contextlib
import gc
import html
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.distributed.launched import launched

__all__ = ["SIGNALS", "Run", "RunState", "StopRequest", "catch_signals", "heap_at_rest"]


# That ask a run to save and to stop.
SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_SAME_REQUEST = 2.0  # seconds after a signal in which a second one says nothing new
# Seconds after the end of a run that was stopped or failed, in which a launcher may still ask again; then it kills.
_LINGER = 30.0


@dataclass
class RunState:
    """The integers and sums behind a run; no random state, because every stream is a function of these.

    Attributes:
        step: optimizer steps attempted; skipped ones count, or the schedule would drift.
        rows: rows consumed, which is the position in the data.
        tokens: real (not padding) tokens seen.
        total_steps: steps of the whole run; moves only under a limit in minutes.
        skipped: steps without an update because a number was not finite; ``skipped_in_row`` of them just now.
        owed: an evaluation was broken off by a request to stop.
        best_score: the monitored figure at its best, with the sign that makes lower better; ``monitor`` names it.
        loss_at_best: loss of that evaluation, which decides between equal figures; None where it is not known.
        lowest: depth of the lowest layer that gradual unfreezing has released; None before the first step.
        window_total, window_count, window_tokens, window_seconds: sums since the last logged line.
        seconds: wall time of all parts of the run.
        lr: peak learning rate of the run.
        log: digest of the last line of ``log.jsonl``.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    total_steps: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    last_eval: int = 0
    owed: bool = False
    last_save: int = 0
    monitor: str = "loss"
    best_score: float = math.inf
    loss_at_best: float | None = None
    best_step: int = 0
    evals_since_best: int = 0
    lowest: int | None = None
    window_total: float = 0.0
    window_count: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    seconds: float = 0.0
    scale: dict[str, float] = field(default_factory=dict)
    probe_loss: float | None = None
    limit: str = ""
    lr: float | None = None
    log: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite best score becomes null."""
        plain = asdict(self)
        plain["best_score"] = None if math.isinf(self.best_score) else self.best_score
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> RunState:
        """Inverse of ``to_json``; also reads states from before there were monitors, with a best loss."""
        plain = {"best_score": plain.get("best_loss"), **plain}
        known = {key: value for key, value in plain.items() if key in cls.__dataclass_fields__}
        if known["best_score"] is None:
            known["best_score"] = math.inf
        return cls(**known)


@dataclass
class Run:
    """What ``fit`` returns: where the run lies and how it went.

    Attributes:
        path: run directory; ``checkpoint`` is its newest checkpoint, ``best`` the one that is best on the held-out
            rows by ``train.monitor``: the newest where nothing was evaluated, None if it was not kept.
        stopped: why it ended: ``limit``, ``patience``, ``SIGINT``, ``SIGTERM``.
        metrics: the last evaluation.
        history: records of ``log.jsonl``.
    """

    path: Path
    step: int
    stopped: str
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    checkpoint: Path | None = None
    best: Path | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as a shell expects."""
        number = getattr(signal, self.stopped, None) if self.stopped.startswith("SIG") else None
        return 128 + int(number) if number else 0

    def __repr__(self) -> str:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in self.metrics.items())
        return f"Run({str(self.path)!r}, step {self.step:,}, stopped by {self.stopped}, {figures})"

    def _repr_html_(self) -> str:
        from pretrain.report.history import loss_svg, sort_records

        return f"<p>{html.escape(repr(self))}</p>{loss_svg(sort_records(self.history))}"


class StopRequest:
    """Set by the first signal; the loop looks at it between steps.

    Attributes:
        name: of the signal that this process received; it may be set at any moment.
        agreed: of the one that all processes of the run stop by; changes in ``settle`` alone.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.agreed: str | None = None

    def flags(self) -> list[float]:
        """What this process was asked, to be summed over all: a one for the signal among `SIGNALS`."""
        return [float(self.name == name) for name in SIGNALS]

    def settle(self, asked: Sequence[float]) -> None:
        """Take the sums of all flags: whoever was asked, all stop at the same step and for the same reason."""
        if self.agreed is None:
            self.agreed = next((n for n, count in zip(SIGNALS, asked, strict=True) if count), None)


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request to save and stop; who asks again is heard at once.

    A second signal within `_SAME_REQUEST` seconds is the same request once more, as when a terminal and a scheduler
    both send one: it changes nothing. A second one after that, or a third one at any time, ends the process.

    Under a launcher only SIGINT does: the launcher itself repeats the others, to every process that is left when the
    first has ended, and what is to be saved may not be saved by then.

    Outside the main thread Python allows no handlers, and the request just stays empty.
    """
    request, several, received = StopRequest(), launched(), list[tuple[float, int]]()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        now = time.monotonic()
        before_it = [at for at, n in received if not several or n == number]
        received.append((now, number))
        again = len(before_it) > 1 or (before_it and now - before_it[0] > _SAME_REQUEST)
        if again and (number == signal.SIGINT or not several):
            signal.signal(number, before[number])
            signal.raise_signal(number)
        request.name = request.name or signal.Signals(number).name

    for name in SIGNALS:
        number = getattr(signal, name)
        if signal.getsignal(number) in (signal.SIG_IGN, None):
            continue  # nohup ignores SIGHUP on purpose, and what Python did not set it cannot put back
        before[number] = signal.signal(number, handle)
    ended = False
    try:
        yield request
        ended = request.agreed is None
    finally:
        for number, handler in before.items():
            if several and not ended and number != signal.SIGINT:
                _turn_deaf(
                    number, handler
                )  # a process that fails with the others has still to say why
            else:
                signal.signal(number, handler)


def _turn_deaf(number: int, then: Any) -> None:
    """Ignore a signal in a process that stops or fails and is about to end; only after a while it is heard again."""
    end = time.monotonic() + _LINGER

    def handle(number: int, frame: Any) -> None:
        if time.monotonic() > end:
            signal.signal(number, then)
            signal.raise_signal(number)

    def at_exit() -> None:  # Python takes its own handlers away before the process has ended
        if signal.getsignal(number) is handle:
            signal.signal(number, signal.SIG_IGN)

    signal.signal(number, handle)
    atexit.register(at_exit)


@contextlib.contextmanager
def heap_at_rest() -> Iterator[None]:
    """Switch garbage collection off: one in the middle of a step costs up to half a second on large heaps.

    A caller that has frozen its own heap keeps it so.
    """
    collecting, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        if not frozen:
            gc.unfreeze()
