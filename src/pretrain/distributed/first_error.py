"""Which of several processes prints an error that more than one of them ended with."""

from __future__ import annotations

import contextlib
from typing import Any

from pretrain.distributed.store import absent, get, put
from pretrain.distributed.world import current_world, world_is_known
from pretrain.errors import DistributedError, PretrainError

__all__ = ["is_first_error"]

_SECONDS = 2.0  # seconds within which all processes fail that fail by the same cause
_REACH = 5.0  # seconds to connect to the others, if that has not been done yet


def is_first_error(error: PretrainError, rank: int) -> bool:
    """Return whether no lower rank ended with the same error; wait 2 seconds at most for other failing processes."""
    if not world_is_known() and isinstance(error, DistributedError):
        return True  # the error is that the other processes cannot be reached
    lower: list[str] = []
    with contextlib.suppress(PretrainError, RuntimeError):
        world: Any = current_world(_REACH)  # several processes
        put(world.store, f"error/{rank}", str(error))
        late = absent(world.store, "error", range(world.size), _SECONDS)
        lower = [get(world.store, f"error/{one}") for one in range(rank) if one not in late]
    return str(error) not in lower
