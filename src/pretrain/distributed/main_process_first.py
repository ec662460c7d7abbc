"""One after the other, without a process group: what one process makes is found by the rest."""

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
    """Let rank 0 make something that is cached, then one process of every host, then the rest.

    It waits through the store alone, without a process group: there is no time limit that a long preparation
    of data could run into.

    Raises:
        DistributedError: on the others, when an earlier one failed.
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
        error.everywhere = True  # that rank says it itself
        raise error
