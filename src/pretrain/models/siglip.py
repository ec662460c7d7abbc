"""SigLIP (arXiv 2303.15343): two towers for a sigmoid loss of pairs; images are pooled by attention.

Letters: B rows, T tokens, N patches, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.clip import (
    DROPOUT,
    VISION_KEYS,
    ImageTower,
    TextTower,
    TowersConfig,
    TwoTowers,
)
from pretrain.models.config import BackboneConfig, ConfigReader, Key
from pretrain.models.heads import architectures_of
from pretrain.models.names import Name, renamed
from pretrain.nn.attention import Attention, AttentionMask
from pretrain.nn.mlp import MLP
from pretrain.nn.norm import LayerNorm

__all__ = ["Siglip", "SiglipConfig"]


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(TowersConfig):
    """Fields of SigLIP; ``projection_dim``, the size of the vectors, is D of the image tower."""

    vocab_size: int = 32000
    max_positions: int = 64
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"
    patch_size: int = 16

    def validate(self) -> None:
        super().validate()
        if self.projection_dim != self.vision_hidden_size:
            raise ConfigError(
                f"projection_dim {self.projection_dim} of a siglip model must be vision_hidden_size "
                f"{self.vision_hidden_size}: images are not projected. Leave it out."
            )

    def __post_init__(self) -> None:
        self.set_defaults(projection_dim=self.vision_hidden_size or self.hidden_size)
        super().__post_init__()


class AttentionPool(nn.Module):
    """Attention of one learned query to the patches, and a feed-forward layer; (B, N, D) -> (B, D)."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        block = config.vision_block()
        size, heads = block.hidden_size, block.num_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, size))
        self.attention = Attention(size, heads, heads, size // heads, bias=True)
        self.norm = LayerNorm(size, config.norm_eps)
        self.mlp = MLP(size, block.intermediate_size, block.activation, gated=False, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        probe = self.probe.expand(len(hidden), -1, -1).to(hidden.dtype)
        x = self.attention(probe, mask=None, context=hidden)
        x = x + self.mlp(self.norm(x))
        pooled: Tensor = x[:, 0]
        return pooled


class Siglip(TwoTowers):
    """Image tower without a class token, bidirectional text tower that is read at its last position."""

    model_type: ClassVar[str] = "siglip"
    config_class: ClassVar[type[BackboneConfig]] = SiglipConfig
    architectures: ClassVar[Mapping[str | None, str]] = architectures_of(
        "Siglip", "ForImageClassification"
    )
    successors: ClassVar[Mapping[str, str]] = {
        "image-classification": "pretrain.models.image_tower:SiglipVision"
    }
    padded: ClassVar[bool] = True
    _shared: ClassVar[Mapping[str, Key]] = {
        "activation": Key("hidden_act", "gelu_pytorch_tanh"),
        "norm_eps": Key("layer_norm_eps", 1e-6),
        "attention_dropout": Key("attention_dropout", 0.0),
        "dropout": DROPOUT,
    }
    text_keys: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size", 32000),
        "hidden_size": Key("hidden_size", 768),
        "intermediate_size": Key("intermediate_size", 3072),
        "num_layers": Key("num_hidden_layers", 12),
        "num_heads": Key("num_attention_heads", 12),
        "max_positions": Key("max_position_embeddings", 64),
        "projection_dim": Key("projection_size", None),
        "pad_id": Key("pad_token_id", 1),
        "bos_id": Key("bos_token_id", 49406),
        "eos_id": Key("eos_token_id", 49407),
        **_shared,
    }
    vision_keys: ClassVar[Mapping[str, Key]] = {**VISION_KEYS, **_shared}

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__(config)
        self.image = ImageTower(config, class_token=False, first_norm=False)
        self.pool = AttentionPool(config)
        self.text = TextTower(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim or 0)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))

    def encode_images(self, pixels: Tensor, *, whole: bool = True) -> tuple[Tensor, Tensor]:
        tower = self.image
        x = self.through(tower.layers, tower.embed(pixels), AttentionMask())
        hidden = tower.norm(x)
        return hidden, self.pool(hidden)

    def encode_texts(
        self, ids: Tensor, mask: Tensor | None = None, *, whole: bool = True
    ) -> tuple[Tensor, Tensor]:
        batch = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        x, seen = self.embed_tokens(ids), AttentionMask.from_batch(batch, causal=False)
        last = torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)
        x = self.through(self.text.layers, x, seen, None if whole else last)
        hidden = self.text.norm(x)
        return hidden, self.text_projection(hidden[:, -1])

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the similarity of unit vectors, times the learned scale, plus the learned bias, (images, texts)."""
        return super().scores(images, texts) + self.logit_bias.float()

    def first_scale(self) -> float:
        """Return ln 10, as in the paper."""
        return math.log(10.0)

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        """Initialise matrices as Xavier does, and the bias of the scores at -10: most pairs do not match."""
        super().init_parameter(name, value, seed)
        if name.endswith("logit_bias"):
            value.fill_(-10.0)
        elif "embedding" not in name and "positions" not in name and value.ndim >= 2:
            fans = value.shape[0] + value[0].numel()
            value.mul_(math.sqrt(2 / fans) / self.config.initializer_range)

    def names(self) -> list[Name]:
        head = "vision_model.head"
        pairs = {
            f"{head}.probe": "pool.probe",
            f"{head}.attention.out_proj": "pool.attention.output",
            f"{head}.layernorm": "pool.norm",
            f"{head}.mlp.fc1": "pool.mlp.up",
            f"{head}.mlp.fc2": "pool.mlp.down",
            "text_model.head": "text_projection",
            "logit_scale": "logit_scale",
            "logit_bias": "logit_bias",
        }
        parts = ("query", "key", "value")
        fused = [
            Name(
                f"{head}.attention.in_proj_{leaf}",
                tuple(f"pool.attention.{part}.{leaf}" for part in parts),
            )
            for leaf in ("weight", "bias")
        ]
        return [*super().names(), *renamed(pairs), *fused]

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        vision = ConfigReader(reader.mapping("vision_config") or {}, "siglip (vision_config)")
        vision.refuse("vision_use_head", True, None)
        found = super().fields_from_hf(reader)
        if found["projection_dim"] is None:
            found["projection_dim"] = found["hidden_size"]  # as in transformers
        return found

    def to_hf_config(self) -> dict[str, Any]:
        written = super().to_hf_config()
        written["vision_config"]["vision_use_head"] = True
        return written
