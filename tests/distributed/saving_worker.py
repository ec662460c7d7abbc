"""A model that FSDP2 cuts over several processes is saved, trained on, killed and read; the test beside it starts this.

saving_worker.py same|killed|slow|stuck|hung FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from pretrain.checkpoint import Saver, TrainingState, save_checkpoint, saving
from pretrain.checkpoint.sharded_loading import (
    latest_on_all_ranks,
    load_slices,
    read_training_slices,
)
from pretrain.distributed.world import World
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.nn.device import local
from pretrain.nn.layout import ShardLayout
from pretrain.utils import files

SIZES = {"num_layers": 2, "hidden_size": 24, "num_heads": 2, "max_positions": 16, "vocab_size": 61}
LIMIT = 1.0  # seconds without progress; four times as many while a checkpoint is written


def sharded(world: World, seed: int) -> tuple[Model, ShardLayout, torch.optim.Optimizer]:
    model = build("gpt2", seed=seed, **SIZES)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mesh = torch.distributed.init_device_mesh("cpu", (world.size,))
    for block in model.backbone.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    layout = ShardLayout(shapes, 1, world.size, 1, {}, world.rank)
    return model, layout, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def step(model: Model, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZES["vocab_size"], (2, 8), generator=generator)
    model({"input_ids": ids}).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: Model, optimizer: torch.optim.Optimizer) -> TrainingState:
    names = {p: name for name, p in model.named_parameters()}
    tensors = {
        f"{field}/model.{names[p]}": value
        for p, values in optimizer.state.items()
        for field, value in values.items()
    }
    return TrainingState({"optimizer": tensors}, {"step": 2})


def full(tensor: torch.Tensor) -> torch.Tensor:
    whole: Any = tensor
    found: torch.Tensor = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return found.detach().clone()


def reference(world: World, model: Model, state: TrainingState, run: Path) -> None:
    """What one process writes of the same weights."""
    weights = {name: full(p) for name, p in model.named_parameters()}
    tensors = {key: full(value) for key, value in state.tensors["optimizer"].items()}
    if world.rank == 0:
        whole = build("gpt2", **SIZES)
        whole.load_state_dict(weights, strict=False)
        training = TrainingState({"optimizer": tensors}, state.state)
        save_checkpoint(run, whole, step=2, tokens=0, pretrain_block={}, training=training)


def same(world: World, folder: Path) -> None:
    """At once and in the background, while training goes on; then everything is read again."""
    model, layout, optimizer = sharded(world, seed=1)
    for number in range(2):
        step(model, optimizer, number)
    state = state_of(model, optimizer)
    reference(world, model, state, folder / "one")
    held = {name: local(p).detach().clone() for name, p in model.named_parameters()}
    moments = {key: local(value).clone() for key, value in state.tensors["optimizer"].items()}
    for background in (False, True):
        run = folder / ("background" if background else "at-once")
        with Saver(run, background=background, layout=layout, peers=world) as saver:
            saver.save(model, step=2, tokens=0, pretrain_block={}, training=state)
            if background:  # its collectives and those of the save must not mix
                for number in range(5):
                    step(model, optimizer, number + 2)
    other, layout, _ = sharded(world, seed=2)
    path = latest_on_all_ranks(folder / "one", world)
    assert path is not None
    load_slices(other, path, layout, world)
    for name, parameter in other.named_parameters():
        assert torch.equal(local(parameter), held[name]), name
    found = read_training_slices(path, layout, world, quiet=True)
    for key, value in found.tensors["optimizer"].items():
        assert torch.equal(value, moments[key]), key
    if world.rank == 0:
        (folder / "done").touch()


def killed(world: World, folder: Path) -> None:
    """Process 1 is killed while it writes: process 0 is told soon, and the checkpoint before stays."""

    class Deadly(files.FileIO):
        def write(self, descriptor: int, data: memoryview) -> int:
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

    model, layout, _ = sharded(world, seed=1)
    saver = Saver(folder / "run", background=True, layout=layout, peers=world)
    saver.save(model, step=1, tokens=0, pretrain_block={}, max_shard_bytes=20_000)
    saver.wait()
    if world.rank == 1:
        files.IO = Deadly()
    began = time.monotonic()
    saver.save(model, step=2, tokens=0, pretrain_block={}, max_shard_bytes=20_000)
    try:
        saver.wait()
    except RuntimeError as error:  # as from any collective that loses a process
        seconds = time.monotonic() - began
        text = json.dumps({"error": str(error), "seconds": seconds})
        (folder / "told.json").write_text(text)
        os._exit(0)  # the group is broken, and leaving it in order would wait


def looping() -> None:
    """What the stack of the one that hangs must show."""
    while True:
        time.sleep(0.05)


def watched(world: World, folder: Path, how: str) -> None:
    """Whole weights are saved in the background while a watchdog looks on.

    slow: the disk is, so that the file takes longer than the limit. stuck: the disk of process 1 never answers. hung:
    process 1 hangs in a step, while the slow disk is still at work.
    """
    refuse = saving._refuse_non_finite

    def slow(weights: Mapping[str, torch.Tensor]) -> None:
        if how == "stuck" and world.rank == 1:
            looping()
        time.sleep(0.0 if how == "stuck" else 0.3)
        refuse(weights)

    saving._refuse_non_finite = slow
    model = build("gpt2", **SIZES)
    about = {"settings": {}, "data": {}, "model": {}}
    run = folder / "run"
    with (
        world.connected(torch.device("cpu"), run, LIMIT, lambda: about),
        Saver(run, background=True, peers=world) as saver,
    ):
        shard = 20_000 if how == "stuck" else 1 << 30  # so that process 1 has a file of its own
        world.mark("save", 1)
        saver.save(model, step=1, tokens=0, pretrain_block={}, max_shard_bytes=shard)
        if how == "hung":
            world.mark("forward", 2)
            if world.rank == 1:
                looping()
            world.all_reduce_sum([1.0])
        world.mark("save", 2)
        began = time.monotonic()
        saver.wait()
        (folder / f"waited-{world.rank}").write_text(str(time.monotonic() - began))


def main() -> None:
    torch.set_num_threads(1)
    world = World.find()
    how, folder = sys.argv[1], Path(sys.argv[2])
    if how in ("same", "killed"):
        world.init_process_group(torch.device("cpu"))
        {"same": same, "killed": killed}[how](world, folder)
    else:
        watched(world, folder, how)
    world.destroy_process_group()


if __name__ == "__main__":
    main()
