"""HTML report of a fine-tuning run: metrics, curves, mistakes and how to repeat it, in one file.

Like the report of a pre-training run it is self-contained and has no script; all text from rows, labels or settings
is escaped.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.best import run_state
from pretrain.checkpoint.model_card import COUNTS
from pretrain.config.strict_yaml import dump
from pretrain.distributed.world import current_world
from pretrain.errors import DataError
from pretrain.finetuning.card import example_call, measured_parts, model_card
from pretrain.finetuning.settings import from_memory
from pretrain.report.history import History, sort_records
from pretrain.report.run_report import PAGE, charts, facts_of, machine_tiles, unfinished_tiles
from pretrain.utils.curves import Series
from pretrain.utils.html import (
    Html,
    bullets,
    card,
    chart,
    details,
    figure,
    page,
    pre,
    section,
    show,
    table,
    tile_row,
    write_page,
)

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned

__all__ = ["render", "write_report"]

_MISTAKES, _TEXT = 20, 600
_PICTURES = 12
_CURVES = 4


def write_report(result: Finetuned, out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page, and the model card as README.md of the run; return the path of the page.

    Only rank zero writes. The page is ``report.html`` of the run unless ``out`` names another file.

    Raises:
        DataError: a file cannot be written.
    """
    page = Path(os.path.expanduser(out)) if out is not None else result.run.path / PAGE
    if not current_world().is_rank_zero:
        return page
    text = render(result)
    readme = result.model.card = model_card(result)
    write_page(result.run.path / "README.md", readme, b"Made with `pretrain`")
    result.keep()
    return write_page(page, text)


def render(result: Finetuned) -> str:
    """The report as HTML text."""
    name = result.run.path.resolve().name
    history, state = sort_records(result.run.history), _state(result)
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<div class="soft">{escape(_subtitle(result))}</div>',
        tile_row(
            [*_tiles(result), *unfinished_tiles(state), *machine_tiles(history, facts_of(state))]
        ),
        section("Did pre-training help?", _comparison(result)),
        section("Training", _curves(result, history)),
        section("Figures", _figures(result)),
        *_mistakes(result),
        section("From the worst to the best", _pictures(result)),
        section("Data", *_data(result)),
        section("Use it", card(pre(_use(result)))),
        section("Repeat it", _repeat(result)),
    ]
    return page(name, sections)


def _subtitle(result: Finetuned) -> str:
    model = result.model
    words = [result.task.name, model.backbone.model_type, f"{model.num_parameters():,} parameters"]
    if result.settings.model.checkpoint:
        words.append(f"from {result.settings.model.checkpoint}")
    words.append(f"on {result.sources.get('train', 'rows in memory')}")
    return " · ".join(words)


def _state(result: Finetuned) -> Mapping[str, Any]:
    """Return the state of the newest checkpoint."""
    if result.run.checkpoint is None:
        return {"facts": {"parameters": result.model.num_parameters()}}
    return run_state(result.run.checkpoint)


def _tiles(result: Finetuned) -> list[tuple[str, str]]:
    tiles = []
    main = result.monitor
    for part, figures in (("test", result.test_metrics or {}), ("held-out", result.metrics)):
        keys = [main, *(key for key in figures if key not in (main, *COUNTS))]
        tiles += [
            (f"{part} {key.replace('_', ' ')}", figure(float(figures[key])))
            for key in keys[: 2 if result.test_metrics else 4]
            if key in figures
        ]
    if main in result.trivial:
        tiles.append((f"{main.replace('_', ' ')} of guessing", figure(float(result.trivial[main]))))
    return tiles + [(f"{part} rows", show(count)) for part, count in result.counts.items() if count]


def _comparison(result: Finetuned) -> str:
    """The comparison with training from scratch: chart and full report."""
    comparison = result.comparison
    if comparison is None:
        return ""
    text = f'<pre class="plain">{escape(str(comparison.table()))}</pre>'
    return chart(comparison.svg, 720, 320) + card(text)


def _curves(result: Finetuned, history: History) -> str:
    if not history.train and not history.evals:
        return ""
    keys = [result.monitor, *(key for record in history.evals for key in record["eval"])]
    scores = [key for key in dict.fromkeys(keys) if key != "loss" and key not in COUNTS]
    lines = {key: Series("", history.eval_points(key), dots=True) for key in scores}
    small: dict[str, tuple[Series, dict[str, Any]]] = {}
    for key in [key for key, line in lines.items() if line.finite()][:_CURVES]:
        guess = {"guessing": float(result.trivial[key])} if key in result.trivial else {}
        small[f"held-out {key.replace('_', ' ')}"] = lines[key], {"references": guess}
    small["learning rate"] = Series("", history.points("lr")), {"zero": True}
    return charts(history, small, height=320)


def _figures(result: Finetuned) -> str:
    """All metrics of all parts, beside those of the trivial baseline."""
    parts = measured_parts(result)
    keys = list(dict.fromkeys(key for _, figures in parts for key in figures))
    rows = [[key.replace("_", " "), *(_number(f.get(key)) for _, f in parts)] for key in keys]
    if not rows:
        return ""
    return table(["", *(name for name, _ in parts)], rows) + bullets(result.remarks)


def _number(value: Any) -> Any:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return int(value) if whole and abs(value) > 1 else value


def _mistakes(result: Finetuned) -> list[str]:
    """Scores of every class, the confusion matrix and the worst mistakes, as far as the task has them."""
    sections = []
    try:
        confusion = result.confusion()
    except DataError:  # a task without one class for each row, or nothing held out
        pass
    else:
        rows = [list(row.values()) for row in confusion.per_class()]
        head = ["class", "precision", "recall", "F1", "support"]
        title = "Confusion" if confusion.small else "Most confused"
        sections = [section("Classes", table(head, rows)), section(title, confusion.html())]
    try:
        errors = result.errors(_MISTAKES)
    except DataError:  # the task has no correct answers to compare with
        return sections
    return [*sections, section("Worst mistakes", errors.html(_TEXT) if errors else "")]


def _pictures(result: Finetuned) -> str:
    """Targets and answers of judged rows as pictures, and the colours of the classes."""
    shown = result.pictures(_PICTURES)
    if not shown:
        return ""
    swatch = '<span style="background:{}">&emsp;</span>&nbsp;{}&emsp; '
    colours = "".join(
        swatch.format(colour, escape(label)) for label, colour in result.task.colours.items()
    )
    rows = [
        [
            *(
                Html(f'<img src="{row[key]}" width="240" alt="{key}">')
                for key in ("right", "predicted")
            ),
            row["where"],
            float(row["score"]),
        ]
        for row in shown
    ]
    legend = f"<p>{colours}</p>" + (
        f"<p>{escape(result.task.drawn)}</p>" if result.task.drawn else ""
    )
    return card(legend) + table(["right", "predicted", "where", "IoU"], rows, left=3)


def _data(result: Finetuned) -> list[str]:
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
        names = ", ".join(result.labels)
        names = names if len(names) <= 2000 else f"{names[:1999]}…"
        facts.append((f"{len(result.labels)} labels", names))
    return [
        table(["part", "source", "rows"], rows, left=2),
        table(["", ""], facts, left=2),
        bullets(result.notes),
    ]


def command(result: Finetuned) -> str:
    """How to repeat the run: a command line, or a line of Python if model or rows were objects in memory.

    A learning rate that was chosen on the held-out rows is named, because the settings do not hold it.
    """
    settings = result.settings
    sources = [settings.data.train, settings.data.valid, settings.data.test]
    memory = [value for value in (settings.model.checkpoint, *sources) if from_memory(value)]
    config, again = result.run.path / "run.yaml", f"{result.run.path}-again"
    if not memory:
        words = ["pretrain", "finetune", "--config", str(config), "--train.out", again]
        for name, rate in result.rates.items():
            words += [f"--optim.{name}", repr(rate)]
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
    arguments.append(f"config={str(config)!r}")
    arguments += [f"out={again!r}", *(f"{name}={rate!r}" for name, rate in result.rates.items())]
    return f"pretrain.finetune({', '.join(arguments)})"


def _repeat(result: Finetuned) -> str:
    settings = dump(result.settings.to_dict())
    return card(pre(command(result)), details("all settings", pre(settings)))


def _use(result: Finetuned) -> str:
    """Code that loads the model and predicts."""
    path = str(result.run.result or result.run.path)
    return f"import pretrain\nmodel = pretrain.load({path!r})\nprint(model.{example_call(result)})"
