"""What the hardware is good at, asked in one place."""

from __future__ import annotations

import torch

__all__ = ["multiplies_bf16_fast"]


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        # Private names of torch: a release without them costs speed, not correctness.
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return False
