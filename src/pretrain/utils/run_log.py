"""Reading and verification of a run's ``log.jsonl``, as untrusted input.

The file has one JSON object per line: ``{"step", "loss", "lr", ...}`` for training, ``{"step", "eval": {...}}`` for
evaluations, ``{"event": ...}`` for the rest; ``"chain"`` is a digest of all lines up to this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError
from pretrain.utils.files import open_regular

__all__ = ["NATS", "LogFile", "line_digest", "open_log", "read_log"]

NATS = "nats per target"  # unit of the loss of a likelihood

_CHAINED = re.compile(rb'(\{.+), "chain": "([0-9a-f]{12})"\}\n?')
_LINE = 4 << 20  # bytes; longest line
_STEPS = 2**53
_FIGURES = (
    *("loss", "lr", "grad_norm", "tokens", "rows", "tokens_per_second", "mfu", "seconds", "epoch"),
)


@dataclass
class LogFile:
    """The valid content of a ``log.jsonl``.

    Attributes:
        records: records of the valid lines, in order.
        chains: their digests; empty for logs of older versions, which have none.
        damage: description of the invalid lines, "" if there are none. A last line without a newline, cut off by a
            kill, does not count as damage.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    chains: list[str] = field(default_factory=list)
    damage: str = ""


def open_log(path: Path, last: str = "") -> LogFile:
    """Read a ``log.jsonl`` as untrusted input: invalid lines are described in the result and never raise an error.

    Every line ends with a digest of itself and of the previous digest, so that changed, lost and moved lines are
    detected. Logs without digests are read as well; in them only lines that are no records count as damage.

    Args:
        path: the file; a missing file is an empty log.
        last: a digest stored in a checkpoint, which the log must contain.
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
            if record is not None and chain == line_digest(before, body):
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
        found.damage = f"{len(wrong)} of {total} lines were changed or cut after they were written (line {shown})"
    elif last and last not in found.chains:
        found.damage = "it lacks lines that it had when the newest checkpoint was written"
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; a line that is too long is yielded in pieces, which are not valid records."""
    if not os.path.lexists(path):
        return
    descriptor, _ = open_regular(Path(os.path.realpath(path)))
    with open(descriptor, "rb") as file:
        while line := file.readline(_LINE):
            yield line


def line_digest(before: str, line: bytes) -> str:
    """Return the digest of a line and of all lines before it, whose digest is ``before``."""
    return hashlib.sha256(before.encode() + line).hexdigest()[:12]


def _record(line: bytes) -> dict[str, Any] | None:
    """Parse a line and drop figures that are neither numbers nor spell one; None if it is not a record of a run."""
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
    """Return the records of a ``log.jsonl``; see ``open_log``."""
    return open_log(path).records
