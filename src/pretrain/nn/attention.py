"""Attention (arXiv 1706.03762) with grouped keys (2305.13245), windows, packed documents and a key-value cache.

A batch has one ``AttentionMask``; ``attend`` selects the kernel from it, the shapes, the dtype and the device:

- nothing masked, or only later tokens: ``dot_product_attention`` (``kernels``), by a kernel of torch or by products;
- documents: per document, on a CPU where that costs less, on CUDA by FlashAttention in half precision (``packed``);
- all else (a bias, fp32 on CUDA, a key-value cache): ``dot_product_attention`` with a dense mask.

Shapes: B rows, T queries, S keys, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ModelError
from pretrain.nn.kernels import dot_product_attention
from pretrain.nn.norm import RMSNorm
from pretrain.nn.packed import (
    Buckets,
    attend_packed,
    attend_sequences,
    has_sequence_kernel,
    is_worthwhile,
    plan,
    sequence_offsets,
)
from pretrain.nn.positions import Rope, rotate
from pretrain.nn.tensor_parallel import Group, copy_to_tensor_parallel, row_linear

__all__ = ["Attention", "AttentionMask", "KVCache", "attend"]


@dataclass(frozen=True)
class AttentionMask:
    """Which keys each query attends to; built once per batch and shared by all blocks.

    Columns are absolute: with S keys and T queries (T < S with a cache), query i is at column S - T + i.

    Attributes:
        causal: a query attends to no later column.
        documents: (B, S) ids; a query attends only to keys with its own id. Padding has the id 0 and attends to
            padding, so that no row of the softmax is empty.
        window: a query attends to the columns at distance <= window; None is no limit.
        bias: (B|1, H|1, T, S) added to the scores.
        offsets: first tokens of the documents, as ``packed.sequence_offsets`` returns them; None if not yet known.
    """

    causal: bool = False
    documents: Tensor | None = None
    window: int | None = None
    bias: Tensor | None = None
    offsets: Tensor | None = None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_batch(
        cls, batch: Mapping[str, Tensor], *, causal: bool, past: int = 0
    ) -> AttentionMask:
        """Build from ``document_ids``, or else from ``attention_mask``; without both, ``documents`` is None.

        On a CPU, ids that cannot change the result are dropped: a single document everywhere, and for a causal model
        also padding on the right, which no real token attends to.

        Raises:
            ModelError: the ids do not cover the cached and the new columns.
        """
        documents = batch.get("document_ids")
        name = "document_ids"
        if documents is None:
            documents, name = batch.get("attention_mask"), "attention_mask"
        if documents is None:
            return cls(causal)
        columns = past + batch["input_ids"].shape[1]
        if documents.ndim != 2 or documents.shape[1] != columns:
            raise ModelError(
                f"{name} has the shape {tuple(documents.shape)}; it must have two dimensions and {columns} columns, "
                f"one for each token ({past} cached, {columns - past} new)."
            )
        if documents.dtype == torch.bool or documents.is_floating_point():
            documents = documents.long()
        first = documents[:, :1]
        if not documents.is_cpu or torch.compiler.is_exporting():
            # Inspecting the ids would synchronise the accelerator, and a traced graph must hold for other ids; the
            # collate function drops ids without an effect before they get there.
            return cls(causal, documents, offsets=batch.get("document_offsets"))
        if causal:
            same = documents == first
            # True if each row is one document followed by padding.
            plain = (same | (documents == 0)).all() & (same[:, 1:] <= same[:, :-1]).all()
        else:
            plain = (documents == first).all()
        return cls(causal, None if bool(plain) else documents)

    def windowed(self, window: int | None) -> AttentionMask:
        """Return the same mask with another window; cached."""
        if window == self.window:
            return self
        key = ("windowed", window)
        if key not in self._memo:
            self._memo[key] = AttentionMask(
                self.causal, self.documents, window, self.bias, self.offsets, _shared=self._shared
            )
        found: AttentionMask = self._memo[key]
        return found

    def dense(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Return (B|1, 1, T, S) booleans, True where a query attends to a key; None if nothing is masked. Cached."""
        if torch.compiler.is_exporting():  # sizes are symbols, which are no keys
            return self._dense(queries, keys, device)
        memo_key = ("dense", queries, keys, device)
        if memo_key not in self._memo:
            self._memo[memo_key] = self._dense(queries, keys, device)
        found: Tensor | None = self._memo[memo_key]
        return found

    def _dense(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        mask: Tensor | None = None
        window = self.window if self.window is not None and self.window < keys - 1 else None
        if (self.causal and queries > 1) or window is not None:
            row = torch.arange(keys - queries, keys, device=device)[:, None]
            column = torch.arange(keys, device=device)
            if self.causal:
                mask = column <= row
                if window is not None:
                    mask = mask & (column >= row - window)
            else:
                mask = (column - row).abs() <= (keys if window is None else window)
            mask = mask[None, None]
        if self.documents is not None:
            ids = self.documents.to(device)
            same = (ids[:, keys - queries :, None] == ids[:, None, :])[:, None]
            mask = same if mask is None else mask & same
        return mask

    def scores(
        self, queries: int, keys: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """Return the additive mask in ``dtype``: 0 or -inf from ``dense``, plus ``bias``; None without both. Cached."""
        if torch.compiler.is_exporting():
            return self._scores(queries, keys, device, dtype)
        memo_key = ("scores", queries, keys, device, dtype)
        if memo_key not in self._memo:
            self._memo[memo_key] = self._scores(queries, keys, device, dtype)
        found: Tensor | None = self._memo[memo_key]
        return found

    def _scores(
        self, queries: int, keys: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        seen = self.dense(queries, keys, device)
        added = None
        if seen is not None:
            added = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(
                ~seen, float("-inf")
            )
        if self.bias is not None:
            added = self.bias.to(dtype) if added is None else added + self.bias.to(dtype)
        return added

    def prepare(
        self, columns: int, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> None:
        """Compute what the kernel needs for self-attention over ``columns`` tokens."""
        if (
            self.only_causal(columns, columns)
            or self.sequences(device, dtype, head_dim) is not None
        ):
            return
        self.scores(columns, columns, device, dtype)

    def sequences(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> Tensor | None:
        """Return the offsets of the documents for FlashAttention, or None if it is not used. Cached, for all windows.

        Without given ``offsets`` the call waits for the device.
        """
        key = ("sequences", device, dtype, head_dim)
        if key not in self._shared:
            found = None
            plain = self.documents is not None and self.bias is None
            if plain and has_sequence_kernel(device, dtype, head_dim):
                found = self.offsets
                if found is None and self.documents is not None:
                    found = sequence_offsets(self.documents)
            self._shared[key] = found
        shared: Tensor | None = self._shared[key]
        return shared

    def buckets(self, dtype: torch.dtype) -> Buckets | None:
        """Return the plan for attention per document, or None if it is not faster. Planned once, for all windows."""
        if "buckets" not in self._shared:
            docs, found = self.documents, None
            if docs is not None and self.bias is None and docs.is_cpu:
                found = plan(docs, dtype)
                if found is not None and not is_worthwhile(found, docs.shape[1], dtype):
                    found = None
            self._shared["buckets"] = found
        shared: Buckets | None = self._shared["buckets"]
        return shared

    @property
    def empty(self) -> bool:
        """Whether nothing is masked and nothing added, whatever the columns."""
        parts = (self.documents, self.window, self.bias)
        return not self.causal and all(part is None for part in parts)

    def only_causal(self, queries: int, keys: int) -> bool:
        """Return whether the mask is the plain lower triangle, for which every kernel has a fast path."""
        narrow = self.window is not None and self.window < keys - 1
        plain = self.documents is None and self.bias is None and not narrow
        return self.causal and plain and queries == keys and queries > 1


class KVCache:
    """Keys and values of earlier tokens, one pair of (B, H_kv, S_max, d) buffers per layer.

    The buffers are allocated at the first ``append``, with the dtype and on the device of its tensors.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H_kv, T, d) and return all keys and values so far, the new ones included.

        ``length`` changes only with ``advance``, after all layers have appended.

        Raises:
            ModelError: the tokens do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ModelError(
                f"The key-value cache has room for {self.max_length} tokens, but {end} are needed. Make a larger one, "
                "or generate fewer tokens."
            )
        if layer not in self._buffers:
            shape = (*k.shape[:2], self.max_length, k.shape[3])
            self._buffers[layer] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self._buffers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more columns as filled."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) the given rows of the batch."""
        self._buffers = {i: (k[rows], v[rows]) for i, (k, v) in self._buffers.items()}


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float, dropout: float
) -> Tensor:
    """Select the kernel and run it: q (B, H, T, d), k and v (B, H_kv, S, d) -> (B, H, T, d)."""
    queries, keys, added = q.shape[2], k.shape[2], None
    causal = mask is not None and mask.only_causal(queries, keys)
    if mask is not None and not causal:
        if queries == keys:
            offsets = mask.sequences(q.device, q.dtype, q.shape[3])
            if offsets is not None:
                return attend_sequences(q, k, v, offsets, mask.causal, mask.window, scale, dropout)
        # The shapes of buckets change with every batch, which a compiled graph could not reuse.
        if q.is_cpu and queries == keys and not torch.compiler.is_compiling():
            buckets = mask.buckets(q.dtype)
            if buckets is not None:
                return attend_packed(q, k, v, buckets, mask.causal, mask.window, scale, dropout)
        added = mask.scores(queries, keys, q.device, q.dtype)
        if added is not None and q.is_cuda and k.shape[1] != q.shape[1]:
            # With a mask, few kernels support grouped keys, and the generic fallback materialises (B, H, T, S) scores.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return dot_product_attention(q, k, v, added, causal, scale, dropout)


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention to a ``context``; (B, T, D) -> (B, T, D).

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: heads of keys and values; divides H.
        head_dim: d.
        bias: biases on all four projections.
        output_bias: bias on the output projection, if not as ``bias`` says.
        qk_norm: RMS norm of each head's queries and keys, before rotation.
        norm_eps: added to the mean square in that norm.
        scale: factor on the scores; d^-½ when None.
        dropout: dropout on the attention weights.

    Attributes:
        parallel: tensor-parallel group that the heads are split over; None if this rank has all of them.
    """

    parallel: Group | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        output_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        out = bias if output_bias is None else output_bias
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=out)
        self.query_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask | None,
        rope: Rope | None = None,
        context: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        if self.parallel is not None:
            x = copy_to_tensor_parallel(x, self.parallel)
            context = None if context is None else copy_to_tensor_parallel(context, self.parallel)
        source = x if context is None else context
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H of this rank, d)
        k = self.key(source).unflatten(-1, (-1, self.head_dim))
        v = self.value(source).unflatten(-1, (-1, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mixed = attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.parallel is not None:
            return row_linear(self.output, mixed, self.parallel)
        projected: Tensor = self.output(mixed)
        return projected
