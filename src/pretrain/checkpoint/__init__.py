"""The checkpoint format: a Hugging Face model directory with a manifest and a training folder to resume from.

    checkpoint-1200/
      config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json  README.md
                       or adapter_config.json and adapter_model.safetensors, as peft writes them
      training/        optimizer.safetensors, state.json: may be deleted, never needed by `load`
      manifest.json    size and SHA-256 of every file, written last

A checkpoint is written to a temporary sibling directory, flushed, verified and renamed; the previous checkpoint is kept
until then. Nothing is pickled, and no pickle is ever opened. Every file is treated as untrusted input.

The names below are imported on first use, so that reading a manifest does not import the models; so is
``adapter_files``, which the other modules use for models that have an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.checkpoint import adapter_files as adapter_files
    from pretrain.checkpoint.loading import inspect, load
    from pretrain.checkpoint.manifest import latest, rotate, verify
    from pretrain.checkpoint.saving import Saver, estimated_size, save_checkpoint, save_model
    from pretrain.checkpoint.sharded_loading import read_training
    from pretrain.checkpoint.training_state import TrainingState
    from pretrain.utils.directories import check_writable
    from pretrain.utils.runlock import RunLock

__all__ = [
    "RunLock",
    "Saver",
    "TrainingState",
    "check_writable",
    "estimated_size",
    "inspect",
    "latest",
    "load",
    "read_training",
    "rotate",
    "save_checkpoint",
    "save_model",
    "verify",
]

__getattr__ = on_use(
    __name__,
    {
        "pretrain.checkpoint.adapter_files": (),
        "pretrain.checkpoint.loading": ("inspect", "load"),
        "pretrain.checkpoint.manifest": ("latest", "rotate", "verify"),
        "pretrain.checkpoint.saving": ("Saver", "estimated_size", "save_checkpoint", "save_model"),
        "pretrain.checkpoint.sharded_loading": ("read_training",),
        "pretrain.checkpoint.training_state": ("TrainingState",),
        "pretrain.utils.directories": ("check_writable",),
        "pretrain.utils.runlock": ("RunLock",),
    },
)
