"""GPT-2 (Radford et al., 2019): learned positions, pre-norm blocks, tanh GELU, a tied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pretrain.models.backbone import Backbone, Batch
from pretrain.models.config import BackboneConfig, ConfigReader, Key
from pretrain.models.heads import decoder_head, text_architectures
from pretrain.models.names import Name
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block
from pretrain.nn.kernels import dropout
from pretrain.nn.norm import LayerNorm

__all__ = ["GPT2", "GPT2Config"]


@dataclass(frozen=True, kw_only=True)
class GPT2Config(BackboneConfig):
    """Fields of GPT-2.

    Attributes:
        dropout: dropout on the output of each sub-layer of a block, ``resid_pdrop`` of config.json.
        embedding_dropout: dropout on the embeddings, ``embd_pdrop``.
        attention_dropout: dropout on the attention weights, ``attn_pdrop``.
    """

    vocab_size: int = 50257
    activation: str = "gelu_new"
    embedding_dropout: float = 0.0

    learned_positions: ClassVar[bool] = True


class GPT2(Backbone):
    """Decoder with learned absolute positions."""

    model_type: ClassVar[str] = "gpt2"
    config_class: ClassVar[type[BackboneConfig]] = GPT2Config
    prefix: ClassVar[str] = "transformer."
    residual_scale: ClassVar[bool] = True
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures("GPT2", "LMHeadModel")
    hf_keys: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "hidden_size": Key("n_embd"),
        "num_layers": Key("n_layer"),
        "num_heads": Key("n_head"),
        "intermediate_size": Key("n_inner", None),
        "max_positions": Key("n_positions", 1024),
        "activation": Key("activation_function", "gelu_new"),
        "norm_eps": Key("layer_norm_epsilon", 1e-5),
        "dropout": Key("resid_pdrop", 0.1),
        "embedding_dropout": Key("embd_pdrop", 0.1),
        "attention_dropout": Key("attn_pdrop", 0.1),
        "initializer_range": Key("initializer_range", 0.02),
        "classifier_dropout": Key("classifier_dropout", None),
        "tie_embeddings": Key("tie_word_embeddings", True),
        "pad_id": Key("pad_token_id", None),
        "bos_id": Key("bos_token_id", 50256),
        "eos_id": Key("eos_token_id", 50256),
    }

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        block = config.block()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        start, _ = self.span(batch, cache)
        x = self.look_up(self.token_embedding, batch["input_ids"])
        x = x + self.embed_positions(batch, cache)
        x = dropout(x, self.config.embedding_dropout, self.training)
        mask = AttentionMask.from_batch(batch, causal=True, past=start)
        x = self.run(x, mask, cache=cache, keep=batch.get("keep_index"))
        hidden: Tensor = self.final_norm(x)
        return hidden

    def embeddings(self) -> list[nn.Module]:
        return [self.token_embedding, self.position_embedding]

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        return decoder_head(self.config, self.token_embedding, kind, num_labels)

    def names(self) -> list[Name]:
        layer = "layers.{n}."
        return [
            Name("wte", ("token_embedding",)),
            Name("wpe", ("position_embedding",)),
            Name("h.{n}.ln_1", (layer + "attention_norm",)),
            Name(
                "h.{n}.attn.c_attn",
                tuple(f"{layer}attention.{part}" for part in ("query", "key", "value")),
                transpose=True,
            ),
            Name("h.{n}.attn.c_proj", (layer + "attention.output",), transpose=True),
            Name("h.{n}.ln_2", (layer + "mlp_norm",)),
            Name("h.{n}.mlp.c_fc", (layer + "mlp.up",), transpose=True),
            Name("h.{n}.mlp.c_proj", (layer + "mlp.down",), transpose=True),
            Name("ln_f", ("final_norm",)),
        ]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        disk = {
            "sequence-classification": "score",
            "token-classification": "classifier",
            "question-answering": "qa_outputs",
        }
        if kind == "causal-lm":
            return [Name("lm_head.weight", ("head.output_weight",), body=False)]
        return [Name(disk[kind], ("head.classifier",), body=False)]

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        reader.refuse("scale_attn_weights", True)
        reader.refuse("scale_attn_by_inverse_layer_idx", False)
        reader.refuse("is_causal", True, None)
        reader.no_effect("add_cross_attention", False, "it is used only with an encoder")
        reader.rename(
            n_embd="hidden_size",
            n_layer="num_hidden_layers",
            n_head="num_attention_heads",
            n_positions="max_position_embeddings",
        )
        reader.flag("reorder_and_upcast_attn", False)  # the same function in another order
        return super().fields_from_hf(reader)

    def to_hf_config(self) -> dict[str, Any]:
        return super().to_hf_config() | {
            "n_ctx": self.config.max_positions,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        }
