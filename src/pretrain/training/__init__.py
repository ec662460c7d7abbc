"""The training loop and its parts, independent of model families and objectives.

What only runs from a checkpoint, on several devices or in float8 need is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.training import starting_model as starting_model
    from pretrain.training.float8 import end_float8, use_float8
    from pretrain.training.launch import on_devices, read_run

__all__ = ["end_float8", "on_devices", "read_run", "use_float8"]

__getattr__ = on_use(
    __name__,
    {
        "pretrain.training.float8": ("end_float8", "use_float8"),
        "pretrain.training.launch": ("on_devices", "read_run"),
        "pretrain.training.starting_model": (),
    },
)
