"""Relay of screen output to the launching process, as JSON lines in a file: both ends of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.training.progress import Progress
from pretrain.training.state import RunState
from pretrain.utils.run_log import read_log

__all__ = ["Relay", "replay"]


class Relay(Progress):
    """Write screen output to a file, for another process to display.

    Args:
        path: file that gets one JSON object a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def _relay(self, what: str, **values: Any) -> None:
        line = json.dumps({"what": what, **values}) + "\n"
        # If the disk for temporary files is full, the run continues without screen output.
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(line)

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Relay the last step of the records; the reader takes them from the log."""
        self._relay("restore", step=max((int(r.get("step", 0)) for r in records), default=-1))

    def starting(self, what: str, seconds: Mapping[str, float]) -> None:
        self._relay("starting", name=what, seconds=dict(seconds))

    def show(self, step: int, figures: Mapping[str, float], total: int) -> None:
        self._relay("show", step=step, figures=dict(figures), total=total)

    def evaluation(self, record: Mapping[str, Any], state: RunState, note: str) -> None:
        self._relay("evaluation", record=dict(record), state=state.to_json(), note=note)

    def write(self, line: str) -> None:
        self._relay("write", line=line)

    def close(self) -> None:
        self._relay("close")


def replay(update: Mapping[str, Any], screen: Progress, out: Path) -> None:
    """Show what a `Relay` has written of a run in the directory ``out``."""
    method = update["what"]
    if method == "show":
        screen.show(update["step"], update["figures"], update["total"])
    elif method == "evaluation":
        screen.evaluation(update["record"], RunState.from_json(update["state"]), update["note"])
    elif method == "starting":
        screen.starting(update["name"], update["seconds"])
    elif method == "write":
        screen.write(update["line"])
    elif method == "restore":
        records = [r for r in read_log(out / "log.jsonl") if r.get("step", 0) <= update["step"]]
        screen.restore(records)
