"""DDP with summed gradients, and with buckets that have their final order before the first step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["wrap_ddp"]

# The name of the option since torch 2.13, and its earlier name.
_KNOWN = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers"


def wrap_ddp(root: nn.Module, group: Any, *, unused: bool) -> DistributedDataParallel:
    """Wrap a module that is replicated on every rank of a group; gradients of trainable parameters are summed.

    Args:
        root: called with None it returns a tuple whose first element is a loss that depends on every trainable
            parameter.
        group: process group of the replicas.
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
    """Run one backward pass, after which DDP rebuilds its buckets once, in the order in which gradients arrive.

    Otherwise a resumed run would have other buckets in its first step than an uninterrupted one. With more than two
    ranks, the position in a bucket determines the order of summation, and so the last bits of a sum.
    """
    torch.autograd.backward(ddp(None)[0])
    for p in ddp.parameters():
        p.grad = None


def _sum_bucket(group, bucket):  # type: ignore[no-untyped-def] # torch holds annotations against its own classes
    """Sum a bucket without averaging: the loss has been divided by the targets of the global batch already."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
