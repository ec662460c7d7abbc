"""contrastive_worker.py FILE OBJECTIVE    loss and gradients of one batch, summed over the ranks that share it"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from objectives.test_contrastive import objective, rows
from pretrain.nn.tensor_parallel import Group

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    goal = objective(sys.argv[2]).train()
    goal.batch_group = Group(dist.group.WORLD, rank, size)
    batch = goal.collate(rows(8), [])
    share = 8 // size
    mine = {key: value[rank * share : (rank + 1) * share] for key, value in batch.items()}
    loss = goal(mine)
    loss.total.backward()
    sums = {"total": loss.total.detach(), "count": loss.count.float()}
    sums |= {name: p.grad for name, p in goal.named_parameters()}
    for value in sums.values():
        dist.all_reduce(value)
    if rank == 0:
        torch.save(sums, sys.argv[1])
    dist.destroy_process_group()
