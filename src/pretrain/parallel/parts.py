"""Parameters that are shared out among processes: a whole from its parts, and a part of a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.parallel.regions import Layout, local
from pretrain.parallel.world import World

__all__ = ["Parts", "align"]


class Parts:
    """What an optimizer needs that works on whole matrices.

    Args:
        layout: which part of every parameter lies where.
        world: the processes.
    """

    def __init__(self, layout: Layout, world: World) -> None:
        self._layout, self._world = layout, world

    def assemble(self, name: str, part: Tensor) -> Tensor:
        """The full tensor of a parameter's shape of which this process holds ``part``; all must come along."""
        layout, group = self._layout, self._world.replica
        members = self._world.replica_ranks
        longest = max(layout.region(name, rank).numel for rank in members)
        padded = part.new_zeros(longest)
        padded[: part.numel()] = part.reshape(-1)
        found = [torch.empty_like(padded) for _ in members]
        dist.all_gather(found, padded, group=group)
        full = part.new_empty(layout.shapes[name])
        for rank, flat in zip(members, found, strict=True):
            region = layout.region(name, rank)
            full[region.slices()] = flat[: region.numel].view(region.shape)
        return full

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, however it is cut."""
        return tuple(self._layout.shapes[name])

    def cut_out(self, name: str, full: Tensor) -> Tensor:
        """This process's part of a full tensor."""
        return full[self._layout.region(name).slices()]


def align(module: nn.Module, layout: Layout, world: World) -> None:
    """Give all processes the values of the first that has them: what an objective drew may differ between them.

    Args:
        module: whose parameters and buffers, in place.
        layout: which part of them lies where, by their names in the module.
        world: the processes.
    """
    if world.size == 1:
        return
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        part = local(tensor.detach())
        if part.numel() and world.sizes.dp_replicate > 1:
            _broadcast(part, world.group("dp_replicate"))
        if part.numel() and world.sizes.tp > 1 and name not in layout.cuts:
            _broadcast(part, world.group("tp"))


def _broadcast(tensor: Tensor, group: Any) -> None:
    """From the first of the group, in place."""
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
