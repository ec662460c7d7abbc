"""Run logging: ``log.jsonl``, the progress bar and external loggers.

Nothing is sent anywhere unless a logger is named.
"""

from __future__ import annotations

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

__all__ = ["LOGGERS", "Progress", "RunLog", "make_loggers"]


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
            f"{self.path} is damaged: {found.damage}. It is history, which no result depends on: the run goes on with "
            f"the {len(found.records)} lines that hold, and the file is kept as {aside.name}."
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
    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracked:
    """Weights & Biases and trackio, which share one interface."""

    def __init__(self, module: str, out: Path, config: Mapping[str, Any]) -> None:
        import importlib

        self._library: Any = importlib.import_module(module)
        self._library.init(project="pretrain", name=out.name, config=dict(config))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._library.log(dict(figures), step=step)

    def close(self) -> None:
        self._library.finish()


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
            loggers.append(
                _TensorBoard(out, config) if name == "tensorboard" else _Tracked(name, out, config)
            )
        except ImportError as error:
            raise ConfigError(
                f"train.loggers names {name!r}, whose package is not installed ({error}). "
                f"Install it with: pip install 'pretrain[{name}]'"
            ) from error
        except Exception as error:  # no key, no network, a service that is down
            raise ConfigError(f"The logger {name!r} cannot start: {error}") from error
    return loggers
