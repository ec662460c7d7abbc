"""Data: sources, tokenizer, prepared shards, packing, tables, images. Imports no model, and torch for images only.

The package is callable: ``pretrain.data("reviews.csv", task="classification", tokenizer="runs/books-bert")`` previews
the input of a fine-tuning run, see :func:`pretrain.finetuning.preview.look`. This spares users a second name beside
the package. A module is callable if its class defines ``__call__``.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from pretrain.hub import function
from pretrain.utils.on_use import on_use

__getattr__ = on_use(
    __name__,
    {
        "pretrain.data.images": (),
        "pretrain.data.table_readers": (),  # plain text does without
        "pretrain.data.template_sandbox": (),  # imports jinja2, for conversations only
    },
)

if TYPE_CHECKING:
    from pretrain.data import images as images
    from pretrain.data import table_readers as table_readers
    from pretrain.data import template_sandbox as template_sandbox


class _Callable(types.ModuleType):
    """A callable module."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Show the data of a fine-tuning run; all arguments go to :func:`pretrain.finetuning.preview.look`."""
        return function("look")(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
