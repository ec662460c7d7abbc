"""DDP whose gradients are sums, and whose buckets have their final order before the first step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["wrap_ddp"]

# What torch calls the option since 2.13, and what it called it before.
_KNOWN = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers"


def wrap_ddp(root: nn.Module, group: Any, *, unused: bool) -> DistributedDataParallel:
    """Wrap a module of which every process of a group has a copy; gradients of the trained parameters are summed.

    Args:
        root: called with None it returns a loss that every trained parameter has a part in, and something else.
        group: the processes.
        unused: some parameters get no gradient in some passes.
    """
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    ddp = DistributedDataParallel(
        root,
        process_group=group,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
        **options,
    )
    ddp.register_comm_hook(group, _sum_bucket)
    if not unused:
        _order_buckets(ddp)
    return ddp


def _order_buckets(ddp: DistributedDataParallel) -> None:
    """Let DDP see one backward pass, after which it sorts its buckets by the order of the gradients, for good.

    A resumed run would have other buckets in its first step than one that was not interrupted; and where more than two
    processes add up a bucket, the place in it decides who adds first, and so the last bits of a sum.
    """
    torch.autograd.backward(ddp(None)[0])
    for p in ddp.parameters():
        p.grad = None


def _sum_bucket(group, bucket):  # type: ignore[no-untyped-def] # torch holds annotations against its own classes
    """Reduce by summing: the loss has been divided by the targets of the global batch already."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
