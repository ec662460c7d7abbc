"""The screen of a run in a terminal or a log file, and that of a quiet run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.printing import clock, columns, console, in_notebook, printable, wrapped
from pretrain.training.state import RunState

__all__ = ["Progress", "Silence"]

_PAUSE = 30.0  # seconds between two lines of the pace in a log file
_ROOMY = 110  # columns from which there is room for a bar beside the figures


class Progress:
    """One line that changes, on a terminal; in a log file plain lines, those of the pace every 30 seconds."""

    def __init__(self) -> None:
        self._file = console()
        self._live = self._file.isatty() and not in_notebook()
        self._drawn = ""
        self._last_print = -_PAUSE
        self._since: tuple[float, int] | None = None

    def starting(self, what: str, seconds: Mapping[str, float]) -> None:
        """Show the start-up step that begins ("" after the last one), and the ``seconds`` of the steps before."""
        if not what:
            self._redraw("")
            self.write("start-up: " + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()))
        elif self._live:
            self._redraw(f"{what} ...")
        else:
            self.write(f"{what} ...")

    def show(self, step: int, figures: Mapping[str, float], total: int) -> None:
        """Show the ``figures`` of ``step`` of ``total``, and the time left at the pace so far."""
        now = time.monotonic()
        if self._since is None:
            self._since = now, step  # the pace of a resumed run counts from the resume
        words = [f"{key} {value:.4g}" for key, value in figures.items() if not key.endswith("/s")]
        speeds = [f"{value:,.0f} {key}" for key, value in figures.items() if key.endswith("/s")]
        if step > self._since[1]:
            each = (now - self._since[0]) / (step - self._since[1])
            speeds.append(f"{clock(each * (total - step))} left")
        share = step / max(total, 1)
        if self._live:
            bar = f" {'█' * round(20 * share):░<20}" if (columns(self._file) or 0) >= _ROOMY else ""
            head = f"{share:4.0%}{bar} step {step:,}/{total:,}"
            self._redraw(" | ".join([head, *words[:1], *speeds, *words[1:]]))
            if step >= total:
                self.close()  # later lines are printed below it
        elif now - self._last_print > _PAUSE:
            self._last_print = now
            head = f"step {step:,} of {total:,} ({share:.0%})"
            self.write(" | ".join([head, *words[:1], *speeds, *words[1:]]))

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Load the records from before a resume; the progress bar does not need them."""

    def evaluation(self, record: Mapping[str, Any], state: RunState, note: str) -> None:
        """Print the figures of an evaluation, a note on them, and samples of the model."""
        figures = record["eval"].items()
        shown = [f"{key} {float(value):.4g}" for key, value in figures if key != "targets"]
        self.write(f"step {state.step:,}: validation: {', '.join(shown)}{note}")
        for sample in record.get("samples", ()):
            self.write("\n".join(f"    {line}" for line in sample.splitlines()))

    def write(self, line: str) -> None:
        """Print a line above the one that changes; on a terminal long ones are wrapped between words."""
        line = printable(line, lines=True)
        if self._live:
            drawn, self._drawn = self._drawn, " " * len(self._drawn)
            self._file.write(f"\r{self._drawn}\r{wrapped(line, columns(self._file))}\n")
            self._redraw(drawn)
        else:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """End the line; its last state stays visible."""
        if self._drawn:
            self._file.write("\n")
            self._drawn = ""

    def _redraw(self, text: str) -> None:
        """Replace the line that changes; what does not fit is left out from the end, whole figures at a time."""
        if not self._live:
            return
        text, parts = printable(text), printable(text).split(" | ")
        room = columns(self._file) or 0
        while len(text) >= room and len(parts) > 1:
            parts.pop()
            text = " | ".join(parts)
        text = text[: room - 1]
        self._file.write(f"\r{text.ljust(len(self._drawn))}")
        self._file.flush()
        self._drawn = text


class Silence(Progress):
    """The screen of a quiet run, and of ranks that print nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._live = False

    def write(self, line: str) -> None:
        """Print nothing."""
