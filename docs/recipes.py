"""Which settings suit own text that a run sees many times, and which rate suits which width: the experiments behind
"Small text" and "A rate for every width" in training.md.

    python docs/recipes.py run screen                # one part at a time, books
    python docs/recipes.py run final                 # the recipe against the defaults
    python docs/recipes.py run recut                 # the same with long documents cut elsewhere in every epoch
    python docs/recipes.py show screen final         # as tables
    python docs/recipes.py run seconds               # the best of these in the seconds of the default
    python docs/recipes.py run rates                 # five rates at four widths, AdamW and Muon, about two CPU hours
    python docs/recipes.py show rates                # as a table, and docs/figures/rates-*.svg
    python docs/recipes.py run float8                # products in float8 and bf16, which needs no GPU

Every run of a part takes the same number of steps, however little text there is: the number of epochs says how much.
Data are looked for in PRETRAIN_TEST_DATA, everything is kept in ``--out``. Every run is one line of results.jsonl, not
repeated, so that an interrupted experiment goes on where it stopped. Figures are held-out bits per byte.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pretrain
from pretrain.training import update_rules
from pretrain.training.optim import lr_of_width
from pretrain.utils.curves import Series, curve_svg

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
VOCAB, ROW, BATCH = 512, 256, 4
HELD_OUT, LONGEST = 60_000, 20_000  # bytes of held-out text; characters of a document
STEPS = 500
QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al., 2024

# ---------------------------------------------------------------------------- texts


def documents(corpus: str) -> list[str]:
    """The documents of a corpus in a random order, the long ones cut."""
    if corpus == "wikitext2":
        lines = (DATA / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines()
        lines += (DATA / "wikitext2/test.txt").read_text(encoding="utf-8").splitlines()
        found: list[str] = []
        for line in lines:
            if line.startswith(" = ") and not line.startswith(" = = "):
                found.append("")
            if found:
                found[-1] += line + "\n"
    else:
        name = {"books": "books/books.jsonl.gz", "peps": "python_peps/peps.jsonl.gz"}[corpus]
        with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
            found = [json.loads(line)["text"] for line in file]
    random.Random(0).shuffle(found)
    return [text[:LONGEST] for text in found]


def text_of(corpus: str, size: int, out: Path) -> tuple[Path, Path, Path]:
    """Training text of about ``size`` bytes, the held-out text and the tokenizer of a corpus."""
    folder = out / corpus
    train, valid, tokenizer = folder / f"train-{size}.jsonl", folder / "valid.jsonl", folder / "tok"
    folder.mkdir(parents=True, exist_ok=True)
    whole, taken = documents(corpus), 0
    parts = {valid: HELD_OUT, train: size}
    for path, most in parts.items():
        with path.open("w", encoding="utf-8") as file:
            written = 0
            while written < most and taken < len(whole):
                # The last document is cut, so that the number of epochs is the wanted one.
                text = whole[taken][: most - written]
                file.write(json.dumps({"text": text}) + "\n")
                written, taken = written + len(text.encode()), taken + 1
    if not tokenizer.exists():
        rest = folder / "all.jsonl"
        held = sum(1 for _ in valid.open(encoding="utf-8"))
        rest.write_text("".join(json.dumps({"text": text}) + "\n" for text in whole[held:]))
        pretrain.train_tokenizer([str(rest)], "bpe", vocab_size=VOCAB).save(tokenizer)
    return train, valid, tokenizer


# ---------------------------------------------------------------------------- runs


def run(spec: dict[str, Any], out: Path) -> None:
    """Train once and add the held-out figures of the last evaluation to results.jsonl, unless they are there."""
    done = {json.dumps(line["spec"], sort_keys=True) for line in results(out)}
    if json.dumps(spec, sort_keys=True) in done:
        return
    steps = spec.get("steps", STEPS)
    # About 2 bytes per token; the number of epochs that it gives is recorded.
    batch = spec.get("batch", BATCH)
    size = round(2.0 * ROW * batch * steps / spec["epochs"])
    train, valid, tokenizer = text_of(spec["corpus"], size, out)
    folder = out / f"trial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    overrides = {
        "num_layers": spec.get("layers", 4),
        "hidden_size": spec["width"],
        "num_heads": spec["width"] // 32,
        "tie_embeddings": True,
        "max_positions": ROW,
    }
    if spec["family"] != "gpt2":
        overrides["intermediate_size"] = 8 * spec["width"] // 3 // 32 * 32
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(open(out / "console.txt", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(console))
        stack.enter_context(contextlib.redirect_stderr(console))
        if spec.get("quintic"):
            stack.enter_context(mock.patch.object(update_rules, "_POLAR_EXPRESS", (QUINTIC,) * 5))
            stack.enter_context(mock.patch.object(update_rules, "_MARGIN", 1.0))
        found = pretrain.train(
            data={
                "train": str(train),
                "valid": str(valid),
                "tokenizer": str(tokenizer),
                "row_length": ROW,
                "cache": str(out / "cache"),
            },
            model={
                "family": spec["family"],
                "size": "tiny",
                "overrides": overrides | spec.get("model", {}),
            },
            objective={"class_path": "NextToken"},
            optim=spec.get("optim", {}),
            train={
                "out": str(folder),
                "limit": f"{steps} steps",
                "batch_rows": batch,
                "eval_every": spec.get("eval_every", "33.4%"),
                "save_every": "0 steps",
                "best": False,
                "seed": spec["seed"],
                "precision": spec.get("precision", "auto"),
                "recut": spec.get("recut", False),
            },
            parallel={"threads": 1},
        )
    if found.exit_code:
        raise SystemExit(found.exit_code)
    curve = [r["eval"]["bits_per_byte"] for r in found.history if "eval" in r]
    last = [r for r in found.history if "epoch" in r]
    line = {
        "spec": spec,
        "last": round(curve[-1], 4),
        "best": round(min(curve), 4),
        "epochs": last[-1]["epoch"] if last else None,
        "seconds": round(time.process_time() - began, 1),
    }
    with open(out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def results(out: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


# ---------------------------------------------------------------------------- grids

MUON = {"name": "muon", "lr": 3e-3, "min_lr": 0.0}
DROPOUT = {"dropout": 0.1}
# The defaults, then one part at a time.
PARTS: tuple[dict[str, Any], ...] = (
    {},
    {"optim": {"lr": 3e-3, "min_lr": 0.0}},
    {"optim": MUON},
    {"optim": MUON | {"weight_decay": 1.0}},
    {"optim": MUON, "model": DROPOUT},
    {"optim": MUON | {"ema": 0.98}},
    {"optim": MUON | {"weight_decay": 1.0}, "model": DROPOUT},
    {"optim": MUON | {"weight_decay": 1.0, "cautious": True}},
)
# What the screening at 15 epochs led to.
STRONGER = {"optim": MUON | {"weight_decay": 3.0}, "model": {"dropout": 0.2}}


def _screen() -> Iterator[dict[str, Any]]:
    for part in PARTS:
        yield _spec("gpt2", 64, "books", 15, 0, part)
    for part in (PARTS[0], PARTS[2], PARTS[6]):
        yield _spec("gpt2", 64, "books", 5, 0, part)
    yield _spec("gpt2", 64, "books", 15, 0, STRONGER)
    yield _spec("gpt2", 64, "books", 5, 0, PARTS[2] | {"quintic": True})


KINDS = (
    ("gpt2", 64, "peps"),
    ("gpt2", 64, "wikitext2"),
    ("gpt2", 64, "books"),
    ("llama", 64, "books"),
    ("gpt2", 128, "books"),
)


def _final() -> Iterator[dict[str, Any]]:
    """The defaults against Muon: other texts, another family, another width; documents cut once."""
    for seed, kind in itertools.product(range(3), KINDS):
        for part in (PARTS[0], PARTS[2], PARTS[6]):
            yield _spec(*kind, 5, seed, part)
        for part in (PARTS[0], PARTS[6], STRONGER):
            yield _spec(*kind, 15, seed, part)


def _recut() -> Iterator[dict[str, Any]]:
    """The same with documents that are cut elsewhere in every epoch, which is the default."""
    for seed, kind in itertools.product(range(3), KINDS):
        for epochs, parts in ((15, (0, 2, 6)), (5, (0, 2, 6))):
            for part in parts:
                yield _spec(*kind, epochs, seed, PARTS[part] | {"recut": True})
        yield _spec(*kind, 15, seed, STRONGER | {"recut": True})


def _seconds() -> Iterator[dict[str, Any]]:
    """The best of `_recut` on the same texts, with as many steps as take the seconds of 500 steps of AdamW."""
    # Width -> steps of Muon, and of Muon with decay and dropout.
    steps = {
        64: {5: (473, PARTS[2]), 15: (437, PARTS[6])},
        128: {5: (423, PARTS[2]), 15: (417, PARTS[6])},
    }
    for seed, kind in itertools.product(range(3), KINDS):
        for epochs, (count, part) in steps[kind[1]].items() if kind[0] == "gpt2" else ():
            # As many fewer epochs, so that the text is the same.
            yield _spec(*kind, epochs * count / STEPS, seed, part | {"recut": True, "steps": count})


# The same multiples of the default rate at every width, which shows whether the best one moves with the width.
WIDTHS = (64, 128, 256, 512)
MULTIPLES = (0.25, 0.5, 1, 2, 4)
DEFAULT_RATES: dict[str, Callable[[int], float]] = {
    "adamw": lr_of_width,
    "muon": lambda width: 0.02,
}
RATE_SEEDS = (0, 1, 2)


def _rate(name: str, width: int, multiple: float, seed: int) -> dict[str, Any]:
    """A run of the default family at one rate and width: AdamW as by default, Muon as the recipes have it."""
    rate = multiple * DEFAULT_RATES[name](width)
    chosen = {"lr": rate} if name == "adamw" else MUON | {"muon_lr": rate}
    return _spec("qwen3", width, "books", 1, seed, {"optim": chosen | {"warmup": 0.1}}) | {
        "steps": 240,
        "batch": 2,
        "layers": 2,
        "eval_every": "0 steps",
    }


def _rates() -> Iterator[dict[str, Any]]:
    for seed, width, name, multiple in itertools.product(
        RATE_SEEDS, WIDTHS, DEFAULT_RATES, MULTIPLES
    ):
        yield _rate(name, width, multiple, seed)


def _float8() -> Iterator[dict[str, Any]]:
    """The same runs with products in float8 and in bf16."""
    for seed, width, precision in itertools.product(range(3), (64, 128), ("bf16", "fp8")):
        yield _spec("gpt2", width, "books", 1, seed, {"precision": precision})


def _spec(
    family: str, width: int, corpus: str, epochs: float, seed: int, part: dict[str, Any]
) -> dict[str, Any]:
    """A run: what is trained on what, and the settings that differ from the defaults."""
    of = {"family": family, "width": width, "corpus": corpus, "epochs": epochs, "seed": seed}
    return of | part


GRIDS = {
    "screen": _screen,
    "final": _final,
    "recut": _recut,
    "seconds": _seconds,
    "rates": _rates,
    "float8": _float8,
}


def bottom(points: list[tuple[float, float]]) -> float:
    """The rate at which a parabola through the best point and its neighbours, over log rate, is lowest."""
    best = min(range(len(points)), key=lambda k: points[k][1])
    if best in (0, len(points) - 1):
        return points[best][0]
    (a, low), (b, mid), (c, high) = points[best - 1 : best + 2]
    shift = 0.5 * (low - high) / (low - 2 * mid + high)
    return b * math.sqrt(c / a) ** shift


def table(name: str, out: Path) -> str:
    """One line per setting, one column per number of epochs: the last evaluation and, in brackets, the best."""
    found = {json.dumps(line["spec"], sort_keys=True): line for line in results(out)}
    cells: dict[tuple[str, ...], dict[float, list[dict[str, Any]]]] = {}
    for spec in GRIDS[name]():
        line = found.get(json.dumps(spec, sort_keys=True))
        if line is None:
            continue
        part = json.dumps(
            {k: spec[k] for k in ("optim", "model", "quintic", "precision", "recut") if k in spec}
        )
        kind = (spec["corpus"], spec["family"], str(spec["width"]), part)
        cells.setdefault(kind, {}).setdefault(spec["epochs"], []).append(line)
    columns = sorted({epochs for row in cells.values() for epochs in row})
    heads = " | ".join(f"{epochs:g} epochs" for epochs in columns)
    rows = [
        f"| text | family | width | settings | {heads} |",
        "|---" * 4 + "|---:" * len(columns) + "|",
    ]
    for kind, by_epochs in cells.items():
        values = []
        for epochs in columns:
            lines = by_epochs.get(epochs, [])
            last, best = ([line[what] for line in lines] for what in ("last", "best"))
            values.append(
                f"{statistics.fmean(last):.3f} ({statistics.fmean(best):.3f})" if lines else "–"
            )
        rows.append(f"| {' | '.join([*kind, *values])} |")
    return "\n".join(rows)


def rates_table(out: Path) -> str:
    """Held-out bits per byte by rate and width, with the rate at the bottom of each curve; draws the curves too.

    The figure is the mean of the seeds that have been run at every rate of a width, the bars reach from the lowest to
    the highest; widths without such a seed are left out.
    """
    found = {json.dumps(line["spec"], sort_keys=True): line["last"] for line in results(out)}
    heads = " | ".join(f"x {multiple:g}" for multiple in MULTIPLES)
    rows: list[str] = []
    for name, default in DEFAULT_RATES.items():
        rows += [
            f"| {name}, width | default rate | seeds | {heads} | best |",
            "|---:" * (len(MULTIPLES) + 4) + "|",
        ]
        curves = []
        for width in WIDTHS:
            by_seed = [
                [
                    found.get(json.dumps(_rate(name, width, m, seed), sort_keys=True))
                    for m in MULTIPLES
                ]
                for seed in RATE_SEEDS
            ]
            whole = [values for values in by_seed if None not in values]
            if not whole:
                continue
            columns = list(zip(*whole, strict=True))
            points = list(zip(MULTIPLES, map(statistics.fmean, columns), strict=True))
            bars = [(m, min(c), max(c)) for m, c in zip(MULTIPLES, columns, strict=True)]
            curves.append(Series(f"width {width}", points, dots=True, whiskers=bars))
            cells = " | ".join(f"{value:.3f}" for _, value in points)
            rows.append(
                f"| {width} | {default(width):.2g} | {len(whole)} | {cells} | x {bottom(points):.2g} |"
            )
        rows.append("")
        picture = curve_svg(
            curves,
            title=f"held-out bits per byte, {name}",
            x_label="multiple of the default peak rate",
            log_x=True,
        )
        (Path(__file__).parent / f"figures/rates-{name}.svg").write_text(picture, encoding="utf-8")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("names", nargs="+", choices=tuple(GRIDS))
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        if args.what == "show":
            print(rates_table(args.out) if name == "rates" else table(name, args.out))
        else:
            for spec in GRIDS[name]():
                run(spec, args.out)


if __name__ == "__main__":
    main()
