"""Error output of a command that fails in several processes: every error is printed once, and completely."""

from __future__ import annotations

import contextlib
import os
import signal

from pretrain.distributed.launched import launched
from pretrain.errors import DistributedError, PretrainError

__all__ = ["prints_error"]

_SECONDS = 2.0  # seconds within which all processes fail that fail by the same cause
_REACH = 5.0  # seconds to connect to the others, if that has not been done yet


def prints_error(error: PretrainError) -> bool:
    """Return whether this process prints the error that ends its command: the lowest rank with that error does.

    Under a launcher it waits for other failing processes, for 2 seconds at most, and ignores SIGTERM from here on:
    when the first process has ended, the launcher sends SIGTERM to the others, which may not have printed theirs yet.
    """
    if not launched():
        return True
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    said = rank > 0 and error.everywhere
    # These import torch, which a process without a launcher does not need here.
    from pretrain.distributed.store import get, put, wait
    from pretrain.distributed.world import current_world, found

    if not found() and isinstance(error, DistributedError):
        return not said  # the error is that the others cannot be reached
    with contextlib.suppress(PretrainError, RuntimeError):
        world = current_world(_REACH)
        keys = [f"error/{one}" for one in range(world.size)]
        put(world.store, keys[rank], str(error))
        wait(world.store, keys, _SECONDS)
        lower = [get(world.store, key) for key in keys[:rank] if world.store.check([key])]
        said = said or str(error) in lower
    return not said
