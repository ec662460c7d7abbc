"""Relay of screen output to the launching process, as JSON lines in a file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.distributed.launched import SCREEN
from pretrain.training.logging import Progress
from pretrain.training.state import RunState

__all__ = ["Relay", "relay"]


def relay() -> Progress | None:
    """Return the relay of a process whose output is displayed by another one; None for all others."""
    path = os.environ.get(SCREEN)
    return None if path is None else Relay(Path(path))


class Relay(Progress):
    """Write screen output to a file, for another process to display.

    Args:
        path: file that gets one JSON object a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def _tell(self, what: str, **values: Any) -> None:
        line = json.dumps({"what": what, **values}) + "\n"
        # If the disk for temporary files is full, the run continues without screen output.
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(line)

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Relay the last step of the records; the reader takes them from the log."""
        self._tell("restore", step=max((int(r.get("step", 0)) for r in records), default=-1))

    def starting(self, what: str, taken: Mapping[str, float]) -> None:
        """Relay a step of the start-up."""
        self._tell("starting", name=what, taken=dict(taken))

    def show(self, step: int, figures: Mapping[str, float], total: int) -> None:
        """Relay the figures of a step."""
        self._tell("show", step=step, figures=dict(figures), total=total)

    def evaluation(self, record: Mapping[str, Any], state: RunState, note: str) -> None:
        """Relay an evaluation."""
        self._tell("evaluation", record=dict(record), state=asdict(state), note=note)

    def write(self, line: str) -> None:
        """Relay a line."""
        self._tell("write", line=line)

    def close(self) -> None:
        """Relay the end of the output."""
        self._tell("close")
