"""Instruction tuning: conversations, with a loss on what the assistant says only (InstructGPT, arXiv 2203.02155, §3.5).

A conversation is written by the chat template of the tokenizer, or by a plain one where it has none, and encoded
without anything around it. The targets are the tokens of the assistant with the token that ends its turn, so that the
model learns to stop.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pretrain.data.chat import (
    ChatTemplate,
    Message,
    assistant_spans,
    encode_rendered,
    typed_specials,
)
from pretrain.data.conversations import CHAT_ROLES, to_conversations
from pretrain.data.labelled import Role
from pretrain.data.task_rows import TaskRows
from pretrain.errors import DataError, ModelError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import Batch, Example, TokenObjective
from pretrain.objectives.tasks import Learned, Task

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["Instruction", "chat_template_of", "encode_conversation", "reply", "shifted_labels"]

_NEW_TOKENS = 128
# Options of generation that ask for chance; without one, answers that are measured are the likeliest ones.
_CHANCE = {"temperature", "top_k", "top_p", "min_p", "seed", "do_sample"}
_TYPED = "special tokens are typed into the text"
_LONG = "the first answer does not fit"


def chat_template_of(model: Model, source: str | None = None) -> ChatTemplate:
    """The chat template of a model, which from now on carries it, with the ids that end its answers.

    Args:
        model: a causal model with a tokenizer.
        source: instead of the template of the tokenizer.

    Raises:
        ModelError: no tokenizer.
        DataError: the template cannot be used.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(
            "A conversation is text, and this model has no tokenizer. Put tokenizer.json into its directory, or set "
            "model.tokenizer."
        )
    template = ChatTemplate.of(tokenizer, source)
    if tokenizer.chat_template != template.source:
        # Other models may hold the same tokenizer.
        model.tokenizer = tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template.source
    ends = [] if template.end is None else [tokenizer.vocab[template.end]]
    if tokenizer.eos_id is not None and tokenizer.eos_id not in ends:
        ends.append(tokenizer.eos_id)
    if ends:
        model.generation_config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    pad = tokenizer.pad_id
    if pad is not None and pad in ends:
        warnings.warn(
            f"The padding token {tokenizer.roles['pad']!r} also ends an answer. Training here masks padding by place, "
            "so the end is learned; tools that mask by id would not learn it. A padding token of its own is safer.",
            stacklevel=3,
        )
    elif pad is not None:
        model.generation_config["pad_token_id"] = pad
    return template


def shifted_labels(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The target at every place, (n,): the token that follows, where it lies in a span, else ``IGNORE``.

    Args:
        ids: of the tokens.
        offsets: characters of each token.
        spans: characters that are trained on.
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
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation and the target at each of them, both (n,).

    Args:
        model: whose tokenizer is used.
        template: writes the conversation.
        messages: the conversation.
        last_only: only the last turn of the assistant is trained on.
        where: the row, for errors.
    """
    text, spans = assistant_spans(template, messages, where)
    assert model.tokenizer is not None
    ids, offsets = encode_rendered(model.tokenizer, text)
    labels = shifted_labels(ids, offsets, spans[-1:] if last_only else spans)
    return np.asarray(ids, dtype=np.int64), labels


class Instruction(Task, TokenObjective):
    """Answer as the assistant of the training conversations does.

    Args:
        model: causal, with a language-model head. Its tokenizer carries the chat template from now on.
        chat_template: a Jinja program instead of the tokenizer's own.
        drop_unanswered: leave out conversations in which the assistant says nothing, instead of refusing them.
        max_length, pack: see ``Task``. A longer conversation keeps the turns from its start that fit.

    Raises:
        ModelError: another head.
        DataError: a template that cannot be used.
    """

    name: ClassVar[str] = "chat"
    roles: ClassVar[tuple[Role, ...]] = CHAT_ROLES
    metric: ClassVar[str] = "loss"
    head_kind: ClassVar[str | None] = "causal-lm"

    def __init__(
        self,
        model: Model,
        *,
        chat_template: str | None = None,
        drop_unanswered: bool = False,
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, max_length=max_length, pack=pack)
        self.template = chat_template_of(model, chat_template)
        self.drop_unanswered = drop_unanswered

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        """Hold the columns against what a conversation needs, and look for conversations without an answer."""
        names = set(table.names)
        if "messages" not in names and not ("prompt" in names and names & {"answer", "instances"}):
            raise DataError(
                f"{table.name} has no conversations: there must be a column of messages, or a prompt with an answer. "
                'Name them: messages="COLUMN", or prompt="COLUMN", answer="COLUMN".'
            )
        silent = [
            table.where(i)
            for i, row in enumerate(table.rows())
            if not any(_answered(c) for c in to_conversations(row, table.where(i)))
        ]
        if silent and not options.get("drop_unanswered"):
            raise DataError(
                f"{len(silent)} of {len(table)} conversations have no turn of the assistant, so they teach nothing: "
                f"{'; '.join(silent[:3])}{'; ...' * (len(silent) > 3)}. Check the names of the roles, or leave them "
                "out with drop_unanswered=True."
            )
        return Learned()

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows = TaskRows()
        for i, row in enumerate(table.rows()):
            where = table.where(i)
            for messages in to_conversations(row, where, answers=targets):
                if typed_specials(messages, self.template.specials) is not None:
                    rows.drop(i, _TYPED)
                elif targets:
                    self._add(rows, i, messages, where)
                else:
                    self._ask(rows, i, messages, where)
        return rows

    def _add(self, rows: TaskRows, i: int, messages: list[Message], where: str) -> None:
        if not _answered(messages):
            if not self.drop_unanswered:
                raise DataError(
                    f"{where}: the conversation has no turn of the assistant, so there is nothing to learn. Remove it, "
                    "or leave such rows out with drop_unanswered=True."
                )
            rows.drop(i, "no turn of the assistant")
            return
        turns = [k + 1 for k, m in enumerate(messages) if m["role"] == "assistant"]
        for kept in reversed(turns):  # what stands behind the last answer is never a target
            ids, labels = encode_conversation(
                self.model, self.template, messages[:kept], where=where
            )
            if len(ids) <= self.max_length:
                break
        else:
            rows.cut.append(i)
            rows.drop(i, _LONG)
            return
        if kept < turns[-1]:
            rows.cut.append(i)
        if not (labels != IGNORE).any():
            rows.drop(i, "no token to learn")
            return
        rows.add(i, {"input_ids": ids, "labels": labels})

    def _ask(self, rows: TaskRows, i: int, messages: list[Message], where: str) -> None:
        """The prompt for the answer to the last turn that is not the assistant's."""
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids = prompt_ids(self.model, self.template, messages, where)
        if len(ids) >= self.max_length:
            rows.cut.append(i)
            rows.drop(i, "the prompt leaves no room for an answer")
            return
        rows.add(i, {"input_ids": np.asarray(ids, dtype=np.int64)}, messages)

    def collate(
        self,
        examples: Sequence[Example],
        rngs: Sequence[np.random.Generator],
        *,
        evaluation: bool = False,
    ) -> Batch:
        """Pack conversations; ``labels[:, t]`` is the target at place t, as in ``NextToken``."""
        return token_batch(self, examples)

    def expected_first_loss(self) -> float | None:
        """None: the model has learned something before."""
        return None

    def preview(self, examples: Sequence[Example], prompt: str, seed: int) -> list[str]:
        """Answer the first turn of a held-out conversation, or ``prompt``."""
        ids = [int(t) for t in examples[0]["input_ids"]]
        first = int(np.flatnonzero(examples[0]["labels"] != IGNORE)[0]) + 1
        if prompt:
            asked: list[Message] = [{"role": "user", "content": prompt}]
            start = prompt_ids(self.model, self.template, asked)
        else:
            start = ids[:first]
        room = min(48, int(self.model.backbone.max_length) - len(start))
        if room < 1 or self.model.tokenizer is None:
            return []
        question = prompt or self.model.tokenizer.decode(start)[-200:]
        return [
            f"{question} -> {_write(self.model, [start], room, {'do_sample': False})[0]}".replace(
                "\n", " "
            )
        ]

    def predict(
        self, table: Table, batch_rows: int = 16, max_new_tokens: int = _NEW_TOKENS, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Answer the last turn of every conversation.

        Args:
            table: conversations, columns named by role.
            batch_rows: answers that are written at once.
            max_new_tokens: tokens of an answer at most.
            options: see ``pretrain.generate``; without any the likeliest token is taken each time.

        Returns:
            ``answer`` and ``messages``, the conversation with it, for each row; both None where there is no room for
            an answer, or special tokens were typed into the text.
        """
        if not _CHANCE & options.keys():
            options["do_sample"] = False
        for start in range(0, len(table), batch_rows):
            part = table.take(range(start, min(start + batch_rows, len(table))))
            rows = self.encode(part, targets=False)
            prompts = [[int(t) for t in example["input_ids"]] for example in rows]
            texts = _write(self.model, prompts, max_new_tokens, options) if prompts else []
            found = dict(zip(rows.owners, zip(rows.info, texts, strict=True), strict=True))
            for row in range(len(part)):
                messages, text = found.get(row, (None, None))
                yield self.decode([text], [messages])

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """``answer``, and ``messages`` with it."""
        text, messages = outputs[0], infos[0]
        if text is None:
            return {"answer": None, "messages": None}
        return {
            "answer": text,
            "messages": [*messages, {"role": "assistant", "content": text}],
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"task": self.name, "max_length": self.max_length}


def token_batch(task: Task, examples: Sequence[Example]) -> Batch:
    """Examples with ``labels`` (n,) as a packed batch, and the places of its targets, ``target_index`` (M,)."""
    batch = task.pack_batch(examples, {"labels": IGNORE})
    batch["target_index"] = (batch["labels"].reshape(-1) != IGNORE).nonzero().squeeze(1)
    return batch


def _answered(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def prompt_ids(
    model: Model, template: ChatTemplate, messages: Sequence[Message], where: str = ""
) -> list[int]:
    """Ids of a conversation that waits for an answer."""
    assert model.tokenizer is not None
    text = template.render(messages, add_generation_prompt=True, where=where)
    return encode_rendered(model.tokenizer, text)[0]


def _write(
    model: Model, prompts: list[list[int]], max_new_tokens: int, options: Mapping[str, Any]
) -> list[str]:
    """The answers that follow prompts, without what ends them."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    whole = model.generate(prompts, max_new_tokens=max_new_tokens, **options)
    texts = []
    for prompt, ids in zip(prompts, whole, strict=True):
        # The blanks between words of some tokenizers show only behind other words.
        before, both = (
            tokenizer.decode(prompt[-8:]),
            tokenizer.decode([*prompt[-8:], *ids[len(prompt) :]]),
        )
        new = (
            both[len(before) :] if both.startswith(before) else tokenizer.decode(ids[len(prompt) :])
        )
        texts.append(new.strip())
    return texts


def reply(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = _NEW_TOKENS,
    **options: Any,
) -> str:
    """Answer a conversation.

    Args:
        model: causal; its tokenizer's chat template writes the conversation.
        messages: ``{"role", "content"}`` each, the last one the user's.
        max_new_tokens: tokens of the answer at most.
        options: see ``pretrain.generate``.

    Raises:
        DataError: special tokens are typed into the text, or the template refuses the conversation.
    """
    template = chat_template_of(model)
    asked = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    typed = typed_specials(asked, template.specials)
    if typed is not None:
        raise DataError(
            f"The conversation contains {typed!r}, which is a special token of this model and would be read as the "
            "end of a turn. Write it in another way."
        )
    ids = prompt_ids(model, template, asked)
    return _write(model, [ids], max_new_tokens, options)[0]
