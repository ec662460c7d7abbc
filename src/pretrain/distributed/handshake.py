"""Checks before the first step: whether the processes of a run match, and whether the links between them work.

The introductions are exchanged as JSON through the key-value store of the rendezvous, before any process group is
used: a group whose members disagree about its size, or of which two say to have one rank, would wait and not say why.
Rank 0 compares them and decides; all ranks then raise the same error, or continue.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.distributed.store import absent, get, put, ranks, wait
from pretrain.errors import DistributedError
from pretrain.utils.directories import appears
from pretrain.utils.files import write_file

__all__ = [
    "check_links",
    "differences",
    "fingerprint",
    "first_mismatch",
    "handshake",
    "introduce",
    "with_time_limit",
]

T = TypeVar("T")
Hello = dict[str, Any]

_MARGIN = 15.0  # seconds to wait for rank 0's verdict beyond its own time limits
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


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that are equal for equal JSON values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def introduce(device: torch.device, **more: Any) -> Hello:
    """Return the introduction of this process: host, process id, device, versions, threads, and the values given.

    Args:
        device: device that it will compute on.
        more: JSON values. ``settings``, ``data`` and ``model`` must be equal on all ranks; if they are mappings and
            not fingerprints, the error can name the keys that differ.
    """
    about: Hello = {"type": device.type, "name": platform.processor() or platform.machine()}
    versions = {
        "pretrain": __version__,
        "torch": str(torch.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        gpu = torch.cuda.get_device_properties(index)
        about |= {"index": index, "name": gpu.name, "uuid": str(getattr(gpu, "uuid", ""))}
        versions["cuda"] = str(torch.version.cuda)
        with contextlib.suppress(Exception):  # a build without NCCL
            nccl: Any = torch.cuda.nccl
            versions["nccl"] = ".".join(map(str, nccl.version()))
    who = {"host": socket.gethostname(), "pid": os.getpid()}
    return {
        **who,
        "device": about,
        "versions": versions,
        "threads": torch.get_num_threads(),
        **more,
    }


def handshake(
    store: Any,
    rank: int,
    size: int,
    hello: Hello,
    *,
    timeout: float = 60.0,
    run_dir: str | os.PathLike[str] | None = None,
) -> list[Hello]:
    """Exchange the introductions of all ranks, and compare them with that of rank 0.

    Args:
        store: shared by all ranks, with keys of this attempt only (`torch.distributed.Store`).
        rank: of this process.
        size: world size.
        hello: the result of `introduce`.
        timeout: seconds to wait for all ranks.
        run_dir: must be visible on all ranks: the same directory on a file system that all hosts share.

    Returns:
        The introductions of all ranks, in rank order; the same list on all.

    Raises:
        DistributedError: a rank is missing or does not match; the same text on all ranks that are present.
    """
    folder = None if run_dir is None else Path(os.path.abspath(run_dir))
    mine = dict(hello) | {"size": size}
    if size == 1:
        return [mine]
    try:
        if store.add(f"came/{rank}", 1) > 1:
            text = (
                f"Two processes are rank {rank} of {size}, the second one on host {mine['host']} (process "
                f"{mine['pid']}). Give every host its own --node-rank, and start each only once."
            )
            put(store, "twice", text)
            raise DistributedError(text)
        if rank == 0:
            put(store, "verdict", _compare(store, size, mine, timeout, folder))
        else:
            put(store, f"hello/{rank}", mine)
            if absent(store, "hello", [0], timeout):
                raise DistributedError(_missing([0], size, timeout))
            nonce = get(store, "hello/0")["nonce"]
            put(store, f"sees/{rank}", "yes" if nonce is None else _sees(folder, nonce))
            if not wait(store, ["verdict"], 2 * timeout + _MARGIN):
                raise DistributedError(
                    f"Rank 0 started, and then did not answer for {2 * timeout + _MARGIN:g} seconds: it died or "
                    "hangs. Look at its output."
                )
        verdict = get(store, "verdict")
    except RuntimeError as error:  # raised by the store when the process that hosts it is gone
        raise DistributedError(
            f"Rank {rank} of {size} (host {mine['host']}) lost the store of the rendezvous at {_master()}: {error}. "
            "Look at the output of rank 0 and of the launcher on that host."
        ) from error
    if isinstance(verdict, str):
        raise DistributedError(verdict)
    return list(verdict)


def _compare(
    store: Any, size: int, mine: Hello, timeout: float, folder: Path | None
) -> str | list[Hello]:
    """Collect the introductions on rank 0, and return them, or what is wrong with them."""
    others = range(1, size)
    path = None if folder is None else folder / f".handshake-{secrets.token_hex(8)}"
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, b"rank 0 was here; safe to delete\n")
        put(store, "hello/0", mine | {"nonce": path and path.name})
        if missing := absent(store, "hello", others, timeout):
            return _missing(missing, size, timeout)
        everybody = [mine, *(get(store, f"hello/{rank}") for rank in others)]
        if path is not None:
            late = absent(store, "sees", others, timeout)
            for rank in others:
                everybody[rank]["sees"] = "nothing" if rank in late else get(store, f"sees/{rank}")
        twice = get(store, "twice") if store.check(["twice"]) else ""
        return twice or first_mismatch(everybody, str(folder)) or everybody
    except OSError as failure:
        put(store, "hello/0", mine | {"nonce": None})
        return (
            f"Rank 0 on host {mine['host']} cannot write into {folder}: {failure}. Make it writable, or name another "
            "run directory."
        )
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()


def _missing(missing: Sequence[int], size: int, seconds: float) -> str:
    return (
        f"Rank {ranks(missing)} of {size} did not connect within {seconds:g} seconds. Check on the host of each that "
        "the process was started, and what it printed; that --nnodes and --nproc-per-node match the processes that "
        f"were started; that a firewall lets the hosts reach {_master()} (MASTER_ADDR, MASTER_PORT); and that "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the interface that connects the hosts."
    )


def _master() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _sees(folder: Path | None, nonce: str) -> str:
    """Return whether this process sees rank 0's file in the run directory: "yes", "read-only", or "nothing"."""
    if folder is None or not appears(folder / nonce):
        return "nothing"
    return "yes" if os.access(folder, os.W_OK) else "read-only"


# ------------------------------------------------------------------------------------------------ comparison


def first_mismatch(everybody: Sequence[Hello], run_dir: str) -> str:
    """Return the first mismatch as a sentence with its remedy, or "" if all ranks match.

    Args:
        everybody: introductions by rank.
        run_dir: rank 0's run directory, for the message.
    """
    return _unequal(everybody) or _shared_device(everybody) or _unseen(everybody, run_dir)


def differences(everybody: Sequence[Hello]) -> list[str]:
    """Return the differences that are not errors, one line each."""
    lines = []
    for path, why in _BETTER_EQUAL.items():
        groups = _by_value(everybody, path)
        if len(groups) > 1:
            each = "; ".join(f"{_at(everybody[r[0]], path)} on rank {ranks(r)}" for r in groups)
            lines.append(f"{path} differs ({each}): {why}")
    return lines


def _unequal(everybody: Sequence[Hello]) -> str:
    for path, remedy in _EQUAL.items():
        _, *others = _by_value(everybody, path)
        if others:
            first, other = (_at(everybody[group], path) for group in (0, others[0][0]))
            while isinstance(first, Mapping) and isinstance(other, Mapping):
                keys = sorted({*first, *other}, key=str)
                key = next(k for k in keys if first.get(k) != other.get(k))
                path, first, other = f"{path}.{key}", first.get(key), other.get(key)
            verb = "does" if len(others[0]) == 1 else "do"
            return (
                f"{_who(everybody, others[0])} {verb} not match rank 0: {path} is {repr(other)[:80]} there, and "
                f"{repr(first)[:80]} on rank 0 (host {everybody[0]['host']}). {remedy}."
            )
    return ""


def _shared_device(everybody: Sequence[Hello]) -> str:
    users: dict[Any, list[int]] = defaultdict(list)
    for rank, hello in enumerate(everybody):
        device = hello["device"]
        if device["type"] == "cuda":
            users[device.get("uuid") or (hello["host"], device["index"])].append(rank)
    for shared in users.values():
        if len(shared) > 1:
            first = everybody[shared[0]]
            device = first["device"]
            return (
                f"Ranks {ranks(shared)} on host {first['host']} share one GPU, cuda:{device['index']} "
                f"({device['name']}), which NCCL cannot do. Start at most one process per GPU (--nproc-per-node), "
                "and let CUDA_VISIBLE_DEVICES show all GPUs, or each process its own."
            )
    return ""


def _unseen(everybody: Sequence[Hello], run_dir: str) -> str:
    seen = {rank: hello.get("sees", "yes") for rank, hello in enumerate(everybody)}
    blind = [rank for rank, answer in seen.items() if answer == "nothing"]
    closed = [rank for rank, answer in seen.items() if answer == "read-only"]
    if blind:
        return (
            f"{_who(everybody, blind)} {'does' if len(blind) == 1 else 'do'} not see the run directory {run_dir} of "
            f"rank 0 (host {everybody[0]['host']}): a file that rank 0 wrote there did not appear. Every process "
            "writes its part of a checkpoint: put train.out on a file system that all hosts share, and name it by the "
            "same absolute path."
        )
    if closed:
        return (
            f"{_who(everybody, closed)} cannot write into the run directory {run_dir}. Every process writes its part "
            "of a checkpoint: change the permissions, or mount it writable."
        )
    return ""


def _who(everybody: Sequence[Hello], listed: Sequence[int]) -> str:
    hosts = list(dict.fromkeys(str(everybody[rank]["host"]) for rank in listed))
    shown = ", ".join(hosts[:4]) + ", ..." * (len(hosts) > 4)
    return f"Rank{'s' * (len(listed) > 1)} {ranks(listed)} (host{'s' * (len(hosts) > 1)} {shown})"


def _by_value(everybody: Sequence[Hello], path: str) -> list[list[int]]:
    """Return the ranks with equal values of an item, as groups; that of rank 0 is the first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, hello in enumerate(everybody):
        groups[json.dumps(_at(hello, path), sort_keys=True)].append(rank)
    return list(groups.values())


def _at(hello: Hello, path: str) -> Any:
    value: Any = hello
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


# ------------------------------------------------------------------------------------------------ links


def check_links(
    all_reduce: Callable[[Tensor], None],
    device: torch.device,
    rank: int,
    size: int,
    *,
    timeout: float = 60.0,
) -> dict[str, float]:
    """Check an all-reduce of a known vector over all ranks, then measure bandwidth and latency.

    Args:
        all_reduce: sums a tensor over all ranks in place and returns when the operation is queued.
        device: of the tensors.
        rank: of this process.
        size: world size.
        timeout: seconds for everything.

    Returns:
        ``bus_gb_s``: bus bandwidth in 10^9 bytes per second: bytes / time x 2 (size - 1) / size; ``megabytes``: size
        of the all-reduce that was measured, in MiB; ``latency_us``: microseconds of an all-reduce of one number.

    Raises:
        DistributedError: a wrong sum, an error of the backend, or a timeout; the message names this process.
    """
    return with_time_limit(
        lambda: _measure(all_reduce, device, rank, size),
        f"The all-reduce that tests the links, on rank {rank} of {size}",
        device,
        timeout,
    )


def with_time_limit(run: Callable[[], T], what: str, device: torch.device, timeout: float) -> T:
    """Return the result of a function that may block on other processes, with a time limit.

    Args:
        run: called in a separate thread, because a collective that hangs cannot be interrupted; on a timeout the thread
            is left running.
        what: name of the operation and the rank, for the error message.
        device: of its tensors.
        timeout: seconds.

    Raises:
        DistributedError: the function failed, or did not return in time.
    """
    results, failures = list[T](), list[BaseException]()

    def work() -> None:
        try:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)
            results.append(run())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="with_time_limit", daemon=True)
    thread.start()
    thread.join(timeout)
    if failures and isinstance(failures[0], DistributedError):
        raise failures[0]
    if results:
        return results[0]
    cause = failures[0] if failures else None
    failed = f"failed: {cause}" if failures else f"did not come back within {timeout:g} seconds"
    raise DistributedError(
        f"{what} (host {socket.gethostname()}, {device}), {failed}. {_own_name()}Look for the rank that failed "
        "first; check that a firewall lets the hosts talk on all ports, and that GLOO_SOCKET_IFNAME (CPU) or "
        "NCCL_SOCKET_IFNAME (CUDA) names the interface between them; NCCL_DEBUG=INFO shows what NCCL tries."
    ) from cause


def _own_name() -> str:
    """Return a hint if the name of this host resolves to loopback: other hosts connect to it by that name.

    The hint is empty if all processes are on this host.
    """
    everywhere, here = (os.environ.get(key, "1") for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if everywhere == here:
        return ""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if address.startswith("127."):
            return (
                f"This host resolves its own name, {name}, to {address} (see /etc/hosts), which other hosts cannot "
                "reach. "
            )
    return ""


def _measure(
    all_reduce: Callable[[Tensor], None], device: torch.device, rank: int, size: int
) -> dict[str, float]:
    def seconds(tensor: Tensor) -> float:
        began = time.perf_counter()
        all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    # Integers whose sum is exact in fp32 for thousands of ranks.
    pattern = torch.arange(4099, device=device, dtype=torch.float32) % 257
    share = pattern * (rank % 8 + 1)
    seconds(share)
    expected = pattern * sum(other % 8 + 1 for other in range(size))
    wrong = (share != expected).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        raise DistributedError(
            f"An all-reduce gave a wrong sum on rank {rank} of {size} (host {socket.gethostname()}, {device}): "
            f"{len(wrong)} of {len(expected)} numbers differ, number {at} is {float(share[at])}, not "
            f"{float(expected[at])}. Memory, a link or a driver is faulty: do not train on this machine."
        )
    # The number that is summed tells whether a rank has measured for long: all of them must stop at the same turn.
    small, times = torch.zeros(1, device=device), list[float]()
    while len(times) < 5 or (len(times) < 25 and not small.item()):
        small.fill_(float(sum(times) > 2.0))
        times.append(seconds(small))
    latency = statistics.median(times[2:])
    nbytes = (256 if device.type == "cuda" else 16) << 20
    large = torch.zeros(nbytes // 4, device=device)
    _, *times = [seconds(large) for _ in range(4)]
    bus = nbytes / min(times) * 2 * (size - 1) / size
    return {"bus_gb_s": bus / 1e9, "megabytes": nbytes / 2**20, "latency_us": latency * 1e6}
