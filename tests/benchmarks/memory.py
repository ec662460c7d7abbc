"""Row 6, peak memory beside peers; and, by name, memory as it is printed and over thousands of steps.

On the CPU each contender runs in a process of its own; what counts is the highest resident set after the imports and
the data, above what was resident then. On a GPU it is the peak of what torch has allocated.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .harness import Case, Contender, Settings, Work, child

# row: (function, which of its cases, its contenders: name, kind, package)
MEASURED: dict[str, tuple[str, int, tuple[tuple[str, str, str], ...]]] = {
    "decoder": (
        "pretraining:decoder", 0,
        (
            ("pretrain", "ours", "torch"),
            ("transformers, sdpa", "best", "transformers"),
            ("60-line script", "best", "torch"),
        ),
    ),
    "masked": (
        "pretraining:masked", 1,
        (
            ("pretrain, packed", "ours", "torch"),
            ("transformers, padded to the batch", "default", "transformers"),
            ("transformers, batch_rebalance", "best", "transformers"),
        ),
    ),
    "finetune": (
        "finetuning:finetune", -2,
        (
            ("pretrain", "ours", "torch"),
            ("Trainer", "default", "transformers"),
            ("Trainer, batch_rebalance", "best", "transformers"),
        ),
    ),
    "lora": (
        "finetuning:lora", -1,
        (
            ("pretrain, LoRA", "ours", "torch"),
            ("peft + Trainer", "default", "peft"),
            ("peft + Trainer, batch_rebalance", "best", "peft"),
        ),
    ),
}  # fmt: skip


def resident() -> int:
    """Resident set of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    """Highest resident set of this process in bytes since `forget`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget() -> None:
    """Let `highest` begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(device: str, tiny: str, path: str, index: str, name: str) -> None:
    """One contender in this process; prints its peak and its work."""
    from .__main__ import load

    settings = Settings(torch.device(device), bool(int(tiny)))
    torch.set_num_threads(1)
    case: Case = load(path)(settings)[int(index)]()
    one = next(c for c in case.contenders if c.name == name)
    if one.needs != "torch":
        __import__(one.needs)
    if one.needs == "peft":
        __import__("transformers.trainer")
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget()
        before = resident()
    _, work = one.make()  # checks its work in some steps
    peak = torch.cuda.max_memory_allocated() if settings.device.type == "cuda" else highest()
    print("PEAK " + json.dumps({"bytes": peak - before, "tokens": work.tokens}))


def peak(settings: Settings) -> list[Callable[[], Case]]:
    """Row 6: one measurement of each contender, which repeats to a few per cent."""

    def make(path: str, index: int, name: str) -> tuple[Callable[[], float], Work]:
        def run() -> dict[str, Any]:
            told = (settings.device.type, str(int(settings.tiny)), path, str(index), name)
            printed = child(["memory:measured", *told])[0]
            return dict(json.loads(printed.rpartition("PEAK ")[2]))

        first = run()
        kept = [float(first["bytes"])]
        # What was measured while the work was checked is the first sample.
        return lambda: kept.pop() if kept else float(run()["bytes"]), Work(first["tokens"])

    def case(row: str) -> Case:
        path, index, members = MEASURED[row]
        contenders = [
            Contender(name, kind, functools.partial(make, path, index, name), needs)
            for name, kind, needs in members
        ]
        return Case(
            f"as row {row}", "bytes above what was resident before", contenders, {"best": 1 / 0.7, "default": 1 / 0.7},
            controlled=False, rounds=(1, 1),
        )  # fmt: skip

    return [functools.partial(case, row) for row in (["decoder"] if settings.tiny else MEASURED)]


# ---- by name: what is printed against what is used, and many steps ----

WORDS = [f"w{i}" for i in range(500)]
RUNS: dict[str, dict[str, Any]] = {
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


def train_one(name: str, made: str, steps: str = "30") -> None:
    """One run of ``RUNS``, in this process."""
    import pretrain

    row, folder = RUNS[name], Path(made)
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


def many_steps(steps: str) -> None:
    """Print the resident set over steps on rows of changing shape."""
    import pretrain
    from pretrain.training.trainer import Hook

    def told(record: Any) -> None:
        if record["step"] in (1, 50) or record["step"] % 200 == 0:
            print(f"STEP {record['step']} {resident()}", flush=True)

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = checkpoint(folder, "modernbert", 64, "token-classification")
        pretrain.finetune(
            base, rows_of("token-classification", 2000), "token-classification", limit=f"{steps} steps",
            batch_rows=4, eval_every=f"{steps} steps", out=folder / "run", device="cpu", quiet=True, hooks=[Hook(told)],
        )  # fmt: skip


def printed_and_used(command: list[str]) -> tuple[float, float]:
    """Bytes that a command printed and bytes that it used."""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile("w+") as lines:
        process = subprocess.Popen(
            command, stdout=lines, stderr=lines, env={**os.environ, "PYTHONPATH": paths}
        )
        _, status, usage = os.wait4(process.pid, 0)
        lines.seek(0)
        printed = lines.read()
    said = re.search(r"memory about ([\d.]+) GiB", printed)
    if status or said is None:
        raise RuntimeError(f"{command} failed or printed no memory: {printed[-3000:]}")
    return float(said[1]) * 2**30, usage.ru_maxrss * 1024.0


def estimates(settings: Settings) -> list[Callable[[], Case]]:
    """By name: what a run says that it needs (contender) over what it uses (ours)."""

    def case(name: str) -> Case:
        found: list[float] = []

        def used() -> tuple[Callable[[], float], Work]:
            steps = "3" if settings.tiny else "30"
            with tempfile.TemporaryDirectory() as made:
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks",
                    "child",
                    "memory:train_one",
                    name,
                    made,
                    steps,
                ]
                if RUNS[name]["kind"] == "predict":
                    child(["memory:train_one", name, made])
                    command = [
                        sys.executable, "-m", "pretrain", "predict", f"{made}/saved", f"{made}/new.jsonl", "--device",
                        "cpu",
                    ]  # fmt: skip
                found.extend(printed_and_used(command))
            return lambda: found[1], Work(0)

        return Case(
            name, "bytes",
            [
                Contender("used", "ours", used),
                Contender("printed before", "floor", lambda: (lambda: found[0], Work(0))),
            ],
            controlled=False, rounds=(1, 1),
        )  # fmt: skip

    return [functools.partial(case, name) for name in (list(RUNS)[:1] if settings.tiny else RUNS)]


def drift(settings: Settings) -> list[Callable[[], Case]]:
    """By name: the resident set after 200 steps (ours) and after 2,000 (variant)."""

    def case() -> Case:
        steps = 200 if settings.tiny else 2000
        printed = child(["memory:many_steps", str(steps)])[0]
        seen = [float(line.split()[2]) for line in printed.splitlines() if line.startswith("STEP ")]
        return Case(
            f"{steps} steps on rows of changing shape", "bytes",
            [
                Contender("after 200 steps", "ours", lambda: (lambda: seen[2], Work(0))),
                Contender("at the end", "variant", lambda: (lambda: seen[-1], Work(0))),
            ],
            controlled=False, rounds=(1, 1), extra=lambda: {"resident": seen},
        )  # fmt: skip

    return [case]
