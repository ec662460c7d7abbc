"""Log-likelihoods of texts: of each token given those before it, or, by a masked model, given all the others.

A masked model has no probability of a text. Its pseudo-log-likelihood masks one token after the other (Salazar et al.,
2020, arXiv 1910.14659), so a text of T tokens costs T rows of T tokens. Letters: M targets, T tokens, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.config.check import check_count
from pretrain.data.task_rows import batches_by_length
from pretrain.errors import ModelError
from pretrain.inference.prompts import (
    as_texts,
    check_finite,
    check_ids,
    evaluating,
    hidden_states,
    tokenizer_of,
)
from pretrain.nn.device import tokens_at_once
from pretrain.printing import console

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.base import Model

__all__ = [
    "Scored",
    "check_scores_texts",
    "log_likelihood",
    "rows_without_end",
    "score_continuations",
]

_LOGITS = 1 << 22  # most logits in memory at a time


@dataclass(frozen=True)
class Scored:
    """The log-probabilities of tokens in nats, and whether each of them was the likeliest token at its place."""

    log_probs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        """The sum, accumulated in double precision."""
        return sum(self.log_probs)


def log_likelihood(
    model: Model, texts: str | Sequence[str], *, per_token: bool = False, batch_rows: int = 64
) -> Any:
    """Return the log-likelihoods of texts in nats, or the pseudo-log-likelihoods of a masked model.

    A causal model scores every token given those before it; the first one is given the token that begins a text (bos,
    or eos if there is none), and is left out if the tokenizer has neither. A masked model scores every token with that
    token alone masked. Special tokens that the tokenizer puts around a text are not scored. Probabilities are taken
    in fp32 from the model's logits. The figures of the two kinds of model cannot be compared with each other.

    Args:
        model: a model with a language-model head and a tokenizer.
        texts: one text or several.
        per_token: return the tokens with their log-probabilities instead of the sums.
        batch_rows: maximum number of rows in one forward pass.

    Returns:
        A tensor (N,) in fp64 on the CPU; or with ``per_token`` for each text a list of pairs (token, log-probability).

    Raises:
        ModelError: the model has no such head or no tokenizer, a text is empty or longer than the model's positions, or
            scores are not finite.
        ConfigError: ``batch_rows`` below 1.
    """
    check_count("batch_rows", batch_rows)
    check_scores_texts(model)
    tokenizer = tokenizer_of(model, "read text")
    listed = as_texts(texts)
    rows: list[list[int]]
    if model.head_kind == "causal-lm":
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        begun = rows_without_end(tokenizer, listed)
        rows = [row if start is None or row[:1] == [start] else [start, *row] for row in begun]
        places = [list(range(1, len(row))) for row in rows]
    else:
        encodings = tokenizer.frame_texts(listed)
        rows = [encoding.ids for encoding in encodings]
        places = [
            [k for k, mark in enumerate(encoding.special_tokens_mask) if not mark]
            for encoding in encodings
        ]
    for i, chosen in enumerate(places):
        if not chosen:
            raise ModelError(f"Text {i} has no token to score: {listed[i][:60]!r}. Leave it out.")
    check_ids(model, rows, "Text")
    if model.head_kind == "causal-lm":
        scored = score_continuations(model, rows, [len(chosen) for chosen in places], batch_rows)
    else:
        scored = _score_masked(model, rows, places, batch_rows)
    if not per_token:
        return torch.tensor([one.total for one in scored], dtype=torch.float64)
    return [
        [
            (tokenizer.decode([row[k]], skip_special=False), value)
            for k, value in zip(chosen, one.log_probs, strict=True)
        ]
        for row, chosen, one in zip(rows, places, scored, strict=True)
    ]


def check_scores_texts(model: Model) -> None:
    """Raise a ModelError unless the model has the head of a causal or a masked language model."""
    if model.head_kind not in ("causal-lm", "masked-lm"):
        raise ModelError(
            f"This {model.backbone.model_type} model has the head {model.head_kind!r} and gives texts no likelihood; "
            "only a language model does."
        )


def rows_without_end(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return texts as ids with the special tokens that the tokenizer puts before them, but none of those after them."""
    rows = []
    for encoding in tokenizer.frame_texts(texts):
        end = len(encoding.ids)
        while end and encoding.special_tokens_mask[end - 1]:
            end -= 1
        rows.append(encoding.ids[:end])
    return rows


def score_continuations(
    model: Model,
    rows: Sequence[list[int]],
    counts: Sequence[int],
    batch_rows: int,
    *,
    progress: bool = False,
) -> list[Scored]:
    """Score the last tokens of rows of ids, each given all tokens before it.

    Args:
        model: a causal model.
        rows: ids; the last one is only scored and not read, so a row may have one more than the model has positions.
        counts: number of tokens at the end of each row to score, less than its length.
        batch_rows: maximum number of rows in one forward pass; rows of similar length are taken together.
        progress: show a progress bar.
    """
    found: list[Any] = [None] * len(rows)
    bar = tqdm(total=len(rows), disable=not progress, file=console())
    with evaluating(model) as device, bar:
        lengths = [len(row) - 1 for row in rows]
        for chosen in batches_by_length(lengths, batch_rows, tokens_at_once(device)):
            hidden, _ = hidden_states(model, [rows[i][:-1] for i in chosen], device)
            some = [(k, rows[i], counts[i]) for k, i in enumerate(chosen)]
            states = [hidden[k, len(row) - 1 - n : len(row) - 1] for k, row, n in some]
            targets = [target for _, row, n in some for target in row[len(row) - n :]]
            scored = _log_probs(model, torch.cat(states), torch.tensor(targets, device=device))
            for i, one in zip(chosen, _split(scored, [n for _, _, n in some]), strict=True):
                found[i] = one
            bar.update(len(chosen))
    return found


def _score_masked(
    model: Model, rows: Sequence[list[int]], places: Sequence[list[int]], batch_rows: int
) -> list[Scored]:
    """Score the tokens at some places of each row, one masked at a time."""
    mask = tokenizer_of(model, "mask tokens").mask_id
    if mask is None:
        raise ModelError(
            "The tokenizer of this model has no mask token, so no token can be masked."
        )
    copies = [(i, place) for i, chosen in enumerate(places) for place in chosen]
    values: list[list[float]] = [[0.0] * len(row) for row in rows]
    greedy = [True] * len(rows)
    with evaluating(model) as device:
        lengths = [len(rows[i]) for i, _ in copies]
        for batch in batches_by_length(lengths, batch_rows, tokens_at_once(device)):
            some = [copies[k] for k in batch]
            masked = [[*rows[i][:place], mask, *rows[i][place + 1 :]] for i, place in some]
            hidden, _ = hidden_states(model, masked, device)
            at = torch.tensor([place for _, place in some], device=device)
            targets = torch.tensor([rows[i][place] for i, place in some], device=device)
            states = hidden[torch.arange(len(some), device=device), at]
            log_probs, best = _log_probs(model, states, targets)
            for (i, place), value, hit in zip(some, log_probs.tolist(), best.tolist(), strict=True):
                values[i][place] = value
                greedy[i] &= hit
    return [
        Scored([row[place] for place in chosen], hit)
        for row, chosen, hit in zip(values, places, greedy, strict=True)
    ]


def _log_probs(model: Model, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of targets (M,) after states (M, D), and whether each is the likeliest token.

    Unlike ``target_log_probs`` of a loss it recomputes nothing for a gradient, and knows the likeliest token.
    """
    head: Any = model.head
    size = max(32, _LOGITS // model.backbone.vocab_size)
    log_probs, best = [], []
    for part, wanted in zip(torch.split(states, size), torch.split(targets, size), strict=True):
        logits = head(part).float()  # (size, V)
        log_probs.append(logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(-1))
        best.append(logits.argmax(-1) == wanted)
    return check_finite(torch.cat(log_probs)), torch.cat(best)


def _split(scored: tuple[Tensor, Tensor], counts: Sequence[int]) -> list[Scored]:
    parts = zip(*(torch.split(part, list(counts)) for part in scored), strict=True)
    return [Scored(values.tolist(), bool(best.all())) for values, best in parts]
