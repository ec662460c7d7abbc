"""Answers to conversations, through the chat template of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.data.chat import Message, as_messages, as_tools, typed_specials
from pretrain.data.chat_spans import readable
from pretrain.errors import DataError
from pretrain.inference.generate import Stream
from pretrain.objectives.instruction import (
    answer_length,
    chat_template_of,
    last_turns,
    prompt_ids,
)

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["Chat", "chat"]


def chat(
    model: Model,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    max_new_tokens: int | None = None,
    stream: bool = False,
    **options: Any,
) -> Any:
    """Answer a conversation.

    Args:
        model: a causal model; the chat template of its tokenizer renders the conversation.
        messages: a text, or ``{"role", "content"}`` messages, the last one the user's.
        tools: descriptions of functions, for a template that renders them.
        max_new_tokens: maximum tokens of the answer; by default that of generation_config.json, or 128.
        stream: return the pieces of the answer as they are made.
        **options: see ``pretrain.inference.generate.generate``.

    Returns:
        The answer, without blanks at its ends; with ``stream`` a ``pretrain.inference.generate.Stream`` of its pieces.

    Raises:
        DataError: special tokens are typed into the text, the template refuses the conversation, or it is none.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    listed = isinstance(messages, Iterable) and not isinstance(messages, Mapping)
    session = Chat(model)
    answer = session.answer(
        session.prompt(as_messages(list(messages) if listed else messages), tools),
        max_new_tokens=answer_length(model, max_new_tokens),
        **options,
    )
    return answer if stream else "".join(answer)


class Chat:
    """Conversations with one model, which are shortened when they grow too long for it.

    The chat template of the model's tokenizer renders them.

    Raises:
        ModelError: the model has no tokenizer.
        DataError: the template cannot be used.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.template, self.ends = chat_template_of(model)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Return the ids of a conversation with the beginning of an answer.

        Raises:
            DataError: special tokens are typed into the text, or the template refuses the conversation.
        """
        described = as_tools(tools)
        asked = readable(self.template, messages, described)
        typed = typed_specials([asked, described or ()], self.template.specials)
        if typed is not None:
            raise DataError(
                f"The conversation contains {typed!r}, which is a special token of this model and would be read as the "
                "end of a turn. Write it in another way."
            )
        return prompt_ids(self.model, self.template, asked, tools=described)

    def fit(self, messages: Sequence[Message], new_tokens: int) -> tuple[list[Message], list[int]]:
        """Return the last turns of a conversation that leave room for an answer, and their ids.

        What the system says at the beginning stays, and the turns begin with one of the user. The room is that of
        ``new_tokens``, but at most a quarter of the positions of the model.

        Raises:
            DataError: the last turn alone is too long; see also `prompt`.
        """
        positions = self.model.backbone.max_length
        room = positions - min(new_tokens, positions // 4)
        kept, ids = list(messages), self.prompt(messages)
        if len(ids) > room:
            kept, ids = last_turns(self.prompt, messages, room)
        if len(ids) >= positions:
            raise DataError(
                f"The last message has {len(ids):,} tokens with what belongs to it, and the model reads {positions:,}, "
                "its answer included. Shorten it."
            )
        return kept, ids

    def answer(self, ids: Sequence[int], **options: Any) -> Stream:
        """Return the answer to a prompt in pieces; the options are those of ``generate``."""
        return Stream(self.model, ids, strip=True, **{"eos_token_id": self.ends, **options})
