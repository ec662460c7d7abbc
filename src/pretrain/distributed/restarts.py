"""A key prefix for each start of a run: a launcher that restarts all processes keeps its store, with the old keys.

The launchers of several hosts may count restarts differently, so no number in the environment identifies a start.
Instead rank 0 gives its start a random name, and each other rank asks for it with a random nonce. The name of an
earlier start is never read, because only the running rank 0 answers a fresh nonce.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from pretrain.distributed.store import wait
from pretrain.errors import DistributedError

__all__ = ["store_of_this_start"]

_PAUSE = 0.02


def store_of_this_start(store: Any, rank: int, size: int, patience: float = 300.0) -> Any:
    """Return the part of a store that only the processes of this start use; rank 0 and the others wait for each other.

    Args:
        store: shared by all ranks (`torch.distributed.Store`).
        rank: of this process.
        size: world size.
        patience: seconds to wait for rank 0, and for rank 0 to wait for the others.

    Raises:
        DistributedError: a rank is missing.
    """
    name = secrets.token_hex(8)
    if rank == 0:
        # Not in a thread: another thread that waits on the store would block its connection meanwhile.
        _answer(store, name, size, patience)
    else:
        store.set(f"asked/{rank}", name)
        if not wait(store, [f"answer/{name}"], patience):
            raise DistributedError(
                f"Rank 0 did not come within {patience:g} seconds, says rank {rank} of {size}. Check on its host that "
                "the process was started, and what it printed."
            )
        name = store.get(f"answer/{name}").decode()
        store.set(f"start/{name}/came/{rank}", "")
    return PrefixStore(f"start/{name}", store)


def _answer(store: Any, name: str, size: int, patience: float) -> None:
    """Answer the requests of all other ranks with the name, until all have received it."""
    missing, answered = set(range(1, size)), dict[int, str]()
    end = time.monotonic() + patience
    while missing:
        for rank in sorted(missing):
            if store.check([f"start/{name}/came/{rank}"]):
                missing.discard(rank)
            elif store.check([f"asked/{rank}"]):
                word = store.get(f"asked/{rank}").decode()
                if answered.get(rank) != word:
                    answered[rank] = word
                    store.set(f"answer/{word}", name)
        if missing and time.monotonic() > end:
            raise DistributedError(
                f"Rank {', '.join(map(str, sorted(missing)))} of {size} did not come within {patience:g} seconds. "
                "Check on its host that the process was started, and what it printed."
            )
        time.sleep(_PAUSE if missing else 0)
