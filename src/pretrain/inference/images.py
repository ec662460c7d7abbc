"""Vectors of images, and of texts by a model with two towers, in one space."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config.spelling import option
from pretrain.data.images import ImageProcessor
from pretrain.data.images.decode import SUFFIXES
from pretrain.data.images.given import given_images
from pretrain.data.images.rows import decoded
from pretrain.errors import DataError, ModelError
from pretrain.inference.prompts import check_finite, check_ids, evaluating, tokenizer_of
from pretrain.models.clip import TwoTowers
from pretrain.models.image_backbone import ImageBackbone
from pretrain.objectives.contrastive import padded_texts
from pretrain.objectives.row_pixels import check_processor
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["embed_pairs", "image_vectors"]

_FILE = re.compile(rf"\S{{1,200}}({'|'.join(map(re.escape, sorted(SUFFIXES)))})", re.IGNORECASE)


def image_vectors(
    model: Model, images: Iterable[Any], *, pooling: str | None = None, batch_rows: int = 64
) -> Tensor:
    """Return one vector for each image, (N, D) in fp32 on the CPU: pooled hidden states, or the vector of a tower.

    Args:
        model: a model of images, or of images and texts.
        images: what its image processor reads, or ``Stored`` images.
        pooling: ``mean`` over the patches, ``first`` (the class token); by default what the classifier reads, of
            dinov2 the class token alone.
        batch_rows: images in one forward pass.

    Raises:
        ModelError: the model reads no images, has no class token, or is a tower, which has vectors of its own, and
            ``pooling`` is given.
    """
    if pooling is not None and isinstance(model.backbone, TwoTowers):
        raise ModelError(
            f"A {model.backbone.model_type} model has vectors of its own: leave {option('pooling', pooling)} out."
        )
    backbone, processor = model.backbone, model.processor
    processor = getattr(processor, "images", processor)
    if not isinstance(processor, ImageProcessor):
        processor = check_processor(model, "A probe")
    parts, rest = [], iter(images)
    with evaluating(model) as device:
        while held := [_decoded(image) for image in islice(rest, batch_rows)]:
            batch = {"pixel_values": processor(held)["pixel_values"].to(device)}
            if isinstance(backbone, TwoTowers):
                vectors = backbone.image_vectors(batch["pixel_values"])
            else:
                assert isinstance(backbone, ImageBackbone)
                vectors = backbone.pooled(backbone(batch), pooling)
            parts.append(vectors.float().cpu())
    if not parts and isinstance(backbone, TwoTowers):
        return torch.empty(0, backbone.config.projection_dim)
    return check_finite(torch.cat(parts))


def _decoded(image: Any) -> Any:
    return image.image() if hasattr(image, "picture") else image


def embed_pairs(model: Model, given: Any, batch_size: int, normalize: bool) -> tuple[Tensor, int]:
    """Return the vectors of texts or of images, (N, P) in fp32 on the CPU, and how many texts were cut.

    What is given is a text, texts, an image or images, see ``embed``.

    Raises:
        DataError: an image cannot be read, or is missing.
        ModelError: something else is given, or the model lacks the tokenizer or the image processor.
    """
    items = [given] if isinstance(given, str) else given
    if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
        if named := next((text for text in items if _FILE.fullmatch(text)), None):
            note(f"{named!r} is read as a text; for the image, give pathlib.Path({named!r})")
        vectors, cut = _text_vectors(model, list(items), batch_size)
    else:
        images = _images(given, check_processor(model, "embed").channels)
        vectors, cut = image_vectors(model, images, batch_rows=batch_size), 0
    return (F.normalize(vectors, dim=-1) if normalize else vectors), cut


def _text_vectors(model: Model, texts: list[str], batch_size: int) -> tuple[Tensor, int]:
    tokenizer: Any = tokenizer_of(model, "read text")
    towers: Any = model.backbone
    encodings = tokenizer.frame_texts(texts, max_length=towers.max_length)
    rows = [encoding.ids for encoding in encodings]
    check_ids(model, rows, "Text")
    vectors = torch.empty(len(rows), towers.config.projection_dim)
    with evaluating(model) as device:
        for start in range(0, len(rows), batch_size):
            chosen = slice(start, start + batch_size)
            padded = padded_texts(towers, [np.asarray(ids) for ids in rows[chosen]])
            batch = {key: value.to(device) for key, value in padded.items()}
            found = towers.text_vectors(batch["input_ids"], batch.get("attention_mask"))
            vectors[chosen] = found.float().cpu()
    return check_finite(vectors), sum(bool(encoding.overflowing) for encoding in encodings)


def _images(given: Any, channels: int) -> Iterator[Any]:
    """Yield the decoded images of a caller, with ``channels`` channels."""
    found = given_images(list(given) if isinstance(given, tuple) else given, channels)
    if found is None:
        raise ModelError(
            f"embed got {type(given).__name__}, which is neither a text nor an image. Give texts, or images: paths "
            "(pathlib.Path), arrays, bytes, images of Pillow, or the path of a folder."
        )
    for i, image, why in decoded(found[0], required=True):
        if image is None:
            raise DataError(
                f"{found[0].where(i)}: {why}. Leave it out; every image needs a vector."
            )
        yield image
