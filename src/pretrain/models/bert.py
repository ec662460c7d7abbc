"""BERT (arXiv 1810.04805) and RoBERTa (1907.11692): bidirectional encoders with learned positions and post-norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.backbone import Backbone, Batch
from pretrain.models.config import BackboneConfig, ConfigReader, Key
from pretrain.models.heads import (
    LanguageHead,
    SequenceHead,
    TokenHead,
    Transform,
    text_architectures,
)
from pretrain.models.names import Name, renamed
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block
from pretrain.nn.norm import LayerNorm

__all__ = ["BLOCK_NAMES", "Bert", "BertConfig", "Roberta", "RobertaConfig"]

# Names on disk of the parts of a block.
BLOCK_NAMES = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "mlp_norm",
}


@dataclass(frozen=True, kw_only=True)
class BertConfig(BackboneConfig):
    """Fields of BERT; ``classifier_dropout`` defaults to ``dropout``.

    Attributes:
        type_vocab_size: number of segments.
    """

    vocab_size: int = 30522
    max_positions: int = 512
    norm_eps: float = 1e-12
    type_vocab_size: int = 2

    learned_positions: ClassVar[bool] = True


class Bert(Backbone):
    """Encoder with learned absolute positions and segments.

    Class attributes:
        mlm_activation: activation in the masked-LM head; that of the blocks when None.
        dropout_first: apply dropout before the pooler of a sequence head as well.
    """

    mlm_activation: ClassVar[str | None] = None
    dropout_first: ClassVar[bool] = False
    model_type: ClassVar[str] = "bert"
    config_class: ClassVar[type[BackboneConfig]] = BertConfig
    causal: ClassVar[bool] = False
    prefix: ClassVar[str] = "bert."
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures("Bert", "ForMaskedLM")
    hf_keys: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "hidden_size": Key("hidden_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "intermediate_size": Key("intermediate_size"),
        "activation": Key("hidden_act", "gelu"),
        "dropout": Key("hidden_dropout_prob", 0.1),
        "attention_dropout": Key("attention_probs_dropout_prob", 0.1),
        "max_positions": Key("max_position_embeddings", 512),
        "initializer_range": Key("initializer_range", 0.02),
        "norm_eps": Key("layer_norm_eps", 1e-12),
        "tie_embeddings": Key("tie_word_embeddings", True),
        "pad_id": Key("pad_token_id", 0),
        "bos_id": Key("bos_token_id", None),
        "eos_id": Key("eos_token_id", None),
        "type_vocab_size": Key("type_vocab_size", 2),
        "classifier_dropout": Key("classifier_dropout", None),
    }

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        block = config.block(pre_norm=False)
        self.token_embedding = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_id
        )
        self.position_embedding = self.build_positions(config)
        self.segment_embedding = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))

    def build_positions(self, config: BertConfig) -> nn.Embedding:
        """Return the table of position embeddings."""
        return nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        self.refuse_cache(cache, "attends in both directions, so it ")
        self.span(batch, None)
        x = self.look_up(self.token_embedding, batch["input_ids"])
        if "token_type_ids" in batch:
            x = x + self.look_up(self.segment_embedding, batch["token_type_ids"], "token_type_ids")
        else:
            x = x + self.segment_embedding.weight[0]
        x = self.drop(self.embedding_norm(x + self.embed_positions(batch, None)))
        mask = AttentionMask.from_batch(batch, causal=False)
        return self.run(x, mask, keep=batch.get("keep_index"))

    def init_cutoff(self) -> float | None:
        """Truncate at two standard deviations, as the published code does."""
        return 2.0

    def embeddings(self) -> list[nn.Module]:
        return [
            self.token_embedding,
            self.position_embedding,
            self.segment_embedding,
            self.embedding_norm,
        ]

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        config = self.config
        if kind == "masked-lm":
            norm = LayerNorm(config.hidden_size, config.norm_eps)
            activation = self.mlm_activation or config.activation
            transform = Transform(config.hidden_size, activation, norm)
            return LanguageHead(
                self.token_embedding, tied=config.tie_embeddings, transform=transform, bias=True
            )
        dropout = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        if (
            kind == "sequence-classification"
        ):  # a pooler, dense and tanh on the first token, and a classifier
            return SequenceHead(
                config.hidden_size,
                num_labels,
                pool="first",
                transform=Transform(config.hidden_size, "tanh", None),
                dropout=dropout,
                dropout_first=self.dropout_first,
            )
        if kind == "token-classification":
            return TokenHead(config.hidden_size, num_labels, dropout=dropout)
        return TokenHead(config.hidden_size, 2)

    def names(self) -> list[Name]:
        return [
            Name("embeddings.word_embeddings", ("token_embedding",)),
            Name("embeddings.position_embeddings", ("position_embedding",)),
            Name("embeddings.token_type_embeddings", ("segment_embedding",)),
            Name("embeddings.LayerNorm", ("embedding_norm",)),
            *renamed(BLOCK_NAMES, "encoder.layer.{n}.", "layers.{n}."),
        ]

    # Names on disk of the masked-LM head: dense, norm, bias, projection.
    mlm_names: ClassVar[tuple[str, str, str, str]] = (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "cls.predictions.decoder",
    )

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        if kind == "masked-lm":
            dense, norm, bias, decoder = self.mlm_names
            return [
                Name(dense, ("head.transform.dense",), body=False),
                Name(norm, ("head.transform.norm",), body=False),
                Name(bias if tied else f"{decoder}.bias", ("head.output_bias",), body=False),
                Name(f"{decoder}.weight", ("head.output_weight",), body=False),
            ]
        if kind == "sequence-classification":
            return self.sequence_names()
        disk = "qa_outputs" if kind == "question-answering" else "classifier"
        return [Name(disk, ("head.classifier",), body=False)]

    def sequence_names(self) -> list[Name]:
        """Return the rules of the sequence head; on disk the pooler belongs to the body."""
        return [
            Name("pooler.dense", ("head.transform.dense",)),
            Name("classifier", ("head.classifier",), body=False),
        ]

    def copies(self, kind: str, *, tied: bool) -> dict[str, str]:
        if kind != "masked-lm":
            return {}
        _, _, bias, decoder = self.mlm_names
        if not tied:
            return {bias: "head.output_bias"}
        return {
            f"{decoder}.weight": "backbone.token_embedding.weight",
            f"{decoder}.bias": "head.output_bias",
        }

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        reader.refuse("position_embedding_type", "absolute", None)
        reader.refuse("is_decoder", False, None)
        reader.refuse("add_cross_attention", False, None)
        return super().fields_from_hf(reader)

    def to_hf_config(self) -> dict[str, Any]:
        return super().to_hf_config() | {"position_embedding_type": "absolute"}


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Fields of RoBERTa.

    Attributes:
        max_positions: number of table rows; the first ``pad_id + 1`` hold no position.
    """

    vocab_size: int = 50265
    max_positions: int = 514
    norm_eps: float = 1e-5
    type_vocab_size: int = 1
    pad_id: int | None = 1

    def validate(self) -> None:
        super().validate()
        if self.pad_id is None:
            raise ConfigError("RoBERTa counts its positions from pad_id, so pad_id must be set.")
        if self.max_positions <= self.pad_id + 1:
            raise ConfigError(
                f"max_positions {self.max_positions} leaves no position after pad_id {self.pad_id}: RoBERTa's "
                "positions start at pad_id + 1. Set a larger max_positions."
            )


class Roberta(Bert):
    """BERT with positions that start at ``pad_id + 1``; padding has the position ``pad_id``."""

    mlm_activation: ClassVar[str | None] = "gelu"
    dropout_first: ClassVar[bool] = True
    model_type: ClassVar[str] = "roberta"
    positions_from_pad: ClassVar[bool] = True
    config_class: ClassVar[type[BackboneConfig]] = RobertaConfig
    prefix: ClassVar[str] = "roberta."
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **Bert.hf_keys,
        "pad_id": Key("pad_token_id", 1),
        "bos_id": Key("bos_token_id", 0),
        "eos_id": Key("eos_token_id", 2),
    }
    mlm_names: ClassVar[tuple[str, str, str, str]] = (
        "lm_head.dense",
        "lm_head.layer_norm",
        "lm_head.bias",
        "lm_head.decoder",
    )
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures("Roberta", "ForMaskedLM")

    @property
    def max_length(self) -> int:
        """Number of table rows that hold positions."""
        return int(self.config.max_positions - self.config.pad_id - 1)

    def build_positions(self, config: BertConfig) -> nn.Embedding:
        return nn.Embedding(config.max_positions, config.hidden_size, padding_idx=config.pad_id)

    def embed_positions(self, batch: Batch, cache: KVCache | None) -> Tensor:
        """Return position embeddings; given positions start at 0 as in all families, and the offset is added here."""
        ids, pad = batch["input_ids"], self.config.pad_id
        positions = self.positions(batch, cache)
        if positions is None:
            real = ids != pad
            positions = real.cumsum(1) * real + pad
        else:
            positions = positions + pad + 1
            if "document_ids" in batch:
                positions = torch.where(batch["document_ids"] == 0, pad, positions)
        found: Tensor = self.position_embedding(positions)
        return found

    def sequence_names(self) -> list[Name]:
        return [
            Name("classifier.dense", ("head.transform.dense",), body=False),
            Name("classifier.out_proj", ("head.classifier",), body=False),
        ]
