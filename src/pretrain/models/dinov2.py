"""DINOv2 (arXiv 2304.07193): a vision transformer with layer scale, also with register tokens (arXiv 2309.16588).

A classifier reads the class token beside the mean of the patches. The training of DINOv2 itself is not implemented.

Letters: B images, T tokens, P patches, R registers, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.config import BackboneConfig, Key, round_up
from pretrain.models.heads import IMAGE_HEADS, SequenceHead, architectures_of
from pretrain.models.names import Name
from pretrain.models.vit import (
    ATTENTION_NAMES,
    ENCODER_KEYS,
    PEFT_ATTENTION,
    PatchesConfig,
    ViT,
    encoder_names,
)
from pretrain.nn.attention import AttentionMask
from pretrain.nn.block import Block
from pretrain.nn.kernels import dropout
from pretrain.nn.patches import PatchEmbedding

__all__ = ["Dinov2", "Dinov2Config", "Dinov2WithRegisters", "Dinov2WithRegistersConfig"]

# Names on disk of the parts of a block, and of the two forms of its feed-forward layer.
_BLOCK_NAMES = {
    **ATTENTION_NAMES,
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "layer_scale1.lambda1": "attention_layer_scale.weight",
    "layer_scale2.lambda1": "mlp_layer_scale.weight",
}
_PLAIN = {"mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}


@dataclass(frozen=True, kw_only=True)
class Dinov2Config(PatchesConfig):
    """Fields of DINOv2; ``intermediate_size`` follows from them.

    Attributes:
        mlp_ratio: width of the feed-forward layer over D.
        use_swiglu_ffn: the feed-forward layer has a gate with SiLU, and two thirds of that width, rounded up to a
            multiple of 8; ``activation`` then has no effect.
        layerscale_value: initial value of the factors on the output of every sub-layer.
        drop_path_rate: share of the images of which training leaves out a sub-layer (stochastic depth, 1603.09382).
        use_mask_token: the file has a mask token, which only the training of DINOv2 reads.
    """

    norm_eps: float = 1e-6
    patch_size: int = 14
    mlp_ratio: int = 4
    use_swiglu_ffn: bool = False
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_mask_token: bool = True

    num_register_tokens: ClassVar[int] = 0

    def default_intermediate(self) -> int:
        width = self.hidden_size * self.mlp_ratio
        return round_up(int(width * 2 / 3), 8) if self.use_swiglu_ffn else width

    def validate(self) -> None:
        if self.intermediate_size != self.default_intermediate():
            raise ConfigError(
                f"intermediate_size of the model is {self.intermediate_size}; files of dinov2 hold only mlp_ratio, "
                f"by which it is {self.default_intermediate()}. Leave it out, and change mlp_ratio."
            )
        if self.drop_path_rate >= 1:
            raise ConfigError(
                f"drop_path_rate of the model is {self.drop_path_rate}; it must be below 1."
            )
        super().validate()

    def parameter_count(self) -> int:
        gates = self.num_layers * self.hidden_size * (self.intermediate_size or 0)
        more = self.hidden_size * self.num_register_tokens
        return super().parameter_count() + more + gates * self.use_swiglu_ffn


@dataclass(frozen=True, kw_only=True)
class Dinov2WithRegistersConfig(Dinov2Config):
    """Fields of DINOv2 with registers; its files always have a mask token.

    Attributes:
        num_register_tokens: register tokens beside the class token, R.
    """

    # A field here; in Dinov2Config it is a constant of the class, because files of dinov2 have no such key.
    num_register_tokens: int = 4  # type: ignore[misc]

    def validate(self) -> None:
        if not self.use_mask_token:
            raise ConfigError(
                "use_mask_token of a dinov2_with_registers model must be true: transformers has no files without one."
            )
        super().validate()


class LayerScale(nn.Module):
    """A learned factor on every feature (arXiv 2103.17239); (..., D) -> (..., D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)


class ScaledBlock(Block):
    """A pre-norm block with a layer scale on both sub-layers, which training may leave out for some images."""

    def __init__(self, config: Dinov2Config) -> None:
        gated = config.use_swiglu_ffn
        options = {"gated": True, "activation": "silu"} if gated else {}
        # Unlike in ViT, hidden_dropout_prob is of the embeddings alone.
        bias = {"attention_bias": config.attention_bias, "output_bias": True}
        super().__init__(config.block(dropout=0.0, **bias, **options))
        self.attention_layer_scale = LayerScale(config.hidden_size)
        self.mlp_layer_scale = LayerScale(config.hidden_size)
        self.drop_path_rate = config.drop_path_rate

    def _forward(self, x: Tensor, *, mask: AttentionMask | None, **options: Any) -> Tensor:
        h = self.attention(self.attention_norm(x), mask=mask)
        x = x + self._kept(self.attention_layer_scale(h))
        return x + self._kept(self.mlp_layer_scale(self.mlp(self.mlp_norm(x))))

    def _kept(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_path_rate):
            return x
        return x * dropout(x.new_ones(len(x), 1, 1), self.drop_path_rate)


class Dinov2Embedding(PatchEmbedding):
    """Embed patches behind the class token and the registers, which have no positions; (B, C, H, W) -> (B, T, D)."""

    constant_buffers: ClassVar[tuple[str, ...]] = ("mask_token",)

    def __init__(self, config: Dinov2Config) -> None:
        registers = config.num_register_tokens
        sizes = (config.hidden_size, config.image_size, config.patch_size, config.num_channels)
        # Positions are made smaller by averages in the models with registers alone.
        super().__init__(*sizes, antialias=bool(registers))
        if config.use_mask_token:  # which files hold and no step changes
            self.register_buffer("mask_token", torch.zeros(1, config.hidden_size))
        shape = (1, registers, config.hidden_size)
        self.register_tokens = nn.Parameter(torch.zeros(shape)) if registers else None

    def forward(self, pixels: Tensor, visible: Tensor | None = None) -> Tensor:
        x = super().forward(pixels, visible)
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)


class ClassAndPatchesHead(SequenceHead):
    """Scores from the class token beside the mean of the patches, (B, T, D) -> (B, C)."""

    def __init__(self, hidden_size: int, num_labels: int, lead: int, dropout: float) -> None:
        super().__init__(2 * hidden_size, num_labels, pool="both", dropout=dropout)
        self.lead_tokens = lead

    def _pool(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.cat((hidden[:, 0], hidden[:, self.lead_tokens :].mean(1)), dim=-1)


class Dinov2(ViT):
    """Encoder of image patches; ``pixel_values`` (B, C, H, W) -> (B, 1 + P, D), the class token first."""

    model_type: ClassVar[str] = "dinov2"
    config_class: ClassVar[type[BackboneConfig]] = Dinov2Config
    prefix: ClassVar[str] = "dinov2."
    modules_of_peft: ClassVar[Mapping[str, str]] = {
        f"encoder.layer.{{n}}.{disk}": f"encoder.layer.{{n}}.{name}"
        for disk, name in PEFT_ATTENTION.items()
    }
    architectures: ClassVar[Mapping[str | None, str]] = architectures_of("Dinov2", *IMAGE_HEADS)
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **{name: key for name, key in ENCODER_KEYS.items() if name != "intermediate_size"},
        "norm_eps": Key("layer_norm_eps", 1e-6),
        "patch_size": Key("patch_size", 14, square=True),
        "attention_bias": Key("qkv_bias", True),
        "mlp_ratio": Key("mlp_ratio", 4),
        "use_swiglu_ffn": Key("use_swiglu_ffn", False),
        "layerscale_value": Key("layerscale_value", 1.0),
        "drop_path_rate": Key("drop_path_rate", 0.0),
        "use_mask_token": Key("use_mask_token", True),
        "classifier_dropout": Key("classifier_dropout", None, optional=True),
    }

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        self.lead_tokens = 1 + config.num_register_tokens

    def build_embedding(self) -> PatchEmbedding:
        return Dinov2Embedding(self.config)

    def build_block(self) -> Block:
        return ScaledBlock(self.config)

    def build_classifier(self, num_labels: int) -> nn.Module:
        config, dropout = self.config, self.config.classifier_dropout or 0.0
        return ClassAndPatchesHead(config.hidden_size, num_labels, self.lead_tokens, dropout)

    def pooled(self, hidden: Tensor, how: str | None = None) -> Tensor:
        """As for other families; None is the class token, which transformers calls the pooled output."""
        return super().pooled(hidden, how or "first")

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        super().init_parameter(name, value, seed)
        if name.endswith("layer_scale.weight"):
            value.fill_(self.config.layerscale_value)
        elif name.endswith("register_tokens"):
            value.zero_()

    def names(self) -> list[Name]:
        block = _BLOCK_NAMES if self.config.use_swiglu_ffn else _BLOCK_NAMES | _PLAIN
        rules = [
            *encoder_names(block=block),
            Name("embeddings.mask_token", ("embedding.mask_token",)),
            Name("embeddings.register_tokens", ("embedding.register_tokens",)),
        ]
        if self.config.use_swiglu_ffn:
            rules.append(Name("encoder.layer.{n}.mlp.weights_out", ("layers.{n}.mlp.down",)))
            for leaf in ("weight", "bias"):
                parts = tuple(f"layers.{{n}}.mlp.{part}.{leaf}" for part in ("gate", "up"))
                rules.append(Name(f"encoder.layer.{{n}}.mlp.weights_in.{leaf}", parts))
        return rules

    def classifier_name(self) -> str:
        return "classifier"


class Dinov2WithRegisters(Dinov2):
    """DINOv2 with R learned tokens behind the class token, (B, C, H, W) -> (B, 1 + R + P, D)."""

    model_type: ClassVar[str] = "dinov2_with_registers"
    config_class: ClassVar[type[BackboneConfig]] = Dinov2WithRegistersConfig
    prefix: ClassVar[str] = "dinov2_with_registers."
    architectures: ClassVar[Mapping[str | None, str]] = architectures_of(
        "Dinov2WithRegisters", *IMAGE_HEADS
    )
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **{name: key for name, key in Dinov2.hf_keys.items() if name != "use_mask_token"},
        "patch_size": Key("patch_size", 16, square=True),
        "num_register_tokens": Key("num_register_tokens", 4),
    }
