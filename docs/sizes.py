"""Time and loss of the small model sizes on one CPU thread, for the table that ``--model.size ?`` prints.

    python docs/sizes.py gpt2:tiny gpt2:mini qwen3:tiny    # about two minutes of the processor for tiny
    python docs/sizes.py --time gpt2:base                  # the time alone, of a few steps; a loss stays as it is

Every size reads the same tokens of WikiText-2 (its test file, in PRETRAIN_TEST_DATA) in the same order, and writes its
figures into src/pretrain/training/sizes.json. The time is that of the processor, without start-up, evaluation and
checkpoints.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import pretrain

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
TABLE = Path(__file__).parents[1] / "src" / "pretrain" / "training" / "sizes.json"
ROWS, LENGTH, STEPS, RATE, WARM = 4, 512, 128, 2e-3, 8


def measure(family: str, size: str, folder: Path, *, loss: bool = True) -> dict[str, float]:
    """Train one size; return seconds per million tokens and, unless only a few steps are timed, the held-out loss."""
    steps, warm = (STEPS, WARM) if loss else (10, 2)
    clock: dict[int, float] = {}

    def tick(record: Any) -> None:
        clock[record["step"]] = time.process_time()

    encoder = family in ("bert", "roberta", "modernbert")
    run = pretrain.train(
        data={
            "train": str(DATA / "wikitext2" / "test.txt"),
            "valid": str(DATA / "wikitext2" / "valid.txt"),
            "row_length": LENGTH,
            "workers": 1,
            "tokenizer": "wordpiece" if encoder else "bpe",
        },
        model=f"{family}:{size}",
        objective="masked-lm" if encoder else "next-token",
        lr=RATE,
        batch_rows=ROWS,
        limit=steps,
        eval_every=0,
        save_every=0,
        eval_rows=64 if loss else 4,
        precision="fp32",
        device="cpu",
        threads=1,
        out=str(folder / f"{family}-{size}"),
        hooks=[tick],
    )
    if run.exit_code:  # a signal ended it
        sys.exit(run.exit_code)
    last = steps - 1  # with the last step come the evaluation and the checkpoint
    tokens = (last - warm) * ROWS * LENGTH
    found = {"seconds": round((clock[last] - clock[warm]) / tokens * 1e6, 1)}
    return found | ({"loss": round(run.metrics["loss"], 3)} if loss else {})


def processor() -> str:
    """Name of the CPU, as far as it is known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(names: list[str], *, loss: bool) -> None:
    """Measure the sizes named ``FAMILY:SIZE`` and write them beside those that were measured before."""
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"figures": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            family, _, size = name.partition(":")
            known = table["figures"].setdefault(family, {}).setdefault(size, {})
            known.update(measure(family, size, Path(folder), loss=loss))
            table["measured"] = (
                f"Time and loss were measured on one thread of {processor()} in fp32; the loss is held out, after "
                f"{STEPS * ROWS * LENGTH:,} tokens of WikiText-2 (masked for encoders)."
            )
            TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            print(name, table["figures"][family][size], flush=True)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--time"], loss="--time" not in sys.argv)
