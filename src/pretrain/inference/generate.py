"""Text generation with a causal model and a key-value cache.

Prompts of unequal length are padded on the left and keep their own positions, so that a prompt is continued the same in
a batch as alone. Letters: B prompts, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.errors import ConfigError, ModelError
from pretrain.inference.fill import embed, fill_mask
from pretrain.inference.prompts import Prompts, check_ids, evaluating, fill_id, pad, tokenizer_of
from pretrain.inference.sampling import banned
from pretrain.inference.settings import Settings
from pretrain.nn.attention import KVCache
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["embed", "fill_mask", "generate"]

_CHECK_EVERY = 16  # tokens between two checks for the end, which synchronise an accelerator


def generate(
    model: Model,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    stream: Callable[[str], None] | None = None,
    **settings: Any,
) -> Any:
    """Continue prompts; arguments that are not given come from the model's generation_config.json.

    Decoding is greedy unless the file has ``do_sample: true`` or an argument turns sampling on. With such a file, its
    temperature, top_k (50 if absent), top_p and min_p are used; ``temperature=0`` or ``do_sample=False`` makes decoding
    greedy all the same.

    Args:
        model: a causal model with a language-model head.
        prompts: a text, a list of texts, or ids: a list, a list of lists, a tensor (T,) or (B, T).
        max_new_tokens: maximum number of new tokens; fewer if the model's positions are used up earlier. The default is
            the file's ``max_new_tokens`` or ``max_length``, or else 64.
        temperature: 0 is greedy. The default is the file's temperature, or 1, if sampling is turned on by the file, or
            by ``top_k``, ``top_p``, ``min_p``, ``seed`` or ``do_sample``, and else 0.
        top_k: sample from the k most likely tokens.
        top_p: sample from the most likely tokens that together have this probability.
        min_p: sample from tokens with at least this fraction of the largest probability.
        repetition_penalty: above 1, tokens that already occur become less likely.
        stop: texts at which to stop; the answer is cut before them, also within a token.
        seed: seed of sampling; the global random state is neither read nor changed.
        use_cache: cache keys and values of earlier tokens; if False, everything is recomputed for every token.
        stream: called with each new piece of text (one prompt only).
        **settings: further keys of generation_config.json: ``do_sample``, ``no_repeat_ngram_size``,
            ``bad_words_ids``, ``sequence_bias``, ``suppress_tokens``, ``begin_suppress_tokens``, ``min_new_tokens``,
            ``min_length``, ``max_length``, ``forced_bos_token_id``, ``forced_eos_token_id``, ``eos_token_id``.

    Returns:
        Prompt and continuation in the form of the prompts: text for text, ids for ids. A tensor is padded on the
        right; ids include the end-of-text token if one was generated.

    Raises:
        ModelError: not a causal language model, no tokenizer for text, a prompt that is empty, too long or has ids
            outside the vocabulary, damaged weights.
        ConfigError: an unknown option or one out of range.
    """
    if not model.backbone.causal or model.head_kind != "causal-lm":
        raise ModelError(
            f"This {model.backbone.model_type} model with the head {model.head_kind!r} cannot continue text; only a "
            "causal model with a language-model head can. Use fill_mask with a masked-language model."
        )
    chance = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    others = {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    chosen = Settings.read(
        model, {**chance, **others, "stop_strings": stop, "seed": seed, **settings}
    )
    asked = Prompts.read(model, prompts)
    if asked.texts is not None:
        _remark_chat(model, asked.texts)
    check_ids(model, asked.ids)
    stops = chosen.stop
    watch = _Watch(model, asked, stops, stream) if stops or stream is not None else None
    added = _Decoder(model, asked, chosen, use_cache, watch).run()
    return _answer(model, asked, added, stops, watch)


_REMARKED: weakref.WeakSet[Any] = weakref.WeakSet()  # models for which the note has been printed


def _remark_chat(model: Model, texts: Sequence[str]) -> None:
    """Print once per model that ``generate`` does not apply the chat template of a model trained on conversations."""
    block = model.extra_config.get("pretrain")
    objective = block.get("objective") if isinstance(block, Mapping) else None
    task = objective.get("task") if isinstance(objective, Mapping) else None
    tokenizer = model.tokenizer
    if task not in ("chat", "preference") or tokenizer is None or tokenizer.chat_template is None:
        return
    specials = [name for name, i in tokenizer.vocab.items() if i in tokenizer.special_ids]
    written = any(token in text for text in texts for token in specials if token)
    if model not in _REMARKED and not written:  # with special tokens, a text has its template
        _REMARKED.add(model)
        note(
            "this model was trained on conversations, and generate continues the text as it stands, without the chat "
            "template; use model.chat(...), or pretrain generate --chat, to get an answer"
        )


def _answer(
    model: Model, asked: Prompts, added: list[list[int]], stops: tuple[str, ...], watch: Any
) -> Any:
    """Return prompts and continuations in the form of the prompts."""
    if asked.texts is not None:
        texts = [
            text + _continuation(model, ids, new, stops)
            for text, ids, new in zip(asked.texts, asked.ids, added, strict=True)
        ]
        if watch is not None:
            watch.close(texts[0][len(asked.texts[0]) :])
        return texts[0] if asked.form == "one" else texts
    rows = [ids + new for ids, new in zip(asked.ids, added, strict=True)]
    if watch is not None:
        watch.close(_continuation(model, asked.ids[0], added[0], stops))
    if asked.form == "tensor":
        width, fill = max(map(len, rows)), fill_id(model)
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    return (
        torch.tensor(rows[0]) if asked.form == "row" else rows[0] if asked.form == "one" else rows
    )


def _continuation(model: Model, ids: list[int], new: list[int], stops: Sequence[str] = ()) -> str:
    """Return the text of ``new`` after ``ids``, cut before the first stop text."""
    text: str = tokenizer_of(model, "write text").continuation(ids, new)
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


class _Watch:
    """Checks new tokens for stop texts and streams new text."""

    def __init__(self, model: Model, asked: Prompts, stops: tuple[str, ...], stream: Any) -> None:
        if stream is not None and len(asked.ids) != 1:
            raise ConfigError(f"stream works with one prompt, but {len(asked.ids)} were given.")
        tokenizer_of(model, "look for stop texts or stream")
        self.model, self.ids, self.stops, self.stream = model, asked.ids, stops, stream
        self.shown = ""
        # A token has at least one byte and a character at most four; the 16 more allow for tokens without text.
        self.window = 4 * max(map(len, stops), default=0) + 16

    def look(self, row: int, new: list[int]) -> bool:
        """Stream the new text and return whether row ``row`` has reached a stop text."""
        if self.stream is not None:
            text = _continuation(self.model, self.ids[row], new, self.stops)
            held = max((len(stop) - 1 for stop in self.stops), default=0)
            ready = text[: len(text) - held].rstrip("\ufffd")
            self._show(ready)
        if not self.stops:
            return False
        tail = new[-self.window :]
        before = (self.ids[row] + new)[: len(self.ids[row]) + len(new) - len(tail)]
        text = _continuation(self.model, before, tail)
        return any(stop in text for stop in self.stops)

    def close(self, text: str) -> None:
        """Stream the rest of the text, which was held back as a possible start of a stop text."""
        if self.stream is not None:
            self._show(text)

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.stream(text[len(self.shown) :])
            self.shown = text


@dataclass(frozen=True)
class _Decoder:
    """The decoding loop."""

    model: Model
    asked: Prompts
    settings: Settings
    use_cache: bool
    watch: _Watch | None

    def run(self) -> list[list[int]]:
        """Return the new ids of every prompt."""
        prompts, room = self.asked.ids, self.model.backbone.max_length
        wanted = [self.settings.budget(len(ids)) for ids in prompts]
        budgets = [min(n, room - len(ids)) for n, ids in zip(wanted, prompts, strict=True)]
        groups = [list(range(len(prompts)))]
        if max(map(len, prompts)) + max(budgets) > room:
            # Left padding would use up positions that the longest answers need, so prompts of equal length form groups.
            lengths = sorted({len(ids) for ids in prompts})
            groups = [[i for i, ids in enumerate(prompts) if len(ids) == n] for n in lengths]
        new: list[list[int]] = [[] for _ in prompts]
        with self.model.backbone.uncompiled(), evaluating(self.model) as device:
            generator = self.settings.sampler.generator(device)
            for rows in groups:
                steps = [budgets[i] for i in rows]
                if max(steps) > 0:
                    for i, ids in zip(rows, self._loop(rows, steps, generator), strict=True):
                        new[i] = ids
        full = [len(a) == b < n for a, b, n in zip(new, budgets, wanted, strict=True)]
        if any(full):
            text = f"{sum(full)} of {len(full)} texts ended early: the model has {room} positions."
            warnings.warn(text, stacklevel=3)
        return new

    def _loop(
        self, rows: list[int], budget: list[int], generator: torch.Generator
    ) -> list[list[int]]:
        """Continue the prompts ``rows`` together, each by at most its budget."""
        model, prompts, steps = self.model, [self.asked.ids[i] for i in rows], max(budget)
        device, fill = generator.device, fill_id(model)
        ids, real = pad(prompts, fill, device, left=True)
        added = self._banned(device)
        seen = self._seen(prompts, device)
        rules, sampler = self.settings.rules, self.settings.sampler
        ends = torch.tensor(rules.ends, dtype=torch.long, device=device)
        budgets = torch.tensor(budget, device=device)
        lengths, open_rows = torch.zeros_like(budgets), budgets > 0
        cache = KVCache(ids.shape[1] + steps) if self.use_cache else None
        every = 1 if device.type == "cpu" else _CHECK_EVERY
        columns, new = ids, []
        history = None if rules.none else ids if real is None else ids.masked_fill(real == 0, -1)
        lengths_in = [len(prompt) for prompt in prompts]
        last_steps = [self.settings.budget(n) - 1 for n in lengths_in]
        for step in range(steps):
            scores = self._scores(columns, real, cache)
            if step == 0 and not bool(scores.isfinite().all()):
                raise ModelError(
                    "The model's scores are not finite: its weights are damaged, or the values overflow their data "
                    "type. Copy the weights again, or load the model in float32."
                )
            scores = scores if added is None else scores + added
            scores = scores if history is None else rules.before(scores, history)
            scores = sampler.penalized(scores, seen)
            if history is not None:
                scores = rules.after(scores, history, lengths_in, step, last_steps)
            token = sampler.choose(scores, generator)
            token = torch.where(open_rows, token, fill)
            new.append(token)
            lengths += open_rows
            open_rows = open_rows & ~torch.isin(token, ends) & (lengths < budgets)
            if self.watch is not None:
                open_rows = open_rows & ~self._stopped(rows, new, open_rows)
            if (step + 1) % every == 0 and not bool(open_rows.any()):
                break
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if real is not None:
                real = torch.cat((real, torch.ones_like(token)[:, None]), dim=1)
            last = token[:, None]
            history = None if history is None else torch.cat((history, last), dim=1)
            columns = last if cache is not None else torch.cat((columns, last), dim=1)
        table = torch.stack(new, dim=1).tolist()
        return [row[:length] for row, length in zip(table, lengths.tolist(), strict=True)]

    def _seen(self, prompts: list[list[int]], device: torch.device) -> Tensor | None:
        """Return (B, V) booleans, True for tokens in a row; None without a repetition penalty."""
        if self.settings.sampler.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(len(prompts), self.model.backbone.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        return seen.to(device)

    def _banned(self, device: torch.device) -> Tensor | None:
        """Return scores that forbid vocabulary rows without a token and, if text is sampled, pad, mask and bos."""
        tokenizer, rows = self.model.tokenizer, self.model.backbone.vocab_size
        if tokenizer is None:
            return None
        roles = (tokenizer.pad_id, tokenizer.mask_id, tokenizer.bos_id)
        ends = self.settings.rules.ends
        drawn = self.asked.texts is not None and self.settings.sampler.heat > 0
        special = [i for i in roles if i is not None and i not in ends] if drawn else []
        return banned(rows, len(tokenizer), special, device)

    def _scores(self, columns: Tensor, real: Tensor | None, cache: KVCache | None) -> Tensor:
        """Return scores of the next token, (B, V) in fp32; the head runs on the last column only."""
        batch = {"input_ids": columns}
        if real is not None:
            batch["attention_mask"] = real
            positions = (real.cumsum(1) - 1).clamp(min=0)
            batch["position_ids"] = positions[:, -columns.shape[1] :]
        hidden = self.model.backbone(batch, cache=cache)
        head: Any = self.model.head
        scores: Tensor = head(hidden[:, -1])
        return scores.float()

    def _stopped(self, rows: list[int], new: list[Tensor], open_rows: Tensor) -> Tensor:
        assert self.watch is not None
        table, running = torch.stack(new, dim=1).tolist(), open_rows.tolist()
        found = [
            go and self.watch.look(row, ids)
            for row, ids, go in zip(rows, table, running, strict=True)
        ]
        return torch.tensor(found, device=open_rows.device)
