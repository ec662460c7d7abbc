"""Pre-training and fine-tuning of transformers, with checkpoints as Hugging Face directories.

The names below are the public interface. They are imported on first use, so that ``import pretrain`` and
``pretrain --help`` are fast.
"""

from __future__ import annotations

import importlib
from typing import Any

from pretrain import data  # a callable package: pretrain.data("reviews.csv")

__version__ = "0.1.0"

_PUBLIC = {
    "MaskedLM": "pretrain.objectives.masked_lm",
    "Model": "pretrain.models.base",
    "NextToken": "pretrain.objectives.next_token",
    "Objective": "pretrain.objectives.base",
    "Prepared": "pretrain.data.prepare",
    "PretrainError": "pretrain.errors",
    "RowSource": "pretrain.data.row_source",
    "RunConfig": "pretrain.config",
    "Tokenizer": "pretrain.data.tokenizer",
    "Trainer": "pretrain.training.trainer",
    "bench": "pretrain.training.bench",
    "build": "pretrain.models",
    "evaluate": "pretrain.evaluation",
    "export": "pretrain.exporting.run",
    "finetune": "pretrain.finetuning.run",
    "inspect": "pretrain.checkpoint",
    "load": "pretrain.checkpoint",
    "lr_range_test": "pretrain.training.lr_range",
    "prepare": "pretrain.data.prepare",
    "probe": "pretrain.evaluation.probe",
    "sizes": "pretrain.training.sizes",
    "train": "pretrain.training.run",
    "train_tokenizer": "pretrain.data.tokenizer",
}

_MODULES = ("lora", "metrics")  # imported on first use, like the names above

__all__ = ["__version__", "data", *_MODULES, *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pretrain.{name}")
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
