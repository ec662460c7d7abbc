"""Text generation with a causal model and a key-value cache.

Prompts of unequal length are padded on the left and keep their own positions, so that a prompt is continued the same in
a batch as alone. Letters: B prompts, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.config.check import check_value
from pretrain.config.spelling import either
from pretrain.errors import ConfigError, ModelError
from pretrain.inference.fill import embed, fill_mask
from pretrain.inference.prompts import (
    Prompts,
    check_finite,
    check_ids,
    evaluating,
    fill_id,
    pad,
    tokenizer_of,
)
from pretrain.inference.sampling import banned, penalize
from pretrain.inference.settings import Settings, add_biases
from pretrain.nn.attention import KVCache
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.base import Model

__all__ = ["Stream", "embed", "fill_mask", "generate", "write"]

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
    stream: bool = False,
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
        stop: texts at which to stop, also with special tokens; the answer is cut before them, also within a token.
        seed: seed of sampling; the global random state is neither read nor changed.
        use_cache: cache keys and values of earlier tokens; if False, everything is recomputed for every token.
        stream: return a `Stream`, an iterator over the pieces of the text as it is made; the prompt, which must be
            one text, is the first of them.
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
    chance = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    others = {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    options = {**chance, **others, "stop": stop, "seed": seed, **settings}
    asked = Prompts.read(model, prompts)
    if stream:
        if asked.texts is None or asked.form != "one":
            raise ConfigError(
                f"stream works with one text, but the prompts are {type(prompts).__name__}."
            )
        _remark_chat(model, asked.texts)
        lead = asked.texts[0]
        return Stream(model, asked.ids[0], lead=lead, use_cache=use_cache, **options)
    chosen = _checked(model, asked.ids, options)
    if asked.texts is not None:
        _remark_chat(model, asked.texts)
    spoken = asked.texts is not None
    new = _Decoder(model, asked.ids, chosen, use_cache=use_cache, spoken=spoken).run()
    return _answer(model, asked, new, chosen.stop)


def _checked(model: Model, prompts: list[list[int]], options: Mapping[str, Any]) -> Settings:
    """Return the settings of a call, after a check of the model, its prompts and the options."""
    if not model.backbone.causal or model.head_kind != "causal-lm":
        raise ModelError(
            f"This {model.backbone.model_type} model with the head {model.head_kind!r} cannot continue text; only a "
            "causal model with a language-model head can."
            + f" This one fills masks: {either('pretrain fill-mask', 'fill_mask')}."
            * (model.head_kind == "masked-lm")
        )
    options = dict(options)
    stop = check_value("stop", options.pop("stop", None), str | list[str] | None)
    chosen = Settings.read(model, options if stop is None else {**options, "stop_strings": stop})
    check_ids(model, prompts)
    return chosen


_REMARKED: weakref.WeakSet[Any] = weakref.WeakSet()  # models for which the note has been printed


def _remark_chat(model: Model, texts: Sequence[str]) -> None:
    """Print once per model that ``generate`` does not apply the chat template of a model trained on conversations."""
    objective = model.provenance.get("objective")
    task = objective.get("task") if isinstance(objective, Mapping) else None
    tokenizer = model.tokenizer
    if task not in ("chat", "preference") or tokenizer is None or tokenizer.chat_template is None:
        return
    specials = [name for name, i in tokenizer.vocab.items() if i in tokenizer.special_ids]
    written = any(token in text for text in texts for token in specials if token)
    if (
        model not in _REMARKED and not written
    ):  # a text with special tokens has been through a template already
        _REMARKED.add(model)
        note(
            "this model was trained on conversations, and generate continues the text as it stands, without the chat "
            "template; use model.chat(...), or pretrain generate --chat, to get an answer"
        )


def write(model: Model, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
    """Return the texts that follow prompts of ids, cut before stop texts; options as of `generate`."""
    ids = [list(prompt) for prompt in prompts]
    chosen = _checked(model, ids, options)
    added = _Decoder(model, ids, chosen).run()
    tokenizer = tokenizer_of(model, "write text")
    pairs = zip(ids, added, strict=True)
    return [cut(tokenizer, before, new, chosen.stop)[0] for before, new in pairs]


def _answer(model: Model, asked: Prompts, added: list[list[int]], stops: Sequence[str]) -> Any:
    """Return prompts and continuations in the form of the prompts."""
    if asked.texts is not None:
        tokenizer = tokenizer_of(model, "write text")
        texts = [
            text + cut(tokenizer, ids, new, stops)[0]
            for text, ids, new in zip(asked.texts, asked.ids, added, strict=True)
        ]
        return texts[0] if asked.form == "one" else texts
    rows = [ids + new for ids, new in zip(asked.ids, added, strict=True)]
    if asked.form == "tensor":
        width, fill = max(map(len, rows)), fill_id(model)
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    if asked.form == "row":
        return torch.tensor(rows[0])
    return rows[0] if asked.form == "one" else rows


def cut(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    new: Sequence[int],
    stops: Sequence[str],
    *,
    final: bool = True,
    lengths: dict[int, int] | None = None,
) -> tuple[str, bool]:
    """Return the text of ``new`` after ``ids`` before the first stop text, and whether there is one.

    A stop text may have special tokens; the text that is returned has none.

    Unless ``final``, what later tokens may change or a stop text may take away is left out. ``lengths`` maps
    numbers of new tokens to the lengths of their texts; the caller keeps it from one call for an answer to the
    next.
    """
    lengths = {} if lengths is None else lengths
    text = (tokenizer.continuation if final else tokenizer.stable_text)(ids, new)
    if not stops:
        return text, False
    end, found = len(text), False
    plain = text, range(len(text) + 1)
    for whole, places in (plain, _with_special(tokenizer, ids, new, text, lengths)):
        at = min((at for at in map(whole.find, stops) if at >= 0), default=None)
        found |= at is not None
        if at is None:
            at = len(whole if final else without_start(whole, stops))
        end = min(end, places[at])
    return text[:end], found


def _with_special(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    new: Sequence[int],
    text: str,
    lengths: dict[int, int],
) -> tuple[str, Sequence[int]]:
    """Return a text of ``new`` with its special tokens, and the place in ``text`` of each character and of the end."""
    whole, places, last = "", list[int](), 0
    for k, token in enumerate(new):
        if token in tokenizer.special_ids:
            if k not in lengths:
                lengths[k] = len(tokenizer.continuation(ids, new[:k]))
            at = lengths[k]
            if last <= at <= len(text):
                name = tokenizer.decode([token], skip_special=False)
                whole += text[last:at] + name
                places += [*range(last, at), *([at] * len(name))]
                last = at
    return whole + text[last:], [*places, *range(last, len(text) + 1)]


def without_start(text: str, stops: Sequence[str]) -> str:
    """Return the text without an ending with which a stop text may begin."""
    longest = min(max(map(len, stops), default=1) - 1, len(text))
    held = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops))
    return text[: len(text) - next(held, 0)]


class Stream(Iterator[str]):
    """A text in pieces; the next tokens are made when the next piece is asked for.

    A piece ends with a whole character, and never holds a part of a stop text. All pieces together are the text that
    is returned without streaming. `close`, or no longer asking, ends the generation.

    Args:
        model: a causal model with a tokenizer.
        ids: the prompt.
        lead: the text of the prompt, if it is to be the first piece.
        strip: leave out blanks at both ends of the text.
        use_cache: see `generate`.
        **options: see `generate`.

    Attributes:
        text: all pieces so far.
        prompt_tokens: number of tokens of the prompt.
        new_tokens: number of tokens that have been made.
        finish_reason: None until the end; then ``stop`` (the model, or a stop text, ended the text) or ``length``.
    """

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        *,
        lead: str | None = None,
        strip: bool = False,
        use_cache: bool = True,
        **options: Any,
    ) -> None:
        self._tokenizer = tokenizer_of(model, "stream text")
        self._model, self._ids, self._strip = model, list(ids), strip
        self._settings = _checked(model, [self._ids], options)
        self._decoder = _Decoder(
            model,
            [self._ids],
            self._settings,
            use_cache=use_cache,
            spoken=lead is not None,
            live=True,
        )
        self._pieces = self._stream(lead)
        self.text, self.prompt_tokens = "", len(self._ids)
        self._lengths: dict[int, int] = {}
        self.finish_reason: str | None = None

    @property
    def new_tokens(self) -> int:
        return len(self._decoder.new[0])

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """End the generation."""
        self._pieces.close()

    def _stream(self, lead: str | None) -> Generator[str, None, None]:
        if lead:
            yield lead
        shown, steps, running = "", self._decoder.steps(), True
        while running:
            # Between two pieces the modes of torch and of the model are those of the caller.
            with self._model.backbone.uncompiled(), evaluating(self._model):
                running = next(steps, False)
            text = self._text(final=not running)
            if not running:
                self.finish_reason = "stop" if self._decoder.ended else "length"
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text

    def _text(self, *, final: bool) -> str:
        """Return the text so far without what later tokens may change or a stop text may take away."""
        new, stops = self._decoder.new[0], self._settings.stop
        text, _ = cut(self._tokenizer, self._ids, new, stops, final=final, lengths=self._lengths)
        return text.strip() if self._strip else text


class _Decoder:
    """The decoding loop.

    Args:
        model: a causal model.
        prompts: ids.
        settings: settings of the call.
        use_cache: cache keys and values.
        spoken: the prompts are texts, so that no special token is drawn.
        live: ``new`` is up to date after every step, and not only at the end.

    Attributes:
        new: the new ids of every prompt.
        ended: whether the first prompt was ended by the model or by a stop text.
    """

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        settings: Settings,
        *,
        use_cache: bool = True,
        spoken: bool = False,
        live: bool = False,
    ) -> None:
        self.model, self.prompts, self.settings = model, prompts, settings
        self.use_cache, self.spoken = use_cache, spoken
        self.live = live or bool(settings.stop)
        self.new: list[list[int]] = [[] for _ in prompts]
        self.ended = False
        if settings.stop:
            tokenizer_of(model, "look for stop texts")
        # A token has at least one byte and a character at most four; the 16 more allow for tokens without text.
        self.window = 4 * max(map(len, settings.stop), default=0) + 16

    def run(self) -> list[list[int]]:
        """Decode to the end, and return the new ids."""
        with self.model.backbone.uncompiled(), evaluating(self.model):
            for _ in self.steps():
                pass
        return self.new

    def steps(self) -> Iterator[bool]:
        """Decode, and yield True after every token."""
        prompts, room = self.prompts, self.model.backbone.max_length
        wanted = [self.settings.budget(len(ids)) for ids in prompts]
        budgets = [min(n, room - len(ids)) for n, ids in zip(wanted, prompts, strict=True)]
        groups = [list(range(len(prompts)))]
        if max(map(len, prompts)) + max(budgets) > room:
            # Left padding would use up positions that the longest answers need, so prompts of equal length form groups.
            lengths = sorted({len(ids) for ids in prompts})
            groups = [[i for i, ids in enumerate(prompts) if len(ids) == n] for n in lengths]
        generator = self.settings.sampler.generator(self.model.device)
        for rows in groups:
            steps = [budgets[i] for i in rows]
            if max(steps) > 0:
                yield from self._loop(rows, steps, generator)
        full = [len(a) == b < n for a, b, n in zip(self.new, budgets, wanted, strict=True)]
        if any(full):
            note(f"{sum(full)} of {len(full)} texts ended early: the model has {room} positions.")

    def _loop(
        self, rows: list[int], budget: list[int], generator: torch.Generator
    ) -> Iterator[bool]:
        """Continue the prompts ``rows`` together, each by at most its budget."""
        model, prompts, steps = self.model, [self.prompts[i] for i in rows], max(budget)
        device, fill = generator.device, fill_id(model)
        ids, real = pad(prompts, fill, device, left=True)
        added = self._banned(device)
        seen = self._seen(prompts, device)
        rules, sampler = self.settings.rules, self.settings.sampler
        ends = torch.tensor(rules.ends, dtype=torch.long, device=device)
        budgets = torch.tensor(budget, device=device)
        lengths, unfinished = torch.zeros_like(budgets), budgets > 0
        cache = KVCache(ids.shape[1] + steps) if self.use_cache else None
        every = 1 if device.type == "cpu" or self.live else _CHECK_EVERY
        columns, new = ids, []
        history = None if rules.none else ids if real is None else ids.masked_fill(real == 0, -1)
        lengths_in = [len(prompt) for prompt in prompts]
        last_steps = [self.settings.budget(n) - 1 for n in lengths_in]
        for step in range(steps):
            scores = self._scores(columns, real, cache)
            if step == 0:
                check_finite(scores)
            if added is not None:
                scores = scores + added
            if history is not None:
                scores = add_biases(scores, history, rules.biases)
            if seen is not None:
                scores = penalize(scores, seen, sampler.repetition_penalty)
            if history is not None:
                scores = rules.after(scores, history, lengths_in, step, last_steps)
            token = sampler.choose(scores, generator)
            token = torch.where(unfinished, token, fill)
            new.append(token)
            lengths += unfinished
            if self.live:
                unfinished = unfinished & ~self._watch(rows, token, unfinished)
            unfinished = unfinished & ~torch.isin(token, ends) & (lengths < budgets)
            yield True
            if (step + 1) % every == 0 and not bool(unfinished.any()):
                break
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if real is not None:
                real = torch.cat((real, torch.ones_like(token)[:, None]), dim=1)
            last = token[:, None]
            history = None if history is None else torch.cat((history, last), dim=1)
            columns = last if cache is not None else torch.cat((columns, last), dim=1)
        table = torch.stack(new, dim=1).tolist()
        for row, made, length in zip(rows, table, lengths.tolist(), strict=True):
            self.new[row] = made[:length]

    def _watch(self, rows: list[int], token: Tensor, unfinished: Tensor) -> Tensor:
        """Append the tokens to ``new``, and return which rows have come to an end by a stop text."""
        found = [False] * len(rows)
        running = unfinished.tolist()
        for at, (row, last, goes) in enumerate(zip(rows, token.tolist(), running, strict=True)):
            if goes:
                self.new[row].append(last)
                found[at] = self._stopped(self.prompts[row], self.new[row])
                self.ended |= row == 0 and (found[at] or last in self.settings.rules.ends)
        return torch.tensor(found, device=token.device)

    def _stopped(self, ids: list[int], new: list[int]) -> bool:
        if not self.settings.stop:
            return False
        tokenizer = tokenizer_of(self.model, "look for stop texts")
        start = tokenizer.run_start(new, len(new) - self.window)
        return cut(tokenizer, [*ids, *new[:start]], new[start:], self.settings.stop)[1]

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
        drawn = self.spoken and self.settings.sampler.effective_temperature > 0
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
