"""``pretrain doctor``: facts and problems of this machine, and a check of the links between the processes of a launch.

Started alone it examines this machine and tries an all-reduce of two processes. Started by ``torchrun`` it exchanges
the introductions of all processes and measures the links between them, as a training run does before its first step.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from pretrain.distributed.fitting import differences
from pretrain.distributed.handshake import check_links, handshake, introduce
from pretrain.distributed.launched import launched
from pretrain.distributed.machine import (
    Facts,
    describe,
    examine,
    free_memory,
    multiplication_speed,
    problems_of,
)
from pretrain.distributed.store import get, put, wait
from pretrain.distributed.world import World
from pretrain.errors import ConfigError, DistributedError, did_you_mean
from pretrain.utils.files import printable

__all__ = ["doctor"]

_STRAGGLER = 0.7  # of the median speed


def doctor(
    device: str = "auto", *, out: str | None = None, as_json: bool = False, seconds: float = 60.0
) -> int:
    """Examine this machine, or all machines of a launch, and print the results.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        out: run directory that all processes must see.
        as_json: print JSON.
        seconds: time limit for each communication test.

    Returns:
        0; 1 if there is a problem.

    Raises:
        ConfigError: the device is none of these.
    """
    known = ("auto", "cpu", "cuda", "mps")
    if device not in known:
        raise ConfigError(f"--device is {device!r}." + did_you_mean(device, known))
    if launched():
        return _together(device, out, as_json, seconds)
    facts = examine(device, out or ".", seconds)
    problems = problems_of(facts, device)
    if as_json:
        print(json.dumps(facts | {"problems": problems}, indent=2))
    else:
        _print_lines([*describe(facts), "", *_verdict(problems)])
    return 1 if problems else 0


# ------------------------------------------------------------------------------------------- several processes


def _together(device: str, out: str | None, as_json: bool, seconds: float) -> int:
    world = World.find()
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
        keys = [f"links/{rank}" for rank in range(world.size)]
        if not wait(store, keys, seconds):
            late = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise DistributedError(f"The all-reduce came back here, but not on rank {late}.")
    except DistributedError as error:
        # Rank 0 prints the problems that it found for all; other ranks print only the errors that they ran into alone.
        if world.is_rank_zero or not store.check(["verdict"]) or everybody:
            _print_problem(str(error), everybody, as_json)
        _leave(1)
    if world.is_rank_zero:
        for facts, key in zip(everybody, keys, strict=True):
            facts["links"] = get(store, key)
        notes = [*differences(everybody), *_stragglers(everybody)]
        if as_json:
            print(json.dumps({"ranks": everybody, "notes": notes, "problems": []}, indent=2))
        else:
            _print_lines([*table(everybody), "", *(f"note: {n}" for n in notes), *_verdict([])])
        put(store, "over", True)
    wait(store, ["over"], seconds)  # rank 0 may host the store
    world.destroy_process_group()
    return 0


def _own_device(device: str, world: World) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        number = torch.cuda.device_count()
        if not number:
            raise DistributedError(
                f"Rank {world.rank} (host {world.host}) has no CUDA device. Install a CUDA build of torch and the "
                "driver, or use --device cpu."
            )
        torch.cuda.set_device(world.local_rank % number)
        return torch.device("cuda", world.local_rank % number)
    return torch.device(device)


def _backends() -> list[str]:
    return [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()]


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in (1, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    megabytes = everybody[0]["links"]["megabytes"]
    versions = ", ".join(f"{name} {number}" for name, number in everybody[0]["versions"].items())
    lines.append("")
    lines.append(
        f"all have {versions}; GB/s is the bus bandwidth of an all-reduce of {megabytes:.0f} MiB"
    )
    return lines


# ------------------------------------------------------------------------------------------- printing


def _verdict(problems: Sequence[str]) -> list[str]:
    return [f"problem: {problem}" for problem in problems] or ["no problems found"]


def _print_problem(text: str, everybody: Sequence[Facts], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ranks": list(everybody), "problems": [text]}, indent=2))
    else:
        _print_lines([f"problem: {text}"])


def _print_lines(lines: Sequence[str]) -> None:
    print("\n".join(map(printable, lines)), flush=True)


def _leave(code: int) -> NoReturn:
    """Exit at once: the teardown of a process group would wait for missing processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
