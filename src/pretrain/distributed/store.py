"""JSON values on the key-value store of the rendezvous: what processes tell each other before they have a group."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["all_here", "get", "put", "wait"]

_PATIENT = 60.0  # seconds before it is said who is waited for
_LARGEST = 64 << 20  # bytes of a value


def put(store: Any, key: str, value: Any) -> None:
    """Leave a JSON value for all."""
    store.set(key, zlib.compress(json.dumps(value).encode()))


def get(store: Any, key: str) -> Any:
    """The value of a key that is there."""
    return json.loads(zlib.decompressobj().decompress(store.get(key), _LARGEST))


def wait(store: Any, keys: Sequence[str], seconds: float) -> bool:
    """Whether all keys are there in time. It asks again and again, so that Ctrl-C works meanwhile."""
    end, pause = time.monotonic() + seconds, 0.01
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 0.3)
    return True


def all_here(store: Any, rank: int, size: int, say: Callable[[str], object]) -> None:
    """Wait for the slowest process, however long it prepares data or model; rank 0 says now and then who that is."""
    put(store, f"here/{rank}", True)
    keys = [f"here/{one}" for one in range(size)]
    while not wait(store, keys, _PATIENT):
        late = [str(one) for one, key in enumerate(keys) if not store.check([key])]
        if rank == 0 and late:
            say(f"waiting for rank {', '.join(late)}, still preparing data or model")
