"""GIT (arXiv 2205.14100): a decoder that reads an image as a prefix, and the text behind it from left to right.

Letters: B rows, T tokens, M image tokens (the class token and the patches), D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ModelError
from pretrain.models.backbone import Batch
from pretrain.models.bert import BLOCK_NAMES
from pretrain.models.clip import (
    VISION_KEYS,
    ImageTower,
    PairBackbone,
    TowersConfig,
    image_tower_names,
    read_part,
    tower_std,
    written_part,
)
from pretrain.models.config import BackboneConfig, ConfigReader, Key
from pretrain.models.heads import LanguageHead
from pretrain.models.names import Name, renamed
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block, BlockConfig
from pretrain.nn.norm import LayerNorm

__all__ = ["Git", "GitConfig"]


@dataclass(frozen=True, kw_only=True)
class GitConfig(TowersConfig):
    """Fields of GIT; those that all families share describe the decoder.

    Attributes:
        vision_activation, vision_norm_eps, vision_attention_dropout: of the image tower.
    """

    vocab_size: int = 30522
    max_positions: int = 1024
    norm_eps: float = 1e-12
    patch_size: int = 16
    dropout: float = 0.1
    attention_dropout: float = 0.1
    tie_embeddings: bool = False
    pad_id: int | None = 0
    bos_id: int | None = 101
    eos_id: int | None = 102
    vision_activation: str = "quick_gelu"
    vision_norm_eps: float = 1e-5
    vision_attention_dropout: float = 0.0

    def vision_block(self) -> BlockConfig:
        return replace(
            super().vision_block(),
            activation=self.vision_activation,
            norm_eps=self.vision_norm_eps,
            dropout=0.0,
            attention_dropout=self.vision_attention_dropout,
        )


class Git(PairBackbone):
    """Tokens under ``input_ids`` behind the image under ``pixel_values``, if there is one, (B, T) -> (B, T, D).

    All image tokens attend to one another, and a token of the text to the image and the tokens before it. Positions
    count the text alone. Padding, named by ``attention_mask``, may stand on either side. With a cache, the image
    belongs to the first call, and later ones need ``position_ids``.
    """

    model_type: ClassVar[str] = "git"
    config_class: ClassVar[type[BackboneConfig]] = GitConfig
    prefix: ClassVar[str] = "git."
    projection: ClassVar[str] = "output.weight"
    architectures: ClassVar[Mapping[str | None, str]] = {
        None: "GitModel",
        "causal-lm": "GitForCausalLM",
    }
    hf_keys: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size", 30522),
        "hidden_size": Key("hidden_size", 768),
        "num_layers": Key("num_hidden_layers", 6),
        "num_heads": Key("num_attention_heads", 12),
        "intermediate_size": Key("intermediate_size", 3072),
        "activation": Key("hidden_act", "gelu"),
        "dropout": Key("hidden_dropout_prob", 0.1),
        "attention_dropout": Key("attention_probs_dropout_prob", 0.1),
        "max_positions": Key("max_position_embeddings", 1024),
        "initializer_range": Key("initializer_range", 0.02),
        "norm_eps": Key("layer_norm_eps", 1e-12),
        "tie_embeddings": Key("tie_word_embeddings", False),
        "pad_id": Key("pad_token_id", 0),
        "bos_id": Key("bos_token_id", 101),
        "eos_id": Key("eos_token_id", 102),
    }
    vision_keys: ClassVar[Mapping[str, Key]] = {
        **VISION_KEYS,
        "vision_activation": Key("hidden_act", "quick_gelu"),
        "vision_norm_eps": Key("layer_norm_eps", 1e-5),
        "vision_attention_dropout": Key("attention_dropout", 0.0),
    }

    def __init__(self, config: GitConfig) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.norm_eps
        self.image = ImageTower(config, class_token=True, first_norm=True)
        self.image_projection = nn.Linear(config.vision_hidden_size or size, size)
        self.image_norm = LayerNorm(size, config.vision_norm_eps)
        self.token_embedding = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_id)
        self.position_embedding = nn.Embedding(config.max_positions, size)
        self.embedding_norm = LayerNorm(size, eps)
        block = config.block(pre_norm=False)
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        x, pixels = self.embed_tokens(batch, cache), batch.get("pixel_values")
        if pixels is None:
            past = 0 if cache is None else cache.length
            mask = AttentionMask.from_batch(batch, causal=True, past=past)
            return self.run(x, mask, cache=cache)
        if "document_ids" in batch:
            raise ModelError(
                f"A {self.model_type} model has one image in each row, but these rows are packed with several "
                "documents (document_ids). Put one text in each row."
            )
        prefix = self.encode_images(pixels)
        count = prefix.shape[1]
        x = torch.cat((prefix.to(x.dtype), x), dim=1)
        bias, documents = prefix_bias(count, x.shape[1], x.device), None
        if (real := AttentionMask.from_batch(batch, causal=True).documents) is not None:
            # The ids of padding differ from those of the image and the text, which are one document.
            documents = F.pad(real, (count, 0), value=1)
        mask = AttentionMask(documents=documents, bias=bias)
        text = torch.arange(count, x.shape[1], device=x.device).expand(len(x), -1)
        return self.run(x, mask, cache=cache, keep=text)

    def embed_tokens(self, batch: Batch, cache: KVCache | None) -> Tensor:
        """Embed ids with their positions, (B, T) -> (B, T, D)."""
        places = self.embed_positions(batch, cache)
        x = self.look_up(self.token_embedding, batch["input_ids"])
        return self.drop(self.embedding_norm(x + places))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return the image tokens, (B, C, H, W) -> (B, M, D)."""
        tower, mask = self.image, AttentionMask()
        x = tower.embed(pixels)
        for layer in tower.layers:
            x = layer(x, mask=mask)
        found: Tensor = self.image_norm(self.image_projection(tower.norm(x)))
        return found

    # ------------------------------------------------------------------ what a batch is

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the image tower, then those of the decoder."""
        return [*self.image.layers, *self.layers]

    def embeddings(self) -> list[nn.Module]:
        return [
            self.image.patches,
            self.token_embedding,
            self.position_embedding,
            self.embedding_norm,
        ]

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        return LanguageHead(self.token_embedding, tied=self.config.tie_embeddings, bias=True)

    def init_std(self, name: str) -> float:
        """Return ``initializer_range`` for the decoder; the image tower starts as that of CLIP, with louder positions.

        Normalised pixels give patches a variance of 1/3 under the initial weights of a convolution in torch, which the
        published CLIP leaves as they are, and positions are given the same here. With a fraction of it, small models
        learned which colours and shapes are in an image, and long not where.
        """
        if ".image." not in name:
            return super().init_std(name)
        if name.endswith(("patches.positions", "patches.class_token")):
            return 1 / math.sqrt(3)
        if "patches.projection" in name:
            return 1 / math.sqrt(3 * self.config.num_channels * self.config.patch_size**2)
        return tower_std(self.config, name, image=True)

    # ------------------------------------------------------------------ names and files

    def names(self) -> list[Name]:
        pairs = image_tower_names("image_encoder.vision_model", "image.") | {
            "visual_projection.visual_projection.0": "image_projection",
            "visual_projection.visual_projection.1": "image_norm",
            "embeddings.word_embeddings": "token_embedding",
            "embeddings.position_embeddings": "position_embedding",
            "embeddings.LayerNorm": "embedding_norm",
        }
        return [*renamed(pairs), *renamed(BLOCK_NAMES, "encoder.layer.{n}.", "layers.{n}.")]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        return [
            Name("output.weight", ("head.output_weight",), body=False),
            Name("output.bias", ("head.output_bias",), body=False),
        ]

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        reader.refuse("num_image_with_embedding", None)  # several frames of a video
        vision = read_part(reader, "vision_config", cls.vision_keys, cls)
        return super().fields_from_hf(reader) | vision

    def to_hf_config(self) -> dict[str, Any]:
        return super().to_hf_config() | written_part(self, "vision", self.vision_keys)


def prefix_bias(count: int, columns: int, device: torch.device) -> Tensor:
    """Return what is added to the scores, (1, 1, S, S): -inf where a column may not be read.

    The first ``count`` columns read one another, the others themselves and all before them.
    """
    place = torch.arange(columns, device=device)
    seen = (place <= place[:, None]) | (place < count)
    return torch.zeros(1, 1, columns, columns, device=device).masked_fill_(~seen, float("-inf"))
