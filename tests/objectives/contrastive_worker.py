"""contrastive_worker.py FILE OBJECTIVE    what the ranks that share a batch find together

FILE gets loss and gradients of one batch, summed over the ranks, and the losses of short runs under DDP and FSDP2.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from objectives.test_contrastive import objective, rows, trainer
from pretrain.distributed.world import current_world
from pretrain.nn.tensor_parallel import Group

if __name__ == "__main__":
    world, file, kind = current_world(), Path(sys.argv[1]), sys.argv[2]
    losses = {}
    for strategy in ("ddp", "fsdp"):
        run = trainer(objective(kind), file.parent / strategy, 4, strategy=strategy).fit()
        losses[strategy] = torch.tensor([r["loss"] for r in run.history if "grad_norm" in r])
    goal = objective(kind).train()
    goal.batch_group = Group(dist.group.WORLD, world.rank, world.size)
    batch = goal.collate(rows(8), [])
    share = 8 // world.size
    mine = {key: value[world.rank * share :][:share] for key, value in batch.items()}
    loss = goal(mine)
    loss.total.backward()
    sums = {"total": loss.total.detach(), "count": loss.count.float()}
    sums |= {name: p.grad for name, p in goal.named_parameters()}
    for value in sums.values():
        dist.all_reduce(value)
    if world.is_rank_zero:
        torch.save(sums | losses, file)
    world.destroy_process_group()
