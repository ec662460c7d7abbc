"""Point-to-point transfer of tensors, and all-gather of JSON values, over a process group; nothing is pickled."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
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
    """Exchange of CPU tensors and JSON values between processes; implements the protocol of `pretrain.checkpoint`.

    Args:
        rank: of this process.
        size: world size.
        group: process group of `torch.distributed` for CPU tensors.
        tick: called on every transfer, as a sign of progress.
    """

    def __init__(
        self, rank: int, size: int, group: Any, tick: Callable[[], None] | None = None
    ) -> None:
        self.rank, self.size, self._group, self._tick = rank, size, group, tick
        self._sent: list[tuple[Any, Tensor]] = []

    def send(self, tensor: Tensor, to: int) -> None:
        """Start to send a contiguous tensor of any dtype; it must not be changed before ``wait_until_sent``."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        work = dist.isend(_bytes(tensor), to, group=self._group)
        if work is not None:
            self._sent.append((work, tensor))

    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous tensor with the next one that rank ``source`` sends."""
        dist.recv(_bytes(tensor), source, group=self._group)
        if self._tick is not None:
            self._tick()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, in rank order."""
        if self._tick is not None:
            self._tick()
        return [value] if self.size == 1 else gather_json(value, self.size, self._group)

    def wait_until_sent(self) -> None:
        """Wait until everything sent has been received."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


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

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, in rank order; waits without a time limit."""
        self._calls += 1
        put(self._store, f"{self._calls}/{self.rank}", value)
        keys = [f"{self._calls}/{rank}" for rank in range(self.size)]
        while not wait(self._store, keys, 60.0):
            pass
        return [get(self._store, key) for key in keys]


def _bytes(tensor: Tensor) -> Tensor:
    """Return the same memory as bytes, because not every backend supports every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


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
