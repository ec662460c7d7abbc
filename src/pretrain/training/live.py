"""Live view of a run in a notebook: progress bar, loss curve and a table of evaluations, redrawn in place.

The view is self-contained HTML without scripts, so that a saved notebook keeps its last state. Outside of notebooks,
and if the notebook fails to display it, the plain progress bar of `pretrain.training.logging` is used.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from pretrain.training.logging import Progress
from pretrain.training.relay import relay
from pretrain.training.state import RunState
from pretrain.utils.curves import Series, curve_svg
from pretrain.utils.files import printable

__all__ = ["LiveView", "open_screen"]

Bundle = dict[str, str]

_INTERVAL = 1.0  # seconds between two redraws
_SHARE = 20.0  # least pause between redraws, as a multiple of the duration of one
_ROWS, _COLUMNS, _LINES = 24, 8, 12
_SAMPLE = 400  # characters of a sample
_STYLE = """
.ptl{font:14px/1.45 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;color:#0b0b0b;background:#fff;
max-width:920px;padding:12px 16px;border:1px solid #e4e3df;border-radius:10px;--soft:#52514e;--line:#e4e3df;
--a:#2a6fd6;--best:#e7f4ea;--ink:#0f6b3a;--well:#ececea}
.ptl .soft{color:var(--soft)}.ptl .top{display:flex;flex-wrap:wrap;gap:2px 18px;font-variant-numeric:tabular-nums}
.ptl .bar{height:7px;border-radius:4px;background:var(--well);margin:7px 0 10px;overflow:hidden}
.ptl .bar i{display:block;height:100%;background:var(--a);border-radius:4px}
.ptl .pics{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(360px,100%),1fr));gap:4px 12px}
.ptl svg{display:block;width:100%;height:auto}.ptl .wide{overflow-x:auto}
.ptl table.runs{border-collapse:collapse;border:0;width:auto;margin:8px 0 2px;font-size:13px;color:inherit;
font-variant-numeric:tabular-nums}
.ptl table.runs thead tr:nth-child(n),.ptl table.runs tbody tr:nth-child(n){background:none;border:0}
.ptl table.runs th:nth-child(n),.ptl table.runs td:nth-child(n){padding:3px 12px;text-align:right;color:inherit;
border:0;border-bottom:1px solid var(--line);white-space:nowrap}
.ptl table.runs thead th:nth-child(n){color:var(--soft);font-weight:500}
.ptl table.runs tbody tr.best:nth-child(n){background:var(--best);color:var(--ink);font-weight:600}
.ptl pre.said:nth-child(n){margin:6px 0 0;padding:0;background:none;color:var(--soft);white-space:pre-wrap;
overflow-wrap:anywhere;font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (prefers-color-scheme:dark){.ptl{color:#f2f3f5;background:#16181d;border-color:#2b2f37;--soft:#b9bdc6;
--line:#2b2f37;--a:#6ea8fe;--best:#17301f;--ink:#8fe0b0;--well:#2b2f37}}
""".replace("\n", "")


def open_screen() -> Progress:
    """Return the live view in a notebook, else the progress bar; in a launched process, the relay to its parent."""
    relayed = relay()
    if relayed is not None:
        return relayed
    publish = _publisher()
    return Progress() if publish is None else LiveView(publish)


def _publisher() -> Callable[[Bundle], None] | None:
    """Return a function that displays a MIME bundle in the running cell, in place; None outside of a notebook."""
    if "IPython" not in sys.modules:  # notebook kernels have imported it
        return None
    from IPython import get_ipython

    shell = get_ipython()
    if not any(cls.__name__ == "ZMQInteractiveShell" for cls in type(shell).__mro__):
        return None
    import IPython.display

    display: Any = IPython.display  # typed in some versions, untyped in others
    handle = display.display({"text/plain": ""}, raw=True, display_id=True)
    return None if handle is None else lambda bundle: handle.update(bundle, raw=True)


class LiveView(Progress):
    """Metrics of a run, redrawn in place about once a second.

    Args:
        publish: displays ``{"text/html", "text/plain"}`` in place of the previous bundle. If it raises, the plain
            progress bar takes over.
    """

    def __init__(self, publish: Callable[[Bundle], None]) -> None:
        self._publish = publish
        self._bar: Progress | None = None
        self._train: list[tuple[float, float]] = []
        self._evals: list[dict[str, Any]] = []
        self._said: list[str] = []
        self._samples: list[str] = []
        self._figures: dict[str, float] = {}
        self._step = self._total = self._best = self._first = 0
        self._monitor = "loss"
        self._began = time.monotonic()
        self._next = -math.inf
        self._ended = False
        self._draw()

    # ------------------------------------------------------------------------------------------- input

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
        if self._bar is not None:
            self._bar.show(step, figures, total)
        else:
            self._draw()

    def evaluation(self, record: Mapping[str, Any], state: RunState, note: str) -> None:
        """Record the metrics of an evaluation and redraw."""
        self._best, self._monitor = state.best_step, state.monitor
        self._evaluated(state.step, record)
        if self._bar is not None:
            self._bar.evaluation(record, state, note)
        else:
            self._draw()

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
        self._said = [*self._said, printable(line)][-_LINES:]
        if self._bar is not None:
            self._bar.write(line)
        else:
            self._draw(force=True)

    def close(self) -> None:
        """Draw the final state, which stays in the notebook."""
        self._ended = True
        if self._bar is not None:
            self._bar.close()
        else:
            self._draw(force=True)

    # ------------------------------------------------------------------------------------------- drawing

    def _draw(self, *, force: bool = False) -> None:
        began = time.monotonic()
        if began < self._next and not force:
            return
        try:
            self._publish({"text/html": self.html(), "text/plain": self.text()})
        except Exception as error:  # a front end that fails or disconnects must not end the run
            self._bar = Progress()
            self._bar.write(f"the live view cannot be drawn ({error}); a plain bar goes on")
        ended = time.monotonic()
        self._next = ended + max(_INTERVAL, _SHARE * (ended - began))

    def text(self) -> str:
        """Return the view as plain text, for front ends without HTML."""
        lines = [" | ".join(self._top())]
        if self._evals:
            names = self._names()
            table = [
                self._heads(names),
                *(self._cells(e, names) for e in self._shown()),
            ]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            marks = ["", *(" *" * (e["step"] == self._best) for e in self._shown())]
            lines += [
                "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + mark
                for row, mark in zip(table, marks, strict=True)
            ]
        return "\n".join([*lines, *self._said])

    def html(self) -> str:
        """Return the view as HTML; every text is escaped."""
        share = min(1.0, self._step / self._total) if self._total else 0.0
        top = "".join(
            f"<span{_class('soft', k > 0)}>{escape(text)}</span>"
            for k, text in enumerate(self._top())
        )
        parts = [
            f'<div class="top">{top}</div><div class="bar"><i style="width:{share:.2%}"></i></div>',
            self._pictures(),
            self._table(),
        ]
        samples = [repr(text[:_SAMPLE] + "…" * (len(text) > _SAMPLE)) for text in self._samples]
        for lines in (samples, self._said):
            if lines:
                parts.append(f'<pre class="said">{escape(chr(10).join(lines))}</pre>')
        return f'<div class="ptl"><style>{_STYLE}</style>{"".join(parts)}</div>'

    def _top(self) -> list[str]:
        """Return progress, state, metrics and times as short texts."""
        if not self._total:
            ended = f"nothing left to do after step {self._step:,}" if self._step else "not started"
            return [ended if self._ended else "getting ready"]
        share = self._step / self._total
        state = ("done" if share >= 1 else "stopped") if self._ended else f"{share:.0%}"
        words = [f"step {self._step:,} of {self._total:,}", state]
        words += [
            f"{printable(key)} {f'{value:,.0f}' if key.endswith('/s') else f'{value:.4g}'}"
            for key, value in self._figures.items()
            if math.isfinite(value) and (key != "mfu" or value >= 0.01)
        ]
        taken, done = time.monotonic() - self._began, self._step - self._first
        if not self._ended and done > 0:
            words.append(f"{_clock(taken / done * (self._total - self._step))} left")
        return [*words[:2], f"{_clock(taken)} taken", *words[2:]]

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
        return f'<div class="pics">{"".join(f"<div>{svg}</div>" for svg in drawn)}</div>'

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
        names = self._names()
        heads = [*self._heads(names), "time", ""]
        body = []
        for one in self._shown():
            best = one["step"] == self._best
            cells = [*self._cells(one, names), _clock(one["seconds"]), "best" if best else ""]
            row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            body.append(f"<tr{_class('best', best)}>{row}</tr>")
        head = "".join(f"<th>{escape(text)}</th>" for text in heads)
        hidden = len(self._evals) - len(body)
        rest = f'<div class="soft">and {hidden:,} earlier evaluations</div>' if hidden else ""
        return (
            f'<div class="wide"><table class="runs"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>{rest}"
        )


def _class(name: str, given: bool) -> str:
    return f' class="{name}"' if given else ""


def _short(value: float, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "" if math.isnan(value) else str(value)
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    """Format seconds: 90 -> "1:30"."""
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
