"""Chat templates: the text that transformers makes, the characters of the assistant in it, templates that do harm."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from pretrain.data import template_sandbox
from pretrain.data.chat import (
    ChatTemplate,
    as_messages,
    as_tools,
    content_text,
    default_template,
    encode_rendered,
    to_conversations,
    typed_specials,
)
from pretrain.data.chat_spans import assistant_spans
from pretrain.data.tables import read_table
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import DataError, TokenizerError

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = """{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in messages if message.role != 'system' %}
    {%- if (message['role'] == 'user') != (ns.count is divisibleby(2)) %}
        {{- raise_exception("user and assistant take turns") }}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' ~ message['content'] ~ '[/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' ~ message['content'] | trim ~ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' + tools | tojson(indent=2) + '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- macro turn(message, last=false) %}
{{- '<|im_start|>' ~ message.role }}
{{ message.content }}{{ '<|im_end|>' }}
{% endmacro %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
    {{- turn(message, last=loop.last) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "mistral": MISTRAL, "qwen": QWEN}
CHAT = [
    {"role": "user", "content": "the red cat?"},
    {"role": "assistant", "content": "sat on the mat."},
    {"role": "user", "content": "  and the old dog \n"},
    {"role": "assistant", "content": "looked at the log\n  twice"},
]
WITH_SYSTEM = [{"role": "system", "content": "be <b>brief</b> & kind"}, *CHAT]
MARKS = ["<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None = None, kind: str = "bpe") -> Tokenizer:
    made = train_from_texts([*tiny.TEXTS, "User: Assistant: "], kind, vocab_size=400)
    backend = made.backend
    backend.add_special_tokens([tokenizers.AddedToken(mark, special=True) for mark in MARKS])
    found = Tokenizer(backend, made.roles, made.config)
    found.chat_template = template
    return found


BPE = tokenizer()


def theirs(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for name, source in {**TEMPLATES, "default": default_template(BPE)}.items():
        mine = copy.copy(BPE)
        mine.chat_template = source
        folder = tmp_path_factory.mktemp(name)
        mine.save(folder)
        found[name] = theirs(folder)
    return found


@pytest.mark.parametrize("name", [*TEMPLATES, "default"])
@pytest.mark.parametrize("prompt", [False, True])
def test_text_equals_that_of_transformers(saved: Any, name: str, prompt: bool) -> None:
    other = saved[name]
    template = ChatTemplate.of(BPE, TEMPLATES.get(name))
    for messages in (CHAT, CHAT[:1], CHAT[:3], WITH_SYSTEM):
        mine = template.render(messages, add_generation_prompt=prompt)
        assert mine == other.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        ids = other.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert encode_rendered(BPE, mine)[0] == ids


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=2, max_size=6))
def test_any_text_equals_that_of_transformers(texts: list[str]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    roles = ("user", "assistant") * 3
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    for source in TEMPLATES.values():
        mine = ChatTemplate(source, BPE.named_tokens).render(messages)
        whole = render_jinja_template([messages], chat_template=source, **BPE.named_tokens)
        assert mine == whole[0][0]


@pytest.mark.parametrize("name", [*TEMPLATES, "default"])
def test_spans_are_the_answers_with_their_end(name: str) -> None:
    template = ChatTemplate.of(BPE, TEMPLATES.get(name))
    end = "<|im_end|>" if name in ("chatml", "qwen") else BPE.roles["eos"]
    assert template.end == end
    for messages in (CHAT, WITH_SYSTEM, CHAT[:3]):
        text, spans = assistant_spans(template, messages)
        said = [text[span.first : span.end] for span in spans]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert [text.removesuffix(end).strip() for text in said] == answers
        assert all(text.endswith(end) for text in said)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "char"])
def test_default_template_begins_once_and_ends_answers(kind: str) -> None:
    mine = tokenizer(kind=kind)
    text = ChatTemplate.of(mine).render(CHAT)
    ids, _ = encode_rendered(mine, text)
    assert ids[0] == mine.bos_id and ids.count(mine.bos_id) == 1
    assert ids.count(mine.eos_id) == 2 and ids[-1] == mine.eos_id
    without = copy.copy(mine)
    without.roles = {k: v for k, v in mine.roles.items() if k != "eos"}
    with pytest.raises(TokenizerError, match="no end-of-text token"):
        default_template(without)


def test_doubled_begin_is_refused() -> None:
    template = ChatTemplate.of(BPE, "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}")
    with pytest.raises(TokenizerError, match="twice"):
        encode_rendered(BPE, template.render(CHAT))


PARTS = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}:{% for c in m.content %}{% if c.type == 'text' %}"
    "{{ c.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}"
)
EITHER = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}[{{ c.type }}]{{ c.text }}|{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("source", [PARTS, EITHER])
def test_parts_of_a_content_reach_a_template_that_reads_them(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    messages = [
        {"role": "user", "content": parts("hello friend", " today")},
        {"role": "assistant", "content": parts("to", "day")},
        {"role": "user", "content": parts("today")},
        {"role": "assistant", "content": parts("today")},
    ]
    template = ChatTemplate.of(BPE, source)
    whole = render_jinja_template([messages], chat_template=source, **BPE.named_tokens)
    text, spans = assistant_spans(template, as_messages(messages))
    assert text == whole[0][0] and len(spans) == 2
    assert [span.message for span in spans] == [1, 3]
    assert all(text[: span.first].endswith("assistant:") for span in spans)
    assert all(text[: span.end].endswith(BPE.roles["eos"]) for span in spans)
    # A text is given as one part to a template that reads parts only, and parts are joined for one of texts.
    plain = [m | {"content": content_text(m["content"])} for m in messages]
    if source is PARTS:
        assert template.render(plain) == text
    assert ChatTemplate.of(BPE, CHATML).render(messages) == ChatTemplate.of(BPE, CHATML).render(
        plain
    )


def test_parts_are_joined_for_the_roles_and_templates_that_do_not_read_all_of_them() -> None:
    one = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' and m.content is not string %}"
        "{% for c in m.content %}{{ c.text }}{% endfor %}{% else %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    first = one.replace(
        "{% for c in m.content %}{{ c.text }}{% endfor %}", "{{ m.content[0].text }}"
    )
    parts = [{"type": "text", "text": text} for text in ("a b", " c")]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    end = BPE.roles["eos"]
    assert ChatTemplate.of(BPE, one).render(asked) == f"user:a b cassistant:a b c{end}"
    assert ChatTemplate.of(BPE, first).render(asked) == f"user:a b c{end}assistant:a b c{end}"
    text, spans = assistant_spans(ChatTemplate.of(BPE, one), asked)
    assert [text[span.first : span.end] for span in spans] == [f"a b c{end}"]


@pytest.mark.parametrize("form", ["list", "mapping", "files"])
def test_the_template_for_tools_is_that_of_transformers(tmp_path: Path, form: str) -> None:
    mine = copy.copy(BPE)
    mine.save(tmp_path / "a")
    with_tools = "tools: {{ tools | tojson }}" + CHATML
    named = {"default": CHATML, "tool_use": with_tools, "rag": "x"}
    file = tmp_path / "a" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if form == "files":
        (tmp_path / "a" / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            path = tmp_path / "a" / "additional_chat_templates" / f"{name}.jinja"
            path.write_text(named[name])
        (tmp_path / "a" / "chat_template.jinja").write_text(CHATML)
    else:
        listed = [{"name": name, "template": source} for name, source in named.items()]
        config["chat_template"] = named if form == "mapping" else listed
        file.write_text(json.dumps(config))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    opened = Tokenizer.open(tmp_path / "a")
    opened.save(tmp_path / "b")
    for made in (opened, Tokenizer.open(tmp_path / "b")):
        template = ChatTemplate.of(made)
        for offered in (None, tools):
            for folder in ("a", "b"):
                other = theirs(tmp_path / folder)
                expected = other.apply_chat_template(CHAT, tools=offered, tokenize=False)
                assert template.render(CHAT, tools=offered) == expected
                assert assistant_spans(template, CHAT, tools=offered)[0] == expected
    del named["default"]
    mine.chat_template, mine.named_templates = None, named
    assert ChatTemplate.of(mine).source == default_template(mine)
    assert ChatTemplate.of(mine).given(tools).source == with_tools
    assert ChatTemplate.of(mine, CHATML).for_tools is None


def test_template_is_carried(tmp_path: Path) -> None:
    mine = copy.copy(BPE)
    mine.chat_template = CHATML
    mine.save(tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == CHATML
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHATML
    assert Tokenizer.open(tmp_path / "a").chat_template == CHATML
    (tmp_path / "a" / "chat_template.jinja").unlink()
    assert Tokenizer.open(tmp_path / "a").chat_template == CHATML
    file = tmp_path / "a" / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    file.write_text(json.dumps(config | {"chat_template": named}))
    assert Tokenizer.open(tmp_path / "a").chat_template == "y"
    many = [{"name": str(k), "template": "x" * 100} for k in range(50_000)]
    file.write_text(json.dumps(config | {"chat_template": [*many, *named]}))
    assert Tokenizer.open(tmp_path / "a").chat_template == "y"
    file.write_text(json.dumps(config | {"chat_template": 7}))
    assert Tokenizer.open(tmp_path / "a").chat_template is None
    (tmp_path / "a" / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer.open(tmp_path / "a").chat_template == CHATML
    BPE.save(tmp_path / "b")
    assert not (tmp_path / "b" / "chat_template.jinja").exists()
    (tmp_path / "b" / "chat_template.jinja").write_bytes(b"x" * 1_000_001)
    with pytest.raises(TokenizerError, match="more than 1,000,000 bytes"):
        Tokenizer.open(tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.open(tmp_path / "b")


GROWS = "{%% set ns = namespace(x=%s) %%}{%% for i in range(64) %%}%s{%% endfor %%}{{ ns.x }}"
WILD = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(40) }}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    GROWS % ("'aaaa'", "{% set ns.x = ns.x ~ ns.x %}"),
    GROWS % ("'aaaa'", "{% set ns.x = ns.x + ns.x %}"),
    GROWS % ("'aaaa'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    GROWS % ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    GROWS % ("[1]", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    GROWS % ("[1]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "{{ 'a' * 10 ** 9 }}",
    "{{ 7 ** 100000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ '{0}{0}{0}{0}{0}'.format('a' * 1000000) }}",
    "{{ range(99999) | join('a' * 100000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).join(range(99999) | map('string')) }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "{{ 'a\\nb' | indent(10 ** 9) }}",
    "{{ [1] | tojson(indent=10 ** 9) }}",
    "{{ ([1] * 90000) | tojson(separators=('a' * 30000, ':')) }}",
    "{% set deep = namespace(x=[]) %}{% for i in range(300) %}{% set deep.x = [deep.x, [1] * 10] %}{% endfor %}"
    "{% set x %}{% for i in range(99999) %}{{ deep.x | tojson(indent=16) }}{% endfor %}{% endset %}",
    "{% set d = dict(a='b' * 100000) %}{% set x %}{% for i in range(99999) %}{{ d.items() }}{% endfor %}{% endset %}",
    "{% set f = '{0}{0}{0}{0}{0}'.format %}{{ f('a' * 1000000) }}",
    "{{ '{a}{a}{a}{a}{a}'.format_map({'a': 'a' * 1000000}) }}",
    "{% filter upper %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endfilter %}",
]


@pytest.mark.parametrize("source", WILD)
def test_template_that_runs_wild_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 100_000)
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"row 3: the chat template exceeds the limits of the sandbox: .*chat_template=",
    ):
        ChatTemplate(source, {}).render(CHAT, where="row 3")
    assert time.monotonic() - began < 5


def test_template_that_is_slow_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    slow = "{% set x = 'a' * 3000000 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(DataError, match="exceeds the limits"):
        ChatTemplate(slow, {}).render(CHAT)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for x in y %", "unexpected"),
        ("{{ x | nothing }}", "nothing"),
        ("{{ 'a' | center(10 ** 9) }}", "center"),
        ("{{ 'a'.center(10 ** 9) }}", r"str\.center"),
        ("{{ (1).to_bytes(10 ** 9, 'big') }}", "to_bytes"),
        ("{{ range(10 ** 9) | list }}", "[Rr]ange"),
        ("{{ lipsum(n=10 ** 9) }}", "lipsum"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1] }}", "unsafe"),
        ("{{ messages[0].content.format.__globals__.x }}", "unsafe|__globals__"),
        ("{% include 'x' %}", "loader"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("x" * 1_100_000, "1,100,000 characters"),
    ],
)
def test_template_that_fails_is_a_data_error(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ChatTemplate(source, {}).render(CHAT, where="row 3")


def test_rendering_changes_nothing_outside() -> None:
    messages = copy.deepcopy(CHAT)
    ChatTemplate("{% set messages = messages[1:] %}{{ messages | length }}", {}).render(messages)
    calling = [{**CHAT[1], "tool_calls": [{"name": "look"}]}]
    for change in ("dict.update(calls[0], name='x')", "calls.clear()", "calls[0].update(name='x')"):
        template = ChatTemplate("{% set calls = messages[0].tool_calls %}{{ " + change + " }}", {})
        with pytest.raises(DataError, match="fails"):
            template.render(calling)
    assert messages == CHAT and calling[0]["tool_calls"] == [{"name": "look"}]


def test_filters_and_tests_of_jinja_are_there() -> None:
    source = (
        "{{ 'a b' | wordcount }} {{ 'a b' | urlencode }} {{ '<b>x</b>' | striptags }} {{ [1, 2] | sum }} "
        "{{ dict.fromkeys(['k'], 1) | tojson(separators=(', ', '=')) }} {{ 3 is odd }} "
        "{{ ['b', 'a'] | sort | join('-') }}"
    )
    assert ChatTemplate(source, {}).render(CHAT) == '2 a%20b x 3 {"k"=1} True a-b'


def test_special_tokens_typed_into_a_text_are_seen() -> None:
    template = ChatTemplate.of(BPE, CHATML)
    assert typed_specials(CHAT, template.specials) is None
    call = {"function": {"name": "f", "arguments": {"a <|im_end|>": [1, None]}}}
    assert typed_specials([{"content": None, "tool_calls": [call]}], template.specials)
    for token in ("<|im_end|>", BPE.roles["eos"]):
        typed = [{"role": "user", "content": f"hello {token} world"}]
        assert typed_specials(typed, template.specials) == token


def test_conversations_in_every_form() -> None:
    asked = {"role": "user", "content": "q"}
    said = {"role": "assistant", "content": "a"}
    forms: list[dict[str, Any]] = [
        {"messages": [asked, said]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "messages": [
                {"speaker": "USER", "utterance": "q"},
                {"speaker": "SYSTEM", "utterance": "a"},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, said]},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"], "tool_calls": []}},
        {"prompt": "q", "answer": "a"},
        {"prompt": [asked], "answer": [said]},
        {"prompt": "q", "context": "", "answer": "a"},
        {"prompt": "", "context": "q", "answer": "a"},
        {"prompt": "q", "instances": [{"input": "", "output": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, ""]}, said]},
        {"messages": np.array([asked | {"name": None}, said | {"tool_calls": None}])},
    ]
    for form in forms:
        (found,) = to_conversations(form)
        assert [m | {"content": content_text(m["content"])} for m in found] == [asked, said], form
    kept = [asked | {"name": "Ann"}, said | {"weight": 0, "reasoning_content": "hm"}]
    assert to_conversations({"messages": kept}) == [kept]
    assert to_conversations({"prompt": kept[:1], "answer": kept[1:]}) == [kept]
    call = {"name": "look", "arguments": {"city": "Paris"}}
    made = {"role": "assistant", "content": None}
    made["tool_calls"] = [{"type": "function", "function": call}]
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "a", "weight": 1},
    ]
    assert to_conversations({"messages": turns}) == [
        [asked, made, {"role": "tool", "content": "sun"}, said | {"weight": 1}]
    ]
    without = {"role": "assistant", "tool_calls": made["tool_calls"]}
    assert to_conversations({"messages": [asked, without]}) == [[asked, made]]
    older = [asked, {"role": "assistant", "content": None, "function_call": call}]
    for turns in (
        [asked, made | {"tool_calls": json.dumps(made["tool_calls"])}],
        [asked, made | {"tool_calls": None, "function_call": json.dumps(call)}],
        [asked, {"role": "tool_call", "content": json.dumps(call)}],
        older,
    ):
        assert to_conversations({"messages": turns}) == [[asked, made]], turns
    assert to_conversations({"messages": [asked, said | {"tool_calls": []}]}) == [
        [asked, said | {"tool_calls": []}]
    ]
    for nothing in (None, "", "null"):
        empty = made | {"tool_calls": [{"function": {"name": "now", "arguments": nothing}}]}
        (turns,) = to_conversations({"messages": [asked, empty]})
        assert turns[1]["tool_calls"] == [{"function": {"name": "now", "arguments": "{}"}}]
        assert empty["tool_calls"][0]["function"]["arguments"] is nothing
    for role, name in (("role", "text"), ("from", "content"), ("speaker", "value")):
        turns = [{role: " Human ", name: "q"}, {role: "ai", name: "a"}]
        assert to_conversations({"messages": turns}) == [[asked, said]]
    described = [{"type": "function", "function": {"name": "look"}}]
    for tools in (described, json.dumps(described), np.array(described)):
        assert as_tools(tools) == described
    assert as_tools(None) is None and as_tools("") is None and as_tools([]) is None
    with pytest.raises(DataError, match="line 7: tools are 'look'"):
        as_tools("look", "line 7")
    system = {"role": "system", "content": "s"}
    assert to_conversations({"system": "s", "prompt": "q", "answer": "a"}) == [
        [system, asked, said]
    ]
    both = to_conversations({"prompt": "q", "context": "more", "answer": "a"})
    assert both[0][0]["content"] == "q\n\nmore"
    two = [{"input": "x", "output": "a"}, {"input": "y", "output": "b"}]
    assert [c[-1]["content"] for c in to_conversations({"prompt": "q", "instances": two})] == [
        "a",
        "b",
    ]
    assert to_conversations({"prompt": "q", "answer": None}, answers=False) == [[asked]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "the row has no conversation"),
        ({"messages": "hello"}, "a list of messages"),
        ({"messages": [{"role": "user"}]}, "message 1"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "'alien'"),
        ({"messages": [{"role": "user", "parts": ["x"]}]}, "Call them role or from"),
        ({"messages": {"role": ["user", "assistant"], "content": ["q"]}}, "differ in length"),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": "auto"}]},
            "has the content 'None'",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight 0.5"),
        ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "train 'no'"),
        (
            {"messages": [{"role": "user", "content": "a", "train": True}]},
            "only turns of the assis",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": ["look"]}]}, "tool_calls"),
        ({"messages": [{"from": "function_call", "value": "look()"}]}, "a function call"),
        ({"prompt": "q", "answer": None}, "the answer is None"),
        ({"prompt": "q", "answer": 3}, "the answer is 3"),
    ],
)
def test_rows_that_are_no_conversation(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"line 7: .*{said}"):
        to_conversations(row, "line 7")


def test_published_data_sets(data_sets: Path) -> None:
    dialogues = read_table(data_sets / "sgd_dialogues" / "dialogues_001.json.gz")
    first = as_messages(dialogues.row(0)["turns"])
    assert {m["role"] for m in first} == {"user", "assistant"} and first[0]["role"] == "user"
    template = ChatTemplate.of(BPE)
    _text, spans = assistant_spans(template, first)
    assert len(spans) == sum(m["role"] == "assistant" for m in first)
    tasks = read_table(data_sets / "self_instruct_human" / "seed_tasks.jsonl")
    row = {"prompt": tasks.row(1)["instruction"], "instances": tasks.row(1)["instances"]}
    (found,) = to_conversations(row)
    assert found[0]["content"].endswith("Right : Left") and found[1]["role"] == "assistant"


def test_conversations_of_a_table_of_text_are_read(tmp_path: Path) -> None:
    """CSV holds a list as JSON or as Python prints it; what is neither is refused with the form that is read."""
    turns = [{"role": "user", "content": 'it\'s "so"?'}, {"role": "assistant", "content": "yes"}]
    columns = {"role": ["user", "assistant"], "content": ['it\'s "so"?', "yes"]}
    for text in (json.dumps(turns), str(turns), f" {json.dumps(columns)}\n"):
        assert to_conversations({"messages": text}) == [turns]
    broken = (
        "[{'role': 'user'} {'role': 'assistant'}]",
        "[" * 9999,
        "{{}}",
        "[{[]: 1}]",
        "-" * 99999,
        "\0",
    )
    for text in ("user: hi", '"hi"', *broken):
        with pytest.raises(
            DataError, match="row 3: a conversation is a list of messages.*Write a row"
        ):
            to_conversations({"messages": text}, "row 3")


def test_keys_that_arrow_fills_in_are_no_arguments(tmp_path: Path) -> None:
    """A data set and a parquet file give every call, and every schema, the keys of all others with nulls."""
    datasets = pytest.importorskip("datasets")

    def row(name: str, arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "a"},
        ]
        tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
        return {"messages": turns, "tools": tools}

    rows = [row("look", {"city": "Paris"}), row("time", {"zone": "CET", "of": ["a", "b"]})]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "rows.parquet")
    made.to_json(tmp_path / "rows.jsonl")
    for source in (made, list(made), tmp_path / "rows.parquet", tmp_path / "rows.jsonl"):
        table = read_table(source)
        assert [to_conversations(r)[0] for r in table.rows()] == [r["messages"] for r in rows]
        assert [as_tools(r["tools"]) for r in table.rows()] == [r["tools"] for r in rows]
    # A null that somebody wrote is an argument, and the default of a parameter.
    given = row("look", {"city": None})
    assert to_conversations(given) == [given["messages"]]
    optional = [{"name": "look", "parameters": {"properties": {"city": {"default": None}}}}]
    assert as_tools(optional) == optional


def test_nulls_within_the_values_of_a_schema_are_kept() -> None:
    """A default, a constant, and the entries of enum and examples are values, in which a null says something."""
    value = {"x": None, "y": [{"z": None}]}
    schema = {"default": value, "const": value, "enum": ["a", None, value], "examples": [value]}
    tools: Any = [{"name": "look", "parameters": {"properties": {"city": schema}}}]
    assert as_tools(json.dumps(tools)) == tools
    absent = {"title": None, "enum": None, "examples": None}
    tools[0] |= {"description": None}
    tools[0]["parameters"]["properties"] |= {"zone": absent, "of": None}
    assert as_tools(tools) == [
        {"name": "look", "parameters": {"properties": {"city": schema, "zone": {}}}}
    ]


@pytest.mark.parametrize("speaker", ["user", "assistant"])
def test_placeholders_and_modes_are_no_calls(speaker: str) -> None:
    """A column of objects has nulls or empty texts where there is no call, and some rows the mode of the request."""
    turn = {"role": speaker, "content": "a"}
    empty = [{"name": nothing, "arguments": nothing} for nothing in (None, "")]
    for mode in ("none", "None", "null", "auto", *empty):
        given = turn | {"function_call": mode}
        assert as_messages([given]) == [given]
    wrapped = [{"id": None, "type": "function", "function": one} for one in empty]
    for calls in (empty, wrapped, [{"id": None, "function": None}], json.dumps(wrapped), empty[0]):
        assert as_messages([turn | {"tool_calls": calls}]) == [turn]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert as_messages([turn | {"tool_calls": [*wrapped, call]}]) == [turn | {"tool_calls": [call]}]
    own = {"type": "custom", "custom": {"name": "f", "input": "x"}}  # no function, but a call
    assert as_messages([turn | {"tool_calls": [own]}]) == [turn | {"tool_calls": [own]}]


def test_a_function_call_may_have_no_arguments() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    made = {"role": "assistant", "content": None, "tool_calls": [call]}
    for older in (
        {"name": "f"},
        {"name": "f", "arguments": None},
        '{"name": "f", "arguments": ""}',
    ):
        said = {"role": "assistant", "content": None, "function_call": older}
        assert as_messages([said]) == [made]
        placed = [{"function": {"name": None}}]
        assert as_messages([said | {"tool_calls": placed}]) == [made]
        asked = {"role": "user", "content": "q", "function_call": older}
        assert as_messages([asked]) == [asked]
    assert as_messages([{"from": "function_call", "value": '{"name": "f"}'}]) == [made]


def test_keys_that_belong_together_go_before_others() -> None:
    """Messages have further keys for other things, as a persona under ``role``."""
    for message in (
        {"speaker": "user", "role": "customer-id-7", "utterance": "hi"},
        {"speaker": "USER", "utterance": "hi", "from": "x"},
        {"role": "user", "from": "Ann", "content": "hi", "value": 3},
    ):
        (turn,) = as_messages([message])
        assert (turn["role"], turn["content"]) == ("user", "hi")


def test_nulls_in_calls_are_arguments_unless_all_objects_have_the_same_keys() -> None:
    def turns(*arguments: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        calls = [{"function": {"name": "look", "arguments": given}} for given in arguments]
        called = {"role": "assistant", "content": "", "tool_calls": calls}
        return [
            {"role": "user", "content": "q"} | more,
            called,
            {"role": "assistant", "content": "a", "tool_calls": None},  # as model_dump of OpenAI
        ]

    def read(messages: list[dict[str, Any]]) -> list[Any]:
        return [call["function"]["arguments"] for call in as_messages(messages)[1]["tool_calls"]]

    nulls = {"a": None, "b": 1}
    assert read(turns(nulls)) == [nulls]
    assert read(turns(nulls, {"b": 2}, tool_calls=None)) == [nulls, {"b": 2}]
    assert read(turns(nulls, {"a": 3, "b": None}, tool_calls=None)) == [{"b": 1}, {"a": 3}]
