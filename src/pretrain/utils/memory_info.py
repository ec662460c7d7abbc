"""Name of the hardware, and memory of this machine, of its container and of a device, in bytes."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import resource
import sys
from pathlib import Path

import torch

__all__ = ["free_memory", "hardware", "peak_memory", "physical_memory", "total_memory"]

_CGROUP = Path("/sys/fs/cgroup")


def hardware(device: torch.device, processes: int) -> str:
    """Name what a run computes on: ``2 x NVIDIA H200``, or a processor with the threads of each process."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return name if processes == 1 else f"{processes} x {name}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line[:10] == "model name")
    each = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    where = f"{device.type}, " if device.type != "cpu" else ""
    return f"{where}{name}, {each}" + (
        f" in each of {processes} processes" if processes > 1 else ""
    )


def physical_memory() -> float:
    """Return the memory of this machine; infinity where the system does not report it."""
    return _pages("SC_PHYS_PAGES", math.inf)


def total_memory() -> float:
    """Return the memory of this machine, or the limit of its container; infinity if neither is known."""
    return min(physical_memory(), _cgroup("memory.max", "memory/memory.limit_in_bytes", math.inf))


def free_memory(device: torch.device) -> float:
    """Return the free memory of a GPU, or what a process can still allocate on this host; NaN if it is unknown.

    In a container it is at most what is left of the limit. The cache of files counts as free.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = _pages("SC_AVPHYS_PAGES", math.nan)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        free = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    limit = total_memory()
    if limit < physical_memory():
        left = limit - _cgroup("memory.current", "memory/memory.usage_in_bytes", 0.0)
        for name in ("memory.stat", "memory/memory.stat"):
            with contextlib.suppress(OSError, ValueError, StopIteration):
                left += _field(_CGROUP / name, "inactive_file")
                break
        free = max(0.0, min(free, left))
    return free


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process: reserved GPU memory, else resident host memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        return _field(Path("/proc/self/status"), "VmHWM:") * 1024
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else 1024.0 * peak


def _pages(name: str, unknown: float) -> float:
    try:
        return float(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return unknown


def _cgroup(new: str, old: str, unknown: float) -> float:
    """Return a number of the container's control group, of version 2 or 1; ``unknown`` without a container."""
    for name in (new, old):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            return float((_CGROUP / name).read_text(encoding="ascii"))
    return unknown


def _field(path: Path, name: str) -> float:
    lines = path.read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.split()[:1] == [name]).split()[1])
