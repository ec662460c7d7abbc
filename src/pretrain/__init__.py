"""Pre-training and fine-tuning of transformers, with checkpoints as Hugging Face directories.

The names below are the public interface. They are imported on first use, so that ``import pretrain`` and
``pretrain --help`` are fast.
"""

from __future__ import annotations

from pretrain import data  # a callable package: pretrain.data("reviews.csv")
from pretrain.utils.on_use import on_use

__version__ = "0.1.0"

_PLACES: dict[str, tuple[str, ...]] = {
    "pretrain.checkpoint": ("inspect", "load"),
    "pretrain.config": ("RunConfig",),
    "pretrain.data.prepare": ("Prepared", "prepare"),
    "pretrain.data.row_source": ("RowSource",),
    "pretrain.data.tokenizer": ("Tokenizer", "train_tokenizer"),
    "pretrain.errors": ("PretrainError",),
    "pretrain.evaluation": ("evaluate",),
    "pretrain.evaluation.probe": ("probe",),
    "pretrain.exporting.run": ("export",),
    "pretrain.finetuning.run": ("finetune",),
    "pretrain.lora": (),
    "pretrain.metrics": (),
    "pretrain.models": ("build",),
    "pretrain.models.base": ("Model",),
    "pretrain.objectives.base": ("Objective",),
    "pretrain.objectives.masked_lm": ("MaskedLM",),
    "pretrain.objectives.next_token": ("NextToken",),
    "pretrain.training.bench": ("bench",),
    "pretrain.training.lr_range": ("lr_range_test",),
    "pretrain.training.run": ("train",),
    "pretrain.training.sizes": ("sizes",),
    "pretrain.training.trainer": ("Trainer",),
}

__all__ = ["__version__", "data", "lora", "metrics"]
__all__ += [name for names in _PLACES.values() for name in names]

__getattr__ = on_use(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted(__all__)
