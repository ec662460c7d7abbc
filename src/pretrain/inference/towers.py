"""Vectors of images and of texts by a model with two towers, in one space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.images.given import given_images
from pretrain.data.images.rows import decoded
from pretrain.errors import DataError, ModelError
from pretrain.inference.prompts import check_ids, evaluating, tokenizer_of
from pretrain.objectives.contrastive import padded_texts
from pretrain.objectives.row_pixels import check_processor

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["embed_pairs"]


def embed_pairs(model: Model, given: Any, batch_size: int, normalize: bool) -> tuple[Tensor, int]:
    """Return the vectors of texts or of images, (N, P) in fp32 on the CPU, and how many texts were cut.

    Args:
        model: a model with two towers.
        given: a text, texts, an image or images; see ``embed``.
        batch_size: texts or images in one forward pass.
        normalize: scale every vector to length one.

    Raises:
        DataError: an image cannot be read, or is missing.
        ModelError: something else is given, or the model lacks the tokenizer or the image processor.
    """
    items = [given] if isinstance(given, str) else given
    texts = isinstance(items, list | tuple) and all(isinstance(item, str) for item in items)
    batches, cut = _texts(model, list(items), batch_size) if texts else (None, 0)
    towers: Any = model.backbone
    vectors = []
    with evaluating(model) as device:
        for batch in batches or _images(model, given, batch_size):
            moved = {key: value.to(device) for key, value in batch.items()}
            found = (
                model(moved)
                if normalize
                else towers.text_vectors(moved["input_ids"], moved.get("attention_mask"))
                if texts
                else towers.image_vectors(moved["pixel_values"])
            )
            vectors.append(found.float().cpu())
    return torch.cat(vectors) if vectors else torch.empty(0, towers.config.projection_dim), cut


def _texts(
    model: Model, texts: list[str], batch_size: int
) -> tuple[Iterator[dict[str, Tensor]], int]:
    tokenizer: Any = tokenizer_of(model, "read text")
    towers: Any = model.backbone
    encodings = tokenizer.frame_texts(texts, max_length=towers.max_length)
    rows = [encoding.ids for encoding in encodings]
    check_ids(model, rows, "Text")
    batches = (
        padded_texts(towers, [np.asarray(ids) for ids in rows[start : start + batch_size]])
        for start in range(0, len(rows), batch_size)
    )
    return batches, sum(bool(encoding.overflowing) for encoding in encodings)


def _images(model: Model, given: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    processor = check_processor(model, "embed")
    found = given_images(list(given) if isinstance(given, tuple) else given, processor.channels)
    if found is None:
        raise ModelError(
            f"embed got {type(given).__name__}, which is neither a text nor an image. Give texts, or images: paths "
            "(pathlib.Path), arrays, bytes, images of Pillow, or the path of a folder."
        )
    values: list[Any] = []
    for i, image, why in decoded(found[0], required=True):
        if image is None:
            raise DataError(
                f"{found[0].where(i)}: {why}. Leave it out; every image needs a vector."
            )
        values.append(processor.values(processor.fitted(image.image())))
        if len(values) == batch_size:
            yield {"pixel_values": torch.from_numpy(np.stack(values))}
            values = []
    if values:
        yield {"pixel_values": torch.from_numpy(np.stack(values))}
