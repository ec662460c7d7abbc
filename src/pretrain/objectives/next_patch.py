"""Prediction of the next patch of an image from those before it, row by row (iGPT; AIM, arXiv 2401.08541).

A prefix of random length is seen as a whole, as in AIM, so that the model can be tuned without a mask afterwards.

Letters: B images, N patches, D hidden, p side of a patch, C channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.data.images.augment import Augmentation
from pretrain.errors import DataError, ModelError
from pretrain.models.vit import ViT
from pretrain.objectives.base import Batch, ExampleList, Loss, Objective, Rngs
from pretrain.objectives.masked_image import patch_targets
from pretrain.objectives.row_pixels import pixel_values

if TYPE_CHECKING:
    from pretrain.data.loader import Examples
    from pretrain.models.base import Model

__all__ = ["NextPatch"]


class NextPatch(Objective):
    """Predict the pixels of every patch behind a prefix from the prefix and the patches in between.

    Args:
        model: a vit without a head; its class token stands before the first patch.
        norm_pixels: give the pixels of each target patch mean 0 and variance 1.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops. For rows of
            images, not for rows of pixel values.
        flip: mirror half of the training images.

    Raises:
        ModelError: it is another model.
    """

    figures: ClassVar[tuple[str, ...] | None] = ("loss",)

    def __init__(
        self, model: Model, norm_pixels: bool = True, crop: float = 1.0, flip: bool = False
    ) -> None:
        super().__init__(model)
        backbone = model.backbone
        leads = isinstance(backbone, ViT) and backbone.lead_tokens == 1
        if not leads or model.head is not None:
            raise ModelError(
                f"NextPatch needs a vit without a head; this is a {backbone.model_type} model with the head "
                f"{model.head_kind!r}. Build the family vit."
            )
        config = model.backbone.config
        self.num_patches, self.patch_size = config.side**2, config.patch_size
        self.norm_pixels, self.augmentation = norm_pixels, Augmentation(crop, flip)
        width = config.hidden_size
        self.predictor = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, config.num_channels * self.patch_size**2),
        )
        self._weights = sum(
            p.numel() for p in self.predictor.parameters()
        )  # sharded ones have fewer

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Draw the prefix of each row, 0 to N - 1 patches, with the row's own generator, and read its image."""
        prefixes = np.array([rng.integers(self.num_patches) for rng in rngs])
        pixels = pixel_values(self, examples, rngs, evaluation=evaluation)
        size = self.model.backbone.config.image_size
        if pixels.shape[2:] != (size, size):
            raise DataError(
                f"The images have {pixels.shape[2]} x {pixels.shape[3]} pixels, and the model that NextPatch trains "
                f"reads {size} x {size}. Resize them (size in preprocessor_config.json), or build the model with their "
                "image_size."
            )
        return {"pixel_values": pixels, "prefix": torch.from_numpy(prefixes)}

    def count(self, batch: Batch) -> Tensor:
        """Number of patches behind the prefixes."""
        found: Tensor = (self.num_patches - batch["prefix"]).sum()
        return found

    def forward(self, batch: Batch) -> Loss:
        """Sum, over the patches behind the prefixes, the mean squared error of their pixels."""
        prefix = batch["prefix"][:, None]  # (B, 1)
        place = torch.arange(1 + self.num_patches, device=prefix.device)
        # The class token belongs to the prefix, and its place predicts the first patch.
        seen = (place[None] <= place[:, None]) | (place <= prefix)[:, None]  # (B, T, T)
        bias = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -math.inf)
        pixels = batch["pixel_values"]
        hidden = self.model.backbone({"pixel_values": pixels, "attention_bias": bias[:, None]})
        predicted = self.predictor(hidden[:, :-1]).float()  # (B, N, p · p · C)
        error = (predicted - patch_targets(pixels, self.patch_size, self.norm_pixels)).square()
        behind = place[:-1] >= prefix
        total = (error.mean(-1) * behind).sum()
        return Loss(total, self.count(batch).to(total.device))

    def head_weights(self) -> int:
        return self._weights

    def survey(self, rows: Examples) -> list[str]:
        return [
            f"predicts the patches of an image behind a prefix of 0 to {self.num_patches - 1} of {self.num_patches}"
        ]

    def describe(self) -> dict[str, Any]:
        changes = {"crop": self.augmentation.crop, "flip": self.augmentation.flip}
        return {"name": "NextPatch", "norm_pixels": self.norm_pixels, **changes}
