"""What the backward pass computes again instead of keeping it (arXiv 1604.06174; selective: 2205.05198, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

__all__ = ["recompute", "set_recompute"]


class _Recomputed(nn.Module):
    """Comes before the class of a block: its forward pass, inside of which less is kept while it is trained.

    What is compiled, and what FSDP2 gathers for, is the block from outside: the other way round the second run would be
    of a compiled graph, whose inner results no policy can tell apart.
    """

    recompute_mode = "off"

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        plain: Callable[..., Tensor] = super().forward
        trains = self.training and torch.is_grad_enabled() and options.get("cache") is None
        if self.recompute_mode == "off" or not trains:
            return plain(x, **options)
        return recompute(plain, self.recompute_mode, x, **options)


def set_recompute(block: nn.Module, mode: str) -> None:
    """From now on the training of a block keeps what ``mode`` says, see ``recompute``; ``off`` keeps all."""
    # Where FSDP2 has put its own class before ours, that stays, and the mode says that nothing is left out.
    if mode == "off" and type(block) in _KINDS.values():
        block.__class__ = next(kind for kind, made in _KINDS.items() if made is type(block))
        return
    if not isinstance(block, _Recomputed):
        if mode == "off":
            return
        kind = type(block)  # one for all blocks of a kind: a compiled graph belongs to a class
        block.__class__ = _KINDS.setdefault(kind, type(kind.__name__, (_Recomputed, kind), {}))
    block.recompute_mode = mode  # type: ignore[assignment]


def recompute(block: Callable[..., Tensor], mode: str, x: Tensor, **options: Any) -> Tensor:
    """Run a block and keep little of it for the backward pass.

    Args:
        block: what is run, and run again.
        mode: ``full`` keeps the input alone; ``selective`` also the results of matrix products and of attention, which
            cost most to make, so that norms, activations and dropout are what is done twice.
        x: input.
        **options: further arguments.
    """
    kept: dict[str, Any] = {}
    if mode == "selective":
        kept["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(block, x, use_reentrant=False, **kept, **options)
    return result


def _policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    name = getattr(getattr(op, "overloadpacket", None), "__name__", "")
    costly = name in _PRODUCTS or name.startswith("_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


_KINDS: dict[type[nn.Module], type[nn.Module]] = {}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear"}
