"""Masked language modelling: predict masked tokens from the context on both sides (BERT, arXiv 1810.04805).

The rate is 30 % by default, as in MosaicBERT and ModernBERT (the case for more than 15 % is made in arXiv
2202.08005); evaluation uses the conventional 15 % by default, and always the same masks, so that metrics of different
runs can be compared.

With ``whole_word`` all tokens of a word are masked together. A word that alone would exceed the share of its row is
cut, so that the masked share is the requested one in every script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from pretrain.errors import ConfigError, DataError, ModelError, TokenizerError, TrainingError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import (
    Batch,
    ExampleList,
    Rngs,
    TokenObjective,
    drop_plain_documents,
    stack,
    target_places,
)

if TYPE_CHECKING:
    from pretrain.data.loader import Examples
    from pretrain.models.base import Model

__all__ = ["MaskedLM"]

# Largest accepted difference between the share of masked tokens and the requested rate.
_TOLERANCE = 0.03
# Number of rows that ``survey`` masks to measure this share.
_TRIAL_ROWS = 64
# Hidden words of a preview, and tokens before the first and after the last of them.
_SHOWN_WORDS, _CONTEXT = 6, 12
_BLANK = "\u2423"  # stands for spaces and line breaks
_LEGEND = "([its word | the hidden word], or one word where the model is right)"


class MaskedLM(TokenObjective):
    """Predict masked tokens.

    Args:
        model: a bidirectional model with a masked-LM head and a tokenizer that has a mask token.
        rate: share of the maskable tokens of a row that become targets while training.
        final_rate: share at the end of the run; the share falls linearly from ``rate`` to it, as in GPT-BERT (arXiv
            2410.24159). None keeps ``rate``. It needs a limit in steps, tokens or epochs: a run limited by minutes has
            no length that all ranks and a resumed run could agree on.
        eval_rate: the same in evaluation.
        mask_share: share of the targets that are replaced by the mask token.
        random_share: share of the targets that are replaced by a random ordinary token; the rest stay.
        whole_word: choose whole words; each of their pieces is still predicted alone.

    Raises:
        ConfigError: a rate or share lies outside its range; before the first step also: ``final_rate`` in a run that
            is limited by minutes.
        ModelError: the model is causal or has no masked-LM head.
        TokenizerError: the tokenizer has no mask token.
    """

    head_kind: ClassVar[str | None] = "masked-lm"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "perplexity")

    def __init__(
        self,
        model: Model,
        rate: float = 0.3,
        eval_rate: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        whole_word: bool = False,
        final_rate: float | None = None,
    ) -> None:
        super().__init__(model)
        final = rate if final_rate is None else final_rate
        for name, value in (("rate", rate), ("eval_rate", eval_rate), ("final_rate", final)):
            if not 0 < value < 1:
                raise ConfigError(
                    f"MaskedLM.{name} is {value}; it is a share of tokens, between 0 and 1."
                )
        if final > rate:
            raise ConfigError(
                f"MaskedLM.final_rate is {final} and rate {rate}; the rate can only fall during a run."
            )
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
            raise ConfigError(
                f"MaskedLM: mask_share {mask_share} and random_share {random_share} must be >= 0 and sum to <= 1."
            )
        if model.head_kind != "masked-lm":
            raise ModelError(
                f"MaskedLM needs a bidirectional model with a masked-LM head; this "
                f"{model.backbone.model_type} model has the head {model.head_kind!r}. Train it with NextToken, "
                "or build an encoder family (bert, roberta, modernbert)."
            )
        tokenizer: Any = model.tokenizer
        if tokenizer is None or tokenizer.mask_id is None:
            raise TokenizerError(
                "MaskedLM needs a tokenizer with a mask token, and this model has none. Prepare the data with "
                "pretrain's own tokenizer, or add a mask token to yours."
            )
        self.rate, self.eval_rate, self.final_rate = rate, eval_rate, final_rate
        self.mask_share, self.random_share, self.whole_word = mask_share, random_share, whole_word
        self._mask_id = int(tokenizer.mask_id)
        # Rows of the embedding beyond the tokenizer are padding: never a target, never a replacement.
        ordinary = np.zeros(max(len(tokenizer), model.backbone.vocab_size), dtype=bool)
        ordinary[: len(tokenizer)] = True
        ordinary[sorted(tokenizer.special_ids)] = False
        self._maskable = ordinary
        self._ordinary_ids = np.flatnonzero(ordinary)
        self._word_starts = tokenizer.word_starts if whole_word else None

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Mask tokens of each row with the row's own generator; special tokens and padding are never targets."""
        if any("labels" in example for example in examples):
            raise DataError(
                "The rows have labels, and MaskedLM hides tokens and makes the labels itself. Remove them from the "
                "rows, and give the tokens as they are, not masked ones."
            )
        batch = stack(
            examples,
            ("input_ids", "document_ids", "position_ids", "attention_mask", "token_type_ids"),
        )
        ids = batch["input_ids"].numpy()  # (B, T), a copy made by stacking
        documents = batch.get("document_ids", batch.get("attention_mask"))
        real = np.ones(ids.shape, dtype=bool) if documents is None else documents.numpy() != 0
        labels = np.full(ids.shape, IGNORE, dtype=np.int64)
        rate = self.eval_rate if evaluation else self._rate_now()
        candidates, begins = self._is_maskable(ids) & real, self._begins(ids, documents)
        for row, rng in enumerate(rngs):
            words = None if begins is None else begins[row]
            chosen = self._choose(np.flatnonzero(candidates[row]), words, rate, rng)
            labels[row, chosen] = ids[row, chosen]
            ids[row, chosen] = self._corrupt(ids[row, chosen], rng)
        batch["labels"] = torch.from_numpy(labels)
        batch["target_index"] = target_places(batch["labels"])
        return drop_plain_documents(batch)

    def _rate_now(self) -> float:
        if self.final_rate is None or self.progress is None:
            return self.rate
        return self.rate + (self.final_rate - self.rate) * self.progress

    def _is_maskable(self, ids: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._maskable[np.clip(ids, 0, len(self._maskable) - 1)] & (ids >= 0)
        return found

    def _begins(self, ids: np.ndarray, documents: torch.Tensor | None) -> np.ndarray | None:
        """(B, T), True where a token begins a word or a document; None without ``whole_word``."""
        if self._word_starts is None:
            return None
        # An invalid id is put between rows, so that no row depends on its neighbour.
        apart = np.concatenate([np.full((len(ids), 1), -1), ids], axis=1)
        begins: np.ndarray = self._word_starts(apart.reshape(-1)).reshape(apart.shape)[:, 1:]
        if documents is not None:
            begins[:, 1:] |= np.diff(documents.numpy()) != 0
        return begins

    def _choose(
        self,
        candidates: np.ndarray,
        begins: np.ndarray | None,
        rate: float,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Positions of the targets of one row.

        Args:
            candidates: (n,) positions that may become targets.
            begins: (T,) True where words begin; None to choose single tokens.
            rate: share of the candidates, at least one of them.
            rng: generator of the row.

        Returns:
            (m,) positions in ascending order.
        """
        if candidates.size == 0:
            return candidates
        wanted = max(1.0, rate * candidates.size)
        if begins is None:
            # In a short row the nearest integer is too far from the rate, so rounding is random there.
            near = _TOLERANCE * candidates.size >= 0.5
            count = round(wanted) if near else int(wanted + rng.random())
            return np.sort(rng.choice(candidates, count, replace=False))
        first = begins[candidates]
        first[1:] |= np.diff(candidates) != 1
        # A row stays below half even with the last word drawn.
        longest = min(wanted, max(candidates.size / 2 - wanted, wanted / 4))
        words = _cut(first, max(1, int(longest)))
        sizes = np.bincount(words)
        hidden = np.zeros(sizes.size, dtype=bool)
        hidden[_draw_words(sizes, wanted, candidates.size, rng)] = True
        chosen: np.ndarray = candidates[hidden[words]]
        return chosen

    def _corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Replace target ids by the mask token, a random ordinary token, or themselves, (n,) -> (n,)."""
        draw = rng.random(ids.size)
        noise = self._ordinary_ids[rng.integers(self._ordinary_ids.size, size=ids.size)]
        random_end = self.mask_share + self.random_share
        return np.where(
            draw < self.mask_share, self._mask_id, np.where(draw < random_end, noise, ids)
        )

    def survey(self, rows: Examples) -> list[str]:
        """Mask a sample of training rows and report the share of masked tokens.

        Raises:
            TrainingError: it is not the requested share.
            ConfigError: the share is to fall in a run whose length is not known.
        """
        if self.final_rate is not None and self.progress is None:
            raise ConfigError(
                "MaskedLM.final_rate needs the length of the run, which a limit in minutes does not give: set "
                "train.limit in steps, tokens or epochs, or leave final_rate out."
            )
        shares = []
        for name, rate in (("rate", self._rate_now()), ("eval_rate", self.eval_rate)):
            hidden = tokens = 0
            for k in range(_TRIAL_ROWS):
                row = rows[k * len(rows) // _TRIAL_ROWS]
                rng = np.random.default_rng(k)
                batch = self.collate([row], [rng], evaluation=name == "eval_rate")
                real = np.asarray(row.get("document_ids", row.get("attention_mask", 1))) != 0
                count = int((self._is_maskable(np.asarray(row["input_ids"])) & real).sum())
                hidden, tokens = hidden + int(self.count(batch)), tokens + count
            share = hidden / max(1, tokens)
            if tokens and abs(share - rate) > _TOLERANCE:
                raise TrainingError(self._why_off(name, rate, share, tokens / _TRIAL_ROWS))
            shares.append(f"{share:.1%} of the tokens ({name} {rate:g})")
        what = "whole words" if self.whole_word else "tokens"
        falls = "" if self.final_rate is None else f", falling to {self.final_rate:g} over the run"
        return [f"masks {what}: hides {shares[0]}{falls}, in evaluations {shares[1]}"]

    def _why_off(self, name: str, rate: float, share: float, length: float) -> str:
        text = f"MaskedLM hides {share:.1%} of the tokens, but {name} asks for {rate:.1%}: "
        if length * rate < 1:
            return (
                f"{text}the rows have {length:.1f} tokens on average that can be hidden, and at least one of each row "
                f"is. Use longer rows (pack texts, or a larger row_length), or set {name} to {1 / length:.2f} or more."
            )
        where = (
            "the subclass or the tokenizer keeps too long words together" if self.whole_word else ""
        )
        return (
            f"{text}{where or 'the subclass chooses other targets'}. Use a tokenizer of this package or set "
            "whole_word=False, or correct the subclass."
        )

    def preview(self, examples: ExampleList, prompt: str, seed: int) -> list[str]:
        """Show the beginning of a held-out row, with its first hidden words and what the model puts there."""
        model: Any = self.model
        rng = np.random.Generator(np.random.Philox(seed))
        batch = self.collate(examples[:1], [rng], evaluation=True)
        device = model.device
        inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "target_index")}
        training = model.training
        model.eval()
        with torch.inference_mode():
            guesses = model(inputs)[0].argmax(-1).cpu().numpy()  # (T,)
        model.train(training)
        truth = np.asarray(examples[0]["input_ids"])
        hidden = batch["labels"][0].numpy() != IGNORE
        begins = model.tokenizer.word_starts(truth) | ~self._is_maskable(truth)
        words = np.cumsum(begins)  # (T,) number of the word of each token
        shown = np.unique(words[hidden])[:_SHOWN_WORDS]
        if not shown.size:
            return []
        last = int(np.flatnonzero(words == shown[-1])[-1])
        first = max(0, int(np.flatnonzero(words == shown[0])[0]) - _CONTEXT)
        inside = np.isin(words, shown)
        edges = np.flatnonzero((np.diff(words) != 0) & (inside[1:] | inside[:-1])) + 1
        place = np.arange(first, min(len(truth), last + 1 + _CONTEXT))
        parts = []
        for part in np.split(place, np.searchsorted(place, edges[edges > first])):
            text = model.tokenizer.decode(truth[part].tolist()).strip()
            if part.size and inside[part[0]]:
                filled = np.where(hidden, guesses, truth)[part].tolist()
                text = text or _BLANK
                guess = model.tokenizer.decode(filled).strip() or _BLANK
                text = f"[{text}]" if guess == text else f"[{guess} | {text}]"
            parts.append(text)
        passage = " ".join(" ".join(parts).split())
        return [f"{passage}\n{_LEGEND}"]

    def describe(self) -> dict[str, Any]:
        names = ["rate", "eval_rate", "mask_share", "random_share", "whole_word"]
        names += [] if self.final_rate is None else ["final_rate"]
        return {"name": "MaskedLM", **{name: getattr(self, name) for name in names}}


def _cut(begins: np.ndarray, most: int) -> np.ndarray:
    """Number the words that start at ``begins``, (n,) -> (n,), each cut into parts of at most ``most`` tokens."""
    places = np.arange(begins.size)
    begins = begins | (places == 0)
    within = places - np.maximum.accumulate(np.where(begins, places, 0))
    return np.cumsum(begins | (within % most == 0)) - 1


def _draw_words(
    sizes: np.ndarray, wanted: float, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw words until they have ``wanted`` of ``count`` tokens; return their numbers.

    The word that exceeds ``wanted`` is taken with the probability that makes ``wanted`` the mean, because to always
    leave it out would mask too few tokens, and longer words less often.
    """
    order = rng.permutation(sizes.size)
    totals = np.cumsum(sizes[order])
    whole = int(np.searchsorted(totals, wanted, side="right"))
    chance = rng.random()
    if whole < order.size:
        before = int(totals[whole - 1]) if whole else 0
        fits = wanted >= count / 2 or totals[whole] <= max(count // 2, 1)
        if fits and chance * sizes[order[whole]] < wanted - before:
            whole += 1
    return order[:whole]
