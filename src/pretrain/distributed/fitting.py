"""Comparison of the introductions of all ranks: the values that must be equal, and the remedy for a difference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["differences", "misfit", "ranks"]

Hello = Mapping[str, Any]

_INSTALL = "Install the same versions on all hosts"
# Values that must be equal on all ranks -> remedy.
_EQUAL = {
    "size": "Start all hosts with the same --nnodes and --nproc-per-node",
    "versions.pretrain": _INSTALL,
    "versions.torch": _INSTALL,
    "versions.python": _INSTALL,
    "versions.cuda": _INSTALL,
    "versions.nccl": _INSTALL,
    "device.type": "Set parallel.device to what every host has, or leave the other hosts out",
    "settings": "Give every process the same configuration file and options",
    "data": "Give every host the same prepared data (copy the directory, or share it)",
    "model": "Give every host the same checkpoint and configuration of the model",
}
# Values that may differ at a cost -> the cost.
_BETTER_EQUAL = {
    "threads": "the slowest one sets the pace, and other thread counts round differently",
    "device.name": "the slowest one sets the pace",
}
_SHOWN = 80  # characters of a value that are shown


def misfit(everybody: Sequence[Hello], run_dir: str) -> str:
    """Return the first mismatch as a sentence with its remedy, or "" if all ranks match.

    Args:
        everybody: introductions by rank.
        run_dir: rank 0's run directory, for the message.
    """
    return _unequal(everybody) or _same_device(everybody) or _unseen(everybody, run_dir)


def differences(everybody: Sequence[Hello]) -> list[str]:
    """Return the differences that are not errors, one line each."""
    lines = []
    for path, why in _BETTER_EQUAL.items():
        values: dict[str, list[int]] = defaultdict(list)
        for rank, hello in enumerate(everybody):
            values[str(_at(hello, path))].append(rank)
        if len(values) > 1:
            each = "; ".join(f"{value} on rank {ranks(r)}" for value, r in values.items())
            lines.append(f"{path} differs ({each}): {why}")
    return lines


def ranks(found: Sequence[int]) -> str:
    """Return rank numbers as text, with ranges (``0-7, 9``)."""
    parts: list[list[int]] = []
    for rank in sorted(found):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    return ", ".join(shown[:12]) + ", ..." * (len(shown) > 12)


def _unequal(everybody: Sequence[Hello]) -> str:
    first = everybody[0]
    for path, remedy in _EQUAL.items():
        expected = _at(first, path)
        others = [rank for rank, hello in enumerate(everybody) if _at(hello, path) != expected]
        if others:
            found = _at(everybody[others[0]], path)
            same = [rank for rank in others if _at(everybody[rank], path) == found]
            what, here, there = _what(path, expected, found)
            return (
                f"{_who(everybody, same)} {'does' if len(same) == 1 else 'do'} not fit rank 0: {what} is {there} "
                f"there, and {here} on rank 0 (host {first.get('host')}). {remedy}."
            )
    return ""


def _what(path: str, expected: Any, found: Any) -> tuple[str, str, str]:
    """Return the name and the two values; for mappings, those of the first key that differs."""
    while isinstance(expected, Mapping) and isinstance(found, Mapping):
        keys = sorted({*expected, *found}, key=str)
        key = next(k for k in keys if expected.get(k) != found.get(k))
        path, expected, found = f"{path}.{key}", expected.get(key), found.get(key)
    return path, repr(expected)[:_SHOWN], repr(found)[:_SHOWN]


def _same_device(everybody: Sequence[Hello]) -> str:
    users: dict[Any, list[int]] = defaultdict(list)
    for rank, hello in enumerate(everybody):
        device = hello.get("device") or {}
        if device.get("type") == "cuda":
            place = device.get("uuid") or (hello.get("host"), device.get("index"))
            users[place].append(rank)
    for shared in users.values():
        if len(shared) > 1:
            first = everybody[shared[0]]
            device = first["device"]
            return (
                f"Ranks {ranks(shared)} on host {first.get('host')} share one GPU, cuda:{device.get('index')} "
                f"({device.get('name')}), which NCCL cannot do. Start at most one process per GPU (--nproc-per-node), "
                "and let CUDA_VISIBLE_DEVICES show all GPUs, or each process its own."
            )
    return ""


def _unseen(everybody: Sequence[Hello], run_dir: str) -> str:
    for answer in ("nothing", "read-only"):
        blind = [rank for rank, hello in enumerate(everybody) if hello.get("sees") == answer]
        if not blind:
            continue
        host = everybody[0].get("host")
        if answer == "read-only":
            return (
                f"{_who(everybody, blind)} cannot write into the run directory {run_dir}. Every process writes its "
                "part of a checkpoint: change the permissions, or mount it writable."
            )
        return (
            f"{_who(everybody, blind)} {'does' if len(blind) == 1 else 'do'} not see the run directory {run_dir} of "
            f"rank 0 (host {host}): a file left there did not appear. Every process writes its part of a checkpoint: "
            "put train.out on a file system that all hosts share, and name it by the same absolute path."
        )
    return ""


def _who(everybody: Sequence[Hello], found: Sequence[int]) -> str:
    hosts = list(dict.fromkeys(str(everybody[rank].get("host")) for rank in found))
    shown = ", ".join(hosts[:4]) + ", ..." * (len(hosts) > 4)
    return f"Rank{'s' * (len(found) > 1)} {ranks(found)} (host{'s' * (len(hosts) > 1)} {shown})"


def _at(hello: Hello, path: str) -> Any:
    value: Any = hello
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
