"""Chat templates: rendering conversations as text and encoding that text.

A template is the Jinja program that comes with a tokenizer (``chat_template.jinja``); it is untrusted and runs in
``template_sandbox``. A conversation is a list of ``{"role", "content"}`` with further keys that the template may read.
A rendered text already contains the special tokens that the model expects, so it is encoded by ``encode_rendered``,
which adds none. ``chat_spans`` determines which of its characters belong to the assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.errors import DataError, TokenizerError

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer

__all__ = [
    "REASONING",
    "ChatTemplate",
    "Message",
    "default_template",
    "encode_rendered",
    "is_trained",
    "special_tokens",
    "typed_specials",
]

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


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the template variables of the tokenizer, ``{"bos_token": "<s>", ...}``, as in its saved config."""
    found = {
        key: value
        for key, value in tokenizer.config.items()
        if key.endswith("_token") and isinstance(value, str)
    }
    found |= {f"{role}_token": name for role, name in tokenizer.roles.items()}
    if "bos" in tokenizer.roles and "eos" in tokenizer.roles:
        found.setdefault("cls_token", tokenizer.roles["bos"])
        found.setdefault("sep_token", tokenizer.roles["eos"])
    return found


def default_template(tokenizer: Tokenizer) -> str:
    """Return a template without new tokens: roles as words, and the end-of-text token after every answer.

    It begins with the bos token if the tokenizer itself prepends one to a text.

    Raises:
        TokenizerError: the tokenizer has no end-of-text token, so a model could not learn to stop.
    """
    if tokenizer.eos_id is None:
        raise TokenizerError(
            "The tokenizer has no end-of-text token, so no answer could end. Name one in tokenizer_config.json "
            '("eos_token"), or give a chat template with its own end-of-turn token.'
        )
    first = tokenizer.backend.encode("a", add_special_tokens=True).ids[:1]
    begins = tokenizer.bos_id is not None and first == [tokenizer.bos_id]
    return _DEFAULT.replace("{{ bos }}", "{{ bos_token }}" if begins else "")


class ChatTemplate:
    """A chat template with the special tokens of its tokenizer.

    Args:
        source: the Jinja program.
        tokens: its variables besides the messages; see ``special_tokens``.
        specials: the special tokens of the tokenizer.

    Attributes:
        end: the special token that follows an answer, or None if the template ends answers with plain text.
        marks_answers: the template marks the text to train on with ``{% generation %}`` blocks.
        constants: the string literals of the template, which it may search for in a message.

    Raises:
        DataError: the source is not a valid template.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], specials: Sequence[str] = ()
    ) -> None:
        from pretrain.data.template_sandbox import Sandbox

        if len(source) > _SOURCE_LIMIT:
            raise DataError(
                f"The chat template has {len(source):,} characters; that is none. At most {_SOURCE_LIMIT:,} are read."
            )
        self.source, self.tokens = source, dict(tokens)
        # Longest first, because one token may be a prefix of another.
        self.specials = tuple(sorted((t for t in specials if t), key=len, reverse=True))
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.template(source)
        except Exception as error:  # an untrusted program can raise anything
            raise DataError(
                f"The chat template cannot be used: {_said(error)}. Copy chat_template.jinja again from its origin, or "
                "give your own with chat_template=."
            ) from error
        self.marks_answers = self._sandbox.has_generation
        self.constants = self._sandbox.constants
        self.end = self._find_end()

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
        """Return the template ``source``, or else that of the tokenizer, or else the default template."""
        chosen = source or tokenizer.chat_template or default_template(tokenizer)
        inverse = {index: name for name, index in tokenizer.vocab.items()}
        specials = [inverse[i] for i in tokenizer.special_ids if i in inverse]
        return cls(chosen, special_tokens(tokenizer), specials)

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
        from pretrain.data.template_sandbox import Runaway

        values = {
            **self.tokens,
            "messages": [_as_transformers(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        place = f"{where}: the" if where else "The"
        try:
            return self._sandbox.render(self._template, values, marks)
        except (Runaway, RecursionError, MemoryError) as error:
            raise DataError(
                f"{place} chat template runs wild: {_said(error)}. Use another template (chat_template=); this one is "
                "broken, or made to do harm."
            ) from error
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:8])
            raise DataError(
                f"{place} chat template fails on the roles {roles}: {_said(error)}. Bring the conversations into the "
                "form that it asks for, or give another template (chat_template=)."
            ) from error


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
            "chat_template.jinja; a model knows only texts that begin once."
        )
    return ids, list(encoding.offsets)


def typed_specials(values: Any, specials: Sequence[str]) -> str | None:
    """Return a special token that is typed into a conversation, or None; it would be read as the end of a turn.

    Args:
        values: messages, tools, or any other nesting of strings, lists and dictionaries.
        specials: the special tokens.
    """
    if isinstance(values, str):
        return next((token for token in specials if token and token in values), None)
    if isinstance(values, Mapping):
        values = [*values.keys(), *values.values()]
    if not isinstance(values, Sequence):
        return None
    found = (typed_specials(value, specials) for value in values)
    return next((token for token in found if token is not None), None)
