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

from pretrain.report.history import History, loss_svg, number, read_history
from pretrain.report.page import page, show, table, tile_row, write_page
from pretrain.utils.curves import Series, curve_svg

__all__ = ["render", "write"]


def write(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_dir: directory of a run, finished or not.
        out: file to write; ``run_dir/report.html`` by default.

    Raises:
        DataError: ``run_dir`` is not a run directory, or the file cannot be written.
    """
    path = Path(out) if out is not None else Path(run_dir) / "report.html"
    return write_page(path, render(run_dir))


def render(run_dir: str | os.PathLike[str]) -> str:
    """Return the report of a run as HTML text.

    Args:
        run_dir: directory of a run, finished or not.

    Raises:
        DataError: ``run_dir`` is not a run directory.
    """
    folder = Path(run_dir)
    history = read_history(folder)
    config = _read_config(folder)
    name = folder.resolve().name
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<div class="soft">{escape(_subtitle(config))}</div>',
        _damage(history),
        _tiles(history),
        _pictures(history),
        _evaluations(history),
        _samples(history),
        _data(folder, history),
        _checkpoints(folder),
        _repeat(folder, config),
        _events(history),
    ]
    return page(name, sections)


def _read_config(folder: Path) -> dict[str, Any]:
    from pretrain.config.check import name_change
    from pretrain.config.strict_yaml import parse
    from pretrain.errors import ConfigError

    try:
        text = (folder / "run.yaml").read_text(encoding="utf-8")
        name_change(folder / "run.yaml", text)
        parsed = parse(text, "run.yaml")
    except (OSError, UnicodeDecodeError, ConfigError):
        return {}
    tree = parsed[0]
    return (
        {key: value for key, value in tree.items() if isinstance(value, dict)}
        if isinstance(tree, dict)
        else {}
    )


def _subtitle(config: Mapping[str, Any]) -> str:
    model, objective, data = (config.get(key, {}) for key in ("model", "objective", "data"))
    words = [
        model.get("checkpoint") or f"{model.get('family', '')} {model.get('size', '')}".strip()
    ]
    words += [
        str(objective.get("class_path", "")),
        f"on {data['train']}" if "train" in data else "",
    ]
    return " · ".join(str(word) for word in words if word)


def _damage(history: History) -> str:
    if not history.damage:
        return ""
    return (
        f'<div class="card">log.jsonl is damaged and shown in part: {escape(history.damage)}.</div>'
    )


def _tiles(history: History) -> str:
    tiles = []
    if history.train:
        last = history.train[-1]
        steps = [number(record["step"]) for record in (*history.train[-1:], *history.evals[-1:])]
        tiles.append(("steps", show(int(max(steps)))))
        if math.isfinite(number(last.get("tokens"))):
            tiles.append(("tokens seen", show(int(number(last["tokens"])))))
        tiles.append(("last training loss", show(number(last.get("loss")))))
    losses = [(y, x) for x, y in history.eval_points() if math.isfinite(y)]
    if losses:
        loss, step = min(losses)
        tiles.append((f"best held-out loss, step {int(step):,}", show(loss)))
    for key, label in (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy")):
        values = [y for _, y in history.eval_points(key) if math.isfinite(y)]
        if values:
            tiles.append((f"last held-out {label}", show(values[-1])))
    speeds = sorted(y for _, y in history.points("tokens_per_second") if math.isfinite(y))
    if speeds:
        tiles.append(("tokens/s, median", show(int(speeds[len(speeds) // 2]))))
    lost = sum(not math.isfinite(y) for _, y in history.points("loss"))
    if lost:
        tiles.append(("steps with a non-finite loss", show(lost)))
    return tile_row(tiles)


def _pictures(history: History) -> str:
    parts = ['<div class="card wide">', loss_svg(history, width=920, height=360), "</div>"]
    small: list[tuple[str, list[tuple[float, float]], bool]] = [
        ("learning rate", history.points("lr"), True),
        ("tokens per second", history.points("tokens_per_second"), True),
        ("norm of the gradient", history.points("grad_norm"), True),
        ("held-out accuracy", history.eval_points("accuracy"), False),
        ("held-out bits per byte", history.eval_points("bits_per_byte"), False),
    ]
    drawn = [
        f'<div class="card">{curve_svg([Series("", points)], title=title, width=450, height=230, zero=zero)}</div>'
        for title, points, zero in small
        if any(math.isfinite(y) for _, y in points)
    ]
    return "".join(parts) + f'<div class="pair">{"".join(drawn)}</div>'


def _evaluations(history: History) -> str:
    if not history.evals:
        return ""
    keys = list(dict.fromkeys(key for record in history.evals for key in record["eval"]))
    keys = [
        key for key in keys if any(math.isfinite(number(r["eval"].get(key))) for r in history.evals)
    ]
    rows = [
        [
            int(number(r["step"])),
            *(number(r["eval"][key]) if key in r["eval"] else None for key in keys),
        ]
        for r in history.evals
    ]
    return "<h2>Evaluations on held-out rows</h2>" + table(
        ["step", *[k.replace("_", " ") for k in keys]], rows
    )


def _samples(history: History) -> str:
    samples = history.samples
    if not samples:
        return ""
    steps = sorted({step for step, _ in samples})
    last = steps[-1]
    blocks = []
    for step in reversed(steps):
        texts = "".join(f"<pre>{escape(text)}</pre>" for at, text in samples if at == step)
        state = " open" if step == last else ""
        blocks.append(f"<details{state}><summary>step {step:,}</summary>{texts}</details>")
    return f'<h2>What it wrote</h2><div class="card">{"".join(blocks)}</div>'


def _data(folder: Path, history: History) -> str:
    """Return the origin of the model: the "pretrain" block of the newest checkpoint, and the data events of the log."""
    about: dict[str, Any] = {}
    for record in history.events:
        about |= record["data"] if isinstance(record.get("data"), Mapping) else {}
    for _, path in _found(folder)[-1:]:
        with contextlib.suppress(OSError, ValueError):
            block = json.loads((path / "config.json").read_text(encoding="utf-8")).get("pretrain")
            about |= block if isinstance(block, Mapping) else {}
    sources = about.pop("sources", None)
    rows = [
        (key.replace("_", " "), about[key])
        for key in about
        if key != "metrics" and about[key] is not None
    ]
    parts = table(["", ""], rows, left=2) if rows else ""
    if isinstance(sources, list) and sources and all(isinstance(one, Mapping) for one in sources):
        keys = list(dict.fromkeys(key for one in sources for key in one))
        parts += table(keys, [[one.get(key) for key in keys] for one in sources])
    return f"<h2>Data and origin</h2>{parts}" if parts else ""


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps and paths of the checkpoints that have a manifest, oldest first."""
    names = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return sorted(
        (int(n), path) for n, path in names if n.isdigit() and (path / "manifest.json").is_file()
    )


def _checkpoints(folder: Path) -> str:
    found = _found(folder)
    if not found:
        return ""
    newest = found[-1][1].resolve()
    names = ", ".join(path.name for _, path in found)
    code = (
        f"import pretrain\nmodel = pretrain.load({str(newest)!r})\n\n"
        "# or with Hugging Face transformers, from the same directory\n"
        f"from transformers import AutoModel\nmodel = AutoModel.from_pretrained({str(newest)!r})"
    )
    return (
        f'<h2>Checkpoints</h2><div class="card"><div>{escape(names)} in <code>{escape(str(folder.resolve()))}</code>'
        f"</div><pre>{escape(code)}</pre></div>"
    )


def _repeat(folder: Path, config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    path = folder / "run.yaml"
    again = shlex.join(
        ["pretrain", "train", "--config", str(path), "--train.out", f"{folder}-again"]
    )
    text = path.read_text(encoding="utf-8", errors="replace")
    return (
        f'<h2>Repeat it</h2><div class="card"><pre>{escape(again)}</pre>'
        f"<details><summary>all settings (run.yaml)</summary><pre>{escape(text)}</pre></details></div>"
    )


def _events(history: History) -> str:
    if not history.events:
        return ""
    lines = []
    for record in history.events:
        rest = {k: v for k, v in record.items() if k not in ("event", "data", "sample", "samples")}
        lines.append(
            f"{record.get('event', '')}  {json.dumps(rest, ensure_ascii=False, default=str)}"
        )
    text = escape("\n".join(lines))
    return (
        f'<h2>Events</h2><div class="card"><details><summary>{len(lines):,} recorded</summary>'
        f"<pre>{text}</pre></details></div>"
    )
