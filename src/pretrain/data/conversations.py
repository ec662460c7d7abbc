"""Conversations in whatever form they are published, as lists of ``{"role", "content"}``.

Known: ``messages``; ShareGPT's ``conversations`` of ``from`` and ``value``; ``turns`` of ``speaker`` and ``utterance``;
prompt and completion; question and answer; instruction, input and output, also as ``instances`` (Self-Instruct).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.data.chat import Message
from pretrain.data.labelled import Role
from pretrain.errors import DataError

__all__ = ["CHAT_ROLES", "as_messages", "to_conversations"]

CHAT_ROLES = (
    Role(
        "messages",
        ("messages", "conversations", "conversation", "dialogue", "turns", "chat"),
        required=False,
        help="a list of messages with role and content",
    ),
    Role("system", ("system", "system_prompt"), required=False, help="what the assistant is told"),
    Role(
        "prompt",
        ("prompt", "instruction", "question", "query"),
        required=False,
        help="what the user says",
    ),
    Role("context", ("context", "input"), required=False, help="stands behind the prompt"),
    Role(
        "answer",
        ("completion", "output", "response", "answer"),
        required=False,
        help="what the assistant says",
        target=True,
    ),
    Role("instances", ("instances",), required=False, help="a list of input and output"),
)
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "customer": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "agent": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_KEYS = (("role", "content"), ("from", "value"), ("speaker", "utterance"), ("speaker", "text"))


def to_conversations(
    row: Mapping[str, Any], where: str = "", *, answers: bool = True
) -> list[list[Message]]:
    """The conversations of a row.

    Args:
        row: values by role; see ``CHAT_ROLES``.
        where: the row, for the error.
        answers: the row must have an answer; False for prediction.

    Returns:
        One conversation, or one for each of ``instances``.

    Raises:
        DataError: no form that is known.
    """
    place = f"{where}: " if where else ""
    given = row.get("messages")
    if given is not None:
        return [_with_system(row, as_messages(given, where), place)]
    prompt = row.get("prompt")
    if isinstance(prompt, list | tuple):
        start = as_messages(prompt, where)
    elif isinstance(prompt, str):
        start = [{"role": "user", "content": _joined(prompt, row.get("context"), place)}]
    else:
        raise DataError(
            f"{place}there is no conversation. A row needs messages=[{{role, content}}, ...], or a prompt with a "
            "completion; name the columns if they have other names."
        )
    start = _with_system(row, start, place)
    instances = row.get("instances")
    if isinstance(instances, list | tuple) and instances:
        found = []
        for one in instances:
            if not isinstance(one, Mapping):
                raise DataError(f"{place}instances hold {str(one)[:40]!r}, no input and output.")
            content = _joined(start[-1]["content"], one.get("input"), place)
            asked = [*start[:-1], {"role": "user", "content": content}]
            found.append(asked + _answer(one.get("output"), place, answers))
        return found
    return [start + _answer(row.get("answer"), place, answers)]


def _answer(value: Any, place: str, needed: bool) -> list[Message]:
    if value is None and not needed:
        return []
    if isinstance(value, list | tuple) and value:
        return as_messages(value, place.rstrip(": "))
    if not isinstance(value, str):
        raise DataError(
            f"{place}the answer is {value!r}, not a text. Remove the row or fill it in."
        )
    return [{"role": "assistant", "content": value}]


def _joined(prompt: str, context: Any, place: str) -> str:
    if context is None or context == "":
        return prompt
    if not isinstance(context, str):
        raise DataError(
            f"{place}the input is {type(context).__name__} {str(context)[:40]!r}, not a text."
        )
    return f"{prompt}\n\n{context}" if prompt else context


def _with_system(row: Mapping[str, Any], messages: list[Message], place: str) -> list[Message]:
    system = row.get("system")
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    if not isinstance(system, str):
        raise DataError(f"{place}the system prompt is {str(system)[:40]!r}, not a text.")
    return [{"role": "system", "content": system}, *messages]


def as_messages(value: Any, where: str = "") -> list[Message]:
    """A list of messages in one of the known spellings as ``{"role", "content"}``.

    Raises:
        DataError: it is none.
    """
    place = f"{where}: " if where else ""
    if hasattr(value, "tolist"):  # tables give arrays for lists
        value = value.tolist()
    if isinstance(value, Mapping) and all(isinstance(v, list | tuple) for v in value.values()):
        value = [
            dict(zip(value, item, strict=False)) for item in zip(*value.values(), strict=False)
        ]
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{place}a conversation is a list of messages; found {type(value).__name__} {str(value)[:60]!r}."
        )
    spoken = {str(m["speaker"]).lower() for m in value if isinstance(m, Mapping) and "speaker" in m}
    found: list[Message] = []
    for number, message in enumerate(value, start=1):
        keys = next(
            (
                k
                for k in _KEYS
                if isinstance(message, Mapping) and k[0] in message and k[1] in message
            ),
            None,
        )
        if keys is None:
            raise DataError(
                f"{place}message {number} is {str(message)[:80]!r}; a message has a role and a content."
            )
        name = str(message[keys[0]]).lower()
        role = _SPEAKERS.get(name)
        if keys[0] == "speaker" and spoken == {"user", "system"} and name == "system":
            role = "assistant"  # in dialogues of tasks the system is who answers
        if role is None:
            raise DataError(
                f"{place}message {number} is spoken by {message[keys[0]]!r}; known are {', '.join(_SPEAKERS)}."
            )
        found.append({"role": role, "content": _content(message[keys[1]], number, place)})
    return found


def _content(value: Any, number: int, place: str) -> str:
    if isinstance(value, list | tuple) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise DataError(
            f"{place}message {number} has the content {str(value)[:60]!r}, which is no text; calls of tools and "
            "pictures cannot be trained on."
        )
    return value
