"""Cross entropy over a large vocabulary without materialising all logits.

The projection onto the vocabulary, the softmax and the gradients of both are computed chunk by chunk in the
forward pass, so the largest buffer is one chunk of logits instead of (N, V) logits, their softmax and their
gradient. The idea is that of Liger Kernel (arXiv 2410.10989) and of cut cross entropy (arXiv 2411.09009).
The implementation is plain torch, so it runs on every device; on CUDA one Triton kernel (``loss_kernel``) replaces the
softmax and its gradient.

Letters: N targets, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import nn
from pretrain.nn.tensor_parallel import VocabShard, copy_to_tensor_parallel

__all__ = ["CHUNK_BYTES", "CHUNK_ROWS", "IGNORE", "WIDE", "chunked_cross_entropy"]

IGNORE = -100
# Bytes of a chunk of logits, which its gradient replaces: as many as malloc keeps, and as a GPU multiplies fast.
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
# Fewest targets in a chunk: each chunk adds a whole (V, D) matrix to the gradient of the weight.
CHUNK_ROWS = 128
# Numbers that are in fp32 at the same time: they stay in a CPU's cache.
WIDE = {"cpu": 1 << 20}


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    vocab: VocabShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of ``labels`` under ``softmax(hidden @ weight.T + bias)``.

    Under autocast the products run in the autocast type; the softmax is always fp32.

    Args:
        hidden: (N, D) features at the target positions.
        weight: (V, D) output projection, often the tied embedding.
        labels: (N,) target ids; -100 is ignored.
        bias: (V,) or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` when given.
        chunk: targets in one chunk; chosen from V and the device when None.
        vocab: vocabulary sharding of tensor parallelism: ``weight`` and ``bias`` hold the rows of this rank; the other
            arguments and the result are the same on all ranks of the group.

    Returns:
        ``(total, correct)``: the summed loss in nats (fp32 scalar with a gradient) and the number of targets
        that are the argmax of their logits (fp32 scalar without one; of equal logits the lowest id counts, as in
        ``torch.argmax``). Both are zero without targets.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if chunk is None:
        # All ranks that share a vocabulary must use the same chunks, although the last ones may hold fewer rows.
        rows = weight.shape[0] if vocab is None else vocab.rows
        most = max(CHUNK_ROWS, CHUNK_BYTES.get(device, 1 << 26) // dtype.itemsize // max(1, rows))
        chunk = math.ceil(len(hidden) / max(1, round(len(hidden) / most)))
    kernel = _kernel(hidden.device) if vocab is None else None
    kernel = kernel or functools.partial(_cross_entropy_, vocab=vocab)
    if vocab is not None:
        hidden = copy_to_tensor_parallel(hidden, vocab.group)
    total, correct = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, softcap, chunk, torch.is_grad_enabled(), kernel, dtype
    )
    return total, correct


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        chunk: int,
        grad_enabled: bool,  # passed in, because autograd disables gradients inside forward
        kernel: Callable[..., tuple[Tensor, Tensor]],
        dtype: torch.dtype,  # of the products
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        needs_hidden, needs_weight, needs_bias = (
            grad_enabled and needed for needed in ctx.needs_input_grad[:3]
        )
        # Gradients are scaled up in fp16: probabilities below its range would underflow before loss scaling applies.
        lift = 1024.0 if dtype is torch.float16 else 1.0
        with_grad = needs_hidden or needs_weight or needs_bias
        with torch.autocast(device, enabled=False):
            low_weight = weight.to(dtype)
            wide = torch.float32 if dtype is torch.float16 else hidden.dtype
            grad_hidden = torch.empty_like(hidden, dtype=wide) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if needs_bias else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
            # All chunks share one buffer: pages that the system has yet to clear cost a CPU more than the product.
            room = low_weight.new_empty((min(chunk, len(hidden)), len(low_weight)))
            for start in range(0, len(hidden), max(1, chunk)):
                part = hidden[start : start + chunk].to(dtype)
                logits = torch.mm(part, low_weight.T, out=room[: len(part)])  # (n, V)
                if bias is not None:
                    logits += bias.to(dtype)
                target = labels[start : start + chunk]
                loss, hits = kernel(logits, target, softcap=softcap, lift=lift, gradient=with_grad)
                total += loss
                correct += hits
                if not with_grad:
                    continue
                grad = logits  # replaced by its gradient, times lift
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = (grad @ low_weight).to(wide) / lift
                if grad_weight is not None and dtype is grad_weight.dtype:
                    grad_weight.addmm_(grad.T, part)
                elif grad_weight is not None:
                    # A CPU widens and adds as many rows of the product as its cache holds.
                    rows = max(1, WIDE.get(device, grad_weight.numel()) // len(part[0]))
                    for at in range(0, len(grad_weight), rows):
                        product = grad[:, at : at + rows].T @ part
                        grad_weight[at : at + rows].add_(product, alpha=1.0 / lift)
                if grad_bias is not None:
                    grad_bias.add_(grad.sum(0, dtype=torch.float32), alpha=1.0 / lift)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (g if g is None else (g * grad_total.to(g.dtype)).to(dtype) for g, dtype in grads)
        return *scaled, *[None] * 6


def _cross_entropy_(
    logits: Tensor,
    target: Tensor,
    *,
    softcap: float | None,
    lift: float,
    gradient: bool,
    vocab: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    """Do in plain torch what the Triton kernel does, with fp32 copies of a few rows at a time."""
    columns = logits.shape[1] if vocab is None else vocab.rows
    rows = max(1, WIDE.get(logits.device.type, 1 << 26) // columns)
    total, correct = torch.zeros(2, device=logits.device)
    for part, ids in zip(torch.split(logits, rows), torch.split(target, rows), strict=True):
        loss, hits, grad = _chunk(part, ids, softcap, gradient, vocab)
        total += loss
        correct += hits
        if gradient:
            part.copy_(grad if lift == 1.0 else grad * lift)
    return total, correct


def _chunk(
    logits: Tensor,
    target: Tensor,
    softcap: float | None,
    with_grad: bool,
    vocab: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, hits and the gradient with respect to the raw logits of one chunk, (n, V) -> (n, V).

    fp32 logits are overwritten.
    """
    logits = logits.float()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    valid = target != IGNORE
    index = target.clamp_min(0).unsqueeze(1)  # (n, 1)
    # Of the soft cap; the softmax replaces what it is computed from.
    slope = 1 - (capped / softcap).square() if softcap is not None and with_grad else None
    if vocab is None:
        loss, correct, grad = _softmax_(capped, index)
        minus = torch.full_like(index, -1, dtype=grad.dtype)
    else:
        ids = index
        index, inside = vocab.place(ids)
        log_probs, picked, correct = vocab.log_softmax(capped, ids, index, inside)
        loss, minus = -picked, -inside.to(log_probs.dtype)
        grad = log_probs.exp_() if with_grad else log_probs
    loss = torch.where(valid, loss, torch.zeros_like(loss)).sum()
    hits = (correct & valid).sum().float()
    if not with_grad:
        return loss, hits, grad  # not used
    grad.scatter_add_(1, index, minus)
    if slope is not None:
        grad = grad * slope
    if not (valid.is_cpu and bool(valid.all())):
        # Rows are filled, not multiplied by zero: an ignored row may hold a NaN, and 0 * NaN is NaN.
        grad.masked_fill_(~valid.unsqueeze(1), 0.0)
    return loss, hits, grad


def _softmax_(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the cross entropy of (n, V) logits, which are overwritten, with the targets ``index`` (n, 1).

    Returns:
        The losses (n,), whether the targets are the argmax (n,), and the softmax (n, V). Of equal logits the lowest id
        is the argmax: bf16 logits tie often, and a comparison with the largest logit alone would count several tokens.
    """
    picked = logits.gather(1, index)
    others = logits.scatter_(1, index, float("-inf")).amax(1, keepdim=True)
    logits.scatter_(1, index, picked)
    if logits.is_cpu:
        # There argmax costs ten times as much as amax, so it runs only on rows in which another logit is equal.
        correct = (picked > others).squeeze(1)
        if len(rows := (picked == others).squeeze(1).nonzero().squeeze(1)):
            correct[rows] = logits[rows].argmax(1, keepdim=True).eq(index[rows]).squeeze(1)
    else:
        correct = logits.argmax(1, keepdim=True).eq(index).squeeze(1)
    # One call costs less than exp, sum and division; its largest value is 1 / sum(exp(logits - largest)). A CPU
    # computes it row by row, so it needs no second buffer, whose pages would cost more than the rest.
    probs = torch.softmax(logits, 1, out=logits if logits.is_cpu else None)
    loss = torch.maximum(picked, others) - picked - probs.amax(1, keepdim=True).log()
    return loss.squeeze(1), correct, probs


@functools.cache
def _kernel(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the Triton kernel for a device, or None where it cannot run or does not agree with ``_chunk``."""
    if device.type != "cuda" or torch.version.hip:
        return None
    try:
        kernel = nn.loss_kernel.cross_entropy_
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(8, 1000, generator=generator).to(device, torch.bfloat16)
        labels = torch.tensor([0, 999, IGNORE, 7, 5, 300, IGNORE, 998], device=device)
        loss, hits, grad = _chunk(logits, labels, 5.0, True, None)
        found = kernel(logits, labels, softcap=5.0)
        torch.testing.assert_close(found, (loss, hits), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits.float(), grad, rtol=2e-2, atol=1e-4)
    except Exception as error:  # Triton needs a C compiler, and raises errors of many classes
        warnings.warn(
            f"The fused kernel of the loss cannot be used on {device}, so the slower eager computation is: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
    return kernel
