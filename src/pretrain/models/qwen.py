"""Qwen2 (arXiv 2407.10671) and Qwen3 (2505.09388): Llama with a few biases, or with norms on queries and keys.

In both, any layer may use a sliding window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pretrain.errors import ConfigError
from pretrain.models.config import BackboneConfig, ConfigReader, Key
from pretrain.models.heads import text_architectures
from pretrain.models.llama import KEYS, LAYER_TYPES, Llama, LlamaConfig

__all__ = ["Qwen2", "Qwen2Config", "Qwen3", "Qwen3Config"]


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Llama's fields; ``layer_types`` selects the layers with a sliding window."""

    def validate(self) -> None:
        super().validate()
        self.refuse("qwen2", "attention_bias", "mlp_bias")


class Qwen2(Llama):
    """Llama with biases on queries, keys and values."""

    model_type: ClassVar[str] = "qwen2"
    config_class: ClassVar[type[BackboneConfig]] = Qwen2Config
    qkv_bias: ClassVar[bool] = True
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures("Qwen2")
    hf_keys: ClassVar[Mapping[str, Key]] = KEYS

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        found = super().fields_from_hf(reader)
        use = reader.flag("use_sliding_window", False)
        window = reader.window()
        first = reader.integer("max_window_layers", 28)
        types = reader.strings("layer_types")
        if not use or window is None:
            # "attention" is an older name of "full_attention".
            if other := set(types or ()) - {"full_attention", "attention"}:
                raise ConfigError(
                    f"config.json: 'layer_types' has {', '.join(sorted(other))}, but 'use_sliding_window' is not true "
                    "or 'sliding_window' is null; one of them is wrong."
                )
            return found
        if types is None:
            types = tuple(LAYER_TYPES[i >= first] for i in range(min(found["num_layers"], 1 << 12)))
        return found | {"sliding_window": window, "layer_types": types}

    def to_hf_config(self) -> dict[str, Any]:
        config = self.config
        windows = [config.window_of(i) is not None for i in range(config.num_layers)]
        first = windows.index(True) if any(windows) else config.num_layers
        return super().to_hf_config() | {
            "use_sliding_window": any(windows),
            "sliding_window": config.sliding_window if any(windows) else None,
            "max_window_layers": first,
            "layer_types": [LAYER_TYPES[slides] for slides in windows],
        }


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """Llama's fields; ``layer_types`` selects the layers with a sliding window."""

    def validate(self) -> None:
        super().validate()
        self.refuse("qwen3", "mlp_bias")


class Qwen3(Qwen2):
    """Llama with a norm on each head's queries and keys."""

    model_type: ClassVar[str] = "qwen3"
    config_class: ClassVar[type[BackboneConfig]] = Qwen3Config
    qk_norm: ClassVar[bool] = True
    qkv_bias: ClassVar[bool] = False
    architectures: ClassVar[Mapping[str | None, str]] = text_architectures("Qwen3")
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **KEYS,
        "head_dim": Key("head_dim", 128),  # as in transformers
        "attention_bias": Key("attention_bias", False),
    }
