"""Pixel values of rows: of images, read by the model's processor, or given by the user's own source of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pretrain.data.audio import AudioProcessor
from pretrain.data.images.augment import Augmentation
from pretrain.data.images.processor import ImageProcessor
from pretrain.errors import DataError, ModelError
from pretrain.objectives.base import ExampleList, Rngs, stack

if TYPE_CHECKING:
    from pretrain.models.base import Model
    from pretrain.objectives.base import Objective

__all__ = ["check_processor", "pixel_values", "reads_audio", "values_key"]


def reads_audio(model: Model) -> bool:
    """Whether a model reads spectrograms, not images."""
    return model.backbone.processor_class is AudioProcessor


def values_key(model: Model) -> str:
    """Return the key of batches and rows under which a model reads pixels or spectrograms."""
    return AudioProcessor.key if reads_audio(model) else "pixel_values"


def check_processor(model: Model, what: str) -> Any:
    """Return the image processor of a model, if it gives all images the channels and one size; or the audio processor.

    Args:
        model: the model.
        what: what reads images, for messages.

    Raises:
        ModelError: there is none, or it does not fit.
    """
    if reads_audio(model):
        return _check_audio(model, what)
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


def _check_audio(model: Model, what: str) -> AudioProcessor:
    processor, config = model.processor, model.backbone.config
    if not isinstance(processor, AudioProcessor):
        raise ModelError(
            f"{what} reads audio, and the model has no audio processor. Put preprocessor_config.json into its "
            "directory, or set model.processor to a pretrain.data.audio.AudioProcessor."
        )
    if processor.shape != (config.max_length, config.num_mel_bins):
        raise ModelError(
            f"The model reads {config.max_length} frames of {config.num_mel_bins} mel bands, and its audio processor "
            f"returns {processor.shape[0]} of {processor.shape[1]}: max_length and num_mel_bins must be the same in "
            "config.json and in preprocessor_config.json."
        )
    return processor


def pixel_values(
    objective: Objective, examples: ExampleList, rngs: Rngs, *, evaluation: bool
) -> Tensor:
    """Return the pixel values of rows with ``image`` or ``pixel_values``, (B, C, H, W) in fp32.

    Of rows with ``audio`` or ``input_values`` it returns the spectrograms, (B, T, M).

    Args:
        objective: the processor of its model reads the images, and its ``augmentation`` changes those of training.
        examples: the rows.
        rngs: one generator per row.
        evaluation: whether nothing is changed.

    Raises:
        DataError: the rows hold neither; or pixel values that are to be changed, of different sizes, or bytes, which
            no processor has brought to the values of the model.
        ModelError: the processor of the model does not fit.
    """
    first: Any = examples[0]
    model, augmentation = objective.model, cast(Any, objective.augmentation)
    what = getattr(objective, "name", type(objective).__name__)
    key, column = values_key(model), AudioProcessor.column if reads_audio(model) else "image"
    if column in first:
        processor = check_processor(model, what)
        held: list[Any] = [example[column] for example in examples]
        return torch.from_numpy(augmentation.values(held, processor, rngs, evaluation=evaluation))
    if key not in first:
        raise DataError(f"{what} reads rows with {column} or {key}; these have {', '.join(first)}.")
    if augmentation != type(augmentation)() and not evaluation:
        advice = (
            "Set crop to 1 and leave flip, randaugment and jitter out, or give rows of images (data.source images)."
            if isinstance(augmentation, Augmentation)
            else "Set shift, mask_time and mask_bands to 0, or give rows of recordings (data.source audio)."
        )
        raise DataError(f"The rows hold {key}, which are not changed at random. {advice}")
    values = stack(examples, (key,))[key]
    if not values.is_floating_point():
        kind = getattr(first[key], "dtype", "integers")
        raise DataError(
            f"{key} of the rows are {kind}, and a model reads normalised numbers. Give what the {column} processor "
            f'returns, processor(...)["{key}"], or rows with "{column}" instead, which it then reads.'
        )
    return values.to(torch.float32)
