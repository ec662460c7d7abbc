"""Where the figures of a run go: ``log.jsonl`` always, a progress bar, and the loggers that are asked for.

``log.jsonl`` has one JSON object a line: ``{"step", "loss", "lr", ...}`` for training, ``{"step", "eval": {...}}``
for evaluations, ``{"event": ...}`` for the rest. Nothing is sent anywhere unless a logger is named.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from pretrain.errors import ConfigError, did_you_mean
from pretrain.storage.files import writing
from pretrain.training.state import RunState

__all__ = ["LOGGERS", "Progress", "RunLog", "make_loggers", "read_log"]


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a ``log.jsonl``; a torn last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class RunLog:
    """Append-only ``log.jsonl`` that a resumed run continues as if nothing had happened.

    Args:
        path: the file.
        keep_until: steps after this one are dropped, because the run will take them again; None starts afresh.
    """

    def __init__(self, path: Path, keep_until: int | None) -> None:
        self.path = path
        kept = []
        if keep_until is not None:
            kept = [r for r in read_log(path) if r.get("step", 0) <= keep_until]
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.records = kept
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers keep every bit, non-finite ones become strings."""
        clean = {key: _plain(value) for key, value in record.items()}
        self.records.append(clean)
        with writing(self.path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class Progress:
    """The tqdm bar with the figures that matter; where nobody looks, a line every half minute."""

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
                self._bar.initial = step - 1  # a resumed run's pace counts from where it resumed
            self._bar.n, self._bar.total = step, total
            self._bar.set_postfix_str(text, refresh=True)
        elif time.monotonic() - self._last_print > 30:
            self._last_print = time.monotonic()
            print(f"step {step:,} of {total:,} | {text}", file=sys.stderr, flush=True)

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take over what an earlier part of the run logged; a bar needs none of it."""

    def evaluation(self, record: Mapping[str, Any], state: RunState, note: str) -> None:
        """Print the figures of an evaluation, a remark on them, and what the model can do now."""
        figures = record["eval"].items()
        shown = [f"{key} {float(value):.4g}" for key, value in figures if key != "targets"]
        self.write(f"step {state.step:,}: held out: {', '.join(shown)}{note}")
        for line in record.get("samples", ()):
            self.write(f"    {line!r}")

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self._live:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Logger(Protocol):
    """What a logger does: take flat figures at a step, and close."""

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
