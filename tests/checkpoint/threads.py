"""Processes played by threads: peers that talk through queues, and models cut by hand."""

from __future__ import annotations

import copy
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pretrain.nn.layout import ShardLayout

T = TypeVar("T")
PATIENCE = 60.0  # seconds; a deadlock becomes an error
COLUMNS = (".output.weight", ".down.weight")
ROWS = ("query", "key", "value", "up", "gate", "embedding", "output_weight", "output_bias")


class Room:
    """What the threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.mail: dict[tuple[int, int], queue.Queue[Tensor]] = {
            (a, b): queue.Queue() for a in range(size) for b in range(size)
        }
        self.values: list[Any] = [None] * size
        self.meeting = threading.Barrier(size)
        self.sent_bytes = [0] * size


class ThreadPeers:
    """One of the threads; like gloo it copies nothing when sending, so that a changed tensor would be noticed."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.size = room, rank, room.size

    def gather(
        self, shards: Sequence[Tensor], owners: Sequence[int], ranks: Sequence[int]
    ) -> list[list[Tensor]]:
        assert self.rank in ranks and all(owner in ranks for owner in owners)
        for shard, owner in zip(shards, owners, strict=True):
            assert shard.is_contiguous() and shard.dtype is torch.uint8 and shard.numel()
            self.room.sent_bytes[self.rank] += shard.nbytes * (owner != self.rank)
            self.room.mail[self.rank, owner].put(shard)
        found = []
        for shard, owner in zip(shards, owners, strict=True):
            mail = [self.room.mail[rank, owner] for rank in ranks] if owner == self.rank else []
            found.append([box.get(timeout=PATIENCE) for box in mail])
            assert all(one.shape == shard.shape for one in found[-1])
        return found

    def heartbeat(self) -> None:
        pass

    def all_gather_object(self, value: Any, *, progress: bool = True) -> list[Any]:
        self.room.values[self.rank] = json.dumps(value)
        self.room.meeting.wait(PATIENCE)
        found = [json.loads(text) for text in self.room.values]
        self.room.meeting.wait(PATIENCE)
        return found


def on_all(size: int, work: Callable[[ThreadPeers], T], room: Room | None = None) -> list[T]:
    """Do something in ``size`` threads; the error of the lowest one that failed is raised."""
    found = attempt_all(size, work, room)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def attempt_all(size: int, work: Callable[[ThreadPeers], T], room: Room | None = None) -> list[Any]:
    """The same, with errors as results."""
    room = room or Room(size)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadPeers(room, rank))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(box.empty() for box in room.mail.values()), "something was sent and never received"
    return found


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def layout_of(model: nn.Module, replicate: int, shard: int, tp: int) -> ShardLayout:
    """As the trainer cuts: rows or columns for tensor parallelism, then rows."""
    cuts = {}
    for name, shape in shapes_of(model).items():
        if tp > 1 and name.endswith(COLUMNS) and len(shape) == 2 and ".layers." in name:
            cuts[name] = 1
        elif tp > 1 and any(part in name for part in ROWS) and "norm" not in name:
            cuts[name] = 0
    return ShardLayout(shapes_of(model), replicate, shard, tp, cuts)


def at(layout: ShardLayout, rank: int) -> ShardLayout:
    return replace(layout, rank=rank)


def cut_model(model: Any, layout: ShardLayout, rank: int) -> Any:
    """A copy of the model that holds the parts of one rank alone."""
    part = copy.deepcopy(model)
    for name, parameter in list(part.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = parameter.detach()[layout.region(name, rank).slices()].clone()
        setattr(part.get_submodule(owner), leaf, nn.Parameter(value, parameter.requires_grad))
    return part


def cut_tensors(tensors: Mapping[str, Tensor], layout: ShardLayout, rank: int) -> dict[str, Tensor]:
    """Training tensors by key, as one rank holds them."""
    found = {}
    for key, tensor in tensors.items():
        name = (key.partition("/")[2] or key).removeprefix("model.")
        known = tensor.ndim and name in layout.shapes
        found[key] = tensor[layout.region(name, rank).slices()].clone() if known else tensor
    return found


def moments(model: nn.Module, prefix: str = "model.") -> dict[str, Tensor]:
    """What AdamW would have of a model, drawn at random; the first parameter has no moments yet."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for number, (name, p) in enumerate(model.named_parameters()):
        if number == 0:
            found[f"absent/{prefix}{name}"] = torch.zeros(())
            continue
        found[f"step/{prefix}{name}"] = torch.tensor(7.0)
        for field in ("exp_avg", "exp_avg_sq"):
            found[f"{field}/{prefix}{name}"] = torch.randn(p.shape, generator=generator)
    return found
