"""Output of a run: ``log.jsonl``, the progress bar, external loggers, and the journal that writes to all of them.

Nothing is sent anywhere unless a logger is named.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pretrain.errors import ConfigError, did_you_mean
from pretrain.printing import printable
from pretrain.training.state import RunState
from pretrain.utils import files
from pretrain.utils.files import note, replace_file, writing
from pretrain.utils.run_log import LogFile, line_digest, open_log

__all__ = ["LOGGERS", "Journal", "Progress", "RunLog", "make_loggers"]


class RunLog:
    """Append-only ``log.jsonl``, which a resumed run continues.

    No result depends on it: a damaged file is reported and kept under another name, and the run continues.

    Args:
        path: the file.
        keep_until: records after this step are dropped, because the run will repeat it; None starts a new log.
        last: digest of the last line, as recorded in the checkpoint of that step; "" for none.
    """

    def __init__(self, path: Path, keep_until: int | None, last: str = "") -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.last = ""
        with writing(path):
            found = LogFile() if keep_until is None else open_log(path, last)
            if found.damage:
                self._set_aside(found)
            kept = [
                r for r in found.records if keep_until is None or r.get("step", 0) <= keep_until
            ]
            replace_file(path, b"".join(self._line(record) for record in kept))
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
            self._file = os.fdopen(files.IO.open(path, flags), "ab")

    def _set_aside(self, found: LogFile) -> None:
        aside = next(
            name
            for k in itertools.count(1)
            if not os.path.lexists(name := self.path.with_name(f"log.damaged-{k}.jsonl"))
        )
        if os.path.lexists(self.path):
            os.rename(self.path, aside)
        note(
            f"{self.path} is damaged: {found.damage}. No result depends on it: the run continues with its "
            f"{len(found.records)} intact lines, and the damaged file is kept as {aside.name}."
        )

    def _line(self, record: dict[str, Any]) -> bytes:
        text = json.dumps(record).encode()
        self.records.append(record)
        self.last = line_digest(self.last, text)
        return text[:-1] + f', "chain": "{self.last}"}}\n'.encode()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers keep full precision, non-finite ones become strings."""
        line = self._line({key: _plain(value) for key, value in record.items()})
        with writing(self.path):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Make the log durable (fsync); called before a checkpoint is written."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with writing(self.path):
            self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class Progress:
    """A tqdm progress bar with the main metrics; without a terminal or notebook, a line every 30 seconds."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self._live = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._bar = tqdm(desc="train", unit="step", dynamic_ncols=True, disable=not self._live)
        self._last_print = 0.0

    def show(self, step: int, figures: Mapping[str, float], total: int) -> None:
        """Set the bar to ``step`` of ``total`` with ``figures`` beside it."""
        text = " | ".join(f"{key} {value:.4g}" for key, value in figures.items())
        if self._live:
            if self._bar.n == 0:
                self._bar.initial = step - 1  # the pace of a resumed run counts from the resume
            self._bar.n, self._bar.total = step, total
            self._bar.set_postfix_str(text, refresh=True)
        elif time.monotonic() - self._last_print > 30:
            self._last_print = time.monotonic()
            print(f"step {step:,} of {total:,} | {printable(text)}", file=sys.stderr, flush=True)

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Load the records from before a resume; the progress bar does not need them."""

    def evaluation(self, record: Mapping[str, Any], state: RunState, note: str) -> None:
        """Print the figures of an evaluation, a note on them, and samples of the model."""
        figures = record["eval"].items()
        shown = [f"{key} {float(value):.4g}" for key, value in figures if key != "targets"]
        self.write(f"step {state.step:,}: validation: {', '.join(shown)}{note}")
        for line in record.get("samples", ()):
            self.write(f"    {line!r}")

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        line = printable(line, lines=True)
        if self._live:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar; its last state stays visible."""
        self._bar.close()


class Logger(Protocol):
    """Interface of an external logger: log flat metrics at a step, and close."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"))
        self.close = self._writer.close

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)


class _Tracked:
    """Weights & Biases and trackio, which share one interface."""

    def __init__(self, module: str, out: Path, config: Mapping[str, Any]) -> None:
        self._library: Any = importlib.import_module(module)
        self._library.init(project="pretrain", name=out.name, config=dict(config))
        self.close = self._library.finish

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._library.log(dict(figures), step=step)


LOGGERS = ("tensorboard", "wandb", "trackio")


def make_loggers(names: Sequence[str], out: Path, config: Mapping[str, Any]) -> list[Logger]:
    """Start the named loggers.

    Raises:
        ConfigError: a logger is unknown, or its package is not installed.
    """
    loggers: list[Logger] = []
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"train.loggers names {name!r}." + did_you_mean(name, LOGGERS))
        try:
            tracked = name != "tensorboard"
            loggers.append(_Tracked(name, out, config) if tracked else _TensorBoard(out))
        except ImportError as error:
            raise ConfigError(
                f"train.loggers names {name!r}, whose package is not installed ({error}). "
                f"Install it with: pip install {name}"
            ) from error
        except Exception as error:  # no key, no network, a service that is down
            raise ConfigError(f"The logger {name!r} cannot start: {error}") from error
    return loggers


class Journal:
    """Send metrics to log.jsonl, the progress bar and external loggers.

    Args:
        out: run directory, which contains ``log.jsonl``.
        loggers: names of external loggers.
        about: description of the run that is passed to the loggers.
        quiet: print nothing and show no bar; the log and the loggers get everything.
        leads: whether this is rank zero; other ranks write nothing.
        unit: what the speed counts, see ``Objective.unit_name``.

    Attributes:
        epoch_rows: rows of an epoch; once set, records of evaluations include the epoch.
    """

    def __init__(
        self,
        out: Path,
        loggers: Sequence[str],
        about: Mapping[str, Any],
        quiet: bool = False,
        *,
        leads: bool = True,
        unit: str = "tokens",
    ) -> None:
        from pretrain.training.live import open_screen

        self._out, self._leads, self._unit = out, leads, unit
        self._loggers: list[Logger] = make_loggers(loggers if leads else (), out, about)
        self._progress = None if quiet or not leads else open_screen()
        self._log: RunLog | None = None
        self.epoch_rows = 0

    def open_log(self, keep_until: int | None, last: str = "") -> None:
        """Start ``log.jsonl``, or continue it after step ``keep_until``; arguments as in ``RunLog``."""
        if not self._leads:
            return
        self._log = RunLog(self._out / "log.jsonl", keep_until, last)
        if self._progress is not None:
            self._progress.restore(self._log.records)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of the log so far."""
        return [] if self._log is None else self._log.records

    @property
    def last(self) -> str:
        """Digest of the last line of the log."""
        return "" if self._log is None else self._log.last

    def say(self, line: str) -> None:
        """Print a line above the progress bar, unless quiet."""
        if self._progress is not None:
            self._progress.write(line)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record to the log."""
        if self._log is not None:
            self._log.write(record)

    def steps(self, record: Mapping[str, Any], state: RunState, flops: float, peak: float) -> None:
        """Log the means over the steps since the last line, and start the next window.

        Args:
            record: record of the last step.
            state: holds the sums of the window, which are reset.
            flops: floating-point operations of the window.
            peak: peak FLOP/s of all devices.
        """
        seconds = max(state.window_seconds, 1e-9)
        count = state.window_count
        line = {
            "step": state.step,
            "loss": state.window_total / count if count else math.nan,
            "lr": record["lr"],
            "grad_norm": record["grad_norm"],
            "tokens": state.tokens,
            "rows": state.rows,
            "tokens_per_second": state.window_tokens / seconds,
            "mfu": flops / seconds / peak,
            "seconds": state.seconds,
        }
        self.write(line | ({} if self._unit == "tokens" else {"unit": self._unit}))
        self._send("train", state.step, {k: float(v) for k, v in line.items() if k != "step"})
        shown = {key: line[key] for key in ("loss", "lr", "mfu")}
        shown[f"{self._unit}/s"] = line["tokens_per_second"]
        if self._progress is not None:
            self._progress.show(state.step, shown, state.total_steps)
        state.window_total = state.window_count = state.window_seconds = 0.0
        state.window_tokens = 0

    def evaluation(
        self, state: RunState, figures: Mapping[str, float], samples: Sequence[str], note: str
    ) -> None:
        """Log the figures of an evaluation and samples of the model."""
        record = {"step": state.step, "eval": dict(figures), "samples": list(samples)}
        record["seconds"] = state.seconds
        if self.epoch_rows:
            record["epoch"] = round(state.rows / self.epoch_rows, 4)
        self.write(record)
        self._send("eval", state.step, figures)
        if self._progress is not None:
            self._progress.evaluation(record, state, note)

    def _send(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        for logger in list(self._loggers):
            try:
                logger.log({f"{group}/{key}": value for key, value in figures.items()}, step)
            except Exception as error:  # training continues without a logger that fails
                self._loggers.remove(logger)
                self.say(f"a logger failed and is not used any more: {error}")

    def sync(self) -> None:
        """Make the log durable (fsync); called before a checkpoint is written."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Close the log, the bar and the loggers."""
        for sink in (self._progress, self._log, *self._loggers):
            if sink is not None:
                sink.close()
