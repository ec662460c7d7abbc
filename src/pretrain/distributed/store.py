"""Key-value store of the rendezvous: JSON values, waiting for the keys of ranks, and a part for each start."""

from __future__ import annotations

import json
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from pretrain.errors import DistributedError

__all__ = ["absent", "get", "put", "ranks", "store_of_this_start", "wait", "wait_for_all_ranks"]

_PATIENT = 60.0  # seconds between messages that name the ranks that are waited for
_LARGEST = 64 << 20  # maximum bytes of a value


def put(store: Any, key: str, value: Any) -> None:
    """Store a JSON value under a key, for all ranks."""
    store.set(key, zlib.compress(json.dumps(value).encode()))


def get(store: Any, key: str) -> Any:
    """Return the value of a key that exists."""
    return json.loads(zlib.decompressobj().decompress(store.get(key), _LARGEST))


def wait(store: Any, keys: Sequence[str], seconds: float) -> bool:
    """Wait for keys and return whether all exist in time. It polls, so that Ctrl-C works meanwhile."""
    end, pause = time.monotonic() + seconds, 0.01
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 0.3)
    return True


def absent(store: Any, name: str, among: Iterable[int], seconds: float) -> list[int]:
    """Wait for the keys ``name/RANK`` of some ranks; return the ranks whose key has not come in time."""
    keys = {rank: f"{name}/{rank}" for rank in among}
    if wait(store, list(keys.values()), seconds):
        return []
    return [rank for rank, key in keys.items() if not store.check([key])]


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


def wait_for_all_ranks(store: Any, rank: int, size: int, say: Callable[[str], object]) -> None:
    """Wait until all ranks have prepared data and model, without a time limit; rank 0 reports the missing ranks."""
    put(store, f"here/{rank}", True)
    while late := absent(store, "here", range(size), _PATIENT):
        if rank == 0:
            say(f"waiting for rank {ranks(late)}, still preparing data or model")


def store_of_this_start(store: Any, rank: int, size: int, patience: float = 300.0) -> Any:
    """Return the part of a store that only the processes of this start use; rank 0 and the others wait for each other.

    A launcher that restarts all processes keeps its store, with the old keys, and the launchers of several hosts may
    count restarts differently, so no number in the environment identifies a start. Instead rank 0 gives its start a
    random name, and each other rank asks for it with a random nonce. The name of an earlier start is never read,
    because only the running rank 0 answers a fresh nonce.

    Args:
        store: shared by all ranks (`torch.distributed.Store`).
        rank: of this process.
        size: world size.
        patience: seconds to wait for rank 0, and for rank 0 to wait for the others.

    Raises:
        DistributedError: a rank is missing.
    """
    name, missing, end = secrets.token_hex(8), set(range(1, size)), time.monotonic() + patience
    if rank:
        store.set(f"asked/{rank}", name)
        if wait(store, [f"answer/{name}"], patience):
            name, missing = store.get(f"answer/{name}").decode(), set()
            store.set(f"start/{name}/came/{rank}", "")
        else:
            missing = {0}
    # Not in a thread: another thread that waits on the store would block its connection meanwhile.
    while rank == 0 and missing and time.monotonic() < end:
        for other in sorted(missing):
            if store.check([f"start/{name}/came/{other}"]):
                missing.discard(other)
            elif store.check([f"asked/{other}"]):
                store.set(f"answer/{store.get(f'asked/{other}').decode()}", name)
        time.sleep(0.02 if missing else 0)
    if missing:
        raise DistributedError(
            f"Rank {ranks(list(missing))} of {size} did not connect within {patience:g} seconds; "
            f"rank {rank} waited for it. Check on its host that the process was started, and what it printed."
        )
    return PrefixStore(f"start/{name}", store)
