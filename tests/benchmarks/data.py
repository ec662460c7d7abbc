"""Row 7: text to rows of token ids beside datasets.map with tokenizers, and the loader beside one contiguous copy.

Every contender of the first case is a fresh process on one thread; `prepare` also removes duplicates, splits, counts
and hashes what it writes. Text is that of PRETRAIN_TEST_DATA if that has books, or else made of words by Zipf's law.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .harness import Case, Contender, Settings, Work, child, timed
from .prepare_process import ROWS

Made = tuple[Callable[[], float], Work]


def write_text(path: Path, megabytes: float) -> str:
    """Write documents, one on each line; return what they are."""
    folder = Path(os.environ.get("PRETRAIN_TEST_DATA", "/nowhere"))
    files = sorted((folder / "books").glob("*.jsonl.gz")) + sorted(
        (folder / "python_peps").glob("*.jsonl.gz")
    )
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    for part in json.loads(line).get("text", "").split("\n\n"):
                        if written < megabytes * 1e6 and part.strip():
                            written += out.write(" ".join(part.split()) + "\n")
        if written >= megabytes * 1e6:
            return "books"
        rng = np.random.default_rng(0)
        syllables = [
            "ka",
            "to",
            "mi",
            "ren",
            "sal",
            "vor",
            "en",
            "ist",
            "ul",
            "pe",
            "dra",
            "qua",
            "lon",
            "the",
            "ing",
        ]
        shapes = rng.integers(0, len(syllables), size=(200_000, 5))
        words = np.array(
            ["".join(syllables[s] for s in row[: 1 + k % 5]) for k, row in enumerate(shapes)],
            dtype=object,
        )
        while written < megabytes * 1e6:
            chosen = words[np.minimum(rng.zipf(1.2, size=20_000) - 1, len(words) - 1)]
            chosen[::13] += "."
            written += out.write(
                "\n".join(" ".join(chosen[k : k + 40]) for k in range(0, len(chosen), 40)) + "\n"
            )
    return "made-up words"


def digest(texts: list[str], folder: Path, *, library: bool) -> str:
    """Hash of the ids that the bulk encoder of `prepare`, or the library, makes of all documents."""
    import tokenizers

    from pretrain.data.encoding import FastEncoder

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    if library:
        ids = [
            index for e in backend.encode_batch(texts, add_special_tokens=False) for index in e.ids
        ]
    else:
        ids = FastEncoder(backend).encode(texts)[0].tolist()
    return hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest()[:16]


def prepare(settings: Settings) -> list[Callable[[], Case]]:
    """Row 7: CPU seconds of preparing, and of reading batches."""
    return [functools.partial(preparing, settings), functools.partial(loading, settings)]


def preparing(settings: Settings) -> Case:
    from pretrain.data.tokenizer import train_tokenizer

    megabytes = 0.2 if settings.tiny else 50 if settings.long else 15
    room = tempfile.TemporaryDirectory()
    folder = Path(room.name)
    kind = write_text(folder / "text.txt", megabytes)
    texts = (folder / "text.txt").read_text(encoding="utf-8").splitlines()
    (folder / "small.txt").write_text(
        "\n".join(texts[: 200 if settings.tiny else 20_000]), encoding="utf-8"
    )
    train_tokenizer(folder / "small.txt", vocab_size=400 if settings.tiny else 8192).save(
        folder / "tokenizer"
    )
    part = texts[:2000]

    def make(name: str, *more: str, library: bool) -> Made:
        ids = digest(part, folder / "tokenizer", library=library)

        def run() -> float:
            with tempfile.TemporaryDirectory(dir=room.name) as out:
                return child(
                    [
                        name,
                        str(folder / "text.txt"),
                        str(folder / "tokenizer"),
                        f"{out}/made",
                        *more,
                    ]
                )[2]

        return run, Work(0, others={"ids of 2,000 documents": ids})

    default, best = (
        functools.partial(make, "prepare_process:theirs", how, library=True)
        for how in ("default", "best")
    )
    return Case(
        f"{megabytes:g} MB of {kind} to rows of {ROWS}, one thread, process from start to end", "CPU seconds",
        [
            Contender("pretrain.prepare", "ours", functools.partial(make, "prepare_process:ours", library=False)),
            Contender("datasets.map + tokenizers", "default", default, "datasets"),
            Contender("datasets.map + encode_batch_fast, 10,000 rows a call", "best", best, "datasets"),
        ],
        {"default": 5.0, "best": 5.0}, rounds=(2, 3), extra=lambda: (room.cleanup(), {})[1],
    )  # fmt: skip


def loading(settings: Settings) -> Case:
    """32 rows of 1,024 tokens: what a step asks of the prepared rows, beside one contiguous copy of as many."""
    import pretrain

    room = tempfile.TemporaryDirectory()
    folder = Path(room.name)
    write_text(folder / "text.txt", 0.3 if settings.tiny else 4)
    length, count = (64, 4) if settings.tiny else (1024, 32)
    prepared = pretrain.prepare(
        folder / "text.txt", folder / "rows", vocab_size=400, row_length=length, workers=1, separator="\n", quiet=True,
        cache_dir=folder / "cache",
    )  # fmt: skip
    rows = prepared.train
    order = np.random.default_rng(0).permutation(len(rows))[:count].tolist()
    flat = np.random.default_rng(0).integers(0, 400, (count + 1) * length).astype(np.uint16)
    np.save(folder / "flat.npy", flat)
    mapped = np.load(folder / "flat.npy", mmap_mode="r")

    def get_batch() -> Any:
        starts = np.random.default_rng(0).integers(0, length, count)
        return np.stack(
            [
                mapped[i * length + s : (i + 1) * length + s].astype(np.int64)
                for i, s in enumerate(starts)
            ]
        )

    def ours_once() -> Any:
        return rows.gather(order)["input_ids"]  # as the loader asks for the rows of a step

    ours, window = (
        lambda w=w: (timed(w, settings), Work(count * length)) for w in (ours_once, get_batch)
    )
    return Case(
        f"batch of {count} rows of {length} out of prepared rows", f"{settings.unit} a batch",
        [
            Contender("pretrain, ids, documents and positions", "ours", ours),
            Contender("a window of a memory map for each row", "default", window),
        ],
        {}, extra=lambda: (room.cleanup(), {})[1],
    )  # fmt: skip
