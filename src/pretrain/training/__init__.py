"""The training loop and its parts, independent of model families and objectives.

What only runs from a checkpoint or on several devices need is imported when it is used, under the names below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.training import starting_model as starting_model
    from pretrain.training.launch import on_devices, read_run

__all__ = ["on_devices", "read_run"]

__getattr__ = on_use(
    __name__,
    {
        "on_devices": "pretrain.training.launch",
        "read_run": "pretrain.training.launch",
        "starting_model": "pretrain.training.starting_model",
    },
)
