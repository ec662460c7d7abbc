"""The smallest real things that training tests share: a tokenizer, packed rows, models and a trainer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.data.prepare import prepare
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.models import build
from pretrain.objectives import Objective, build_objective
from pretrain.training.trainer import Trainer

TEXTS = [
    f"the {a} {b} sat on the {c} and looked at the {a}"
    for a in ("red", "old", "big", "sly")
    for b in ("cat", "dog", "fox")
    for c in ("mat", "log", "box")
]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_from_texts(TEXTS, "wordpiece", vocab_size=90)


class Rows(list[dict[str, np.ndarray]]):
    """Rows of packed documents of uneven length, with padding at the end of some."""

    def __init__(self, count: int, length: int = 16, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        vocab = len(tokenizer())
        super().__init__()
        for _ in range(count):
            ids, documents = np.zeros(length, np.int64), np.zeros(length, np.int64)
            positions, at, document = np.zeros(length, np.int64), 0, 0
            while at < length - 2:
                size = int(rng.integers(2, length - at + 1))
                document += 1
                ids[at : at + size] = (rng.integers(5, vocab) + np.arange(size) * 3) % (
                    vocab - 5
                ) + 5
                documents[at : at + size] = document
                positions[at : at + size] = np.arange(size)
                at += size
            self.append({"input_ids": ids, "document_ids": documents, "position_ids": positions})
        self.num_tokens = int(sum((row["document_ids"] != 0).sum() for row in self))
        self.num_bytes = 4 * self.num_tokens


def prepared_rows(folder: Path, lines: Sequence[str], row_length: int) -> Any:
    """The training rows of prepared text, a document for each line, with the tokenizer above."""
    (folder / "text.txt").write_text("\n".join(lines))
    return prepare(
        folder / "text.txt",
        folder / "prepared",
        tokenizer=tokenizer(),
        separator="\n",
        row_length=row_length,
        valid=0,
        quiet=True,
    ).train


def objective(
    kind: str = "NextToken", *, dropout: float = 0.0, seed: int = 0, **options: Any
) -> Objective:
    family = {"NextToken": "gpt2", "MaskedLM": "bert"}[kind]
    model = build(
        family,
        None,
        seed=seed,
        tokenizer=tokenizer(),
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=32,
        max_positions=32,
        dropout=dropout,
        attention_dropout=0.0,
    )
    return build_objective(kind, options, model)


def trainer(
    out: Path,
    goal: Objective,
    rows: Any,
    *,
    eval_rows: Any = None,
    hooks: Any = (),
    optim: dict[str, Any] | None = None,
    **train: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "out": str(out),
        "limit": "12 steps",
        "batch_rows": 4,
        "eval_every": "0 steps",
        "save_every": "0 steps",
        "log_every": 1,
        "precision": "fp32",
    }
    return Trainer(
        goal,
        rows,
        optim=OptimConfig(**({"lr": 1e-2} | (optim or {}))),
        train=TrainConfig(**(settings | train)),
        parallel=ParallelConfig(device="cpu"),
        eval_data=eval_rows,
        hooks=hooks,
    )


def losses(path: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad_norm) of every training line of a run's log."""
    from pretrain.utils.run_log import read_log

    return [
        (r["step"], r["loss"], r["grad_norm"])
        for r in read_log(path / "log.jsonl")
        if "grad_norm" in r
    ]
