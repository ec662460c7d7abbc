"""Chat templates: conversations as text, and the ids of that text.

A template is the Jinja program that comes with a tokenizer (``chat_template.jinja``); it is a stranger's and runs in
``template_sandbox``. A conversation is a list of ``{"role", "content"}`` with further keys that the template may read.
A rendered text holds the special tokens that the model expects, so it is encoded in one place, ``encode_rendered``,
and nothing is put around it there. Which of its characters the assistant says, ``chat_spans`` finds out.
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
# The names under which the thoughts before an answer are published; transformers gives a template the first two.
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
    """What a template sees of the tokenizer, ``{"bos_token": "<s>", ...}``, as the saved tokenizer will have it."""
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
    """A template that needs no new tokens: roles as words, and the end-of-text token after every answer.

    It begins with the token that the tokenizer itself puts before a text, if there is one.

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
        tokens: what it sees besides the messages; see ``special_tokens``.
        specials: the special tokens of the tokenizer.

    Attributes:
        end: the special token that follows an answer, or None where a template ends it with plain text.
        marks_answers: the template itself says what is trained on, in ``{% generation %}`` blocks.
        constants: the strings that the template spells, which it may look for in a message.

    Raises:
        DataError: the source is no template.
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
        # The longest first: one may be the beginning of another.
        self.specials = tuple(sorted((t for t in specials if t), key=len, reverse=True))
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.template(source)
        except Exception as error:  # a stranger's program fails in every way
            raise DataError(
                f"The chat template cannot be used: {_said(error)}. Copy chat_template.jinja again from its origin, or "
                "give your own with chat_template=."
            ) from error
        self.marks_answers = self._sandbox.has_generation
        self.constants = self._sandbox.constants
        self.end = self._find_end()

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
        """The template of a tokenizer, ``source`` instead of it, or the default where there is none."""
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
        except DataError:  # it asks for another form of conversation
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
        """The text of a conversation, as transformers' ``apply_chat_template(tokenize=False)`` gives it.

        Args:
            messages: ``{"role", "content"}`` each, and what else the template reads.
            add_generation_prompt: end with what an answer begins after.
            where: the row, for the error.
            tools: descriptions of the functions that the assistant may call.
            marks: what to put before and behind every ``{% generation %}`` block.

        Raises:
            DataError: the template fails, refuses the conversation, or runs wild.
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
    """A message as transformers hands it to a template: no key without a value, thoughts under both their names."""
    given = {key: value for key, value in message.items() if value is not None}
    thoughts = next((given[key] for key in REASONING if key in given), None)
    if thoughts is None:
        return given
    return {"thinking": thoughts, **given, "reasoning_content": thoughts}


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether a turn of the assistant is trained on: not with ``weight`` 0 (OpenAI) or ``train`` false (Axolotl)."""
    return message.get("weight") != 0 and message.get("train") is not False


def encode_rendered(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a rendered conversation, and the characters that each comes from.

    Special tokens in the text are read as such, and none is added: what a template wrote is what the model sees.

    Raises:
        TokenizerError: the text cannot be encoded, or begins with the begin-of-text token twice.
    """
    # One text in a batch of one: the tokenizer's own function reads it, without the frame that texts get.
    encoding = tokenizer.frame_texts([text], framed=False)[0]
    ids = list(encoding.ids)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise TokenizerError(
            f"The chat template begins a conversation with {tokenizer.roles['bos']!r} twice. Remove one of them from "
            "chat_template.jinja; a model knows only texts that begin once."
        )
    return ids, list(encoding.offsets)


def typed_specials(values: Any, specials: Sequence[str]) -> str | None:
    """A special token that somebody typed into a conversation, or None: it would be read as the end of a turn.

    Args:
        values: messages, tools, or anything else of texts, lists and dictionaries.
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
