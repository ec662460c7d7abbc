"""Fine-tuning on meshes; started by `test_tuning.py`, in one process or by torchrun in several.

    tuning.py OUT.json FOLDER [CASE ...]

FOLDER holds the checkpoints to start from, ``gpt2``, ``bert`` and ``talk``. Rank 0 writes what was seen as JSON. In
four processes it runs the tasks that compare the rows of a batch, and no others. Without a CASE it runs all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import pretrain
from pretrain.distributed.world import current_world
from pretrain.errors import PretrainError
from pretrain.objectives.embedding import Embedding
from pretrain.training import parallelize as spread

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DDP 2": (2, {"strategy": "ddp"}),
    "FSDP2 2": (2, {"strategy": "fsdp"}),
    "TP 2": (2, {"tp": 2}),
    "FSDP2 x TP 4": (4, {"strategy": "fsdp", "tp": 2}),
    "2 copies x TP 4": (4, {"strategy": "ddp", "tp": 2}),
}
WORDS = ("cat", "dog", "fox")
ROWS = [
    {"text": f"the {a} {b} sat on the {c} and looked", "label": b, "score": float(WORDS.index(b))}
    for a in ("red", "old", "big", "sly")
    for b in WORDS
    for c in ("mat", "log", "box")
]
# Some texts recur in rows that lie on different processes: they must not count as negatives of each other.
PAIRS = [
    {
        "anchor": f"the {a} {b} sat",
        "positive": f"and looked at the {a if b == 'dog' else 'red'} {b}",
        "negative": f"the {a} box is red",
    }
    for a in ("red", "old", "big", "sly")
    for b in WORDS
]
SCORED = [
    {"sentence1": row["anchor"], "sentence2": row["positive"], "score": i % 4}
    for i, row in enumerate(PAIRS)
]
TAGGED = [
    {
        "tokens": row["text"].split(),
        "label": ["B-ANIMAL" if word in WORDS else "O" for word in row["text"].split()],
    }
    for row in ROWS
]
QUESTIONS = [
    {
        "question": "who sat?",
        "context": row["text"],
        "answers": {"text": [row["label"]], "answer_start": [row["text"].index(row["label"])]},
    }
    for row in ROWS
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"who is {row['anchor'][4:-4]}?"},
            {"role": "assistant", "content": f"it is {row['anchor']}"},
        ]
    }
    for row in PAIRS
]
PREFERRED = [
    {"prompt": f"who is {row['anchor']}?", "chosen": f"a {row['positive']}", "rejected": "no"}
    for row in PAIRS
]
CASES: dict[str, dict[str, Any]] = {
    # First of all: there is no group of processes yet when its first trial starts.
    "sweep": {
        "model": "gpt2",
        "data": ROWS,
        "task": "classification",
        "lora": 2,
        "lr": "sweep",
        "lrs": [1e-3, 3e-2],
        "limit": "4 steps",
    },
    "classification": {"model": "bert", "data": ROWS, "task": "classification"},
    "lora": {"model": "gpt2", "data": ROWS, "task": "classification", "lora": 4},
    "dora": {"model": "bert", "data": ROWS, "task": "classification", "lora": 2, "dora": True},
    "lora in bf16": {
        "model": "gpt2",
        "data": ROWS,
        "task": "classification",
        "lora": 4,
        "precision": "bf16",
    },
    "dora in bf16": {
        "model": "bert",
        "data": ROWS,
        "task": "classification",
        "lora": 2,
        "dora": True,
        "precision": "bf16",
    },
    "regression": {"model": "bert", "data": ROWS, "task": "regression", "label": "score"},
    "language": {"model": "gpt2", "data": ROWS, "task": "language-modelling"},
    "tokens": {
        "model": "bert",
        "data": TAGGED,
        "task": "token-classification",
        "valid": TAGGED[::3],
    },
    "questions": {
        "model": "bert",
        "data": QUESTIONS,
        "task": "question-answering",
        "valid": QUESTIONS[::3],
    },
    "chat": {"model": "talk", "data": CHATS, "task": "chat", "valid": CHATS[::3], "lora": 2},
    "preference": {
        "model": "talk",
        "data": PREFERRED,
        "task": "preference",
        "valid": PREFERRED[::3],
    },
}
# Tasks that compare the rows of a batch with each other.
COUPLED: dict[str, dict[str, Any]] = {
    "pairs": {"model": "bert", "data": PAIRS, "task": "embedding", "valid": PAIRS[::2]},
    "both ways": {
        "model": "gpt2",
        "data": PAIRS,
        "task": "embedding",
        "valid": PAIRS[::2],
        "symmetric": True,
        "lora": 4,
    },
    "scored": {
        "model": "bert",
        "data": SCORED,
        "task": "embedding",
        "valid": SCORED[::3],
        "symmetric": True,
    },
}
COMMON: dict[str, Any] = {
    "valid": ROWS[::3],
    "limit": "8 steps",
    "eval_every": "4 steps",
    "batch_rows": 12,
    "precision": "fp32",
    "lr": 3e-3,
    "seed": 0,
    "quiet": True,
}


class Forgetful(Embedding):
    """It compares rows, and does not ask the other processes for theirs."""

    def whole_batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        return rows, 0


def tune(
    folder: Path, mesh: str, name: str, parallel: dict[str, Any], **more: Any
) -> dict[str, Any]:
    case = dict((CASES | COUPLED)["lora" if name == "resumed" else name])
    source = folder / str(case.pop("model"))
    if case["task"] == "language-modelling":
        case["micro_rows"] = 1
    out = folder / "runs" / f"{mesh}-{name}".replace(" ", "_")
    result = pretrain.finetune(
        str(source),
        out=out,
        parallel={"device": "cpu", "threads": 1, **parallel},
        **(COMMON | case | more),
    )
    found = {
        "losses": [r["loss"] for r in result.run.history if "grad_norm" in r],
        "metrics": result.metrics,
        "checkpoint": str(result.run.checkpoint),
    }
    if case.get("lr") == "sweep":
        found["rate"] = json.loads((out / "sweep.json").read_text("utf-8"))["lr"]
    return found


def on_unequal_hosts(folder: Path) -> dict[str, Any]:
    """The second process has too little for a copy of the model, and the first has plenty."""
    real, world = spread.device_memory, current_world()
    spread.device_memory = lambda *_: [float(1 << 36), float(1 << 18)][world.rank]
    try:
        return tune(folder, "unequal hosts", "classification", {"timeout": 20})
    finally:
        spread.device_memory = real


def refused(folder: Path, mesh: str, parallel: dict[str, Any]) -> str:
    try:
        pretrain.finetune(
            str(folder / "bert"),
            PAIRS,
            "__main__.Forgetful",
            out=folder / "runs" / f"{mesh}-forgetful".replace(" ", "_"),
            parallel={"device": "cpu", "threads": 1, **parallel},
            **(COMMON | {"valid": PAIRS[::2]}),
        )
    except PretrainError as error:
        return str(error)
    return ""


def main() -> None:
    out, folder, world = Path(sys.argv[1]), Path(sys.argv[2]), current_world()
    chosen = sys.argv[3:] or [*CASES, *COUPLED]
    found: dict[str, Any] = {}
    for mesh, (size, parallel) in MESHES.items():
        if size != world.size or (mesh == "2 copies x TP 4" and sys.argv[3:]):
            continue  # the second mesh of four processes is for those who run all cases
        for name in chosen if size < 4 else [name for name in chosen if name in COUPLED]:
            found[f"{mesh}|{name}"] = tune(folder, mesh, name, parallel)
        if size < 4:
            tune(folder, mesh, "resumed", parallel, limit="4 steps")
            found[f"{mesh}|resumed"] = tune(folder, mesh, "resumed", parallel)
        if mesh == "DDP 2":
            found["unequal hosts"] = on_unequal_hosts(folder)
            found["forgetful"] = refused(folder, mesh, parallel)
    if world.is_rank_zero:
        out.write_text(json.dumps(found), encoding="utf-8")
    world.destroy_process_group()


if __name__ == "__main__":
    main()
