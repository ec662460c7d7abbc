"""Output of a run: ``log.jsonl``, the screen, external loggers, and the journal that writes to all of them.

Nothing is sent anywhere unless a logger is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, did_you_mean
from pretrain.printing import console
from pretrain.training.live import open_screen
from pretrain.training.progress import Silence
from pretrain.training.state import RunState
from pretrain.utils import files
from pretrain.utils.directories import keep_foreign
from pretrain.utils.files import note, replace_file, writing
from pretrain.utils.run_log import NATS, LogFile, line_digest, open_log

__all__ = ["LOGGERS", "Journal", "RunLog", "check_loggers", "make_loggers"]


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
            if keep_until is None:
                keep_foreign(path, b'"chain": "')
            log = LogFile() if keep_until is None else open_log(path, last)
            if log.damage:
                self._set_aside(log)
            records = [
                r for r in log.records if keep_until is None or r.get("step", 0) <= keep_until
            ]
            self._write_anew(records)

    def _write_anew(self, records: Sequence[dict[str, Any]]) -> None:
        lines = self._lines(records)
        replace_file(self.path, lines)
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        self._file, self._size = os.fdopen(files.IO.open(self.path, flags), "ab"), len(lines)

    def _lines(self, records: Sequence[dict[str, Any]]) -> bytes:
        """Start the log again with some records, and return their lines."""
        self.records, self.last = [], ""
        return b"".join(map(self._line, records))

    def restore(self) -> None:
        """Write the log again, and say so, if the file was removed, replaced, extended or cut since it was written.

        Another file with the same lines is only opened: some network file systems change inodes.
        """
        with writing(self.path):
            status = os.lstat(self.path) if os.path.lexists(self.path) else None
            unchanged = False
            if status and stat.S_ISREG(status.st_mode) and status.st_size == self._size:
                if os.path.samestat(status, os.fstat(self._file.fileno())):
                    return
                unchanged = self.path.read_bytes() == self._lines(self.records)
            self._file.close()
            aside = ""
            if status and not unchanged:
                aside = f" What stood there is kept as {self._move_aside()}."
            self._write_anew(self.records)
            if not unchanged:
                note(
                    f"{self.path} was removed or changed by another program while the run was going on. All of its "
                    f"lines are written again.{aside}"
                )

    def _move_aside(self) -> str:
        aside = next(
            name
            for k in itertools.count(1)
            if not os.path.lexists(name := self.path.with_name(f"log.damaged-{k}.jsonl"))
        )
        if os.path.lexists(self.path):
            os.rename(self.path, aside)
        return aside.name

    def _set_aside(self, found: LogFile) -> None:
        note(
            f"{self.path} is damaged: {found.damage}. No result depends on it: the run continues with its "
            f"{len(found.records)} intact lines, and the damaged file is kept as {self._move_aside()}."
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
            self._size += len(line)

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


class _TensorBoard:
    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what a run that was killed wrote of the steps that are made again.
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.close = self._writer.close

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)


class _Tracked:
    """Weights & Biases and trackio, which share one interface but for runs that go on: those of trackio have no id."""

    def __init__(self, module: str, out: Path, config: Mapping[str, Any], run: str) -> None:
        self._library: Any = importlib.import_module(module)
        # The id of a user, or of the agent of a sweep, decides.
        chosen = module != "wandb" or "WANDB_RUN_ID" in os.environ
        again = {} if chosen else {"id": run, "resume": "allow"}
        self._library.init(project="pretrain", name=out.name, config=dict(config), **again)
        self.close = self._library.finish

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._library.log(dict(figures), step=step)


LOGGERS = ("tensorboard", "wandb", "trackio")


def check_loggers(names: Sequence[str]) -> None:
    """Check that the loggers are known and their packages installed, without importing them.

    Raises:
        ConfigError: one of them is unknown, or its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"train.loggers names {name!r}." + did_you_mean(name, LOGGERS))
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.loggers names {name!r}, whose package is not installed. Install it with: pip install {name}"
            )


def make_loggers(
    names: Sequence[str], out: Path, config: Mapping[str, Any], step: int = 0, run: str = "run"
) -> list[_TensorBoard | _Tracked]:
    """Start the named loggers, for the steps after ``step``; ``run`` is an id that is the same when a run goes on.

    Raises:
        ConfigError: a logger is unknown, or its package is not installed.
    """
    check_loggers(names)
    loggers: list[_TensorBoard | _Tracked] = []
    for name in names:
        try:
            tracked = name != "tensorboard"
            loggers.append(_Tracked(name, out, config, run) if tracked else _TensorBoard(out, step))
        except ImportError as error:
            raise ConfigError(
                f"train.loggers names {name!r}, whose package cannot be imported ({error}). "
                f"Install it with: pip install {name}"
            ) from error
        except Exception as error:  # such as no key, no network, or a service that is down
            raise ConfigError(f"The logger {name!r} cannot start: {error}") from error
    return loggers


class Journal:
    """Send metrics to log.jsonl, the screen and external loggers.

    Args:
        out: run directory, which contains ``log.jsonl``.
        loggers: names of external loggers.
        about: description of the run that is passed to the loggers.
        quiet: print and draw nothing; the log and the loggers get everything.
        is_rank_zero: whether this is rank zero; other ranks write nothing.
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
        is_rank_zero: bool = True,
        unit: str = "tokens",
        loss_unit: str = NATS,
    ) -> None:
        self._out, self._is_rank_zero, self._unit = out, is_rank_zero, unit
        # What the log of nearly every run would say is left out of it.
        self._units = {} if unit == "tokens" else {"unit": unit}
        self._units |= {} if loss_unit == NATS else {"loss_unit": loss_unit}
        self._names, self._about = loggers, about
        self._loggers: list[_TensorBoard | _Tracked] = []
        self._screen = Silence() if quiet or not is_rank_zero else open_screen()
        self._log: RunLog | None = None
        self.epoch_rows = 0
        self._start_up_seconds: dict[str, float] = {}
        self._screen_lost = False

    @contextlib.contextmanager
    def starting(self, what: str) -> Iterator[None]:
        """Show a step of the start-up while it runs, and measure its seconds."""
        self._screen.starting(what, self._start_up_seconds)
        began = time.monotonic()
        yield
        self._start_up_seconds[what] = time.monotonic() - began

    def started(self) -> None:
        """Print the steps of the start-up with their seconds."""
        self._screen.starting("", self._start_up_seconds)

    def open_log(self, keep_until: int | None, last: str = "") -> None:
        """Start ``log.jsonl`` and the loggers, or continue them after ``keep_until``; arguments as in ``RunLog``."""
        if not self._is_rank_zero:
            return
        self._log = RunLog(self._out / "log.jsonl", keep_until, last)
        known = next((r["run"] for r in self.records if r.get("event") == "loggers"), "")
        run, step = known or secrets.token_hex(8), keep_until or 0
        # A copy of the directory is another run.
        place = hashlib.sha256(os.fsencode(self._out.absolute())).hexdigest()[:8]
        self._loggers = make_loggers(self._names, self._out, self._about, step, f"{run}-{place}")
        if "wandb" in self._names and not known:
            self._log.write({"event": "loggers", "step": step, "run": run})
        self._screen.restore(self._log.records)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of the log so far."""
        return [] if self._log is None else self._log.records

    @property
    def last(self) -> str:
        """Digest of the last line of the log."""
        return "" if self._log is None else self._log.last

    def say(self, line: str) -> None:
        """Print a line, unless quiet."""
        self._screen.write(line)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record to the log; once nothing can be printed any more, also one of that."""
        if self._log is None:
            return
        self._log.write(record)
        if (reason := console().lost) and not self._screen_lost:
            self._screen_lost = True
            self._log.write({"event": "screen lost", "step": record["step"], "reason": reason})

    def steps(
        self,
        record: Mapping[str, Any],
        state: RunState,
        flops: float,
        peak: float,
        *,
        show_mfu: bool = True,
    ) -> None:
        """Log the means over the steps since the last line, and start the next window.

        Args:
            record: record of the last step.
            state: holds the sums of the window, which are reset.
            flops: floating-point operations of the window.
            peak: peak FLOP/s of all devices.
            show_mfu: show the share of it that was used; the log has it in any case.
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
        self.write(line | self._units)
        self._send("train", state.step, {k: float(v) for k, v in line.items() if k != "step"})
        speed = {f"{self._unit}/s": line["tokens_per_second"]}
        shown = {"loss": line["loss"], **speed, "lr": line["lr"]}
        if show_mfu:
            shown["mfu"] = line["mfu"]
        self._screen.show(state.step, shown, state.total_steps)
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
        self._screen.evaluation(record, state, note)

    def _send(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        for logger in list(self._loggers):
            try:
                logger.log({f"{group}/{key}": value for key, value in figures.items()}, step)
            except Exception as error:  # training continues without a logger that fails
                self._loggers.remove(logger)
                self.say(f"a logger failed and is not used any more: {error}")

    def restore_log(self) -> None:
        """Write the log again if it was removed or changed since it was written; see ``RunLog.restore``."""
        if self._log is not None:
            self._log.restore()

    def sync(self) -> None:
        """Make the log durable (fsync); called before a checkpoint is written."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Close the log, the bar and the loggers."""
        for sink in (self._screen, self._log, *self._loggers):
            if sink is not None:
                sink.close()
