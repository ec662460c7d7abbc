"""Collectives with gradients: for tensor parallelism (Megatron-LM, arXiv 1909.08053), a vocabulary that is cut, and
losses that compare rows which lie on several processes.

What several processes compute together begins with ``enter`` and ends with ``leave``; outside, all of them hold the
same activations and compute the same. Nothing here runs in one process.
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
    """Processes that share each matrix, or each batch.

    Attributes:
        handle: torch's process group.
        rank: of this process within the group.
        size: number of processes.
    """

    handle: dist.ProcessGroup
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self


def all_reduce(x: Tensor, group: Group, *, largest: bool = False) -> Tensor:
    """The sum (or the maximum) over the group, as a new tensor, the same on all its processes; no gradient.

    On a CPU half precision is summed in fp32: gloo has no wider accumulator.
    """
    half = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)
    found = x.to(
        torch.float32 if half else x.dtype, copy=True, memory_format=torch.contiguous_format
    )
    op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    dist.all_reduce(found, op=op, group=group.handle)
    return found.to(x.dtype)


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """``x`` itself, which all processes hold alike; its gradient is summed over the group."""
    found: Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """The sum over the group of what each process has; the gradient, alike on all of them, goes to each."""
    found: Tensor = _Leave.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def gather_from_tensor_parallel(
    x: Tensor, group: Group, dim: int, sizes: Sequence[int] = (), *, alike: bool = True
) -> Tensor:
    """The slices of all processes side by side along ``dim``.

    Args:
        x: the slice of this process.
        group: whose slices are joined.
        dim: along which they lie.
        sizes: length of the slice of each process; all the same when empty.
        alike: all processes compute the same with the result, so a slice takes its own part of the gradient. Else
            each makes a summand of the loss with it, and a slice gets the sum of what all of them have for it.
    """
    sizes = tuple(sizes) or (x.shape[dim],) * group.size
    found: Tensor = _Gather.apply(x, group, dim % x.ndim, sizes, alike)  # type: ignore[no-untyped-call]
    return found


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        found = all_reduce(x, group)
        # To the compiler of torch 2.11 what a collective wrote into has no gradient: all of them became zero.
        return found.clone() if torch.compiler.is_compiling() else found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, dim: int, sizes: tuple[int, ...], alike: bool
    ) -> Tensor:
        ctx.place = (dim, sum(sizes[: group.rank]), sizes[group.rank])
        ctx.summed = None if alike else group
        # Every process sends as many elements: not all backends take uneven ones.
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


def row_linear(layer: nn.Linear, x: Tensor, group: Group | None) -> Tensor:
    """``layer(x)``, where each process holds some columns of the weight and the inputs that belong to them.

    The partial products are summed over the group, and the bias is added to the sum, once.

    Args:
        layer: a linear layer; one that is more than its weight says its ``product(x)``, which has no bias in it.
        x: (..., I / group.size), or (..., I) where there is no group.
        group: that shares the layer; None calls it as it is.
    """
    if group is None:
        whole: Tensor = layer(x)
        return whole
    product = getattr(layer, "product", None)
    y = reduce_from_tensor_parallel(
        F.linear(x, layer.weight) if product is None else product(x), group
    )
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


@dataclass(frozen=True)
class VocabShard:
    """Which rows of a vocabulary this process holds: the ``rank``-th ceil(V / size) of them, fewer at the end.

    Attributes:
        group: that shares the vocabulary.
        size: V.
    """

    group: Group
    size: int

    @property
    def rows(self) -> int:
        """Rows of the first process, the most that any has: what all must choose alike follows from it."""
        return -(-self.size // self.group.size)

    @property
    def start(self) -> int:
        """The first token of this process."""
        return self.rows * self.group.rank

    @property
    def sizes(self) -> list[int]:
        """Rows of every process of the group."""
        starts = range(0, self.rows * self.group.size, self.rows)
        return [max(0, min(self.rows, self.size - start)) for start in starts]

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of ``ids`` among those of this process, and whether they are there (elsewhere the row is 0).

        Ids below 0 count as the first process's and ids from V on as the last one's, where their look-up fails: an id
        that nobody holds would pass in silence.
        """
        inside = torch.ones_like(ids, dtype=torch.bool)
        if self.group.rank > 0:
            inside &= ids >= self.start
        if self.group.rank < self.group.size - 1:
            inside &= ids < self.start + self.rows
        return torch.where(inside, ids - self.start, 0), inside

    def look_up(self, weight: Tensor, ids: Tensor, padding: int | None = None) -> Tensor:
        """Rows of a table that is cut like the vocabulary, (B, T) -> (B, T, D); the same on all processes.

        Args:
            weight: (rows of this process, D).
            ids: tokens of the whole vocabulary.
            padding: the token whose row look-ups do not train.
        """
        index, inside = self.place(ids)
        if padding is not None:
            padding -= self.start
            padding = padding if 0 <= padding < weight.shape[0] else None
        found = F.embedding(index, weight, padding).masked_fill(~inside.unsqueeze(-1), 0.0)
        return reduce_from_tensor_parallel(found, self.group)

    def gather(self, scores: Tensor) -> Tensor:
        """Scores over the whole vocabulary from those of this process, (..., rows) -> (..., V)."""
        return gather_from_tensor_parallel(scores, self.group, -1, self.sizes)

    def log_softmax(
        self, logits: Tensor, ids: Tensor, index: Tensor, inside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities over the whole vocabulary, without a gradient.

        Args:
            logits: (N, rows) of this process.
            ids: (N, 1) one token each, of the whole vocabulary.
            index: (N, 1) rows of these tokens, from ``place``.
            inside: (N, 1) whether they are there.

        Returns:
            (N, rows) of the tokens of this process, (N,) of the token asked for, (N,) whether that token is the argmax:
            its logit is the largest, and no token with a lower id has the same logit.
        """
        largest, first = logits.max(1, keepdim=True)
        shifted = logits - all_reduce(largest, self.group, largest=True)
        picked = torch.where(inside, shifted.gather(1, index), 0.0).squeeze(1)
        earlier = (shifted.gather(1, first) == 0) & (first + self.start < ids)
        sums, picked, earlier = all_reduce(  # in one message
            torch.stack((shifted.exp().sum(1), picked, earlier.squeeze(1).to(shifted.dtype))),
            self.group,
        ).unbind()
        logs = sums.log()
        return shifted.sub_(logs.unsqueeze(1)), picked - logs, (picked == 0) & (earlier == 0)

    def log_probs(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of one token per row, with a gradient: (N, rows), (N,) -> (N,)."""
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
