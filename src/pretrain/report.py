"""The report of a run: one HTML file with curves, evaluations, samples, settings and how to repeat it.

The file is self-contained: pictures are inline SVG, there is no script and no remote resource, and every text that
comes from data or settings is escaped. It is rebuilt from ``log.jsonl`` and ``run.yaml`` alone, so it can be written
at any time, for a run that is going on, was killed, or was copied from elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pretrain.errors import DataError
from pretrain.reporting.curves import Series, curve_svg
from pretrain.reporting.history import History, loss_svg, number, read_history, sort_records

__all__ = ["History", "curve_svg", "loss_svg", "read_history", "render", "sort_records", "write"]

_CSS = """
:root{color-scheme:light dark;--ink:#16181d;--soft:#5d6470;--line:#dfe1e6;--card:#fff;--page:#f6f7f9;--code:#eef0f3}
@media (prefers-color-scheme:dark){:root{--ink:#eceef2;--soft:#a2a9b5;--line:#31353e;--card:#16181d;--page:#0e0f13;
--code:#22252c}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 20px 60px}h1{font-size:25px;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 10px}.soft{color:var(--soft)}.card{background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:14px 16px;margin:12px 0;overflow-x:auto}.tiles{display:flex;flex-wrap:wrap;gap:10px;
margin:18px 0}.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:9px 15px;
min-width:118px}.tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);
font-size:13px}table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;color:var(--soft);
font-weight:500}th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}.num{text-align:right;font-variant-numeric:tabular-nums}
pre,code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}pre{background:var(--code);
border-radius:8px;padding:10px 12px;margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr));gap:12px}.pair>div{margin:0}svg{display:block;width:100%;
height:auto}.wide svg{min-width:560px}details summary{cursor:pointer;color:var(--soft)}
"""


def write(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_dir: directory of a run, finished or not.
        out: file to write; ``run_dir/report.html`` by default.

    Raises:
        DataError: ``run_dir`` is not a run directory, or the file cannot be written.
    """
    text = render(run_dir)
    path = Path(out) if out is not None else Path(run_dir) / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"Cannot write the report {path}: {error.strerror}.") from error
    return path


def render(run_dir: str | os.PathLike[str]) -> str:
    """The report of a run as HTML text.

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
        _tiles(history),
        _pictures(history),
        _evaluations(history),
        _samples(history),
        _data(folder, history),
        _checkpoints(folder),
        _repeat(folder, config),
        _events(history),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}</title><style>{_CSS}</style></head><body><main>"
    )
    return head + "".join(sections) + "</main></body></html>\n"


def _read_config(folder: Path) -> dict[str, Any]:
    from pretrain.errors import ConfigError
    from pretrain.settings.strict_yaml import parse

    try:
        parsed = parse((folder / "run.yaml").read_text(encoding="utf-8"), "run.yaml")
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


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A table whose columns after the first ``left`` are numbers."""
    kinds = ["" if i < left else ' class="num"' for i in range(len(head))]
    names = zip(head, kinds, strict=True)
    top = "".join(f"<th{kind}>{escape(text)}</th>" for text, kind in names) if any(head) else ""
    body = ""
    for row in rows:
        cells = zip(row, kinds, strict=True)
        body += (
            "<tr>" + "".join(f"<td{k}>{escape(_show(value))}</td>" for value, k in cells) + "</tr>"
        )
    return f'<div class="card"><table>{top and f"<tr>{top}</tr>"}{body}</table></div>'


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return (
            f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 and value.is_integer() else f"{value:.5g}"
        )
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return str(value)


def _tiles(history: History) -> str:
    tiles = []
    if history.train:
        last = history.train[-1]
        steps = [number(record["step"]) for record in (*history.train[-1:], *history.evals[-1:])]
        tiles.append(("steps", _show(int(max(steps)))))
        if math.isfinite(number(last.get("tokens"))):
            tiles.append(("tokens seen", _show(int(number(last["tokens"])))))
        tiles.append(("last training loss", _show(number(last.get("loss")))))
    losses = [(y, x) for x, y in history.eval_points() if math.isfinite(y)]
    if losses:
        loss, step = min(losses)
        tiles.append((f"best held-out loss, step {int(step):,}", _show(loss)))
    for key, label in (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy")):
        values = [y for _, y in history.eval_points(key) if math.isfinite(y)]
        if values:
            tiles.append((f"last held-out {label}", _show(values[-1])))
    speeds = sorted(y for _, y in history.points("tokens_per_second") if math.isfinite(y))
    if speeds:
        tiles.append(("tokens/s, median", _show(int(speeds[len(speeds) // 2]))))
    lost = sum(not math.isfinite(y) for _, y in history.points("loss"))
    if lost:
        tiles.append(("steps with a non-finite loss", _show(lost)))
    shown = "".join(
        f'<div class="tile"><b>{escape(b)}</b><span>{escape(a)}</span></div>' for a, b in tiles
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


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
    return "<h2>Evaluations on held-out rows</h2>" + _table(
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
    """Where the model comes from: the block that its newest checkpoint carries, and what the log says of the data."""
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
    parts = _table(["", ""], rows, left=2) if rows else ""
    if isinstance(sources, list) and sources and all(isinstance(one, Mapping) for one in sources):
        keys = list(dict.fromkeys(key for one in sources for key in one))
        parts += _table(keys, [[one.get(key) for key in keys] for one in sources])
    return f"<h2>Data and origin</h2>{parts}" if parts else ""


def _found(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run, oldest first."""
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
