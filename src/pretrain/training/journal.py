"""Output of a run: log file, progress bar and external loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.training.live import open_screen
from pretrain.training.logging import Logger, RunLog, make_loggers
from pretrain.training.state import RunState

__all__ = ["Journal"]


class Journal:
    """Send metrics to log.jsonl, the progress bar and external loggers.

    Args:
        out: run directory, which contains ``log.jsonl``.
        loggers: names of external loggers.
        about: description of the run that is passed to the loggers.
        quiet: print nothing and show no bar; the log and the loggers get everything.
        leads: whether this is rank zero; other ranks write nothing.

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
        self.write(line)
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
        record = {
            "step": state.step,
            "eval": dict(figures),
            "samples": list(samples),
            "seconds": state.seconds,
        }
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
                self.say(f"a logger failed and is left out from here on: {error}")

    def sync(self) -> None:
        """Make the log durable (fsync); called before a checkpoint is written."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Close the log, the bar and the loggers."""
        if self._progress is not None:
            self._progress.close()
        if self._log is not None:
            self._log.close()
        for logger in self._loggers:
            logger.close()
