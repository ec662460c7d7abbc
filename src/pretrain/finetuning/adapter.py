"""The adapter of a fine-tuning run with ``method.lora``."""

from __future__ import annotations

from pretrain.finetuning.settings import TuneMethod
from pretrain.lora import LoraConfig, apply_lora
from pretrain.models.base import Model

__all__ = ["add_adapter"]


def add_adapter(model: Model, method: TuneMethod, seed: int) -> None:
    """Freeze a model and add the adapter that the settings describe."""
    targets = method.targets
    config = LoraConfig(
        r=method.lora,
        alpha=method.alpha or 2 * method.lora,
        dropout=method.lora_dropout,
        targets=tuple(targets) if isinstance(targets, list) else targets,
        dora=method.dora,
    )
    apply_lora(model, config, seed=seed)
