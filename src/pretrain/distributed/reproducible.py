"""Sums of gradients over a fixed binary tree: the same bits however many processes share the leaves.

Floating-point addition is commutative but not associative, so a sum is reproducible when its tree is. The leaves are
the micro-batches of a global batch; a range of them is halved until one is left. A power of two of processes, each
with an equal range, cuts the tree exactly where the halves meet, and the levels above are added between processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_across", "tree_sum"]

_BUCKET = 16 << 20  # elements that are exchanged at once


def tree_sum(leaf: Callable[[int], list[Tensor]], start: int, stop: int) -> list[Tensor]:
    """Sum what ``leaf`` gives for ``start`` to ``stop`` (exclusive); log2 of their number of sums exist at a time.

    Args:
        leaf: makes the tensors of one leaf, which are changed in place; it is called in order.
        start: first leaf.
        stop: behind the last one.
    """
    if stop - start == 1:
        return leaf(start)
    middle = start + (stop - start) // 2
    left = tree_sum(leaf, start, middle)
    torch._foreach_add_(left, tree_sum(leaf, middle, stop))
    return left


def add_across(tensors: Sequence[Tensor], group: Any, rank: int, size: int) -> None:
    """Add the sums of all processes level by level, in place; afterwards all hold the same bits.

    Args:
        tensors: of the same shapes and one type on every process.
        group: the processes.
        rank: of this one in the group.
        size: of the group, a power of two.
    """
    level = 1
    while level < size:
        partner = dist.get_global_rank(group, rank ^ level)
        for bucket in _buckets(tensors):
            mine = torch.cat([tensor.reshape(-1) for tensor in bucket])
            theirs = torch.empty_like(mine)
            calls = [
                dist.P2POp(dist.isend, mine, partner, group=group),
                dist.P2POp(dist.irecv, theirs, partner, group=group),
            ]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
            parts = torch.split(mine + theirs, [tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        level *= 2


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours that travel together."""
    found: list[list[Tensor]] = []
    filled = _BUCKET
    for tensor in tensors:
        if filled + tensor.numel() > _BUCKET:
            found.append([])
            filled = 0
        found[-1].append(tensor)
        filled += tensor.numel()
    return found
