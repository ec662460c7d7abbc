"""HTML report of a fine-tuning run: metrics, curves, mistakes and how to repeat it, in one file.

Like the report of a pre-training run it is self-contained and has no script; all text from rows, labels or settings
is escaped.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.distributed.world import current_world
from pretrain.errors import DataError
from pretrain.finetuning.card import baselines, example_input, model_card
from pretrain.finetuning.settings import from_memory
from pretrain.report.history import History, loss_svg, sort_records
from pretrain.report.page import page, show, table, tile_row, write_page
from pretrain.utils.curves import Series, curve_svg

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned

__all__ = ["render", "write_report"]

_STYLE = """
.said{min-width:220px}.said,.facts td{overflow-wrap:anywhere}.plain{white-space:pre;overflow-x:auto}
.num{white-space:nowrap}ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
"""
_MISTAKES = 20
_CURVES = 4
_COUNTS = ("targets", "examples", "rows", "tokens")  # counts, which are not scores


def write_report(result: Finetuned, out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page, and the model card as README.md of the run; return the path of the page.

    Only rank zero writes.

    Args:
        result: result of ``pretrain.finetune``.
        out: file to write; ``report.html`` of the run by default.

    Raises:
        DataError: the result has no run directory and no file is named, or a file cannot be written.
    """
    if out is None and result.run is None:
        raise DataError("This trial was kept nowhere. Name the file: report(out=FILE).")
    place = Path(out) if out is not None else result.run.path / "report.html"
    if not current_world().is_rank_zero:
        return place
    text = render(result)
    card = result.model.card = model_card(result)
    if result.run is not None:
        write_page(result.run.path / "README.md", card)
    return write_page(place, text)


def render(result: Finetuned) -> str:
    """The report as HTML text."""
    name = result.run.path.resolve().name if result.run is not None else result.task.name
    history = sort_records(result.run.history if result.run is not None else [])
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<div class="soft">{escape(_subtitle(result))}</div>',
        _tiles(result),
        _comparison(result),
        _curves(result, history),
        _figures(result),
        _classes(result),
        _mistakes(result),
        _data(result),
        _repeat(result),
    ]
    return page(name, sections, _STYLE)


def _subtitle(result: Finetuned) -> str:
    model = result.model
    words = [result.task.name, model.backbone.model_type, f"{model.num_parameters():,} parameters"]
    if result.settings.model.checkpoint:
        words.append(f"from {result.settings.model.checkpoint}")
    words.append(f"on {result.sources.get('train', 'rows in memory')}")
    return " · ".join(words)


def _tiles(result: Finetuned) -> str:
    tiles = []
    main = result.monitor
    for part, figures in (("test", result.test_metrics or {}), ("held-out", result.metrics)):
        keys = [main, *(key for key in figures if key not in (main, *_COUNTS))]
        tiles += [
            (f"{part} {key.replace('_', ' ')}", show(float(figures[key])))
            for key in keys[: 2 if result.test_metrics else 4]
            if key in figures
        ]
    if main in result.trivial:
        tiles.append((f"{main.replace('_', ' ')} of guessing", show(float(result.trivial[main]))))
    tiles += [(f"{part} rows", show(count)) for part, count in result.counts.items() if count]
    return tile_row(tiles)


def _comparison(result: Finetuned) -> str:
    """The comparison with training from scratch: plot and full report."""
    found = result.comparison
    if found is None:
        return ""
    return (
        '<h2>Did pre-training help?</h2><div class="card wide">'
        f'{found.svg()}</div><div class="card"><pre class="plain">'
        f"{escape(str(found.table()))}</pre></div>"
    )


def _curves(result: Finetuned, history: History) -> str:
    if not history.train and not history.evals:
        return ""
    main = result.monitor
    keys = [main, *(key for record in history.evals for key in record["eval"])]
    keys = [key for key in dict.fromkeys(keys) if key != "loss" and key not in _COUNTS]
    drawn: list[str] = []
    for key in keys:
        points = history.eval_points(key)
        if len(drawn) < _CURVES and any(math.isfinite(y) for _, y in points):
            guess = result.trivial.get(key)
            lines = {"guessing": float(guess)} if guess is not None else {}
            title = f"held-out {key.replace('_', ' ')}"
            svg = curve_svg(
                [Series("", points, dots=True)],
                title=title,
                references=lines,
                width=450,
                height=230,
            )
            drawn.append(f'<div class="card">{svg}</div>')
    return (
        '<h2>Training</h2><div class="card wide">'
        f'{loss_svg(history, width=920, height=320)}</div><div class="pair">{"".join(drawn)}</div>'
    )


def _figures(result: Finetuned) -> str:
    """All metrics of all parts, beside those of the trivial baseline."""
    parts: list[tuple[str, Mapping[str, float]]] = [("validation", result.metrics)]
    if result.test_metrics:
        parts.append(("test", result.test_metrics))
    parts += baselines(result)
    keys = list(dict.fromkeys(key for _, figures in parts for key in figures))
    rows = [[key.replace("_", " "), *(_number(f.get(key)) for _, f in parts)] for key in keys]
    if not rows:
        return ""
    said = "".join(f"<li>{escape(line)}</li>" for line in result.remarks)
    return (
        "<h2>Figures</h2>"
        + table(["", *(name for name, _ in parts)], rows)
        + (f'<div class="card"><ul>{said}</ul></div>' if said else "")
    )


def _number(value: Any) -> Any:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return int(value) if whole and abs(value) > 1 else value


def _classes(result: Finetuned) -> str:
    """Precision, recall and F1 of every class, and the confusion matrix."""
    try:
        confusion = result.confusion()
    except DataError:  # a task without one class for each row, or nothing held out
        return ""
    rows = [
        [round(v, 3) if isinstance(v, float) else v for v in row.values()]
        for row in confusion.per_class()
    ]
    head = ["class", "precision", "recall", "F1", "support"]
    what = "Confusion" if confusion.small else "Most confused"
    return (
        f"<h2>Classes</h2>{table(head, rows)}"
        f'<h2>{what}</h2><div class="card">{confusion._repr_html_()}</div>'
    )


def _mistakes(result: Finetuned) -> str:
    try:
        errors = result.errors(_MISTAKES)
    except DataError:  # the task has no correct answers to compare with
        return ""
    if not errors:
        return ""
    rows = "".join(
        f'<tr><td class="said">{escape(_cut(row.get("text"), 600))}</td>'
        + "".join(
            f"<td>{escape(_cut(row.get(key), 120))}</td>"
            for key in ("label", "predicted", "score", "where")
        )
        + "</tr>"
        for row in errors
    )
    names = ("text", "right", "predicted", "score", "where")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<h2>Worst mistakes</h2><div class="card"><table><tr>{head}</tr>{rows}</table></div>'


def _cut(value: Any, limit: int) -> str:
    text = show(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _data(result: Finetuned) -> str:
    rows = [
        [part, result.sources.get(part, ""), count]
        for part, count in result.counts.items()
        if count
    ]
    facts = [("fingerprint of the rows", result.fingerprint)]
    columns = result.settings.data.columns
    if columns:
        facts.append(("columns", ", ".join(f"{role}: {name}" for role, name in columns.items())))
    if result.labels and len(result.labels) > 1:
        facts.append((f"{len(result.labels)} labels", _cut(", ".join(result.labels), 2000)))
    notes = "".join(f"<li>{escape(line)}</li>" for line in result.notes)
    return (
        "<h2>Data</h2>"
        + table(["part", "source", "rows"], rows, left=2)
        + f'<div class="facts">{table(["", ""], facts, left=2)}</div>'
        + (f'<div class="card"><ul>{notes}</ul></div>' if notes else "")
    )


# ------------------------------------------------------------------------------------------------ again


def command(result: Finetuned) -> str:
    """How to repeat the run: a command line, or a line of Python if model or rows were objects in memory."""
    settings = result.settings
    sources = [settings.data.train, settings.data.valid, settings.data.test]
    memory = [value for value in (settings.model.checkpoint, *sources) if from_memory(value)]
    run: Any = result.run  # None for a trial
    config = None if run is None else run.path / "run.yaml"
    again = f"{f'runs/{result.task.name}' if run is None else run.path}-again"
    if config is not None and not memory:
        words = ["pretrain", "finetune", "--config", str(config), "--train.out", again]
        return shlex.join(words)
    arguments = ["model", "rows"]
    if settings.model.checkpoint and not from_memory(settings.model.checkpoint):
        arguments[0] = repr(settings.model.checkpoint)
    if settings.data.train and not from_memory(settings.data.train):
        arguments[1] = repr(settings.data.train)
    arguments += [
        f"{part}={part}_rows"
        for part, value in (("valid", settings.data.valid), ("test", settings.data.test))
        if from_memory(value)
    ]
    if config is not None:
        arguments.append(f"config={str(config)!r}")
    else:
        arguments.append(f"task={result.task.name!r}")
    return f"pretrain.finetune({', '.join([*arguments, f'out={again!r}'])})"


def _repeat(result: Finetuned) -> str:
    from pretrain.config.strict_yaml import dump

    use = [_USE.format(path=str(_model_path(result)), example=example_input(result))]
    return (
        f'<h2>Use it</h2><div class="card"><pre>{escape("".join(use))}</pre></div>'
        f'<h2>Repeat it</h2><div class="card"><pre>{escape(command(result))}</pre><details><summary>all settings'
        f"</summary><pre>{escape(dump(result.settings.to_dict()))}</pre></details></div>"
    )


_USE = "import pretrain\nmodel = pretrain.load({path!r})\nmodel.predict({example})"


def _model_path(result: Finetuned) -> Path | str:
    run = result.run
    return (run.best or run.checkpoint or run.path) if run is not None else "MODEL"
