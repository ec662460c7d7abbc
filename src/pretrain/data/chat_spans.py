"""Character spans of the assistant's turns in a rendered conversation, which are the text that is trained on.

Templates with ``{% generation %}`` blocks mark these spans themselves. For any other template, the messages are
rendered a second time with probes inserted, characters of a private use area that do not occur in the conversation;
the positions of the probes in the text show where each message is. Such a rendering is used only if it equals the true
one after the probes are removed, so a template may trim, shorten, merge or reorder its input. The text is never
searched for an answer, because the same words could occur in a question.

A turn of the assistant begins at the end of the generation prompt and includes the special token that closes it.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pretrain.data.chat import REASONING, ChatTemplate, Message, content_text, is_trained
from pretrain.errors import DataError

__all__ = ["Span", "SpansNotFound", "assistant_spans", "readable", "unread_keys"]

_PROBED = ("content", *REASONING)
_OWN_KEYS = frozenset(("role", "content", "weight", "train"))
_PRIVATE = range(0xF0000, 0xFFFFE)  # code points of the supplementary private use area A
_PRIVATE_ONES = re.compile(f"[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]")


class Span(NamedTuple):
    """Characters ``first`` to ``end`` (exclusive) of the assistant's turn in message number ``message``."""

    first: int
    end: int
    message: int


class SpansNotFound(DataError):
    """The assistant's turns cannot be located in the text of a conversation.

    Args:
        reason: a clause without a full stop, by which such rows are counted.
        where: location of the row.
    """

    def __init__(self, reason: str, where: str = "") -> None:
        self.reason = reason
        super().__init__(
            f"{where + ': ' if where else ''}{reason}. Remove such rows, or give a template that prints every answer "
            "once and unchanged (chat_template=)."
        )


class _Mark(NamedTuple):
    """The position of a probe in the text without probes, and the message that it was inserted into."""

    at: int
    message: int


@dataclass(frozen=True)
class _Probing:
    """Where probes are inserted.

    Attributes:
        before, behind: before, or after, each text.
        everywhere: into all messages, not only those of the assistant.
        blanks: also into texts that are empty or only whitespace.
    """

    before: bool
    behind: bool
    everywhere: bool
    blanks: bool


# From the most to the fewest probes: a template that tests how an answer begins, the exact words of a user, or whether
# there is any text, renders differently with a probe there.
_PROBINGS = [
    _Probing(before, behind, everywhere, blanks)
    for blanks in (True, False)
    for before, behind in ((True, True), (False, True), (True, False))
    for everywhere in (True, False)
]


def assistant_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    where: str = "",
    tools: Sequence[Any] | None = None,
) -> tuple[str, list[Span]]:
    """Render a conversation and locate the assistant's turns in the text; arguments as of ``ChatTemplate.render``.

    Returns:
        The text, and the spans in text order: one for each turn of the assistant, or, with a template that marks them,
        one for each ``{% generation %}`` block.

    Raises:
        DataError: the template fails.
        SpansNotFound: an answer is missing from the text, or cannot be located in it.
    """
    template = template.given(tools)
    text = template.render(messages, where=where, tools=tools)
    if template.marks_answers:
        return text, _blocks(template, messages, text, where, tools)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return text, []
    for probing in _PROBINGS:
        reading = _Reading.of(template, messages, tools, text, probing)
        spans = None if reading is None else reading.spans(answers, where)
        if spans is not None:
            return text, spans
    raise SpansNotFound("the chat template changes an answer so that it cannot be located", where)


def _blocks(
    template: ChatTemplate,
    messages: Sequence[Message],
    text: str,
    where: str,
    tools: Sequence[Any] | None,
) -> list[Span]:
    """Return the spans of the ``{% generation %}`` blocks."""
    free = _unused(text)
    marks = (next(free), next(free))
    marked = template.render(messages, tools=tools, marks=marks)
    plain, places = _without(marked, dict.fromkeys(marks, 0))
    if plain != text:
        raise SpansNotFound(
            "the chat template writes another text when its {% generation %} blocks are marked",
            where,
        )
    edges = [mark.at for mark in places]
    spans = [Span(a, b, -1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) == len(answers):
        return [span._replace(message=i) for span, i in zip(spans, answers, strict=True)]
    # A turn may have several blocks, or none: the probes show which message a block belongs to.
    found = (_Reading.of(template, messages, tools, text, probing) for probing in _PROBINGS)
    reading = next((r for r in found if r is not None), None)
    marked_messages = [] if reading is None else reading.marks
    owners = [
        next((m.message for m in marked_messages if span.first <= m.at <= span.end), None)
        for span in spans
    ]
    if all(is_trained(messages[i]) for i in answers):  # the owner of a block makes no difference
        owners = [answers[-1] if i is None else i for i in owners]
    if None in owners:
        raise SpansNotFound(
            "the {% generation %} blocks of the chat template cannot be assigned to the answers",
            where,
        )
    return [Span(a, b, i) for (a, b, _), i in zip(spans, owners, strict=True) if i is not None]


# ------------------------------------------------------------------------------------------------ probes


def _unused(text: str) -> Iterator[str]:
    """Yield private use characters that do not occur in the text of a conversation, to use as probes."""
    used = set(_PRIVATE_ONES.findall(text))
    return (chr(code) for code in _PRIVATE if chr(code) not in used)


def _without(text: str, owners: Mapping[str, int]) -> tuple[str, list[_Mark]]:
    """Return a text without its probes, and the positions of the probes."""
    pieces, marks, at = [], [], 0
    for piece in re.split(f"([{''.join(owners)}])", text) if owners else [text]:
        if piece in owners:
            marks.append(_Mark(at, owners[piece]))
        else:
            pieces.append(piece)
            at += len(piece)
    return "".join(pieces), marks


def _probed(
    messages: Sequence[Message], text: str, constants: re.Pattern[str] | None, probing: _Probing
) -> tuple[list[Message], dict[str, int]]:
    """Return the messages with probes inserted, and the message number of each probe.

    Probes are placed inside leading and trailing whitespace, since templates trim it, and outside the string literals
    of the template, since it may split there and drop a part (``content.split("</think>")[-1]``).
    """
    free = _unused(text)
    owners: dict[str, int] = {}

    def probe(number: int) -> str:
        character = next(free, "")
        if character:
            owners[character] = number
        return character

    def around(text: str, number: int) -> str:
        core = text.strip()
        if not core:
            return text + (probe(number) if probing.blanks else "")
        first = text.index(core)
        before = probe(number) if probing.before else ""
        behind = probe(number) if probing.behind else ""
        return f"{text[:first]}{before}{core}{behind}{text[first + len(core) :]}"

    def within(given: str, number: int) -> str:
        pieces = [given] if constants is None else constants.split(given)
        # Every second piece is a string literal of the template.
        parts = [p if k % 2 or not p.strip() else around(p, number) for k, p in enumerate(pieces)]
        # The text may consist entirely of such literals, or be empty.
        return "".join(parts) if parts != pieces else around(given, number)

    found = []
    for number, message in enumerate(messages):
        changed = dict(message)
        if probing.everywhere or message["role"] == "assistant":
            for key in _PROBED:
                given = message.get(key)
                if isinstance(given, str) and (given.strip() or not message.get("tool_calls")):
                    changed[key] = within(given, number)
                elif key == "content" and isinstance(given, list):
                    changed[key] = [part | {"text": within(part["text"], number)} for part in given]
        found.append(changed)
    return found, owners


@functools.lru_cache(maxsize=16)
def _splitting(constants: frozenset[str]) -> re.Pattern[str] | None:
    words = sorted((c for c in constants if len(c.strip()) > 1), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, words))})") if words else None


# ------------------------------------------------------------------------------------------------ spans


@dataclass(frozen=True)
class _Reading:
    """A rendered conversation with the positions of its probes.

    Attributes:
        marks: positions of the probes in ``text``, in order.
        seen: cache of where a turn begins or ends within the text between two probes, mostly the same for all turns.
    """

    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Any] | None
    probing: _Probing
    text: str
    marks: list[_Mark]
    seen: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        text: str | None,
        probing: _Probing,
        add_generation_prompt: bool = False,
    ) -> _Reading | None:
        """Render with probes; return None if the template fails or its text differs from ``text``, the true one."""
        asking: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            text = template.render(messages, **asking) if text is None else text
            probed, owners = _probed(messages, text, _splitting(template.constants), probing)
            rendered = template.render(probed, **asking)
        except DataError:  # some templates reject a partial conversation
            return None
        plain, marks = _without(rendered, owners)
        return cls(template, messages, tools, probing, text, marks) if plain == text else None

    def part(self, count: int, add_generation_prompt: bool = False) -> _Reading | None:
        """Return the reading of the first ``count`` messages with the same probing, or None."""
        return _Reading.of(
            self.template, self.messages[:count], self.tools, None, self.probing, add_generation_prompt
        )  # fmt: skip

    def plain(self, count: int, add_generation_prompt: bool = False) -> str | None:
        """Return the text of the first ``count`` messages, or None if the template rejects them."""
        try:
            return self.template.render(
                self.messages[:count], tools=self.tools, add_generation_prompt=add_generation_prompt
            )
        except DataError:
            return None

    def spans(self, answers: Sequence[int], where: str) -> list[Span] | None:
        """Return the spans of these messages, or None if the probes do not locate one of them.

        Raises:
            SpansNotFound: the template omits an answer, prints answers twice or in another order, or prints an answer
                around another message.
        """
        spans: list[Span] = []
        for i in answers:
            places = [mark.at for mark in self.marks if mark.message == i]
            if not places and not self.messages[i].get("tool_calls") and self._has_text(i):
                raise SpansNotFound("the chat template leaves out an answer", where)
            first = self._first(i, places, spans)
            if first is None:
                return None
            span = Span(first, self._end(i, places, first), i)
            if span.first == span.end and self.messages[i].get("tool_calls"):
                raise SpansNotFound("the calls of an answer cannot be located", where)
            if spans and span.first < spans[-1].end:
                raise SpansNotFound(
                    "the chat template prints answers twice or in another order", where
                )
            if any(span.first < m.at < span.end and m.message != i for m in self.marks):
                raise SpansNotFound(
                    "the chat template prints an answer around another message", where
                )
            spans.append(span)
        return spans

    def _has_text(self, i: int) -> bool:
        message = self.messages[i]
        texts = (content_text(message.get("content")), *(message.get(key) for key in REASONING))
        return any(isinstance(text, str) and text.strip() for text in texts)

    def _edges(self, i: int, places: Sequence[int]) -> tuple[_Mark, int]:
        """Return the last mark before message ``i`` (message -1 is the start of the text) and the next later position.

        The next later position is that of the first mark of a later message, or the end of the text.
        """
        before = [m for m in self.marks if m.message < i and (not places or m.at <= places[0])]
        # A template may print a system prompt after later messages, where it is not next to a turn without text.
        nearest = (lambda m: m.at) if places else (lambda m: (m.message, m.at))
        last = max(before, key=nearest, default=_Mark(0, -1))
        ends = [m.at for m in self.marks if m.message > i and m.at >= max([last.at, *places[-1:]])]
        return last, min(ends, default=len(self.text))

    def _first(self, i: int, places: Sequence[int], spans: Sequence[Span]) -> int | None:
        """Return where turn ``i`` begins: after its generation prompt, or at its text if there is no prompt."""
        last, ceiling = self._edges(i, places)
        if places:
            ceiling = places[0] if self.probing.before else places[-1]
        floor = max([last.at, *(span.end for span in spans[-1:])])
        at = self._behind_prompt(i, last, floor, ceiling)
        if at is not None:
            return at
        if spans and i and spans[-1].message == i - 1:  # the template merges turns of one role
            return spans[-1].end
        return places[0] if places and self.probing.before else None

    def _behind_prompt(self, i: int, last: _Mark, floor: int, ceiling: int) -> int | None:
        """Return where the generation prompt of answer ``i`` ends, or None if not between ``floor`` and ``ceiling``."""
        role = self.messages[last.message]["role"] if last.message >= 0 else ""
        key = (role, last.message == i - 1, floor - last.at, self.text[last.at : ceiling])
        if key in self.seen:  # the same text between turns as before
            return last.at + self.seen[key]
        waiting, asked = self.plain(i), self.plain(i, add_generation_prompt=True)
        at = None
        if waiting is not None and asked is not None:
            # Assume first that the text so far is a prefix of the whole text, then that at least the part after the
            # last message is, since a template may change earlier messages.
            at = self._behind(waiting, asked, 0)
            part, whole = (self.part(i), self.part(i, True)) if at is None else (None, None)
            if part and whole and part.marks and part.marks[-1].message == last.message:
                from_last = part.marks[-1].at
                at = self._behind(part.text[from_last:], whole.text[from_last:], last.at)
            if at is not None and not floor <= at <= ceiling:
                at = None
            prompt = asked.removeprefix(waiting)
            if at is None and prompt.strip():
                # Fall back to the last occurrence of the generation prompt before the answer.
                found = self.text.rfind(prompt, floor, ceiling)
                rest = self.text[found + len(prompt) : ceiling]
                if found >= 0 and (self.probing.everywhere or not rest.strip()):
                    at = found + len(prompt)
        if at is not None:
            self.seen[key] = at - last.at
        return at

    def _behind(self, waiting: str, asked: str, start: int) -> int | None:
        """Return where a generation prompt ends in the text, or None if the text before it is not at ``start``.

        Args:
            waiting: the text before the prompt.
            asked: the text with the prompt. Its last part, by which some templates start the model's reasoning, may be
                absent from a finished turn.
            start: position of the compared part in the text.
        """
        if not self.text.startswith(waiting, start):
            return None
        at = start + len(waiting)
        if not asked.startswith(waiting):
            return at
        return at + self._common(asked[len(waiting) :], self.text[at:])

    def _end(self, i: int, places: Sequence[int], first: int) -> int:
        """Return where turn ``i`` ends: after the special token, or else the plain text, that closes it."""
        start = max([first, *places[-1:]])
        tail = self.text[start : self._edges(i, places)[1]]
        if i + 1 < len(self.messages):
            key = ("", tail)
            if places and key not in self.seen:
                self.seen[key] = len(self._closing(i, start, tail, True))
            tail = tail[: self.seen[key]] if places else self._closing(i, start, tail, False)
        end, eos = self.template.end, self.template.tokens.get("eos_token")
        if end is not None and end in tail:
            behind = tail.index(end) + len(end)
            # Some templates close an answer twice: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>.
            twice = eos is not None and eos != end and tail.startswith(eos, behind)
            return start + behind + (len(eos) if eos and twice else 0)
        if (
            eos
            and eos in tail
            and i + 1 == len(self.messages)
            and self.messages[i].get("tool_calls")
        ):
            # Behind the last turn, some templates always write a generation prompt, which is no end of its calls.
            return start + tail.rindex(eos) + len(eos)
        specials = "|".join(map(re.escape, self.template.specials))
        found = [match.end() for match in re.finditer(specials, tail)] if specials else []
        if not found:
            return start + len(tail)
        if not self.messages[i].get("tool_calls"):
            return start + found[0]
        # The tokens that frame a call are special tokens too, so the last one closes such a turn, if any does.
        return start + (len(tail) if tail[found[-1] :].strip() else found[-1])

    def _closing(self, i: int, start: int, tail: str, placed: bool) -> str:
        """Return the beginning of ``tail`` (at ``start``) that also follows turn ``i`` when it is the last message.

        ``placed`` says that probes of this turn are in the text, so that ``tail`` begins behind the last of them.
        """
        text = self.plain(i + 1)
        if (
            text is not None
            and start <= len(text) <= start + len(tail)
            and self.text.startswith(text)
        ):
            return self.text[start : len(text)]
        ended = None if text is None else self.part(i + 1)
        places = [] if ended is None else [m.at for m in ended.marks if m.message == i]
        closers = [e for e in (self.template.end, self.template.tokens.get("eos_token")) if e]
        if places and placed:
            assert ended is not None
            return tail[: self._common(ended.text[places[-1] :], tail)]
        if places:
            # Only the last turn has its thoughts, and of this one the text holds the calls of tools alone: what the
            # texts have in common is at their ends.
            assert ended is not None
            rest = ended.text[places[-1] :]
            needed = next((e for e in closers if e in rest), "")
            suffixes = (rest[k:] for k in range(len(rest)))
            common = next((s for s in suffixes if needed in s and s.strip() and s in tail), "")
            return tail[: tail.index(common) + len(common)]
        if text is not None and not placed and self.text.startswith(text[:start]):
            common = tail[: self._common(text[start:], tail)]
            if common.strip() and not any(e in common for e in closers):
                return common
        end = next((e for e in closers if e in tail), None)
        return "" if end is None else tail[: tail.index(end) + len(end)]

    def _common(self, text: str, other: str) -> int:
        """Return the length of the common prefix of two texts, in whole special tokens, words and whitespace runs."""
        specials = "|".join(map(re.escape, self.template.specials))
        cut = re.split(f"({specials})", text) if specials else [text]
        at = 0
        for piece in (word for part in cut for word in re.split(r"(\s+|<[^<>\s]*>)", part)):
            if not other.startswith(piece, at):
                break
            at += len(piece)
        return at


# ------------------------------------------------------------------------------------------------ template input


def readable(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[Message]:
    """Return the messages with the arguments of tool calls in the form that the template expects.

    OpenAI's format has them as JSON text, while most templates serialise them to JSON themselves and would encode such
    text twice. They are parsed if the template would do that, or fails on them.
    """
    given = list(messages)
    if not any(isinstance(f.get("arguments"), str) for m in given for f in _functions(m)):
        return given
    free = map(chr, _PRIVATE)
    probed, texts = copy.deepcopy(given), []
    for message in probed:
        for function in _functions(message):
            if isinstance(function.get("arguments"), str):
                function["arguments"] = next(free) + function["arguments"]
                texts.append(function["arguments"])
    try:
        written = template.render(probed, tools=tools)
    except DataError:
        written = ""
    if all(text.strip() in written for text in texts):
        return given
    return [_parsed(message) for message in given]


def _functions(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a message calls, ``{"name", "arguments"}`` each."""
    calls = message.get("tool_calls") or ()
    return [call.get("function", call) for call in calls]


def _parsed(message: Message) -> Message:
    copied = copy.deepcopy(message)
    for function in _functions(copied):
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:  # not JSON: leave it to the template
                return message
    return copied


def unread_keys(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[str]:
    """Return the parts of a conversation that do not affect its text: message keys, ``tools``, messages of a role.

    They are called, for example, ``name``, ``tools`` and ``messages of the role tool``.
    """
    template = template.given(tools)
    probe = chr(_PRIVATE[0])

    @functools.cache
    def text() -> str:
        return template.render(messages, tools=tools)

    def same(changed: Sequence[Message], given: Sequence[Any] | None = tools) -> bool:
        try:
            return template.render(changed, tools=given) == text()
        except DataError:
            return False

    extra = dict.fromkeys(
        key
        for message in messages
        for key, value in message.items()
        if key not in _OWN_KEYS and value is not None and value != [] and value != ""
    )
    unread = [
        key
        for key in extra
        # A template that does not read tool_calls may fail on a message that has only calls.
        if (key == "tool_calls" and key not in template.source)
        or same([{k: v for k, v in m.items() if k != key} for m in messages])
    ]
    if tools and same(messages, None):
        unread.append("tools")
    for role in dict.fromkeys(
        m["role"] for m in messages if m["role"] not in ("user", "assistant")
    ):
        changed = [
            {**m, "content": f"{content_text(m['content'])}{probe}"}
            if m["role"] == role and m.get("content") is not None
            else m
            for m in messages
        ]
        if changed != list(messages) and same(changed):
            unread.append(f"messages of the role {role}")
    return unread
