"""One of several processes: who launched it, which of them prints an error, and which of them goes first.

Run as a program by `pretrain.distributed.launch`, it is ``python -m pretrain`` for one process of a launch: it leaves
the error that ends it in a file, and stops when the launching process ends, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pretrain.errors import DistributedError, PretrainError

if TYPE_CHECKING:  # both import torch, which a command without a launcher does not need here
    from pretrain.distributed.world import World

__all__ = ["ERROR", "GRACE", "SCREEN", "cores", "launched", "main_process_first", "prints_error"]

SCREEN = "PRETRAIN_SCREEN"
"""Environment variable with the path of the file to which the run relays its screen instead of drawing it."""
ERROR = "error.json"
GRACE = 600
"""Seconds within which a run that was asked to stop must save."""

_SECONDS = 2.0  # seconds within which all processes fail that fail by the same cause
_REACH = 5.0  # seconds to connect to the others, if that has not been done yet
_POLL = 0.1

T = TypeVar("T")


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def main_process_first(world: World, make: Callable[[], T], what: str) -> T:
    """Call ``make``, which caches its result, on rank 0, then on one process of every other host, then on the rest.

    Ranks wait on the store, without a process group, so that a long preparation of data meets no timeout.

    Raises:
        DistributedError: on the waiting ranks, if the rank that they wait for failed.
    """
    if world.size == 1:
        return make()
    world.turns += 1
    turn, host = f"pretrain/turn/{world.turns}", world.rank - world.local_rank
    before = None if world.rank == 0 else host if world.local_rank else 0
    try:
        if before is not None:
            _await(world, f"{turn}/{before}", f"Rank {before} could not {what}.")
        made = make()
    except BaseException as error:
        world.store.set(f"{turn}/{world.rank}", f"{type(error).__name__}: {error}"[:4000])
        raise
    world.store.set(f"{turn}/{world.rank}", "done")
    return made


def _await(world: World, key: str, failed: str) -> None:
    while not world.store.check([key]):
        time.sleep(_POLL)
    said = world.store.get(key).decode("utf-8", "replace")
    if said != "done":
        error = DistributedError(f"{failed} {said}")
        error.everywhere = True  # that rank prints its own error
        raise error


# ---------------------------------------------------------------------------------------------------- the program


def _stop_with_parent() -> None:
    """Stop this process when its standard input, a pipe from the launching process, is closed."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _main() -> None:
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        runpy.run_module("pretrain", run_name="__main__", alter_sys=True)
    except PretrainError as error:
        path = Path(os.environ[SCREEN]).parent / os.environ["RANK"] / ERROR
        with contextlib.suppress(OSError):  # a full disk
            path.write_text(json.dumps([type(error).__name__, str(error)]), encoding="utf-8")
        raise


if __name__ == "__main__":
    _main()
