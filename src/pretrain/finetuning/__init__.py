"""Fine-tuning of a pre-trained model on a task, its report, and the comparison with training from scratch.

What only some runs need is imported when it is used, under the names below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.finetuning.adapter import add_adapter
    from pretrain.finetuning.compare import Comparison, check_comparison, compare_arms

__all__ = ["Comparison", "add_adapter", "check_comparison", "compare_arms"]

__getattr__ = on_use(
    __name__,
    {
        "pretrain.finetuning.adapter": ("add_adapter",),
        "pretrain.finetuning.compare": ("Comparison", "check_comparison", "compare_arms"),
    },
)
