"""docs/benchmarks.md and its figures, made from the JSON of a run; every time is shown as a ratio of two."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.utils.curves import Series, curve_svg

TITLES = {
    "decoder": "Pre-training a decoder",
    "masked": "Masked language modelling on rows of variable length",
    "time-to-loss": "Time to a loss",
    "finetune": "Full fine-tuning",
    "lora": "LoRA",
    "memory": "Peak memory",
    "prepare": "Preparing text",
    "save": "Checkpoints",
    "startup": "Import and first step",
    "generate": "Generation",
    "growth": "Growth",
    "processes": "Several processes",
    "images": "Images",
}


def ratios(record: dict[str, Any], entry: dict[str, Any]) -> list[float]:
    """Peer / ours of each round: above 1 we need less."""
    ours = next(one for one in record["contenders"] if one["kind"] == "ours")
    pairs = zip(ours["samples"], entry["samples"], strict=False)
    return [peer / mine for mine, peer in pairs if mine > 0]


def bar(record: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """Least ratio that the project wants for a peer."""
    bars = record["bars"]
    found: float | None = bars.get(entry["name"], bars.get(entry["kind"]))
    return found


def spread(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratio_lines(record: dict[str, Any]) -> list[str]:
    """One line for each contender but ours."""
    lines = []
    for entry in record["contenders"]:
        if entry["kind"] == "ours":
            continue
        values, least = ratios(record, entry), bar(record, entry)
        text = (
            spread(values)
            if values and entry["state"] == "ok"
            else f"{entry['state']}: {entry['why']}"
        )
        wanted = f", bar {least:.2f}" if least is not None and values else ""
        lines.append(f"{entry['name']} / ours: {text}{wanted}, {entry['kind']}")
    if record["control"]:
        lines.append(f"A/A control: {spread(record['control'])}")
    return lines


def summary(rows: list[dict[str, Any]]) -> list[tuple[float, str, str, str]]:
    """Median ratio to the best peer of each case, worst first: (ratio, row, case, peer)."""
    found = []
    for record in rows:
        if record["state"] != "ok" or record["row"] == "growth":
            continue
        peers = [
            (statistics.median(ratios(record, entry)), entry["name"])
            for entry in record["contenders"]
            if entry["kind"] in ("best", "default")
            and entry["state"] == "ok"
            and ratios(record, entry)
        ]
        if peers:
            ratio, name = min(peers)
            found.append((ratio, record["row"], record["case"], name))
    return sorted(found)


def table(record: dict[str, Any]) -> list[str]:
    """Markdown of one case."""
    state = "" if record["state"] == "ok" else f" — **{record['state']}**: {record['why']}"
    lines = [f"\n**{record['case']}** ({record['unit']}){state}\n"]
    if record["state"] == "discarded":
        return lines
    lines += [
        "| peer | settings | peer / ours, median (lowest to highest) | bar |",
        "|---|---|---|---:|",
    ]
    for entry in record["contenders"]:
        if entry["kind"] == "ours":
            continue
        values, least = ratios(record, entry), bar(record, entry)
        if entry["state"] == "ok" and values:
            middle = statistics.median(values)
            text = (
                f"**{spread(values)}**"
                if middle < 1 and entry["kind"] in ("best", "default")
                else spread(values)
            )
            wanted = (
                "–" if least is None else f"{least:.2f}, {'held' if middle >= least else 'missed'}"
            )
        else:
            text, wanted = f"{entry['state']}: {entry['why']}".replace("|", "/"), "–"
        kind = {
            "best": "best",
            "default": "as documented",
            "floor": "less than the work",
            "variant": "ours",
        }
        lines.append(f"| {entry['name']} | {kind[entry['kind']]} | {text} | {wanted} |")
    if record["control"]:
        lines.append(
            f"\nOurs against itself, in {len(record['control'])} rounds: {spread(record['control'])}."
        )
    return lines


def overview(rows: list[dict[str, Any]]) -> str:
    """Figure: every peer of every case, in the order of the page."""
    kinds: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float, float]]]] = {
        "best settings": ([], []), "as documented": ([], []),
    }  # fmt: skip
    for number, record in enumerate(rows, 1):
        for entry in record["contenders"]:
            label = {"best": "best settings", "default": "as documented"}.get(entry["kind"], "")
            values = ratios(record, entry)
            if (
                record["state"] == "ok"
                and label
                and values
                and entry["state"] == "ok"
                and record["row"] != "growth"
            ):
                dots, whiskers = kinds[label]
                dots.append((number, statistics.median(values)))
                whiskers.append((number, min(values), max(values)))
    series = [
        Series(name, dots, dots=True, whiskers=bars, joined=False)
        for name, (dots, bars) in kinds.items()
    ]
    return curve_svg(
        series, title="Peer / ours, all cases", x_label="case, numbered as below", references={"equal": 1.0},
        width=760, height=360, zero=True,
    )  # fmt: skip


def growth_figure(record: dict[str, Any]) -> str:
    """Figure: time of a step and its operations, relative to the first point."""
    name, *xs = record["x"]
    series = []
    for label, rounds in record["points"].items():
        if rounds:
            middle = [statistics.median(values) for values in zip(*rounds, strict=True)]
            series.append(
                Series(
                    label, [(x, y / middle[0]) for x, y in zip(xs, middle, strict=True)], dots=True
                )
            )
    return curve_svg(
        series, title=f"Cost of a step over the {name}, relative to the first point", x_label=name, width=760,
        log_x=True,
    )  # fmt: skip


def joined(sources: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Return what a run was, its cases with those that later runs measured again, and a line about each of these.

    Raises:
        SystemExit: a later run had another processor, device or version of a package.
    """
    first, *others = (json.loads(source.read_text(encoding="utf-8")) for source in sources)
    about, rows, remarks = first["about"], first["rows"], []
    for source, later in zip(sources[1:], others, strict=True):
        # A later run may have peers that the first had not.
        about["versions"] = later["about"]["versions"] | about["versions"]
        for key in ("cpu", "device", "versions"):
            found = later["about"][key]
            if found != (about[key] if key != "versions" else {p: about[key][p] for p in found}):
                raise SystemExit(
                    f"{source} is of another {key} than {sources[0]}; make a page of each"
                )
        names = {record["row"] for record in later["rows"]}
        rows = [record for record in rows if record["row"] not in names] + later["rows"]
        when = f"{later['about']['started']}, --budget {later['about']['budget']:.0f}"
        remarks.append(f"The rows {', '.join(sorted(names))} are of a later run ({when}).")
    order = {name: place for place, name in enumerate(TITLES)}
    return about, sorted(rows, key=lambda record: order.get(record["row"], len(order))), remarks


def write_page(sources: Sequence[Path], docs: Path) -> None:
    """Write benchmarks.md and figures/benchmarks-*.svg into ``docs``."""
    about, rows, remarks = joined(sources)
    figures = docs / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    worst = summary(rows)
    lines = [
        "<!-- Written by python -m tests.benchmarks report; do not edit. -->",
        "# Benchmarks\n",
        "<!-- not run: it measures for minutes; tests/benchmarks/test_benchmarks.py runs the rows in small -->",
        "```bash",
        f"python -m tests.benchmarks {' '.join(about['rows'])} "
        f"--device {'cpu' if about['device'] == 'cpu' else 'cuda'} --budget {about['budget']:.0f} --out bench.json",
        f"python -m tests.benchmarks report {' '.join(source.name for source in sources)}",
        "```\n",
        "Ratios are peer / ours: above 1 ours needs less time or memory. Contenders take turns in one call,\n"
        "forwards and backwards, on the same shapes, number type, data and optimizer settings; what is compared\n"
        "is each round. Tokens, losses with copied weights and the norm of the update are checked, and whoever\n"
        "does other work is shown as failed, without a ratio. Ours runs twice in each round: a case in which the\n"
        "two differ by more than 3 % is discarded. Time on a CPU is that of the process on one thread, unless\n"
        "the unit says otherwise.\n",
        f"{about['started']}, {about['device'] if about['device'] != 'cpu' else about['cpu']}, {about['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f". {probes(rows)}\n",
    ]
    lines += [f"{remark}\n" for remark in remarks]
    reached = {record["row"] for record in rows}
    if missing := [name for name in about["rows"] if name not in reached]:
        lines.append(f"**The run was stopped before the rows {', '.join(missing)}.**\n")
    if worst:
        mean = math.exp(statistics.mean(math.log(ratio) for ratio, *_ in worst))
        lines += [
            f"## The worst first\n\nAgainst the best peer of each case; the geometric mean of all is {mean:.2f}.\n",
            "| row | case | best peer | peer / ours |\n|---|---|---|---:|",
            *(
                f"| {row} | {case} | {peer} | {'**' * (r < 1)}{r:.2f}{'**' * (r < 1)} |"
                for r, row, case, peer in worst
            ),
            "\n![Peer / ours of all cases](figures/benchmarks.svg)",
        ]
        (figures / "benchmarks.svg").write_text(overview(rows) + "\n", encoding="utf-8")
    for name in dict.fromkeys(record["row"] for record in rows):
        lines.append(f"\n## {TITLES.get(name, name)}")
        for number, record in enumerate(rows, 1):
            if record["row"] != name:
                continue
            part = table(record)
            part[0] = part[0].replace("**", f"**{number}. ", 1)
            lines += part
            if "points" in record:
                picture = f"benchmarks-{record['x'][0].replace(' ', '-')}.svg"
                (figures / picture).write_text(growth_figure(record) + "\n", encoding="utf-8")
                lines.append(f"\n![Growth with the {record['x'][0]}](figures/{picture})")
    (docs / "benchmarks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(docs / "benchmarks.md")


def probes(rows: list[dict[str, Any]]) -> str:
    """How steady the machine was."""
    drops = [
        1 - min(p["gflops"] for p in r["probe"]) / max(p["gflops"] for p in r["probe"])
        for r in rows
    ]
    loads = [p["load"] for r in rows for p in r["probe"]]
    return (
        f"A product of matrices before and after each case differs by up to {max(drops):.0%}; the load was "
        f"{min(loads):.1f} to {max(loads):.1f}"
    )
