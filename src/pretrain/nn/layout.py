"""Which part of every parameter lies on which process: a function of names, shapes and mesh, known to all alike.

Nothing here talks to anyone or needs `torch.distributed`, so that files can be read and written by it as well.
A parameter is cut for tensor parallelism first, along a dimension of its own, and each piece then along its first
dimension for sharded data parallelism, as FSDP2 does it. Both cut into pieces of ceil(size / parts), so that the last
ones may be smaller or empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ShardLayout", "ShardSlice", "local", "piece", "whole"]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process, in the same memory; the tensor itself where it is whole."""
    shared: Any = tensor
    part: Tensor = shared.to_local() if hasattr(tensor, "to_local") else tensor
    return part


@dataclass(frozen=True)
class ShardSlice:
    """A box inside a full tensor: where it starts and how long it is, per dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def slices(self) -> tuple[slice, ...]:
        """What cuts the box out of the full tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    def cut(self, dim: int, parts: int, index: int) -> ShardSlice:
        """The ``index``-th of ``parts`` pieces along ``dim``."""
        start, length = piece(self.shape[dim], parts, index)
        starts, shape = list(self.start), list(self.shape)
        starts[dim] += start
        shape[dim] = length
        return ShardSlice(tuple(starts), tuple(shape))


def piece(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of the ``index``-th of ``parts`` pieces of ``size`` things."""
    step = -(-size // parts)
    start = min(size, index * step)
    return start, min(size, start + step) - start


def whole(shape: tuple[int, ...]) -> ShardSlice:
    """The box that is everything."""
    return ShardSlice((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class ShardLayout:
    """Where the parts of every parameter lie.

    Processes are numbered ``(replica * dp_shard + shard) * tp + slice``.

    Attributes:
        shapes: full shape of every parameter, by name.
        dp_replicate: groups that hold the same.
        dp_shard: processes among which each piece is cut along its first dimension.
        tp: processes among which the parameters in ``cuts`` are cut.
        cuts: name -> dimension; the others are not cut for tensor parallelism.
        rank: of this process.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cuts: Mapping[str, int] = field(default_factory=dict)
    rank: int = 0

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp_replicate * self.dp_shard * self.tp

    def region(self, name: str, rank: int | None = None) -> ShardSlice:
        """The part of a parameter that a process (this one by default) holds; it may be empty."""
        rank = self.rank if rank is None else rank
        region = whole(tuple(self.shapes[name]))
        if name in self.cuts:
            region = region.cut(self.cuts[name], self.tp, rank % self.tp)
        if self.dp_shard > 1 and region.shape:
            region = region.cut(0, self.dp_shard, rank // self.tp % self.dp_shard)
        return region

    def holders(self, name: str) -> dict[ShardSlice, list[int]]:
        """The distinct parts that are not empty, and the processes that hold each, lowest first."""
        found: dict[ShardSlice, list[int]] = {}
        for rank in range(self.world):
            region = self.region(name, rank)
            if region.numel:
                found.setdefault(region, []).append(rank)
        return found

    def counts(self, name: str) -> bool:
        """Whether this process counts in a sum over all: of those that hold the same part, the lowest does."""
        replica, slice_ = self.rank // (self.tp * self.dp_shard), self.rank % self.tp
        return replica == 0 and (name in self.cuts or slice_ == 0)
