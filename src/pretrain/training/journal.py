"""What a run tells: its log file, the bar on the screen and the loggers, written from one place."""

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
    """The voices of a run.

    Args:
        out: run directory; ``log.jsonl`` lies in it.
        loggers: names of further loggers.
        about: what they are told about the run when they start.
        quiet: print nothing and show no bar; the log and the loggers get everything.
        leads: of several processes one speaks; the others write nothing at all.

    Attributes:
        epoch_rows: rows of an epoch; once it is set, evaluations are also placed by epochs.
    """

    def __init__(
        self,
        out: Path,
        loggers: Sequence[str],
        about: Mapping[str, Any],
        quiet: bool = False,
        *,
        leads: bool = True,
    ) -> None:
        self._out, self._leads = out, leads
        self._loggers: list[Logger] = make_loggers(loggers if leads else (), out, about)
        self._progress = None if quiet or not leads else open_screen()
        self._log: RunLog | None = None
        self.epoch_rows = 0

    def open_log(self, keep_until: int | None, last: str = "") -> None:
        """Start ``log.jsonl``, or go on with its lines up to step ``keep_until``; ``last`` as in ``RunLog``."""
        if not self._leads:
            return
        self._log = RunLog(self._out / "log.jsonl", keep_until, last)
        if self._progress is not None:
            self._progress.restore(self._log.records)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Lines of the log so far."""
        return [] if self._log is None else self._log.records

    @property
    def last(self) -> str:
        """Digest of the last line of the log."""
        return "" if self._log is None else self._log.last

    def say(self, line: str) -> None:
        """Print a line where the user looks."""
        if self._progress is not None:
            self._progress.write(line)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record to the log."""
        if self._log is not None:
            self._log.write(record)

    def steps(self, record: Mapping[str, Any], state: RunState, flops: float, peak: float) -> None:
        """Write the mean over the steps since the last line, and start the next window.

        Args:
            record: of the last step.
            state: with the sums of the window, which are reset.
            flops: operations of the window.
            peak: operations per second that the device can do.
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
        shown["tok/s"] = line["tokens_per_second"]
        if self._progress is not None:
            self._progress.show(state.step, shown, state.total_steps)
        state.window_total = state.window_count = state.window_seconds = 0.0
        state.window_tokens = 0

    def evaluation(
        self, state: RunState, figures: Mapping[str, float], samples: Sequence[str], note: str
    ) -> None:
        """Write the figures of an evaluation and what the model can do now."""
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
            except Exception as error:  # whatever a service answers, training goes on without it
                self._loggers.remove(logger)
                self.say(f"a logger failed and is left out from here on: {error}")

    def sync(self) -> None:
        """Make the log durable; called before a checkpoint is."""
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
