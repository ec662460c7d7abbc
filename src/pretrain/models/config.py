"""Configuration of backbones: sizes, validation before memory is allocated, and reading of Hugging Face's config.json.

A config.json is untrusted input: types are checked, numbers are bounded, and keys that name code are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

from pretrain.errors import ConfigError, did_you_mean
from pretrain.nn.block import BlockConfig
from pretrain.nn.layout import fills_all
from pretrain.nn.mlp import ACTIVATIONS
from pretrain.nn.positions import ORIGINAL, ROPE_TYPES, check_rope
from pretrain.utils.memory_info import physical_memory

__all__ = [
    "GENERATION_KEYS",
    "SIZES",
    "BackboneConfig",
    "ConfigReader",
    "Key",
    "drop_code",
    "placeholders",
    "round_up",
    "written_keys",
]

Self = TypeVar("Self", bound="BackboneConfig")

# Model sizes: name -> (num_layers, hidden_size, num_heads).
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (6, 384, 6),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "xl": (36, 1280, 20),
}
HEAD_DIM = 64
# Generation settings, which models that were published before generation_config.json existed keep in config.json.
GENERATION_KEYS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings"),
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "force_words_ids", "constraints"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "token_healing"),
    *("num_beams", "num_return_sequences", "penalty_alpha", "dola_layers", "guidance_scale", "watermarking_config"),
)  # fmt: skip
# Bounds far above every published model; a larger value means a broken or hostile file. They hold for a part of a model
# too, such as ``vision_hidden_size``.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "num_layers": 1 << 12,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 20,
    "max_positions": 1 << 24,
    "type_vocab_size": 1 << 16,
    "sliding_window": 1 << 24,
    "local_attention": 1 << 24,
    "projection_dim": 1 << 17,
    "image_size": 1 << 13,
    "patch_size": 1 << 10,
    "num_channels": 1 << 10,
    "num_mel_bins": 1 << 10,
    "max_length": 1 << 17,
    "frequency_stride": 1 << 10,
    "time_stride": 1 << 10,
    "mlp_ratio": 1 << 7,
    "num_register_tokens": 1 << 10,
}
_ZERO_ALLOWED = {"type_vocab_size", "vocab_size", "max_positions"}  # none: the input is not text


def round_up(value: float, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return math.ceil(value / multiple) * multiple


_REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """The key of config.json that a field of a configuration is read from and written to.

    Attributes:
        name: the key.
        default: value of the field if the key is absent; without a default the key is required.
        optional: written only if the field differs from the default.
        square: a side of images or patches, n, which may be given as ``[n, n]``.
    """

    name: str
    default: Any = _REQUIRED
    optional: bool = False
    square: bool = False

    def write(self, value: Any) -> dict[str, Any]:
        """Return the key with the value in the spelling of transformers, or nothing if it need not be written."""
        if self.optional and value == self.default:
            return {}
        value = list(value) if isinstance(value, tuple) else value
        return {self.name: "gelu_pytorch_tanh" if value == "gelu_tanh" else value}


def written_keys(config: Any, keys: Mapping[str, Key]) -> dict[str, Any]:
    """Return the keys of config.json that hold the fields of a configuration; ``keys`` maps fields to their keys."""
    written: dict[str, Any] = {}
    for name, key in keys.items():
        written |= key.write(getattr(config, name))
    return written


def _annotation(spec: Field[Any]) -> str:
    return str(spec.type).removeprefix("<class '")  # the class itself without postponed annotations


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Sizes and options that all families share; a family adds its own fields. Validated on construction.

    Attributes:
        vocab_size: rows of the token embedding, V.
        hidden_size: width of the hidden states, D.
        num_layers: number of blocks.
        num_heads: heads of attention, H.
        num_kv_heads: heads of keys and values; H when None.
        head_dim: size of a head; D / H when None.
        intermediate_size: width of the feed-forward layer; the family's usual multiple of D when None.
        max_positions: ``max_position_embeddings`` of config.json.
        norm_eps: added to the variance in every norm.
        dropout: dropout on the embeddings and on the output of each sub-layer of a block.
        attention_dropout: dropout on the attention weights.
        initializer_range: standard deviation of initial weights.
        tie_embeddings: the vocabulary head shares the weight of the token embedding.
        pad_id, bos_id, eos_id: ids of the special tokens.
        activation: activation of the feed-forward layer; a name in ``pretrain.nn.mlp.ACTIVATIONS``.
        zero_init_outputs: the output projections of attention and feed-forward layer start at zero, so that every
            block starts as the identity (arXiv 1901.09321); works well with Muon.
        classifier_dropout: dropout before the classifier of a classification head; the family's default when None.

    Raises:
        ConfigError: a value of the wrong type, out of range, or more parameters than this machine's memory holds.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_positions: int = 1024
    norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_embeddings: bool = True
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    activation: str = "gelu"
    zero_init_outputs: bool = False
    classifier_dropout: float | None = None

    gated: ClassVar[bool] = False
    learned_positions: ClassVar[bool] = False
    free_head_dim: ClassVar[bool] = False  # heads x head_dim may differ from hidden_size

    def __post_init__(self) -> None:
        self._check_fields()
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}. Change one of them."
            )
        self.set_defaults(
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            intermediate_size=self.default_intermediate(),
        )
        self.validate()

    def set_defaults(self, **values: Any) -> None:
        """Give the fields that are None these values."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def block(self, **options: Any) -> BlockConfig:
        """Return the options of the blocks; ``options`` are those that the fields all families share do not say."""
        shared: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "norm_eps": self.norm_eps,
            "activation": self.activation,
            "gated": self.gated,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
        }
        width = self.intermediate_size or 0
        return BlockConfig(self.hidden_size, self.num_heads, width, **(shared | options))

    def divisible(self) -> dict[str, int]:
        """Return the numbers that the size of a tensor-parallel group must divide, by field."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "intermediate_size": self.intermediate_size or 0,
        }

    def possible_tp(self) -> list[int]:
        """Return the possible sizes of a tensor-parallel group for this model, 1 included.

        They divide the attention heads, the key-value heads and the intermediate size, of every tower, and give each
        rank a non-empty part of the vocabulary.
        """
        most = math.gcd(*self.divisible().values())
        return [n for n in range(1, most + 1) if most % n == 0 and fills_all(self.vocab_size, n)]

    def default_intermediate(self) -> int:
        """Return the width of the feed-forward layer that is used if none is given."""
        return 4 * self.hidden_size

    def _check_fields(self) -> None:
        """Check type, finiteness and bounds of every field, by its annotation."""
        for spec in fields(self):
            value, kind = getattr(self, spec.name), _annotation(spec)
            if value is None and "None" in kind:
                continue
            where = f"{spec.name} of the model is {value!r}"
            if kind.startswith("int"):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ConfigError(f"{where}; it must be a whole number.")
                if spec.name.endswith("_id") and not 0 <= value < _LIMITS["vocab_size"]:
                    raise ConfigError(f"{where}; it must be a token id, 0 or more.")
                part = spec.name.removeprefix("vision_").removeprefix("decoder_")
                least, most = int(part not in _ZERO_ALLOWED), _LIMITS.get(part, math.inf)
                if part in _LIMITS and not least <= value <= most:
                    raise ConfigError(f"{where}; it must lie between {least} and {most}.")
            elif kind.startswith("float"):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not math.isfinite(value):
                    raise ConfigError(f"{where}; it must be a finite number.")
                if value < 0 or ("dropout" in spec.name and value >= 1):
                    raise ConfigError(
                        f"{where}; it must be at least 0{', and below 1' * ('drop' in spec.name)}."
                    )
            elif kind.startswith("bool") and not isinstance(value, bool):
                raise ConfigError(f"{where}; it must be true or false.")
            elif kind.startswith("str") and not isinstance(value, str):
                raise ConfigError(f"{where}; it must be a text.")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation of the model is {self.activation!r}, which is unknown."
                + did_you_mean(self.activation, ACTIVATIONS)
            )

    def validate(self) -> None:
        """Check that the fields are consistent and that the parameters fit into this machine's memory.

        Raises:
            ConfigError: they are not, or do not.
        """
        heads, groups, dim = self.num_heads, self.num_kv_heads or 0, self.head_dim or 0
        if heads % groups:
            raise ConfigError(
                f"num_heads {heads} is not a multiple of num_kv_heads {groups}. Change one of them."
            )
        if not self.free_head_dim and heads * dim != self.hidden_size:
            raise ConfigError(
                f"num_heads {heads} x head_dim {dim} is {heads * dim}, which must be hidden_size {self.hidden_size}."
            )
        for name in ("pad_id", "bos_id", "eos_id"):
            value = getattr(self, name)
            if value is not None and value >= self.vocab_size:
                raise ConfigError(f"{name} {value} is not below vocab_size {self.vocab_size}.")
        needed, memory = 4 * self.parameter_count(), physical_memory()
        if needed > memory:
            raise ConfigError(
                f"This model would have {needed // 4:,} parameters, {needed / 2**30:,.0f} GiB in fp32, and this "
                f"machine has {memory / 2**30:,.0f} GiB of memory. Lower vocab_size ({self.vocab_size}), hidden_size "
                f"({self.hidden_size}), num_layers ({self.num_layers}) or intermediate_size ({self.intermediate_size})."
            )

    def parameter_count(self) -> int:
        """Return the number of parameters in matrices, computed from the sizes (norms and biases are not counted)."""
        d, hd, inner = self.hidden_size, self.head_dim or 0, self.intermediate_size or 0
        attention = d * hd * (2 * self.num_heads + 2 * (self.num_kv_heads or 0))
        tables = self.vocab_size * (1 if self.tie_embeddings else 2)
        tables += self.max_positions if self.learned_positions else 0
        return d * tables + self.num_layers * (attention + (3 if self.gated else 2) * d * inner)

    @classmethod
    def size_names(cls) -> tuple[str, ...]:
        """Return the names that ``from_size`` takes, smallest first."""
        return tuple(SIZES)

    @classmethod
    def from_size(cls: type[Self], name: str | None = None, **overrides: Any) -> Self:
        """Return the configuration of a named size, with any field overridden.

        Raises:
            ConfigError: unknown size or field; the message suggests the nearest known one.
        """
        known = [spec.name for spec in fields(cls)]
        for key in overrides:
            if key not in known:
                raise ConfigError(
                    f"{cls.__name__} has no field {key!r}." + did_you_mean(key, known)
                )
        values: dict[str, Any] = {}
        if name is not None:
            if name not in SIZES:
                raise ConfigError(
                    f"There is no model size {name!r}." + did_you_mean(str(name), SIZES)
                )
            layers, hidden, heads = SIZES[name]
            values = {"num_layers": layers, "hidden_size": hidden, "num_heads": heads}
        width = overrides.get("hidden_size")
        if isinstance(width, int) and width > 0 and "num_heads" not in overrides:
            values["num_heads"] = max(width // HEAD_DIM, 2 - width % 2)
        return cls(**{**values, **overrides})


_CODE_KEYS = {
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "attn_implementation",
    "kernel_config",
}


def drop_code(value: Any) -> Any:
    """Remove every key that names code, a kernel, a repository or a file (``*_file``, ``_*``), at any depth."""
    if isinstance(value, Mapping):
        return {
            str(k): drop_code(v)
            for k, v in value.items()
            if not str(k).startswith("_") and not str(k).endswith("_file") and k not in _CODE_KEYS
        }
    if isinstance(value, list | tuple):
        return [drop_code(item) for item in value]
    return value


class ConfigReader:
    """Typed access to the keys of a config.json, which records the keys that were read.

    Args:
        config: the parsed file.
        family: name of the family, for error messages.

    Attributes:
        remarks: settings that have no effect, each a short phrase for the line that is printed on loading.
    """

    # Keys that are read elsewhere, or have no meaning in this package.
    _KNOWN = frozenset(
        {
            *("model_type", "architectures", "dtype", "torch_dtype", "transformers_version"),
            *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
            *("gradient_checkpointing", "pretraining_tp", "chunk_size_feed_forward"),
            "is_encoder_decoder",
        }
    )

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self._config: dict[str, Any] = drop_code(config)
        self._family = family
        self._used: set[str] = set(self._KNOWN)
        self.remarks: list[str] = []
        if self._config.get("quantization_config"):
            raise ConfigError(
                f"config.json of this {family} model has 'quantization_config': quantized weights are not supported. "
                "Load the model with unquantized weights instead."
            )
        if self._config.get("pruned_heads"):
            self.remarks.append("pruned_heads (no head is removed)")

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        self._used.add(key)
        value = self._config.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(
                    f"config.json of this {self._family} model lacks {key!r}, {wanted}."
                )
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"config.json: {key!r} is {value!r}; it must be {wanted}.")
        return value

    def read(self, spec: Field[Any], key: Key) -> Any:
        """Return the value of a field from its key, by the annotation of the field; see the methods below."""
        if key.square:
            self._square(key.name)
        if spec.name.endswith("_id"):
            return self.token(key.name, key.default)
        kind = _annotation(spec).partition(" |")[0].removesuffix("'>")
        if kind.startswith("tuple"):
            found = (self.integers if "int" in kind else self.strings)(key.name)
            return key.default if found is None else found
        read = {"int": self.integer, "float": self.number, "bool": self.flag, "str": self.text}[
            kind
        ]
        return read(key.name, key.default)

    def fields_of(self, kind: type[BackboneConfig], keys: Mapping[str, Key]) -> dict[str, Any]:
        """Return the fields of a configuration that ``keys`` maps to their keys."""
        specs = {spec.name: spec for spec in fields(kind)}
        return {name: self.read(specs[name], key) for name, key in keys.items()}

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a whole number, or the default if the key is absent or null."""
        return self._get(key, default, (int,), "a whole number")

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a number, as float."""
        value = self._get(key, default, (int, float), "a number")
        return value if value is None else float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a boolean."""
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a string."""
        return self._get(key, default, (str,), "a text")

    def mapping(self, key: str) -> dict[str, Any] | None:
        """Return a mapping, or None."""
        found: dict[str, Any] | None = self._get(key, None, (dict,), "a mapping")
        return found

    def integers(self, key: str) -> tuple[int, ...] | None:
        """Return a list of whole numbers, or None."""
        found = self._get(key, None, (list,), "a list of whole numbers")
        if found is not None and not all(type(item) is int for item in found):
            raise ConfigError(
                f"config.json: {key!r} is {found!r}; it must be a list of whole numbers."
            )
        return None if found is None else tuple(found)

    def strings(self, key: str) -> tuple[str, ...] | None:
        """Return a list of strings, or None."""
        found = self._get(key, None, (list,), "a list of texts")
        if found is not None and not all(isinstance(item, str) for item in found):
            raise ConfigError(f"config.json: {key!r} is {found!r}; it must be a list of texts.")
        return None if found is None else tuple(found)

    def token(self, key: str, default: int | None = None) -> int | None:
        """Return a token id, or the first of a list; None if it is null, negative or outside the vocabulary."""
        self._used.add(key)
        vocabulary = self._config.get("vocab_size")
        value = self._config.get(key, default)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"config.json: {key!r} is {value!r}; it must be a token id.")
        if value is None or value < 0 or (isinstance(vocabulary, int) and value >= vocabulary):
            return None
        return value

    def _square(self, key: str) -> None:
        """Replace ``[n, n]`` by the number n; sides of unequal length are refused."""
        value = self._config.get(key)
        if isinstance(value, list) and value:
            if len(value) != 2 or value[0] != value[-1] or type(value[0]) is not type(value[-1]):
                raise ConfigError(
                    f"config.json: {key!r} is {value!r}; only squares, [n, n], are implemented for {self._family}."
                )
            self._config[key] = value[0]

    def window(self) -> int | None:
        """Return ``sliding_window``: as in transformers 4096 if the key is absent, None (full attention) if null."""
        window: int | None = self.integer("sliding_window", None)
        return window if "sliding_window" in self._config else 4096

    def rename(self, **spellings: str) -> None:
        """Read an absent key from its alternative spelling; ``n_embd="hidden_size"``."""
        for key, other in spellings.items():
            if key not in self._config and other in self._config:
                self._config[key] = self._config.pop(other)

    def no_effect(self, key: str, without: Any, why: str) -> None:
        """Add a remark if a key has another value than ``without``; it does not change the outputs and is kept."""
        if self._config.get(key) not in (None, without):
            self.remarks.append(f"{key} ({why})")

    def refuse(self, key: str, *supported: Any) -> None:
        """Raise if the key has a value outside ``supported``: unimplemented features must not be ignored silently."""
        self._used.add(key)
        if key in self._config and self._config[key] not in supported:
            raise ConfigError(
                f"config.json: {key!r} is {self._config[key]!r}, which this package does not implement for "
                f"{self._family}; supported: {', '.join(map(repr, supported))}."
            )

    def rope(
        self,
        given: Mapping[str, Any],
        where: str,
        *,
        theta: float,
        max_positions: int,
        original: int | None = None,
    ) -> dict[str, Any]:
        """Return rotary parameters, with lengths that the mapping lacks filled in from other keys as transformers does.

        Args:
            given: the mapping of config.json.
            where: its key, for messages.
            theta: ``rope_theta`` if the mapping has none.
            max_positions: ``max_position_embeddings``.
            original: ``original_max_position_embeddings`` outside the mapping, which overrides the one inside.

        Raises:
            ConfigError: a type that is not implemented, a missing key, or a number out of range.
        """
        rope = {"rope_theta": theta} | {k: v for k, v in given.items() if k != "type"}
        kind = rope.setdefault("rope_type", given.get("type") or "default") or "default"
        if given.get("type") not in (None, kind):
            self.remarks.append(f"{where}.type (rope_type takes precedence)")
        if kind not in ROPE_TYPES:
            check_rope(rope, f"config.json: {where}")  # raises an error that lists the known types
        if kind in ("llama3", "yarn", "longrope"):
            rope[ORIGINAL] = original or rope.get(ORIGINAL) or max_positions
        if rope.get("factor") is None and (
            kind == "longrope" or (kind == "yarn" and "factor" in rope)
        ):
            known = isinstance(rope[ORIGINAL], int) and rope[ORIGINAL] > 0
            rope["factor"] = max_positions / rope[ORIGINAL] if known else None
        if "truncate" in rope:
            rope["truncate"] = bool(rope["truncate"])
        if kind == "default" and rope.pop("partial_rotary_factor", None) not in (None, 1):
            self.remarks.append(f"{where}.partial_rotary_factor (whole heads are rotated)")
        required, optional = ROPE_TYPES[kind]
        for key in sorted(rope.keys() - required - optional):
            if key not in ("rope_type", "rope_theta", "partial_rotary_factor"):
                if rope[key] is not None and kind != "default":
                    self.remarks.append(f"{where}.{key}")
                del rope[key]
        return check_rope(rope, f"config.json: {where}")

    def own(self, kind: type[BackboneConfig]) -> dict[str, Any]:
        """Return the fields of a configuration that stand under their own names; its constructor checks their types."""
        names = {spec.name for spec in fields(kind)} & self._config.keys()
        self._used |= names
        return {name: self._config[name] for name in sorted(names)}

    def rest(self) -> dict[str, Any]:
        """Return the keys that were not read; they are kept as data and written back on saving."""
        return {k: v for k, v in self._config.items() if k not in self._used}


def placeholders(count: int) -> tuple[str, ...]:
    """Return the names of classes that have none, as transformers generates them."""
    return tuple(f"LABEL_{i}" for i in range(count))
