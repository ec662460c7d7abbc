"""State and result of a run, and the process during a run: stop requests by signals, garbage collection, gradients."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import html
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.distributed.launched import launched
from pretrain.errors import Interrupted
from pretrain.report.history import frame_of, loss_svg, plot_history, sort_records
from pretrain.report.run_report import write
from pretrain.utils.curves import Plot
from pretrain.utils.html import notebook_view

if TYPE_CHECKING:
    import torch

__all__ = [
    "SIGNALS",
    "Changed",
    "Run",
    "RunState",
    "StopRequest",
    "catch_signals",
    "freed_memory_kept",
    "garbage_collection_paused",
    "isolated_torch_state",
    "last_metrics",
]


# Signals that ask a run to save and stop.
SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_SAME_REQUEST = 2.0  # seconds within which a second signal counts as the same request
# Seconds after a run was stopped or failed in which a launcher may repeat its signal, before it kills.
_LINGER = 30.0
# Parameters of glibc's mallopt. Blocks above the mmap threshold lie outside of the heap and go back to the system when
# they are freed; 32 MB is the most to which malloc raises the threshold by itself, and which every version takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -1, -3, 1 << 25
# Setting that changed on resuming -> its value before and now.
Changed = dict[str, tuple[Any, Any]]
# Attribute of `RunState` -> its key in state.json, where they differ.
_KEYS = {"eval_pending": "owed", "unfrozen_from": "lowest"}


@dataclass
class RunState:
    """Counters and sums of a run; no random state, because every random stream is a function of these.

    Attributes:
        step: optimizer steps attempted; skipped steps count, otherwise the schedule would drift.
        rows: rows consumed, which is the position in the data.
        tokens: tokens seen, without padding.
        total_steps: steps of the whole run; changes during training only under a limit in minutes.
        skipped: steps without an update because of non-finite numbers; ``skipped_in_row`` of them in a row just now.
        eval_pending: an evaluation was interrupted by a stop request, and must be repeated.
        eval_rows: held-out rows on which ``best_score`` was measured; None if unknown, 0 if as no evaluation is now.
        best_score: best value of the metric ``monitor``, negated if higher is better.
        loss_at_best: loss of that evaluation, which resolves ties; None if unknown.
        unfrozen_from: depth of the lowest layer unfrozen by gradual unfreezing; None before the first step.
        window_total, window_count, window_tokens, window_seconds: sums since the last logged line.
        seconds: wall time of training, over all resumes, without the start-ups.
        lr: peak learning rate of the run.
        micro_rows: rows per forward pass that were measured to be the fastest, or since memory ran out with more; 0 if
            the settings and the data decide.
        recut: ``train.recut`` of the run; earlier versions never cut documents anew.
        fixed_statistics: the running statistics of the model that the run began with are kept.
        facts: what reports show of model and machine: ``parameters`` (without frozen ones beside the model),
            ``trained``, ``hardware``, ``precision``, ``peak_memory`` (bytes of one process).
        log: digest of the last line of ``log.jsonl``.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    total_steps: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    last_eval: int = 0
    eval_pending: bool = False
    last_save: int = 0
    monitor: str = "loss"
    eval_rows: int | None = None
    best_score: float = math.inf
    loss_at_best: float | None = None
    best_step: int = 0
    evals_since_best: int = 0
    unfrozen_from: int | None = None
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
    micro_rows: int = 0
    recut: bool = False
    fixed_statistics: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; an infinite best score becomes null."""
        plain = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        plain["best_score"] = None if math.isinf(self.best_score) else self.best_score
        return plain

    def best_kept(self, run_dir: Path, newest: Path | None) -> Path | None:
        """Return the best checkpoint, or the newest if nothing was evaluated; None if it was not kept."""
        best = run_dir / f"checkpoint-{self.best_step}" if self.best_step else newest
        return best if best is not None and best.exists() else None

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> RunState:
        """Inverse of ``to_json``; also reads older states, which have ``best_loss`` and no monitor."""
        plain = {"best_score": plain.get("best_loss"), **plain}
        names = {_KEYS.get(name, name): name for name in cls.__dataclass_fields__}
        known = {names[key]: value for key, value in plain.items() if key in names}
        if known["best_score"] is None:
            known["best_score"] = math.inf
        return cls(**known)


@dataclass
class Run:
    """Result of ``fit``: paths, metrics and history of a run.

    Attributes:
        path: run directory.
        step: last optimizer step.
        stopped: why the run ended: ``limit``, ``patience``, ``SIGINT``, ``SIGTERM`` or ``SIGHUP``.
        metrics: figures of the last evaluation.
        history: records of ``log.jsonl``.
        checkpoint: newest checkpoint.
        best: checkpoint that is best on the held-out rows by ``train.monitor``; the newest one if nothing was
            evaluated, None if it was not kept.
        result: ``model`` in the run directory: the best checkpoint, or the newest if the best was not kept, as a model
            directory without the state of training. Its path is the same in every run.
    """

    path: Path
    step: int
    stopped: str
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    checkpoint: Path | None = None
    best: Path | None = None
    result: Path | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal number, as shells expect."""
        number = getattr(signal, self.stopped, None) if self.stopped.startswith("SIG") else None
        return 128 + int(number) if number else 0

    def plot(self, figure: str = "loss") -> Plot:
        """Draw the training and the held-out loss over the steps, or another held-out figure such as ``accuracy``.

        Raises:
            DataError: the run has no such figure.
        """
        return plot_history(sort_records(self.history), figure)

    def frame(self) -> Any:
        """Return the history as a pandas frame: one row per step, held-out figures as ``valid_loss`` and so on.

        Raises:
            DataError: pandas is not installed.
        """
        return frame_of(sort_records(self.history))

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Write the report of the run, ``report.html`` in its directory; a notebook shows it.

        Args:
            out: another file to write.
        """
        return write(self.path, out)

    def __repr__(self) -> str:
        shown = (f"{key} {value:.4g}" for key, value in self.metrics.items() if key != "targets")
        figures = ", ".join(shown)
        return f"Run({str(self.path)!r}, step {self.step:,}, stopped by {self.stopped}, {figures})"

    def _repr_html_(self) -> str:
        chart = loss_svg(sort_records(self.history))
        return notebook_view("run", f"<p>{html.escape(repr(self))}</p>", chart)


def last_metrics(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of the last evaluation in the records of a log; empty without one."""
    evals = [record["eval"] for record in history if "eval" in record]
    # The log stores non-finite numbers as strings.
    return {key: float(value) for key, value in (evals or [{}])[-1].items()}


class StopRequest:
    """Request to save and stop, set by the first signal and checked by the training loop between steps.

    Attributes:
        name: the signal that this process received; may be set at any moment.
        agreed: the signal that all ranks agreed to stop for; changes in ``agree`` only.
        interrupt_text: while it is not None a signal raises Interrupted with this text at once, see ``at_once``.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.agreed: str | None = None
        self.interrupt_text: str | None = None

    @contextlib.contextmanager
    def at_once(self, interrupt_text: str) -> Iterator[None]:
        """Let a signal raise Interrupted with the text ``interrupt_text``, as long as there is nothing to save."""
        self.interrupt_text = interrupt_text
        try:
            if self.name is not None:  # it came before
                raise self.interrupted()
            yield
        finally:
            self.interrupt_text = None

    def interrupted(self) -> Interrupted:
        """Return the exception that ends the run for the signal that was received."""
        assert self.name is not None
        return Interrupted(128 + getattr(signal, self.name), self.interrupt_text or "")

    def flags(self) -> list[float]:
        """Return one flag for each of `SIGNALS`, 1.0 for the received one; to be summed over all ranks."""
        return [float(self.name == name) for name in SIGNALS]

    def agree(self, asked: Sequence[float]) -> None:
        """Set ``agreed`` from the flags summed over all ranks, so that all stop at the same step for one signal."""
        if self.agreed is None:
            self.agreed = next((n for n, count in zip(SIGNALS, asked, strict=True) if count), None)


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request to save and stop; a later one ends the process.

    A second signal within `_SAME_REQUEST` seconds counts as the same request, as when a terminal and a scheduler both
    send one, and changes nothing. A second one after that, or a third one at any time, ends the process.

    Under a launcher only a repeated SIGINT ends the process: the launcher itself repeats the other signals to all
    remaining processes when the first one has ended, and the checkpoint may not be complete by then.

    Outside the main thread Python allows no signal handlers, and the request stays empty.

    Raises:
        Interrupted: inside ``StopRequest.at_once``, for the first signal.
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
        if request.name is None:
            request.name = signal.Signals(number).name
            if request.interrupt_text is not None:
                raise request.interrupted()

    for name in SIGNALS:
        number = getattr(signal, name)
        if signal.getsignal(number) in (signal.SIG_IGN, None):
            continue  # nohup ignores SIGHUP on purpose; handlers not set by Python cannot be restored
        before[number] = signal.signal(number, handle)
    ended = False
    try:
        yield request
        ended = request.agreed is None
    finally:
        for number, handler in before.items():
            if several and not ended and number != signal.SIGINT:
                # A failing process must still print its error.
                _ignore_for_a_while(number, handler)
            else:
                signal.signal(number, handler)


def _ignore_for_a_while(number: int, then: Any) -> None:
    """Ignore a signal for `_LINGER` seconds, in a process that was stopped or has failed and is about to end."""
    end = time.monotonic() + _LINGER

    def handle(number: int, frame: Any) -> None:
        if time.monotonic() > end:
            signal.signal(number, then)
            signal.raise_signal(number)

    def at_exit() -> None:  # Python removes its handlers before the process ends
        if signal.getsignal(number) is handle:
            signal.signal(number, signal.SIG_IGN)

    signal.signal(number, handle)
    atexit.register(at_exit)


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Disable garbage collection: one in the middle of a step takes up to half a second on large heaps.

    A heap that the caller has frozen stays frozen.
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


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc's malloc keep what a step frees for the next one: the system zeroes every page that it gives again.

    Afterwards the unused pages go back to the system, and the thresholds of the process stay at the largest values that
    malloc would choose by itself. Other allocators stay as they are, and so does malloc where the user has set it by
    environment variables.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    chosen |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_THRESHOLD)
        libc.malloc_trim(0)


@contextlib.contextmanager
def isolated_torch_state(device: torch.device | None = None) -> Iterator[None]:
    """Enable gradients inside the block, even in the caller's no_grad or inference mode, and restore the random state.

    Args:
        device: where the model runs; None if that is not known yet. The state of GPUs is restored if they are in use.
    """
    import torch  # reading the results of runs does not need torch

    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # not annotated in torch
    in_use = begun or (device is not None and device.type == "cuda")
    gpus = range(torch.cuda.device_count()) if in_use else ()
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(gpus):
        yield
