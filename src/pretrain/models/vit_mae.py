"""ViT-MAE (arXiv 2111.06377): a vision transformer that encodes visible patches, and a light decoder of all pixels.

Unlike ``ViTMAEModel`` of transformers, which hides patches at random in every call, the encoder computes all patches
unless the batch names the visible ones.

Letters: B images, N patches, K visible ones, D hidden, E hidden of the decoder, p side of a patch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.backbone import Batch
from pretrain.models.config import BackboneConfig, Key
from pretrain.models.dense_head import DENSE
from pretrain.models.image_backbone import ImageBackbone
from pretrain.models.names import Name, renamed
from pretrain.models.vit import BLOCK_NAMES, ENCODER_KEYS, encoder_names
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block, BlockConfig
from pretrain.nn.norm import LayerNorm
from pretrain.nn.patches import PatchEmbedding, grid_positions

__all__ = ["DECODER_KEYS", "MaskedConfig", "PixelDecoder", "ViTMAE", "ViTMAEConfig"]


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(BackboneConfig):
    """Fields of encoders of patches that are pre-trained with a decoder of the hidden ones.

    Attributes:
        patch_size: side of a patch.
        num_channels: channels of the images.
        qkv_bias: queries, keys and values have biases.
        decoder_hidden_size: E; two thirds of D when None, but at most 512.
        decoder_num_layers: blocks of the decoder; two thirds of ``num_layers`` when None, but at most 8.
        decoder_num_heads: heads of the decoder; E / 32 when None.
        decoder_intermediate_size: width of its feed-forward layers; 4 E when None.
        mask_ratio: share of the patches that are hidden in pre-training.
        norm_pix_loss: the target of a patch has mean 0 and variance 1.
    """

    vocab_size: int = 0
    max_positions: int = 0
    norm_eps: float = 1e-6
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    decoder_hidden_size: int | None = None
    decoder_num_layers: int | None = None
    decoder_num_heads: int | None = None
    decoder_intermediate_size: int | None = None
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True

    def __post_init__(self) -> None:
        width = self.decoder_hidden_size or min(512, max(32, self.hidden_size * 2 // 3 // 32 * 32))
        self.set_defaults(
            decoder_hidden_size=width,
            decoder_num_layers=min(8, max(1, self.num_layers * 2 // 3)),
            decoder_num_heads=max(1, width // 32),
            decoder_intermediate_size=4 * width,
        )
        super().__post_init__()

    def check_decoder(self) -> None:
        """Check the sizes of the decoder, and the share of the patches that are hidden unless it is 0.

        Raises:
            ConfigError: a size does not fit the heads, or no patch would be visible, or none hidden.
        """
        for name, heads in (
            ("hidden_size", self.num_heads),
            ("decoder_hidden_size", self.decoder_num_heads),
        ):
            size = getattr(self, name)
            if size % 4 or size % (heads or 1):
                raise ConfigError(
                    f"{name} {size} must be a multiple of 4, for the positions of rows and columns, and of the "
                    f"{heads} heads. Change it, or the number of heads."
                )
        if self.mask_ratio:  # 0 in published encoders, which are not pre-trained any more
            self.check_hidden()

    def check_hidden(self) -> None:
        """Check the share of the patches that are hidden.

        Raises:
            ConfigError: no patch would be visible, or none hidden.
        """
        if not 0 < self.mask_ratio < 1 or not 0 < self.num_visible < self.num_patches:
            raise ConfigError(
                f"mask_ratio {self.mask_ratio} of {self.num_patches} patches leaves {self.num_visible} visible; at "
                "least one must be visible and one hidden. Change mask_ratio, or choose a smaller patch_size."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        raise NotImplementedError

    @property
    def num_patches(self) -> int:
        """N."""
        return math.prod(self.grid)

    @property
    def num_visible(self) -> int:
        """K, rounded down as in transformers."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def pixels(self) -> int:
        """Numbers that describe a patch, p · p · C."""
        return self.num_channels * self.patch_size**2

    def decoder_block(self) -> BlockConfig:
        """Return the options of the decoder's blocks."""
        return replace(
            self.block(attention_bias=self.qkv_bias, output_bias=True),
            hidden_size=self.decoder_hidden_size or 0,
            num_heads=self.decoder_num_heads or 1,
            intermediate_size=self.decoder_intermediate_size or 0,
            num_kv_heads=None,
            head_dim=None,
        )


@dataclass(frozen=True, kw_only=True)
class ViTMAEConfig(MaskedConfig):
    """Fields of ViT-MAE.

    Attributes:
        image_size: side of the images in pixels, a multiple of ``patch_size``.
    """

    image_size: int = 224

    def validate(self) -> None:
        super().validate()
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}. Change one of them."
            )
        self.check_decoder()

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    def parameter_count(self) -> int:
        """Return the number of parameters of encoder and decoder, computed from the sizes."""
        width, inner = self.decoder_hidden_size or 0, self.decoder_intermediate_size or 0
        decoder = (self.decoder_num_layers or 0) * width * (4 * width + 2 * inner)
        tables = (self.hidden_size + width) * (self.pixels + self.num_patches)
        return super().parameter_count() + decoder + tables


# Field -> key of config.json, of the fields of the decoder and of the masks.
DECODER_KEYS: Mapping[str, Key] = {
    "decoder_hidden_size": Key("decoder_hidden_size", 512),
    "decoder_num_layers": Key("decoder_num_hidden_layers", 8),
    "decoder_num_heads": Key("decoder_num_attention_heads", 16),
    "decoder_intermediate_size": Key("decoder_intermediate_size", 2048),
    "mask_ratio": Key("mask_ratio", 0.75),
    "norm_pix_loss": Key("norm_pix_loss", False),
}


class ViTMAE(ImageBackbone):
    """Encoder: images under ``pixel_values``, (B, C, H, W) -> (B, 1 + N, D), the class token first.

    With ``visible_index``, (B, K) indices of patches, it computes only these: (B, 1 + K, D).
    """

    model_type: ClassVar[str] = "vit_mae"
    config_class: ClassVar[type[BackboneConfig]] = ViTMAEConfig
    prefix: ClassVar[str] = "vit."
    architectures: ClassVar[Mapping[str | None, str]] = {
        None: "ViTMAEModel",
        "masked-image": "ViTMAEForPreTraining",
    }
    successors: ClassVar[Mapping[str, str]] = dict.fromkeys(("image-classification", *DENSE), "vit")
    unit_name: ClassVar[str] = "patches"
    reads_parts: ClassVar[bool] = True
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **ENCODER_KEYS,
        "qkv_bias": Key("qkv_bias", True),
        **DECODER_KEYS,
    }

    def __init__(self, config: ViTMAEConfig) -> None:
        super().__init__(config)
        sizes = (config.hidden_size, config.image_size, config.patch_size, config.num_channels)
        self.patches = PatchEmbedding(*sizes, fixed=True)
        block = config.block(attention_bias=config.qkv_bias, output_bias=True)
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        self.check_inputs(batch["pixel_values"], cache)
        self.patches.check(batch["pixel_values"])
        x = self.patches(batch["pixel_values"], batch.get("visible_index"))
        hidden: Tensor = self.norm(self.run(self.drop(x), AttentionMask()))
        return hidden

    @property
    def output_norm(self) -> LayerNorm:
        return self.norm

    def units(self, batch: Batch) -> int:
        """Return the number of patches of all images, hidden ones included."""
        patches: int = self.config.num_patches
        return len(batch["pixel_values"]) * patches

    def id_limits(self) -> dict[str, tuple[str, int]]:
        limit = ("number of patches", self.config.num_patches)
        return {"visible_index": limit, "hidden_index": limit}

    def embeddings(self) -> list[nn.Module]:
        return [self.patches]

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        return PixelDecoder(self.config)

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        """Give matrices the standard deviation of Xavier's initialisation, as the published code does."""
        super().init_parameter(name, value, seed)
        if value.ndim in (2, 4):  # the class token and the mask token have three dimensions
            outputs, inputs = len(value), value[0].numel()
            value.mul_(math.sqrt(2 / (outputs + inputs)) / self.config.initializer_range)

    def names(self) -> list[Name]:
        return encoder_names("patches", "norm")

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        return PixelDecoder.names(self.config)


class PixelDecoder(nn.Module):
    """Predict the pixels of all patches from the encoded ones, (B, 1 + K, D) -> (B, N, p · p · C), channels last.

    Without ``visible_index`` in the batch, all patches are encoded in their order. With ``hidden_index``, (B, M)
    indices of patches, only these are predicted: (B, M, p · p · C).

    Args:
        config: sizes of the decoder and of the grid.
        lead: tokens before the patches.
    """

    constant_buffers: ClassVar[tuple[str, ...]] = ("positions",)

    def __init__(self, config: MaskedConfig, lead: int = 1) -> None:
        super().__init__()
        block, self.num_patches, self.lead = config.decoder_block(), config.num_patches, lead
        self.embed = nn.Linear(config.hidden_size, block.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, block.hidden_size))
        self.positions: Tensor
        table = grid_positions(config.grid, block.hidden_size, class_token=lead)
        self.register_buffer("positions", table[None])
        self.layers = nn.ModuleList(Block(block) for _ in range(config.decoder_num_layers or 0))
        self.norm = LayerNorm(block.hidden_size, config.norm_eps)
        self.predict = nn.Linear(block.hidden_size, config.pixels)

    def forward(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        x, lead = self.embed(hidden), self.lead
        visible = batch.get("visible_index")
        if visible is not None:
            token = self.mask_token.to(x.dtype)
            places = (visible + lead)[..., None].expand(-1, -1, x.shape[-1])
            known = x
            x = token.expand(len(x), lead + self.num_patches, -1)
            x = torch.cat((known[:, :lead], x[:, lead:]), dim=1).scatter(1, places, known[:, lead:])
        wanted = batch.get("hidden_index")
        x, keep = x + self.positions, None if wanted is None else wanted + lead
        for i, layer in enumerate(self.layers):
            x = layer(x, mask=None, keep=keep if i == len(self.layers) - 1 else None)
        pixels: Tensor = self.predict(self.norm(x if keep is not None else x[:, lead:]))
        return pixels

    @staticmethod
    def names(config: MaskedConfig) -> list[Name]:
        """Return the rules for the parameters of the decoder as a head."""
        parts = {
            "decoder_embed": "embed",
            "mask_token": "mask_token",
            "decoder_pos_embed": "positions",
            "decoder_norm": "norm",
            "decoder_pred": "predict",
        }
        # The decoder has its own number of blocks, so {n}, which counts those of the encoder, cannot be used.
        for n in range(config.decoder_num_layers or 0):
            parts |= {
                f"decoder_layers.{n}.{disk}": f"layers.{n}.{own}"
                for disk, own in BLOCK_NAMES.items()
            }
        return renamed(parts, "decoder.", "head.", body=False)
