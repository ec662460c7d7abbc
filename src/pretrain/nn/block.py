"""The transformer block of all families (arXiv 1706.03762; pre-norm: 2002.04745).

Positions, masks and a context are passed to it as tensors, never as options. It contains activation checkpointing
(1604.06174; selective: 2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from pretrain.nn.attention import Attention, AttentionMask, KVCache
from pretrain.nn.kernels import dropout
from pretrain.nn.mlp import MLP
from pretrain.nn.norm import build_norm
from pretrain.nn.positions import Rope

__all__ = ["Block", "BlockConfig", "columns_of", "run_block"]


@dataclass(frozen=True)
class BlockConfig:
    """Options of a block; what only one family has stays in the module of that family.

    Attributes:
        hidden_size: D.
        num_heads: H.
        intermediate_size: width of the feed-forward layer.
        num_kv_heads: heads of keys and values; H when None.
        head_dim: size of a head; D / H when None.
        norm: ``layernorm`` or ``rmsnorm``.
        norm_eps: added to the variance.
        pre_norm: normalise the input of each sub-layer (GPT-2 and later) or the residual sum after it (BERT).
        bias: biases on all projections and layer norms, where the next three are None.
        attention_bias: biases on queries, keys and values, and where ``output_bias`` is None on the output as well.
        output_bias: bias on the output projection of attention.
        norm_bias: biases of the layer norms.
        activation: name in ``mlp.ACTIVATIONS``.
        gated: the feed-forward layer has a gate.
        qk_norm: normalise queries and keys per head.
        attention_scale: factor on the scores; head_dim^-½ when None.
        cross_attention: add a sub-layer that attends to ``context``.
        dropout: dropout on the output of each sub-layer and, where ``attention_dropout`` is None, as that.
        attention_dropout: dropout on the attention weights.
    """

    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    bias: bool = True
    attention_bias: bool | None = None
    output_bias: bool | None = None
    norm_bias: bool | None = None
    activation: str = "gelu"
    gated: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    cross_attention: bool = False
    dropout: float = 0.0
    attention_dropout: float | None = None


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm and a residual connection; (B, T, D) -> (B, T, D).

    Class attributes:
        tensor_parallel: tensor-parallel plan of the parts: ``column`` (a linear layer sharded by outputs), ``row`` (by
            inputs) or ``partial`` (replicated, each rank computing a part of its gradient, which must be summed). Parts
            not listed are replicated and have the same gradient on all ranks.

    Attributes:
        activation_checkpointing: activations saved for the backward pass: all (``off``), the block's input and the
            results of matrix products and of attention, which cost most to compute (``selective``), or the input alone
            (``full``). The rest is recomputed. A subclass overrides ``_forward``, not ``forward``, to support it.
    """

    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **{
            f"{attention}.{name}": kind
            for attention in ("attention", "cross_attention")
            for name, kind in {
                "query": "column",
                "key": "column",
                "value": "column",
                "query_norm": "partial",
                "key_norm": "partial",
                "output": "row",
            }.items()
        },
        "mlp.up": "column",
        "mlp.gate": "column",
        "mlp.down": "row",
    }

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.activation_checkpointing = "off"
        self.pre_norm = config.pre_norm
        self.dropout = config.dropout
        self.attention = self._attention(config)
        self.attention_norm = self._norm(config)
        self.cross_attention = self._attention(config) if config.cross_attention else None
        self.cross_attention_norm = self._norm(config) if config.cross_attention else None
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            config.activation,
            gated=config.gated,
            bias=config.bias,
            dropout=config.dropout,
        )
        self.mlp_norm = self._norm(config)

    @staticmethod
    def _norm(config: BlockConfig) -> nn.Module:
        bias = config.bias if config.norm_bias is None else config.norm_bias
        return build_norm(config.norm, config.hidden_size, config.norm_eps, bias)

    @staticmethod
    def _attention(config: BlockConfig) -> Attention:
        bias = config.bias if config.attention_bias is None else config.attention_bias
        dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        return Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads or config.num_heads,
            config.head_dim or config.hidden_size // config.num_heads,
            bias=bias,
            output_bias=config.output_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            scale=config.attention_scale,
            dropout=dropout,
        )

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Run the block, with activation checkpointing if it is on; the arguments are those of ``_forward``."""
        # The checkpoint is inside the block, so that torch.compile has it in the block's graph, where the policy can
        # distinguish operations, and FSDP2 gathers the weights of the block for both forward passes.
        trains = self.training and torch.is_grad_enabled() and options.get("cache") is None
        if self.activation_checkpointing == "off" or not trains:
            return self._forward(x, **options)
        if self.activation_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        result: Tensor = checkpoint(self._forward, x, use_reentrant=False, **options)
        return result

    def _forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask | None,
        rope: Rope | None = None,
        context: Tensor | None = None,
        context_mask: AttentionMask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Compute the block.

        Args:
            x: (B, T, D).
            mask: mask of the self-attention over the columns of ``x`` (and of the cache).
            rope: rotary tables of these positions, or None.
            context: (B, S, D) that cross-attention attends to.
            context_mask: mask of the cross-attention from ``x`` to ``context``.
            cache: keys and values of earlier tokens; filled in place.
            layer: index of this block in the cache.
            keep: the tokens whose outputs are needed: (N,) indices into the flattened (B * T) tokens, or (B, K) columns
                of each row. After the attention only these are computed, and the result is (N, D) or (B, K, D). Of
                columns that nothing masks, only these are queries.
        """
        h, source = self.attention_norm(x) if self.pre_norm else x, None
        plain = rope is None and cache is None and (mask is None or mask.empty)
        if keep is not None and keep.ndim == 2 and plain:
            source, mask = h, None
            h, x, keep = columns_of(h, keep), columns_of(x, keep), None
        options: dict[str, Any] = {"rope": rope, "cache": cache, "layer": layer, "context": source}
        x = x + self._drop(self.attention(h, mask=mask, **options))
        if not self.pre_norm:
            x = self.attention_norm(x)
        if (
            self.cross_attention is not None
            and self.cross_attention_norm is not None
            and context is not None
        ):
            h = self.cross_attention_norm(x) if self.pre_norm else x
            x = x + self._drop(self.cross_attention(h, mask=context_mask, context=context))
            if not self.pre_norm:
                x = self.cross_attention_norm(x)
        if keep is not None:
            x = kept_of(x, keep)
        h = self.mlp_norm(x) if self.pre_norm else x
        x = x + self.mlp(h)
        return x if self.pre_norm else self.mlp_norm(x)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


def columns_of(x: Tensor, columns: Tensor) -> Tensor:
    """Select (B, K) columns of each row, (B, T, D) -> (B, K, D)."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def kept_of(x: Tensor, keep: Tensor) -> Tensor:
    """Select the tokens that ``Block._forward`` calls ``keep``, (B, T, D) -> (N, D) or (B, K, D)."""
    return columns_of(x, keep) if keep.ndim == 2 else x.reshape(-1, x.shape[-1])[keep]


def run_block(block: nn.Module, x: Tensor, keep: Tensor | None, **options: Any) -> Tensor:
    """Run a block for the tokens to keep, or all; one with its own forward pass computes all, and they are selected.

    Args:
        block: the block.
        x: (B, T, D).
        keep: see ``Block._forward``.
        **options: its other arguments.
    """
    if keep is not None and isinstance(block, Block) and type(block)._forward is Block._forward:
        options["keep"], keep = keep, None
    x = block(x, **options)
    return x if keep is None else kept_of(x, keep)


def _keep_products(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    name = getattr(getattr(op, "overloadpacket", None), "__name__", "")
    costly = name in _PRODUCTS or name.startswith(("_scaled_dot_product", "_flash_attention"))
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "_scaled_mm",
    "_scaled_mm_v2",
    "attend_by_products",
}
