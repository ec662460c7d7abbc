"""Where the figures of a run go: ``log.jsonl`` always, a progress bar, and the loggers that are asked for.

``log.jsonl`` has one JSON object a line: ``{"step", "loss", "lr", ...}`` for training, ``{"step", "eval": {...}}``
for evaluations, ``{"event": ...}`` for the rest; ``"chain"`` is a digest over all lines up to this one. Nothing is sent
anywhere unless a logger is named.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pretrain.errors import CheckpointError, ConfigError, did_you_mean
from pretrain.printing import printable
from pretrain.storage import files
from pretrain.storage.files import note, open_regular, replace_file, writing
from pretrain.training.state import RunState

__all__ = ["LOGGERS", "LogFile", "Progress", "RunLog", "make_loggers", "open_log", "read_log"]


_CHAINED = re.compile(rb'(\{.+), "chain": "([0-9a-f]{12})"\}\n?')
_LINE = 4 << 20  # bytes of one line
_STEPS = 2**53
_FIGURES = (
    *("loss", "lr", "grad_norm", "tokens", "rows", "tokens_per_second", "mfu", "seconds", "epoch"),
)


@dataclass
class LogFile:
    """What is left of a ``log.jsonl``.

    Attributes:
        records: of the lines that hold, in order.
        chains: their digests; empty where the log is from before there were any.
        damage: what is wrong with the other lines, "" for nothing. A last line that was cut by a kill is no damage.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    chains: list[str] = field(default_factory=list)
    damage: str = ""


def open_log(path: Path, last: str = "") -> LogFile:
    """Read a ``log.jsonl`` as a file of unknown origin: no line of it is an error.

    Every line ends with a digest of itself and of the digest before it, so that a line which was changed, lost or moved
    is noticed. Logs without digests are read as well; a line that is no record of a run is damage there.

    Args:
        path: the file; none is an empty log.
        last: a digest that must be in it, as a checkpoint remembers it.
    """
    found, before, chained = LogFile(), "", False
    unchained: list[tuple[int, dict[str, Any]]] = []
    wrong: list[int] = []
    total = 0
    try:
        for total, line in enumerate(_lines(path), start=1):
            match = _CHAINED.fullmatch(line)
            body, chain = (line, "") if match is None else (match[1] + b"}", match[2].decode())
            record = _record(body)
            if match is None:
                if record is not None:
                    unchained.append((total, record))
                elif line.strip() and line.endswith(b"\n"):
                    wrong.append(total)
                continue
            if record is not None and chain == _chain(before, body):
                found.records.append(record)
                found.chains.append(chain)
            else:
                wrong.append(total)
            before, chained = chain, True
    except CheckpointError as error:
        return LogFile(damage=str(error))
    if chained:
        wrong = sorted([*wrong, *(number for number, _ in unchained)])
    else:
        found.records = [record for _, record in unchained]
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + ", ..." * (len(wrong) > 5)
        found.damage = f"{len(wrong)} of {total} lines are not as they were written (line {shown})"
    elif last and last not in found.chains:
        found.damage = "lines that were there when the newest checkpoint was written are missing"
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; one that is too long comes in pieces, none of which is a record."""
    if not os.path.lexists(path):
        return
    descriptor, _ = open_regular(Path(os.path.realpath(path)))
    with open(descriptor, "rb") as file:
        while line := file.readline(_LINE):
            yield line


def _chain(before: str, line: bytes) -> str:
    return hashlib.sha256(before.encode() + line).hexdigest()[:12]


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line, with figures that are numbers or spell one; None if it is no record of a run."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step", 0)
    if type(step) is not int or not 0 <= step < _STEPS:
        return None
    if "eval" in record and not isinstance(record["eval"], dict):
        return None
    kept = {key: value for key, value in record.items() if key not in _FIGURES or _is_figure(value)}
    if "eval" in kept:
        kept["eval"] = {key: value for key, value in kept["eval"].items() if _is_figure(value)}
    if "samples" in kept:
        samples = kept["samples"]
        kept["samples"] = [str(text) for text in samples] if isinstance(samples, list) else []
    return kept


def _is_figure(value: object) -> bool:
    try:
        return isinstance(value, int | float | str) and (float(value), True)[1]
    except (ValueError, OverflowError):
        return False


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``; see ``open_log``."""
    return open_log(path).records


class RunLog:
    """Append-only ``log.jsonl`` that a resumed run continues as if nothing had happened.

    It is history: damage is named, the damaged file is kept under another name, and the run goes on.

    Args:
        path: the file.
        keep_until: steps after this one are dropped, because the run will take them again; None starts afresh.
        last: digest of the last line that the checkpoint at that step knows of; "" for none.
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
        self.last = _chain(self.last, text)
        return text[:-1] + f', "chain": "{self.last}"}}\n'.encode()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers keep every bit, non-finite ones become strings."""
        line = self._line({key: _plain(value) for key, value in record.items()})
        with writing(self.path):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint is."""
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
            print(f"step {step:,} of {total:,} | {printable(text)}", file=sys.stderr, flush=True)

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
        line = printable(line, lines=True)
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
