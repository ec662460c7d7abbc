"""The records of a run's ``log.jsonl``, sorted for plotting; incomplete lines and non-finite numbers are tolerated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpoint.best import run_state
from pretrain.checkpoint.manifest import run_checkpoints
from pretrain.errors import DataError, did_you_mean
from pretrain.utils.curves import Plot, Series, curve_svg
from pretrain.utils.files import note
from pretrain.utils.run_log import NATS, open_log

__all__ = [
    "History",
    "frame_of",
    "loss_svg",
    "number",
    "on_as_many",
    "plot_history",
    "read_history",
    "sort_records",
]


def number(value: Any, default: float = math.nan) -> float:
    """Convert a number or its spelling ("nan", "inf") to a float; return ``default`` for anything else."""
    try:
        return default if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # an integer of 400 digits overflows
        return default


def points_of(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """Convert pairs to numbers; pairs that contain None are omitted."""
    return [(number(x), number(y)) for x, y in pairs if x is not None and y is not None]


def on_as_many(evals: Sequence[Mapping[str, Any]], one: Mapping[str, Any]) -> list[Any]:
    """Return the evaluations on about as many targets as ``one``: a loss on a sample is not one on all rows."""
    targets = number(one["eval"].get("targets"))
    counts = [number(record["eval"].get("targets")) for record in evals]
    return [
        record
        for record, count in zip(evals, counts, strict=True)
        if not targets > 0 or 0.5 < count / targets < 2
    ]


@dataclass
class History:
    """The records of ``log.jsonl`` by kind; a step that was repeated after a resume appears once.

    Attributes:
        train: records of optimizer steps, in order.
        evals: records of evaluations, each ``{"step", "eval": {...}}``.
        events: all other records: start, resume, save, skipped steps, end.
        damage: description of the damage of the log, "" if there is none.
    """

    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    damage: str = ""

    def points(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) pairs of a metric in the training records."""
        return points_of((r.get("step"), r.get(key)) for r in self.train)

    def eval_points(self, key: str = "loss", *, alike: bool = False) -> list[tuple[float, float]]:
        """Return (step, value) pairs of a metric in the evaluations; ``alike``: of those on as many as the last one."""
        evals = on_as_many(self.evals, self.evals[-1]) if alike and self.evals else self.evals
        return points_of((r.get("step"), r["eval"].get(key)) for r in evals)

    @property
    def loss_unit(self) -> str:
        """Unit of the loss, "" if it has none; that of a likelihood is not in the log."""
        return str(self.train[-1].get("loss_unit", NATS)) if self.train else ""

    @property
    def samples(self) -> list[tuple[int, str]]:
        """The (step, text) pairs of all generated samples in the log."""
        found = []
        for record in [*self.train, *self.evals, *self.events]:
            shown = record.get("samples", record.get("sample", []))
            for text in shown if isinstance(shown, list) else [shown]:
                step = number(record.get("step"), 0.0)
                found.append((int(step) if math.isfinite(step) else 0, str(text)))
        return sorted(found, key=lambda item: item[0])


def read_history(run_dir: str | os.PathLike[str]) -> History:
    """Read ``run_dir/log.jsonl``; lines that are incomplete, damaged or not records are omitted.

    Raises:
        DataError: the directory holds no ``log.jsonl``.
    """
    path = Path(run_dir) / "log.jsonl"
    if not path.is_file():
        raise DataError(
            f"{run_dir} holds no log.jsonl, so it is not a run directory. Give the directory that train.out named."
        )
    last = next(
        (run_state(checkpoint).get("log") for checkpoint in run_checkpoints(Path(run_dir))), ""
    )
    found = open_log(path, last if isinstance(last, str) else "")
    history = sort_records(found.records)
    history.damage = found.damage
    if found.damage:
        note(f"{path} is damaged and shown in part: {found.damage}.")
    return history


def sort_records(records: Iterable[Mapping[str, Any]]) -> History:
    """Sort log records by kind; of two training or evaluation records of the same step, the later one is kept."""
    train: dict[float, dict[str, Any]] = {}
    evals: dict[float, dict[str, Any]] = {}
    events = []
    for record in map(dict, records):
        step = number(record.get("step"))
        if isinstance(record.get("eval"), Mapping) and math.isfinite(step):
            evals[step] = record
        elif "event" not in record and "loss" in record and math.isfinite(step):
            train[step] = record
        else:
            events.append(record)
    ordered = [train[step] for step in sorted(train)]
    return History(ordered, [evals[step] for step in sorted(evals)], events)


def frame_of(history: History) -> Any:
    """Return a pandas frame with one row per step; figures of evaluations get the prefix ``valid_``.

    Raises:
        DataError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise DataError(
            "A frame needs pandas, which is not installed: pip install pandas"
        ) from error
    rows: dict[float, dict[str, Any]] = {}
    for record in history.train:
        rows[number(record["step"])] = {key: number(v, v) for key, v in record.items()}
    for record in history.evals:
        row = rows.setdefault(number(record["step"]), {"step": record["step"]})
        row |= {f"valid_{key}": number(value) for key, value in record["eval"].items()}
    frame = pandas.DataFrame([rows[step] for step in sorted(rows)])
    return frame.astype({"step": int}) if len(frame) else frame


def plot_history(history: History, figure: str = "loss", **options: Any) -> Plot:
    """Draw a figure over the steps: the loss of training and held-out rows, or another held-out figure.

    The options are those of `curve_svg`.

    Raises:
        DataError: the evaluations have no such figure.
    """
    if figure == "loss":
        return Plot(loss_svg(history, **options))
    points = history.eval_points(figure)
    if not points:
        known = sorted({key for record in history.evals for key in record["eval"]})
        raise DataError(f"The evaluations have no figure {figure!r}.{did_you_mean(figure, known)}")
    title = f"held-out {figure.replace('_', ' ')}"
    return Plot(curve_svg([Series("", points, dots=True)], title=title, **options))


def loss_svg(history: History, *, title: str | None = None, **options: Any) -> str:
    """Return the loss curve as SVG: training and held-out loss over steps.

    The title is the loss with its unit, unless one is given. The options are those of `curve_svg` (``references``,
    ``width``, ``height``, ...).
    """
    if title is None:
        title = f"loss ({history.loss_unit})" if history.loss_unit else "loss"
    lines = [
        Series("training", history.points("loss")),
        Series("validation", history.eval_points(), dots=True),
    ]
    return curve_svg(lines, title=title, **options)
