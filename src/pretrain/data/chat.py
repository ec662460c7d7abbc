"""Chat templates: conversations as text, the tokens of the assistant in it, and the ids of both.

A template is the Jinja program that comes with a tokenizer (``chat_template.jinja``); it is a stranger's and runs in
``template_sandbox``. A conversation is a list of ``{"role", "content"}``. A rendered text holds the special tokens that
the model expects, so it is encoded in one place, ``encode_rendered``, and nothing is put around it there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.errors import DataError, TokenizerError

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Message",
    "assistant_spans",
    "default_template",
    "encode_rendered",
    "special_tokens",
    "typed_specials",
]

Message = dict[str, str]

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
    ) -> str:
        """The text of a conversation, as transformers' ``apply_chat_template(tokenize=False)`` gives it.

        Args:
            messages: ``{"role", "content"}`` each.
            add_generation_prompt: end with what an answer begins after.
            where: the row, for the error.

        Raises:
            DataError: the template fails, refuses the conversation, or runs wild.
        """
        from pretrain.data.template_sandbox import Runaway

        values = {
            **self.tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        place = f"{where}: the" if where else "The"
        try:
            return self._sandbox.render(self._template, values)
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


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Message], where: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and which characters of it the assistant says.

    A turn of the assistant begins where the prompt for it ends, and includes the special token behind it. It is found
    by rendering what comes before; where a template writes earlier turns differently later on (one that strips their
    thoughts), each answer is looked for in the whole text.

    Args:
        template: renders the conversation.
        messages: the conversation.
        where: the row, for the error.

    Returns:
        The text, and (first, end) of each turn of the assistant.

    Raises:
        DataError: the template fails, or an answer is not in its text.
    """
    whole = template.render(messages, where=where)
    spans: list[tuple[int, int]] = []
    at = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _by_prefix(template, messages, i, whole)
        if span is None or span[0] < at:
            span = _by_content(template, message["content"], whole, at)
        if span is None:
            raise DataError(
                f"{where + ': ' if where else ''}answer {len(spans) + 1} cannot be found in what the chat template "
                f"makes of the conversation: {message['content'][:60]!r}. The template rewrites answers; give one that "
                "prints them as they are (chat_template=)."
            )
        spans.append(span)
        at = span[1]
    return whole, spans


def _by_prefix(
    template: ChatTemplate, messages: Sequence[Message], i: int, whole: str
) -> tuple[int, int] | None:
    """Where turn ``i`` stands, if the text only ever grows."""
    try:
        before = template.render(messages[:i], add_generation_prompt=True)
        if not whole.startswith(before):  # the prompt is no part of the finished turn
            before = template.render(messages[:i])
        after = whole if i + 1 == len(messages) else template.render(messages[: i + 1])
    except DataError:  # some templates refuse a part of a conversation
        return None
    text = messages[i]["content"].strip()
    turn = after[len(before) :]
    if not (whole.startswith(after) and after.startswith(before) and text in turn):
        return None
    # What follows the end-of-turn token, a line break mostly, is not said by the model.
    behind = turn.rfind(text) + len(text) if text else 0
    ends = [at + len(t) for t in template.specials if (at := turn.find(t, behind)) >= 0]
    return len(before), len(before) + min(ends, default=len(turn))


def _by_content(
    template: ChatTemplate, content: str, whole: str, at: int
) -> tuple[int, int] | None:
    """Where an answer, or what follows its thoughts, stands in the text from ``at`` on."""
    for text in (content.strip(), content.rpartition("</think>")[2].strip()):
        first = whole.find(text, at) if text else -1
        if first >= 0:
            end = first + len(text)
            blanks = len(whole) - end - len(whole[end:].lstrip())
            follows = template.end and whole.startswith(template.end, end + blanks)
            return first, end + blanks + len(template.end or "") if follows else end
    return None


def encode_rendered(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a rendered conversation, and the characters that each comes from.

    Special tokens in the text are read as such, and none is added: what a template wrote is what the model sees.

    Raises:
        TokenizerError: the text cannot be encoded, or begins with the begin-of-text token twice.
    """
    try:
        # Truncation or padding that a tokenizer.json asks for is not meant for training.
        found = _bare(tokenizer).encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises plain Exception, and panics as another class
        raise TokenizerError(
            f"A conversation cannot be encoded: {error}. Give strings without halves of surrogate pairs."
        ) from error
    ids = list(found.ids)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise TokenizerError(
            f"The chat template begins a conversation with {tokenizer.roles['bos']!r} twice. Remove one of them from "
            "chat_template.jinja; a model knows only texts that begin once."
        )
    return ids, list(found.offsets)


@functools.lru_cache(maxsize=4)
def _bare(tokenizer: Tokenizer) -> Any:
    backend = tokenizer.backend
    if backend.truncation is None and backend.padding is None:
        return backend
    import tokenizers

    copied = tokenizers.Tokenizer.from_str(backend.to_str())
    copied.no_truncation()
    copied.no_padding()
    return copied


def typed_specials(messages: Sequence[Message], specials: Sequence[str]) -> str | None:
    """A special token that somebody typed into a conversation, or None: it would be read as the end of a turn."""
    for message in messages:
        for token in specials:
            if token and token in message["content"]:
                return token
    return None
