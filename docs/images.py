"""Digits with few labels: a vision transformer from random weights beside pixels under logistic regression.

    python docs/images.py --counts 100 1000

Data are looked for in PRETRAIN_TEST_DATA: training rows from mnist/train_5k.npz, drawn by class, and all 10,000 test
images. One CPU thread. Each line goes to ``--out``/images.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pretrain
from pretrain.data.images.rows import read_images
from pretrain.finetuning.baseline import pixel_baseline
from pretrain.finetuning.compare import stratified_subset
from pretrain.finetuning.remarks import baseline_columns

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data")) / "mnist"


def measured(count: int, seed: int, out: Path, **options: Any) -> dict[str, Any]:
    """Accuracy on the test images of both, after learning from ``count`` images, chosen on 500 others."""
    rows = read_images(DATA / "train_5k.npz")
    labels = rows.columns["label"]
    chosen = stratified_subset(labels, count + 500, seed)
    held = stratified_subset([labels[i] for i in chosen], 500, seed)
    valid = rows.take([chosen[k] for k in held])
    train = rows.take([i for k, i in enumerate(chosen) if k not in set(held)])
    test = read_images(DATA / "t10k-images-idx3-ubyte.gz")
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
    pixels = pixel_baseline(*baseline_columns(train, valid, test))
    return {
        "labels": count,
        "seed": seed,
        "vit": result.test_metrics["accuracy"],
        "pixels": pixels["score_test"],
        "guess": result.trivial_test["accuracy"],
        "steps": result.run.step,
        "seconds": round(seconds),
        **options,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=0.0, help="0 is the default length")
    parser.add_argument("--out", type=Path, default=Path("runs/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for count in args.counts:
        for seed in range(args.seeds):
            options = {"epochs": args.epochs} if args.epochs else {}
            line = json.dumps(measured(count, seed, args.out, **options))
            print(line, flush=True)
            with open(args.out / "images.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
