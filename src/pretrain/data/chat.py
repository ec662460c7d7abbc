"""Conversations: reading their published forms, and rendering them with chat templates.

A conversation is a list of ``{"role", "content"}`` messages. Read are ``messages``; ShareGPT's ``conversations`` of
``from`` and ``value``; ``turns`` of ``speaker`` and ``utterance``; prompt and completion; question and answer;
instruction, input and output, also as ``instances`` (Self-Instruct). Further keys of a message (``tool_calls``,
``reasoning_content``, ``name``) are kept for the template; ``weight`` (OpenAI) and ``train`` (Axolotl) select the turns
that are trained on. OpenAI's older ``function_call`` is read as a tool call.

A template is the Jinja program that comes with a tokenizer (``chat_template.jinja``); it is untrusted and runs in
``template_sandbox``. A rendered text already contains the special tokens that the model expects, so it is encoded by
``encode_rendered``, which adds none. ``chat_spans`` determines which of its characters belong to the assistant.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pretrain.data
from pretrain.config.spelling import option
from pretrain.data.labelled import Role, printed_messages
from pretrain.errors import DataError, TokenizerError
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer

__all__ = [
    "CHAT_ROLES", "REASONING", "ROLE_KEYS", "TOOLS", "ChatTemplate", "Message", "as_messages", "as_tools",
    "content_text", "default_template", "encode_rendered", "is_trained", "template_of_file",
    "to_conversations", "typed_specials",
]  # fmt: skip

Message = dict[str, Any]
# Keys under which data sets publish the reasoning before an answer; transformers passes the first two to a template.
REASONING = ("reasoning_content", "thinking", "reasoning")

_SOURCE_LIMIT = 1 << 20  # characters of a template
_DEFAULT = (
    "{{ bos }}"
    "{%- for message in messages %}"
    "{%- if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{- message['role'] | capitalize + ': ' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{%- if messages %}{{ '\\n' }}{% endif %}{{ 'Assistant:' }}"
    "{%- endif %}"
)


def default_template(tokenizer: Tokenizer) -> str:
    """Return a template without new tokens: roles as words, and the end-of-text token after every answer.

    It begins with the bos token if the tokenizer itself prepends one to a text.

    Raises:
        TokenizerError: the tokenizer has no end-of-text token, so a model could not learn to stop.
    """
    if tokenizer.eos_id is None:
        raise TokenizerError(
            "The tokenizer has no end-of-text token, so a model could not learn to end an answer. Set "
            '"eos_token" in tokenizer_config.json, or give a chat template with an end-of-turn token (chat_template=).'
        )
    first = tokenizer.backend.encode("a", add_special_tokens=True).ids[:1]
    begins = tokenizer.bos_id is not None and first == [tokenizer.bos_id]
    source = _DEFAULT.replace("{{ bos }}", "{{ bos_token }}" if begins else "")
    for role, name in tokenizer.roles.items():
        if tokenizer.named_tokens.get(f"{role}_token") != name:  # transformers has no such variable
            source = source.replace(f"{role}_token", repr(name))
    return source


class ChatTemplate:
    """A chat template with the special tokens of its tokenizer.

    Args:
        source: the Jinja program.
        tokens: its variables besides the messages; see ``Tokenizer.named_tokens``.
        specials: the special tokens of the tokenizer.

    Attributes:
        end: the special token that follows an answer, or None if the template ends answers with plain text.
        marks_answers: the template marks the text to train on with ``{% generation %}`` blocks.
        constants: the string literals of the template, which it may search for in a message.
        for_tools: the template for conversations with tools, if the tokenizer has one of its own (``tool_use``).

    Raises:
        DataError: the source is not a valid template.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], specials: Sequence[str] = ()
    ) -> None:
        if len(source) > _SOURCE_LIMIT:
            raise DataError(
                f"The chat template is too long ({len(source):,} characters, limit {_SOURCE_LIMIT:,}). Give another "
                "one (chat_template=)."
            )
        self.source, self.tokens = source, dict(tokens)
        # Longest first, because one token may be a prefix of another.
        self.specials = tuple(sorted((t for t in specials if t), key=len, reverse=True))
        self._sandbox = pretrain.data.template_sandbox.Sandbox()
        try:
            self._template = self._sandbox.template(source)
        except Exception as error:  # an untrusted program can raise anything
            raise DataError(
                f"The chat template cannot be used: {_said(error)}. Copy chat_template.jinja again from its origin, or "
                "give your own with chat_template=."
            ) from error
        self.marks_answers = self._sandbox.has_generation
        self.constants = self._sandbox.constants
        self.for_tools: ChatTemplate | None = None
        # The forms in which the template reads the content of a message; parts are joined for one that reads neither.
        self._reads_text: dict[str, bool] = {}
        self._reads_parts: dict[str, bool] = {}
        parts = [{"type": "text", "text": text} for text in ("the first part", ", the second")]
        for role in ("user", "assistant", "system"):
            self._reads_text[role] = self._prints(role, content_text(parts))
            self._reads_parts[role] = self._prints(role, parts)
        self.end = self._find_end()

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
        """Return the template ``source``, or else that of the tokenizer, or else the default template.

        Of several named templates, ``default`` is taken, and ``tool_use`` for conversations with tools, as transformers
        does. Without a ``default`` it is the default template, which a line says.

        Raises:
            DataError: the template cannot be used.
        """
        named = {} if source else tokenizer.named_templates
        if named and not tokenizer.chat_template:
            note(
                f"The tokenizer has the chat templates {', '.join(named)}, and none that is called default: a plain "
                "one is used where tools do not ask for tool_use.",
                once=True,
            )
        chosen = source or tokenizer.chat_template or default_template(tokenizer)
        specials = tokenizer.special_names
        tokens = tokenizer.named_tokens
        made = cls(chosen, tokens, specials)
        if "tool_use" in named:
            made.for_tools = cls(named["tool_use"], tokens, specials)
        return made

    def given(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """Return the template that renders conversations with these tools: `for_tools`, or this one."""
        return self if tools is None or self.for_tools is None else self.for_tools

    def _prints(self, role: str, content: Any) -> bool:
        """Whether the texts of a content in this form are printed for a role, and not its form."""
        turn, asked = {"role": role, "content": content}, {"role": "user", "content": "a question"}
        if role != "user":
            asked = self._formed(asked)
        messages = {"user": [turn], "system": [turn, asked]}.get(role, [asked, turn])
        try:
            text = self._sandbox.render(self._template, self._variables(messages), ("", ""))
        except Exception:  # an untrusted program can raise anything
            return False
        both_printed = "the first part" in text and "the second" in text
        return both_printed and not re.search(r"""['"]type['"]""", text)

    def _variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> dict[str, Any]:
        """Return what transformers passes to a template."""
        return {
            **self.tokens,
            "messages": messages,
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }

    def _find_end(self) -> str | None:
        answer = "an answer"
        messages = [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": answer},
        ]
        try:
            behind = self.render(messages).rpartition(answer)[2].lstrip()
        except DataError:  # the template requires another form of conversation
            return None
        return next((token for token in self.specials if behind.startswith(token)), None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        where: str = "",
        tools: Sequence[Any] | None = None,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """Return the text of a conversation, as transformers' ``apply_chat_template(tokenize=False)`` does.

        Args:
            messages: ``{"role", "content"}`` each, and further keys that the template reads.
            add_generation_prompt: append the prompt for an answer.
            where: location of the row, for error messages.
            tools: descriptions of the functions that the assistant may call.
            marks: strings to insert before and after the content of every ``{% generation %}`` block.

        Raises:
            DataError: the template fails, rejects the conversation, or exceeds the limits of the sandbox.
        """
        chosen = self.given(tools)
        formed = [chosen._formed(_as_transformers(message)) for message in messages]
        values = chosen._variables(formed, tools, add_generation_prompt)
        place = f"{where}: the" if where else "The"
        try:
            return chosen._sandbox.render(chosen._template, values, marks)
        except (pretrain.data.template_sandbox.LimitExceeded, RecursionError, MemoryError) as error:
            raise DataError(
                f"{place} chat template exceeds the limits of the sandbox: {_said(error)}. Give another template "
                "(chat_template=); this one is broken or malicious."
            ) from error
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:8])
            raise DataError(
                f"{place} chat template fails on the roles {roles}: {_said(error)}. Change the conversations to what "
                "the template expects, or give another template (chat_template=)."
            ) from error

    def _formed(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with its content in the form that the template reads, as given where it reads both."""
        content, role = message.get("content"), str(message.get("role"))
        text, parts = (
            reads.get(role, reads["user"]) for reads in (self._reads_text, self._reads_parts)
        )
        if isinstance(content, list) and not parts:
            return message | {"content": content_text(content)}
        if isinstance(content, str) and parts and not text:
            return message | {"content": [{"type": "text", "text": content}]}
        return message


def template_of_file(given: str) -> str:
    """Return a chat template as it is, and the content of a file whose path is given in place of one.

    Raises:
        DataError: it is neither a template nor a file of text.
    """
    if not given or "{" in given:  # a Jinja program, without which no message would be written
        return given
    try:
        with open(Path(given).expanduser(), encoding="utf-8") as file:
            return file.read(_SOURCE_LIMIT + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(
            f"{option('chat_template', given)} is neither a Jinja template, which has braces, nor a file that can be "
            f"read ({why}). Check the path."
        ) from error


def content_text(content: Any) -> Any:
    """Return the content of a message as text: the texts of a list of parts joined, anything else as it is."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return (text if line is None else f"line {line}: {text}")[:300].rstrip(".")


def _as_transformers(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as transformers passes it to a template: no keys with None, reasoning under both its keys."""
    given = {key: value for key, value in message.items() if value is not None}
    thoughts = next((given[key] for key in REASONING if key in given), None)
    if thoughts is None:
        return given
    return {"thinking": thoughts, **given, "reasoning_content": thoughts}


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether an assistant turn is trained on: not if ``weight`` is 0 (OpenAI) or ``train`` is false (Axolotl)."""
    return message.get("weight") != 0 and message.get("train") is not False


def encode_rendered(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a rendered conversation, and the character range of each.

    Special tokens in the text are recognised, and none is added, because the template has written all of them.

    Raises:
        TokenizerError: the text cannot be encoded, or begins with the begin-of-text token twice.
    """
    # frame_texts with a batch of one text and without the usual frame of special tokens.
    encoding = tokenizer.frame_texts([text], framed=False)[0]
    ids = list(encoding.ids)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise TokenizerError(
            f"The chat template begins a conversation with {tokenizer.roles['bos']!r} twice. Remove one of them from "
            "chat_template.jinja; models are trained on texts that begin with one."
        )
    return ids, list(encoding.offsets)


def typed_specials(values: Any, specials: Sequence[str]) -> str | None:
    """Return a special token that is typed into a conversation, or None; it would be read as the end of a turn.

    ``values`` are messages, tools, or any other nesting of strings, lists and dictionaries.
    """
    if isinstance(values, str):
        return next((token for token in specials if token and token in values), None)
    if isinstance(values, Mapping):
        values = [*values.keys(), *values.values()]
    if not isinstance(values, Sequence):
        return None
    found = (typed_specials(value, specials) for value in values)
    return next((token for token in found if token is not None), None)


# ------------------------------------------------------------------------------------------------ published forms


TOOLS = Role("tools", ("tools", "functions"), False, "functions that the assistant may call")
CHAT_ROLES = (
    Role(
        "messages", ("messages", "conversations", "conversation", "dialogue", "turns", "chat"), False,
        "a list of messages with role and content",
    ),
    Role("system", ("system", "system_prompt"), False, "the instructions to the assistant"),
    Role("prompt", ("prompt", "instruction", "question", "query"), False, "the turn of the user"),
    Role("context", ("context", "input"), False, "text that follows the prompt"),
    Role(
        "answer", ("completion", "output", "response", "answer"), False, "the turn of the assistant", target=True,
    ),
    Role("instances", ("instances",), False, "a list of objects with input and output"),
    TOOLS,
)  # fmt: skip
_SPEAKERS = {
    speaker: role
    for role, speakers in {
        "user": "human user prompter customer",
        "assistant": "gpt assistant chatgpt ai bot model agent function_call tool_call",
        "system": "system",
        "developer": "developer",
        "tool": "tool function observation ipython tool_response tool_result",
    }.items()
    for speaker in speakers.split()
}
_CALLS = (
    "function_call",
    "tool_call",
)  # roles of LLaMA-Factory and ms-swift, whose text is a tool call as JSON
ROLE_KEYS = ("role", "from", "speaker")
_PAIRS = (("role", "content"), ("from", "value"), ("speaker", "utterance"), ("speaker", "text"))
_TEXT_KEYS = ("content", "value", "utterance", "text")


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
    if isinstance(given, str):  # tables of text, such as CSV, hold it printed
        given = printed_messages(given)
    if given is not None:
        return [_with_system(row, as_messages(given, where), place)]
    prompt = row.get("prompt")
    if isinstance(prompt, list | tuple):
        start = as_messages(prompt, where)
    elif isinstance(prompt, str):
        start = [{"role": "user", "content": _joined(prompt, row.get("context"), place)}]
    else:
        raise DataError(
            f"{place}the row has no conversation. It needs messages=[{{role, content}}, ...], or a prompt with a "
            "completion; name the columns if they have other names."
        )
    start = _with_system(row, start, place)
    instances = row.get("instances")
    if isinstance(instances, list | tuple) and instances:
        found = []
        for one in instances:
            if not isinstance(one, Mapping):
                raise DataError(
                    f"{place}an entry of instances is {str(one)[:40]!r}, not an object with input and output."
                )
            content = _joined(content_text(start[-1]["content"]), one.get("input"), place)
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
            f"{place}the answer is {value!r}, not a text. Remove the row, or write its answer as a text."
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
    value = _plain(value)  # some tables hold arrays instead of lists
    if isinstance(value, Mapping) and all(isinstance(v, list) for v in value.values()):
        value = {key: items for key, items in value.items() if items}  # a key that no message has
        sizes = {key: len(items) for key, items in value.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"{place}the lists of a conversation differ in length: {sizes}.")
        value = [dict(zip(value, item, strict=True)) for item in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise DataError(
            f"{place}a conversation is a list of messages, or JSON of one; found {type(value).__name__} "
            f"{str(value)[:60]!r}. Write a row as "
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.'
        )
    spoken = {str(m["speaker"]).lower() for m in value if isinstance(m, Mapping) and "speaker" in m}
    found: list[Message] = []
    for number, message in enumerate(value, start=1):
        at = f"{place}message {number}"
        given = message if isinstance(message, Mapping) else {}
        pairs = [p for p in _PAIRS if given.get(p[0]) is not None and given.get(p[1]) is not None]
        speaker = next((k for k in ROLE_KEYS if given.get(k) is not None), None)
        text = next((k for k in _TEXT_KEYS if given.get(k) is not None), None)
        speaker, text = pairs[0] if pairs else (speaker, text)
        calls = _calls(given, str(given.get(speaker)).strip().lower(), at)
        if text is None and (calls or any(k in given for k in _TEXT_KEYS)):
            text = next((k for k in _TEXT_KEYS if k in given), "content")
        if speaker is None or text is None:
            raise DataError(
                f"{at} is {str(message)[:80]!r}; a message has a role and a content. Call them "
                f"{' or '.join(ROLE_KEYS)}, and {' or '.join(_TEXT_KEYS)}."
            )
        name = str(message[speaker]).strip().lower()
        role = _SPEAKERS.get(name)
        if speaker == "speaker" and spoken == {"user", "system"} and name == "system":
            role = "assistant"  # in task-oriented dialogues, the "system" is the assistant
        if role is None:
            raise DataError(
                f"{at} has the unknown role {message[speaker]!r}; known roles are {', '.join(_SPEAKERS)}."
            )
        called = [k for k in ("tool_calls",) if given.get(k)]  # an empty list stays as it is given
        left = ("role", speaker, text, *(("tool_calls", "function_call") if calls else called))
        others = {k: v for k, v in message.items() if k not in left and v is not None}
        turn: Message = {"role": role, "content": message.get(text), **others}
        if name in _CALLS:
            turn |= {"content": None, "tool_calls": [_call_in(turn["content"], at)]}
        elif calls:
            turn["tool_calls"] = calls
        found.append(_checked(turn, at))
    # The datasets library and parquet files give every object all keys of its column, with nulls for absent ones.
    if _filled_in(value, found):
        found = [m | {k: _absent_left_out(m[k]) for k in ("tool_calls",) if k in m} for m in found]
    return found


def _filled_in(given: Sequence[Mapping[str, Any]], read: Sequence[Message]) -> bool:
    """Return whether all messages have the same keys, some without calls, and so have the arguments of all calls."""
    calls = [call for message in read for call in message.get("tool_calls") or ()]
    arguments = [
        function.get("arguments")
        for c in calls
        if isinstance(function := c.get("function", c), Mapping)
    ]
    alike = (given, [each for each in arguments if isinstance(each, Mapping)])
    empty = any(message.get("tool_calls", ()) is None for message in given)
    return empty and all(len({frozenset(each) for each in objects}) < 2 for objects in alike)


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
            f"{place}tools are {str(value)[:60]!r}, but must be a list of function descriptions, or its JSON text."
        )
    # No key of a schema is null but the values "default" and "const", so others are absent ones; see ``as_messages``.
    kept = ("default", "const")
    return _absent_left_out(given, kept, values=(*kept, "enum", "examples")) or None


def _absent_left_out(value: Any, kept: Sequence[str] = (), values: Sequence[str] = ()) -> Any:
    """Return nested objects without the keys that are null, unless ``kept``; those in ``values`` stay as they are."""
    if isinstance(value, Mapping):
        return {
            key: item if key in values else _absent_left_out(item, kept, values)
            for key, item in value.items()
            if item is not None or key in kept
        }
    if isinstance(value, list):
        return [_absent_left_out(item, kept, values) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Return a value with nested arrays converted to lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _calls(message: Mapping[str, Any], speaker: str, at: str) -> list[Any]:
    """Return the calls of tools of a message: its ``tool_calls``, also as JSON text, or else its ``function_call``.

    The latter, OpenAI's of 2023, is read where the assistant speaks, as an object or the text of one with a name.
    Anything else there is no call, such as the mode of a request (``"auto"``).

    Raises:
        DataError: ``tool_calls`` are no list of objects.
    """
    value, older = message.get("tool_calls"), message.get("function_call")
    calls = printed_messages(value) if value and isinstance(value, str) else value or []
    if isinstance(calls, Mapping):
        calls = [{"type": "function", "function": calls}] if "name" in calls else [calls]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(
            f"{at} has the tool_calls {str(calls)[:60]!r}, which is not a list of objects."
        )
    made = []
    for call in filter(_is_call, calls):
        function = call.get("function", call)
        if isinstance(function, Mapping) and "arguments" in function:
            function = {**function, "arguments": _arguments(function)}
        made.append({**call, "function": function} if "function" in call else function)
    older = printed_messages(older) if isinstance(older, str) else older
    if not made and _SPEAKERS.get(speaker) == "assistant" and isinstance(older, Mapping):
        return [_call_in(older, at)] if older.get("name") else []
    return made


def _is_call(call: Mapping[str, Any]) -> bool:
    """Whether an entry of ``tool_calls`` is a call and no placeholder, as a column of objects has for absent ones."""
    function = call.get("function", call)
    named = not isinstance(function, Mapping) or bool(function.get("name", True))
    return named and any(call.values())


def _arguments(function: Mapping[str, Any]) -> Any:
    """Return the arguments of a call; JSON text of an empty object stands for absent ones."""
    given = function.get("arguments")
    return "{}" if given in (None, "", "null") else given


def _call_in(value: Any, at: str) -> dict[str, Any]:
    """Return a tool call that is given as ``{name, arguments}``, or as JSON text of that."""
    try:
        call = value if isinstance(value, Mapping) else json.loads(value)
        function = {"name": call["name"], "arguments": _arguments(call)}
    except (AttributeError, TypeError, ValueError, KeyError):
        raise DataError(
            f"{at} is a function call, but {str(value)[:60]!r} is not a JSON object with a name (and arguments)."
        ) from None
    return {"type": "function", "function": function}


def _checked(message: Message, at: str) -> Message:
    """Check the keys ``weight`` and ``train`` of a message, and return it with its content checked.

    Raises:
        DataError: a key has an invalid value, or the content is not text.
    """
    calls, weight, train = (message.get(key) for key in ("tool_calls", "weight", "train"))
    if weight is not None and weight not in (0, 1):
        raise DataError(f"{at} has the weight {weight!r}; it must be 0 (not trained on) or 1.")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{at} has train {train!r}; it must be true or false.")
    if train and message["role"] != "assistant":
        raise DataError(
            f"{at} has train: true and the role {message['role']}, but only turns of the assistant are trained "
            "on. Remove train from the others."
        )
    if message["content"] is None and calls:
        return message
    return message | {"content": _content(message["content"], at)}


def _content(value: Any, at: str) -> str | list[dict[str, str]]:
    """Return a text as it is, and a list of parts as parts of text, which a template may tell apart."""
    if isinstance(value, list):
        return [{"type": "text", "text": _part(part, at)} for part in value]
    if not isinstance(value, str):
        raise DataError(f"{at} has the content {str(value)[:60]!r}, which is not text.")
    return value


def _part(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise DataError(
            f"{at} has a content part of the type {kind!r}; only parts of text can be trained on. Remove such rows."
        )
    return text
