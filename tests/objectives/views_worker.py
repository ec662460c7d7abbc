"""views_worker.py FILE OBJECTIVE    losses of short runs of views of images under DDP and FSDP2, written to FILE"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from objectives.test_views import objective, trainer
from pretrain.distributed.world import current_world

if __name__ == "__main__":
    world, file, kind = current_world(), Path(sys.argv[1]), sys.argv[2]
    losses = {}
    for strategy in ("ddp", "fsdp"):
        run = trainer(objective(kind), file.parent / strategy, strategy).fit()
        losses[strategy] = torch.tensor([r["loss"] for r in run.history if "grad_norm" in r])
    if world.is_rank_zero:
        torch.save(losses, file)
    world.destroy_process_group()
