"""Small pictures of masks, boxes and attention over their images, as addresses of images in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.images.decode import Picture
from pretrain.utils.imports import pillow

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["COLOURS", "colour", "with_boxes", "with_light", "with_mask"]

# Okabe and Ito (2008): told apart with any kind of colour vision.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
_SIDE = 240  # pixels of the longer side


def colour(k: int) -> str:
    """Return the colour of a class; they repeat if there are many."""
    return COLOURS[k % len(COLOURS)]


def with_mask(picture: Picture, mask: NDArray[np.uint8]) -> str:
    """Return the image with the classes (H, W) in colours; class 0 has none, and pixels without a class are dark."""
    from PIL import ImageColor

    image = _small(picture)
    module = pillow()
    classes = np.asarray(module.fromarray(mask).resize(image.size, module.Resampling.NEAREST))
    table = np.asarray(
        [[0, 0, 0], *([ImageColor.getrgb(colour(k - 1)) for k in range(1, 255)]), [0, 0, 0]]
    )
    pixels = np.asarray(image, np.float32)
    mixed = np.where((classes > 0)[..., None], 0.45 * pixels + 0.55 * table[classes], pixels)
    return _address(module.fromarray(mixed.round().astype(np.uint8)))


def with_boxes(picture: Picture, boxes: Sequence[Sequence[float]], classes: Sequence[int]) -> str:
    """Return the image with boxes of left, top, right, bottom, in pixels of the image, in the colours of classes."""
    from PIL import ImageDraw

    image = _small(picture)
    full = picture.read()[0].size
    scale = [image.width / full[0], image.height / full[1]] * 2
    draw = ImageDraw.Draw(image)
    for box, k in zip(boxes, classes, strict=True):
        left, top, right, bottom = (x * s for x, s in zip(box, scale, strict=True))
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour(k), width=2)
    return _address(image)


def with_light(pixels: NDArray[np.uint8], light: NDArray[np.float32]) -> str:
    """Return an image (H, W, C) that is dark where ``light`` (h, w) is small, beside its largest value."""
    module = pillow()
    image = module.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    shade = module.fromarray(light / max(float(light.max()), 1e-30))
    share = np.asarray(shade.resize(image.size, module.Resampling.BILINEAR)).clip(0, 1)
    mixed = np.asarray(image, np.float32) * (0.2 + 0.8 * share[..., None])
    return _address(module.fromarray(mixed.round().astype(np.uint8)))


def _small(picture: Picture) -> Image:
    image = picture.read()[0].convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    return image


def _address(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
