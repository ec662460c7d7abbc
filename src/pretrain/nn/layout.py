"""Shard layout: which part of every parameter each rank holds, computed from names, shapes and the mesh alone.

Nothing here communicates or needs `torch.distributed`, so checkpoint files can be read and written with it as well.
A parameter is sharded for tensor parallelism first, along a dimension of its own, and each shard then along its first
dimension for sharded data parallelism, as in FSDP2. Both use shards of ceil(size / parts), so that the last ones may be
smaller or empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ShardLayout", "ShardSlice", "fills_all", "piece", "whole"]


@dataclass(frozen=True)
class ShardSlice:
    """A box inside a full tensor: its start and its length in every dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def slices(self) -> tuple[slice, ...]:
        """Return the index that selects the box in the full tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    def cut(self, dim: int, parts: int, index: int) -> ShardSlice:
        """Return the ``index``-th of ``parts`` pieces along ``dim``."""
        start, length = piece(self.shape[dim], parts, index)
        starts, shape = list(self.start), list(self.shape)
        starts[dim] += start
        shape[dim] = length
        return ShardSlice(tuple(starts), tuple(shape))


def piece(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return start and length of the ``index``-th of ``parts`` pieces of a dimension of ``size``."""
    step = -(-size // parts)
    start = min(size, index * step)
    return start, min(size, start + step) - start


def fills_all(size: int, parts: int) -> bool:
    """Return whether no piece of a dimension of ``size`` is empty; a dimension of 0 is no dimension."""
    return size == 0 or piece(size, parts, parts - 1)[1] > 0


def whole(shape: tuple[int, ...]) -> ShardSlice:
    """Return the box that covers a tensor of this shape."""
    return ShardSlice((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class ShardLayout:
    """The shards of every parameter by rank.

    Ranks are numbered ``(replica * dp_shard + shard) * tp + slice``.

    Attributes:
        shapes: full shape of every parameter, by name.
        dp_replicate: number of replicas.
        dp_shard: number of ranks over which each piece is sharded along its first dimension.
        tp: number of ranks over which the parameters in ``cuts`` are sharded.
        cuts: name -> dimension of tensor parallelism; parameters not listed are not sharded by it.
        rank: rank of this process.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cuts: Mapping[str, int] = field(default_factory=dict)
    rank: int = 0

    @property
    def world(self) -> int:
        """World size."""
        return self.dp_replicate * self.dp_shard * self.tp

    def region(self, name: str, rank: int | None = None) -> ShardSlice:
        """Return the part of a parameter that a rank (this one by default) holds; it may be empty."""
        rank = self.rank if rank is None else rank
        region = whole(tuple(self.shapes[name]))
        if name in self.cuts:
            region = region.cut(self.cuts[name], self.tp, rank % self.tp)
        if self.dp_shard > 1 and region.shape:
            region = region.cut(0, self.dp_shard, rank // self.tp % self.dp_shard)
        return region

    @property
    def replica_ranks(self) -> list[int]:
        """Ranks of the replica of this one, which hold one copy of the parameters between them."""
        each = self.dp_shard * self.tp
        first = self.rank // each * each
        return list(range(first, first + each))

    def counts(self, name: str) -> bool:
        """Return whether this rank contributes to a sum over all ranks: the lowest of those with the same part does."""
        replica, slice_ = self.rank // (self.tp * self.dp_shard), self.rank % self.tp
        return replica == 0 and (name in self.cuts or slice_ == 0)
