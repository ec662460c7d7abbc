"""Memory as it is printed against memory as it is used: twelve runs of training, fine-tuning and prediction on the CPU.

Each runs in a process of its own; what it printed ("memory about ...") is compared with the largest resident set that
the operating system counted. ``python tests/benchmarks/memory.py [ROW ...]``; ``growth`` steps 2,000 times over rows of
changing shape and prints the resident set on the way.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS = [f"w{i}" for i in range(500)]
ROWS: dict[str, dict[str, Any]] = {
    "train gpt2 128": {"kind": "train", "family": "gpt2", "width": 128, "length": 256},
    "train llama 256": {"kind": "train", "family": "llama", "width": 256, "length": 128},
    "train bert 128": {"kind": "train", "family": "bert", "width": 128, "length": 128},
    "train modernbert 64": {"kind": "train", "family": "modernbert", "width": 64, "length": 512},
    "classification bert 128": {"kind": "classification", "family": "bert", "width": 128},
    "classification modernbert 256, LoRA": {
        "kind": "classification", "family": "modernbert", "width": 256, "lora": 8,
    },
    "token-classification bert 256": {"kind": "token-classification", "family": "bert", "width": 256},
    "regression roberta 64": {"kind": "regression", "family": "roberta", "width": 64},
    "chat llama 128": {"kind": "chat", "family": "llama", "width": 128},
    "chat qwen3 64": {"kind": "chat", "family": "qwen3", "width": 64},
    "predict bert 128": {"kind": "predict", "family": "bert", "width": 128},
    "predict modernbert 256": {"kind": "predict", "family": "modernbert", "width": 256},
}  # fmt: skip


def text(draw: random.Random, longest: int) -> str:
    """Words, of lengths that differ by powers of two."""
    return " ".join(draw.choice(WORDS) for _ in range(int(longest ** draw.uniform(0.2, 1.0))))


def rows_of(kind: str, count: int, longest: int = 300) -> list[dict[str, Any]]:
    """Rows of a task, of unequal length."""
    draw, rows = random.Random(0), []
    for i in range(count):
        words = f"row {i} {text(draw, longest)}"
        if kind == "token-classification":
            tokens = words.split()
            rows.append(
                {"tokens": tokens, "tags": ["B-X" if w[-1] == "1" else "O" for w in tokens]}
            )
        elif kind == "chat":
            answer = {"role": "assistant", "content": text(draw, longest // 4)}
            rows.append({"messages": [{"role": "user", "content": words}, answer]})
        elif kind == "regression":
            rows.append({"text": words, "label": draw.random()})
        else:
            rows.append({"text": words, "label": draw.choice("ab")})
    return rows


def checkpoint(folder: Path, family: str, width: int, kind: str) -> str:
    """A model with random weights and a tokenizer that knows the words."""
    from pretrain.data.tokenizer import train_from_texts
    from pretrain.models import build

    causal = family in ("llama", "qwen3", "gpt2")
    tokenizer = train_from_texts(
        [" ".join(WORDS)] * 10, "bpe" if causal else "wordpiece", vocab_size=1500
    )
    if kind == "chat":
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        )
    model = build(
        family, None, hidden_size=width, num_layers=4, num_heads=4, vocab_size=len(tokenizer), max_positions=1024,
        tokenizer=tokenizer, head="causal-lm" if causal else "masked-lm",
    )  # fmt: skip
    return str(model.save(folder / "model"))


def run(row: dict[str, Any], folder: Path, steps: int) -> None:
    """One row, in this process."""
    import pretrain

    kind, out = row["kind"], folder / "run"
    if kind == "train":
        draw = random.Random(0)
        (folder / "text.txt").write_text("\n\n".join(text(draw, 300) for _ in range(3000)))
        pretrain.train(
            {
                "data": {"train": str(folder / "text.txt"), "vocab_size": 2048, "row_length": row["length"]},
                "model": {"family": row["family"], "overrides": {
                    "hidden_size": row["width"], "num_layers": 4, "num_heads": 4}},
                "objective": {"class_path": "MaskedLM" if "bert" in row["family"] else "NextToken"},
                "train": {"out": str(out), "limit": f"{steps} steps"},
                "parallel": {"device": "cpu"},
            }
        )  # fmt: skip
        return
    base = checkpoint(folder, row["family"], row["width"], kind)
    task = "classification" if kind == "predict" else kind
    data = rows_of(task, 1200)
    tuned = pretrain.finetune(
        base, data, task, limit=f"{2 if kind == 'predict' else steps} steps", out=out, device="cpu",
        lora=row.get("lora", 0), quiet=kind == "predict",
    )  # fmt: skip
    if kind == "predict":
        lines = "".join(json.dumps({"text": r["text"]}) + "\n" for r in rows_of(task, 3000))
        (folder / "new.jsonl").write_text(lines)
        tuned.model.save(folder / "saved")


def resident() -> int:
    """Resident set of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(steps: int = 2000) -> None:
    """Print the resident set over steps on rows of changing shape."""
    import pretrain
    from pretrain.training.trainer import Trainer

    step, count = Trainer._step, 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result, count = step(self, *args, **kwargs), count + 1
        if count in (1, 50) or count % 200 == 0:
            print(f"step {count}: {resident() / 2**20:.0f} MiB", flush=True)
        return result

    Trainer._step = counted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = checkpoint(folder, "modernbert", 64, "token-classification")
        pretrain.finetune(
            base, rows_of("token-classification", 2000), "token-classification", limit=f"{steps} steps",
            batch_rows=4, eval_every=f"{steps} steps", out=folder / "run", device="cpu", quiet=True,
        )  # fmt: skip


def measured(command: list[str]) -> tuple[float, float]:
    """GiB that a command printed and GiB that it used."""
    with tempfile.TemporaryFile("w+") as lines:
        child = subprocess.Popen(command, stdout=lines, stderr=lines)
        _, status, usage = os.wait4(child.pid, 0)
        lines.seek(0)
        printed = lines.read()
    said = re.search(r"memory about ([\d.]+) GiB", printed)
    if status or said is None:
        raise SystemExit(f"{command} failed or printed no memory:\n{printed[-3000:]}")
    return float(said[1]), usage.ru_maxrss / 2**20


def main() -> None:
    if sys.argv[1:] == ["growth"]:
        growth()
        return
    if sys.argv[1:2] == ["--child"]:
        run(json.loads(sys.argv[2]), Path(sys.argv[3]), 30)
        return
    names = sys.argv[1:] or list(ROWS)
    print("| run | printed, GiB | used, GiB | printed / used |\n|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as made:
            command = [sys.executable, __file__, "--child", json.dumps(ROWS[name]), made]
            if ROWS[name]["kind"] == "predict":
                subprocess.run(command, check=True, capture_output=True)
                command = [
                    sys.executable, "-m", "pretrain", "predict", f"{made}/saved", f"{made}/new.jsonl",
                    "--device", "cpu",
                ]  # fmt: skip
            said, used = measured(command)
        print(f"| {name} | {said:.2f} | {used:.2f} | {said / used:.2f} |", flush=True)


if __name__ == "__main__":
    main()
