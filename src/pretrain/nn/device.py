"""What the hardware is good at, asked in one place."""

from __future__ import annotations

import torch

__all__ = ["TOKENS_AT_ONCE", "has_matrix_tiles", "multiplies_bf16_fast", "tokens_at_once"]

# Tokens in one forward pass: on a CPU about what its caches carry, on a GPU enough to fill it.
TOKENS_AT_ONCE = {"cpu": 8192, "cuda": 65536, "mps": 8192}


def tokens_at_once(device: torch.device) -> int:
    """Tokens in one forward pass, where the caller leaves the number free."""
    return TOKENS_AT_ONCE.get(device.type, 8192)


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return has_matrix_tiles() or _supports("_is_avx512_bf16_supported")
    return False


def has_matrix_tiles() -> bool:
    """Whether this CPU multiplies bf16 tiles in hardware (AMX)."""
    return _supports("_is_amx_tile_supported")


def _supports(name: str) -> bool:
    # Private names of torch: a release without them costs speed, not correctness.
    return bool(getattr(torch.cpu, name, lambda: False)())
