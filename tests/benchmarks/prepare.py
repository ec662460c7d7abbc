"""Speed and memory of `prepare` on a generated text file, beside the usual datasets.map + tokenizers.

    python tests/benchmarks/prepare.py --megabytes 100

Both get the same trained tokenizer and write packed rows of token ids; `prepare` also removes duplicates, splits,
counts and hashes what it writes. Every contender runs in a fresh process; memory is the sum over its processes,
sampled twenty times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROWS = 512


def generate(path: Path, megabytes: int, *, lines: bool) -> None:
    """Write text of made-up words whose frequencies follow Zipf's law, in sentences and paragraphs."""
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
    written = 0
    with path.open("w", encoding="utf-8") as out:
        while written < megabytes * 1_000_000:
            ranks = np.minimum(rng.zipf(1.2, size=200_000) - 1, len(words) - 1)
            chosen = words[ranks]
            chosen[::13] += "."
            text = "\n".join(" ".join(chosen[k : k + 40]) for k in range(0, len(chosen), 40)) + "\n"
            written += out.write(text if lines else text.replace("\n", "\n\n"))


def run_ours(source: Path, tokenizer: Path, out: Path, workers: int, separator: str | None) -> int:
    """Prepare; return the tokens written."""
    import pretrain

    prepared = pretrain.prepare(
        source, out, tokenizer=tokenizer, row_length=ROWS, workers=workers, separator=separator, quiet=True,
        cache_dir=out.parent / "cache",
    )  # fmt: skip
    return prepared.train.num_tokens + prepared.valid.num_tokens


def run_datasets(source: Path, tokenizer: Path, out: Path, workers: int) -> int:
    """Do what tutorials do: load lines, map the tokenizer, concatenate and cut; return the tokens written."""
    os.environ["HF_HOME"] = str(out.parent / "hf")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [e.ids for e in backend.encode_batch(batch["text"])]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = [index for ids in batch["input_ids"] for index in ids]
        return {"input_ids": [flat[k : k + ROWS] for k in range(0, len(flat), ROWS)]}

    data = datasets.load_dataset(
        "text", data_files=str(source), split="train", cache_dir=str(out.parent / "hf")
    )
    data = data.map(encode, batched=True, remove_columns=["text"], num_proc=workers)
    data = data.map(group, batched=True, num_proc=workers)
    return sum(len(row) for row in data["input_ids"])


def resident(pid: int) -> int:
    """Return the resident bytes of a process and all its children (Linux)."""
    total = 0
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        try:
            total += int(Path(f"/proc/{current}/statm").read_text().split()[1]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
            for task in Path(f"/proc/{current}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue
    return total


def measure(arguments: list[str]) -> dict[str, float]:
    """Run one contender in a process of its own; return seconds, CPU seconds, tokens and peak bytes."""
    started = time.perf_counter()
    before = os.times()
    child = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True
    )
    peak = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, resident(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = child.communicate()
    stop.set()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{arguments} failed with exit code {child.returncode}")
    after = os.times()
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    tokens = json.loads(output.splitlines()[-1])
    return {"seconds": time.perf_counter() - started, "cpu": cpu, "tokens": tokens, "peak": peak}


def main() -> None:
    """Generate, train a tokenizer, run the contenders, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--no-peer", action="store_true", help="leave datasets.map out")
    parser.add_argument(
        "--lines", action="store_true", help="one document on each line instead of one in all"
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, source, tokenizer, out = options.one
        places = (Path(source), Path(tokenizer), Path(out), options.workers)
        separator = "\n" if options.lines else None
        print(
            json.dumps(
                run_datasets(*places) if name == "datasets" else run_ours(*places, separator)
            )
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, small = folder / "text.txt", folder / "small.txt"
        generate(source, options.megabytes, lines=options.lines)
        generate(small, 8, lines=options.lines)
        from pretrain.data.tokenizer import train_tokenizer

        train_tokenizer(small, vocab_size=8192).save(folder / "tokenizer")
        size = source.stat().st_size
        print(f"{size / 1e6:,.0f} MB, rows of {ROWS}, {options.workers} workers")
        print(
            "| path | seconds | MB/s | tokens/s | tokens per CPU-second | peak MB |\n|---|---|---|---|---|---|"
        )
        extra = ["--workers", str(options.workers), *(["--lines"] if options.lines else [])]
        for name in ["prepare"] if options.no_peer else ["prepare", "datasets"]:
            arguments = [
                "--one",
                name,
                str(source),
                str(folder / "tokenizer"),
                str(folder / name),
                *extra,
            ]
            r = measure(arguments)
            print(
                f"| {name} | {r['seconds']:.1f} | {size / 1e6 / r['seconds']:.1f} | {r['tokens'] / r['seconds']:,.0f} "
                f"| {r['tokens'] / r['cpu']:,.0f} | {r['peak'] / 1e6:,.0f} |"
            )


if __name__ == "__main__":
    main()
