"""Assembly of whole parameters from their shards, and of shards from whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.distributed.processes import Processes
from pretrain.nn.buffers import stored_tensors
from pretrain.nn.device import local
from pretrain.nn.layout import ShardLayout

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["MatrixCollectives", "broadcast_initial_values", "copy_whole"]


class MatrixCollectives:
    """Collectives for an optimizer that works on whole matrices and distributes that work over the ranks.

    Args:
        layout: which shard of every parameter lies on which rank.
        world: the processes.
    """

    def __init__(self, layout: ShardLayout, world: Processes) -> None:
        self._layout, self._world = layout, world

    def assemble(self, name: str, part: Tensor) -> Tensor:
        """Return the full tensor, of the shape of a parameter, of which this rank holds ``part``; a collective."""
        layout, group = self._layout, self._world.replica
        members = layout.replica_ranks
        if len(members) == 1:
            return part
        longest = max(layout.region(name, rank).numel for rank in members)
        padded = part.new_zeros(longest)
        padded[: part.numel()] = part.reshape(-1)
        shards = [torch.empty_like(padded) for _ in members]
        dist.all_gather(shards, padded, group=group)
        full = part.new_empty(layout.shapes[name])
        for rank, flat in zip(members, shards, strict=True):
            region = layout.region(name, rank)
            full[region.slices()] = flat[: region.numel].view(region.shape)
        return full

    def compute_distributed(
        self, wholes: Sequence[Tensor], make: Callable[[Tensor], Tensor], first: int
    ) -> list[Tensor]:
        """Apply ``make`` to matrices that all ranks hold: each rank computes a few of them, and all get the results.

        Args:
            wholes: matrices of one shape.
            make: called with a stack of some of them; the result has the same shape and dtype.
            first: number of the first matrix within the step, so that successive calls assign matrices to the ranks in
                turn.
        """
        size, rank = self._world.size, self._world.rank
        owners = [(first + i) % size for i in range(len(wholes))]
        mine = [i for i, owner in enumerate(owners) if owner == rank]
        own_results = iter(make(torch.stack([wholes[i] for i in mine])) if mine else ())
        results = [
            next(own_results).contiguous() if owner == rank else torch.empty_like(whole)
            for owner, whole in zip(owners, wholes, strict=True)
        ]
        works = [
            dist.broadcast(result, owner, async_op=True)
            for result, owner in zip(results, owners, strict=True)
        ]
        for work in works:
            if work is not None:
                work.wait()
        return results

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a parameter."""
        return tuple(self._layout.shapes[name])

    def own_shard(self, name: str, full: Tensor) -> Tensor:
        """Return this rank's shard of a full tensor."""
        return full[self._layout.region(name).slices()]


@torch.no_grad()
def copy_whole(model: Model, whole: Model, world: Processes) -> None:
    """Copy parameters and persistent buffers of a sharded model into an unsharded one; all ranks must call it.

    Args:
        model: sharded, with a layout, on any device.
        whole: a model whose parameters have the same names and are complete.
        world: the processes that share ``model``.
    """
    collectives, there = MatrixCollectives(model.layout, world), stored_tensors(whole)
    for name, tensor in stored_tensors(model).items():
        sharded = name in model.layout.shapes
        there[name].copy_(collectives.assemble(name, local(tensor.detach())) if sharded else tensor)


def broadcast_initial_values(module: nn.Module, layout: ShardLayout, world: Processes) -> None:
    """Broadcast parameters and buffers from the first rank that holds them: random initial values may differ.

    Args:
        module: its parameters and buffers are changed in place.
        layout: which shard of them lies on which rank, by their names in the module.
        world: the processes.
    """
    if world.size == 1:
        return
    for buffer in module.buffers():
        if buffer.numel():
            dist.broadcast(buffer.detach(), 0)
    for name, tensor in module.named_parameters():
        part = local(tensor.detach())
        if part.numel() and world.sizes.dp_replicate > 1:
            _broadcast(part, world.group("dp_replicate"))
        if part.numel() and world.sizes.tp > 1 and name not in layout.cuts:
            _broadcast(part, world.group("tp"))


def _broadcast(tensor: Tensor, group: Any) -> None:
    """Broadcast from the first rank of the group, in place."""
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
