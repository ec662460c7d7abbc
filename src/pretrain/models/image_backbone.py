"""``ImageBackbone``, the base class of the families that read images alone, and what image towers share with them.

Letters: B images, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pretrain.data.images import ImageProcessor
from pretrain.errors import ModelError
from pretrain.models.backbone import Backbone
from pretrain.nn.attention import KVCache

__all__ = ["ImageBackbone", "image_processor", "random_images"]


def image_processor(config: Any) -> ImageProcessor | None:
    """Return the processor of a new model: pixels from -1 to 1; None for images that are neither grey nor RGB."""
    if config.num_channels not in (1, 3):
        return None
    half = (0.5,) * config.num_channels
    return ImageProcessor(size=config.image_size, image_mean=half, image_std=half)


def random_images(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a batch of two random images."""
    shape = (2, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=generator)}


class ImageBackbone(Backbone):
    """Base class of the models of images: ``pixel_values`` (B, C, H, W) -> hidden states."""

    causal: ClassVar[bool] = False
    processor_class: ClassVar[Any] = ImageProcessor

    @classmethod
    def default_processor(cls, config: Any) -> Any:
        return image_processor(config)

    def random_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        return random_images(self.config, generator)

    def id_limits(self) -> dict[str, tuple[str, int]]:
        return {}

    def check_inputs(self, pixels: Tensor, cache: KVCache | None) -> None:
        """Check that there are images of the right number of channels, and no key-value cache.

        Raises:
            ModelError: there is a cache, or the images have another number of dimensions or channels.
        """
        if cache is not None:
            raise ModelError(
                f"A {self.model_type} model reads images, so it has no key-value cache. Leave cache out."
            )
        channels = self.config.num_channels
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ModelError(
                f"pixel_values has the shape {tuple(pixels.shape)}; it must be (images, {channels}, height, width), "
                f"because this {self.model_type} model reads {channels} channels. The image processor beside the "
                "weights returns that."
            )
