"""Mask filling and text embeddings.

Letters: N texts, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain import inference
from pretrain.config.check import check_count
from pretrain.config.spelling import either
from pretrain.errors import ConfigError, ModelError
from pretrain.inference.prompts import (
    as_texts,
    check_finite,
    check_ids,
    evaluating,
    hidden_states,
    tokenizer_of,
)
from pretrain.models.sentences import SentenceSettings, pool, pooling_named
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["cut_texts", "embed", "embed_counting", "fill_mask"]

_MASKS = ("[MASK]", "<mask>")


def fill_mask(model: Model, text: str | Sequence[str], top_k: int = 5) -> list[Any]:
    """Return the most likely tokens for the masks of a text.

    Args:
        model: a masked-language model with a tokenizer.
        text: a text, or several, with the tokenizer's mask token, ``[MASK]`` or ``<mask>`` in it.
        top_k: number of candidates for each mask.

    Returns:
        For one mask a list of ``{"token", "token_id", "score", "sequence"}``, most likely first (``score`` is the
        probability, ``sequence`` the whole text with the mask filled); for several masks a list of such lists; for
        several texts a list with the result of each.

    Raises:
        ModelError: no masked-LM head, no tokenizer, no mask in a text, a text longer than the model's positions, or
            scores that are not finite.
        ConfigError: ``top_k`` below 1.
    """
    if model.head_kind != "masked-lm":
        raise ModelError(
            f"This {model.backbone.model_type} model has the head {model.head_kind!r} and cannot fill masks; only a "
            "masked-language model can."
            + f" This one continues texts: {either('pretrain generate', 'generate')}."
            * (model.head_kind == "causal-lm")
        )
    tokenizer = tokenizer_of(model, "fill masks")
    if tokenizer.mask_id is None:
        raise ModelError(
            "The tokenizer of this model has no mask token, so there is no mask to fill."
        )
    check_count("top_k", top_k)
    texts = as_texts(text)
    name = tokenizer.roles["mask"]
    plain = []
    for item in texts:
        for spelling in _MASKS:
            item = item.replace(spelling, name) if name not in item else item
        plain.append(item)
    encodings = tokenizer.frame_texts(plain)
    check_ids(model, [encoding.ids for encoding in encodings], "Text")
    for i, encoding in enumerate(encodings):
        if tokenizer.mask_id not in encoding.ids:
            raise ModelError(
                f"Text {i} has no mask; write {name} where a word is to be filled in: {texts[i][:60]!r}."
            )
    with evaluating(model) as device:
        found = [_fill_one(model, encoding, top_k, device) for encoding in encodings]
    return found[0] if isinstance(text, str) else found


def _fill_one(model: Model, encoding: Any, top_k: int, device: torch.device) -> list[Any]:
    tokenizer: Any = model.tokenizer
    row = encoding.ids
    places = [i for i, token in enumerate(row) if token == tokenizer.mask_id]
    hidden = model.backbone({"input_ids": torch.tensor([row], device=device)})
    head: Any = model.head
    # Vocabulary rows without a token are part of the softmax, as in training, but are not candidates.
    logits = check_finite(head(hidden[0, places]).float())
    scores = logits.softmax(-1)[:, : len(tokenizer)]  # (masks, V)
    best = scores.topk(min(top_k, scores.shape[-1]))
    only = len(places) == 1
    answers = [
        [_answer(model, encoding, place, i, p, only) for i, p in zip(ids, values, strict=True)]
        for place, values, ids in zip(places, best.values.tolist(), best.indices.tolist(), strict=True)
    ]  # fmt: skip
    return answers[0] if only else answers


def _answer(
    model: Model, encoding: Any, place: int, token: int, score: float, only: bool
) -> dict[str, Any]:
    """Return one candidate; other masks of the text stay visible."""
    tokenizer: Any = model.tokenizer
    filled = [*encoding.ids[:place], token, *encoding.ids[place + 1 :]]
    if only:
        text = tokenizer.decode(filled)
    else:
        frame_marks = encoding.special_tokens_mask
        inside = [i for i, mark in zip(filled, frame_marks, strict=True) if not mark]
        text = tokenizer.decode(inside, skip_special=False)
    return {
        "token": tokenizer.decode([token], skip_special=False),
        "token_id": token,
        "score": score,
        "sequence": text,
    }


def embed(
    model: Model,
    texts: str | Sequence[str],
    pooling: str | Sequence[str] | None = None,
    batch_size: int = 32,
    normalize: bool | None = None,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
) -> Tensor:
    """Return text embeddings, (N, D) in fp32 on the CPU; a vector does not depend on the other texts of its batch.

    A model of images and texts (clip, siglip) gives the vectors of both in one space, of length one unless
    ``normalize`` is False. Images are paths (``pathlib.Path``), arrays, bytes, images of Pillow, or the path of a
    folder: a ``str`` is always a text.

    The defaults are those of a sentence-transformers directory (modules.json and the files that it refers to).

    Args:
        model: any model with a tokenizer; its head is not used.
        texts: one text or several.
        pooling: ``mean``, ``weightedmean``, ``mean_sqrt_len_tokens`` or ``max`` over the tokens, ``cls`` for the first
            token (also ``first``; bidirectional models only), ``lasttoken`` for the last one (also ``last``). Several
            are concatenated. The default is that of the directory, or ``mean``.
        batch_size: texts in one forward pass.
        normalize: scale every vector to length one; the default is that of the directory, or False.
        prompt: prefix of every text.
        prompt_name: name of a prompt of the directory. With neither, the directory's default prompt is used.

    Raises:
        ModelError: no tokenizer, a text without tokens, vectors that are not finite, ``cls`` with a causal model, or a
            directory with modules that are not implemented.
        ConfigError: an unknown pooling or prompt, or ``batch_size`` below 1.
    """
    vectors, cut = embed_counting(model, texts, pooling, batch_size, normalize, prompt, prompt_name)
    if cut:
        note(cut_texts(model, cut, len(vectors)))
    return vectors


def embed_counting(
    model: Model,
    texts: str | Sequence[str],
    pooling: str | Sequence[str] | None = None,
    batch_size: int = 32,
    normalize: bool | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
) -> tuple[Tensor, int]:
    """Return what ``embed`` returns and the number of texts that were cut, without printing a note."""
    check_count("batch_size", batch_size)
    if model.backbone.default_task is not None:
        options = {"pooling": pooling, "prompt": prompt, "prompt_name": prompt_name}
        if given := [key for key, value in options.items() if value is not None]:
            raise ConfigError(
                f"A {model.backbone.model_type} model has vectors of its own: leave {given[0]!r} out."
            )
        return inference.embed_pairs(model, texts, batch_size, normalize is not False)
    stored = model.sentences or SentenceSettings()
    if pooling is None and stored.missing:
        raise ModelError(
            f"The directory of this model asks for {' and '.join(stored.missing)}, which is not implemented. Give "
            "pooling= and normalize= to embed without it."
        )
    modes = stored.pooling if pooling is None else pooling_named(pooling)
    if pooling is not None and "cls" in modes and model.backbone.causal:
        raise ModelError(
            "In a causal model the first token attends to no other, so its vector does not depend on the rest of the "
            "text; use pooling='mean'."
        )
    before = stored.prompt(prompt, prompt_name)
    rows, cut = _rows(model, [before + text for text in as_texts(texts)], stored)
    skip = 0 if stored.include_prompt or not before else _prompt_length(model, before, stored)
    width = model.backbone.config.hidden_size * len(modes)
    vectors = torch.empty(len(rows), width)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with evaluating(model) as device:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            hidden, real = hidden_states(model, [rows[i] for i in chosen], device)
            vectors[chosen] = pool(hidden.float(), real, modes, skip).cpu()
    if stored.missing:  # vectors of the model alone
        stored = SentenceSettings()
    return stored.finish(check_finite(vectors), normalize), cut


def cut_texts(model: Model, cut: int, count: int) -> str:
    """Return the remark that some of the embedded texts were too long."""
    return f"{cut} of {count} texts have more than {_room(model)} tokens and were cut."


def _room(model: Model) -> int:
    """Return the maximum tokens of a text: the limit of the directory or the positions of the model."""
    limit, stored = model.backbone.max_length, model.sentences
    if stored is not None:
        longest = stored.max_length or tokenizer_of(model, "read text").config.get(
            "model_max_length"
        )
        limit = min(limit, longest) if type(longest) is int and longest > 0 else limit
    return limit


def _rows(model: Model, texts: list[str], stored: SentenceSettings) -> tuple[list[list[int]], int]:
    """Return texts as ids, and the number of those that were truncated."""
    tokenizer = tokenizer_of(model, "read text")
    encodings = tokenizer.frame_texts(
        [stored.cased(text) for text in texts], max_length=_room(model)
    )
    rows = [encoding.ids for encoding in encodings]
    check_ids(model, rows, "Text")
    return rows, sum(bool(encoding.overflowing) for encoding in encodings)


def _prompt_length(model: Model, prompt: str, stored: SentenceSettings) -> int:
    """Return the number of tokens of a prompt, with special tokens before it but without the one after it."""
    ids = _rows(model, [prompt], stored)[0][0]
    return len(ids) - (ids[-1] in model.tokenizer.special_ids if model.tokenizer else 0)
