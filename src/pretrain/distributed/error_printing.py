"""The end of a command that fails in several processes: every cause is said once, and nobody is cut short."""

from __future__ import annotations

import contextlib
import os
import signal

from pretrain.distributed.launched import launched
from pretrain.errors import DistributedError, PretrainError

__all__ = ["prints_error"]

_SECONDS = 2.0  # in which all fail that fail by the same cause
_REACH = 5.0  # seconds to find the others, where they had not met yet


def prints_error(error: PretrainError) -> bool:
    """Whether this process prints the error that ends its command: the lowest rank that has it does.

    Under a launcher it waits for those that fail as well, for 2 seconds at most, and is deaf to SIGTERM from here on:
    when the first process has ended, the launcher asks the others to end, which are about to say why they do.
    """
    if not launched():
        return True
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    said = rank > 0 and error.everywhere
    # Torch comes with these; nobody needs it to learn that he is alone.
    from pretrain.distributed.store import get, put, wait
    from pretrain.distributed.world import current_world, found

    if not found() and isinstance(error, DistributedError):
        return not said  # it says that there is no way to the others
    with contextlib.suppress(PretrainError, RuntimeError):
        world = current_world(_REACH)
        keys = [f"error/{one}" for one in range(world.size)]
        put(world.store, keys[rank], str(error))
        wait(world.store, keys, _SECONDS)
        lower = [get(world.store, key) for key in keys[:rank] if world.store.check([key])]
        said = said or str(error) in lower
    return not said
