"""Sampling of the next token from scores over the vocabulary.

Top-k (Fan et al., arXiv 1805.04833), nucleus or top-p (Holtzman et al., 1904.09751), min-p (Nguyen et al.,
2407.01082) and the repetition penalty of CTRL (Keskar et al., 1909.05858), applied in the order of transformers.
Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import ConfigError

__all__ = ["Sampler", "banned", "filter_scores", "penalize"]


_COLDEST = 1e-3  # the lowest temperature above 0


def penalize(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return scores with tokens that a row already holds made less likely (more likely if the penalty is below 1).

    It divides positive scores (B, V) of the tokens ``seen`` (B, V), and multiplies negative ones.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def filter_scores(
    scores: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Scale the scores (B, V) and set those of tokens that must not be drawn to -inf; at least one always stays."""
    if temperature != 1.0:
        scores = scores / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if top_p is not None and top_p < 1.0:
        ordered, index = scores.sort(dim=-1)
        tail = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
        tail[:, -1] = False
        scores = scores.masked_fill(tail.scatter(1, index, tail), -math.inf)
    if min_p is not None and min_p > 0.0:
        # In log space: p < min_p * max(p) is score < max(score) + log(min_p).
        least = scores.amax(-1, keepdim=True) + math.log(min_p)
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


@dataclass(frozen=True)
class Sampler:
    """Selection of the next token, greedy or by sampling.

    Attributes:
        temperature: 0 is greedy, other values are at least 0.001; None is 1 if ``top_k``, ``top_p``, ``min_p`` or
            ``seed`` is set, and else 0.
        top_k: sample from the k most likely tokens.
        top_p: sample from the most likely tokens that together have this probability.
        min_p: sample from tokens with at least this fraction of the largest probability.
        repetition_penalty: see `penalize`.
        seed: seed of sampling; with None every run differs. The global generator is not used.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 1, math.inf),
            ("top_p", self.top_p, 1e-9, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 1e3),
            ("seed", self.seed, 0, (1 << 63) - 1),
        )
        for name, value, low, high in checks:
            whole = name in ("top_k", "seed")
            if value is None and name != "repetition_penalty":
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ConfigError(
                    f"{name} must be a {'whole ' if whole else ''}number, found {value!r}."
                )
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must lie between {low} and {high}.")
        if self.temperature is not None and 0 < self.temperature < _COLDEST:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0, which takes the likeliest token, or at least "
                f"{_COLDEST}: scores divided by less are no longer finite."
            )

    @property
    def effective_temperature(self) -> float:
        """The effective temperature: 0 is greedy."""
        if self.temperature is not None:
            return self.temperature
        chance = (self.top_k, self.top_p, self.min_p, self.seed)
        return 0.0 if all(setting is None for setting in chance) else 1.0

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a new generator, seeded with ``seed`` or randomly."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def choose(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next token of every row, (B, V) -> (B,).

        Raises:
            ConfigError: every token of a row is forbidden (checked when sampling on a CPU).
        """
        if self.effective_temperature == 0.0:
            return scores.argmax(-1)
        scores = filter_scores(
            scores,
            temperature=self.effective_temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )
        if scores.device.type == "cpu" and not bool((scores > -math.inf).any(-1).all()):
            raise ConfigError(
                "The settings of generation forbid every token. Shorten suppress_tokens or bad_words_ids, or raise "
                "no_repeat_ngram_size."
            )
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def banned(
    vocab_size: int, known: int, special: Collection[int], device: torch.device
) -> Tensor | None:
    """Return (V,) with -inf for rows beyond the ``known`` tokens and for ``special`` ones; None if all are allowed."""
    if known >= vocab_size and not special:
        return None
    added = torch.zeros(vocab_size)
    added[known:] = -math.inf
    for index in special:
        added[index] = -math.inf
    return added.to(device)
