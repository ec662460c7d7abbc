"""Rotary positions (RoFormer, arXiv 2104.09864) in the half-split form of published checkpoints, and their scalings.

Scalings: linear (positional interpolation, 2306.15595), dynamic NTK, llama3 (2407.21783), YaRN (2309.00071) and
LongRoPE (2402.13753).
Angles are always fp32; the tables are converted to the dtype of the activations when they are applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import ConfigError, did_you_mean

__all__ = [
    "ROPE_TYPES",
    "Rope",
    "RotaryTable",
    "check_rope",
    "document_positions",
    "rotate",
    "usable_positions",
]

ORIGINAL = "original_max_position_embeddings"
_FACTOR_LISTS = ("short_factor", "long_factor")  # one number per pair of dimensions
_ZERO_IS_ABSENT = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")
# Required and optional keys of each scaling, `rope_type` and `rope_theta` aside.
ROPE_TYPES: dict[str, tuple[Set[str], Set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}, set()),
    "yarn": ({"factor"}, {ORIGINAL, "attention_factor", "truncate", *_ZERO_IS_ABSENT}),
    "longrope": ({"factor", ORIGINAL, *_FACTOR_LISTS}, {"attention_factor"}),
}
_MOST_POSITIONS = 1 << 24
_BY_LENGTH = ("dynamic", "longrope")  # frequencies that depend on the longest row of a batch


class Rope:
    """Cosines and sines of the positions of one batch, (B|1, T, 1, d), in fp32 and in each dtype that is asked for."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._tables = {cos.dtype: (cos, sin)}
        self._wide = (cos, sin)

    def to(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the tables in ``dtype``, converted once."""
        if dtype not in self._tables:
            with torch.inference_mode(False):
                self._tables[dtype] = (self._wide[0].to(dtype), self._wide[1].to(dtype))
        return self._tables[dtype]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the halves of each head against each other, (B, T, H, d) -> (B, T, H, d)."""
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def document_positions(documents: Tensor) -> Tensor:
    """Return positions that restart with every run of equal ids, (B, T) -> (B, T)."""
    columns = torch.arange(documents.shape[1], device=documents.device)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return columns - torch.where(starts, columns, 0).cummax(dim=1).values


def check_rope(parameters: Mapping[str, Any], where: str = "rope_parameters") -> dict[str, Any]:
    """Validate rotary parameters and return them with ``rope_type`` and ``rope_theta`` filled in.

    Raises:
        ConfigError: an unknown type or key, a missing key, or a number out of range.
    """
    given = dict(parameters)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"{where}: the rope type {kind!r} is not supported."
            + did_you_mean(str(kind), ROPE_TYPES)
        )
    theta = given.pop("rope_theta", 10_000.0)
    partial = given.pop("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise ConfigError(
            f"{where}.partial_rotary_factor is {partial}: rotating a part of a head is not supported."
        )
    required, optional = ROPE_TYPES[kind]
    for key in given:
        if key not in required | optional and given[key] is not None and kind != "default":
            raise ConfigError(
                f"{where}.{key}: the rope type {kind!r} has no such key."
                + did_you_mean(key, required | optional)
            )
    for key in required:
        if given.get(key) is None:
            raise ConfigError(f"{where}: the rope type {kind!r} needs {key!r}, which is missing.")
    checked: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    checked |= {k: v for k, v in given.items() if v is not None and k in required | optional}
    for key in _ZERO_IS_ABSENT:
        if checked.get(key) == 0:
            del checked[key]
    for key, value in checked.items():
        if key in ("rope_type", "truncate"):
            continue
        if key in _FACTOR_LISTS:  # ``RotaryTable`` checks their length against the head
            if not isinstance(value, list | tuple) or not all(map(_is_positive, value)):
                raise ConfigError(
                    f"{where}.{key} must be a list of positive numbers, not {str(value)[:60]}."
                )
        elif not _is_positive(value):
            raise ConfigError(f"{where}.{key} is {value!r}; it must be a positive finite number.")
    checked["rope_theta"] = float(theta)
    return checked


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def usable_positions(rope: Mapping[str, Any], max_positions: int) -> int:
    """Return the maximum number of tokens in a row: the length of training, extended by the scaling.

    Linear and dynamic factors multiply ``max_position_embeddings``; a YaRN factor multiplies the length before
    scaling, which ``original_max_position_embeddings`` names. The other scalings state the final length themselves.
    """
    kind, length = rope["rope_type"], max_positions
    if kind == "yarn":
        length = rope.get(ORIGINAL) or max_positions
    if kind in ("linear", "dynamic", "yarn"):
        return max(max_positions, int(min(length * rope["factor"], _MOST_POSITIONS)))
    return max_positions


class RotaryTable:
    """Builds ``Rope`` tables from positions.

    It is not a module: its tensors are neither saved nor left empty by construction on the meta device.

    Args:
        head_dim: d, even.
        parameters: as ``check_rope`` returns them.
        max_positions: the length that the model was built for; ``dynamic`` scaling applies beyond it.

    Raises:
        ConfigError: a list of factors does not fit ``head_dim``.
    """

    def __init__(self, head_dim: int, parameters: Mapping[str, Any], max_positions: int) -> None:
        self.head_dim, self.parameters = head_dim, dict(parameters)
        self.max_positions = max_positions
        for key in _FACTOR_LISTS:
            if key in parameters and len(parameters[key]) != head_dim // 2:
                raise ConfigError(
                    f"rope.{key} has {len(parameters[key])} numbers; head_dim {head_dim} needs {head_dim // 2}."
                )
        self._frequencies: dict[Any, tuple[Tensor, float]] = {}
        self._recent: tuple[Any, Rope] | None = None

    def frequencies(self, length: int, device: torch.device) -> tuple[Tensor, float]:
        """Return inverse frequencies (d/2,) in fp32 and the factor on the tables, for rows of ``length`` positions."""
        kind, depends = self.parameters["rope_type"], 0
        if kind == "dynamic":
            depends = max(length, self.max_positions)
        elif kind == "longrope":
            depends = length > self.parameters[ORIGINAL]
        key = (device, depends)
        if key not in self._frequencies:
            # Cached tensors must not be inference tensors: a later training step may save them for backward.
            with torch.inference_mode(False), torch.no_grad():
                values, factor = _frequencies(
                    self.head_dim, self.parameters, self.max_positions, length
                )
                self._frequencies = {key: (values.to(device), factor)}
        return self._frequencies[key]

    def at(self, start: int, stop: int, device: torch.device) -> Rope:
        """Return tables (1, T, 1, d) of the positions start..stop-1; the most recent ones are cached."""
        if torch.compiler.is_exporting():  # sizes are symbols, and nothing traced may be kept
            return self.of(torch.arange(start, stop, device=device)[None], stop)
        key = (start, stop, device)
        if self._recent is None or self._recent[0] != key:
            with torch.inference_mode(False):
                positions = torch.arange(start, stop, device=device)[None]
                self._recent = (key, self.of(positions, stop))
        return self._recent[1]

    @torch.no_grad()
    def of(self, positions: Tensor, length: int | None = None) -> Rope:
        """Return tables (B, T, 1, d) of the positions (B, T); ``length`` is the largest position + 1, if known."""
        if length is None:
            by_length = self.parameters["rope_type"] in _BY_LENGTH
            length = int(positions.max()) + 1 if by_length else 0
        frequencies, factor = self.frequencies(length, positions.device)
        angles = positions[..., None].float() * frequencies  # (B, T, d/2)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        cos, sin = angles.cos(), angles.sin()
        return Rope(cos, sin) if factor == 1.0 else Rope(cos * factor, sin * factor)


def _frequencies(
    dim: int, rope: Mapping[str, Any], max_positions: int, length: int
) -> tuple[Tensor, float]:
    """Return inverse frequencies and table factor of one scaling, computed on the CPU in fp32."""
    kind, base = rope["rope_type"], rope["rope_theta"]
    with torch.device("cpu"):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        if kind == "dynamic":
            # The base grows with the row length once that exceeds the length of training.
            factor = rope["factor"]
            ratio = factor * max(length, max_positions) / max_positions - (factor - 1)
            base = base * ratio ** (dim / (dim - 2))
        plain = 1.0 / (base**exponents)
        if kind == "linear":
            return plain / rope["factor"], 1.0
        if kind == "llama3":
            return _llama3(plain, rope), 1.0
        if kind == "yarn":
            return _yarn(plain, dim, rope, max_positions)
        if kind == "longrope":
            return _longrope(plain, rope, length)
        return plain, 1.0


def _llama3(plain: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Stretch long wavelengths, keep short ones and interpolate between them."""
    length, low, high = (rope[k] for k in (ORIGINAL, "low_freq_factor", "high_freq_factor"))
    waves = 2 * math.pi / plain
    blend = ((length / waves - low) / (high - low)).clamp(0, 1)
    blended: Tensor = (1 - blend) * plain / rope["factor"] + blend * plain
    return blended


def _longrope(plain: Tensor, rope: Mapping[str, Any], length: int) -> tuple[Tensor, float]:
    """Divide each frequency by its own factor, which differs for rows longer than the original length."""
    original, factor = rope[ORIGINAL], rope["factor"]
    factors = rope["long_factor" if length > original else "short_factor"]
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        longer = factor > 1
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if longer else 1.0
    return plain / torch.tensor(factors, dtype=torch.float32), float(magnitude)


def _yarn(
    plain: Tensor, dim: int, rope: Mapping[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """Interpolate the dimensions with few turns within the original length, and keep those with many."""
    factor, base = rope["factor"], rope["rope_theta"]
    length = rope.get(ORIGINAL) or max_positions

    def dimension(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolate = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    values = plain / factor * interpolate + plain * (1 - interpolate)

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    given, top, bottom = map(rope.get, ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return values, float(given)
    if top and bottom:
        return values, magnitude(factor, top) / magnitude(factor, bottom)
    return values, magnitude(factor)
