"""This device: what its hardware can do, and which part of a tensor is in its memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TOKENS_AT_ONCE", "has_matrix_tiles", "local", "multiplies_bf16_fast", "tokens_at_once"]

# Tokens in one forward pass: on a CPU about as many as fit its caches, on a GPU enough to keep it busy.
TOKENS_AT_ONCE = {"cpu": 8192, "cuda": 65536, "mps": 8192}


def tokens_at_once(device: torch.device) -> int:
    """Return the default number of tokens in one forward pass."""
    return TOKENS_AT_ONCE.get(device.type, 8192)


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Return whether bf16 products are faster than fp32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return has_matrix_tiles() or _supports("_is_avx512_bf16_supported")
    return False


def has_matrix_tiles() -> bool:
    """Return whether this CPU multiplies bf16 tiles in hardware (AMX)."""
    return _supports("_is_amx_tile_supported")


def _supports(name: str) -> bool:
    # These are private functions of torch; a release without them loses speed, not correctness.
    return bool(getattr(torch.cpu, name, lambda: False)())


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, in the same memory, or the tensor itself if it is not one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
