"""ModernBERT (arXiv 2412.13663): rotary positions, gated GELU, pre-norm, few biases, mostly local attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.backbone import Backbone, Batch
from pretrain.models.config import BackboneConfig, ConfigReader, Key, round_up
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
from pretrain.nn.mlp import ACTIVATIONS
from pretrain.nn.norm import LayerNorm
from pretrain.nn.positions import RotaryTable, check_rope, usable_positions

__all__ = ["ModernBert", "ModernBertConfig"]

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = {_FULL: 160_000.0, _SLIDING: 10_000.0}


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(BackboneConfig):
    """Fields of config.json.

    Attributes:
        local_attention: window of sliding layers; a token attends to half of it on either side.
        layer_types: ``full_attention`` or ``sliding_attention`` per layer; None makes every third layer full, from the
            first.
        rope: rotary parameters per layer type.
        norm_bias, attention_bias, mlp_bias, decoder_bias, classifier_bias: whether these parts have biases.
        classifier_pooling: ``cls`` or ``mean``.
        classifier_activation: activation in the transform of every head.
        classifier_dropout: dropout before the classifier.
        init_cutoff: number of standard deviations at which initial weights are truncated.
    """

    vocab_size: int = 50368
    local_attention: int = 128
    layer_types: tuple[str, ...] | None = None
    rope: Mapping[str, Any] | None = None
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_pooling: str = "cls"
    classifier_activation: str = "gelu"
    classifier_dropout: float = 0.0
    init_cutoff: float = 2.0

    gated: ClassVar[bool] = True

    def default_intermediate(self) -> int:
        """Return 1.5 D, as in ModernBERT-base, rounded up to a multiple of 64."""
        return round_up(1.5 * self.hidden_size, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        types = self.layer_types
        if types is None:
            types = _types(self.num_layers, 3)
        if len(types) != self.num_layers or set(types) - set(_THETA):
            raise ConfigError(
                f"layer_types must name one of {', '.join(_THETA)} for each of the {self.num_layers} layers, not "
                f"{list(types)[:8]}."
            )
        object.__setattr__(self, "layer_types", tuple(types))
        given = self.rope or {}
        rope = {
            kind: check_rope({"rope_theta": theta} | dict(given.get(kind) or {}), f"rope.{kind}")
            for kind, theta in _THETA.items()
        }
        object.__setattr__(self, "rope", rope)
        if self.classifier_pooling not in ("cls", "mean"):
            raise ConfigError(
                f"classifier_pooling is {self.classifier_pooling!r}; it must be 'cls' or 'mean'."
            )
        if self.classifier_activation not in ACTIVATIONS:
            raise ConfigError(
                f"classifier_activation {self.classifier_activation!r} is unknown; it must be a key of "
                "pretrain.nn.mlp.ACTIVATIONS."
            )
        if (self.head_dim or 0) % 2:
            raise ConfigError(
                f"head_dim {self.head_dim} is odd. Rotary positions rotate pairs of dimensions: make it even."
            )


class ModernBert(Backbone):
    """Encoder with rotary positions; most layers attend within a window."""

    model_type: ClassVar[str] = "modernbert"
    config_class: ClassVar[type[BackboneConfig]] = ModernBertConfig
    causal: ClassVar[bool] = False
    residual_scale: ClassVar[bool] = True
    projection: ClassVar[str] = "decoder.weight"
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures(
        "ModernBert", "ForMaskedLM"
    )
    hf_keys: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "hidden_size": Key("hidden_size"),
        "intermediate_size": Key("intermediate_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "activation": Key("hidden_activation", "gelu"),
        "max_positions": Key("max_position_embeddings", 8192),
        "initializer_range": Key("initializer_range", 0.02),
        "init_cutoff": Key("initializer_cutoff_factor", 2.0),
        "norm_eps": Key("norm_eps", 1e-5),
        "norm_bias": Key("norm_bias", False),
        "attention_bias": Key("attention_bias", False),
        "mlp_bias": Key("mlp_bias", False),
        "decoder_bias": Key("decoder_bias", True),
        "classifier_bias": Key("classifier_bias", False),
        "classifier_pooling": Key("classifier_pooling", "cls"),
        "classifier_activation": Key("classifier_activation", "gelu"),
        "classifier_dropout": Key("classifier_dropout", 0.0),
        "dropout": Key("resid_pdrop", 0.0, optional=True),  # transformers has no such dropout here
        "attention_dropout": Key("attention_dropout", 0.0),
        "local_attention": Key("local_attention", 128),
        "tie_embeddings": Key("tie_word_embeddings", True),
        "pad_id": Key("pad_token_id", 50283),
        "bos_id": Key("bos_token_id", 50281),
        "eos_id": Key("eos_token_id", 50282),
    }

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        options = config.block(
            bias=config.mlp_bias, attention_bias=config.attention_bias, norm_bias=config.norm_bias
        )
        self.token_embedding = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_id
        )
        self.embedding_norm = self._norm(config)
        self.layers = nn.ModuleList(Block(options) for _ in range(config.num_layers))
        # The embeddings are already normalised, so the first block has no attention norm.
        first: Any = self.layers[0]
        first.attention_norm = nn.Identity()
        if config.attention_dropout:  # also on the output of attention, as published
            for layer in self.layers:
                block: Any = layer
                block.dropout = config.attention_dropout
        self.final_norm = self._norm(config)
        self.rotary = {
            kind: RotaryTable(config.head_dim or 0, (config.rope or {})[kind], config.max_positions)
            for kind in sorted(set(config.layer_types or ()))
        }

    @property
    def max_length(self) -> int:
        """Positions of training, extended by the rotary scaling of the layers with full attention."""
        kind = _FULL if _FULL in self.config.layer_types else _SLIDING
        return usable_positions(self.config.rope[kind], self.config.max_positions)

    @staticmethod
    def _norm(config: ModernBertConfig) -> LayerNorm:
        return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        self.refuse_cache(cache, "attends in both directions, so it ")
        ids = batch["input_ids"]
        _, stop = self.span(batch, None)
        positions = self.positions(batch, None)
        ropes = {
            kind: table.at(0, stop, ids.device) if positions is None else table.of(positions)
            for kind, table in self.rotary.items()
        }
        mask = AttentionMask.from_batch(batch, causal=False)
        half = self.config.local_attention // 2
        types = self.config.layer_types
        masks = [mask.windowed(half if kind == _SLIDING else None) for kind in types]
        x = self.drop(self.embedding_norm(self.look_up(self.token_embedding, ids)))
        x = self.run(x, masks, [ropes[kind] for kind in types], None, batch.get("keep_index"))
        hidden: Tensor = self.final_norm(x)
        return hidden

    def embeddings(self) -> list[nn.Module]:
        return [self.token_embedding, self.embedding_norm]

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        config = self.config
        size = config.hidden_size
        transform = Transform(
            size, config.classifier_activation, self._norm(config), config.classifier_bias
        )
        if kind == "masked-lm":
            return LanguageHead(
                self.token_embedding,
                tied=config.tie_embeddings,
                transform=transform,
                bias=config.decoder_bias,
            )
        dropout = config.classifier_dropout
        if kind == "sequence-classification":
            pool = "first" if config.classifier_pooling == "cls" else "mean"
            return SequenceHead(size, num_labels, pool=pool, transform=transform, dropout=dropout)
        labels = num_labels if kind == "token-classification" else 2
        return TokenHead(size, labels, transform=transform, dropout=dropout)

    def init_cutoff(self) -> float | None:
        cutoff: float = self.config.init_cutoff
        return cutoff

    def init_std(self, name: str) -> float:
        """Return the deviation of an output projection for the vocabulary head, and 1/sqrt(D) for a classifier."""
        if name in ("head.transform.dense.weight", "head.output_weight"):
            return float(self.config.initializer_range / (2 * self.config.num_layers) ** 0.5)
        if name == "head.classifier.weight":
            return float(self.config.hidden_size**-0.5)
        return super().init_std(name)

    def names(self) -> list[Name]:
        layer = "layers.{n}."
        return [
            Name("embeddings.tok_embeddings", ("token_embedding",)),
            Name("embeddings.norm", ("embedding_norm",)),
            Name(layer + "attn_norm", (layer + "attention_norm",)),
            Name(
                layer + "attn.Wqkv",
                tuple(f"{layer}attention.{part}" for part in ("query", "key", "value")),
            ),
            Name(layer + "attn.Wo", (layer + "attention.output",)),
            Name(layer + "mlp_norm", (layer + "mlp_norm",)),
            Name(layer + "mlp.Wi", (layer + "mlp.gate", layer + "mlp.up")),
            Name(layer + "mlp.Wo", (layer + "mlp.down",)),
            Name("final_norm", ("final_norm",)),
        ]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        pairs = {
            "head.dense": "head.transform.dense",
            "head.norm": "head.transform.norm",
            "classifier": "head.classifier",
            "decoder.bias": "head.output_bias",
            "decoder.weight": "head.output_weight",
        }
        return renamed(pairs, body=False)

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        for key in ("embedding_dropout", "mlp_dropout"):
            reader.no_effect(key, 0, "that dropout is not applied in training")
        found = super().fields_from_hf(reader)
        layers, every = found["num_layers"], reader.integer("global_attn_every_n_layers", 3)
        types = reader.strings("layer_types")
        if types is None:
            if every < 1:
                raise ConfigError(
                    f"config.json: 'global_attn_every_n_layers' is {every}; it must be at least 1."
                )
            types = _types(max(0, min(layers, 1 << 12)), every)
        return found | {
            "layer_types": types,
            "rope": _rope_from_hf(reader, found["max_positions"]),
            "bos_id": reader.token("cls_token_id", found["bos_id"]),
            "eos_id": reader.token("sep_token_id", found["eos_id"]),
        }

    def to_hf_config(self) -> dict[str, Any]:
        config = self.config
        written = super().to_hf_config() | {
            "layer_types": list(config.layer_types),
            "rope_parameters": {kind: dict(rope) for kind, rope in config.rope.items()},
            "global_rope_theta": config.rope[_FULL]["rope_theta"],
            "local_rope_theta": config.rope[_SLIDING]["rope_theta"],
            "cls_token_id": config.bos_id,
            "sep_token_id": config.eos_id,
        }
        layers = config.num_layers
        for every in range(1, layers + 1):
            if config.layer_types == _types(layers, every):
                return written | {"global_attn_every_n_layers": every}
        return written


def _types(layers: int, every: int) -> tuple[str, ...]:
    """Return the layer types if every ``every``-th layer, from the first, has full attention."""
    return tuple(_SLIDING if i % every else _FULL for i in range(layers))


def _rope_from_hf(reader: ConfigReader, max_positions: int) -> dict[str, Any]:
    """Read nested ``rope_parameters`` (transformers 5) or two thetas; ``rope_scaling`` (4) overrides both, as there."""
    scaling = reader.mapping("rope_scaling") or {}
    nested = reader.mapping("rope_parameters")
    if nested is None:
        nested = {kind: {"rope_type": "default"} for kind in _THETA}
    thetas = {_FULL: "global_rope_theta", _SLIDING: "local_rope_theta"}
    for key in sorted(nested.keys() - thetas.keys()):
        reader.remarks.append(f"rope_parameters.{key}")
    ropes = {}
    for kind, key in thetas.items():
        given = nested.get(kind) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"config.json: rope_parameters.{kind} must be a mapping.")
        # transformers looks for truncate outside the nested mappings, so here it has no effect.
        rope = {k: v for k, v in {**given, **scaling}.items() if k != "truncate"}
        ropes[kind] = reader.rope(
            rope,
            f"rope_parameters.{kind}",
            theta=reader.number(key, _THETA[kind]),
            max_positions=max_positions,
        )
    return ropes
