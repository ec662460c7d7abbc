"""What a user does with a model: the methods of what `pretrain.load` and `pretrain.build` return.

They belong to layers above the model (text generation, prediction, checkpoints), which a model must not import. Each
function is therefore named here by its path, as families and objectives are, and found when the method is called: a
model that is only trained loads none of them. ``pretrain.data(...)`` finds its function in the same way.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Self

__all__ = ["ModelMethods", "function"]

_FUNCTIONS = {
    "generate": "pretrain.inference.generate",
    "fill_mask": "pretrain.inference.generate",
    "embed": "pretrain.inference.generate",
    "predict": "pretrain.inference.predict",
    "chat": "pretrain.inference.predict",
    "save_model": "pretrain.checkpoint",
    "load": "pretrain.checkpoint",
    "merge": "pretrain.adapters.attach",
    "look": "pretrain.finetuning.preview",
}


def function(name: str) -> Any:
    """A function of a layer above, by name; see the table."""
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)


class ModelMethods:
    """Methods of `pretrain.Model`; each says where the function lies that does the work."""

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Continue prompts; see ``pretrain.inference.generate.generate``."""
        return function("generate")(self, prompts, **options)

    def fill_mask(self, text: Any, **options: Any) -> Any:
        """Fill mask tokens; see ``pretrain.inference.generate.fill_mask``."""
        return function("fill_mask")(self, text, **options)

    def embed(self, texts: Any, **options: Any) -> Any:
        """One vector per text; see ``pretrain.inference.generate.embed``."""
        return function("embed")(self, texts, **options)

    def predict(self, inputs: Any, **options: Any) -> Any:
        """Answer texts, pairs or rows with the task of fine-tuning; see ``pretrain.inference.predict.predict``."""
        return function("predict")(self, inputs, **options)

    def chat(self, messages: Any, **options: Any) -> str:
        """Answer a conversation; see ``pretrain.inference.predict.chat``."""
        answer: str = function("chat")(self, messages, **options)
        return answer

    def save(self, directory: str | Path) -> Path:
        """Write a directory that transformers opens; see ``pretrain.checkpoint.save_model``."""
        function("save_model")(self, directory)
        return Path(directory)

    save_pretrained = save

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Open a directory; see ``pretrain.checkpoint.load``."""
        model: Self = function("load")(directory)
        return model

    def merge_adapter(self, check: bool = True) -> Self:
        """Fold the adapter into the weights; see ``pretrain.adapters.attach.merge``."""
        model: Self = function("merge")(self, check)
        return model
