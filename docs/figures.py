"""Draw the loss curve of a run as an SVG file, without a plotting library.

    python docs/figures.py runs/shakespeare --out docs/figures/shakespeare.svg
    python docs/figures.py runs/a runs/b --label one --label other --x tokens --out docs/figures/compare.svg

One run gives training and held-out loss; several runs give their held-out losses side by side. The x axis is a column
of the log (step, tokens, minutes); ``--reference "unigram=6.1"`` adds a dashed line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

from pretrain.errors import PretrainError
from pretrain.report.history import History, read_history
from pretrain.utils.curves import Series, curve_svg

NAMES = {"step": "optimizer step", "tokens": "tokens seen", "minutes": "minutes"}


def axis_of(history: History, x: str) -> tuple[list[float], list[float]]:
    """Steps of the training records and their places on the wished x axis."""
    key, scale = ("seconds", 1 / 60) if x == "minutes" else (x, 1.0)
    pairs = [(step, value * scale) for step, value in history.points(key)]
    if not pairs:
        raise SystemExit(f"error: the log has no column {key!r}")
    return [step for step, _ in pairs], [value for _, value in pairs]


def move(
    points: list[tuple[float, float]], axis: tuple[list[float], list[float]]
) -> list[tuple[float, float]]:
    """Put points (step, y) onto another axis; a step between two records stands between them."""
    return [(float(np.interp(step, *axis)), y) for step, y in points]


def draw(
    runs: list[str],
    labels: list[str],
    x: str,
    metric: str,
    title: str,
    references: dict[str, float],
) -> str:
    """The picture as SVG text."""
    series = []
    for index, run in enumerate(runs):
        history = read_history(run)
        axis = axis_of(history, x)
        label = labels[index] if index < len(labels) else Path(run).name
        held_out = move(history.eval_points(metric), axis)
        if len(runs) == 1:
            if metric == "loss":
                series.append(Series("train", move(history.points("loss"), axis)))
            series.append(Series("held out", held_out, dots=True))
        else:
            series.append(Series(label, held_out, dots=True))
    name = {"loss": "loss (nats per target)"}.get(metric, f"held-out {metric.replace('_', ' ')}")
    return curve_svg(
        series, title=title or name, x_label=NAMES[x], references=references, width=760, height=360
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    parser.add_argument(
        "--label", action="append", default=[], help="name of a run in the legend, in order"
    )
    parser.add_argument("--x", choices=NAMES, default="step")
    parser.add_argument(
        "--metric", default="loss", help="loss, accuracy, bits_per_byte, ... of the evaluations"
    )
    parser.add_argument("--title", default="")
    parser.add_argument(
        "--reference", action="append", default=[], help='"name=value" of a dashed line'
    )
    args = parser.parse_args()
    references = {}
    for text in args.reference:
        name, _, value = text.rpartition("=")
        references[name] = float(value)
    try:
        svg = draw(args.runs, args.label, args.x, args.metric, args.title, references)
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(svg + "\n", encoding="utf-8")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
