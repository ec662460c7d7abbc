"""Distributed training: process groups, device mesh, FSDP2, DDP, tensor parallelism, watchdog and launching.

What only several processes need is imported when it is used, under the names below: a run of one process loads none of
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.distributed.first_error import is_first_error
    from pretrain.distributed.launch import Launched
    from pretrain.distributed.parallel_strategy import ParallelStrategy
    from pretrain.distributed.processes import Processes
    from pretrain.distributed.whole_parameters import copy_whole

__all__ = ["Launched", "ParallelStrategy", "Processes", "copy_whole", "is_first_error"]

__getattr__ = on_use(
    __name__,
    {
        "pretrain.distributed.first_error": ("is_first_error",),
        "pretrain.distributed.launch": ("Launched",),
        "pretrain.distributed.parallel_strategy": ("ParallelStrategy",),
        "pretrain.distributed.processes": ("Processes",),
        "pretrain.distributed.whole_parameters": ("copy_whole",),
    },
)
