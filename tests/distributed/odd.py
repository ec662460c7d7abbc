"""Objectives that do not treat all processes alike; started by `test_odd.py`, by torchrun in two processes.

odd.py OUT.json FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.distributed.world import current_world
from pretrain.models import build
from pretrain.nn.device import local
from pretrain.objectives.base import Loss
from pretrain.objectives.next_token import NextToken
from pretrain.training import micro_rows
from pretrain.training.trainer import Trainer
from tiny import Rows, objective, tokenizer


class Odd(NextToken):
    """Each process uses a parameter of its own, one is used by none, and a buffer is drawn by each."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.first = nn.Parameter(torch.zeros(8))
        self.second = nn.Parameter(torch.zeros(8))
        self.never = nn.Parameter(torch.ones(8))
        self.register_buffer("drawn", torch.tensor([float(os.getpid())]))

    def forward(self, batch: Any) -> Loss:
        loss = super().forward(batch)
        mine = self.first if current_world().rank == 0 else self.second
        loss.total = loss.total + (mine * torch.arange(8)).sum()
        return loss


def train(out: Path, strategy: str) -> dict[str, Any]:
    model = build(
        "gpt2",
        None,
        tokenizer=tokenizer(),
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        max_positions=32,
        device="meta",
    )
    goal = Odd(model)
    trainer = Trainer(
        goal,
        Rows(40),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(out=str(out), limit="4 steps", batch_rows=8, precision="fp32"),
        parallel=ParallelConfig(device="cpu", threads=1, strategy=strategy),  # type: ignore[arg-type]
        quiet=True,
    )
    run = trainer.fit()
    world = trainer.world
    return {
        "losses": [r["loss"] for r in run.history if "grad_norm" in r],
        "never": [x for part in world.all_gather_object(local(goal.never).tolist()) for x in part],
        "buffers": world.all_gather_object(float(goal.drawn)),
    }


def measured(out: Path) -> dict[str, Any]:
    """Micro-batches that are fastest at different sizes on the two processes; sizes and losses of both."""
    micro_rows._EXACT, micro_rows._SHARE = (), float("inf")
    clocks = ({1: 1.0, 2: 2.0, 4: 4.0}, {1: 3.0, 2: 1.0, 4: 3.0})
    micro_rows._measure = lambda trainer, _: clocks[trainer.world.rank][trainer.micro_rows]  # type: ignore[assignment]
    trainer = Trainer(
        objective(),
        Rows(40),
        train=TrainConfig(out=str(out), limit="4 steps", batch_rows=8, precision="fp32"),
        parallel=ParallelConfig(device="cpu", threads=1),
        quiet=True,
    )
    trainer.fit()
    return {"rows": trainer.world.all_gather_object(trainer.micro_rows)}


def main() -> None:
    out, folder, world = Path(sys.argv[1]), Path(sys.argv[2]), current_world()
    found = {strategy: train(folder / strategy, strategy) for strategy in ("ddp", "fsdp")}
    found["measured"] = measured(folder / "measured")
    if world.is_rank_zero:
        out.write_text(json.dumps(found), encoding="utf-8")
    world.destroy_process_group()


if __name__ == "__main__":
    main()
