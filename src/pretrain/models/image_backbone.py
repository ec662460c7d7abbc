"""``ImageBackbone``, the base class of the families that read images alone, and what image towers share with them.

Letters: B images, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.data.images import ImageProcessor
from pretrain.errors import ModelError
from pretrain.models.backbone import Backbone
from pretrain.models.dense_head import DENSE, DenseHead, doublings
from pretrain.models.names import Name
from pretrain.nn.attention import Attention, KVCache
from pretrain.nn.norm import LayerNorm

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
    """Base class of the models of images: ``pixel_values`` (B, C, H, W) -> hidden states.

    Class attributes:
        lead_tokens: number of hidden states before those of the patches, such as that of a class token.
        reads_parts: ``visible_index`` (B, K) of a batch names the only patches that are computed.
    """

    causal: ClassVar[bool] = False
    lead_tokens: int = 1
    reads_parts: ClassVar[bool] = False
    processor_class: ClassVar[Any] = ImageProcessor

    @classmethod
    def default_processor(cls, config: Any) -> Any:
        return image_processor(config)

    def grid_step(self) -> tuple[int, bool]:
        """Return the pixels along a side of one place of the grid, and whether places lie partly outside of an image.

        The places are the last hidden states, row by row; by default they are full patches of ``patch_size``.
        """
        return int(self.config.patch_size), False

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        if kind not in DENSE:
            return self.build_classifier(num_labels)
        stride, partial = self.grid_step()
        boxes = kind == "object-detection"
        size = self.config.hidden_size
        return DenseHead(size, num_labels, stride=stride, partial=partial, boxes=boxes)

    def build_classifier(self, num_labels: int) -> nn.Module:
        """Return the head that classifies whole images, uninitialised."""
        raise NotImplementedError

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        if kind not in DENSE:
            return [Name(self.classifier_name(), ("head.classifier",), body=False)]
        stages = 1 + doublings(self.grid_step()[0])
        parts = [f"stages.{i}.{part}" for i in range(stages) for part in ("convolution", "norm")]
        parts += ["classifier", *["sides"] * (kind == "object-detection")]
        return [Name(f"decode_head.{part}", (f"head.{part}",), body=False) for part in parts]

    def classifier_name(self) -> str:
        """Return the name on disk of the last layer of a classifier of whole images."""
        return "classifier"

    def random_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        return random_images(self.config, generator)

    def id_limits(self) -> dict[str, tuple[str, int]]:
        return {}

    def check_inputs(self, pixels: Tensor, cache: KVCache | None) -> None:
        """Check that there are images of the right number of channels, and no key-value cache.

        Raises:
            ModelError: there is a cache, or the images have another number of dimensions or channels.
        """
        self.refuse_cache(cache, "reads images, so it ")
        channels = self.config.num_channels
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ModelError(
                f"pixel_values has the shape {tuple(pixels.shape)}; it must be (images, {channels}, height, width), "
                f"because this {self.model_type} model reads {channels} channels. The image processor beside the "
                "weights returns that."
            )

    @property
    def output_norm(self) -> LayerNorm | None:
        """The norm whose result the hidden states are; None in families that end otherwise."""
        return None

    @torch.no_grad()
    def attention_map(self, pixels: Tensor) -> Tensor | None:
        """Return how much of the last block's attention goes to each patch, (B, C, H, W) -> (B, h, w), mean over heads.

        It is that of the class token or of all patches, by what a classifier reads. None without blocks of attention.
        """
        attention = getattr(self.blocks()[-1], "attention", None)
        if not isinstance(attention, Attention):
            return None
        given: list[Tensor] = []
        hook = attention.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        training = self.training
        try:
            self.eval()({"pixel_values": pixels})
        finally:
            hook.remove()
            self.train(training)
        parts = (attention.query, attention.key)
        q, k = (part(given[0]).unflatten(-1, (-1, attention.head_dim)) for part in parts)
        scores = attention.scale * q.transpose(1, 2).float() @ k.transpose(1, 2).float().mT
        weights: Tensor = scores.softmax(-1).mean(1)  # (B, tokens, tokens)
        whole = not self.lead_tokens or getattr(self.config, "pooling", "first") == "mean"
        queries = weights[:, self.lead_tokens :] if whole else weights[:, :1]
        places = queries.mean(1)[:, self.lead_tokens :]
        return places.reshape(len(pixels), pixels.shape[2] // self.grid_step()[0], -1)

    def pooled(self, hidden: Tensor, how: str | None = None) -> Tensor:
        """Return one vector for each image, (B, T, D) -> (B, D).

        Args:
            hidden: hidden states of the backbone.
            how: ``mean`` over the patches, or ``first``, the class token; None: what a classifier reads, or the mean in
                a family whose config does not say.

        Raises:
            ModelError: ``how`` is something else, or ``first`` without a class token.
        """
        how = getattr(self.config, "pooling", "mean") if how is None else how
        if how not in ("mean", "first") or (how == "first" and not self.lead_tokens):
            known = "mean or first" if self.lead_tokens else "mean, because it has no class token"
            raise ModelError(
                f"pooling of a {self.model_type} model is {how!r}; it must be {known}."
            )
        return hidden[:, 0] if how == "first" else hidden[:, self.lead_tokens :].mean(1)
