"""Attention per document over packed rows: a dense mask over a row of T tokens costs T² whatever is in it.

A GPU has a kernel for sequences of different lengths, FlashAttention's (arXiv 2307.08691). A CPU has none: there the
documents are gathered into buckets of similar length, each bucket is one padded batch, and the results are scattered
back.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.nn.device import has_matrix_tiles
from pretrain.nn.kernels import dot_product_attention, multiplies_rows

__all__ = [
    "Buckets",
    "attend_packed",
    "attend_sequences",
    "has_sequence_kernel",
    "is_worthwhile",
    "plan",
    "sequence_offsets",
]

# Costs in units of one query-key pair, measured on a CPU: moving a token in and out of its bucket (forward and
# backward), and a further bucket: one call of torch's kernel in fp32, or the products in bf16.
_TOKEN, _KERNEL_CALL, _PRODUCTS = 60.0, 2500.0, 25000.0
# Products in bf16 are compiled for each new shape, so the widths of their buckets are multiples of this.
_WIDTH_STEP = 16


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


def plan(documents: Tensor, dtype: torch.dtype = torch.float32) -> Buckets | None:
    """Sort the documents of a batch into the buckets that cost least.

    Args:
        documents: (B, T) ids on the CPU, 0 is padding.
        dtype: of the queries.

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
    order = np.argsort(sizes, kind="stable")
    starts, sizes = starts[order], sizes[order]
    cuts, widths = _cheapest_buckets(sizes, dtype)
    shapes = [(int(b - a), int(w)) for a, b, w in zip(cuts[:-1], cuts[1:], widths, strict=True)]
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


def _cheapest_buckets(sizes: np.ndarray, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Cut ``sizes``, in ascending order, into the buckets whose costs have the lowest sum.

    Returns:
        The first document of each bucket followed by the number of documents, and the width of each bucket.
    """
    step = _WIDTH_STEP if _has_products(dtype) else 1
    # A bucket may end at eight sizes for each doubling: more would cost more to try than they save.
    grain = np.maximum(8, 2 ** np.maximum(np.ceil(np.log2(sizes)).astype(np.int64) - 3, 0))
    grown = -(-sizes // grain) * grain
    ends = np.append(np.flatnonzero(grown[1:] != grown[:-1]) + 1, sizes.size)
    widths = -(-sizes[ends - 1] // step) * step
    begins = np.append(0, ends[:-1])
    # costs[i] is the lowest cost of the documents before begins[i], origins[i] where the last bucket of ends[i] begins.
    costs, origins = np.zeros(1), []
    for i, (end, width) in enumerate(zip(ends, widths, strict=True)):
        sums = costs + _cost(end - begins[: i + 1], width, dtype)
        origins.append(int(sums.argmin()))
        costs = np.append(costs, sums.min())
    cuts, chosen, i = [int(sizes.size)], [], ends.size
    while i:
        chosen.append(int(widths[i - 1]))
        i = origins[i - 1]
        cuts.append(int(begins[i]))
    return cuts[::-1], chosen[::-1]


def _has_products(dtype: torch.dtype) -> bool:
    return multiplies_rows(torch.device("cpu"), dtype, 0)


def _cost(documents: Any, width: Any, dtype: torch.dtype) -> Any:
    """Return the cost of a bucket of so many documents padded to ``width`` tokens, in query-key pairs."""
    call = _PRODUCTS if _has_products(dtype) else _KERNEL_CALL
    return documents * width * (width + _TOKEN) + call


def is_worthwhile(buckets: Buckets, row_length: int, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether attention per document costs less than a dense mask over rows of ``row_length`` tokens."""
    cost = sum(_cost(count, width, dtype) for count, width in buckets.shapes)
    return bool(cost < buckets.places * row_length)


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
    half = given in (torch.bfloat16, torch.float16)
    if half and not has_matrix_tiles() and not _has_products(given):
        # There torch's kernel is slower in half precision than in fp32, for short documents.
        q, k, v = q.float(), k.float(), v.float()
    gathered = [_into(part, buckets) for part in (q, k, v)]
    counts = [n * width for n, width in buckets.shapes]
    parts = [torch.split(g, counts) for g in gathered]
    outputs = []
    for i, (n, width) in enumerate(buckets.shapes):
        a, b, c = (part[i].view(n, width, -1, size).transpose(1, 2) for part in parts)
        added = buckets.scores(i, causal, window, q.dtype)
        mixed = dot_product_attention(a, b, c, added, causal and added is None, scale, dropout)
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


# ---------------------------------------------------------------------------- on a GPU


def sequence_offsets(documents: Tensor) -> Tensor | None:
    """Return the first token of each document in the flattened batch, and the number of tokens: (N + 1,) int32.

    A run of padding counts as a document. The end is repeated up to a power of two, so that few lengths occur: an
    empty document costs nothing, and a compiled graph is used again.

    Args:
        documents: (B, T) ids, 0 is padding. On a GPU the call waits for the device; on a CPU it does not.

    Returns:
        The offsets on the device of ``documents``, or None if the tokens of an id are not contiguous in a row.
    """
    rows, length = documents.shape
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = new.flatten().nonzero().squeeze(1)
    owner = torch.stack((starts // length, documents.flatten()[starts]))
    owner = owner[:, owner[1] != 0]
    if len(torch.unique(owner, dim=1)[0]) < owner.shape[1]:
        return None
    size = max(64, 1 << len(starts).bit_length())
    offsets = torch.full((size,), rows * length, dtype=torch.int32, device=documents.device)
    offsets[: len(starts)] = starts
    return offsets


def attend_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Compute attention within each document by the kernel for sequences, (B, H, T, d) -> (B, H, T, d)."""
    rows, heads, length, size = q.shape
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    flat = [x.transpose(1, 2).reshape(rows * length, heads, size) for x in (q, k, v)]
    narrow = None if window is None or window >= length - 1 else window
    right = 0 if causal else narrow
    # torch.nn.attention.varlen calls the same operator, without dropout, and chooses another one for encoders since
    # torch 2.14. The longest possible document is given, not the longest one, which differs from batch to batch.
    mixed: Tensor = torch.ops.aten._flash_attention_forward(
        *(*flat, offsets, offsets, length, length, dropout, causal, False),
        scale=scale,
        window_size_left=-1 if narrow is None else narrow,
        window_size_right=-1 if right is None else right,
    )[0]
    return mixed.view(rows, length, heads, size).transpose(1, 2)


@functools.cache
def has_sequence_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether ``attend_sequences`` runs there and agrees with a dense mask."""
    if (
        device.type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or head_dim % 8
        or head_dim > 256
        or torch.cuda.get_device_capability(device)[0] < 8
    ):
        return False
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
        ):
            _check_sequence_kernel(device, dtype, head_dim)
    except (RuntimeError, AssertionError, TypeError) as error:
        warnings.warn(
            f"FlashAttention for documents of different lengths cannot be used on {device}, so attention computes a "
            f"dense mask, which is slower: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


def _check_sequence_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Compare ``attend_sequences`` and its gradients with a dense mask on two small rows; raise where they differ."""
    documents = torch.tensor([[1] * 40 + [2] * 50 + [3] * 6, [1] * 70 + [0] * 26], device=device)
    offsets = sequence_offsets(documents)
    assert offsets is not None
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 2, 96, head_dim, generator=generator) for _ in range(4)]
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    column = torch.arange(96, device=device)
    away = column[:, None] - column
    for causal, window in ((False, None), (True, None), (False, 7), (True, 7)):
        seen = same & (away >= 0) if causal else same
        seen = seen if window is None else seen & (away.abs() <= window)
        found = []
        for kernel in (True, False):
            q, k, v, out = (p.to(device, dtype).requires_grad_() for p in parts)
            if kernel:
                mixed = attend_sequences(q, k, v, offsets, causal, window, 0.1, 0.0)
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.1)
            found.append([mixed.detach(), *torch.autograd.grad(mixed, (q, k, v), out.detach())])
        torch.testing.assert_close(found[0], found[1], rtol=3e-2, atol=3e-2)
