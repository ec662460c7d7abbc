"""Facts about a machine (versions, devices, memory, disk, network, speed) and the problems that will stop a run."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain import __version__
from pretrain.distributed.gloo_check import try_pair
from pretrain.distributed.network import interfaces
from pretrain.errors import DistributedError
from pretrain.nn.device import multiplies_bf16_fast

__all__ = ["Facts", "describe", "examine", "free_memory", "multiplication_speed", "problems_of"]

Facts = dict[str, Any]

_MEASURED = 0.3  # seconds for each dtype; on a busy machine even the best run is too slow
_LITTLE = 1 << 30  # bytes of free memory or disk; less is reported as a problem
_LITTLE_SHARED = 256 << 20  # bytes of /dev/shm: NCCL and data workers fail with less


def examine(device: str, folder: str, seconds: float) -> Facts:
    """Return the facts about this machine, with the speed of its device and an all-reduce of two processes.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        folder: a path on the disk whose free space is reported.
        seconds: time limit for the two processes.
    """
    chosen = _choose(device)
    facts: Facts = {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "versions": _versions(),
        "device": str(chosen),
        "gpus": _gpus(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": {"free": free_memory(torch.device("cpu")), "total": _total_memory()},
        "disk": shutil.disk_usage(_existing(folder)).free,
        "shared_memory": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "speed": multiplication_speed(chosen) | {"bf16_fast": multiplies_bf16_fast(chosen)},
        "network": interfaces(),
        "backends": {
            name: bool(dist.is_available() and getattr(dist, f"is_{name}_available")())
            for name in ("gloo", "nccl")
        },
    }
    if facts["backends"]["gloo"]:
        try:
            facts["pair"] = try_pair(seconds)
        except DistributedError as error:
            facts["pair"] = {"error": str(error)}
    return facts


def problems_of(facts: Facts, device: str) -> list[str]:
    """Return the problems that will stop a run on this machine, each with its remedy."""
    found = []
    wanted = None if device == "auto" else device
    if wanted in ("cuda", "mps") and facts["device"] != wanted:
        found.append(
            f"no {wanted} device can be used. "
            + _why_no_gpu(facts, "Install a torch build for your hardware and its driver.")
        )
    elif wanted is None and os.path.exists("/dev/nvidiactl") and not facts["gpus"]:
        found.append(
            "this machine has an NVIDIA GPU that torch does not use. " + _why_no_gpu(facts, "")
        )
    if facts["memory"]["free"] < _LITTLE:
        found.append(
            f"only {_gib(facts['memory']['free'])} of memory are free. End other programs."
        )
    if facts["disk"] < _LITTLE:
        found.append(
            f"only {_gib(facts['disk'])} of disk are free here, and a checkpoint takes 12 bytes for each parameter. "
            "Delete something, or name another place with --out."
        )
    shared = facts["shared_memory"]
    if shared is not None and shared < _LITTLE_SHARED:
        found.append(
            f"/dev/shm has only {shared >> 20} MiB free, and NCCL needs it between the GPUs of a host. In a container "
            "give it more, e.g. docker run --shm-size=1g."
        )
    if not any(facts["backends"].values()):
        found.append("this build of torch has no torch.distributed. Install one that has.")
    if len(facts["gpus"]) > 1 and not facts["backends"]["nccl"]:
        found.append("several GPUs, but torch has no NCCL. Install a CUDA build of torch.")
    failure = facts.get("pair", {}).get("error")
    if failure:
        found.append(
            f"{failure}. gloo listens on the address that the host's name {facts['host']!r} has: give it one in "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME to an interface above (lo on a single host)."
        )
    return found


def describe(facts: Facts) -> list[str]:
    """Return the facts as aligned lines of text."""
    memory, speed, versions = facts["memory"], facts["speed"], facts["versions"]
    pair = facts.get("pair", {"error": "not tried"})
    faster = "faster" if speed["bf16_fast"] else "not faster"
    rows = [
        ("host", f"{facts['host']}, {facts['system']}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("device", facts["device"]),
        *((f"  cuda:{n}", _gpu(gpu)) for n, gpu in enumerate(facts["gpus"])),
        ("processor", f"{facts['cores']} cores, torch uses {facts['threads']} threads"),
        ("memory", f"{_gib(memory['free'])} free of {_gib(memory['total'])}"),
        ("disk", f"{_gib(facts['disk'])} free"),
        (
            "speed",
            f"fp32 {_flops(speed['fp32'])}, bf16 {_flops(speed['bf16'])}: bf16 is {faster} on this hardware",
        ),
        ("network", "; ".join(map(_interface, facts["network"])) or "no address"),
        (
            "torch.distributed",
            ", ".join(f"{k} {'yes' if v else 'no'}" for k, v in facts["backends"].items()),
        ),
        (
            "two processes",
            f"do not meet: {pair['error']}"
            if "error" in pair
            else f"all-reduce over gloo {pair['bus_gb_s']:.3g} GB/s, latency {pair['latency_us']:.0f} us",
        ),
    ]
    if facts["shared_memory"] is not None:
        rows.insert(-4, ("shared memory", f"{_gib(facts['shared_memory'])} free in /dev/shm"))
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{value}" for name, value in rows]


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a device; for the CPU those that a process can still allocate, also in a container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:  # MemAvailable counts memory of the page cache as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        pass
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return free if limit is None or used is None else max(0.0, min(free, limit - used))


def multiplication_speed(device: torch.device) -> dict[str, float]:
    """Return the FLOP/s of a product of two square matrices in fp32 and in bf16, the best of several runs."""
    size = 4096 if device.type == "cuda" else 512
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        best, end = float("inf"), time.perf_counter() + _MEASURED
        while (began := time.perf_counter()) < end or best == float("inf"):
            product = matrix @ matrix
            float(product[0, 0])  # synchronises with the device
            best = min(best, time.perf_counter() - began)
        found[name] = 2 * size**3 / best
    return found


def _choose(device: str) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next((name for name, is_there in there.items() if is_there), "cpu")
    return torch.device(device if there.get(device) else "cpu")


def _versions() -> dict[str, str]:
    found = {
        "pretrain": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    if torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
        if dist.is_available() and dist.is_nccl_available():
            nccl: Any = torch.cuda.nccl
            found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def _gpus() -> list[Facts]:
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{about.major}.{about.minor}"
        found.append({"name": about.name, "free": free, "total": total, "capability": capability})
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _total_memory() -> float:
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = _cgroup("memory.max")
    return total if limit is None else min(total, limit)


def _cgroup(name: str) -> float | None:
    try:
        return float(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # no container, or "max"
        return None


def _existing(folder: str) -> Path:
    path = Path(os.path.abspath(folder))
    while not path.exists():
        path = path.parent
    return path


def _why_no_gpu(facts: Facts, otherwise: str) -> str:
    if "cuda" not in facts["versions"] and facts["device"] != "mps":
        return f"torch {facts['versions']['torch']} is a build without CUDA: install one with it."
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or check it against nvidia-smi."
    return (
        otherwise
        or "Check with nvidia-smi that the driver works and is new enough for torch's CUDA."
    )


def _gpu(gpu: Facts) -> str:
    free, total = _gib(gpu["free"]), _gib(gpu["total"])
    return f"{gpu['name']}, {free} free of {total}, compute capability {gpu['capability']}"


def _interface(one: Facts) -> str:
    speed = one.get("speed", -1)
    rate = f", {speed / 1000:g} Gbit/s" if isinstance(speed, int) and speed > 0 else ""
    return f"{one['name']} {one['address']}{rate}".strip()


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _flops(speed: float) -> str:
    return f"{speed / 1e12:.1f} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:.0f} GFLOP/s"
