"""Which characters of a rendered conversation are trained on: template shapes x conversations with repeated texts.

Each shape stands beside a function that writes the same text in pieces and says of each piece whose it is, so that the
expected spans follow from the construction; the text itself is held against transformers, and so are the spans of
templates that mark what is generated.
"""

# ruff: noqa: E501
from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from pretrain.data.chat import ChatTemplate, encode_rendered
from pretrain.data.chat_spans import SpansNotFound, assistant_spans, readable, unread_keys
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import DataError

Pieces = list[tuple[str, bool]]
Messages = list[dict[str, Any]]

MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
]  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    made = train_from_texts([*tiny.TEXTS, "User: Assistant: "], "bpe", vocab_size=400)
    added = [tokenizers.AddedToken(mark, special=True) for mark in MARKS]
    made.backend.add_special_tokens(added)
    return Tokenizer(made.backend, made.roles, made.config)


BOS, EOS = tokenizer().roles["bos"], tokenizer().roles["eos"]

# ------------------------------------------------------------------------------------------------ shapes

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chatml(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        said = m["role"] == "assistant"
        pieces += [
            (f"<|im_start|>{m['role']}\n", False),
            (m["content"] + "<|im_end|>", said),
            ("\n", False),
        ]
    return pieces


DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are good.<|im_end|>\n{% endif %}"
    + CHATML
)


def default_system(messages: Messages) -> Pieces:
    if messages[0]["role"] == "system":
        return chatml(messages)
    return [("<|im_start|>system\nYou are good.<|im_end|>\n", False), *chatml(messages)]


LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = false %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def llama2(messages: Messages) -> Pieces:
    first = messages[0]
    rest = messages[1:] if first["role"] == "system" else messages
    pieces: Pieces = []
    for i, m in enumerate(rest):
        content = m["content"]
        if i == 0 and first["role"] == "system":
            content = f"<<SYS>>\n{first['content']}\n<</SYS>>\n\n{content}"
        if m["role"] == "user":
            pieces.append((f"{BOS}[INST] {content.strip()} [/INST]", False))
        else:
            pieces.append((f" {content.strip()} {EOS}", True))
    return pieces


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def llama3(messages: Messages) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        pieces.append((m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"))
    return pieces


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] | trim + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}{{ m['content'] | trim }}{{ '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def gemma(messages: Messages) -> Pieces:
    first = messages[0]
    rest = messages[1:] if first["role"] == "system" else messages
    prefix = first["content"].strip() + "\n\n" if first["role"] == "system" else ""
    pieces: Pieces = [(BOS, False)]
    for i, m in enumerate(rest):
        role = "model" if m["role"] == "assistant" else m["role"]
        pieces.append((f"<start_of_turn>{role}\n{prefix if i == 0 else ''}", False))
        pieces += [(m["content"].strip() + "<end_of_turn>", role == "model"), ("\n", False)]
    return pieces


# The system prompt moves on to the last turn of the user, so that no text is the beginning of the next.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% set ns = namespace(last=0) %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.index0 == ns.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)


def mistral(messages: Messages) -> Pieces:
    first = messages[0]
    rest = messages[1:] if first["role"] == "system" else messages
    system = first["content"] + "\n\n" if first["role"] == "system" else ""
    last = max(i for i, m in enumerate(rest) if m["role"] == "user")
    pieces: Pieces = [(BOS, False)]
    for i, m in enumerate(rest):
        if m["role"] == "user":
            pieces.append((f"[INST] {system if i == last else ''}{m['content']}[/INST]", False))
        else:
            pieces.append((f" {m['content'].strip()}{EOS}", True))
    return pieces


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}{{ '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)


def zephyr(messages: Messages) -> Pieces:
    # The prompt ends before the line break, so that an answer begins with it.
    pieces: Pieces = []
    for m in messages:
        said = m["role"] == "assistant"
        pieces += [
            (f"<|{m['role']}|>", False),
            (f"\n{m['content']}{EOS}", said),
            ("\n", False),
        ]
    return pieces


QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set think = '' %}"
    "{% if m.reasoning_content is string %}{% set think = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set think = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or think) %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' + think.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _thoughts(m: dict[str, Any]) -> tuple[str, str]:
    content, think = m["content"], ""
    if isinstance(m.get("reasoning_content"), str):
        think = m["reasoning_content"]
    elif "</think>" in content:
        think = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    return think, content


def qwen3(messages: Messages) -> Pieces:
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    pieces: Pieces = []
    for i, m in enumerate(messages):
        pieces.append((f"<|im_start|>{m['role']}\n", False))
        content = m["content"]
        if m["role"] == "assistant":
            think, content = _thoughts(m)
            if i > last and (i == len(messages) - 1 or think):
                think = think.strip("\n")
                content = f"<think>\n{think}\n</think>\n\n" + content.lstrip("\n")
        pieces += [(content + "<|im_end|>", m["role"] == "assistant"), ("\n", False)]
    return pieces


# The prompt already sets the model thinking; the thoughts are dropped from every finished turn.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>' + content + eos_token }}{% elif m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)


def deepseek(messages: Messages) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        if m["role"] == "assistant":
            pieces += [
                ("<|assistant|>", False),
                (m["content"].split("</think>")[-1] + EOS, True),
            ]
        else:
            pieces.append((("<|user|>" if m["role"] == "user" else "") + m["content"], False))
    return pieces


# No special token ends an answer, the next one begins a turn.
PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\\n' + m.content | trim + '\\n\\n' }}"
    "{% else %}{{ '### ' + m.role + ':\\n' + m.content | trim + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


def plain(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        said = m["role"] == "assistant"
        pieces.append((f"### {'Response' if said else m['role']}:\n", False))
        pieces.append((m["content"].strip() + "\n\n", said))
    return pieces


UPPER = CHATML.replace("m['content']", "(m['content'] | upper)")


def upper(messages: Messages) -> Pieces:
    return chatml([{**m, "content": m["content"].upper()} for m in messages])


CAPITAL = CHATML.replace("m['content']", "(m['content'][:1] | upper + m['content'][1:])")


def capital(messages: Messages) -> Pieces:
    return chatml([{**m, "content": m["content"][:1].upper() + m["content"][1:]} for m in messages])


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m.content | trim ~ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def generation(messages: Messages) -> Pieces:
    trimmed = [
        {**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages
    ]
    return chatml(trimmed)


# Two blocks in a turn, and the thoughts between them are not trained on.
TWO_BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{%- generation %}{{ '\\n' ~ m.content.split('</think>')[-1] }}{% endgeneration %}"
    "{{- ' / ' }}{%- generation %}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


def two_blocks(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        if m["role"] == "assistant":
            said = "\n" + m["content"].split("</think>")[-1]
            pieces += [("<|im_start|>assistant", False), (said, True)]
            pieces += [(" / ", False), ("<|im_end|>", True)]
        else:
            pieces.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", False))
    return pieces


SHAPES: dict[str, tuple[str, Callable[[Messages], Pieces]]] = {
    "chatml": (CHATML, chatml),
    "default system": (DEFAULT_SYSTEM, default_system),
    "llama-2": (LLAMA2, llama2),
    "llama-3": (LLAMA3, llama3),
    "gemma": (GEMMA, gemma),
    "mistral": (MISTRAL, mistral),
    "zephyr": (ZEPHYR, zephyr),
    "qwen3": (QWEN3, qwen3),
    "deepseek": (DEEPSEEK, deepseek),
    "plain": (PLAIN, plain),
    "upper case": (UPPER, upper),
    "capital": (CAPITAL, capital),
    "generation": (GENERATION, generation),
    "two blocks": (TWO_BLOCKS, two_blocks),
}

WORDS = [
    *("yes", "no", "a", "ok", "user", "assistant", "system", "good or bad", "the red cat", "### Response:"),
    *("Assistant: yes", " yes", "yes\n", "\n\nno", "yes\nno\n  twice", "is it yes?", "<b>no</b>", "日本 é", "model\n"),
]  # fmt: skip
ANSWERS = [
    *WORDS,
    "<think>\nyes\n</think>\n\nno",
    "<think>\nyes\n</think>\n\nyes",
    "<think>a</think>ok",
]


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """Alternating turns, some behind a system prompt, whose texts mostly come from a small pool."""
    others = st.text(max_size=8)
    messages: Messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(st.sampled_from(WORDS))})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(st.sampled_from(WORDS) | others)})
        messages.append({"role": "assistant", "content": draw(st.sampled_from(ANSWERS) | others)})
    return messages


def merged(pieces: Pieces) -> tuple[str, list[tuple[int, int]]]:
    """The text of pieces and the spans of those that are trained on."""
    text, spans = "", []
    for piece, said in pieces:
        if said and piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


@functools.cache
def theirs() -> Any:
    from transformers import PreTrainedTokenizerFast

    roles = {f"{role}_token": name for role, name in tokenizer().roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend, **roles)


@functools.cache
def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, tokenizer().named_tokens, [BOS, EOS, *MARKS])


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=25, deadline=None)
@given(messages=conversations())
def test_spans_are_those_of_the_construction(name: str, messages: Messages) -> None:
    source, oracle = SHAPES[name]
    wanted_text, wanted = merged(oracle(messages))
    text, spans = assistant_spans(template(source), messages)
    assert text == wanted_text
    assert [text[s.first : s.end] for s in spans] == [text[a:b] for a, b in wanted]
    assert [(s.first, s.end) for s in spans] == wanted
    made = theirs().apply_chat_template(
        messages,
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=template(source).marks_answers,
    )
    ids, offsets = encode_rendered(tokenizer(), text)
    assert ids == made["input_ids"]
    if template(source).marks_answers:
        mask = [int(any(a < s.end and b > s.first for s in spans)) for a, b in offsets]
        # A character of several tokens at the end of a block counts there with its first token only.
        assert all(a >= b for a, b in zip(mask, made["assistant_masks"], strict=True))
        if text.isascii():
            assert mask == made["assistant_masks"]


# ------------------------------------------------------------------------------------------------ other conversations

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    '{% for call in m.tool_calls or [] %}{{ \'[TOOL_CALLS]{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Paris"}'}}


def said(source: str, messages: Messages, tools: Any = None) -> list[str]:
    text, spans = assistant_spans(template(source), messages, tools=tools)
    return [text[s.first : s.end] for s in spans]


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def test_calls_of_tools_are_trained_on_whole() -> None:
    messages = [
        ask("weather?"),
        answer(None, tool_calls=[CALL]),
        {"role": "tool", "content": '{"city": "Paris"}'},
        answer("let me see", tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "sun"},
        answer("sun"),
    ]
    described = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    ready = readable(template(TOOLS), messages, described)
    assert ready[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert messages[1]["tool_calls"] == [CALL] and isinstance(CALL["function"]["arguments"], str)  # type: ignore[index]
    call = '[TOOL_CALLS]{"name": "look", "arguments": {"city": "Paris"}}'
    wanted = [f"{call}<|im_end|>", f"let me see{call}{call}<|im_end|>", "sun<|im_end|>"]
    assert said(TOOLS, ready, described) == wanted
    text, _ = assistant_spans(template(TOOLS), ready, tools=described)
    assert text == theirs().apply_chat_template(
        ready, tools=described, chat_template=TOOLS, tokenize=False
    )
    # A template that takes the arguments as they are gets them as they are.
    verbatim = TOOLS.replace("arguments | tojson", "arguments")
    assert readable(template(verbatim), messages) == messages
    assert said(verbatim, messages) == wanted
    assert unread_keys(template(TOOLS), ready, described) == []
    assert unread_keys(template(CHATML.replace("m['content']", "(m['content'] or '')")), messages, described) == [
        "tool_calls",
        "tools",
    ]  # fmt: skip


# Shapes of Qwen3, gpt-oss, Command A and Gemma 4: the thoughts (or the content) before a call are written in the last turn
# alone, an answer is closed twice, the prompt is always written, results stand within the turn, before its content.
CALLS = "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
LAST_USER = "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = loop.index0 %}{% endif %}{% endfor %}"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THOUGHTS_LAST = (
    LAST_USER
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.n %}<think>"
    "{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content or '' }}"
    + CALLS
    + "<|im_end|>\n{% endfor %}"
    + ASKED
)
THOUGHTS_EMPTY = THOUGHTS_LAST.replace(
    "{{ m.content or '' }}",
    "{% if m.role == 'assistant' and loop.index0 <= ns.n %}<think></think>\n{% endif %}{{ m.content or '' }}",
)
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.tool_calls %}"
    + CALLS
    + "{% elif m.role == 'assistant' %}"
    "{{ m.content }}<|im_end|>{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}<|im_start|>assistant:"
)
RESULT_WITHIN = (
    "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
    + CALLS
    + "{% if m.tool_calls %}"
    "{% for t in messages[loop.index:] %}{% if t.role == 'tool' %}[INST]{{ t.content }}[/INST]{% endif %}{% endfor %}"
    "{% endif %}{{ m.content or '' }}<|im_end|>\n{% endif %}{% endfor %}" + ASKED
)
LOOK = "[TOOL_CALLS]look {}"


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, {"days": 3}, {}])
@pytest.mark.parametrize(
    ("source", "spans"),
    [
        (THOUGHTS_LAST, [LOOK + "<|im_end|>", "sun<|im_end|>", "<think></think>\nyes<|im_end|>"]),
        (THOUGHTS_EMPTY, ["<think></think>\n" + LOOK + "<|im_end|>", "<think></think>\nsun<|im_end|>", "<think></think>\nyes<|im_end|>"]),
        (TWO_ENDS, [LOOK + EOS, "sun<|im_end|>" + EOS, "yes<|im_end|>" + EOS]),
        (RESULT_WITHIN, [LOOK, "sun<|im_end|>", "yes<|im_end|>"]),
    ],
)  # fmt: skip
def test_calls_of_earlier_turns_are_trained_on(
    source: str, spans: list[str], arguments: dict[str, Any], content: str | None
) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    messages = [
        ask("weather?"),
        answer(content, tool_calls=[call], reasoning_content="look it up"),
        {"role": "tool", "content": "Paris sun"},
        answer("sun", reasoning_content="it says sun"),
        ask("really?"),
        answer("yes", reasoning_content=""),
    ]
    wanted = [span.replace("{}", json.dumps(arguments)) for span in spans]
    assert said(source, messages) == wanted


def test_thoughts_in_their_own_key() -> None:
    messages = [
        ask("a?"),
        answer("yes", reasoning_content="yes?"),
        ask("yes"),
        answer("yes", reasoning_content="hm"),
    ]
    wanted = ["yes<|im_end|>", "<think>\nhm\n</think>\n\nyes<|im_end|>"]
    assert said(QWEN3, messages) == wanted
    text = assistant_spans(template(QWEN3), messages)[0]
    assert text == theirs().apply_chat_template(messages, chat_template=QWEN3, tokenize=False)
    assert unread_keys(template(QWEN3), messages) == []
    # No answer is lost with the thoughts: they are what the template does not write.
    assert unread_keys(template(CHATML), messages) == ["reasoning_content"]
    assert said(QWEN3, [ask("a?"), answer("yes", thinking="hm")]) == wanted[1:]


def test_turns_of_one_role_that_are_written_as_one() -> None:
    joined = (
        "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == ns.last %}{{ '\\n\\n' + m.content }}"
        "{% else %}{% if ns.last %}{{ '<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endif %}"
        "{% set ns.last = m.role %}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    messages = [ask("a"), ask("b"), answer("a"), answer("b"), ask("b"), answer("b")]
    assert said(joined, messages) == ["a", "\n\nb<|im_end|>", "b<|im_end|>"]


def test_empty_answers_and_answers_first() -> None:
    assert said(CHATML, [ask("a"), answer(""), ask(""), answer(" ")]) == [
        "<|im_end|>",
        " <|im_end|>",
    ]
    assert said(CHATML, [answer("hello"), ask("hello"), answer("")]) == [
        "hello<|im_end|>",
        "<|im_end|>",
    ]


def test_empty_answers_where_the_system_prompt_moves_on() -> None:
    messages = [
        {"role": "system", "content": "yes"},
        ask("yes"),
        answer(""),
        ask("yes"),
        answer("yes"),
    ]
    assert said(MISTRAL, messages) == [f" {EOS}", f" yes{EOS}"]


def test_private_characters_of_a_conversation_stay() -> None:
    messages = [ask("\U000f0000"), answer("\U000f0001\U000f0000")]
    assert said(CHATML, messages) == ["\U000f0001\U000f0000<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML.replace("m['content']", "(m['content'] | length | string)"), "leaves out an answer|cannot be located"),
        (CHATML.replace("m['content']", "m['content'] | truncate(5, true)"), "leaves out an answer"),
        (CHATML.replace("m['content']", "(m['content'] if m.role == 'user' else '')"), "leaves out an answer"),
        (CHATML + "{{ messages[1].content }}", "twice|around"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_placed_are_refused_by_name(source: str, reason: str) -> None:
    messages = [ask("hello"), answer("hello to you"), ask("hello"), answer("hello to you")]
    with pytest.raises(SpansNotFound, match=f"(?i)row 7: .*({reason}).*chat_template="):
        assistant_spans(template(source), messages, "row 7")
    refusing = "{{ raise_exception('only haiku') }}"
    with pytest.raises(DataError, match="row 7: the chat template fails.*only haiku"):
        assistant_spans(template(refusing), messages, "row 7")


def test_what_a_template_does_not_read_is_named() -> None:
    messages: Messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a", "name": "Ann", "id": 7},
        answer("b", weight=0, train=False, tool_calls=[]),
        {"role": "tool", "content": "c"},
    ]
    skipping = CHATML.replace(
        "{{ '<|im_start|>'",
        "{% if m.role in ['tool', 'system'] %}{% continue %}{% endif %}{{ m.name }}{{ '<|im_start|>'",
    )
    assert unread_keys(template(skipping), messages, [{}]) == [
        "id",
        "tools",
        "messages of the role system",
        "messages of the role tool",
    ]
    whole = "{{ messages | tojson }}{{ tools | tojson }}"
    assert unread_keys(template(whole), json.loads(json.dumps(messages)), [{}]) == []


@pytest.mark.parametrize("content", [None, "", "so"])
@pytest.mark.parametrize("asked", ["<|im_start|>assistant:", "<|im_start|>", ""])
def test_the_prompt_behind_last_calls_is_not_trained_on(asked: str, content: str | None) -> None:
    """Some templates always end with a generation prompt."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "Paris"}}}
    messages = [ask("weather?"), answer(content, tool_calls=[call, call])]
    source = TWO_ENDS.removesuffix("<|im_start|>assistant:") + asked
    text, spans = assistant_spans(template(source), messages)
    written = '[TOOL_CALLS]look {"city": "Paris"}'
    assert [text[first:end] for first, end, _ in spans][-1].endswith(written * 2 + EOS)
    assert text.endswith(written * 2 + EOS + asked) and len(text) - spans[-1].end == len(asked)
