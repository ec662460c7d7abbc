"""Llama (arXiv 2302.13971) and Mistral (2310.06825); also the base of the Qwen models.

Rotary positions, RMS norms before each sub-layer, gated feed-forward layers, grouped keys and values. The families
derived from Llama differ in biases, in norms on queries and keys, and in which layers use a sliding window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.backbone import Backbone, Batch
from pretrain.models.config import BackboneConfig, ConfigReader, Key, round_up
from pretrain.models.heads import decoder_head, text_architectures
from pretrain.models.names import Name, renamed
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block
from pretrain.nn.norm import RMSNorm
from pretrain.nn.positions import RotaryTable, check_rope, usable_positions

__all__ = ["KEYS", "LAYER_TYPES", "Llama", "LlamaConfig", "Mistral", "MistralConfig"]

LAYER_TYPES = ("full_attention", "sliding_attention")

# What the config.json of all families derived from Llama say alike.
KEYS = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "intermediate_size": Key("intermediate_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads", None),
    "head_dim": Key("head_dim", None),
    "activation": Key("hidden_act", "silu"),
    "norm_eps": Key("rms_norm_eps", 1e-6),
    "max_positions": Key("max_position_embeddings", 2048),
    "initializer_range": Key("initializer_range", 0.02),
    "dropout": Key("resid_pdrop", 0.0, optional=True),  # transformers has no such dropout here
    "attention_dropout": Key("attention_dropout", 0.0),
    "classifier_dropout": Key("classifier_dropout", None, optional=True),
    "tie_embeddings": Key("tie_word_embeddings", False),
    "pad_id": Key("pad_token_id", None),
    "bos_id": Key("bos_token_id", None),
    "eos_id": Key("eos_token_id", None),
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(BackboneConfig):
    """Fields of Llama and the families derived from it.

    Attributes:
        rope: ``rope_parameters`` of config.json: ``rope_theta``, ``rope_type`` and the keys of a scaling.
        attention_bias: biases on the four projections of attention (Qwen2: on three, always).
        mlp_bias: biases in the feed-forward layer.
        sliding_window: in sliding layers, a token attends to itself and to ``sliding_window - 1`` tokens before it.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer; None makes all layers slide if
            ``sliding_window`` is set.
    """

    activation: str = "silu"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    rope: Mapping[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    gated: ClassVar[bool] = True
    free_head_dim: ClassVar[bool] = True

    def default_intermediate(self) -> int:
        """Return 8/3 D, with as many parameters as an ungated layer of width 4 D, rounded up to a multiple of 64."""
        return round_up(8 * self.hidden_size / 3, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rope", check_rope(self.rope or {}, "rope"))
        if (self.head_dim or 0) % 2:
            raise ConfigError(
                f"head_dim {self.head_dim} is odd. Rotary positions rotate pairs of dimensions: make it even."
            )
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            unknown = set(self.layer_types) - set(LAYER_TYPES)
            if unknown or len(self.layer_types) != self.num_layers:
                raise ConfigError(
                    f"layer_types must name one of {', '.join(LAYER_TYPES)} for each of the {self.num_layers} layers, "
                    f"not {list(self.layer_types)[:8]}."
                )
            if "sliding_attention" in self.layer_types and self.sliding_window is None:
                raise ConfigError("layer_types has sliding layers, but sliding_window is not set.")
        if type(self) is LlamaConfig:
            self.refuse("llama", "sliding_window", "layer_types")

    def refuse(self, family: str, *names: str) -> None:
        """Raise if a field is set that the family's config.json cannot express: it would be lost on saving."""
        for name in names:
            if getattr(self, name):
                raise ConfigError(
                    f"{name} cannot be set for {family}: its config.json has no such key. Leave it out, or choose "
                    "llama (attention_bias, mlp_bias), mistral (sliding_window), qwen2 (sliding_window, layer_types) "
                    "or qwen3 (attention_bias, sliding_window, layer_types)."
                )

    def window_of(self, layer: int) -> int | None:
        """Return the distance up to which this layer attends to earlier tokens; None for no limit."""
        if self.sliding_window is None:
            return None
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window - 1


class Llama(Backbone):
    """Decoder with rotary positions; base class of the related families."""

    model_type: ClassVar[str] = "llama"
    config_class: ClassVar[type[BackboneConfig]] = LlamaConfig
    prefixes: ClassVar[tuple[str, ...]] = ("transformer.",)
    qk_norm: ClassVar[bool] = False
    # Biases on queries, keys and values that config.json has no key for.
    qkv_bias: ClassVar[bool] = False
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures("Llama")
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **KEYS,
        "bos_id": Key("bos_token_id", 1),
        "eos_id": Key("eos_token_id", 2),
        "attention_bias": Key("attention_bias", False),
        "mlp_bias": Key("mlp_bias", False),
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        block = config.block(
            norm="rmsnorm",
            bias=config.mlp_bias,
            attention_bias=config.attention_bias or self.qkv_bias,
            output_bias=config.attention_bias,
            qk_norm=self.qk_norm,
        )
        self.token_embedding = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_id
        )
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = RotaryTable(config.head_dim or 0, config.rope or {}, config.max_positions)

    @property
    def max_length(self) -> int:
        """Positions of training, extended by a rotary scaling."""
        return usable_positions(self.config.rope, self.config.max_positions)

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        ids = batch["input_ids"]
        start, stop = self.span(batch, cache)
        positions = self.positions(batch, cache)
        if positions is None:
            rope = self.rotary.at(start, stop, ids.device)
        else:
            rope = self.rotary.of(positions)
        x = self.drop(self.look_up(self.token_embedding, ids))
        mask = AttentionMask.from_batch(batch, causal=True, past=start)
        masks = [mask.windowed(self.config.window_of(i)) for i in range(len(self.layers))]
        x = self.run(x, masks, [rope] * len(masks), cache, batch.get("keep_index"))
        hidden: Tensor = self.final_norm(x)
        return hidden

    def embeddings(self) -> list[nn.Module]:
        return [self.token_embedding]

    def prefix_of(self, kind: str | None) -> str:
        """Return the prefix of the body; transformers uses another one for question answering."""
        return "transformer." if kind == "question-answering" else super().prefix_of(kind)

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        return decoder_head(self.config, self.token_embedding, kind, num_labels)

    def names(self) -> list[Name]:
        parts = {
            "input_layernorm": "attention_norm",
            "self_attn.q_proj": "attention.query",
            "self_attn.k_proj": "attention.key",
            "self_attn.v_proj": "attention.value",
            "self_attn.o_proj": "attention.output",
            "self_attn.q_norm": "attention.query_norm",
            "self_attn.k_norm": "attention.key_norm",
            "post_attention_layernorm": "mlp_norm",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
        }
        rules = {"embed_tokens": "token_embedding", "norm": "final_norm"}
        return [*renamed(rules), *renamed(parts, "layers.{n}.", "layers.{n}.")]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        if kind == "causal-lm":
            return [Name("lm_head.weight", ("head.output_weight",), body=False)]
        disk = "qa_outputs" if kind == "question-answering" else "score"
        return [Name(disk, ("head.classifier",), body=False)]

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        reader.refuse("is_causal", True, None)
        found = super().fields_from_hf(reader)
        if found["head_dim"] is None and found["num_heads"] > 0:  # need not divide the hidden size
            found["head_dim"] = found["hidden_size"] // found["num_heads"]
        return found | {"rope": cls._rope_from_hf(reader, found["max_positions"])}

    @staticmethod
    def _rope_from_hf(reader: ConfigReader, max_positions: int) -> dict[str, Any]:
        """Read rotary parameters; ``rope_scaling`` (transformers 4) overrides ``rope_parameters`` (5), as there."""
        new, old = reader.mapping("rope_parameters"), reader.mapping("rope_scaling")
        partial = reader.number("partial_rotary_factor", None)
        rope = dict(old or new or {})
        if partial is not None:
            rope.setdefault("partial_rotary_factor", partial)
        return reader.rope(
            rope,
            "rope_scaling" if old else "rope_parameters",
            theta=reader.number("rope_theta", 10_000.0),
            max_positions=max_positions,
            original=reader.integer("original_max_position_embeddings", None),
        )

    def to_hf_config(self) -> dict[str, Any]:
        rope = dict(self.config.rope)
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        return super().to_hf_config() | {
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": scaling if rope["rope_type"] != "default" else None,
        }


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """Llama's fields; ``sliding_window`` applies to all layers, None is full attention."""

    def validate(self) -> None:
        super().validate()
        self.refuse("mistral", "attention_bias", "mlp_bias", "layer_types")


class Mistral(Llama):
    """Llama with an optional sliding window in all layers."""

    model_type: ClassVar[str] = "mistral"
    config_class: ClassVar[type[BackboneConfig]] = MistralConfig
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures("Mistral")
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **KEYS,
        "num_kv_heads": Key("num_key_value_heads", 8),  # as in transformers
        "bos_id": Key("bos_token_id", 1),
        "eos_id": Key("eos_token_id", 2),
    }

    def prefix_of(self, kind: str | None) -> str:
        return Backbone.prefix_of(self, kind)

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        return super().fields_from_hf(reader) | {"sliding_window": reader.window()}

    def to_hf_config(self) -> dict[str, Any]:
        return super().to_hf_config() | {"sliding_window": self.config.sliding_window}
