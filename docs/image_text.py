"""CLIP from random weights on emoji and their names: unseen combinations of seen words, and unseen names.

    python docs/image_text.py --split compositional
    python docs/image_text.py --split compositional --shuffled 0.3
    python docs/image_text.py --split names
    python docs/image_text.py --split names --validation

Data are looked for in PRETRAIN_TEST_DATA: emoji_noto, 1,650 pictures, without those with skin tones. ``compositional``
paints five of them over the yellow of people, and holds out 200 combinations of a picture and a tone, at most two of a
picture. ``names`` holds out every tenth picture; the training pictures have their keywords as a second caption. With
``--validation`` the held-out pairs are left out, and others are held out, by which settings are chosen. One CPU thread;
each line goes to ``--out``/image_text.jsonl.
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
# How training images are changed, unless options say it.
IMAGES = {
    "compositional": {"crop": 0.7, "randaugment": 0},
    "names": {"crop": 0.6, "randaugment": 8},
}


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
    """Return the pairs with those of people in five tones, of which 200 are for testing, and 200 for validation."""
    kinds: dict[str, list[int]] = {}
    for row in rows:
        kind = _WHO.sub("*", row["caption"])
        # The name of a person may be that without a word for one: "farmer" beside "man farmer".
        kinds.setdefault(kind if "*" in kind else f"* {kind}", []).append(row["index"])
    people = sorted(i for kind in kinds.values() if len(kind) == 3 for i in kind)
    people = [i for i in people if is_yellow(pictures[i]).mean() > 0.02]
    rng = np.random.default_rng(seed)
    held = {(i, tone) for i in people for tone in rng.permutation(list(TONES))[:2]}
    order = [sorted(held)[k] for k in rng.permutation(len(held))[: 2 * HELD_OUT]]
    parts = {pair: "test" if k < HELD_OUT else "valid" for k, pair in enumerate(order)}
    pairs = [
        {"caption": r["caption"], "pixels": pictures[r["index"]], "part": "train"} for r in rows
    ]
    for i in people:
        for tone in TONES:
            pixels, name = painted(pictures[i], tone), f"{rows[i]['caption']}, {tone} skin tone"
            part = parts.get((i, tone), "train")
            pairs.append({"caption": name, "pixels": pixels, "part": part})
    return pairs


def pairs_of(split: str, seed: int) -> list[dict[str, Any]]:
    """Return all pairs of a split: ``caption`` (or several), ``pixels``, and ``part``: train, valid or test."""
    lines = (DATA / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pictures = np.load(DATA / "images_64.npz")["images"]
    if split == "compositional":
        return combinations(rows, pictures, seed)
    parts = ["test" if row["split"] == "test" else "train" for row in rows]
    seen = [k for k, part in enumerate(parts) if part == "train"]
    for k in seen[::9]:
        parts[k] = "valid"
    return [
        {"caption": row["caption"], "keywords": ", ".join(row["keywords"])}
        | {"pixels": pictures[row["index"]], "part": part}
        for row, part in zip(rows, parts, strict=True)
    ]


def write_pairs(folder: Path, args: argparse.Namespace) -> None:
    """Write the pictures as files, with a metadata.jsonl for the training and one for the held-out pairs."""
    pairs, held = pairs_of(args.split, args.seed), "valid" if args.validation else "test"
    train = [p for p in pairs if p["part"] == "train" or (p["part"], held) == ("valid", "test")]
    for pair in train:
        if "keywords" in pair:
            pair["caption"] = [pair["caption"], pair["keywords"]]
    order = np.random.default_rng(args.seed).permutation(len(train))
    wrong = order[: round(args.shuffled * len(train))]
    names = [train[j]["caption"] for j in np.roll(wrong, 1)]
    for i, name in zip(wrong, names, strict=True):
        train[i]["caption"] = name
    for part, chosen in (("train", train), ("val", [p for p in pairs if p["part"] == held])):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with open(folder / part / "metadata.jsonl", "w", encoding="utf-8") as file:
            for i, pair in enumerate(chosen):
                Image.fromarray(pair["pixels"]).save(folder / part / f"{i}.png")
                line = {"file_name": f"{i}.png", "caption": pair["caption"]}
                file.write(json.dumps(line) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the retrieval figures of the held-out pairs."""
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    out = args.out / "-".join(str(value) for value in settings.values())
    write_pairs(out / "pairs", args)
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
                "dropout": args.dropout,
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
        optim={
            "name": args.optimizer,
            "lr": args.lr,
            "weight_decay": args.weight_decay,
            "betas": [0.9, 0.98],
            "warmup": 0.05,
            "ema": args.ema,
        },
        train={
            "out": str(out / "run"),
            "limit": f"{args.steps} steps",
            "batch_rows": 128,
            "eval_every": f"{args.eval_every} steps",
            "save_every": "0 steps",
            "seed": args.seed,
        },
        parallel={"device": "cpu", "threads": 1},
    )
    seconds = time.process_time() - began
    found = pretrain.evaluate(run.path)
    return settings | found | {"cpu_seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=["compositional", "names"], default="compositional")
    parser.add_argument("--shuffled", type=float, default=0.0, help="share of shuffled captions")
    parser.add_argument("--validation", action="store_true", help="measure on validation pairs")
    parser.add_argument("--crop", type=float, help="0.7, or 0.6 for names")
    parser.add_argument("--randaugment", type=int, help="0, or 8 for names")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    rates = {"label_smoothing": 0.0, "dropout": 0.0, "lr": 1e-3, "weight_decay": 0.2, "ema": 0.0}
    for name, value in rates.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    for name, number in {"steps": 400, "patch": 8, "seed": 0, "eval_every": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--out", type=Path, default=Path("runs/image-text"))
    args = parser.parse_args()
    for name, usual in IMAGES[args.split].items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    line = json.dumps(measured(args))
    print(line, flush=True)
    with open(args.out / "image_text.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
