"""Inference with trained models: text generation, mask filling, embeddings and predictions.

What other packages seldom need is imported when it is used, under the names below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.inference.images import embed_pairs
    from pretrain.inference.predict import predict_with

__all__ = ["embed_pairs", "predict_with"]

__getattr__ = on_use(
    __name__,
    {
        "pretrain.inference.images": ("embed_pairs",),
        "pretrain.inference.predict": ("predict_with",),
    },
)
