"""``pretrain doctor``: facts and problems of this machine, and a check of the links between the processes of a launch.

Started alone it examines this machine. Started by ``torchrun`` it exchanges the introductions of all processes and
measures the links between them, as a training run does before its first step.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
import statistics
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from pretrain.distributed.handshake import check_links, differences, handshake, introduce
from pretrain.distributed.launched import cores, launched
from pretrain.distributed.store import absent, get, put, ranks, wait
from pretrain.distributed.world import World
from pretrain.errors import ConfigError, DistributedError, did_you_mean
from pretrain.nn.device import multiplies_bf16_fast
from pretrain.printing import aligned, printable
from pretrain.utils.memory_info import free_memory, total_memory
from pretrain.utils.strict_json import without_nan

__all__ = ["doctor"]

Facts = dict[str, Any]

_STRAGGLER = 0.7  # of the median speed
_MEASURED = 0.3  # seconds for each dtype; on a busy machine even the best run is too slow
_LITTLE = 1 << 30  # bytes of free memory or disk; less is reported as a problem
_LONGEST = 1e6  # seconds, as of the setting parallel.timeout
_SIOCGIFADDR = 0x8915  # Linux ioctl: get the address of an interface
_LITTLE_SHARED = 256 << 20  # bytes of /dev/shm: NCCL and data workers fail with less


def doctor(
    device: str = "auto", *, out: str | None = None, as_json: bool = False, seconds: float = 60.0
) -> int:
    """Examine this machine, or all machines of a launch, and print the results.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        out: run directory: the disk whose free space is reported, and that all processes must see.
        as_json: print JSON.
        seconds: time limit for each communication test, above 0 and up to a million.

    Returns:
        0; 1 if there is a problem.

    Raises:
        ConfigError: the device is none of these, or ``seconds`` is out of range.
    """
    known = ("auto", "cpu", "cuda", "mps")
    if device not in known:
        raise ConfigError(f"--device is {device!r}." + did_you_mean(device, known))
    if not 0 < seconds <= _LONGEST:
        raise ConfigError(
            f"--timeout is {seconds:g}, but it is the seconds for each attempt to connect: above 0, and at most "
            f"{_LONGEST:,.0f}. The default is 60."
        )
    if launched():
        return _together(device, out, as_json, seconds)
    facts = examine(device, out or ".")
    problems = problems_of(facts, device)
    hint = "To test the links between processes: torchrun --nproc-per-node 2 -m pretrain doctor"
    lines = [*describe(facts), "", *_verdict(problems), hint]
    _show(facts | {"problems": problems}, lines, as_json)
    return 1 if problems else 0


# ------------------------------------------------------------------------------------------- this machine


def examine(device: str, folder: str) -> Facts:
    """Return the facts about this machine, with the speed of its device.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        folder: a path on the disk whose free space is reported.
    """
    chosen = _choose(device)
    me = introduce(chosen)
    versions, gpus = me["versions"] | {"python": platform.python_version()}, []
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{about.major}.{about.minor}"
        gpus.append({"name": about.name, "free": free, "total": total, "capability": capability})
    existing = Path(os.path.abspath(folder))
    while not existing.exists():
        existing = existing.parent
    return {
        "host": me["host"],
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "versions": versions,
        "device": str(chosen),
        "gpus": gpus,
        "cores": cores(),
        "threads": me["threads"],
        "memory": {"free": free_memory(torch.device("cpu")), "total": total_memory()},
        "disk": shutil.disk_usage(existing).free,
        "shared_memory": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "speed": multiplication_speed(chosen) | {"bf16_fast": multiplies_bf16_fast(chosen)},
        "network": interfaces(),
        "backends": {name: name in _backends() for name in ("gloo", "nccl")},
    }


def _choose(device: str) -> torch.device:
    """Return the device that a run would use; the CPU if the wanted one cannot be used."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next((name for name, is_there in available.items() if is_there), "cpu")
    return torch.device(device if available.get(device) else "cpu")


def _backends() -> list[str]:
    names = ("gloo", "nccl") if dist.is_available() else ()
    return [name for name in names if getattr(dist, f"is_{name}_available")()]


def interfaces() -> list[Facts]:
    """Return the network interfaces with an IPv4 address: name, address, state, mtu, and speed in Mbit/s where known.

    On other systems than Linux the addresses of the host name are returned.
    """
    if not sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            found = socket.gethostbyname_ex(socket.gethostname())[2]
            return [{"name": "", "address": address, "state": "up"} for address in found]
        return []
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:  # the interface has no address
                continue
            interface: Facts = {"name": name, "address": socket.inet_ntoa(answer[20:24])}
            folder = Path("/sys/class/net") / name
            for key, file in (("state", "operstate"), ("mtu", "mtu"), ("speed", "speed")):
                with contextlib.suppress(OSError, ValueError):
                    text = (folder / file).read_text().strip()
                    interface[key] = text if key == "state" else int(text)
            found.append(interface)
    return found


def multiplication_speed(device: torch.device) -> dict[str, float]:
    """Return the FLOP/s of a product of two square matrices in fp32 and in bf16, the best of several runs."""
    size = 4096 if device.type == "cuda" else 512
    speeds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        best, end = float("inf"), time.perf_counter() + _MEASURED
        while (began := time.perf_counter()) < end or best == float("inf"):
            product = matrix @ matrix
            float(product[0, 0])  # synchronises with the device
            best = min(best, time.perf_counter() - began)
        speeds[name] = 2 * size**3 / best
    return speeds


def problems_of(facts: Facts, device: str) -> list[str]:
    """Return the problems that will stop a run on this machine, each with its remedy."""
    problems = []
    if device in ("cuda", "mps") and facts["device"] != device:
        problems.append(f"no {device} device can be used. {_why_no_gpu(facts, device)}")
    elif device == "auto" and os.path.exists("/dev/nvidiactl") and not facts["gpus"]:
        problems.append(
            f"this machine has an NVIDIA GPU that torch does not use. {_why_no_gpu(facts, device)}"
        )
    if facts["memory"]["free"] < _LITTLE:
        problems.append(
            f"only {_gib(facts['memory']['free'])} of memory are free. End other programs."
        )
    if facts["disk"] < _LITTLE:
        problems.append(
            f"only {_gib(facts['disk'])} of disk are free here, and a checkpoint takes 12 bytes for each parameter. "
            "Delete something, or name another place with --out."
        )
    shared = facts["shared_memory"]
    if shared is not None and shared < _LITTLE_SHARED:
        problems.append(
            f"/dev/shm has only {shared >> 20} MiB free, and NCCL needs it between the GPUs of a host. In a container "
            "give it more, e.g. docker run --shm-size=1g."
        )
    if not any(facts["backends"].values()):
        problems.append("this build of torch has no torch.distributed. Install one that has.")
    if len(facts["gpus"]) > 1 and not facts["backends"]["nccl"]:
        problems.append(
            "this machine has several GPUs, but torch has no NCCL. Install a CUDA build."
        )
    return problems


def _why_no_gpu(facts: Facts, device: str) -> str:
    system = facts["system"]
    mac = system.startswith("Darwin")
    if device == "mps" and not (mac and system.endswith("arm64")):
        return (
            f"It is the GPU of a Mac with Apple silicon, and this is {system}: use --device auto."
        )
    if device == "mps":
        return "Update macOS and torch, and use a Python for arm64."
    if mac:
        return "No torch for macOS has CUDA: use --device auto."
    if "cuda" not in facts["versions"] and facts["device"] != "mps":
        return f"torch {facts['versions']['torch']} is a build without CUDA: install one with it."
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or check it against nvidia-smi."
    return "Check with nvidia-smi that the driver works and is new enough for torch's CUDA."


def describe(facts: Facts) -> list[str]:
    """Return the facts as aligned lines of text."""
    memory, speed, versions = facts["memory"], facts["speed"], facts["versions"]
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
    ]
    if facts["shared_memory"] is not None:
        rows.insert(-3, ("shared memory", f"{_gib(facts['shared_memory'])} free in /dev/shm"))
    return aligned(rows, left=2)


# ------------------------------------------------------------------------------------------- several processes


def _together(device: str, out: str | None, as_json: bool, seconds: float) -> int:
    world: Any = World.find()  # several processes
    store = PrefixStore("doctor", world.store)
    everybody: list[Facts] = []
    try:
        where = _own_device(device, world)
        hello = introduce(
            where,
            memory=free_memory(where),
            speed=multiplication_speed(where),
            backends=_backends(),
        )
        everybody = handshake(store, world.rank, world.size, hello, timeout=seconds, run_dir=out)
        world.init_process_group(where, within=seconds)
        links = check_links(dist.all_reduce, where, world.rank, world.size, timeout=seconds)
        put(store, f"links/{world.rank}", links)
        if late := absent(store, "links", range(world.size), seconds):
            raise DistributedError(
                f"The all-reduce ended on rank {world.rank}, but not on rank {ranks(late)} within {seconds:g} seconds. "
                "Look there for a problem of its device or network."
            )
    except DistributedError as error:
        # Rank 0 prints the problems that it found for all; other ranks print only the errors that they ran into alone.
        if world.is_rank_zero or not store.check(["verdict"]) or everybody:
            failure_report = {"ranks": everybody, "problems": [str(error)]}
            _show(failure_report, _verdict([str(error)]), as_json)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the teardown of a process group would wait for missing processes
    if world.is_rank_zero:
        for rank, facts in enumerate(everybody):
            facts["links"] = get(store, f"links/{rank}")
        notes = [*differences(everybody), *_stragglers(everybody)]
        lines = [*table(everybody), "", *(f"note: {n}" for n in notes), *_verdict([])]
        _show({"ranks": everybody, "notes": notes, "problems": []}, lines, as_json)
        put(store, "over", True)
    wait(store, ["over"], seconds)  # rank 0 may host the store
    world.destroy_process_group()
    return 0


def _own_device(device: str, world: World) -> torch.device:
    chosen = _choose("cuda" if device == "auto" else device)
    if device not in ("auto", chosen.type):
        raise DistributedError(
            f"Rank {world.rank} (host {world.host}) has no {device} device. Install a torch build for its hardware "
            "and the driver, or use --device cpu."
        )
    if chosen.type == "cuda":
        chosen = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    return chosen


def _stragglers(everybody: Sequence[Facts]) -> list[str]:
    speeds = [facts["speed"]["bf16"] for facts in everybody]
    usual = statistics.median(speeds)
    return [
        f"rank {rank} (host {facts['host']}) computes at {speed / usual:.0%} of the usual speed, and all wait for it: "
        "is it throttled, or does something else run there?"
        for rank, (facts, speed) in enumerate(zip(everybody, speeds, strict=True))
        if speed < _STRAGGLER * usual
    ]


def table(everybody: Sequence[Facts]) -> list[str]:
    """Return the lines of a table with one row per process."""
    rows = [("rank", "host", "device", "free GiB", "threads", "bf16 TFLOP/s", "GB/s", "latency us")]
    for rank, facts in enumerate(everybody):
        device, links = facts["device"], facts["links"]
        index = f":{device['index']}" if "index" in device else ""
        rows.append(
            (
                str(rank),
                f"{facts['host']}/{facts['pid']}",
                f"{device['type']}{index} {device['name']}",
                f"{facts['memory'] / 2**30:.1f}",
                str(facts["threads"]),
                f"{facts['speed']['bf16'] / 1e12:.3g}",
                f"{links['bus_gb_s']:.3g}",
                f"{links['latency_us']:.0f}",
            )
        )
    megabytes = everybody[0]["links"]["megabytes"]
    versions = ", ".join(f"{name} {number}" for name, number in everybody[0]["versions"].items())
    return [
        *aligned(rows, left=3),
        "",
        f"all ranks have {versions}; GB/s is the bus bandwidth of an all-reduce of {megabytes:.0f} MiB",
    ]


# ------------------------------------------------------------------------------------------- printing


def _verdict(problems: Sequence[str]) -> list[str]:
    return [f"problem: {problem}" for problem in problems] or ["no problems found"]


def _show(report: Facts, lines: Sequence[str], as_json: bool) -> None:
    text = (
        json.dumps(without_nan(report), indent=2) if as_json else "\n".join(map(printable, lines))
    )
    print(text, flush=True)


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
