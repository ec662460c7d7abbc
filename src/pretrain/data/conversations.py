"""Conversion of the published forms of conversations into lists of ``{"role", "content"}`` messages.

Supported: ``messages``; ShareGPT's ``conversations`` of ``from`` and ``value``; ``turns`` of ``speaker`` and
``utterance``; prompt and completion; question and answer; instruction, input and output, also as ``instances``
(Self-Instruct).

Further keys of a message (``tool_calls``, ``reasoning_content``, ``name``) are kept for the template. ``weight``
(OpenAI) and ``train`` (Axolotl) select the turns that are trained on; see ``chat.is_trained``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from pretrain.data.chat import Message
from pretrain.data.labelled import Role
from pretrain.errors import DataError

__all__ = ["CHAT_ROLES", "TOOLS", "as_messages", "as_tools", "to_conversations"]

TOOLS = Role(
    "tools",
    ("tools", "functions"),
    required=False,
    help="descriptions of the functions that the assistant may call",
)

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
    TOOLS,
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
    "function_call": "assistant",  # LLaMA-Factory: the value is the tool call
}
_KEYS = (("role", "content"), ("from", "value"), ("speaker", "utterance"), ("speaker", "text"))


def to_conversations(
    row: Mapping[str, Any], where: str = "", *, answers: bool = True
) -> list[list[Message]]:
    """Return the conversations of a row.

    Args:
        row: values by role; see ``CHAT_ROLES``.
        where: location of the row, for error messages.
        answers: the row must have an answer; False for prediction.

    Returns:
        One conversation, or one for each of ``instances``.

    Raises:
        DataError: the row is in no supported form.
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
    """Return a list of messages in one of the supported spellings as ``{"role", "content"}``.

    Raises:
        DataError: the value is no such list.
    """
    place = f"{where}: " if where else ""
    if hasattr(value, "tolist"):  # some tables hold arrays instead of lists
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
        at = f"{place}message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"{at} is {str(message)[:80]!r}; a message has a role and a content.")
        keys = next((pair for pair in _KEYS if pair[0] in message and pair[1] in message), None)
        if keys is None and "role" in message and message.get("tool_calls"):
            keys = ("role", "content")
        if keys is None:
            raise DataError(f"{at} is {str(message)[:80]!r}; a message has a role and a content.")
        name = str(message[keys[0]]).lower()
        role = _SPEAKERS.get(name)
        if keys[0] == "speaker" and spoken == {"user", "system"} and name == "system":
            role = "assistant"  # in task-oriented dialogues, the "system" is the assistant
        if role is None:
            raise DataError(
                f"{at} is spoken by {message[keys[0]]!r}; known are {', '.join(_SPEAKERS)}."
            )
        others = {k: _plain(v) for k, v in message.items() if k not in keys and v is not None}
        turn: Message = {"role": role, "content": message.get(keys[1]), **others}
        if name == "function_call":
            turn |= {"content": None, "tool_calls": [_call_in(turn["content"], at)]}
        found.append(_checked(turn, at))
    return found


def as_tools(value: Any, where: str = "") -> list[Any] | None:
    """Return the functions that the assistant may call as a list, or None; JSON text is parsed.

    Raises:
        DataError: the value is not a list.
    """
    place = f"{where}: " if where else ""
    given = value
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            given = json.loads(given) if given.strip() else None
    given = _plain(given)
    if given is not None and not isinstance(given, list):
        raise DataError(
            f"{place}tools are {str(value)[:60]!r}; they are a list of descriptions of functions, or JSON text of one."
        )
    return given or None


def _plain(value: Any) -> Any:
    """Return a value with nested arrays converted to lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _call_in(value: Any, at: str) -> dict[str, Any]:
    """Parse a tool call that is given as JSON text."""
    try:
        call = json.loads(value)
        return {
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
    except (TypeError, ValueError, KeyError):
        raise DataError(
            f"{at} is a call of a function, {str(value)[:60]!r}, but no JSON object with a name and arguments."
        ) from None


def _checked(message: Message, at: str) -> Message:
    """Check the keys ``tool_calls``, ``weight`` and ``train`` of a message, and return it with its content as text.

    Raises:
        DataError: a key has an invalid value, or the content is not text.
    """
    calls, weight, train = (message.get(key) for key in ("tool_calls", "weight", "train"))
    if calls and not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{at} has the tool_calls {str(calls)[:60]!r}; they are a list of objects.")
    if weight is not None and weight not in (0, 1):
        raise DataError(f"{at} has the weight {weight!r}; it must be 0 (not trained on) or 1.")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{at} has train {train!r}; it must be true or false.")
    if train and message["role"] != "assistant":
        raise DataError(
            f"{at} has train: true, but is spoken by the {message['role']}. Only turns of the assistant are trained "
            "on; remove train from the others."
        )
    if message["content"] is None and calls:
        return message
    return message | {"content": _content(message["content"], at)}


def _content(value: Any, at: str) -> str:
    """Return a text as it is, or the text parts of a list concatenated, as templates print them."""
    value = _plain(value)
    if isinstance(value, list):
        return "".join(_part(part, at) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{at} has the content {str(value)[:60]!r}, which is no text.")
    return value


def _part(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise DataError(
            f"{at} has a part of the type {kind!r}, which is no text; only texts can be trained on. Remove such rows."
        )
    return text
