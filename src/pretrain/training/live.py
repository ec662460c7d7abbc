"""Live view of a run in a notebook: progress, loss curve and a table of evaluations, redrawn in place.

The view is self-contained HTML without scripts, so that a saved notebook keeps its last state. Outside of notebooks,
and if the notebook fails to display it, the plain lines of `pretrain.training.progress` are used.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pretrain.distributed.launched import SCREEN
from pretrain.printing import aligned, clock, in_notebook, printable
from pretrain.training.progress import Progress
from pretrain.training.relay import Relay
from pretrain.training.state import RunState
from pretrain.utils.curves import Series, curve_svg
from pretrain.utils.html import card, notebook_view, pre, table

__all__ = ["LiveView", "open_screen"]

Bundle = dict[str, str]

_INTERVAL = 1.0  # seconds between two redraws
_SHARE = 20.0  # least pause between redraws, as a multiple of the duration of one
_ROWS, _COLUMNS, _LINES = 24, 8, 30
_SAMPLE = 400  # characters of a sample


def open_screen() -> Progress:
    """Return the live view in a notebook, else that of a terminal; in a launched process, the relay to its parent."""
    if (path := os.environ.get(SCREEN)) is not None:
        return Relay(Path(path))
    publish = _publisher()
    return Progress() if publish is None else LiveView(publish)


def _publisher() -> Callable[[Bundle], None] | None:
    """Return a function that displays a MIME bundle in the running cell, in place; None outside of a notebook."""
    if not in_notebook():
        return None
    import IPython.display

    display: Any = IPython.display  # typed in some versions, untyped in others
    handle = display.display({"text/plain": ""}, raw=True, display_id=True)
    return None if handle is None else lambda bundle: handle.update(bundle, raw=True)


class LiveView(Progress):
    """Metrics of a run, redrawn in place about once a second.

    Args:
        publish: displays ``{"text/html", "text/plain"}`` in place of the previous bundle. If it raises, plain
            lines take over.
    """

    def __init__(self, publish: Callable[[Bundle], None]) -> None:
        self._publish = publish
        self._bar: Progress | None = None
        self._train: list[tuple[float, float]] = []
        self._evals: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._samples: list[str] = []
        self._figures: dict[str, float] = {}
        self._step = self._total = self._best = self._first = 0
        self._monitor = "loss"
        self._began = time.monotonic()
        self._next = -math.inf
        self._ended, self._starting = False, "getting ready"
        self._draw(lambda bar: None)

    def starting(self, what: str, seconds: Mapping[str, float]) -> None:
        """Show the start-up step that begins ("" after the last one), and the ``seconds`` of the steps before."""
        self._starting = what or "ready"
        if not what:
            steps = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            self._lines = [*self._lines, f"start-up: {steps}"][-_LINES:]
        self._draw(lambda bar: bar.starting(what, seconds), force=True)

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Load the records of ``log.jsonl`` from before a resume."""
        for record in records:
            step = int(record.get("step", 0))
            if "eval" in record:
                self._evaluated(step, record)
            elif "event" not in record and "loss" in record:
                self._train.append((step, float(record["loss"])))
                self._step = step
        self._first, self._began = self._step, time.monotonic()

    def show(self, step: int, figures: Mapping[str, float], total: int) -> None:
        """Record the metrics of a step and redraw."""
        self._step, self._total, self._figures = step, total, dict(figures)
        self._train.append((step, figures.get("loss", math.nan)))
        self._draw(lambda bar: bar.show(step, figures, total))

    def evaluation(self, record: Mapping[str, Any], state: RunState, note: str) -> None:
        """Record the metrics of an evaluation and redraw."""
        self._best, self._monitor = state.best_step, state.monitor
        self._evaluated(state.step, record)
        self._draw(lambda bar: bar.evaluation(record, state, note))

    def _evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        since = self._evals[-1]["step"] if self._evals else -1
        losses = [loss for at, loss in self._tail(since) if math.isfinite(loss)]
        self._evals.append(
            {
                "step": step,
                "epoch": float(record.get("epoch", math.nan)),
                "train loss": sum(losses) / len(losses) if losses else math.nan,
                "figures": {key: float(value) for key, value in record["eval"].items()},
                "seconds": float(record.get("seconds", math.nan)),
            }
        )
        self._samples = [str(text) for text in record.get("samples", ())]

    def _tail(self, after: float) -> list[tuple[float, float]]:
        """Return the losses logged after a step; searches from the end, so the cost does not grow with the run."""
        at = len(self._train)
        while at and self._train[at - 1][0] > after:
            at -= 1
        return self._train[at:]

    def write(self, line: str) -> None:
        """Add a line and show it at once."""
        self._lines = [*self._lines, printable(line)][-_LINES:]
        self._draw(lambda bar: bar.write(line), force=True)

    def close(self) -> None:
        """Draw the final state, which stays in the notebook."""
        self._ended = True
        self._draw(Progress.close, force=True)

    def _draw(self, plain: Callable[[Progress], None], *, force: bool = False) -> None:
        """Publish the view, once a second at most unless ``force``; after a failure call ``plain`` on the plain bar."""
        if self._bar is not None:
            plain(self._bar)
            return
        began = time.monotonic()
        if began < self._next and not force:
            return
        try:
            self._publish({"text/html": self.html(), "text/plain": self.text()})
        except Exception as error:  # a front end that fails or disconnects must not end the run
            self._bar = Progress()
            self._bar.write(f"the live view cannot be drawn ({error}); plain lines replace it")
        ended = time.monotonic()
        self._next = ended + max(_INTERVAL, _SHARE * (ended - began))

    def text(self) -> str:
        """Return the view as plain text, for front ends without HTML."""
        lines = [" | ".join(self._top())]
        if self._evals:
            names = self._names()
            rows = [self._heads(names), *(self._cells(one, names) for one in self._shown())]
            marks = ["", *(" *" * (one["step"] == self._best) for one in self._shown())]
            lines += [line + mark for line, mark in zip(aligned(rows), marks, strict=True)]
        return "\n".join([*lines, *self._lines])

    def html(self) -> str:
        """Return the view as HTML; every text is escaped."""
        share = min(1.0, self._step / self._total) if self._total else 0.0
        first, *rest = map(escape, self._top())
        top = f'<div>{first} <span class="soft">{" · ".join(["", *rest])}</span></div>'
        bar = f'<div class="well"><div class="bar" style="margin:0;width:{share:.2%}"></div></div>'
        samples = [
            printable(text[:_SAMPLE], lines=True) + "…" * (len(text) > _SAMPLE)
            for text in self._samples
        ]
        text_blocks = [pre("\n".join(lines)) for lines in (samples, self._lines) if lines]
        return notebook_view("live", top, bar, self._pictures(), self._table(), *text_blocks)

    def _top(self) -> list[str]:
        """Return progress, state, metrics and times as short texts."""
        if not self._total:
            ended = f"nothing left to do after step {self._step:,}" if self._step else "not started"
            return [ended if self._ended else self._starting]
        share = self._step / self._total
        state = ("done" if share >= 1 else "stopped") if self._ended else f"{share:.0%}"
        words = [f"step {self._step:,} of {self._total:,}", state]
        words += [
            f"{printable(key)} {f'{value:,.0f}' if key.endswith('/s') else f'{value:.4g}'}"
            for key, value in self._figures.items()
            if math.isfinite(value) and (key != "mfu" or value >= 0.01)
        ]
        passed, done = time.monotonic() - self._began, self._step - self._first
        if not self._ended and done > 0:
            words.append(f"{clock(passed / done * (self._total - self._step))} left")
        return [*words[:2], f"{clock(passed)} taken", *words[2:]]

    def _pictures(self) -> str:
        if len(self._train) < 2:
            return ""
        held_out = self._points("loss")
        losses = [Series("training", self._train), Series("validation", held_out, dots=True)]
        chosen = self._points(self._monitor) if self._monitor != "loss" else []
        alone = len(chosen) < 2
        width = 880 if alone else 440
        drawn = [curve_svg(losses, title="loss", width=width, height=240)]
        if not alone:
            line = Series(
                "", chosen, dots=True
            )  # second series, for the colour of held-out figures
            title = f"held-out {printable(self._monitor).replace('_', ' ')}"
            drawn.append(curve_svg([Series("", ()), line], title=title, width=width, height=240))
        return f'<div class="pair">{"".join(map(card, drawn))}</div>'

    def _points(self, name: str) -> list[tuple[float, float]]:
        return [(e["step"], e["figures"][name]) for e in self._evals if name in e["figures"]]

    def _names(self) -> list[str]:
        """Return the metrics that get a column: the monitored one first, `_COLUMNS` at most."""
        names = dict.fromkeys(name for e in self._evals for name in e["figures"])
        kept = sorted((name for name in names if name != "targets"), key=self._monitor.__ne__)
        return kept[:_COLUMNS]

    def _shown(self) -> list[dict[str, Any]]:
        """Return the newest evaluations, and the best one even if it is older."""
        old, new = self._evals[:-_ROWS], self._evals[-_ROWS:]
        return [e for e in old if e["step"] == self._best] + new

    def _cells(self, one: Mapping[str, Any], names: Sequence[str]) -> list[str]:
        values = [one["train loss"], *(one["figures"].get(name, math.nan) for name in names)]
        epoch = [_short(one["epoch"], 2)] if self._epochs else []
        return [f"{one['step']:,}", *epoch, *(_short(value) for value in values)]

    def _heads(self, names: Sequence[str]) -> list[str]:
        epoch = ["epoch"] if self._epochs else []
        shown = [printable(name).replace("_", " ") for name in names]
        held_out = ["held-out loss" if name == "loss" else name for name in shown]
        return ["step", *epoch, "train loss", *held_out]

    @property
    def _epochs(self) -> bool:
        return any(math.isfinite(one["epoch"]) for one in self._evals)

    def _table(self) -> str:
        if not self._evals:
            return ""
        names, shown = self._names(), self._shown()
        best = [k for k, one in enumerate(shown) if one["step"] == self._best]
        rows = [
            [*self._cells(one, names), clock(one["seconds"]), "best" * (k in best)]
            for k, one in enumerate(shown)
        ]
        hidden = len(self._evals) - len(rows)
        rest = f'<div class="soft">and {hidden:,} earlier evaluations</div>' if hidden else ""
        return table([*self._heads(names), "time", ""], rows, left=0, best=best) + rest


def _short(value: float, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "" if math.isnan(value) else str(value)
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.4g}"
