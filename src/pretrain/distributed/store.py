"""JSON values on the key-value store of the rendezvous, for communication before the process group exists."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["all_here", "get", "put", "wait"]

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


def all_here(store: Any, rank: int, size: int, say: Callable[[str], object]) -> None:
    """Wait until all ranks have prepared data and model, without a time limit; rank 0 reports the missing ranks."""
    put(store, f"here/{rank}", True)
    keys = [f"here/{one}" for one in range(size)]
    while not wait(store, keys, _PATIENT):
        late = [str(one) for one, key in enumerate(keys) if not store.check([key])]
        if rank == 0 and late:
            say(f"waiting for rank {', '.join(late)}, still preparing data or model")
