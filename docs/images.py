"""Images with few labels: from random weights, pre-trained on images without labels, and pixels under a linear model.

    python docs/images.py labels --counts 100 1000   # a vision transformer from random weights beside pixels
    python docs/images.py transfer                   # MaskedImage and LeJEPA beside random weights, pixels and probes
    python docs/images.py characters                 # few shots of written characters, for the models of mnist
    python docs/images.py signs                      # the same on photographs of hands
    python docs/images.py drawings                   # the same on ten written characters, ten drawings of each
    python docs/images.py classes                    # a classifier of the digits 0 to 4, fine-tuned on 5 to 9
    python docs/images.py reading                    # seconds to read 1,000 photos, from files and prepared

Data are looked for in PRETRAIN_TEST_DATA. One CPU thread. Each figure is a line of ``--out``/NAME.jsonl; figures that
stand there already are not computed again, and pre-training goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pretrain
from pretrain.data.images import rows as image_rows
from pretrain.data.images.augment import Augmentation
from pretrain.data.images.rows import pixel_vectors, read_images
from pretrain.data.images.source import labelled_images
from pretrain.data.loader import row_rngs
from pretrain.data.tables import Table
from pretrain.finetuning.baseline import vector_baseline
from pretrain.finetuning.compare import stratified_subset
from pretrain.objectives.image_classification import ImageClassification

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
SHAPE = {"num_layers": 4, "pooling": "mean"}
# Set -> its file of training images, and the sizes of the model that reads it.
SETS: dict[str, tuple[str, dict[str, int]]] = {
    "mnist": ("mnist/train_5k.npz", {"image_size": 28, "patch_size": 7, "num_channels": 1}),
    "signs": (
        "sign_language_digits/sign_digits_64.npz",
        {"image_size": 32, "patch_size": 8, "num_channels": 3},
    ),
    # Written by ``drawings``, without the characters that are told apart.
    "drawings": ("", {"image_size": 35, "patch_size": 7, "num_channels": 1}),
}
# Rates of fine-tuning and their layer decay, from which each arm is given the better one on the validation rows.
RATES = ((1e-3, 1.0), (3e-3, 0.75))
STEPS = 150  # of fine-tuning
# Set and objective -> steps and rows of pre-training, the optimizer, and the arguments of the objective.
ADAMW = {"lr": 2e-3, "weight_decay": 0.05}
MUON = {"name": "muon", "lr": 2e-3, "muon_lr": 0.02, "weight_decay": 0.01}
PRETRAINING: dict[tuple[str, str], tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    ("mnist", "MaskedImage"): (800, 256, ADAMW, {"crop": 0.7}),
    ("signs", "MaskedImage"): (1100, 256, ADAMW, {"crop": 0.7}),
    ("mnist", "LeJEPA"): (800, 128, MUON, {"crop": 0.5, "mask_ratio": 0.5}),
    ("signs", "LeJEPA"): (
        1200,
        128,
        MUON,
        {"crop": 0.8, "mask_ratio": 0.5, "randaugment": 3},
    ),
    ("drawings", "MaskedImage"): (1000, 256, ADAMW, {"crop": 0.7}),
    ("drawings", "LeJEPA"): (
        1000,
        128,
        MUON,
        {"crop": 0.8, "mask_ratio": 0.5, "randaugment": 3},
    ),
}


class Figures:
    """Lines of a file, each a figure with what it is of; one that is there is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.lines = [json.loads(line) for line in lines]

    def __call__(self, key: dict[str, Any], compute: Any) -> dict[str, Any]:
        for line in self.lines:
            if key.items() <= line.items():
                return line
        began = time.process_time()
        line = {**key, **compute()}
        line["cpu_seconds"] = round(time.process_time() - began)
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
        return line


def measured(count: int, seed: int, out: Path, **options: Any) -> dict[str, Any]:
    """Accuracy on the test images of both, after learning from ``count`` images, chosen on 500 others."""
    rows = read_images(DATA / "mnist" / "train_5k.npz")
    valid, train = drawn(rows, count, seed, held=500, held_seed=seed)
    test = read_images(DATA / "mnist" / "t10k-images-idx3-ubyte.gz")
    model = pretrain.build("vit", "tiny", image_size=28, patch_size=7, seed=seed)
    began = time.monotonic()
    result = pretrain.finetune(
        model,
        train,
        task="image-classification",
        valid=valid,
        test=test,
        out=out / f"{count}-{seed}",
        seed=seed,
        threads=1,
        **options,
    )
    seconds = time.monotonic() - began
    assert result.test_metrics is not None
    pixels = vector_baseline("pixels", *ImageClassification.baseline_columns(train, valid, test))
    return {
        "vit": result.test_metrics["accuracy"],
        "pixels": pixels["score_test"],
        "guess": result.trivial_test["accuracy"],
        "steps": result.run.step,
        "seconds": round(seconds),
        **options,
    }


def drawn(
    rows: Table, count: int, seed: int, *, held: int, held_seed: int = 99
) -> tuple[Table, Table]:
    """Return ``held`` validation rows, and ``count`` others to learn from, both stratified by class."""
    labels = rows.columns["label"]
    chosen = set(stratified_subset(labels, held, held_seed))
    rest = [i for i in range(len(labels)) if i not in chosen]
    few = stratified_subset([labels[i] for i in rest], count, seed)
    return rows.take(sorted(chosen)), rows.take([rest[k] for k in few])


# ------------------------------------------------------------------------------------------------ pre-training


def pretrained(objective: str, name: str, out: Path) -> Path:
    """Pre-train on images without labels, or go on with it, unless it is done; return the directory of the run."""
    steps, rows, optim, arguments = PRETRAINING[name, objective]
    masked = objective == "MaskedImage"
    directory = out / f"{name}-{objective}"
    if (directory / "model").exists():
        return directory
    source, sizes = SETS[name]
    began = time.process_time()
    pretrain.train(
        {
            "data": {
                "source": "images",
                "source_args": {
                    "train": str(DATA / source),
                    "labels": False,
                    "size": sizes["image_size"],
                    "channels": sizes["num_channels"],
                    "valid": 0.04,
                },
            },
            "model": {
                "family": "vit_mae" if masked else "vit",
                "size": "tiny",
                "overrides": {
                    **({"num_layers": 4} if masked else SHAPE),
                    "patch_size": sizes["patch_size"],
                },
            },
            "objective": {"class_path": objective, "init_args": arguments},
            "optim": optim,
            "train": {
                "out": str(directory),
                "limit": f"{steps} steps",
                "batch_rows": rows,
                "eval_every": "50%",
                "save_every": "50%",
                "log_every": 50,
            },
            "parallel": {"threads": 1},
        }
    )
    # Of a run that goes on with an earlier one it is the rest.
    print(f"{directory.name}: {time.process_time() - began:.0f} CPU-seconds", flush=True)
    return directory


def tuned(
    model: Any, train: Table, valid: Table, test: Table | None, out: Path, seed: int, rate: int
) -> dict[str, Any]:
    """Fine-tune; return the accuracy on the validation rows and, if there are any, on the test rows."""
    shutil.rmtree(out, ignore_errors=True)
    lr, decay = RATES[rate]
    result = pretrain.finetune(
        model,
        train,
        task="image-classification",
        valid=valid,
        test=test,
        labels=sorted({str(label) for label in train.columns["label"]}),
        out=out,
        lr=lr,
        layer_decay=decay,
        limit=f"{STEPS} steps",
        eval_every="50%",
        pooling="mean",
        seed=seed,
        threads=1,
        quiet=True,
    )
    found = {"valid": result.metrics["accuracy"]}
    return found | ({} if test is None else {"accuracy": result.test_metrics["accuracy"]})  # type: ignore[index]


def tune_and_test(
    name: str,
    arm: str,
    model: Any,
    trial: Sequence[Any],
    draws: Sequence[Sequence[Any]],
    figures: Figures,
    out: Path,
) -> None:
    """Choose the better rate on one draw, and fine-tune with it on all; a draw is training, validation and test rows.

    Without test rows in the first, its validation rows choose.
    """
    tries = []
    for rate in range(len(RATES)):
        key = {"what": "rate", "set": name, "arm": arm, "rate": rate}
        line = figures(key, functools.partial(tuned, model, *trial, out / "tune", 0, rate))
        tries.append(line.get("accuracy", line["valid"]))
    best = int(np.argmax(tries))
    for seed, parts in enumerate(draws):
        key = {"what": "tuned", "set": name, "arm": arm, "seed": seed, "rate": best}
        figures(key, functools.partial(tuned, model, *parts, out / "tune", seed, best))


def compare(
    name: str,
    models: dict[str, Any],
    rows: Table,
    test: Table,
    count: int,
    held: int,
    seeds: int,
    figures: Figures,
    out: Path,
) -> None:
    """Fine-tune every model at its better rate on draws of ``count`` labels; pixels and probes beside them."""
    draws = [drawn(rows, count, seed, held=held) for seed in range(seeds)]
    for arm, model in models.items():
        parts = [(train, valid, test) for valid, train in draws]
        tune_and_test(name, arm, model, (*parts[0][:2], None), parts, figures, out)
    for seed in range(seeds):
        valid, train = drawn(rows, count, seed, held=held)
        columns = ImageClassification.baseline_columns(train, valid, test)
        figures(
            {"what": "pixels", "set": name, "arm": "pixels", "seed": seed},
            lambda c=columns: {"accuracy": vector_baseline("pixels", *c)["score_test"]},
        )
        for arm, model in models.items():
            for method in ("linear", "knn"):
                figures(
                    {"what": method, "set": name, "arm": arm, "seed": seed},
                    lambda m=model, t=train, v=valid, k=method: pretrain.probe(
                        m, t, valid=v, test=test, method=k, k=1, pooling="mean"
                    ),
                )
    summary(name, figures)


def summary(name: str, figures: Figures) -> None:
    """Print mean, spread and, for what is paired with random weights, the gain with its interval."""
    scores: dict[tuple[str, str], list[float]] = {}
    for line in figures.lines:
        if line["set"] == name and line["what"] != "rate":
            scores.setdefault((line["what"], line["arm"]), []).append(100 * line["accuracy"])
    scratch = scores.get(("tuned", "scratch"), [])
    for (what, arm), values in scores.items():
        text = f"{name} {what} {arm}: {np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"
        if what == "tuned" and arm != "scratch" and len(values) == len(scratch):
            gains = [a - b for a, b in zip(values, scratch, strict=True)]
            mean, low, high = pretrain.metrics.mean_interval(gains)
            better = sum(gain > 0 for gain in gains)
            text += f", gain {mean:+.1f} [{low:+.1f}, {high:+.1f}], {better}/{len(gains)}"
        print(text)


def transfer(name: str, seeds: int, out: Path, objectives: list[str]) -> None:
    """Compare the arms of a set: 100 labels, 500 rows of digits or 200 of hands to tune."""
    rows, test = read(name)
    arms = models(name, out, objectives)
    held = 500 if name == "mnist" else 200
    compare(name, arms, rows, test, 100, held, seeds, Figures(out / f"{name}.jsonl"), out)


def read(name: str) -> tuple[Table, Table]:
    """Return the training rows and the test rows of a set; of the digits every fifth test row."""
    rows = read_images(DATA / SETS[name][0], name="train")
    if name != "mnist":
        return rows, read_images(DATA / SETS[name][0], name="test")
    test = read_images(DATA / "mnist" / "t10k-images-idx3-ubyte.gz")
    return rows, test.take(range(0, len(test), 5))


def scratch(name: str) -> Any:
    """Return a model with random weights for the images of a set."""
    return pretrain.build("vit", "tiny", **SETS[name][1], **SHAPE)


def models(name: str, out: Path, objectives: list[str]) -> dict[str, Any]:
    """Return a model with random weights, and the directories of those that saw the images without labels."""
    return {"scratch": scratch(name)} | {o: pretrained(o, name, out) for o in objectives}


def classes(seeds: int, out: Path) -> None:
    """Train a classifier of the digits 0 to 4 on all their rows, and fine-tune it on ten of each of 5 to 9."""
    rows, test = (
        {low: table.take([i for i, y in enumerate(table.columns["label"]) if (int(y) < 5) == low])
         for low in (True, False)}
        for table in read("mnist")
    )  # fmt: skip
    directory = out / "digits-0-4"
    if not (directory / "model").exists():
        pretrain.finetune(
            scratch("mnist"),
            rows[True],
            task="image-classification",
            valid=0.1,
            out=directory,
            lr=RATES[0][0],
            limit="600 steps",
            eval_every="25%",
            threads=1,
        )
    arms = {"scratch": scratch("mnist"), "ImageClassification": directory}
    figures = Figures(out / "classes.jsonl")
    compare("classes", arms, rows[False], test[False], 50, 500, seeds, figures, out)


def characters(draws: int, out: Path, objectives: list[str]) -> None:
    """Tell two characters of other alphabets apart from four drawings of each, with models that saw digits alone."""
    with np.load(DATA / "omniglot_small1" / "omniglot_small1.npz") as file:
        images, labels = file["images"] * np.uint8(255), file["labels"]
    rows = {"image": list(images), "label": labels.tolist()}
    for arm, model in models("mnist", out, objectives).items():
        options: dict[str, Any] = {"shots": 4, "ways": 2, "draws": draws, "test": 0.5}
        found = pretrain.probe(model, rows, method="means", pooling="mean", **options)
        print(arm, {key: round(value, 4) for key, value in found.items()}, flush=True)
    [(vectors, kept)] = pixel_vectors(read_images(rows))
    print("pixels", nearest_means(np.stack(vectors), np.array(rows["label"])[kept], draws))


def drawings(draws: int, out: Path, objectives: list[str]) -> None:
    """Tell ten characters apart after ten drawings of each; models have seen those of other characters, unlabelled."""
    with np.load(DATA / "omniglot_small1" / "omniglot_small1.npz") as file:
        images, labels = file["images"] * np.uint8(255), file["labels"]
    known, others = np.split(np.random.default_rng(0).permutation(np.unique(labels)), [86])
    source = out / "drawings.npz"
    np.savez(source, images=images[np.isin(labels, known)])
    SETS["drawings"] = (str(source.resolve()), SETS["drawings"][1])
    figures = Figures(out / "drawings.jsonl")

    def rows(draw: int) -> list[Table]:
        """Ten drawings of each of ten characters, three others by which a checkpoint is chosen, and seven to test."""
        rng = np.random.default_rng(draw)
        chosen = rng.choice(others, 10, replace=False)
        own = np.array([rng.permutation(np.flatnonzero(labels == label)) for label in chosen])
        parts = [part.flatten() for part in np.split(own, [10, 13], axis=1)]
        return [
            read_images({"image": list(images[part]), "label": [f"c{k}" for k in labels[part]]})
            for part in parts
        ]

    parts = [rows(draw) for draw in range(draws)]
    for arm, model in models("drawings", out, objectives).items():
        tune_and_test("drawings", arm, model, rows(1000), parts, figures, out)
    for draw in range(draws):
        columns = ImageClassification.baseline_columns(*parts[draw])
        figures(
            {"what": "pixels", "set": "drawings", "arm": "pixels", "seed": draw},
            lambda c=columns: {"accuracy": vector_baseline("pixels", *c)["score_test"]},
        )
    summary("drawings", figures)


def nearest_means(vectors: Any, labels: Any, draws: int) -> float:
    """Accuracy of the nearest class mean of pixels, two classes and four shots, over all other rows of the classes."""
    rng, right = np.random.default_rng(0), []
    for _ in range(draws):
        pair = rng.choice(np.unique(labels), 2, replace=False)
        own = [rng.permutation(np.flatnonzero(labels == label)) for label in pair]
        means = np.stack([vectors[rows[:4]].mean(0) for rows in own])
        for label, rows in enumerate(own):
            apart = ((vectors[rows[4:], None] - means) ** 2).sum(-1)
            right += (apart.argmin(1) == label).tolist()
    return float(np.mean(right))


def reading(out: Path) -> None:
    """Seconds of the processor for 1,000 photos of 640 x 480 pixels: to open them, and to make values of 224 x 224."""
    folder = DATA / "bccd_blood_cells" / "images"
    # As of all images after the first gigabyte, which are decoded whenever they are used.
    image_rows._KEPT = 0
    sources = {"files": folder}
    for name, size in (("prepared", None), ("prepared, 224 x 224", 224)):
        began, place = time.process_time(), out / f"photos-{size}"
        shutil.rmtree(place, ignore_errors=True)
        sources[name] = pretrain.prepare(folder, place, size=size, quiet=True).path
        megabytes = (place / "all.pixels.bin").stat().st_size / 1e6
        print(name, f"{time.process_time() - began:.1f} s once, {megabytes:.0f} MB")
    for name, source in sources.items():
        began = time.process_time()
        rows = labelled_images(str(source), valid=0.01, labels=False, size=224)
        images = [row["image"] for row in rows.train]
        figures = {"open": time.process_time() - began}
        for what, changes in (("as they are", Augmentation()), ("crops", Augmentation(0.3, True))):
            for turn in range(2):  # the first verifies the checksums
                began = time.process_time()
                for start in range(0, len(images), 16):
                    batch = images[start : start + 16]
                    rngs = row_rngs(0, "collate", start, len(batch))
                    changes.seen(batch, rows.processor, rngs, evaluation=what != "crops")
                figures[what if turn else f"{what}, first time"] = time.process_time() - began
        each = {key: f"{value / len(images) * 1000:.2f}" for key, value in figures.items()}
        print(name, each, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = ("labels", "transfer", "characters", "signs", "drawings", "classes", "reading")
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seeds", type=int, default=5)
    known = ("MaskedImage", "LeJEPA")
    parser.add_argument("--objectives", nargs="+", choices=known, default=list(known))
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--epochs", type=float, default=0.0, help="0 is the default length")
    parser.add_argument("--out", type=Path, default=Path("runs/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "transfer":
        transfer("mnist", args.seeds, args.out, args.objectives)
    elif args.what == "signs":
        transfer("signs", args.seeds, args.out, args.objectives)
    elif args.what == "drawings":
        drawings(2 * args.seeds, args.out, args.objectives)
    elif args.what == "classes":
        classes(args.seeds, args.out)
    elif args.what == "reading":
        reading(args.out)
    elif args.what == "characters":
        characters(args.draws, args.out, args.objectives)
    else:
        figures = Figures(args.out / "labels.jsonl")
        options = {"epochs": args.epochs} if args.epochs else {}
        for count in args.counts:
            for seed in range(args.seeds):
                key = {"labels": count, "seed": seed, **options}
                figures(key, lambda c=count, s=seed: measured(c, s, args.out, **options))


if __name__ == "__main__":
    main()
