"""Which start of a run this is: a launcher that starts all processes again keeps its store, and what is left in it.

The launchers of several hosts may count their starts differently, so that no number in the environment tells them
apart. Instead rank 0 gives its start a random name, and tells it to whoever asks with a random word: the name of a
start that is over is learned by nobody, for the dead answer no questions.
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
    """The part of a store that only the processes of this start have; all wait for each other.

    Args:
        store: that all share (`torch.distributed.Store`).
        rank: of this process.
        size: how many there are.
        patience: seconds in which rank 0 must come, and the others after it.

    Raises:
        DistributedError: somebody does not come.
    """
    name = secrets.token_hex(8)
    if rank == 0:
        # Here, and not in a thread: whatever waits on the store meanwhile would keep it to itself.
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
    """Tell everybody who asks the name, until all have come."""
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
