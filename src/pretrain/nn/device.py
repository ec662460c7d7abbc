"""What the hardware is good at, asked in one place."""

from __future__ import annotations

import torch

__all__ = ["has_matrix_tiles", "multiplies_bf16_fast"]


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
