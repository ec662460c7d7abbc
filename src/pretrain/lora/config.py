"""Settings of an adapter (LoRA: arXiv 2106.09685, DoRA: 2402.09353, rsLoRA: 2312.03732)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from pretrain.errors import ConfigError

__all__ = ["ALL_LINEAR", "MODULE", "LoraConfig", "is_number"]

ALL_LINEAR = "all-linear"
RANK_LIMIT = 1 << 16
MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


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
                f"The rank r of an adapter is {self.r!r}; it must be a whole number from 1 to {RANK_LIMIT}."
            )
        if self.alpha is not None and not (is_number(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"alpha of an adapter is {self.alpha!r}; it must be a positive number or None."
            )
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
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
            raise ConfigError(
                "targets of an adapter are empty, so no layer would be adapted. Name some, or leave targets out to "
                "adapt all."
            )
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


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _modules(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise ConfigError(
            f"{name} of an adapter is {value!r}; it must be a list of module names such as ['q_proj', 'v_proj']."
        )
    for item in value:
        if not MODULE.fullmatch(item):
            raise ConfigError(
                f"{name} of an adapter holds {item[:80]!r}; a module name has letters, digits, '_' and dots."
            )
    return tuple(dict.fromkeys(value))
