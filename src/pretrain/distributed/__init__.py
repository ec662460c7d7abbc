"""Distributed training: process groups, device mesh, FSDP2, DDP, tensor parallelism, watchdog and launching.

What only several processes need is imported when it is used, under the names below: a run of one process loads none of
it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.distributed.launch import Launched
    from pretrain.distributed.parallel_strategy import ParallelStrategy
    from pretrain.distributed.processes import Processes
    from pretrain.distributed.whole_parameters import copy_whole

__all__ = ["Launched", "ParallelStrategy", "Processes", "copy_whole"]

_PLACES = {
    "Launched": "pretrain.distributed.launch",
    "ParallelStrategy": "pretrain.distributed.parallel_strategy",
    "Processes": "pretrain.distributed.processes",
    "copy_whole": "pretrain.distributed.whole_parameters",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pretrain.distributed' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
