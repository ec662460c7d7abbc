"""Attention per document over packed rows, for CPUs, which have no variable-length kernel.

A dense mask over a row of T tokens costs T² whatever the documents in it. Here the documents are gathered into
buckets of similar length, each bucket is one padded batch, and the results are scattered back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.nn.device import has_matrix_tiles

__all__ = ["Buckets", "attend_packed", "pays", "plan"]

# Costs in units of one query-key pair, measured on a CPU: moving a token in and out of its bucket (forward and
# backward), and one additional kernel call.
_TOKEN, _CALL = 60.0, 2500.0


@dataclass(frozen=True)
class Buckets:
    """Assignment of the real tokens of a batch to slots in buckets.

    Attributes:
        tokens: (N,) indices of the real tokens in the flattened (B · T) batch; None if all are real.
        slots: (N,) their indices among the slots of all buckets.
        places: B · T.
        total: number of slots, padding included.
        shapes: (documents, length) of each bucket.
        lengths: (documents,) real lengths in each bucket.
    """

    tokens: Tensor | None
    slots: Tensor
    places: int
    total: int
    shapes: tuple[tuple[int, int], ...]
    lengths: tuple[Tensor, ...]
    _memo: dict[Any, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def scores(
        self, bucket: int, causal: bool, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Return the additive mask of a bucket, or None if the causal mask alone, or no mask, is needed."""
        _, length = self.shapes[bucket]
        narrow = window is not None and window < length - 1
        sizes = self.lengths[bucket]
        if not narrow and (causal or bool((sizes == length).all())):
            return None
        key = (bucket, window if narrow else None, dtype)
        if key not in self._memo:
            column = torch.arange(length)
            seen = (column < sizes[:, None])[:, None, None, :]  # (n, 1, 1, L)
            if narrow and window is not None:
                distance = column[:, None] - column
                seen = seen & (distance.abs() <= window)
                if causal:
                    seen = seen & (distance >= 0)
                # Padding attends to itself: a row of the softmax without any key would be NaN.
                seen = seen | (distance == 0)
            added = torch.zeros(seen.shape, dtype=dtype)
            self._memo[key] = added.masked_fill_(~seen, float("-inf"))
        return self._memo[key]


def plan(documents: Tensor) -> Buckets | None:
    """Sort the documents of a batch into buckets.

    Args:
        documents: (B, T) ids on the CPU, 0 is padding.

    Returns:
        The plan, or None if there are no real tokens or the tokens of an id are not contiguous in a row.
    """
    ids = documents.numpy()
    length = ids.shape[1]
    flat = ids.reshape(-1)
    first = np.ones(ids.shape, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(first.reshape(-1))
    sizes = np.diff(np.append(starts, flat.size))
    real = flat[starts] != 0
    starts, sizes = starts[real], sizes[real]
    if starts.size == 0:
        return None
    owner = np.stack((starts // length, flat[starts]))
    if np.unique(owner, axis=1).shape[1] < starts.size:
        return None
    # Bucket widths grow in steps of an eighth to a quarter, which limits the padding in a bucket.
    step = np.maximum(8, 2 ** np.maximum(np.ceil(np.log2(sizes)).astype(np.int64) - 3, 0))
    width = -(-sizes // step) * step
    order = np.argsort(width, kind="stable")
    starts, sizes, width = starts[order], sizes[order], width[order]
    cuts = np.append(np.flatnonzero(np.append(True, width[1:] != width[:-1])), width.size)
    shapes = [(int(b - a), int(sizes[a:b].max())) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    total = sum(n * size for n, size in shapes)
    begin = np.concatenate([np.full(n, size) for n, size in shapes]).cumsum()
    begin = np.concatenate(([0], begin[:-1]))
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    tokens = np.repeat(starts, sizes) + within
    slots = np.repeat(begin, sizes) + within
    if tokens.size == flat.size:
        # All tokens are real: order the slots by token, so that no tokens need to be selected.
        ordered = np.empty_like(slots)
        ordered[tokens] = slots
        slots = ordered
    return Buckets(
        None if tokens.size == flat.size else torch.from_numpy(tokens),
        torch.from_numpy(slots),
        flat.size,
        total,
        tuple(shapes),
        tuple(torch.from_numpy(sizes[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)),
    )


def pays(buckets: Buckets, row_length: int) -> bool:
    """Return whether attention per document costs less than a dense mask over rows of ``row_length`` tokens."""
    pairs = sum(n * length * length for n, length in buckets.shapes)
    cost = pairs + _TOKEN * buckets.total + _CALL * len(buckets.shapes)
    return cost < buckets.places * row_length


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Buckets,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Compute attention within each document, (B, H, T, d) -> (B, H, T, d); padding gets zeros."""
    rows, heads, length, size = q.shape
    given = q.dtype
    if given in (torch.bfloat16, torch.float16) and not has_matrix_tiles():
        # Without hardware matrix tiles, attention over short documents is slower in half precision than in fp32.
        q, k, v = q.float(), k.float(), v.float()
    gathered = [_into(part, buckets) for part in (q, k, v)]
    counts = [n * width for n, width in buckets.shapes]
    parts = [torch.split(g, counts) for g in gathered]
    outputs = []
    for i, (n, width) in enumerate(buckets.shapes):
        a, b, c = (part[i].view(n, width, -1, size).transpose(1, 2) for part in parts)
        added = buckets.scores(i, causal, window, q.dtype)
        mixed = F.scaled_dot_product_attention(
            a,
            b,
            c,
            attn_mask=added,
            dropout_p=dropout,
            is_causal=causal and added is None,
            scale=scale,
            enable_gqa=b.shape[1] != a.shape[1],
        )
        outputs.append(mixed.transpose(1, 2).reshape(n * width, heads * size))
    whole: Tensor = _Move.apply(  # type: ignore[no-untyped-call]
        torch.cat(outputs), buckets, False
    )
    return whole.to(given).view(rows, length, heads, size).transpose(1, 2)


def _into(x: Tensor, buckets: Buckets) -> Tensor:
    """Gather (B, H, T, d) into (slots, H · d), with zeros in the padding of buckets."""
    flat = x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1] * x.shape[3])
    moved: Tensor = _Move.apply(  # type: ignore[no-untyped-call]
        flat, buckets, True
    )
    return moved


class _Move(torch.autograd.Function):
    """Copy vectors from tokens to slots or back; each direction is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buckets: Buckets, inwards: bool) -> Tensor:
        ctx.buckets, ctx.inwards = buckets, inwards
        return _move(x, buckets, inwards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _move(grad, ctx.buckets, not ctx.inwards), None, None


def _move(x: Tensor, buckets: Buckets, inwards: bool) -> Tensor:
    if inwards:
        source = x if buckets.tokens is None else x.index_select(0, buckets.tokens)
        return x.new_zeros(buckets.total, x.shape[1]).index_copy_(0, buckets.slots, source)
    taken = x.index_select(0, buckets.slots)
    if buckets.tokens is None:
        return taken
    return x.new_zeros(buckets.places, x.shape[1]).index_copy_(0, buckets.tokens, taken)
