"""Instruction tuning on conversations, with a loss on the assistant's turns only (InstructGPT, arXiv 2203.02155, §3.5).

A conversation is rendered by the chat template of the tokenizer, or by a plain one if it has none, and encoded without
further special tokens. The targets are the tokens of the assistant and the token that ends its turn, so that the model
learns to stop.
"""

from __future__ import annotations

import bisect
import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pretrain.config.spelling import option
from pretrain.data.chat import (
    CHAT_ROLES,
    ChatTemplate,
    Message,
    as_tools,
    encode_rendered,
    is_trained,
    template_of_file,
    to_conversations,
    typed_specials,
)
from pretrain.data.chat_spans import SpansNotFound, assistant_spans, readable, unread_keys
from pretrain.data.labelled import Role, printed_messages
from pretrain.data.tables import Table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError, ModelError, suggestion
from pretrain.hub import function
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import (
    Batch,
    Example,
    ExampleList,
    Rngs,
    TokenObjective,
    target_places,
)
from pretrain.objectives.tasks import Learned, Task
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "Instruction", "answer_length", "chat_template_of", "encode_conversation", "last_turns", "note_unread",
    "prompt_ids", "settled_template", "shifted_labels", "shown_shifted", "store_chat_template",
]  # fmt: skip

NEW_TOKENS = 128
# Generation options that imply sampling; without any of them decoding is greedy.
_CHANCE = {"temperature", "top_k", "top_p", "min_p", "seed", "do_sample"}
TYPED = "special tokens are typed into the text"
_UNANSWERED = "no turn of the assistant"
# What happens to a conversation that is too long, and its wording in messages.
_LONG = {
    "right": "cut to their first turns",
    "left": "cut to their last turns",
    "split": "split between turns",
    "drop": "left out",
}


def chat_template_of(model: Model, source: str | None = None) -> tuple[ChatTemplate, list[int]]:
    """Return the chat template of a model, and the ids that end an answer.

    These are the end of a turn in the template, the ends that the checkpoint names, and the tokenizer's eos.

    Args:
        model: a causal model with a tokenizer.
        source: template that replaces that of the tokenizer.

    Raises:
        ModelError: the model has no tokenizer.
        DataError: the template cannot be used.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(
            "A conversation is text, and this model has no tokenizer. Put tokenizer.json into its directory, or set "
            "model.tokenizer."
        )
    template = ChatTemplate.of(tokenizer, source)
    ends = [] if template.end is None else [tokenizer.vocab[template.end]]
    ends += [*model.end_ids(), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
    return template, list(dict.fromkeys(ends))


def store_chat_template(model: Model, source: str | None = None) -> ChatTemplate:
    """Store the chat template in a model that is trained with it, with the ids that end an answer, and return it.

    Arguments are those of `chat_template_of`.

    Raises:
        DataError: the tokenizer has named templates and no default; see also there.
    """
    tokenizer = model.tokenizer
    if (
        tokenizer is not None
        and not source
        and not tokenizer.chat_template
        and tokenizer.named_templates
    ):
        raise DataError(
            f"The tokenizer has the chat templates {', '.join(tokenizer.named_templates)}, and none that is called "
            "default. Give the one to train with (chat_template=)."
        )
    template, ends = chat_template_of(model, source)
    assert tokenizer is not None
    if source or tokenizer.chat_template != template.source:
        # The tokenizer is copied, because other models may share it.
        model.tokenizer = tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template.source
        tokenizer.named_templates = {}
    if ends:
        model.generation_config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    pad = tokenizer.pad_id
    if pad is not None and pad in ends:
        note(
            f"The padding token {tokenizer.roles['pad']!r} also ends an answer. pretrain masks padding by position, "
            "so the model learns the end of an answer; tools that mask padding by id would mask this end too. Use a "
            "separate padding token.",
            once=True,
        )
    elif pad is not None:
        model.generation_config.setdefault("pad_token_id", pad)
    return template


def settled_template(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of a task with the chat template itself in place of the path of its file."""
    given = options.get("chat_template")
    return options if given is None else options | {"chat_template": template_of_file(given)}


def answer_length(model: Model, given: int | None, default: int = NEW_TOKENS) -> int:
    """Return the maximum number of tokens of an answer: as given, or that of generation_config.json, or a default."""
    stored = model.generation_config.get("max_new_tokens")
    if given is None and type(stored) is int and stored > 0:
        return stored
    return default if given is None else given


def shifted_labels(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The target at every position, (n,): the next token if it overlaps a span, else ``IGNORE``.

    Args:
        ids: token ids.
        offsets: character range of each token.
        spans: character ranges that are trained on.
    """
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    for t in range(1, len(ids)):
        first, end = offsets[t]
        if any(first < stop and end > start for start, stop in spans):
            labels[t - 1] = ids[t]
    return labels


def encode_conversation(
    model: Model,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    last_only: bool = False,
    where: str = "",
    tools: Sequence[Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a conversation; return its token ids and the target at each position, both (n,).

    Args:
        model: model whose tokenizer is used.
        template: template that renders the conversation.
        messages: the conversation.
        last_only: whether to train on the last turn of the assistant only.
        where: name of the row in errors.
        tools: see ``ChatTemplate.render``.

    Raises:
        SpansNotFound: the assistant's turns cannot be located in the rendered text.
    """
    text, spans = assistant_spans(template, messages, where, tools)
    assert model.tokenizer is not None
    ids, offsets = encode_rendered(model.tokenizer, text)
    last = max((span.message for span in spans), default=-1)
    trained = [
        (span.first, span.end)
        for span in spans
        if is_trained(messages[span.message]) and (span.message == last or not last_only)
    ]
    return np.asarray(ids, dtype=np.int64), shifted_labels(ids, offsets, trained)


def note_unread(
    rows: TaskRows,
    i: int,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
) -> bool:
    """Record what the template does not render of a conversation; return False if the row is dropped for it."""
    unread = unread_keys(template, messages, tools)
    if "tool_calls" in unread:
        rows.drop(i, "the chat template does not write tool_calls")
        return False
    for name in unread:
        rows.remark(i, f"the chat template does not read {name}")
    return True


def shown_shifted(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Shift the target marks of tokens by one, because the target at a position is the next token."""
    marks = [False, *(mark for _, mark in pieces)]
    return [(text, mark) for (text, _), mark in zip(pieces, marks, strict=False)]


class Instruction(Task, TokenObjective):
    """Answer like the assistant of the training conversations.

    Args:
        model: a causal model with a language-model head. The chat template is stored in its tokenizer.
        chat_template: Jinja template that replaces the tokenizer's own; of a run also the path of a file with one.
        drop_unanswered: drop conversations without a turn of the assistant, instead of raising an error.
        long: what happens to a conversation of more than ``max_length`` tokens. ``"right"`` keeps the turns from its
            start that fit, ``"left"`` those at its end (beginning with a user turn), ``"split"`` makes several
            conversations, each beginning with a user turn, ``"drop"`` drops it. System messages at the beginning are
            kept in every part.
        max_length, pack: see ``Task``.

    Raises:
        ConfigError: ``long`` is none of these.
        ModelError: the model has another head.
        DataError: the template cannot be used.
    """

    name: ClassVar[str] = "chat"
    roles: ClassVar[tuple[Role, ...]] = CHAT_ROLES
    metric: str = "loss"
    trivial_name: ClassVar[str] = "unigram baseline"
    head_kind: ClassVar[str | None] = "causal-lm"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "perplexity")

    def __init__(
        self,
        model: Model,
        *,
        chat_template: str | None = None,
        drop_unanswered: bool = False,
        long: str = "right",
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, max_length=max_length, pack=pack)
        if long not in _LONG:
            raise ConfigError(
                f"{option('long', long)}: it must be one of {', '.join(_LONG)}.{suggestion(long, _LONG)}"
            )
        self.template = store_chat_template(model, chat_template)
        self.ends = sorted(set(model.end_ids()))
        self.drop_unanswered, self.long = drop_unanswered, long
        self.beyond, self.beyond_chosen = _LONG[long], long != "right"
        self._encoded: list[tuple[Table, TaskRows]] = []  # reused by ``trivial``

    @property
    def shorten(self) -> str:
        return f"choose what becomes of them with {option('long', 'split')} (or left, drop)"

    @classmethod
    def settled(cls, options: dict[str, Any]) -> dict[str, Any]:
        return settled_template(options)

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        """Check that the columns form conversations, and find conversations without an answer."""
        names = set(table.names)
        if "messages" not in names and not ("prompt" in names and names & {"answer", "instances"}):
            raise DataError(
                f"{table.name} has no conversations: it needs a column of messages, or a prompt with an answer. "
                'Name them: messages="COLUMN", or prompt="COLUMN", answer="COLUMN".'
            )
        silent = [
            table.where(i)
            for i, row in enumerate(table.rows())
            if not any(_answered(c) for c in to_conversations(row, table.where(i)))
        ]
        if silent and not options.get("drop_unanswered"):
            raise DataError(
                f"{len(silent)} of {len(table)} conversations have no turn of the assistant to train on: "
                f"{'; '.join(silent[:3])}{'; ...' * (len(silent) > 3)}. Check the names of the roles, or leave them "
                "out with drop_unanswered=True."
            )
        return Learned()

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows = TaskRows()
        for i, row in enumerate(table.rows()):
            where = table.where(i)
            tools = as_tools(row.get("tools"), where)
            for messages in to_conversations(row, where, answers=targets):
                if typed_specials([messages, tools or ()], self.template.specials) is not None:
                    rows.drop(i, TYPED)
                    continue
                ready = readable(self.template, messages, tools)
                if targets:
                    self._add(rows, i, ready, tools, where)
                else:
                    self._ask(rows, i, ready, tools)
        if targets:
            self._encoded = [*self._encoded[-2:], (table, rows)]
        return rows

    def _add(
        self, rows: TaskRows, i: int, messages: list[Message], tools: list[Any] | None, where: str
    ) -> None:
        """Add the examples of a conversation."""
        if not _answered(messages):
            if not self.drop_unanswered:
                raise DataError(
                    f"{where}: the conversation has no turn of the assistant, so there is nothing to learn. Remove it, "
                    f"or leave such rows out with {option('drop_unanswered', True)}."
                )
            rows.drop(i, _UNANSWERED)
            return
        if not any(is_trained(m) for m in messages if m["role"] == "assistant"):
            rows.drop(i, "no turn of the assistant is to be trained on (weight 0, or train: false)")
            return
        while messages[-1]["role"] != "assistant":  # turns after the last answer are never targets
            messages = messages[:-1]
        if not note_unread(rows, i, self.template, messages, tools):
            return
        parts = self._fitting(rows, i, messages, tools, where)
        try:
            made = [
                encode_conversation(self.model, self.template, part, where=where, tools=tools)
                for part in parts
            ]
        except SpansNotFound as error:
            rows.drop(i, error.reason)
            return
        learned = [(ids, labels) for ids, labels in made if (labels != IGNORE).any()]
        if parts and not learned:
            rows.drop(i, "no token to learn")
        for ids, labels in learned:
            rows.add(i, {"input_ids": ids, "labels": labels})
        if (
            learned
            and i not in rows.cut
            and not any(np.isin(ls, self.ends).any() for _, ls in learned)
        ):
            names = (
                ", ".join(map(repr, map(self.tokenizer.backend.id_to_token, self.ends))) or "none"
            )
            rows.remark(
                i,
                f"the model does not learn to stop, because no token that ends an answer ({names}) is learnt; let the "
                "chat template end the turns of the assistant with one, inside of its {% generation %} if it has that",
            )

    def _fitting(
        self, rows: TaskRows, i: int, messages: list[Message], tools: list[Any] | None, where: str
    ) -> list[list[Message]]:
        """Shorten or split the conversation into parts that fit, as set by ``long``, and record what does not fit."""

        def fits(part: Sequence[Message]) -> bool:
            text = self.template.render(part, where=where, tools=tools)
            return len(encode_rendered(self.tokenizer, text)[0]) <= self.max_length

        def fits_together(lead: list[Message], parts: list[list[Message]], count: int) -> bool:
            return fits(_together(lead, parts[:count]))

        if fits(messages):
            return [messages]
        if self.long == "drop":
            rows.drop(i, f"longer than {self.max_length} tokens")
            return []
        rows.cut.append(i)
        lead, exchanges = _exchanges(messages)
        if self.long == "right":
            ends = [k + 1 for k, message in enumerate(messages) if message["role"] == "assistant"]
            count = _most(len(ends), lambda n: fits(messages[: ends[n - 1]]))
            parts = [messages[: ends[count - 1]]] if count else []
            missing = "the first answer does not fit"
        elif self.long == "left":
            count = _most(len(exchanges), lambda n: fits(_together(lead, exchanges[-n:])))
            parts = [_together(lead, exchanges[-count:])] if count else []
            missing = "the last answer does not fit"
        else:
            parts, missing = [], "no turn of the user fits with its answer"
            at = 0
            while at < len(exchanges):
                rest = exchanges[at:]
                count = _most(len(rest), functools.partial(fits_together, lead, rest))
                if count:
                    parts.append(_together(lead, rest[:count]))
                else:
                    rows.remark(i, f"turns that alone exceed {self.max_length} tokens are left out")
                at += max(1, count)
            parts = [part for part in parts if _answered(part)]
        if not parts:
            rows.drop(i, missing)
        return parts

    def _ask(
        self, rows: TaskRows, i: int, messages: list[Message], tools: list[Any] | None
    ) -> None:
        """Add the prompt for an answer to the last turn that is not the assistant's."""
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            rows.drop(i, "no turn to answer")
            return

        def prompt(part: Sequence[Message]) -> list[int]:
            return prompt_ids(self.model, self.template, part, tools=tools)

        try:
            ids = prompt(messages)
            if len(ids) >= self.max_length and self.long == "left":
                _, ids = last_turns(prompt, messages, self.max_length - 1)
        except DataError:
            rows.drop(i, "the chat template refuses the conversation")
            return
        if len(ids) >= self.max_length:
            rows.cut.append(i)
            rows.drop(i, f"the prompt leaves no room for an answer in {self.max_length} tokens")
            return
        rows.add(i, {"input_ids": np.asarray(ids, dtype=np.int64)}, messages)

    def show(self, example: Example) -> list[tuple[str, bool]]:
        return shown_shifted(super().show(example))

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Unigram baseline: cross entropy of the assistant's held-out tokens under add-one smoothed frequencies."""
        parts = []
        for table in (train, held_out):
            known = next((rows for other, rows in self._encoded if other is table), None)
            rows = self.encode(table) if known is None else known
            parts.append([int(t) for row in rows for t in row["labels"] if t != IGNORE])
        if not all(parts):
            return {}
        counts, total = Counter(parts[0]), len(parts[0]) + len(self.tokenizer)
        loss = -sum(math.log((counts[t] + 1) / total) for t in parts[1]) / len(parts[1])
        return {"loss": loss, "perplexity": math.exp(loss)}

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Pack conversations; ``labels[:, t]`` is the target at position t, as in ``NextToken``."""
        return token_batch(self, examples)

    def expected_first_loss(self) -> float | None:
        """None, because the model is already trained."""
        return None

    def preview(self, examples: ExampleList, prompt: str, seed: int) -> list[str]:
        """Answer the first turn of a held-out conversation, or ``prompt``."""
        ids = [int(t) for t in examples[0]["input_ids"]]
        first = int(np.flatnonzero(examples[0]["labels"] != IGNORE)[0]) + 1
        if prompt:
            asked: list[Message] = [{"role": "user", "content": prompt}]
            start = prompt_ids(self.model, self.template, asked)
        else:
            start = ids[:first]
        room = min(48, int(self.model.backbone.max_length) - len(start))
        if room < 1:
            return []
        question = prompt or self.tokenizer.decode(start)[-200:]
        answer = _write(self.model, [start], room, {"do_sample": False})[0]
        return [f"{question} -> {answer}".replace("\n", " ")]

    def inputs(self, inputs: Any) -> tuple[Table, bool] | None:
        """A text, or each of several, is what the user says first."""
        listed = hasattr(inputs, "tolist") and not hasattr(inputs, "columns")
        given = inputs.tolist() if listed else inputs
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not texts:
            return None
        if not all(isinstance(text, str) and printed_messages(text) is text for text in texts):
            return None
        table = Table("inputs", {"prompt": list(texts)}, origin="the inputs", unit="index")
        return table, isinstance(given, str)

    def predict(
        self, table: Table, batch_rows: int = 16, max_new_tokens: int | None = None, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Answer the last turn of every conversation.

        Args:
            table: conversations, columns named by role.
            batch_rows: number of answers that are generated at once.
            max_new_tokens: maximum tokens of an answer; see `answer_length`.
            options: see ``pretrain.inference.generate``; without sampling options decoding is greedy.

        Returns:
            ``answer`` and ``messages``, the conversation including it, for each row; both None if there is no room
            for an answer, or special tokens were typed into the text.
        """
        if not _CHANCE & options.keys():
            options["do_sample"] = False
        most = answer_length(self.model, max_new_tokens)
        for start in range(0, len(table), batch_rows):
            part = table.take(range(start, min(start + batch_rows, len(table))))
            rows = self.encode(part, targets=False)
            prompts = [[int(t) for t in example["input_ids"]] for example in rows]
            texts = _write(self.model, prompts, most, options) if prompts else []
            found = dict(zip(rows.owners, zip(rows.info, texts, strict=True), strict=True))
            for row in range(len(part)):
                messages, text = found.get(row, (None, None))
                yield self.decode([text], [messages])
            self.count_unanswered(rows)

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``answer``, and ``messages`` including it."""
        text, messages = outputs[0], infos[0]
        if text is None:
            return {"answer": None, "messages": None}
        return {"answer": text, "messages": [*messages, {"role": "assistant", "content": text}]}

    def describe(self) -> dict[str, Any]:
        # Defaults are left out, as in the descriptions of runs from before these options were recorded.
        own: dict[str, Any] = {"long": self.long} if self.beyond_chosen else {}
        return (
            super().describe() | own | ({"drop_unanswered": True} if self.drop_unanswered else {})
        )


def token_batch(task: Task, examples: ExampleList) -> Batch:
    """Pack examples with ``labels`` (n,) into a batch with the positions of its targets, ``target_index`` (M,)."""
    batch = task.pack_batch(examples, {"labels": IGNORE})
    batch["target_index"] = target_places(batch["labels"])
    return batch


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split a conversation into its leading system messages and the exchanges that begin with a user turn."""
    start = next(
        (k for k, m in enumerate(messages) if m["role"] not in ("system", "developer")),
        len(messages),
    )
    exchanges: list[list[Message]] = []
    for before, message in zip([None, *messages[start:]], messages[start:], strict=False):
        begins = message["role"] == "user" and (before is None or before["role"] != "user")
        if begins or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:start]), exchanges


def _together(lead: Sequence[Message], exchanges: Sequence[Sequence[Message]]) -> list[Message]:
    return [*lead, *(message for exchange in exchanges for message in exchange)]


def last_turns(
    prompt: Callable[[list[Message]], list[int]], messages: Sequence[Message], limit: int
) -> tuple[list[Message], list[int]]:
    """Return as many exchanges from the end of a conversation as ``limit`` tokens hold, at least one, and their ids.

    Args:
        prompt: returns the ids of a conversation.
        messages: the conversation; its system messages at the beginning are kept.
        limit: maximum number of ids.
    """
    lead, exchanges = _exchanges(messages)
    count = _most(len(exchanges), lambda n: len(prompt(_together(lead, exchanges[-n:]))) <= limit)
    kept = _together(lead, exchanges[-max(count, 1) :])
    return kept, prompt(kept)


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """Find the largest number up to ``count`` that fits by bisection, if all smaller ones fit; 0 if none does."""
    return bisect.bisect_left(range(1, count + 1), True, key=lambda number: not fits(number))


def _answered(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def prompt_ids(
    model: Model,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
) -> list[int]:
    """Token ids of a conversation with the generation prompt."""
    assert model.tokenizer is not None
    text = template.render(messages, add_generation_prompt=True, tools=tools)
    return encode_rendered(model.tokenizer, text)[0]


def _write(
    model: Model, prompts: list[list[int]], max_new_tokens: int, options: Mapping[str, Any]
) -> list[str]:
    """Generate the answers to prompts, as text without the tokens that end them."""
    texts = function("write")(model, prompts, max_new_tokens=max_new_tokens, **options)
    return [text.strip() for text in texts]
