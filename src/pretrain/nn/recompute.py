"""What the backward pass computes again instead of keeping it (arXiv 1604.06174; selective: 2205.05198, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

__all__ = ["recompute"]


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


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear"}
