"""The settings of an adapter (LoRA: arXiv 2106.09685, DoRA: 2402.09353, rsLoRA: 2312.03732) and PEFT's JSON for them.

PEFT's file is untrusted input: types and bounds are checked, unsupported settings are refused by name, and no string in
it is used as a regular expression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.errors import CheckpointError, ConfigError

__all__ = ["ALL_LINEAR", "LoraConfig", "from_peft", "pattern_value"]

ALL_LINEAR = "all-linear"
RANK_LIMIT = 1 << 16
_TEXT_LIMIT = 4096
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter, which is trained beside the frozen weights.

    Attributes:
        r: rank of the update.
        alpha: the update is multiplied by alpha / r, or with ``rslora`` by alpha / sqrt(r). None means 2 r, so that the
            factor is 2 at every rank, or with ``rslora`` 16, as in its paper.
        dropout: dropout probability on the input of the update, during training.
        targets: modules to adapt, as suffixes of their names on disk (``"q_proj"``, ``"mlp.c_proj"``), matched like in
            PEFT. None or ``"all-linear"`` means every linear layer of the blocks: adapting only the attention learns
            less with the same number of parameters (arXiv 2305.14314).
        dora: learn the magnitude of each output row separately from its direction.
        rslora: see ``alpha``.
        modules_to_save: modules that are fully trained and stored with the adapter, as suffixes of their names on
            disk. A classification or question-answering head always is.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | str | None = None
    dora: bool = False
    rslora: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if type(self.r) is not int or not 1 <= self.r <= RANK_LIMIT:
            raise ConfigError(
                f"The rank r of an adapter is {self.r!r}; it must be 1 to {RANK_LIMIT}."
            )
        if self.alpha is not None and not (_number(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"alpha of an adapter is {self.alpha!r}; it must be a positive number or None."
            )
        if not _number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout of an adapter is {self.dropout!r}; it must be at least 0 and below 1."
            )
        for name in ("dora", "rslora"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(
                    f"{name} of an adapter is {getattr(self, name)!r}; it must be true or false."
                )
        targets = None if self.targets in (None, ALL_LINEAR) else _modules("targets", self.targets)
        if targets == ():
            raise ConfigError("targets of an adapter are empty: nothing would be adapted.")
        saved = _modules("modules_to_save", self.modules_to_save or ())
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "modules_to_save", saved)

    @property
    def full_alpha(self) -> float:
        """The value of alpha, with its default filled in."""
        if self.alpha is not None:
            return float(self.alpha)
        return 16.0 if self.rslora else 2.0 * self.r

    def scale(self, r: int, alpha: float) -> float:
        """Return the scaling factor of an update of rank ``r``."""
        return alpha / math.sqrt(r) if self.rslora else alpha / r

    def to_peft(self) -> dict[str, Any]:
        """Return the keys of adapter_config.json that depend only on these settings."""
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": plain(self.full_alpha),
            "lora_dropout": float(self.dropout),
            "use_dora": self.dora,
            "use_rslora": self.rslora,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }


def plain(value: float) -> int | float:
    """Return a whole number as an int, which other readers of adapter_config.json expect for alpha."""
    return int(value) if float(value).is_integer() else value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _modules(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise ConfigError(
            f"{name} of an adapter is {value!r}; it must be a list of module names such as ['q_proj', 'v_proj']."
        )
    for item in value:
        if not _MODULE.fullmatch(item):
            raise ConfigError(
                f"{name} of an adapter holds {item[:80]!r}; a module name has letters, digits, '_' and dots."
            )
    return tuple(dict.fromkeys(value))


# ------------------------------------------------------------------------------------------------ PEFT's file

# Keys that do not affect the result of a trained adapter, or are read elsewhere. The adapted modules are determined
# from the tensors, so the settings that selected them are ignored.
_FREE = frozenset(
    {
        *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "task_type", "lora_dropout"),
    }
)
# Other keys -> the values that have no effect; a key that is not listed may only be null, false or empty.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core", None),
    "qalora_group_size": (16, None),
}
_READ = frozenset({"r", "lora_alpha", "use_dora", "use_rslora", "modules_to_save"})
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class PeftSettings:
    """Content of adapter_config.json.

    Attributes:
        lora: the settings.
        base: path or name of the base model.
        task: PEFT's task type.
        ranks: module name -> rank, where it differs from ``lora.r``.
        alphas: module name -> alpha, where it differs from ``lora.alpha``.
    """

    lora: LoraConfig
    base: str | None
    task: str | None
    ranks: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def from_peft(content: Mapping[str, Any], where: object) -> PeftSettings:
    """Read adapter_config.json.

    Args:
        content: the parsed file.
        where: file name for error messages.

    Raises:
        CheckpointError: a key has the wrong type, or a value that this package does not implement.
    """
    for key, value in content.items():
        if key in _FREE or key in _READ or key in _PATTERNS:
            continue
        neutral = _NEUTRAL.get(key)
        # Compared one by one and by type too, because a list is not hashable and 1 == True.
        known = neutral is not None and any(type(value) is type(n) and value == n for n in neutral)
        if not known and (neutral is not None or value not in (None, False, "", [], {})):
            allowed = f"; supported: {', '.join(map(repr, neutral))}" if neutral else ""
            raise CheckpointError(
                f"{where}: {key!r} is {str(value)[:80]!r}, which this package does not implement{allowed}. Merge the "
                "adapter into its base with peft and load the merged model instead."
            )
    if "peft_type" not in content:
        raise CheckpointError(f"{where} has no 'peft_type'. Is it the file of a PEFT adapter?")
    base, task = content.get("base_model_name_or_path"), content.get("task_type")
    for key, text in (("base_model_name_or_path", base), ("task_type", task)):
        if text is not None and (not isinstance(text, str) or len(text) > _TEXT_LIMIT):
            raise CheckpointError(f"{where}: {key!r} is {str(text)[:80]!r}; it must be a text.")
    saved = content.get("modules_to_save") or ()
    if not isinstance(saved, list | tuple):
        raise CheckpointError(
            f"{where}: 'modules_to_save' is {str(saved)[:80]!r}; it must be a list."
        )
    try:
        lora = LoraConfig(
            r=content.get("r", 8),
            alpha=content.get("lora_alpha", 8),
            dropout=content.get("lora_dropout") or 0.0,
            dora=content.get("use_dora") or False,
            rslora=content.get("use_rslora") or False,
            modules_to_save=tuple(saved),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    ranks, alphas = (_pattern(content.get(key), key, where) for key in _PATTERNS)
    return PeftSettings(lora, base, task, ranks, alphas)


def _pattern(value: Any, key: str, where: object) -> dict[str, float]:
    """Parse a mapping of module names to numbers. The names are regular expressions in PEFT, and literal here."""
    if value in (None, {}):
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key!r} is {str(value)[:80]!r}; it must be a mapping.")
    found = {}
    for name, number in value.items():
        bare = name.removeprefix("^")
        if not _MODULE.fullmatch(bare):
            raise CheckpointError(
                f"{where}: {key!r} names its modules by the pattern {name[:80]!r}; only plain module names are read."
            )
        if not _number(number) or number <= 0:
            raise CheckpointError(
                f"{where}: {key!r} gives {name[:80]!r} the value {str(number)[:40]!r}; it must be a positive number."
            )
        found[bare] = float(number)
    return found


def pattern_value(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first name in ``pattern`` that is a suffix of the module's name, else ``default``."""
    for name, value in pattern.items():
        if module == name or module.endswith("." + name):
            return value
    return default
