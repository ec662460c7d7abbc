"""Data: sources, tokenizer, prepared shards, packing, labelled tables. Imports no model and no torch.

The package can be called: ``pretrain.data("reviews.csv", task="classification", tokenizer="runs/books-bert")`` shows
what fine-tuning would see, see :func:`pretrain.finetuning.preview.look`. One word for "my data" serves the user better
than a second name beside this package; a module is callable if its class has ``__call__``.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from pretrain.hub import function


class _Callable(types.ModuleType):
    """A module that answers a call."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Show the data of a fine-tuning run; all arguments go to :func:`pretrain.finetuning.preview.look`."""
        return function("look")(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
