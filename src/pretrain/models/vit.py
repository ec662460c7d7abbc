"""Vision transformer (arXiv 2010.11929): an encoder of the patches of an image behind a class token, pre-norm.

Positions are learned for one image size; for images of another size they are interpolated, as in the fine-tuning at
higher resolution of the paper (section 3.2).

Letters: B images, C channels, H height, W width, P patches, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pretrain.errors import ConfigError, ModelError
from pretrain.models.backbone import Batch
from pretrain.models.config import BackboneConfig, Key
from pretrain.models.heads import IMAGE_HEADS, SequenceHead, architectures_of
from pretrain.models.image_backbone import ImageBackbone
from pretrain.models.names import Name, renamed
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block
from pretrain.nn.norm import LayerNorm
from pretrain.nn.patches import PatchEmbedding

__all__ = [
    "ATTENTION_NAMES",
    "BLOCK_NAMES",
    "ENCODER_KEYS",
    "PEFT_ATTENTION",
    "PatchesConfig",
    "ViT",
    "ViTConfig",
    "encoder_names",
]

# Names on disk of the parts of a block.
ATTENTION_NAMES = {
    "attention.attention.query": "attention.query",
    "attention.attention.key": "attention.key",
    "attention.attention.value": "attention.value",
    "attention.output.dense": "attention.output",
}
BLOCK_NAMES = {
    **ATTENTION_NAMES,
    "layernorm_before": "attention_norm",
    "layernorm_after": "mlp_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
}


# The same parts in the memory of transformers 5.
PEFT_ATTENTION = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_PEFT_NAMES = {
    **PEFT_ATTENTION,
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@dataclass(frozen=True, kw_only=True)
class PatchesConfig(BackboneConfig):
    """Fields of encoders of patches behind a class token, with learned positions.

    Attributes:
        image_size: height and width of the images that the positions are learned for.
        patch_size: height and width of a patch.
        num_channels: channels of an image.
        attention_bias: biases on queries, keys and values.
    """

    vocab_size: int = 0
    max_positions: int = 0
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    attention_bias: bool = True

    def validate(self) -> None:
        if self.num_channels > 64:
            raise ConfigError(
                f"num_channels of the model is {self.num_channels}; it must lie between 1 and 64."
            )
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}, so an image would have no "
                "patch. Make it smaller: a divisor of image_size."
            )
        super().validate()

    @property
    def side(self) -> int:
        """Patches along a side of an image; pixels that fill no patch are not read."""
        return self.image_size // self.patch_size

    def parameter_count(self) -> int:
        tables = self.num_channels * self.patch_size**2 + self.side**2 + 1
        return super().parameter_count() + self.hidden_size * tables


@dataclass(frozen=True, kw_only=True)
class ViTConfig(PatchesConfig):
    """Fields of ViT.

    Attributes:
        pooling: what the classifier reads: the class token (``first``), or the ``mean`` of the patches, which
            transformers does not have.
        encoder_stride, pooler_act, pooler_output_size: of heads that this package does not have; kept for the file.
    """

    norm_eps: float = 1e-12
    pooling: str = "first"
    encoder_stride: int = 16
    pooler_act: str = "tanh"
    pooler_output_size: int | None = None

    def validate(self) -> None:
        if self.pooling not in ("first", "mean"):
            raise ConfigError(f"pooling is {self.pooling!r}; it must be 'first' or 'mean'.")
        super().validate()


# Field -> key of config.json, of the families whose encoder is that of ViT.
ENCODER_KEYS: Mapping[str, Key] = {
    "hidden_size": Key("hidden_size", 768),
    "num_layers": Key("num_hidden_layers", 12),
    "num_heads": Key("num_attention_heads", 12),
    "intermediate_size": Key("intermediate_size", 3072),
    "activation": Key("hidden_act", "gelu"),
    "dropout": Key("hidden_dropout_prob", 0.0),
    "attention_dropout": Key("attention_probs_dropout_prob", 0.0),
    "initializer_range": Key("initializer_range", 0.02),
    "norm_eps": Key("layer_norm_eps", 1e-12),
    "image_size": Key("image_size", 224, square=True),
    "patch_size": Key("patch_size", 16, square=True),
    "num_channels": Key("num_channels", 3),
}


def encoder_names(
    embedding: str = "embedding", norm: str = "final_norm", block: Mapping[str, str] = BLOCK_NAMES
) -> list[Name]:
    """Return the rules of an encoder of patches.

    Args:
        embedding: its name for the embedding of the patches.
        norm: its name for the last norm.
        block: name on disk -> name in memory of the parts of a block.
    """
    parts = {
        "embeddings.cls_token": f"{embedding}.class_token",
        "embeddings.position_embeddings": f"{embedding}.positions",
        "embeddings.patch_embeddings.projection": f"{embedding}.projection",
        "layernorm": norm,
    }
    return [*renamed(parts), *renamed(block, "encoder.layer.{n}.", "layers.{n}.")]


class ViT(ImageBackbone):
    """Encoder of image patches; ``pixel_values`` (B, C, H, W) -> (B, 1 + P, D), the class token first.

    With ``attention_bias``, (B|1, H|1, 1 + P, 1 + P), that is added to the scores of attention in every block. With
    ``visible_index``, (B, K) indices of patches, it computes only these: (B, 1 + K, D).
    """

    model_type: ClassVar[str] = "vit"
    config_class: ClassVar[type[BackboneConfig]] = ViTConfig
    prefix: ClassVar[str] = "vit."
    unit_name: ClassVar[str] = "patches"
    reads_parts: ClassVar[bool] = True
    modules_of_peft: ClassVar[Mapping[str, str]] = {
        f"encoder.layer.{{n}}.{disk}": f"layers.{{n}}.{name}" for disk, name in _PEFT_NAMES.items()
    }
    architectures: ClassVar[Mapping[str | None, str]] = architectures_of("ViT", *IMAGE_HEADS)
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **ENCODER_KEYS,
        "attention_bias": Key("qkv_bias", True),
        "encoder_stride": Key("encoder_stride", 16),
        "pooler_act": Key("pooler_act", "tanh"),
        "pooler_output_size": Key("pooler_output_size", None),
        "pooling": Key("pooling", "first", optional=True),
        "classifier_dropout": Key("classifier_dropout", None, optional=True),
    }

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__(config)
        self.embedding = self.build_embedding()
        self.layers = nn.ModuleList(self.build_block() for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def build_embedding(self) -> PatchEmbedding:
        """Return the embedding of the patches, uninitialised."""
        config = self.config
        sizes = (config.hidden_size, config.image_size, config.patch_size, config.num_channels)
        return PatchEmbedding(*sizes)

    def build_block(self) -> Block:
        """Return one block, uninitialised."""
        config = self.config
        return Block(config.block(attention_bias=config.attention_bias, output_bias=True))

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        pixels, config = batch["pixel_values"], self.config
        self.check_inputs(pixels, cache)
        if min(pixels.shape[2:]) < config.patch_size:
            raise ModelError(
                f"The images have {pixels.shape[2]} x {pixels.shape[3]} pixels, less than one patch of "
                f"{config.patch_size} x {config.patch_size}. Make them larger: set size in preprocessor_config.json."
            )
        mask = AttentionMask(bias=batch.get("attention_bias"))
        shown = [batch["visible_index"]] if "visible_index" in batch else []
        x = self.run(self.drop(self.embedding(pixels, *shown)), mask, keep=batch.get("keep_index"))
        found: Tensor = self.final_norm(x)
        return found

    # ------------------------------------------------------------------ what a batch is

    @property
    def output_norm(self) -> LayerNorm:
        return self.final_norm

    def units(self, batch: Batch) -> int:
        images, _, height, width = batch["pixel_values"].shape
        patch = self.config.patch_size
        return int(images * (height // patch) * (width // patch))

    def embeddings(self) -> list[nn.Module]:
        return [self.embedding]

    def build_classifier(self, num_labels: int) -> nn.Module:
        config = self.config
        pool = "first" if config.pooling == "first" else "patches"
        return SequenceHead(
            config.hidden_size, num_labels, pool=pool, dropout=config.classifier_dropout or 0.0
        )

    # ------------------------------------------------------------------ names on disk

    def names(self) -> list[Name]:
        return encoder_names()

    def classifier_name(self) -> str:
        # transformers would apply a classifier of the mean to the class token, so it must not find one.
        return "classifier" if self.config.pooling == "first" else "mean_classifier"
