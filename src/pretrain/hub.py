"""User-facing methods of the models that `pretrain.load` and `pretrain.build` return.

Their functions belong to layers above the model (text generation, prediction, checkpoints), which a model must not
import. Each function is therefore named here by its path, as families and objectives are, and imported when the method
is called: a model that is only trained imports none of them. ``pretrain.data(...)`` finds its function in the same way.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Self

__all__ = ["ModelMethods", "function"]

_FUNCTIONS = {
    "generate": "pretrain.inference.generate",
    "fill_mask": "pretrain.inference.generate",
    "embed": "pretrain.inference.generate",
    "similarity": "pretrain.inference.vectors",
    "search": "pretrain.inference.vectors",
    "log_likelihood": "pretrain.inference.likelihood",
    "predict": "pretrain.inference.predict",
    "write": "pretrain.inference.generate",
    "chat": "pretrain.inference.chat",
    "save_model": "pretrain.checkpoint",
    "push_to_hub": "pretrain.checkpoint.upload",
    "export": "pretrain.exporting.run",
    "load": "pretrain.checkpoint",
    "merge": "pretrain.lora.attach",
    "look": "pretrain.finetuning.preview",
}


def function(name: str) -> Any:
    """Import and return a function of a layer above by its name in ``_FUNCTIONS``."""
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)


class ModelMethods:
    """Methods of `pretrain.Model`; each refers to the function that does the work."""

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Continue prompts; see ``pretrain.inference.generate.generate``."""
        return function("generate")(self, prompts, **options)

    def fill_mask(self, text: Any, **options: Any) -> Any:
        """Fill mask tokens; see ``pretrain.inference.generate.fill_mask``."""
        return function("fill_mask")(self, text, **options)

    def embed(self, texts: Any, **options: Any) -> Any:
        """Return one vector per text, or per image; see ``pretrain.inference.generate.embed``."""
        return function("embed")(self, texts, **options)

    def similarity(self, a: Any, b: Any = None, **options: Any) -> Any:
        """Return the cosines between texts, (len(a), len(b)); see ``pretrain.inference.vectors.similarity``."""
        return function("similarity")(self, a, b, **options)

    def search(self, queries: Any, texts: Any, top_k: int = 10, **options: Any) -> Any:
        """Return the texts nearest to a query; see ``pretrain.inference.vectors.search``."""
        return function("search")(self, queries, texts, top_k, **options)

    def log_likelihood(self, texts: Any, **options: Any) -> Any:
        """Return the log-likelihoods of texts; see ``pretrain.inference.likelihood.log_likelihood``."""
        return function("log_likelihood")(self, texts, **options)

    def predict(self, inputs: Any, **options: Any) -> Any:
        """Predict for texts, pairs or rows with the fine-tuned task; see ``pretrain.inference.predict.predict``."""
        return function("predict")(self, inputs, **options)

    def chat(self, messages: Any, **options: Any) -> Any:
        """Return the answer to a conversation; see ``pretrain.inference.chat.chat``."""
        return function("chat")(self, messages, **options)

    def save(self, directory: str | Path) -> Path:
        """Write a directory that transformers can load; see ``pretrain.checkpoint.save_model``."""
        function("save_model")(self, directory)
        return Path(os.path.expanduser(directory))

    save_pretrained = save

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Write the model to the Hugging Face Hub in one commit; see ``pretrain.checkpoint.upload.push_to_hub``."""
        address: str = function("push_to_hub")(self, name, **options)
        return address

    def export(self, to: str, out: str | Path, **options: Any) -> Path:
        """Write the model in the format of another program; see ``pretrain.exporting.run.export``."""
        path: Path = function("export")(self, to, out, **options)
        return path

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Load a model from a directory; see ``pretrain.checkpoint.load``."""
        model: Self = function("load")(directory)
        return model

    def merge_adapter(self, check: bool = True) -> Self:
        """Merge the adapter into the weights; see ``pretrain.lora.attach.merge``."""
        model: Self = function("merge")(self, check)
        return model
