"""Collectives with gradients: for tensor parallelism (Megatron-LM, arXiv 1909.08053), a sharded vocabulary, and losses
that compare rows of several ranks.

A tensor-parallel region begins with ``copy_to_tensor_parallel`` and ends with ``reduce_from_tensor_parallel``; outside
of it, all ranks of the group hold the same activations.
Letters: N targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = [
    "Group",
    "VocabShard",
    "all_reduce",
    "copy_to_tensor_parallel",
    "gather_from_tensor_parallel",
    "reduce_from_tensor_parallel",
    "row_linear",
]


@dataclass(frozen=True)
class Group:
    """A process group whose ranks share each matrix (tensor parallelism), or each batch.

    Attributes:
        handle: torch's process group.
        rank: rank of this process within the group.
        size: number of ranks.
    """

    handle: dist.ProcessGroup
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self


def all_reduce(x: Tensor, group: Group, *, largest: bool = False) -> Tensor:
    """Return the sum (or the maximum) over the group as a new tensor, the same on all ranks; without a gradient.

    On a CPU, half precision is summed in fp32, because gloo accumulates in the dtype of the tensor.
    """
    half = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)
    found = x.to(
        torch.float32 if half else x.dtype, copy=True, memory_format=torch.contiguous_format
    )
    op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    dist.all_reduce(found, op=op, group=group.handle)
    return found.to(x.dtype)


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Return ``x``, which is the same on all ranks; its gradient is all-reduced over the group."""
    found: Tensor = _CopyToRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Return the sum of ``x`` over the group; every rank gets the gradient, which is the same on all of them."""
    found: Tensor = _ReduceFromRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def gather_from_tensor_parallel(
    x: Tensor, group: Group, dim: int, sizes: Sequence[int] = (), *, alike: bool = True
) -> Tensor:
    """All-gather the slices of all ranks and concatenate them along ``dim``.

    Args:
        x: the slice of this rank.
        group: the ranks whose slices are gathered.
        dim: dimension of the concatenation.
        sizes: length of the slice of each rank; all the same when empty.
        alike: whether all ranks compute the same with the result. If so, a slice gets its part of the local gradient.
            If not, each rank computes a summand of the loss, and the gradients are summed over the group.
    """
    sizes = tuple(sizes) or (x.shape[dim],) * group.size
    found: Tensor = _GatherFromRegion.apply(x, group, dim % x.ndim, sizes, alike)  # type: ignore[no-untyped-call]
    return found


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        found = all_reduce(x, group)
        # torch.compile in torch 2.11 loses the gradient of a tensor that a collective wrote into (gradients became
        # zero), so it gets a copy.
        return found.clone() if torch.compiler.is_compiling() else found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, dim: int, sizes: tuple[int, ...], alike: bool
    ) -> Tensor:
        ctx.place = (dim, sum(sizes[: group.rank]), sizes[group.rank])
        ctx.summed = None if alike else group
        # All ranks send the same number of elements, because not all backends support uneven sizes.
        shape = [*x.shape[:dim], max(sizes), *x.shape[dim + 1 :]]
        half = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)
        sent = torch.zeros(shape, dtype=torch.float32 if half else x.dtype, device=x.device)
        sent.narrow(dim, 0, sizes[group.rank]).copy_(x)
        parts = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(parts, sent, group=group.handle)
        whole = [part.narrow(dim, 0, n) for part, n in zip(parts, sizes, strict=True)]
        return torch.cat(whole, dim).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.summed is not None:
            grad = all_reduce(grad, ctx.summed)
        return grad.narrow(*ctx.place), None, None, None, None


def row_linear(layer: nn.Linear, x: Tensor, group: Group) -> Tensor:
    """Return ``layer(x)`` for a row-parallel layer: each rank holds some columns of the weight and their inputs.

    The partial products are all-reduced over the group, and the bias is added once, to the sum.

    Args:
        layer: a linear layer; a layer with an adapter defines ``product(x)``, its output without the bias.
        x: (..., I / group.size).
        group: the ranks that share the layer.
    """
    product = getattr(layer, "product", None)
    y = reduce_from_tensor_parallel(
        F.linear(x, layer.weight) if product is None else product(x), group
    )
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


@dataclass(frozen=True)
class VocabShard:
    """The rows of a sharded vocabulary that this rank holds: the ``rank``-th ceil(V / size) of them, fewer at the end.

    Attributes:
        group: the ranks that share the vocabulary.
        size: V.
    """

    group: Group
    size: int

    @property
    def rows(self) -> int:
        """Rows of the first rank, the most of any; used for choices that must be the same on all ranks."""
        return -(-self.size // self.group.size)

    @property
    def start(self) -> int:
        """The first token of this rank."""
        return self.rows * self.group.rank

    @property
    def sizes(self) -> list[int]:
        """Rows of every rank of the group."""
        starts = range(0, self.rows * self.group.size, self.rows)
        return [max(0, min(self.rows, self.size - start)) for start in starts]

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local rows of ``ids`` and whether this rank holds them (if not, the row is 0).

        Ids below 0 are assigned to the first rank and ids from V on to the last one, where the look-up fails: an
        invalid id that no rank holds would otherwise go unnoticed.
        """
        inside = torch.ones_like(ids, dtype=torch.bool)
        if self.group.rank > 0:
            inside &= ids >= self.start
        if self.group.rank < self.group.size - 1:
            inside &= ids < self.start + self.rows
        return torch.where(inside, ids - self.start, 0), inside

    def look_up(self, weight: Tensor, ids: Tensor, padding: int | None = None) -> Tensor:
        """Look up rows of a table that is sharded like the vocabulary, (B, T) -> (B, T, D); the same on all ranks.

        Args:
            weight: (rows of this rank, D).
            ids: tokens of the full vocabulary.
            padding: the token whose row gets no gradient.
        """
        index, inside = self.place(ids)
        if padding is not None:
            padding -= self.start
            padding = padding if 0 <= padding < weight.shape[0] else None
        found = F.embedding(index, weight, padding).masked_fill(~inside.unsqueeze(-1), 0.0)
        return reduce_from_tensor_parallel(found, self.group)

    def gather(self, scores: Tensor) -> Tensor:
        """All-gather scores over the full vocabulary from those of each rank, (..., rows) -> (..., V)."""
        return gather_from_tensor_parallel(scores, self.group, -1, self.sizes)

    def log_softmax(
        self, logits: Tensor, ids: Tensor, index: Tensor, inside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities over the full vocabulary, without a gradient.

        Args:
            logits: (N, rows) of this rank.
            ids: (N, 1) one token each, of the full vocabulary.
            index: (N, 1) local rows of these tokens, from ``place``.
            inside: (N, 1) whether this rank holds them.

        Returns:
            Log-probabilities (N, rows) of the tokens of this rank and (N,) of ``ids``, and (N,) whether ``ids`` is the
            argmax: its logit is the largest, and no token with a lower id has the same logit.
        """
        largest, first = logits.max(1, keepdim=True)
        shifted = logits - all_reduce(largest, self.group, largest=True)
        picked = torch.where(inside, shifted.gather(1, index), 0.0).squeeze(1)
        earlier = (shifted.gather(1, first) == 0) & (first + self.start < ids)
        sums, picked, earlier = all_reduce(  # one collective for all three
            torch.stack((shifted.exp().sum(1), picked, earlier.squeeze(1).to(shifted.dtype))),
            self.group,
        ).unbind()
        logs = sums.log()
        return shifted.sub_(logs.unsqueeze(1)), picked - logs, (picked == 0) & (earlier == 0)

    def log_probs(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probability of one token per row, with a gradient: (N, rows), (N,) -> (N,)."""
        found: Tensor = _LogProbs.apply(logits, targets, self)  # type: ignore[no-untyped-call]
        return found


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab: VocabShard) -> Tensor:
        ids = targets.unsqueeze(1)
        index, inside = vocab.place(ids)
        every, picked, _ = vocab.log_softmax(logits, ids, index, inside)
        ctx.save_for_backward(every, index, inside)
        return picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        every, index, inside = ctx.saved_tensors
        grad = grad.unsqueeze(1)
        return (every.exp() * -grad).scatter_add_(1, index, inside * grad), None, None
