"""A directory like a reader's, in which the tests run what the documentation shows: small data, small models."""

from __future__ import annotations

import itertools
import json
import shutil
import wave
from pathlib import Path

import numpy as np
from PIL import Image

import pretrain
from inference import chatty
from pretrain.data.audio import AudioProcessor

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "reference").glob("*.md")),
]
TINY = """
model: {family: gpt2, size: tiny}
train: {out: runs/books-gpt, limit: 3 steps, batch_rows: 2, eval_rows: 2}
"""


def fill(folder: Path) -> None:
    """Write some books, labelled rows, conversations, photos, recordings and a recipe."""
    (folder / "books").mkdir()
    for number in range(12):
        words = " ".join(
            f"Chapter {number}: the ship {i} sailed at dawn and came home." for i in range(30)
        )
        (folder / "books" / f"{number}.txt").write_text(words)
    (folder / "other.txt").write_text("The boat came home at night. " * 50)
    (folder / "tiny.yaml").write_text(TINY)
    reviews = [f"a {w} film {n},{k}" for k, w in enumerate(("dull", "warm")) for n in range(30)]
    (folder / "reviews.csv").write_text("review,stars\n" + "\n".join(reviews) + "\n")
    asked = [{"role": "user", "content": "What sails?"}, {"role": "assistant", "content": "A ship"}]
    chats = [
        json.dumps({"messages": [*asked, {**asked[0], "content": str(n)}, asked[1]]})
        for n in range(20)
    ]
    (folder / "chats.jsonl").write_text("\n".join(chats) + "\n")
    colours = np.random.default_rng(0).integers(0, 256, (24, 9, 9, 3), dtype=np.uint8)
    for k, colour in enumerate(colours):
        file = folder / "photos" / ("cat", "dog")[k % 2] / f"{k // 2}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour).save(file)
        file.with_suffix(".txt").write_text(f"the {file.parent.name} number {k // 2}")
        recording = folder / "words" / ("yes", "no")[k % 2] / f"{k // 2}.wav"
        recording.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(recording), "wb") as out:
            out.setparams((1, 2, 8000, 0, "NONE", ""))
            out.writeframes(colour.tobytes() * 20)
    boxes = ["image,label,xmin,ymin,xmax,ymax"]
    for k in range(1, 11):
        mask = np.zeros((32, 32), np.uint8)
        mask[k : k + 12, 4:16] = 1
        for kind, array in (("images", mask * np.uint8(200)), ("masks", mask)):
            file = folder / "cells" / kind / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
        boxes.append(f"cells/images/{k}.png,cell,4,{k},16,{k + 12}")
    (folder / "boxes.csv").write_text("\n".join(boxes))
    (folder / "new.csv").write_text("review\na warm film\na dull book\n")
    (folder / "notes.csv").write_text("body\na ship at sea\na dull film\n")
    (folder / "notes.txt").write_text("a ship at sea\na dull film\n")
    (folder / "run.yaml").write_text(
        TINY.replace("books-gpt", "own").replace("batch_rows: 2", "batch_rows: 32")
        + "data: {train: data/books}\n"
    )
    np.savez(folder / "characters.npz", images=colours, labels=np.arange(24) % 3)
    write_judged(folder)
    pairs = [
        f"photos/{kind}/{k}.png,{kind} number {k}" for kind in ("cat", "dog") for k in range(12)
    ]
    for name in ("pairs.csv", "other-pairs.csv"):
        (folder / name).write_text("\n".join(["image,caption", *pairs]))
    for name in ("new-photos", "other-photos", "labelled-photos"):
        shutil.copytree(folder / "photos", folder / name)
    shutil.copytree(folder / "words", folder / "recordings")
    shutil.copytree(ROOT / "configs", folder / "configs")


def write_judged(folder: Path) -> None:
    """Write what embeddings and language models are judged by: scored pairs, a small BEIR, minimal pairs."""
    texts = ["a ship at sea", "a boat at sea", "a dull film", "a warm book"]
    (folder / "stsb").mkdir()
    pairs = [f"{a}\t{b}\t{i}" for i, (a, b) in enumerate(itertools.combinations(texts, 2))]
    (folder / "stsb" / "dev.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *pairs]))
    beir = folder / "beir" / "scifact"
    (beir / "qrels").mkdir(parents=True)
    lines = "\n".join(json.dumps({"_id": str(i), "text": text}) for i, text in enumerate(texts))
    for name in ("queries", "corpus"):
        (beir / f"{name}.jsonl").write_text(lines)
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t1\t1\n2\t3\t1\n")
    pair = {"good": texts[0], "bad": "sea at ship a", "group": "order"}
    (folder / "blimp.jsonl").write_text(json.dumps(pair))


def add_model(folder: Path, path: str) -> None:
    """Save a small model with random weights at ``path``, as one that the reader has from elsewhere."""
    family = {
        "runs/books-gpt": "gpt2",
        "runs/books-bert": "bert",
        "runs/sentences": "bert",
        "runs/photos-mae": "vit_mae",
        "runs/support": "talker",
        "vit-base": "vit",
        "ast": "audio-spectrogram-transformer",
    }[path]
    if family == "talker":
        model = chatty.talker()
    elif family in ("gpt2", "bert"):
        kind = {"gpt2": "bpe", "bert": "wordpiece"}[family]
        tokenizer = pretrain.train_tokenizer(str(folder / "books"), kind, vocab_size=300)
        model = pretrain.build(family, "tiny", tokenizer=tokenizer)
    elif family == "audio-spectrogram-transformer":
        sizes = {"num_mel_bins": 32, "max_length": 96}
        model = pretrain.build(family, "tiny", patch_size=8, **sizes)
        model.processor = AudioProcessor(**sizes)
    else:
        model = pretrain.build(family, "tiny", image_size=8, patch_size=4)
    model.save(folder / path)
