"""Main process first, without a process group: one process fills a cache that the others then read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from pretrain.distributed.world import World
from pretrain.errors import DistributedError

__all__ = ["main_process_first"]

T = TypeVar("T")
_POLL = 0.1


def main_process_first(world: World, make: Callable[[], T], what: str) -> T:
    """Call ``make``, which caches its result, on rank 0, then on one process of every other host, then on the rest.

    Ranks wait on the store, without a process group, so that a long preparation of data meets no timeout.

    Raises:
        DistributedError: on the waiting ranks, if the rank that they wait for failed.
    """
    if world.size == 1:
        return make()
    world.turns += 1
    stage = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    mine = f"pretrain/turn/{world.turns}/{world.rank}"
    if stage:
        before = 0 if stage == 1 else world.rank - world.local_rank
        _await(world, f"pretrain/turn/{world.turns}/{before}", what, before)
    try:
        made = make()
    except BaseException as error:
        world.store.set(mine, f"{type(error).__name__}: {error}"[:4000])
        raise
    world.store.set(mine, "done")
    return made


def _await(world: World, key: str, what: str, rank: int) -> None:
    while not world.store.check([key]):
        time.sleep(_POLL)
    said = world.store.get(key).decode("utf-8", "replace")
    if said != "done":
        error = DistributedError(f"Rank {rank} could not {what}. {said}")
        error.everywhere = True  # that rank prints its own error
        raise error
