"""Free and peak memory of a process and its device."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

from pretrain.distributed.mesh import host_memory

__all__ = ["free_memory", "peak_memory"]

_PEAK = "VmHWM:"


def free_memory(device: torch.device) -> float:
    """Return the free bytes of the GPU, or of the machine, up to the limit of the container; 0 if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 0.0
    return min(free, host_memory() or free)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in bytes: reserved GPU memory, else resident host memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024.0 * float(next(line for line in lines if line.startswith(_PEAK)).split()[1])
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else 1024.0 * peak
