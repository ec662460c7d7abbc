"""Before the first step: do the processes of a run fit together, and do the links between them work?

All of it goes through the key-value store of the rendezvous, as JSON, before any process group is trusted. Rank 0
compares and decides; everybody then raises the same error, or goes on.
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

_GRACE = 8.0  # seconds in which a file must be seen on a network file system
_MARGIN = 15.0  # seconds beyond the limit in which rank 0's verdict must come
_SIZES = {"cuda": 256 << 20}  # bytes of the all-reduce that measures the bandwidth
_SMALLER = 16 << 20


def fingerprint(value: Any) -> str:
    """16 hex digits that two processes share when their JSON values are equal."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def introduce(device: torch.device, **more: Any) -> Hello:
    """What a process says of itself: host, process, device, versions, threads, and whatever is given.

    Args:
        device: on which it will compute.
        more: JSON values. Of ``settings``, ``data`` and ``model`` all processes must have the same; a mapping instead
            of a fingerprint lets the error name the keys that differ.
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
    """Let every process introduce itself, and compare all with rank 0.

    Args:
        store: that all share, with keys of this attempt only (`torch.distributed.Store`).
        rank: of this process.
        size: how many there are.
        hello: what `introduce` returns.
        timeout: seconds in which all must have come.
        run_dir: which all must see: the same directory on a file system that all hosts share.

    Returns:
        What every process said, by rank; the same list on all.

    Raises:
        DistributedError: somebody is missing, or does not fit; the same text on all ranks that are there.
    """
    folder = None if run_dir is None else Path(os.path.abspath(run_dir))
    mine = dict(hello) | {"size": size}
    if size == 1:
        return [mine]
    try:
        return _exchange(store, rank, size, mine, timeout, folder)
    except RuntimeError as error:  # of the store: whoever holds it has gone
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
    """Rank 0's side: collect, compare, tell."""
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
    """What a process finds of rank 0's file: "yes", "read-only", or "nothing"."""
    end = time.monotonic() + _GRACE
    while folder is not None:
        with contextlib.suppress(OSError):
            if nonce in os.listdir(
                folder
            ):  # reading the directory asks the server, a name may be cached
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
    """Add up a known vector over all processes, then measure the links.

    Args:
        all_reduce: sums a tensor over all processes in place and returns when that is queued.
        device: of the tensors.
        rank: of this process.
        size: how many there are.
        timeout: seconds for everything.

    Returns:
        ``bus_gb_s``: bandwidth in 10^9 bytes per second, as buses see it: bytes / time x 2 (size - 1) / size;
        ``megabytes`` that were added up for it; ``latency_us``: microseconds of an all-reduce of one number.

    Raises:
        DistributedError: a wrong sum, an error of the backend, or no answer in time; it names this process.
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
    """Do what may wait for other processes for ever, for so many seconds at most.

    Args:
        run: what is done, in a thread of its own: a collective that hangs cannot be interrupted, and is left there.
        what: what it is, and on which rank.
        device: of its tensors.
        timeout: seconds.

    Raises:
        DistributedError: it failed, or did not come back.
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
    """What to say of one of several hosts whose own name leads to itself alone: by it the others look for it."""
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

    # Whole numbers whose sum is exact in fp32 for thousands of ranks.
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
