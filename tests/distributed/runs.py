"""The same run on different meshes; started by the tests beside it, in one process or by torchrun in several.

    runs.py OUT.json FOLDER curves= extras=layers,full bits=3

``curves`` trains every case from the start, and leaves checkpoints of one of them in FOLDER for ``resume``, which goes
on from each of them. ``extras`` trains with other settings, ``bits`` so many random configurations reproducibly. Behind
the sign stand the names of some cases, or nothing for all. What was seen is written as JSON by rank 0.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.distributed.world import current_world
from pretrain.models import build
from pretrain.models.backbone import Backbone
from pretrain.objectives import build_objective
from pretrain.training.starting_model import open_source
from pretrain.training.trainer import Trainer
from tiny import Rows, tokenizer

FAMILIES = {"gpt2": "NextToken", "llama": "NextToken", "bert": "MaskedLM", "modernbert": "MaskedLM"}
# Mesh -> processes and settings.
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DDP 2": (2, {"strategy": "ddp"}),
    "FSDP2 2": (2, {"strategy": "fsdp"}),
    "TP 2": (2, {"tp": 2}),
    "FSDP2 x TP 4": (4, {"strategy": "fsdp", "tp": 2}),
}
BATCH, STEPS, CUT = 12, 10, 4
WORLD = current_world()
# The graphs that the default backend would be given, without waiting for its C++ compiler.
Backbone.compile_blocks = functools.partialmethod(  # type: ignore[method-assign, assignment]
    Backbone.compile_blocks, backend="aot_eager"
)


def train(
    out: Path,
    family: str,
    parallel: dict[str, Any],
    *,
    accumulate: int = 1,
    steps: int = STEPS,
    optim: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    source: Path | None = None,
    **overrides: Any,
) -> tuple[Trainer, dict[str, Any]]:
    """Losses, norms of gradients and rows of every step, and the held-out figures."""
    kind = FAMILIES[family]
    dp = max(1, WORLD.size // parallel.get("tp", 1))
    shape: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
    }
    shape |= {"max_positions": 32, "dropout": 0.0, "attention_dropout": 0.0}
    if source is not None:
        model = open_source(str(source))
    else:
        model = build(
            family,
            None,
            tokenizer=tokenizer(),
            device="meta",
            **(shape | overrides),
        )
    if WORLD.size == 1 and source is None:
        model.materialize(0)
    chosen = {
        "out": str(out),
        "limit": f"{steps} steps",
        "batch_rows": BATCH,
        "micro_rows": BATCH // dp // accumulate,
        "eval_every": "0 steps",
        "save_every": "0 steps",
        "log_every": 1,
        "precision": "fp32",
    }
    trainer = Trainer(
        build_objective(kind, {}, model),
        Rows(100),
        optim=OptimConfig(**({"lr": 3e-3, "schedule": "constant", "warmup": 2} | (optim or {}))),
        train=TrainConfig(**(chosen | (settings or {}))),
        parallel=ParallelConfig(device="cpu", threads=1, **parallel),
        eval_data=Rows(10, seed=5),
        quiet=True,
    )
    ledger: dict[int, list[int]] = {}
    trainer.hooks = []
    before = trainer._fetch

    def fetch(steps: Any) -> Any:
        state, share = trainer.state, trainer.setup.feed.share_rows
        place = state.rows + trainer.setup.feed._first
        ledger[state.step] = [int(i) for i in trainer.setup.feed.loader.indices(place, share)]
        return before(steps)

    trainer._fetch = fetch  # type: ignore[method-assign]
    run = trainer.fit()
    parts = WORLD.all_gather_object([WORLD.tp_rank, {str(k): v for k, v in ledger.items()}])
    rows: dict[str, list[int]] = {}
    for slice_, part in parts:
        if slice_ == 0:
            for key, value in part.items():
                rows.setdefault(key, []).extend(value)
    lines = [r for r in run.history if "grad_norm" in r]
    # Operations of a token: what the utilisation was divided by is what all processes can do.
    can = trainer.peak * WORLD.size
    work = [r["mfu"] / r["tokens_per_second"] * can for r in lines]
    return trainer, {
        "work": work,
        "losses": [r["loss"] for r in lines],
        "norms": [r["grad_norm"] for r in lines],
        "held_out": run.metrics["loss"],
        "rows": rows,
    }


def digest(trainer: Trainer) -> str:
    """SHA-256 of all weights of a model that lies whole in this process."""
    found = hashlib.sha256()
    for name, p in trainer.objective.named_parameters():
        found.update(name.encode() + p.detach().numpy().tobytes())
    return found.hexdigest()


def curves(folder: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for mesh, (size, parallel) in MESHES.items():
        if size != WORLD.size:
            continue
        for family in FAMILIES:
            for accumulate in (1, 3):
                if names and f"{family}|{accumulate}" not in names:
                    continue
                key = f"{mesh}|{family}|{accumulate}"
                out = folder / "curves" / key.replace(" ", "_")
                found[key] = train(out, family, parallel, accumulate=accumulate)[1]
        out = folder / "cut" / mesh.replace(" ", "_")
        found[f"cut|{mesh}"] = train(
            out, "llama", parallel, steps=STEPS, settings={"limit": f"{CUT} steps"}
        )[1]
    return found


# What else must not depend on the mesh: settings of the optimizer, of the devices, and of the model.
EXTRAS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "muon": ({"name": "muon"}, {}, {}),
    "ema": ({"ema": 0.9}, {}, {}),
    "layers": ({"layer_decay": 0.8, "l2_sp": 0.1, "unfreeze": 0.5}, {}, {}),
    "bf16": ({}, {}, {"precision": "bf16"}),
    "full": ({}, {"activation_checkpointing": "full"}, {}),
    "selective": ({}, {"activation_checkpointing": "selective"}, {}),
    "compiled": ({}, {"activation_checkpointing": "selective", "compile": True}, {}),
    "async": ({}, {}, {"async_save": True, "save_every": "2 steps"}),
}


def extras(folder: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for mesh, (size, parallel) in MESHES.items():
        if size != WORLD.size:
            continue
        for name in names or EXTRAS:
            optim, more, settings = EXTRAS[name]
            key = f"{mesh}|{name}"
            out = folder / "extras" / key.replace(" ", "_")
            found[key] = train(
                out, "llama", parallel | more, steps=6, optim=optim, settings=settings
            )[1]
        source = folder / "extras" / f"{mesh}|layers".replace(" ", "_") / "checkpoint-6"
        out = folder / "extras" / f"{mesh}|from".replace(" ", "_")
        found[f"{mesh}|from"] = train(out, "llama", parallel, steps=3, source=source)[1]
    return found


def resume(folder: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for mesh, (size, parallel) in MESHES.items():
        if size != WORLD.size:
            continue
        for before in names or MESHES:
            source = folder / "cut" / before.replace(" ", "_")
            out = folder / "resumed" / f"{before}-{mesh}".replace(" ", "_")
            WORLD.on_rank_zero(lambda source=source, out=out: shutil.copytree(source, out))
            found[f"{before}|{mesh}"] = train(out, "llama", parallel)[1]
    return found


def bits(folder: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for seed in range(int(names[0])):
        draw = random.Random(seed)
        family = draw.choice(sorted(FAMILIES))
        rows = draw.choice([4, 8, 12, 16])
        micro = draw.choice([m for m in (0, 1, 2, 3) if m == 0 or rows // 4 % m == 0])
        trainer, seen = train(
            folder / "bits" / f"{seed}-{WORLD.size}",
            family,
            {"reproducible": True},
            steps=3,
            optim={
                "name": draw.choice(["adamw", "adamw", "muon"]),
                "clip": draw.choice([0.0, 0.1, 1.0]),
                "ema": draw.choice([0.0, 0.9]),
            },
            settings={"batch_rows": rows, "micro_rows": micro, "seed": seed},
            dropout=draw.choice([0.0, 0.1]),
            num_layers=draw.choice([1, 2, 3]),
            hidden_size=draw.choice([16, 32]),
        )
        found[f"bits {WORLD.size}|{seed}"] = {
            "weights": digest(trainer),
            "losses": [loss.hex() for loss in seen["losses"]],
            "held_out": seen["held_out"].hex(),
        }
    return found


def main() -> None:
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    WORLD.init_process_group(torch.device("cpu"))
    found: dict[str, Any] = {}
    for part in sys.argv[3:]:
        what, _, names = part.partition("=")
        make = {"curves": curves, "extras": extras, "resume": resume, "bits": bits}[what]
        found |= make(folder, names.split(",") if names else [])
    if WORLD.is_rank_zero:
        out.write_text(json.dumps(found), encoding="utf-8")
    WORLD.destroy_process_group()


main()
