"""Captions and questions of synthetic scenes: how often are they right for colours and shapes never seen together?

    python docs/captions.py [--steps 800] [--scenes 8000] [--seed 0]

A decoder with an image prefix learns from random weights; the test rows are read once.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import pretrain
from pretrain.data.images.scenes import make_scenes, rows_of
from pretrain.data.tokenizer import train_from_texts

SIZES = {
    "num_layers": 2, "hidden_size": 64, "num_heads": 4, "image_size": 24, "patch_size": 12,
    "max_positions": 32, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def main() -> None:
    """Train, and print the share of exact texts on scenes with seen and with unseen pairs."""
    parser = argparse.ArgumentParser()
    for name, value in (("steps", 800), ("scenes", 8000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    train = rows_of(make_scenes(options.scenes, options.seed), options.seed)
    valid = rows_of(make_scenes(200, options.seed + 1000), options.seed)
    texts = [f"{row['question']} {row['text']}" for row in train[:1000]]
    tokenizer = train_from_texts(texts, "wordpiece", vocab_size=120)
    model = pretrain.build("git", seed=options.seed, tokenizer=tokenizer, **SIZES)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain.finetune(
            model, train, valid=valid, task="captioning", limit=f"{options.steps} steps",
            batch_rows=64, lr=2e-3, seed=options.seed, device="cpu", out=f"{folder}/run",
            eval_every=f"{options.steps // 5} steps",
        )  # fmt: skip
        print(
            f"{time.process_time() - began:.0f} CPU seconds, {model.num_parameters():,} parameters"
        )
        for what, unseen in (("seen pairs", False), ("unseen pairs", True)):
            scenes = make_scenes(300, options.seed + 2000, unseen=unseen)
            for kind in ("captions", "questions"):
                rows = rows_of(scenes, options.seed, questions=kind == "questions")
                rows = [r for r in rows if (r["question"] == "describe") == (kind == "captions")]
                asked = [{"image": row["image"], "question": row["question"]} for row in rows]
                answers = [found["answer"] for found in run.predict(asked)]
                right = sum(a == row["text"] for a, row in zip(answers, rows, strict=True))
                print(f"{what}, {kind}: {right} of {len(rows)} exact ({right / len(rows):.1%})")


if __name__ == "__main__":
    main()
