"""Triton kernel of the softmax cross entropy over a chunk of logits, for CUDA devices.

The eager computation makes several passes over fp32 copies of the logits. The kernel reads each row twice in its own
dtype: once for the log-sum-exp (online softmax, arXiv 1805.02867), the target and the argmax, and once to overwrite the
logits with their gradient. Softmax and loss are computed in fp32.

Triton comes with the CUDA builds of torch. It is imported by ``pretrain.nn.loss`` on a CUDA device only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy_"]

# Columns of a row that are in registers at a time.
_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits,
    stride,
    labels,
    losses,
    hits,
    softcap,
    lift,
    columns: tl.constexpr,
    ignored: tl.constexpr,
    capped: tl.constexpr,
    gradient: tl.constexpr,
    block: tl.constexpr,
):
    # One program computes one row.
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    valid = label != ignored
    top = -float("inf")
    total = 0.0
    picked = 0.0
    best = tl.full((), 0, tl.int32)
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        inside = at < columns
        x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
        if capped:
            squashed = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # tanh
            x = tl.where(inside, squashed, -float("inf"))
        peak = tl.max(x, 0)
        # The lowest id wins among equal logits, as in torch.argmax.
        first = tl.min(tl.where(x == peak, at, columns), 0)
        best = tl.where(peak > top, first, best)
        above = tl.maximum(top, peak)
        total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above), 0)
        picked += tl.sum(tl.where(at == label, x, 0.0), 0)
        top = above
    log_sum = top + tl.log(total)
    # Rows are selected, not multiplied by zero: an ignored row may hold a NaN, and 0 * NaN is NaN.
    tl.store(losses + row, tl.where(valid, log_sum - picked, 0.0))
    tl.store(hits + row, tl.where(valid & (best == label), 1.0, 0.0))
    if gradient:
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            inside = at < columns
            x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
            if capped:
                x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
            grad = tl.exp(x - log_sum) - tl.where(at == label, 1.0, 0.0)
            if capped:
                grad = grad * (1.0 - (x / softcap) * (x / softcap))
            grad = tl.where(valid, grad * lift, 0.0)
            tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    ignored: int = -100,
    softcap: float | None = None,
    lift: float = 1.0,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the number of hits, and overwrite the logits with ``lift`` times their gradient.

    Args:
        logits: (n, V), the rows contiguous; before the softcap.
        labels: (n,) int64 target ids.
        ignored: label of rows without a loss, whose gradient is zero.
        softcap: logits become ``softcap * tanh(logits / softcap)`` when given.
        lift: factor on the gradient, which fp16 needs for small probabilities.
        gradient: False leaves the logits as they are.

    Returns:
        Loss in nats and number of targets that are the argmax, fp32 scalars.
    """
    rows, columns = logits.shape
    losses, hits = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    launch: Any = _cross_entropy[(rows,)]
    with torch.cuda.device(logits.device if logits.is_cuda else -1):  # where Triton launches
        launch(
            *(logits, logits.stride(0), labels, losses, hits),
            *(1.0 if softcap is None else softcap, lift),
            columns=columns,
            ignored=ignored,
            capped=softcap is not None,
            gradient=gradient,
            block=min(_BLOCK, triton.next_power_of_2(columns)),
            num_warps=8,
        )
    return losses.sum(), hits.sum()
