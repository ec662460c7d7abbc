"""Settings of text generation: generation_config.json, overridden by the arguments of the caller.

The keys are those of transformers, and greedy search gives the same tokens as there. Letters: B rows, T tokens, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.config.check import check_value
from pretrain.errors import ConfigError, did_you_mean
from pretrain.inference.sampling import Sampler
from pretrain.models.config import GENERATION_KEYS
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["CHANCE", "Rules", "Settings", "add_biases", "ban_repeated"]

FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 64
# Any of these arguments of the caller turns sampling on.
CHANCE = ("temperature", "top_k", "top_p", "min_p", "seed")
_DEFAULT_TOP_K = 50  # the default of transformers for a file that turns sampling on without top_k
# Keys that change the text and are not implemented -> values without an effect.
_MISSING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "token_healing": (False,),
    "watermarking_config": (),
    "max_time": (),
}
_MISSING_IN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
_KNOWN = {*GENERATION_KEYS, "seed", "eos_token_id"} - _MISSING.keys() - _MISSING_IN_SAMPLING.keys()


@dataclass(frozen=True)
class Rules:
    """Rules that forbid or force tokens, independent of the sampler. An empty value is no rule.

    Attributes:
        biases: (sequence, bias): added to the score of the last token of a sequence if the tokens before it match.
        bad_words: sequences that are never completed.
        no_repeat: n-grams of this size occur at most once; 0 is off.
        min_length: no end of text before this many tokens, including the prompt.
        min_new: no end of text before this many new tokens.
        forced_first: the second token of the text if the prompt has a single token.
        forced_last: tokens of which one is forced at the last step.
        suppressed: tokens that are never generated.
        suppressed_first: tokens that are not generated first.
        ends: ids that end a text.
    """

    biases: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    no_repeat: int = 0
    min_length: int = 0
    min_new: int = 0
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()

    @property
    def none(self) -> bool:
        """Whether there is no rule, so that no history is needed."""
        return self == Rules(ends=self.ends)

    def after(
        self,
        scores: Tensor,
        history: Tensor,
        prompts: Sequence[int],
        step: int,
        last: Sequence[int],
    ) -> Tensor:
        """Apply all rules but the biases: those that follow the repetition penalty, in the order of transformers.

        Args:
            scores: (B, V).
            history: (B, T) the tokens of each row so far, -1 for padding.
            prompts: number of tokens of each prompt.
            step: number of new tokens so far.
            last: the step of the last token of each row, if it does not end earlier.
        """
        if self.no_repeat:
            scores = ban_repeated(scores, history, self.no_repeat)
        words = [word for word in self.bad_words if word not in {(end,) for end in self.ends}]
        scores = add_biases(scores, history, [(word, -math.inf) for word in words])
        early = [n + step < self.min_length or step < self.min_new for n in prompts]
        scores = _forbid(scores, early, self.ends)
        if self.forced_first is not None:
            scores = _force(scores, [n == 1 and step == 0 for n in prompts], (self.forced_first,))
        scores = _force(scores, [step == at for at in last], self.forced_last)
        scores = _forbid(scores, [True] * len(prompts), self.suppressed)
        late = [self.forced_first is not None and n == 1 for n in prompts]
        return _forbid(scores, [step == int(later) for later in late], self.suppressed_first)


def _rows(scores: Tensor, rows: Sequence[bool], ids: Sequence[int]) -> Tensor:
    """Return (B, V) booleans, True for these ids in these rows."""
    mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
    mask[[i for i in ids if 0 <= i < len(mask)]] = True
    chosen: Tensor = torch.tensor(list(rows))[:, None] & mask
    return chosen.to(scores.device)


def _forbid(scores: Tensor, rows: Sequence[bool], ids: Sequence[int]) -> Tensor:
    if not ids or not any(rows):
        return scores
    return scores.masked_fill(_rows(scores, rows, ids), -math.inf)


def _force(scores: Tensor, rows: Sequence[bool], ids: Sequence[int]) -> Tensor:
    if not ids or not any(rows):
        return scores
    forced = torch.full_like(scores, -math.inf).masked_fill(_rows(scores, rows, ids), 0.0)
    return torch.where(torch.tensor(list(rows), device=scores.device)[:, None], forced, scores)


def ban_repeated(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Forbid tokens that would repeat an n-gram of the row; ``history`` is (B, T) with -1 for padding."""
    if history.shape[1] < size:
        return scores
    windows = history.unfold(1, size, 1)  # (B, T - size + 1, size)
    suffix = history[:, history.shape[1] + 1 - size :]
    repeated = (windows[..., :-1] == suffix[:, None]).all(-1) & (windows >= 0).all(-1)
    spare = scores.shape[-1]
    banned = torch.zeros(len(scores), spare + 1, dtype=torch.bool, device=scores.device)
    banned.scatter_(1, torch.where(repeated, windows[..., -1], spare), True)
    return scores.masked_fill(banned[:, :spare], -math.inf)


def add_biases(
    scores: Tensor, history: Tensor, biases: Sequence[tuple[tuple[int, ...], float]]
) -> Tensor:
    """Add the bias to the score of the last token of each sequence, in rows that end with the tokens before it."""
    if not biases:
        return scores
    scores = scores.clone()
    for sequence, bias in biases:
        before = torch.tensor(sequence[:-1], dtype=history.dtype, device=history.device)
        if len(before) > history.shape[1]:
            continue
        ends = history[:, history.shape[1] - len(before) :]
        scores[:, sequence[-1]] += torch.where((ends == before).all(-1), bias, 0.0)
    return scores


@dataclass(frozen=True)
class Settings:
    """Settings of one call of ``generate``; the caller's arguments override the file, and the file the defaults.

    Attributes:
        sampler: chooses the next token.
        rules: forbid or force tokens.
        stop: texts at which to stop.
        new_tokens: maximum number of new tokens; None if ``length`` is the limit.
        length: maximum number of tokens of prompt and answer together.
        length_name: what sets ``length``, as named in an error.
    """

    sampler: Sampler
    rules: Rules
    stop: tuple[str, ...]
    new_tokens: int | None
    length: int | None
    length_name: str

    @classmethod
    def read(cls, model: Model, given: Mapping[str, Any]) -> Settings:
        """Combine the settings of a model with those of the caller, in which None means not given.

        Raises:
            ConfigError: a key that does not exist, or a value of the wrong type or out of range.
        """
        given = {key: value for key, value in given.items() if value is not None}
        for key in given:
            if key not in _KNOWN:
                raise ConfigError(f"generate has no option {key!r}." + did_you_mean(key, _KNOWN))
        stored = {k: v for k, v in model.generation_config.items() if v is not None}
        reader = _Reader(stored, given, model.backbone.vocab_size)
        sampler = _sampler(reader)
        _name_missing(stored, sampling=sampler.effective_temperature > 0)
        asked = check_value("eos_token_id", given.get("eos_token_id"), int | list[int] | None)
        ends = model.end_ids(asked)
        return cls(
            sampler,
            reader.rules(tuple(ends)),
            reader.texts("stop_strings"),
            *reader.lengths(),
            "max_length" if "max_length" in given else f"max_length of {FILE}",
        )

    def budget(self, prompt: int) -> int:
        """Return the maximum number of new tokens after a prompt of this many tokens.

        Raises:
            ConfigError: the prompt alone is longer than ``max_length``.
        """
        if self.new_tokens is not None:
            return self.new_tokens
        assert self.length is not None
        if prompt >= self.length:
            raise ConfigError(
                f"The prompt has {prompt} tokens, and {self.length_name} is {self.length}, which counts the prompt. "
                "Give max_new_tokens."
            )
        return self.length - prompt


def _name_missing(stored: Mapping[str, Any], *, sampling: bool) -> None:
    """Name the keys of the file that change the text and are not implemented."""
    table = _MISSING | (_MISSING_IN_SAMPLING if sampling else {})
    missing = [f"{k}={stored[k]!r}" for k in table if k in stored and stored[k] not in table[k]]
    if missing:
        text = f"{FILE} asks for {', '.join(missing)}, not implemented here: texts are generated without."
        note(text, once=True)


def _sampler(reader: _Reader) -> Sampler:
    """Return a sampler if the caller or the file turns sampling on, with the numbers of both; else a greedy one."""
    given, stored = reader.given, reader.stored
    penalty = reader.read("repetition_penalty", float, 1.0)
    seed, do_sample = given.get("seed"), reader.read("do_sample", bool, False)
    heat = given.get("temperature")
    greedy = given.get("do_sample") is False or heat == 0
    asked = given.get("do_sample") is True or any(key in given for key in CHANCE)
    # The caller's values are always checked, those of the file only if they are used.
    numbers = {key: given.get(key) for key in ("temperature", "top_k", "top_p", "min_p")}
    checked = Sampler(**numbers, repetition_penalty=penalty, seed=seed)
    if greedy or not (asked or do_sample):
        return Sampler(0.0, repetition_penalty=penalty, seed=seed)
    values: dict[str, Any] = {
        key: reader.read(key, int | None if key == "top_k" else float | None, None)
        for key in numbers
    }
    if values["top_k"] is None and stored.get("do_sample") is True:
        values["top_k"] = _DEFAULT_TOP_K
    if values["top_k"] == 0 and "top_k" not in given:
        values["top_k"] = None
    if values["temperature"] is None:
        values["temperature"] = checked.effective_temperature or 1.0
    try:
        return Sampler(**values, repetition_penalty=penalty, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"{FILE}: {error}") from None


class _Reader:
    """Typed access to single settings of the caller or the file."""

    def __init__(
        self, stored: Mapping[str, Any], given: Mapping[str, Any], vocabulary: int
    ) -> None:
        self.stored, self.given, self.vocabulary = stored, given, vocabulary

    def read(self, key: str, hint: Any, default: Any) -> Any:
        """Return a setting that is checked against a type."""
        where = "" if key in self.given else f"{FILE}: "
        return check_value(where + key, self._value(key, default), hint)

    def _value(self, key: str, default: Any) -> Any:
        return self.given.get(key, self.stored.get(key, default))

    def _wrong(self, key: str, wanted: str) -> ConfigError:
        where = "" if key in self.given else f"{FILE}: "
        return ConfigError(f"{where}{key} must be {wanted}, found {self._value(key, None)!r}.")

    def whole(self, key: str, default: int | None) -> Any:
        value = self.read(key, int | None, default)
        if value is not None and value < 0:
            raise self._wrong(key, "0 or more")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Return an id or a list of ids, without those outside the vocabulary, which have no effect."""
        value = self.read(key, int | list[int], ())
        listed = [value] if isinstance(value, int) else value
        return tuple(i for i in listed if 0 <= i < self.vocabulary)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.read(key, str | list[str], ())
        return tuple(text for text in ([value] if isinstance(value, str) else value) if text)

    def sequence(self, key: str, value: Any) -> tuple[int, ...]:
        good = isinstance(value, list | tuple) and len(value) > 0
        if not good or not all(type(i) is int and 0 <= i < self.vocabulary for i in value):
            raise self._wrong(key, f"made of lists of token ids below {self.vocabulary}")
        return tuple(value)

    def biases(self) -> tuple[tuple[tuple[int, ...], float], ...]:
        key, found = "sequence_bias", dict[tuple[int, ...], float]()
        value = self._value(key, ())
        pairs = value.items() if isinstance(value, dict) else value
        for pair in pairs if isinstance(value, list | tuple | dict) else [None]:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise self._wrong(key, "a list of [token ids, bias]")
            if isinstance(pair[1], bool) or not isinstance(pair[1], int | float):
                raise self._wrong(key, "a list of [token ids, bias]")
            found[self.sequence(key, pair[0])] = float(
                pair[1]
            )  # the last one of a sequence, as in transformers
        return tuple(found.items())

    def bad_words(self) -> tuple[tuple[int, ...], ...]:
        key = "bad_words_ids"
        return tuple(self.sequence(key, item) for item in self.read(key, list[list[int]], ()))

    def lengths(self) -> tuple[int | None, int | None]:
        """Return the limits on new tokens and on the total length; the caller's arguments override the file."""
        new, length = self.whole("max_new_tokens", None), self.whole("max_length", None)
        if "max_length" in self.given and "max_new_tokens" not in self.given:
            new = None
        return (DEFAULT_NEW_TOKENS if new is None and length is None else new), length

    def rules(self, ends: tuple[int, ...]) -> Rules:
        for key in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = set(self.ids(key))
            if forced and forced <= set(self.ids("suppress_tokens")):
                raise self._wrong(key, "a token that suppress_tokens does not forbid")
        first = self.whole("forced_bos_token_id", None)
        return Rules(
            self.biases(),
            self.bad_words(),
            self.whole("no_repeat_ngram_size", 0),
            # As in transformers, min_new_tokens overrides min_length.
            self.whole("min_length", 0) if self.whole("min_new_tokens", None) is None else 0,
            self.whole("min_new_tokens", 0),
            first if first is not None and first < self.vocabulary else None,
            self.ids("forced_eos_token_id"),
            self.ids("suppress_tokens"),
            self.ids("begin_suppress_tokens"),
            ends,
        )
