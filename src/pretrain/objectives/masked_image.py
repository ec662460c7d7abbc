"""Masked autoencoding of images: predict the pixels of hidden patches from the visible ones (MAE, arXiv 2111.06377).

Spectrograms are images of one channel: their rows are mel bands, their columns frames (AudioMAE, arXiv 2207.06405).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from pretrain.config.spelling import option
from pretrain.data.audio.augment import SpectrogramChanges
from pretrain.data.images.augment import Augmentation
from pretrain.errors import ConfigError, ModelError
from pretrain.nn.block import columns_of
from pretrain.nn.patches import patch_pixels
from pretrain.objectives.base import Batch, ExampleList, Loss, Objective, Rngs
from pretrain.objectives.row_pixels import pixel_values, reads_audio, values_key

if TYPE_CHECKING:
    from pretrain.data.loader import Examples
    from pretrain.models.base import Model

__all__ = ["MaskedImage", "patch_targets"]

_EPS = 1e-6  # added to the variance of the pixels of a patch, as in the published code


class MaskedImage(Objective):
    """Predict the pixels of hidden patches; the encoder computes only the visible ones.

    Args:
        model: a ViT-MAE model with its decoder, or an audio spectrogram transformer with one.
        mask_ratio: share of the patches that are hidden; by default that of the model's config, 0.75 in a new model.
        norm_pixels: give the pixels of each target patch mean 0 and variance 1; by default ``norm_pix_loss`` of the
            model's config, which is true in a new model. Both are recorded in config.json.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops. For rows of
            images, not for rows of pixel values or of audio.
        flip: mirror half of the training images.

    Raises:
        ModelError: the model has no decoder of pixels.
        ConfigError: ``mask_ratio`` leaves no patch visible, or none hidden; or audio is to be cropped or mirrored.
    """

    head_kind: ClassVar[str | None] = "masked-image"
    figures: ClassVar[tuple[str, ...] | None] = ("loss",)

    def __init__(
        self,
        model: Model,
        mask_ratio: float | None = None,
        norm_pixels: bool | None = None,
        crop: float = 1.0,
        flip: bool = False,
    ) -> None:
        super().__init__(model)
        if model.head_kind != "masked-image":
            raise ModelError(
                f"MaskedImage needs a model with a decoder of pixels; this {model.backbone.model_type} model has the "
                f"head {model.head_kind!r}. Build the family vit_mae."
            )
        audio = reads_audio(model)
        if audio and (crop, flip) != (1.0, False):
            raise ConfigError(
                f"{option('crop', crop)} and {option('flip', flip)} are for images, and this model reads audio. Leave "
                "them out."
            )
        given = {"mask_ratio": mask_ratio, "norm_pix_loss": norm_pixels}
        given = {key: value for key, value in given.items() if value is not None}
        config = model.backbone.config = replace(model.backbone.config, **given)
        config.check_hidden()
        self.num_patches, self.num_visible = config.num_patches, config.num_visible
        self.patch_size, self.norm_pixels = config.patch_size, config.norm_pix_loss
        if audio:
            config.check_decoder()
        self.key = values_key(model)
        self.augmentation = SpectrogramChanges() if audio else Augmentation(crop, flip)

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Choose the visible patches of each row with the row's own generator, and read its image."""
        # All rows have equally many, in ascending order: attention does not see the order, memory does.
        orders = [rng.permutation(self.num_patches) for rng in rngs]
        parts = [(order[: self.num_visible], order[self.num_visible :]) for order in orders]
        visible, hidden = (np.sort(np.stack(part), axis=1) for part in zip(*parts, strict=True))
        pixels = pixel_values(self, examples, rngs, evaluation=evaluation)
        return {
            self.key: pixels,
            "visible_index": torch.from_numpy(visible),
            "hidden_index": torch.from_numpy(hidden),
        }

    def count(self, batch: Batch) -> Tensor:
        """Number of hidden patches."""
        return torch.tensor(batch["hidden_index"].numel())

    def targets(self, pixels: Tensor) -> Tensor:
        """Return what is predicted, (B, C, H, W) -> (B, N, p · p · C) in fp32."""
        if pixels.ndim == 3:  # spectrograms (B, T, M)
            pixels = pixels.transpose(1, 2)[:, None]
        return patch_targets(pixels, self.patch_size, self.norm_pixels)

    def forward(self, batch: Batch) -> Loss:
        """Sum, over the hidden patches, the mean squared error of their pixels."""
        predicted, hidden = self.model(batch), batch["hidden_index"]
        if predicted.shape[1] == self.num_patches:  # of a head of one's own, which predicts all
            predicted = columns_of(predicted, hidden)
        targets = columns_of(self.targets(batch[self.key]), hidden)
        error = (predicted.float() - targets).square().mean(-1)  # (B, M)
        return Loss(error.sum(), self.count(batch).to(error.device))

    def flops(self, units: int, targets: int, row_length: int) -> float:
        """Operations of the encoder on visible patches, and of the decoder on all, but at its end on hidden ones."""
        backbone, head = self.model.backbone, cast(Any, self.model.head)
        encoder = self._matrices(backbone.blocks())
        seen: float = units * self.num_visible / self.num_patches
        config = backbone.config
        attention = 2 * config.decoder_hidden_size * row_length
        decoder = self._matrices([head]) + config.decoder_num_layers * attention
        last = head.layers[-1]
        ends = [last.attention.query, last.attention.output, last.mlp, head.predict]
        left_out = (self._matrices(ends) + attention) * self.num_visible / self.num_patches
        cost: float = 6.0 * units * (decoder - left_out)
        return cost + backbone.flops_per_unit(encoder, self.num_visible + 1) * seen

    def _matrices(self, modules: Sequence[Any]) -> int:
        return self._numel(p for m in modules for p in m.parameters() if p.ndim == 2)

    def survey(self, rows: Examples) -> list[str]:
        hidden = self.num_patches - self.num_visible
        return [
            f"hides {hidden} of {self.num_patches} patches of every row ({hidden / self.num_patches:.0%}); the "
            f"encoder computes the other {self.num_visible}"
        ]

    def describe(self) -> dict[str, Any]:
        """Name, masked share, kind of target, and changes of the images if there are any."""
        changed = (
            isinstance(self.augmentation, Augmentation) and self.augmentation != Augmentation()
        )
        return {
            "name": "MaskedImage",
            "mask_ratio": self.model.backbone.config.mask_ratio,
            "norm_pixels": self.norm_pixels,
            **({k: getattr(self.augmentation, k) for k in ("crop", "flip")} if changed else {}),
        }


def patch_targets(pixels: Tensor, patch_size: int, norm_pixels: bool) -> Tensor:
    """Return the pixels of every patch, each patch with mean 0 and variance 1 if asked for; fp32.

    Args:
        pixels: (B, C, H, W).
        patch_size: p.
        norm_pixels: whether each patch is normalised.

    Returns:
        (B, N, p · p · C).
    """
    target = patch_pixels(pixels.float(), patch_size)
    if norm_pixels:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased, as published
        target = (target - mean) / (variance + _EPS).sqrt()
    return target
