"""Fine-tuning on meshes; started by `test_tuning.py`, in one process or by torchrun in several.

    tuning.py OUT.json FOLDER

FOLDER holds the checkpoints to start from, ``gpt2`` and ``bert``. Rank 0 writes what was seen as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pretrain
from pretrain.errors import ConfigError
from pretrain.parallel.world import current_world

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DDP 2": (2, {"strategy": "ddp"}),
    "FSDP2 2": (2, {"strategy": "fsdp"}),
    "TP 2": (2, {"tp": 2}),
}
WORDS = ("cat", "dog", "fox")
ROWS = [
    {"text": f"the {a} {b} sat on the {c} and looked", "label": b, "score": float(WORDS.index(b))}
    for a in ("red", "old", "big", "sly")
    for b in WORDS
    for c in ("mat", "log", "box")
]
PAIRS = [
    {"anchor": f"the {a} {b} sat", "positive": f"and looked at the {a} {b}"}
    for a in ("red", "old", "big", "sly")
    for b in WORDS
]
CASES: dict[str, dict[str, Any]] = {
    "classification": {"model": "bert", "data": ROWS, "task": "classification"},
    "lora": {"model": "gpt2", "data": ROWS, "task": "classification", "lora": 4},
    "dora": {"model": "bert", "data": ROWS, "task": "classification", "lora": 2, "dora": True},
    "regression": {"model": "bert", "data": ROWS, "task": "regression", "label": "score"},
    "language": {"model": "gpt2", "data": ROWS, "task": "language-modelling"},
}
COMMON: dict[str, Any] = {
    "valid": ROWS[::3],
    "limit": "8 steps",
    "batch_rows": 12,
    "precision": "fp32",
    "lr": 3e-3,
    "seed": 0,
    "quiet": True,
}


def tune(folder: Path, mesh: str, name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    case = dict(CASES[name])
    source = folder / str(case.pop("model"))
    if case["task"] == "language-modelling":
        case["micro_rows"] = 1
    result = pretrain.finetune(
        str(source),
        out=folder / "runs" / f"{mesh}-{name}".replace(" ", "_"),
        parallel={"device": "cpu", "threads": 1, **parallel},
        **(COMMON | case),
    )
    return {
        "losses": [r["loss"] for r in result.run.history if "grad_norm" in r],
        "metrics": result.metrics,
        "checkpoint": str(result.run.checkpoint),
    }


def main() -> None:
    out, folder, world = Path(sys.argv[1]), Path(sys.argv[2]), current_world()
    found: dict[str, Any] = {}
    for mesh, (size, parallel) in MESHES.items():
        if size != world.size:
            continue
        for name in CASES:
            found[f"{mesh}|{name}"] = tune(folder, mesh, name, parallel)
        try:
            result = pretrain.finetune(
                str(folder / "bert"),
                PAIRS,
                "embedding",
                out=folder / "runs" / f"{mesh}-pairs".replace(" ", "_"),
                parallel={"device": "cpu", "threads": 1, **parallel},
                **(COMMON | {"valid": PAIRS[::2]}),
            )
            found[f"{mesh}|pairs"] = [r["loss"] for r in result.run.history if "grad_norm" in r]
        except ConfigError as error:
            found[f"{mesh}|pairs"] = str(error)
    if world.leads:
        out.write_text(json.dumps(found), encoding="utf-8")
    world.leave()


main()
