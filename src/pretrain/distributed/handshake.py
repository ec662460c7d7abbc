"""Checks before the first step: whether the processes of a run match, and whether the links between them work.

The introductions are exchanged as JSON through the key-value store of the rendezvous, before any process group is
used. Rank 0 compares them and decides; all ranks then raise the same error, or continue.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.distributed.fitting import misfit, ranks
from pretrain.distributed.store import get, put, wait
from pretrain.errors import DistributedError
from pretrain.utils.files import write_file

__all__ = ["bounded", "check_links", "fingerprint", "handshake", "introduce"]

Hello = dict[str, Any]

_GRACE = 8.0  # seconds within which a new file must become visible on a network file system
_MARGIN = 15.0  # seconds to wait for rank 0's verdict beyond its own time limits
_SIZES = {"cuda": 256 << 20}  # bytes of the all-reduce that measures the bandwidth
_SMALLER = 16 << 20


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
        found = torch.cuda.get_device_properties(index)
        about |= {"index": index, "name": found.name, "uuid": str(getattr(found, "uuid", ""))}
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
        return _exchange(store, rank, size, mine, timeout, folder)
    except RuntimeError as error:  # raised by the store when the process that hosts it is gone
        raise DistributedError(
            f"Rank {rank} of {size} (host {mine.get('host')}) lost the store of the rendezvous at {_master()}: "
            f"{error}. Look at the output of rank 0 and of the launcher on that host."
        ) from error


def _exchange(
    store: Any, rank: int, size: int, mine: Hello, timeout: float, folder: Path | None
) -> list[Hello]:
    if store.add(f"came/{rank}", 1) > 1:
        _twice(store, rank, size, mine)
    if rank == 0:
        return _receive(store, size, mine, timeout, folder)
    put(store, f"hello/{rank}", mine)
    if not wait(store, ["hello/0"], timeout):
        raise DistributedError(_missing([0], size, timeout))
    nonce = get(store, "hello/0").get("nonce")
    if nonce is not None:
        put(store, f"sees/{rank}", _sees(folder, str(nonce)))
    if not wait(store, ["verdict"], 2 * timeout + _MARGIN):
        raise DistributedError(
            f"Rank 0 came, and then said nothing for {2 * timeout + _MARGIN:g} seconds: it died or hangs. Look at "
            "its output."
        )
    verdict = get(store, "verdict")
    if verdict["error"]:
        raise DistributedError(verdict["error"])
    return list(verdict["all"])


def _receive(
    store: Any, size: int, mine: Hello, timeout: float, folder: Path | None
) -> list[Hello]:
    """Collect the introductions on rank 0, compare them, and publish the verdict."""
    others = range(1, size)
    nonce = None if folder is None else f".handshake-{secrets.token_hex(8)}"
    path = None if folder is None or nonce is None else folder / nonce
    error, everybody = "", [mine]
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, b"rank 0 was here; safe to delete\n")
        put(store, "hello/0", mine | {"nonce": nonce})
        if not wait(store, [f"hello/{rank}" for rank in others], timeout):
            missing = [rank for rank in others if not store.check([f"hello/{rank}"])]
            error = _missing(missing, size, timeout)
        else:
            everybody += [get(store, f"hello/{rank}") for rank in others]
            if path is not None:
                wait(store, [f"sees/{rank}" for rank in others], timeout)
                for rank in others:
                    key = f"sees/{rank}"
                    everybody[rank]["sees"] = get(store, key) if store.check([key]) else "nothing"
            twice = get(store, "twice") if store.check(["twice"]) else ""
            error = twice or misfit(everybody, str(folder))
    except OSError as failure:
        error = f"Rank 0 on host {mine.get('host')} cannot write into {folder}: {failure}."
        put(store, "hello/0", mine | {"nonce": None})
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
    put(store, "verdict", {"error": error, "all": [] if error else everybody})
    if error:
        raise DistributedError(error)
    return everybody


def _twice(store: Any, rank: int, size: int, mine: Hello) -> None:
    text = (
        f"Two processes are rank {rank} of {size}, the second one on host {mine.get('host')} (process "
        f"{mine.get('pid')}). Give every host its own --node-rank, and start each only once."
    )
    put(store, "twice", text)
    raise DistributedError(text)


def _missing(missing: Sequence[int], size: int, seconds: float) -> str:
    return (
        f"Rank {ranks(missing)} of {size} did not come within {seconds:g} seconds. Check on the host of each that the "
        "process was started, and what it printed; that --nnodes and --nproc-per-node say how many were really "
        f"started; that a firewall lets the hosts reach {_master()} (MASTER_ADDR, MASTER_PORT); and that "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the interface that connects the hosts."
    )


def _master() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _sees(folder: Path | None, nonce: str) -> str:
    """Return whether this process sees rank 0's file in the run directory: "yes", "read-only", or "nothing"."""
    end = time.monotonic() + _GRACE
    while folder is not None:
        with contextlib.suppress(OSError):
            # Listing the directory asks the file server, whereas the lookup of one name may be cached.
            if nonce in os.listdir(folder):
                return "yes" if os.access(folder, os.W_OK) else "read-only"
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return "nothing"


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
    found: dict[str, float] = {}
    bounded(
        lambda: found.update(_measure(all_reduce, device, rank, size)),
        f"The all-reduce that tests the links, on rank {rank} of {size}",
        device,
        timeout,
    )
    return found


def bounded(run: Callable[[], object], what: str, device: torch.device, timeout: float) -> None:
    """Run a function that may block on other processes, with a time limit.

    Args:
        run: called in a separate thread, because a collective that hangs cannot be interrupted; on a timeout the thread
            is left running.
        what: name of the operation and the rank, for the error message.
        device: of its tensors.
        timeout: seconds.

    Raises:
        DistributedError: the function failed, or did not return in time.
    """
    failures: list[BaseException] = []

    def work() -> None:
        try:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)
            run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="bounded", daemon=True)
    thread.start()
    thread.join(timeout)
    where = f"(host {socket.gethostname()}, {device})"
    if thread.is_alive():
        raise DistributedError(
            f"{what} {where}, did not come back within {timeout:g} seconds. {_own_name()}Check that a firewall lets "
            "the hosts talk on all ports, and that GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (CUDA) names the "
            "interface between them; NCCL_DEBUG=INFO shows what NCCL tries."
        )
    if failures and isinstance(failures[0], DistributedError):
        raise failures[0]
    if failures:
        raise DistributedError(
            f"{what} {where}, failed: {failures[0]}. {_own_name()}Look for the rank that failed first, and whether "
            "GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (CUDA) names an interface that is there; NCCL_DEBUG=INFO "
            "shows what NCCL tries."
        ) from failures[0]


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
                f"The name of this host, {name}, stands for {address} here (/etc/hosts), where other hosts do not "
                "find it. "
            )
    return ""


def _measure(
    all_reduce: Callable[[Tensor], None], device: torch.device, rank: int, size: int
) -> dict[str, float]:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # Integers whose sum is exact in fp32 for thousands of ranks.
    pattern = torch.arange(4099, device=device, dtype=torch.float32) % 257
    share = pattern * (rank % 8 + 1)
    all_reduce(share)
    settle()
    expected = pattern * sum(other % 8 + 1 for other in range(size))
    wrong = (share != expected).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        raise DistributedError(
            f"An all-reduce gave a wrong sum on rank {rank} of {size} (host {socket.gethostname()}, {device}): "
            f"{len(wrong)} of {len(expected)} numbers differ, number {at} is {float(share[at])}, not "
            f"{float(expected[at])}. Memory, a link or a driver is faulty: do not train on this machine."
        )
    small = torch.zeros(1, device=device)
    times = []
    for turn in range(25):
        began = time.perf_counter()
        all_reduce(small)
        settle()
        times.append(time.perf_counter() - began)
        if turn >= 4 and sum(times) > 2.0:
            break
    latency = statistics.median(times[2:])
    large = torch.zeros(_SIZES.get(device.type, _SMALLER) // 4, device=device)
    nbytes = large.numel() * large.element_size()
    times = []
    for _ in range(4):
        began = time.perf_counter()
        all_reduce(large)
        settle()
        times.append(time.perf_counter() - began)
    seconds = min(times[1:])
    bus = nbytes / seconds * 2 * (size - 1) / size
    return {"bus_gb_s": bus / 1e9, "megabytes": nbytes / 2**20, "latency_us": latency * 1e6}
