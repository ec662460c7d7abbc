"""CLIP from random weights on emoji and their names: unseen combinations of seen words, and unseen names.

    python docs/image_text.py --split compositional
    python docs/image_text.py --split compositional --shuffled 0.3
    python docs/image_text.py --split names

Data are looked for in PRETRAIN_TEST_DATA: emoji_noto, 1,650 pictures. ``compositional`` holds out 200 names whose words
stand in other names: of every activity of a man, a woman and a person two, of two one, and of every hour the full or
the half one. ``names`` holds out every tenth picture. One CPU thread; each line goes to ``--out``/image_text.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pretrain

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data")) / "emoji_noto"
_WHO = re.compile(r"\b(man|woman|person|men|women|people)\b")
_HOUR = re.compile(r"(\w+)(?: o’clock|-thirty)")


def held_out(rows: list[dict[str, Any]], split: str, seed: int) -> set[int]:
    """Indices of the held-out pictures."""
    if split == "names":
        return {row["index"] for row in rows if row["split"] == "test"}
    groups: dict[str, list[int]] = {}
    for row in rows:
        name = row["caption"]
        hour = _HOUR.fullmatch(name)
        key = f"at {hour[1]}" if hour else _WHO.sub("*", name)
        # The name of a person is that without a word for one: "farmer" beside "man farmer".
        groups.setdefault(key if hour or "*" in key else f"* {name}", []).append(row["index"])
    rng, chosen = np.random.default_rng(seed), set()
    for group in groups.values():
        if len(group) > 1:
            chosen |= set(rng.permutation(group)[: len(group) - 1].tolist())
    return chosen


def write_pairs(folder: Path, split: str, shuffled: float, seed: int) -> None:
    """Write the pictures as files, with a metadata.jsonl for the training and one for the held-out pairs."""
    lines = (DATA / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pictures = np.load(DATA / "images_64.npz")["images"]
    held = held_out(rows, split, seed)
    train = [row for row in rows if row["index"] not in held]
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(train))[: round(shuffled * len(train))]
    names = {
        int(i): train[int(j)]["caption"] for i, j in zip(wrong, np.roll(wrong, 1), strict=True)
    }
    for part, chosen in (("train", train), ("val", [r for r in rows if r["index"] in held])):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with open(folder / part / "metadata.jsonl", "w", encoding="utf-8") as file:
            for i, row in enumerate(chosen):
                name = f"{row['index']}.png"
                Image.fromarray(pictures[row["index"]]).save(folder / part / name)
                caption = names.get(i, row["caption"]) if part == "train" else row["caption"]
                file.write(json.dumps({"file_name": name, "caption": caption}) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the retrieval figures of the held-out pairs."""
    out = args.out / f"{args.split}-{args.shuffled:g}-{args.seed}-{args.steps}{args.tag}"
    write_pairs(out / "pairs", args.split, args.shuffled, args.seed)
    began = time.process_time()
    run = pretrain.train(
        data={
            "source": "image_text",
            "source_args": {
                "train": str(out / "pairs"),
                "size": 32,
                "tokenizer": "wordpiece",
                "vocab_size": 2000,
                "lowercase": True,
            },
        },
        model={
            "family": "clip",
            "overrides": {
                "hidden_size": 128,
                "num_heads": 4,
                "num_layers": 1,
                "vision_num_layers": 3,
                "patch_size": args.patch,
            },
        },
        objective={
            "class_path": "Contrastive",
            "init_args": {
                "crop": args.crop,
                "randaugment": args.randaugment,
                "label_smoothing": args.label_smoothing,
            },
        },
        optim={"lr": args.lr, "weight_decay": args.decay, "betas": [0.9, 0.98], "warmup": 0.05},
        train={
            "out": str(out / "run"),
            "limit": f"{args.steps} steps",
            "batch_rows": 128,
            "eval_every": "0 steps",
            "save_every": "0 steps",
            "seed": args.seed,
        },
        parallel={"device": "cpu", "threads": 1},
    )
    seconds = time.process_time() - began
    found = pretrain.evaluate(run.path)
    kept = ("split", "shuffled", "seed", "steps", "crop", "randaugment", "label_smoothing", "patch")
    return {key: getattr(args, key) for key in kept} | found | {"cpu_seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=["compositional", "names"], default="compositional")
    parser.add_argument("--shuffled", type=float, default=0.0, help="share of shuffled captions")
    parser.add_argument("--label_smoothing", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--crop", type=float, default=0.6)
    parser.add_argument("--randaugment", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/image-text"))
    args = parser.parse_args()
    line = json.dumps(measured(args))
    print(line, flush=True)
    with open(args.out / "image_text.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
