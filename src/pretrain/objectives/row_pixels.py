"""Pixel values of rows: of images, read by the model's processor, or given by the user's own source of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.data.images.augment import Augmentation
from pretrain.data.images.processor import ImageProcessor
from pretrain.errors import DataError, ModelError
from pretrain.objectives.base import ExampleList, Rngs, stack

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["check_processor", "given_pixels", "pixel_values"]


def check_processor(model: Model, what: str) -> ImageProcessor:
    """Return the image processor of a model, if it gives all images the channels and one size.

    Args:
        model: the model.
        what: what reads images, for messages.

    Raises:
        ModelError: there is none, or it does not fit.
    """
    processor = getattr(model.processor, "images", model.processor)
    if not isinstance(processor, ImageProcessor):
        raise ModelError(
            f"{what} reads images, and the model has no image processor. Put preprocessor_config.json into its "
            "directory, or set model.processor to a pretrain.data.images.ImageProcessor."
        )
    channels = getattr(model.backbone.config, "num_channels", processor.channels)
    if channels != processor.channels:
        raise ModelError(
            f"The model reads {channels} channels, and its image processor returns {processor.channels}: "
            "image_mean in preprocessor_config.json has as many values as there are channels."
        )
    if processor.size is None:
        raise ModelError(
            "The image processor keeps the proportions of images, so those of a batch would be of different sizes. "
            'Set "size" to {"height": ..., "width": ...} in preprocessor_config.json, or do_center_crop.'
        )
    return processor


def given_pixels(examples: ExampleList) -> Tensor:
    """Stack the pixel values that rows hold, (B, C, H, W) in fp32.

    Raises:
        DataError: images of different sizes, or bytes, which no processor has brought to the values of the model.
    """
    values = stack(examples, ("pixel_values",))["pixel_values"]
    if not values.is_floating_point():
        kind = getattr(examples[0]["pixel_values"], "dtype", "integers")
        raise DataError(
            f"pixel_values of the rows are {kind}, and a model reads normalised numbers. Give what the image processor "
            'returns, processor(images)["pixel_values"], or rows with "image" instead, which it then reads.'
        )
    return values.to(torch.float32)


def pixel_values(
    model: Model, augmentation: Augmentation, examples: ExampleList, rngs: Rngs, *, evaluation: bool, what: str
) -> Tensor:  # fmt: skip
    """Return the pixel values of rows with ``image`` or ``pixel_values``, (B, C, H, W); images are changed in training.

    Args:
        model: its processor reads the images.
        augmentation: random changes of training images.
        examples: the rows.
        rngs: one generator per row.
        evaluation: whether nothing is changed.
        what: the objective, for messages.

    Raises:
        DataError: the rows hold neither, or pixel values that are to be changed.
        ModelError: the processor of the model does not fit.
    """
    first: Any = examples[0]
    if "image" in first:
        processor = check_processor(model, what)
        held = [example["image"] for example in examples]
        return torch.from_numpy(augmentation.values(held, processor, rngs, evaluation=evaluation))
    if "pixel_values" not in first:
        raise DataError(
            f"{what} reads rows with image or pixel_values; these have {', '.join(first)}."
        )
    if augmentation != Augmentation() and not evaluation:
        raise DataError(
            "The rows hold pixel values, which are not changed at random. Set crop to 1 and leave flip and randaugment "
            "out, or give rows of images (data.source images)."
        )
    return given_pixels(examples)
