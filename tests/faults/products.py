"""Everything that the product writes, small: prepared data, runs, adapters, reports, answers, job scripts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pretrain
from pretrain import report
from pretrain.cli import main as cli
from pretrain.models import build

WORDS = ["sea", "ship", "wind", "salt", "rope", "sail", "deck", "mast", "gull", "tide"]
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
QUICK: dict[str, Any] = {
    "batch_rows": 8, "eval_every": "2 steps", "precision": "fp32", "device": "cpu", "valid": 0.25, "quiet": True,
}  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    """Lines of words, no two alike."""
    draw = random.Random(seed)
    return list(dict.fromkeys(" ".join(draw.choices(WORDS, k=9)) for _ in range(count)))


def rows(count: int = 40) -> list[dict[str, str]]:
    """Texts labelled with the word that they begin with, one of two."""
    draw = random.Random(1)
    return [
        {"text": f"{label} {' '.join(draw.choices(WORDS, k=6))}", "label": label}
        for label in ("red", "blue") * (count // 2)
    ]


def settings(work: Path, out: str = "pretrained", **train: Any) -> dict[str, Any]:
    """A run of pre-training over the prepared data of ``make``."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_heads"}
    return {
        "data": {"train": str(work / "data")},
        "model": {"family": "gpt2", "size": "tiny", "overrides": {**sizes, "num_heads": 2, "max_positions": 32}},
        "objective": {"class_path": "NextToken"},
        "train": {
            "out": str(work / out), "limit": "6 steps", "batch_rows": 4, "eval_every": "2 steps",
            "save_every": "2 steps", "log_every": 1, "precision": "fp32", **train,
        },
        "parallel": {"device": "cpu", "threads": 1},
    }  # fmt: skip


def prepare(work: Path, out: str = "data") -> Path:
    """Prepared data of a file of texts."""
    source = work / "text.txt"
    if not source.exists():
        source.write_text("\n".join(texts(400)) + "\n")
    options: dict[str, Any] = {"vocab_size": 300, "row_length": 32, "valid": 0.1, "workers": 1}
    pretrain.prepare(str(source), out=work / out, separator="\n", quiet=True, **options)
    return work / out


def make(work: Path) -> dict[str, Path]:
    """Name -> directory of each product; everything is written by the calls and commands of the documentation."""
    prepare(work)
    run = pretrain.train(settings(work))
    report.write(run.path)
    assert run.checkpoint is not None
    start = pretrain.load(run.checkpoint, quiet=True)
    start.save(work / "saved")
    chatty = build("gpt2", None, tokenizer=start.tokenizer, max_positions=32, **SIZES)
    assert chatty.tokenizer is not None
    chatty.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chatty.save(work / "chat")
    task = {"task": "classification", **QUICK}
    tuned = pretrain.finetune(
        str(run.path),
        rows(),
        out=work / "tuned",
        limit="6 steps",
        lr="sweep",
        lrs=[1e-3, 1e-2],
        **task,
    )
    tuned.report()
    tuned.save(work / "classifier")
    adapted = pretrain.finetune(
        str(run.path), rows(), out=work / "adapted", limit="4 steps", lora=2, lr=1e-2, **task
    )
    adapted.save(work / "adapter")
    table = work / "table.jsonl"
    table.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows(6)))
    for words in (
        ["predict", str(work / "tuned"), str(table), "--out", str(work / "answers.csv")],
        ["slurm", "--config", str(work / "pretrained" / "run.yaml"), "--nodes", "1", "--gpus_per_node", "0",
         "--out", str(work / "job.sbatch")],
    ):  # fmt: skip
        assert cli.main(words) == 0
    names = ("data", "pretrained", "saved", "chat", "tuned", "classifier", "adapted", "adapter")
    return {name: work / name for name in names}
