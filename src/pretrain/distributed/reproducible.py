"""Sums of gradients over a fixed binary tree, with the same bits for any number of processes.

Floating-point addition is commutative but not associative, so a sum is reproducible if its tree is. The leaves are
the micro-batches of a global batch; a range of them is halved until one is left. If the number of processes is a power
of two and each has an equal range, every process computes a whole subtree, and the levels above are added between
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_across", "tree_sum"]

_BUCKET = 16 << 20  # elements that are exchanged in one message


def tree_sum(leaf: Callable[[int], list[Tensor]], start: int, stop: int) -> list[Tensor]:
    """Sum the tensors of the leaves ``start`` to ``stop`` (exclusive); at most about log2(leaves) sums exist at a time.

    Args:
        leaf: returns the tensors of one leaf, which are changed in place; called in order.
        start: first leaf.
        stop: one past the last leaf.
    """
    if stop - start == 1:
        return leaf(start)
    middle = start + (stop - start) // 2
    left = tree_sum(leaf, start, middle)
    torch._foreach_add_(left, tree_sum(leaf, middle, stop))
    return left


def add_across(tensors: Sequence[Tensor], group: Any, rank: int, size: int) -> None:
    """Add the sums of all ranks level by level, in place; afterwards all ranks hold the same bits.

    Args:
        tensors: with the same shapes on every rank, and of one dtype.
        group: the process group.
        rank: rank of this process in the group.
        size: size of the group, a power of two.
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
    """Group successive tensors that are exchanged in one message."""
    buckets: list[list[Tensor]] = []
    filled = _BUCKET
    for tensor in tensors:
        if filled + tensor.numel() > _BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return buckets
