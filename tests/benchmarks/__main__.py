"""The benchmark suite: rows of ours beside peers, equal work checked, an A/A control in every case.

    python -m tests.benchmarks                                    # all rows but those that run by name only
    python -m tests.benchmarks decoder masked --budget 200 --out bench.json
    python -m tests.benchmarks time-to-loss                       # minutes; by name only
    python -m tests.benchmarks --device cuda --out bench-gpu.json
    python -m tests.benchmarks report bench.json                  # docs/benchmarks.md and its figures
    python -m tests.benchmarks report bench.json later.json       # with rows that were measured again

Rows go by name or number. The environment needs `pip install -e ".[bench]"`; a peer that is not installed is left out
by name. On the CPU one thread is used and time is that of the process; the machine should be idle all the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before torch is imported, and for all children.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# name: (number, function that returns the cases, share of the budget); a share of 0 is run by name only.
ROWS: dict[str, tuple[int, str, float]] = {
    "decoder": (1, "pretraining:decoder", 200),
    "masked": (2, "pretraining:masked", 90),
    "time-to-loss": (3, "time_to_loss:time_to_loss", 0),
    "finetune": (4, "finetuning:finetune", 130),
    "lora": (5, "finetuning:lora", 90),
    "memory": (6, "memory:peak", 60),
    "prepare": (7, "data:prepare", 60),
    "save": (8, "saving:save", 70),
    "startup": (9, "startup:startup", 40),
    "generate": (10, "generation:generate", 40),
    "growth": (11, "pretraining:growth", 40),
    "processes": (12, "processes:processes", 80),
    "images": (13, "images:images", 60),
    "parts": (0, "parts:parts", 0),
    "estimates": (0, "memory:estimates", 0),
    "drift": (0, "memory:drift", 0),
}


def load(path: str) -> Any:
    """The function that a path of ``ROWS`` or of a child names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def run(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure rows; what is known so far is written after each case."""
    import torch

    from .harness import Settings, about, compare, device_probe

    device = torch.device(options.device)
    torch.set_num_threads(1)
    settings = Settings(device, options.tiny, options.long)
    found: dict[str, Any] = {
        "about": about(device) | {"rows": names, "budget": options.budget},
        "rows": [],
    }
    found["about"]["tiny"] = options.tiny
    whole = sum(ROWS[name][2] or 60 for name in names)
    for name in names:
        number, path, share = ROWS[name]
        began = time.monotonic()
        cases = load(path)(settings)
        for i, make in enumerate(cases):
            torch.compiler.reset()
            torch.manual_seed(0)
            left = began + options.budget * (share or 60) / whole - time.monotonic()
            probes = [device_probe(device)]
            record = compare(make(), settings, time.monotonic() + left / (len(cases) - i))
            probes.append(device_probe(device))
            record = {"row": name, "number": number, **record, "probe": probes}
            found["rows"].append(record)
            show(record)
            if options.out is not None:
                found["about"]["seconds"] = round(time.monotonic() - options.began)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def show(record: dict[str, Any]) -> None:
    """Print the ratios of a case."""
    from .report import ratio_lines

    print(
        f"\n{record['row']}: {record['case']} ({record['state']}{': ' * bool(record['why'])}{record['why']})"
    )
    for line in ratio_lines(record):
        print(f"  {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["child"]:
        load(arguments[1])(*arguments[2:])
        return 0
    if arguments[:1] == ["report"]:
        from .report import write_page

        parser = argparse.ArgumentParser(
            prog="python -m tests.benchmarks report",
            description="Write docs/benchmarks.md and its figures from what runs measured.",
        )
        parser.add_argument(
            "sources",
            nargs="+",
            type=Path,
            metavar="FILE",
            help="of --out; later files replace their rows",
        )
        write_page(parser.parse_args(arguments[1:]).sources, Path("docs"))
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="names or numbers: " + ", ".join(ROWS)
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--budget", type=float, default=600, metavar="SECONDS", help="for all rows together"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with all samples")
    parser.add_argument("--tiny", action="store_true", help="shapes that only show that it works")
    parser.add_argument("--long", action="store_true", help="also the large shapes")
    options = parser.parse_args(arguments)
    options.began = time.monotonic()
    numbers = {str(number): name for name, (number, _, _) in ROWS.items() if number}
    names = [numbers.get(name, name) for name in options.rows]
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; the rows are {', '.join(ROWS)}")
    if options.device == "cuda" and not names:
        names = [
            "decoder",
            "masked",
            "finetune",
            "lora",
            "memory",
            "save",
            "startup",
            "generate",
            "growth",
        ]
    found = run(names or [name for name, row in ROWS.items() if row[2]], options)
    return int(any(record["state"] == "failed" for record in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
