"""Dropout and dot-product attention: torch's kernels, and faster computations where a CPU has slow ones.

Shapes: B rows, T queries, S keys, H heads, K heads of keys and values, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.nn.device import has_matrix_tiles, multiplies_bf16_fast

__all__ = ["dot_product_attention", "dropout", "multiplies_rows"]

# Values that 16 random bits have: shares of dropout are multiples of 1 / _LEVELS.
_LEVELS = 1 << 16
# Keys up to which products are faster than torch's kernel, and the weights take less memory than other activations.
_KEYS = 512
# With matrix tiles torch's kernel multiplies by them, and nobody has measured products beside it.
_FAST_BF16 = multiplies_bf16_fast(torch.device("cpu")) and not has_matrix_tiles()


def dropout(x: Tensor, share: float, training: bool = True) -> Tensor:
    """Set this share of the values to 0 in training, and divide the others by the rest (JMLR 15:56, 2014).

    A CPU draws four values with each random word; torch draws each for itself, which takes six times as long.
    """
    if not training or not share:
        return x
    if not x.is_cpu or torch.compiler.is_compiling() or not 0 < share < 1 - 1 / _LEVELS:
        return F.dropout(x, share)
    return x * _factors(x.shape, share, x.dtype)


def _factors(shape: Sequence[int], share: float, dtype: torch.dtype) -> Tensor:
    """Draw the factors of dropout by torch's global generator: 0 for this share, else the same number."""
    shape = torch.Size(shape)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped = round(share * _LEVELS)
    kept = words.view(torch.int16)[: shape.numel()].ge_(dropped - _LEVELS // 2)
    return kept.view(shape).to(dtype).mul_(_LEVELS / (_LEVELS - dropped))


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, causal: bool, scale: float, drop: float
) -> Tensor:
    """Compute attention: q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d); K divides H.

    Args:
        q: queries.
        k: keys.
        v: values.
        added: (B|1, H|1, T|1, S) added to the scores, or None.
        causal: query i attends to the keys up to i; without ``added``.
        scale: factor on the scores.
        drop: share of the attention weights that is dropped.
    """
    fixed = added is None or not added.requires_grad
    if q.shape[2] > 1 and fixed and multiplies_rows(q.device, q.dtype, k.shape[2]):
        factors = _factors(_weights_shape(q, k), drop, q.dtype) if drop else None
        mixed: Tensor = _products(q, k, v, added, factors, causal, scale)[0]
        return mixed
    # The literal True, because torch.compile may treat the condition as symbolic.
    how: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": added}
    how["enable_gqa"] = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=scale, **how)


def multiplies_rows(device: torch.device, dtype: torch.dtype, keys: int) -> bool:
    """Return whether attention to so many keys is computed by products of whole rows.

    In bf16 on a CPU torch's kernel multiplies block by block, and its backward pass takes three times as long as these
    products. They keep the attention weights for it: 2 bytes for each pair of a query and a key.
    """
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and keys <= _KEYS
        and _FAST_BF16
        and not torch.compiler.is_exporting()
    )


def _attend_by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    added: Tensor | None,
    factors: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the result and the weights before dropout, (B * K, H / K * T, S); scores and softmax are fp32."""
    with torch.autocast("cpu", enabled=False):
        scores = torch.bmm(_stacked(q, k).float().mul_(scale), _stacked(k, k).float().mT)
        whole = scores.view(*q.shape[:3], -1)
        if added is not None:
            whole += added.float()
        if causal:
            whole += _later(q.shape[2])
        weights = torch.softmax(scores, -1, out=scores).to(q.dtype)
        mixed = torch.bmm(weights if factors is None else weights * factors, _stacked(v, k))
    return mixed.view(q.shape), weights


def _fake_results(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_weights_shape(q, k))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, factors, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, factors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, factors, weights = ctx.saved_tensors
    grad = _stacked(grad, k)
    grad_v = torch.bmm((weights if factors is None else weights * factors).mT, grad)
    grad_weights = torch.bmm(grad, _stacked(v, k).mT)
    if factors is not None:
        grad_weights = grad_weights * factors
    slope = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_q = torch.bmm(slope, _stacked(k, k)) * ctx.scale
    grad_k = torch.bmm(slope.mT, _stacked(q, k)) * ctx.scale
    return grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape), *[None] * 4


# One operation to torch, so that activation checkpointing keeps or repeats it whole and a compiled graph contains it.
# The decorator custom_op does the same, and imports torch's compiler at the first call, which takes a second.
_OP = "pretrain::attend_by_products"
if not hasattr(torch.ops.pretrain, "attend_by_products"):  # else this module is loaded again
    _SCHEMA = torch.library.infer_schema(_attend_by_products, mutates_args=())
    torch.library.define(_OP, _SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_OP, "cpu", _attend_by_products)
    torch.library.register_fake(_OP, _fake_results)
    torch.library.register_autograd(_OP, _gradients, setup_context=_keep)
_products = torch.ops.pretrain.attend_by_products


def _weights_shape(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return k.shape[0] * k.shape[1], q.shape[1] * q.shape[2] // k.shape[1], k.shape[2]


def _stacked(x: Tensor, k: Tensor) -> Tensor:
    """Put the heads that share keys below each other: (B, H, T, d) -> (B * K, H / K * T, d)."""
    return x.reshape(k.shape[0] * k.shape[1], -1, x.shape[3])


@functools.lru_cache(maxsize=8)
def _later(length: int) -> Tensor:
    """Return (T, T) fp32: -inf where the key is later than the query, else 0."""
    return torch.full((length, length), float("-inf")).triu_(1)
