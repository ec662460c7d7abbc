"""Captions and questions of synthetic scenes: how often are they right for colours and shapes never seen together?

    python docs/captions.py [--colours 12] [--shapes 8] [--steps 2800] [--scenes 16000] [--seed 0] [--shift 0]

A decoder with an image prefix learns from random weights. Scenes with a shape and a colour that never stood together in
training, and others, are read once. With ``--shift`` from 1 to 3 other pairs are held out, by which the settings were
chosen; 6 colours and 4 shapes make the smaller world of the page.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter

import pretrain
from pretrain.data.images.scenes import COLOURS, SHAPES, held_out, make_scenes, rows_of
from pretrain.data.tokenizer import train_from_texts

# Narrow blocks need larger initial weights than the 0.02 of wide ones.
SIZES = {
    "num_layers": 2, "hidden_size": 64, "num_heads": 4, "image_size": 24, "patch_size": 6,
    "max_positions": 32, "dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.1,
}  # fmt: skip
OPTIM = {"name": "muon", "lr": 2e-3, "muon_lr": 0.02, "betas": [0.9, 0.98], "weight_decay": 0.1}
PARTS = ("first colour", "first shape", "side", "second colour", "second shape")


def parts_of(caption: str) -> list[str]:
    """Return the words of a caption that say something, in the order of ``PARTS``."""
    words = [word for word in caption.split() if word not in ("a", "of")]
    return [*words, *[""] * len(PARTS)][: len(PARTS)]


def main() -> None:
    """Train, and print the share of exact texts on scenes with seen and with unseen pairs."""
    parser = argparse.ArgumentParser()
    numbers = {"colours": len(COLOURS), "shapes": len(SHAPES), "shift": 0}
    for name, value in {**numbers, "steps": 2800, "scenes": 16000, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    apart, seed = held_out(options.shift), options.seed
    world = {"colours": options.colours, "shapes": options.shapes, "apart": apart}
    train = rows_of(make_scenes(options.scenes, seed, **world), seed, questions=2)
    valid = rows_of(make_scenes(200, seed + 1000, **world), seed)
    texts = [f"{row['question']} {row['text']}" for row in train[:3000]]
    tokenizer = train_from_texts(texts, "wordpiece", vocab_size=220)
    model = pretrain.build("git", seed=seed, tokenizer=tokenizer, **SIZES)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain.finetune(
            model, train, valid=valid, task="captioning", word_dropout=0.4,
            limit=f"{options.steps} steps", batch_rows=64, optim=OPTIM, seed=seed, device="cpu",
            out=f"{folder}/run", eval_every=f"{options.steps // 5} steps",
        )  # fmt: skip
        print(
            f"{time.process_time() - began:.0f} CPU seconds, {model.num_parameters():,} parameters"
        )
        # The test scenes have another seed than those by which the settings were chosen.
        test_seed = seed + (3000 if options.shift else 2000)
        for what, unseen in (("seen pairs", False), ("unseen pairs", True)):
            scenes = make_scenes(300, test_seed, unseen=unseen, **world)
            for kind in ("captions", "questions"):
                rows = rows_of(scenes, seed)
                rows = [r for r in rows if (r["question"] == "describe") == (kind == "captions")]
                asked = [{"image": row["image"], "question": row["question"]} for row in rows]
                answers = [found["answer"] for found in run.predict(asked)]
                right = sum(a == row["text"] for a, row in zip(answers, rows, strict=True))
                print(f"{what}, {kind}: {right} of {len(rows)} exact ({right / len(rows):.1%})")
                if kind == "captions":
                    wrong = Counter(
                        part
                        for answer, row in zip(answers, rows, strict=True)
                        for part, word, true in zip(
                            PARTS, parts_of(answer), parts_of(row["text"]), strict=True
                        )
                        if word != true
                    )
                    print("   wrong:", ", ".join(f"{p} {n}" for p, n in wrong.items()) or "none")


if __name__ == "__main__":
    main()
