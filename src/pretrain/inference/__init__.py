"""Inference with trained models: text generation, mask filling, embeddings and predictions.

What only models of images need is imported when it is used, under the name below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.inference.images import embed_pairs

__all__ = ["embed_pairs"]

__getattr__ = on_use(__name__, {"embed_pairs": "pretrain.inference.images"})
