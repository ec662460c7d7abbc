"""CLIP from random weights on emoji and their names: unseen combinations of seen words, and unseen names.

    python docs/image_text.py --split compositional
    python docs/image_text.py --split compositional --shuffled 0.3
    python docs/image_text.py --split names

Data are looked for in PRETRAIN_TEST_DATA: emoji_noto, 1,650 pictures, without those with skin tones. ``compositional``
paints five of them over the yellow of people, and holds out 200 combinations of a picture and a tone, at most two of a
picture. ``names`` holds out every tenth picture; the training pictures have their keywords as a second caption. One CPU
thread; each line goes to ``--out``/image_text.jsonl.
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
TONES = {
    "light": (250, 220, 188),
    "medium-light": (224, 187, 149),
    "medium": (191, 143, 104),
    "medium-dark": (155, 100, 61),
    "dark": (89, 69, 57),
}
HELD_OUT = 200
_WHO = re.compile(r"\b(man|woman|person)\b")
# How the names of training pictures and the changes of their images are set for each split.
IMAGES = {"compositional": {"crop": 0.7}, "names": {"crop": 0.6, "randaugment": 8}}


def is_yellow(pixels: np.ndarray) -> np.ndarray:
    """Mask of the pixels (H, W, 3) that have the colour of people without a skin tone."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(pixels).convert("HSV")), -1, 0)
    return (hue >= 22) & (hue <= 36) & (saturation >= 110) & (value >= 150)


def painted(pixels: np.ndarray, tone: str) -> np.ndarray:
    """Return the picture with its yellow in a skin tone, shaded as before."""
    mask, shade = is_yellow(pixels), pixels.max(-1, keepdims=True) / 252
    found = pixels.astype(np.float64)
    found[mask] = (shade * np.array(TONES[tone]))[mask]
    return found.clip(0, 255).astype(np.uint8)


def combinations(
    rows: list[dict[str, Any]], pictures: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """Return the pairs with those of people in five tones, of which 200 are held out."""
    kinds: dict[str, list[int]] = {}
    for row in rows:
        kind = _WHO.sub("*", row["caption"])
        # The name of a person may be that without a word for one: "farmer" beside "man farmer".
        kinds.setdefault(kind if "*" in kind else f"* {kind}", []).append(row["index"])
    people = sorted(i for kind in kinds.values() if len(kind) == 3 for i in kind)
    people = [i for i in people if is_yellow(pictures[i]).mean() > 0.02]
    rng = np.random.default_rng(seed)
    held = {(i, tone) for i in people for tone in rng.permutation(list(TONES))[:2]}
    held = {sorted(held)[k] for k in rng.permutation(len(held))[:HELD_OUT]}
    pairs = [{"caption": r["caption"], "pixels": pictures[r["index"]], "held": False} for r in rows]
    for i in people:
        for tone in TONES:
            pixels, name = painted(pictures[i], tone), f"{rows[i]['caption']}, {tone} skin tone"
            pairs.append({"caption": name, "pixels": pixels, "held": (i, tone) in held})
    return pairs


def pairs_of(split: str, seed: int) -> list[dict[str, Any]]:
    """Return all pairs of a split: ``caption`` (or several), ``pixels``, and whether they are ``held`` out."""
    lines = (DATA / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pictures = np.load(DATA / "images_64.npz")["images"]
    if split == "compositional":
        return combinations(rows, pictures, seed)
    return [
        {
            "caption": row["caption"]
            if row["split"] == "test"
            else [row["caption"], ", ".join(row["keywords"])],
            "pixels": pictures[row["index"]],
            "held": row["split"] == "test",
        }
        for row in rows
    ]


def write_pairs(folder: Path, split: str, shuffled: float, seed: int) -> None:
    """Write the pictures as files, with a metadata.jsonl for the training and one for the held-out pairs."""
    pairs = pairs_of(split, seed)
    train = [pair for pair in pairs if not pair["held"]]
    wrong = np.random.default_rng(seed).permutation(len(train))[: round(shuffled * len(train))]
    names = [train[j]["caption"] for j in np.roll(wrong, 1)]
    for i, name in zip(wrong, names, strict=True):
        train[i]["caption"] = name
    for part, chosen in (("train", train), ("val", [pair for pair in pairs if pair["held"]])):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with open(folder / part / "metadata.jsonl", "w", encoding="utf-8") as file:
            for i, pair in enumerate(chosen):
                Image.fromarray(pair["pixels"]).save(folder / part / f"{i}.png")
                line = {"file_name": f"{i}.png", "caption": pair["caption"]}
                file.write(json.dumps(line) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the retrieval figures of the held-out pairs."""
    out = args.out / f"{args.split}-{args.shuffled:g}-{args.seed}-{args.label_smoothing:g}"
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
            "init_args": {**IMAGES[args.split], "label_smoothing": args.label_smoothing},
        },
        optim={"lr": 1e-3, "weight_decay": 0.2, "betas": [0.9, 0.98], "warmup": 0.05},
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
    kept = ("split", "shuffled", "label_smoothing", "seed", "steps", "patch")
    return {key: getattr(args, key) for key in kept} | found | {"cpu_seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=["compositional", "names"], default="compositional")
    parser.add_argument("--shuffled", type=float, default=0.0, help="share of shuffled captions")
    parser.add_argument("--label_smoothing", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/image-text"))
    args = parser.parse_args()
    line = json.dumps(measured(args))
    print(line, flush=True)
    with open(args.out / "image_text.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
