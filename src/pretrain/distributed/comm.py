"""Gathering of tensors and all-gather of JSON values over a process group; nothing is pickled."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed.handshake import bounded
from pretrain.distributed.store import get, put, wait

__all__ = ["Callers", "Peers", "connect", "gather_json"]


def connect(
    store: Any,
    rank: int,
    size: int,
    device: torch.device,
    limit: datetime.timedelta,
    within: float = 60.0,
) -> None:
    """Initialise the default process group, with gloo for CPU tensors and JSON values, and NCCL for CUDA tensors.

    Args:
        store: key-value store for the rendezvous.
        rank: of this process.
        size: world size.
        device: device that this process computes on.
        limit: timeout of every collective.
        within: seconds within which all processes must connect.

    Raises:
        DistributedError: they did not connect; the message says what to check.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bounded(
        lambda: dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=limit
        ),
        f"The connection of rank {rank} of {size} to the others",
        device,
        within,
    )


class Peers:
    """Exchange of tensors and JSON values between processes; implements the protocol of `pretrain.checkpoint`.

    Args:
        rank: of this process.
        size: world size.
        group: process group of `torch.distributed` for JSON values.
        replica: process group of the ranks that hold one copy of the weights between them; None for all ranks.
        heartbeat: called on every transfer, as a sign of progress.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        group: Any,
        replica: Any = None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.size, self.heartbeat = rank, size, heartbeat
        self._group, self._replica = group, replica

    def gather(
        self, shards: Sequence[Tensor], owners: Sequence[int], ranks: Sequence[int]
    ) -> list[list[Tensor]]:
        """Gather each of several byte tensors on its owner; see `pretrain.checkpoint.peers.Peers`."""
        found, works = [], []
        for shard, owner in zip(shards, owners, strict=True):
            group = self._group if shard.device.type == "cpu" else dist.group.WORLD
            group = group if len(ranks) == self.size else self._replica
            room = [torch.empty_like(shard) for _ in ranks] if owner == self.rank else []
            works.append(dist.gather(shard, room or None, owner, group=group, async_op=True))
            found.append(room)
        for work in works:
            if work is not None:
                work.wait()
        self.heartbeat()
        return found

    def all_gather_object(self, value: Any, *, progress: bool = True) -> list[Any]:
        """Return the JSON values of all ranks, in rank order; ``progress`` says whether it is a heartbeat."""
        if progress:
            self.heartbeat()
        return [value] if self.size == 1 else gather_json(value, self.size, self._group)


class Callers(Peers):
    """Peers without a process group, which exchange JSON values through a store.

    Args:
        rank: of this process.
        size: world size.
        store: a key-value store, or the part of one that is used by these peers only.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        super().__init__(rank, size, None)
        self._store, self._calls = store, 0

    def all_gather_object(self, value: Any, *, progress: bool = True) -> list[Any]:
        """Return the JSON values of all ranks, in rank order; waits without a time limit."""
        self._calls += 1
        put(self._store, f"{self._calls}/{self.rank}", value)
        keys = [f"{self._calls}/{rank}" for rank in range(self.size)]
        while not wait(self._store, keys, 60.0):
            pass
        return [get(self._store, key) for key in keys]


def gather_json(value: Any, size: int, group: Any) -> list[Any]:
    """All-gather a JSON value, sent as bytes."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(found, padded, group=group)
    return [
        json.loads(part[: int(length)].numpy().tobytes())
        for part, length in zip(found, lengths, strict=True)
    ]
