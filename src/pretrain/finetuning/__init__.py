"""Fine-tuning of a pre-trained model on a task, its report, and the comparison with training from scratch.

What only some runs need is imported when it is used, under the name below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.finetuning.adapter import add_adapter

__all__ = ["add_adapter"]

__getattr__ = on_use(__name__, {"add_adapter": "pretrain.finetuning.adapter"})
