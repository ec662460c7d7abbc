"""Masks, boxes and few labels of medical images: what pre-training on the images without labels adds.

    python docs/dense.py cells                 # boxes of blood cells: average precision, from random weights
    python docs/dense.py nuclei                # masks of nuclei: masked pre-training against random weights
    python docs/dense.py few                   # 20 labels a class: pneumonia, and single blood cells

Data are looked for in PRETRAIN_TEST_DATA (bccd_blood_cells, nuclei_dsb2018, pneumoniamnist). One CPU thread. Each line
goes to ``--out``/dense.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import pretrain
from pretrain.data.images import ImageProcessor
from pretrain.metrics import mean_interval, roc_auc, sensitivity

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
GREY = {"image_mean": [0.5], "image_std": [0.5]}


def cells(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Boxes of blood cells: 205 images, of which a tenth chooses the checkpoint; tested once on the other 87."""
    rows = _boxes()
    model = pretrain.build(
        "resnet", embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1],
        layer_type="basic", image_size=192, seed=args.seed,
    )  # fmt: skip
    model.processor = ImageProcessor(size={"height": 144, "width": 192})
    began = time.monotonic()
    result = pretrain.finetune(
        model,
        [row for row in rows if row["split"] == "train"],
        task="object-detection",
        test=[row for row in rows if row["split"] == "val"],
        flip=True, limit=f"{args.steps or 700} steps", lr=4e-3, batch_rows=8, threads=1,
        eval_every="100 steps", seed=args.seed, out=args.out / f"cells-{args.seed}",
    )  # fmt: skip
    result.report()
    seconds = round(time.monotonic() - began)
    yield {"seconds": seconds, **(result.test_metrics or {}), "regions": result.classical}


def _boxes() -> list[dict[str, str]]:
    """The rows of the table, one for each box."""
    folder = DATA.resolve() / "bccd_blood_cells"
    with open(folder / "boxes.csv", encoding="utf-8") as file:
        return [
            {**row, "image": str(folder / "images" / row["image"])} for row in csv.DictReader(file)
        ]


def nuclei(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Masks of nuclei: 20 labelled images of 140; all 140 are seen by the masked pre-training."""
    file = np.load(DATA / "nuclei_dsb2018" / "nuclei_256.npz")
    images, masks = file["images"], (file["instance_masks"] > 0).astype(np.uint8)
    parts = {"train": slice(0, 140), "val": slice(140, 160), "test": slice(160, 200)}
    arrays = {f"{part}_images": images[place] for part, place in parts.items()}
    np.savez(args.out / "unlabelled.npz", **arrays)  # type: ignore[arg-type]
    arrays |= {f"{part}_masks": masks[place] for part, place in parts.items()}
    np.savez(args.out / "nuclei.npz", class_names=["background", "nucleus"], **arrays)  # type: ignore[arg-type]
    began = time.monotonic()
    run = masked(args, args.out / "unlabelled.npz", 256, 16, steps=400, rows=16)
    seconds = time.monotonic() - began
    result = pretrain.finetune(
        run, args.out / "nuclei.npz", task="segmentation", test=args.out / "nuclei.npz",
        compare="scratch", seeds=args.seeds, label_counts=[20], lrs=args.lrs, flip=True,
        limit=f"{args.steps or 150} steps", batch_rows=8, threads=1, out=args.out / "nuclei",
    )  # fmt: skip
    result.report()
    found = result.comparison
    assert found is not None
    yield {
        "labels": 20,
        "arms": {name: scores[20] for name, scores in found.arms.items()},
        "gain": found.gain(20)._asdict(),
        "all 140": result.test_metrics,
        "guess": result.trivial_test,
        "seconds of pre-training": round(seconds),
        "seconds": round(time.monotonic() - began),
    }


def few(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """20 labels a class, 10 of them to choose the checkpoint; the area under the curve on all test images."""
    chest = np.load(DATA / "pneumoniamnist" / "pneumoniamnist.npz")
    parts = [(chest[f"{part}_images"], chest[f"{part}_labels"]) for part in ("train", "test")]
    yield from _few(args, "pneumonia", *parts)
    yield from _few(args, "blood cells", *_crops())


def _crops() -> list[tuple[Any, Any]]:
    """Single cells, 28 x 28 in grey, of the training and of the other images."""
    from PIL import Image

    found: dict[str, tuple[list[Any], list[int]]] = {"train": ([], []), "val": ([], [])}
    names = ["Platelets", "RBC", "WBC"]
    for row in _boxes():
        box = tuple(int(row[side]) for side in ("xmin", "ymin", "xmax", "ymax"))
        if box[2] > box[0] and box[3] > box[1]:
            image = Image.open(row["image"]).convert("L")
            found[row["split"]][0].append(np.asarray(image.resize((28, 28), 2, box)))
            found[row["split"]][1].append(names.index(row["label"]))
    return [(np.stack(images), np.asarray(labels)) for images, labels in found.values()]


def _few(
    args: argparse.Namespace, name: str, train: tuple[Any, Any], test: tuple[Any, Any]
) -> Iterator[dict[str, Any]]:
    place = args.out / f"{name.replace(' ', '-')}.npz"
    np.savez(place, images=train[0])
    run = masked(args, place, 28, 4, steps=400, rows=32)
    sizes = {"hidden_size": 96, "num_layers": 3, "num_heads": 3, "image_size": 28, "patch_size": 4}
    scratch = pretrain.build("vit", num_channels=1, **sizes)
    classes = sorted(set(train[1].tolist()))
    scores: dict[str, list[float]] = {"pretrained": [], "scratch": [], "pixels": []}
    found_at: dict[str, list[float]] = {"pretrained": [], "scratch": []}
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        rows = [rng.permutation(np.flatnonzero(train[1] == k))[:20] for k in classes]
        columns = [
            {"image": list(train[0][i]), "label": [str(k) for k in train[1][i]]}
            for i in (
                np.concatenate([r[half] for r in rows]) for half in (slice(10), slice(10, 20))
            )
        ]
        true = np.asarray(test[1])[:, None] == np.asarray(classes)
        scores["pixels"].append(_macro(roc_auc, true, _linear(columns, test[0])))
        for arm, model in (("pretrained", run), ("scratch", scratch)):
            result = pretrain.finetune(
                model, columns[0], task="image-classification", valid=columns[1], seed=seed,
                limit=f"{args.steps or 100} steps", lr=1e-3, batch_rows=32, threads=1, quiet=True,
                eval_every="20 steps", out=args.out / f"{name}-{arm}-{seed}".replace(" ", "-"),
            )  # fmt: skip
            answers = result.predict(test[0], top_k=None)
            chances = np.asarray([
                [dict(zip(a["label"], a["score"], strict=True))[str(k)] for k in classes] for a in answers
            ])  # fmt: skip
            scores[arm].append(_macro(roc_auc, true, chances))
            found_at[arm].append(_macro(sensitivity, true, chances))
    gains = np.subtract(scores["pretrained"], scores["scratch"])
    yield {
        "data": name,
        "labels a class": 20,
        **{f"auc {arm}": mean_interval(values) for arm, values in scores.items() if values},
        **{f"sensitivity {arm}": mean_interval(values) for arm, values in found_at.items()},
        "gain": mean_interval(gains),
    }


def _linear(columns: list[dict[str, Any]], images: Any) -> Any:
    """Chances of the classes by logistic regression on the pixels, from both halves of the labelled rows."""
    from sklearn.linear_model import LogisticRegression

    pixels = np.stack([x for half in columns for x in half["image"]]).reshape(-1, 28 * 28) / 255
    labels = [y for half in columns for y in half["label"]]
    model = LogisticRegression(C=0.1, max_iter=1000).fit(pixels, labels)
    return model.predict_proba(images.reshape(-1, 28 * 28) / 255)


def _macro(figure: Any, true: Any, chances: Any) -> float:
    """Mean over the classes, each against the others; of two classes that of the second."""
    places = [1] if true.shape[1] == 2 else range(true.shape[1])
    return float(np.mean([figure(true[:, k], chances[:, k]) for k in places]))


def masked(
    args: argparse.Namespace, source: Path, side: int, patch: int, *, steps: int, rows: int
) -> str:
    """Pre-train by masked patches; return the directory of the run."""
    out = args.out / f"mae-{source.stem}"
    pretrain.train(
        data={
            "source": "images",
            "source_args": {"train": str(source), "channels": 1, "labels": False, "size": side},
        },
        model={
            "family": "vit_mae",
            "overrides": {
                "hidden_size": 96, "num_layers": 3, "num_heads": 3, "patch_size": patch,
                "decoder_hidden_size": 64, "decoder_num_layers": 1, "decoder_num_heads": 2,
                "intermediate_size": 384, "decoder_intermediate_size": 256,
            },
        },
        objective={"class_path": "MaskedImage"},
        optim={"lr": 1e-3},
        parallel={"threads": 1},
        train={
            "out": str(out), "limit": f"{steps} steps", "batch_rows": rows, "eval_every": "100 steps",
        },
    )  # fmt: skip
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["cells", "nuclei", "few"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0 is the default length")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--out", type=Path, default=Path("runs/dense"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for found in {"cells": cells, "nuclei": nuclei, "few": few}[args.what](args):
        line = json.dumps({"what": args.what, **found})
        print(line, flush=True)
        with open(args.out / "dense.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
