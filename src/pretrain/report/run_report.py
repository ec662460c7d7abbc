"""The report of a run: one HTML file with curves, evaluations, samples, settings and the command to repeat the run.

The file is self-contained: charts are inline SVG, there are no scripts or remote resources, and all text from data or
settings is escaped. It is made only from the files of the run directory (``log.jsonl``, ``run.yaml``, checkpoints), so
it can be written at any time: while the run goes on, after it was killed, or for a copied run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pretrain.checkpoint.best import run_state
from pretrain.checkpoint.model_card import auto_class
from pretrain.checkpoint.resolve import models_of_run
from pretrain.config.check import name_change
from pretrain.config.strict_yaml import parse
from pretrain.errors import ConfigError, DataError
from pretrain.printing import clock
from pretrain.report.history import History, loss_svg, number, read_history
from pretrain.report.remarks import compare_with_unigram, overfitted, resumed_with
from pretrain.utils.curves import Series, curve_svg
from pretrain.utils.html import (
    Page,
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
from pretrain.utils.run_log import NATS

__all__ = [
    "PAGE",
    "charts",
    "facts_of",
    "fine_tuned",
    "machine_tiles",
    "render",
    "unfinished_tiles",
    "write",
]

PAGE = "report.html"


def write(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a pre-training run and return its path.

    Args:
        run_dir: directory of a run, finished or not. The page in that of a fine-tuning run is kept: it shows more.
        out: file to write; ``run_dir/report.html`` by default.

    Raises:
        DataError: ``run_dir`` is not a run directory, or one of fine-tuning without a page, or the file cannot be
            written.
    """
    run_dir = Path(os.path.expanduser(run_dir))
    path = Path(os.path.expanduser(out)) if out is not None else run_dir / PAGE
    if out is not None or not fine_tuned(run_dir):
        return write_page(path, render(run_dir))
    if path.is_file():
        kept: Path = Page(path)
        return kept
    raise DataError(
        f"{run_dir} is a fine-tuning run, whose page shows its task. Write it with: "
        f"{shlex.join(['pretrain', 'report', str(run_dir)])}"
    )


def fine_tuned(run_dir: str | os.PathLike[str]) -> bool:
    """Whether a run directory is one of fine-tuning, going by its ``run.yaml``."""
    return "task" in _read_config(Path(run_dir))


def render(run_dir: str | os.PathLike[str]) -> str:
    """Return the report of a run as HTML text.

    Raises:
        DataError: ``run_dir`` is not a run directory.
    """
    folder = Path(run_dir)
    history = read_history(folder)
    config, about, state = _read_config(folder), _about(folder, history), _state(folder)
    name = folder.resolve().name
    damage = f"log.jsonl is damaged and shown in part: {history.damage}."
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<div class="soft">{escape(_subtitle(config))}</div>',
        card(escape(damage)) if history.damage else "",
        tile_row(
            [*_tiles(history), *unfinished_tiles(state), *machine_tiles(history, facts_of(state))]
        ),
        bullets(_remarks(history, folder)),
        _charts(history),
        section("Evaluations on held-out rows", _evaluations(history, about)),
        section("Generated samples", _samples(history)),
        section("Data and origin", _data(about)),
        section("Checkpoints", _checkpoints(folder)),
        section("Repeat it", _repeat(folder) if config else ""),
        section("Events", _events(history)),
    ]
    return page(name, sections)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / "run.yaml").read_text(encoding="utf-8")
        name_change(folder / "run.yaml", text)
        tree = parse(text, "run.yaml")[0]
    except (OSError, UnicodeDecodeError, ConfigError):
        return {}
    sections = tree.items() if isinstance(tree, dict) else ()
    return {key: value for key, value in sections if isinstance(value, dict)}


def _subtitle(config: Mapping[str, Any]) -> str:
    model, objective, data = (config.get(key, {}) for key in ("model", "objective", "data"))
    words = [
        model.get("checkpoint") or f"{model.get('family', '')} {model.get('size', '')}".strip(),
        objective.get("class_path", ""),
        f"on {data.get('source') or data['train']}" if "train" in data else "",
    ]
    return " · ".join(str(word) for word in words if word)


def _tiles(history: History) -> list[tuple[str, str]]:
    tiles = []
    if history.train:
        last = history.train[-1]
        steps = [number(record["step"]) for record in (*history.train[-1:], *history.evals[-1:])]
        tiles.append(("steps", show(int(max(steps)))))
        if math.isfinite(number(last.get("tokens"))):
            tiles.append((f"{_unit(history)} seen", show(int(number(last["tokens"])))))
        tiles.append(("last training loss", figure(number(last.get("loss")))))
    losses = [(y, x) for x, y in history.eval_points(alike=True) if math.isfinite(y)]
    if losses:
        loss, step = min(losses)
        best = (
            "best held-out loss"
            if len(losses) == len(history.evals)
            else "held-out loss on all rows"
        )
        tiles.append((f"{best}, step {int(step):,}", figure(loss)))
    for key, label in (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy")):
        values = [y for _, y in history.eval_points(key) if math.isfinite(y)]
        if values:
            tiles.append((f"last held-out {label}", figure(values[-1])))
    speeds = sorted(y for _, y in history.points("tokens_per_second") if math.isfinite(y))
    if speeds:
        tiles.append((f"{_unit(history)}/s, median", show(int(speeds[len(speeds) // 2]))))
    lost = sum(not math.isfinite(y) for _, y in history.points("loss"))
    if lost:
        tiles.append(("steps with a non-finite loss", show(lost)))
    return tiles


def machine_tiles(history: History, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return tiles of parameters, time, hardware and memory, as far as they are known.

    ``facts`` are those of the run's state.
    """
    tiles = []
    parameters, trained = number(facts.get("parameters")), number(facts.get("trained"))
    if math.isfinite(parameters):
        tiles.append(("parameters", show(int(parameters))))
        if trained < parameters:
            tiles.append(("of these trained", show(int(trained))))
    seconds = [number(r.get("seconds")) for r in (*history.train[-1:], *history.evals[-1:])]
    if seconds and math.isfinite(max(seconds)):
        tiles.append(("time", clock(max(seconds))))
    if math.isfinite(peak := number(facts.get("peak_memory"))):
        tiles.append(("peak memory of a process", f"{peak / 2**30:.2f} GiB"))
    if facts.get("hardware"):
        tiles.append(("hardware", str(facts["hardware"])))
    return tiles


def unfinished_tiles(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a tile if the run has made fewer steps than planned: it goes on, or was stopped, also by its patience."""
    made, planned = number(state.get("step")), number(state.get("total_steps"))
    return [(f"of {int(planned):,} planned steps made", show(int(made)))] if made < planned else []


def facts_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the state of a run records of model and machine."""
    facts = state.get("facts")
    return facts if isinstance(facts, Mapping) else {}


def _state(folder: Path) -> Mapping[str, Any]:
    """Return the state of the newest checkpoint that has one."""
    states = (run_state(path) for path in reversed(_complete(folder)))
    return next((state for state in states if facts_of(state)), {})


def _remarks(history: History, folder: Path) -> list[str]:
    """Return remarks on overfitting, changed settings, and the distance from word frequencies, where it is known."""
    found = [line for line in (overfitted(history), resumed_with(history)) if line]
    losses = [y for _, y in history.eval_points(alike=True) if math.isfinite(y)]
    unigram = number(_block(folder).get("unigram_nats"))
    if history.loss_unit == NATS and losses and math.isfinite(unigram) and unigram > 0:
        found.append(f"The held-out loss is {compare_with_unigram(min(losses), unigram)}.")
    return found


def _unit(history: History) -> str:
    """Return what the run counts: tokens unless its log says otherwise."""
    return str(history.train[-1].get("unit", "tokens")) if history.train else "tokens"


def _charts(history: History) -> str:
    return charts(history, {
        "learning rate": (Series("", history.points("lr")), {"zero": True}),
        f"{_unit(history)} per second": (Series("", history.points("tokens_per_second")), {"zero": True}),
        "norm of the gradient": (Series("", history.points("grad_norm")), {"zero": True}),
        "held-out accuracy": (Series("", history.eval_points("accuracy")), {}),
        "held-out bits per byte": (Series("", history.eval_points("bits_per_byte")), {}),
    }, height=360)  # fmt: skip


def charts(
    history: History, small: Mapping[str, tuple[Series, Mapping[str, Any]]], height: int
) -> str:
    """Return the chart of the loss, and smaller ones: title -> line, which has finite values, and drawing options."""
    drawn = [
        card(curve_svg([line], title=title, width=450, height=230, **options))
        for title, (line, options) in small.items()
        if line.finite()
    ]
    loss = chart(lambda width, height: loss_svg(history, width=width, height=height), 920, height)
    return f'{loss}<div class="pair">{"".join(drawn)}</div>'


# Losses of models that need no training, by their keys in the "pretrain" block.
_BASELINES = {
    "unigram_nats": "unigram",
    "kneser_ney_nats": "Kneser-Ney, order 3, of the tokens that the run saw",
}


def _evaluations(history: History, about: Mapping[str, Any]) -> str:
    figures = [
        {key: value for key, text in record["eval"].items() if math.isfinite(value := number(text))}
        for record in history.evals
    ]
    keys = list(dict.fromkeys(key for row in figures for key in row))
    rows = [
        [
            int(number(record["step"])),
            *(number(record["eval"][key]) if key in record["eval"] else None for key in keys),
        ]
        for record in history.evals
    ]
    if not rows:
        return ""
    made = table(["step", *(key.replace("_", " ") for key in keys)], rows)
    last = figures[-1]
    found = [(f"model, step {rows[-1][0]:,}", last.get("loss"), last.get("bits_per_byte"))]
    for key, name in _BASELINES.items() if history.loss_unit == NATS else ():
        if math.isfinite(nats := number(about.get(key))):
            loss, bits = last.get("loss"), last.get("bits_per_byte")
            found.append((name, nats, nats * bits / loss if loss and bits else None))
    return made + (table(["held out", "nats", "bits per byte"], found) if found[1:] else "")


def _samples(history: History) -> str:
    texts: dict[int, str] = {}
    for step, text in history.samples:
        texts[step] = texts.get(step, "") + pre(text)
    blocks = [
        details(f"step {step:,}", texts[step], shown=step == max(texts)) for step in reversed(texts)
    ]
    return card(*blocks) if blocks else ""


def _about(folder: Path, history: History) -> dict[str, Any]:
    """Return the origin of the model: the "pretrain" block of the newest checkpoint, and the data events of the log."""
    about: dict[str, Any] = {}
    for record in history.events:
        about |= record["data"] if isinstance(record.get("data"), Mapping) else {}
    return {**about, **_block(folder)}


def _data(about: Mapping[str, Any]) -> str:
    sources = about.get("sources")
    rows = [
        (key.replace("_", " "), value)
        for key, value in about.items()
        if key not in ("metrics", "sources") and value is not None
    ]
    parts = table(["", ""], rows, left=2) if rows else ""
    if isinstance(sources, list) and sources and all(isinstance(one, Mapping) for one in sources):
        keys = list(dict.fromkeys(key for one in sources for key in one))
        parts += table(keys, [[one.get(key) for key in keys] for one in sources])
    return parts


def _block(folder: Path) -> Mapping[str, Any]:
    """Return the "pretrain" block of the newest checkpoint."""
    blocks = [_config(path).get("pretrain") for path in _complete(folder)[-1:]]
    return next((block for block in blocks if isinstance(block, Mapping)), {})


def _config(directory: Path) -> Mapping[str, Any]:
    """Return the content of config.json; empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return found if isinstance(found, Mapping) else {}
    return {}


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoints that have a manifest, oldest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    steps = sorted((step for step in found if step.isdigit()), key=int)
    return [found[step] for step in steps if (found[step] / "manifest.json").is_file()]


def _checkpoints(folder: Path) -> str:
    """Return the code that opens the model of the run, by the path that was given, and the names of the checkpoints."""
    names = ", ".join(path.name for path in _complete(folder))
    models = models_of_run(folder) if folder.is_dir() else []
    best = next((path for path in models if (path / "manifest.json").is_file()), None)
    if best is None:
        return ""
    auto = auto_class(_config(best))
    code = (
        f"import pretrain\nmodel = pretrain.load({str(best)!r})\n\n"
        "# or with Hugging Face transformers, from the same directory\n"
        f"from transformers import {auto}\nmodel = {auto}.from_pretrained({str(best)!r})"
    )
    place = f"<div>{escape(names)} in <code>{escape(str(folder))}</code></div>" if names else ""
    return card(place, pre(code))


def _repeat(folder: Path) -> str:
    path = folder / "run.yaml"
    command = "finetune" if fine_tuned(folder) else "train"
    words = ["pretrain", command, "--config", str(path), "--train.out", f"{folder}-again"]
    text = path.read_text(encoding="utf-8", errors="replace")
    return card(pre(shlex.join(words)), details("all settings (run.yaml)", pre(text)))


def _events(history: History) -> str:
    lines = []
    for record in history.events:
        rest = {k: v for k, v in record.items() if k not in ("event", "data", "sample", "samples")}
        text = json.dumps(rest, ensure_ascii=False, default=str)
        lines.append(f"{record.get('event', '')}  {text}")
    return card(details(f"{len(lines):,} recorded", pre("\n".join(lines)))) if lines else ""
