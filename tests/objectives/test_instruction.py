"""The task "chat": which tokens are targets, packed as unpacked, learning to answer and to stop, what is refused."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pretrain
import tiny
from contract import check_objective_learns, check_objective_resumes, check_sums
from pretrain.data.tables import Table, read_table
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.finetuning.rows import encode
from pretrain.inference.chat import chat as answer
from pretrain.inference.predict import rebuilt
from pretrain.nn.loss import IGNORE
from pretrain.objectives.instruction import Instruction
from pretrain.objectives.preference import Preference
from pretrain.printing import printable
from pretrain.training.precision import Precision, choose_precision
from pretrain.utils import files

ANIMALS = ["red cat", "old dog", "big fox", "sly hen", "wet pig", "fat cow", "shy owl", "odd elk"]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_from_texts([*tiny.TEXTS, "User: Assistant: ", *ANIMALS], "bpe", vocab_size=330)


def model(family: str = "llama", **options: Any) -> Any:
    settings: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "max_positions": 128,
        **({"dropout": 0.0, "attention_dropout": 0.0} if family == "gpt2" else {}),
    }  # fmt: skip
    return pretrain.build(family, None, tokenizer=copy.copy(tokenizer()), **(settings | options))


def chat(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * 4
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def conversations(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"messages": chat(f"who is the {a}?", f"a {a.split()[1]}", "is it so?", "yes")}
        for a in ANIMALS[:count]
    ]


def table(rows: Any = None) -> Table:
    return read_table(conversations() if rows is None else rows)


def test_targets_are_the_answers_and_their_ends() -> None:
    task = Instruction(model())
    rows = task.encode(table())
    tok = tokenizer()
    for example, row in zip(rows, conversations(), strict=True):
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == len(labels) and labels[-1] == IGNORE
        places = np.flatnonzero(labels != IGNORE)
        assert (labels[places] == ids[places + 1]).all()
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        wanted = [t for a in answers for t in [*tok.encode(" " + a), tok.eos_id]]
        assert labels[places].tolist() == wanted
        assert ids[0] == tok.bos_id and (ids == tok.bos_id).sum() == 1
        shown = task.show(example)
        assert len(shown) == len(ids)
    batch = task.collate([rows[i] for i in range(8)], [np.random.default_rng(0)] * 8)
    assert int(task.count(batch)) == sum(int((e["labels"] != IGNORE).sum()) for e in rows)
    assert len(batch["target_index"]) == int(task.count(batch))


@pytest.mark.parametrize(
    ("said", "stops"),
    [
        ("{{ m.content }}<eos>", True),
        ("{{ m.content }}\n", False),
        ("{% generation %}{{ m.content }}<eos>{% endgeneration %}", True),
        ("{% generation %}{{ m.content }}{% endgeneration %}<eos>", False),
    ],
)
def test_a_template_from_which_no_end_is_learnt_is_told(said: str, stops: bool) -> None:
    asked = "{% for m in messages %}{% if m.role == 'assistant' %}" + said
    source = asked + "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    rows = Instruction(model(), chat_template=source).encode(table())
    assert len(rows) == 8
    assert [len(places) for text, places in rows.remarks.items() if "stop" in text] == [8] * (
        not stops
    )


def test_end_is_learned_where_padding_is_the_same_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_PRINTED", set())
    made = model()
    tok = copy.copy(made.tokenizer)
    tok.roles = {**tok.roles, "pad": tok.roles["eos"]}
    made.tokenizer = tok
    task = Instruction(made)
    assert "also ends an answer" in capsys.readouterr().err
    assert Instruction(made) and capsys.readouterr().err == "", "it holds for every call"
    (example,) = task.encode(table(conversations(1)))
    labels = example["labels"]
    assert (labels == tok.eos_id).sum() == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_packed_equals_unpacked_and_equals_transformers(family: str, tmp_path: Path) -> None:
    made = model(family).eval()
    packed, alone = Instruction(made), Instruction(made, pack=False)
    rows = packed.encode(table())
    rngs = [np.random.default_rng(0)] * 8
    with torch.no_grad():
        one = packed(packed.collate([rows[i] for i in range(8)], rngs))
        other = alone(alone.collate([rows[i] for i in range(8)], rngs))
    assert float(one.count) == float(other.count) > 0
    torch.testing.assert_close(one.total, other.total, rtol=1e-5, atol=1e-4)
    made.save(tmp_path / "m")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tok = AutoTokenizer.from_pretrained(tmp_path / "m")
    total = 0.0
    for row, example in zip(conversations(), rows, strict=True):
        ids = tok.apply_chat_template(row["messages"], return_dict=False)
        assert ids == example["input_ids"].tolist()
        labels = torch.tensor([IGNORE, *example["labels"][:-1].tolist()])
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0]
        total += float(
            F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        )
    assert float(one.total) == pytest.approx(total, rel=1e-5)


def test_learns_answers_and_stops(tmp_path: Path) -> None:
    task = Instruction(model())
    rows = task.encode(table())
    tiny.trainer(
        tmp_path / "run", task, rows, limit="60 steps", batch_rows=8, optim={"lr": 1e-2}
    ).fit()
    asked = [{"messages": r["messages"][:1]} for r in conversations()]
    answers = list(task.predict(read_table(asked), batch_rows=3, max_new_tokens=16))
    wanted = [r["messages"][1]["content"] for r in conversations()]
    assert [a["answer"] for a in answers] == wanted
    assert answers[0]["messages"][-1] == {"role": "assistant", "content": wanted[0]}
    assert answer(task.model, asked[2]["messages"]) == wanted[2]
    assert task.preview(list(rows)[2:3], "", 0)[0].endswith(f"-> {wanted[2]}")
    assert task.preview(list(rows), asked[4]["messages"][0]["content"], 0)[0].endswith(wanted[4])
    made = task.model
    made.save(tmp_path / "m")
    loaded = pretrain.load(tmp_path / "m")
    assert loaded.tokenizer.chat_template == task.template.source
    assert answer(loaded, asked[5]["messages"], max_new_tokens=16) == wanted[5]
    config = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer().eos_id != config["pad_token_id"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tok = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tok.apply_chat_template(
        asked[1]["messages"], add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    out = theirs.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tok.decode(out, skip_special_tokens=True).strip() == wanted[1]
    assert int(out[-1]) == tok.eos_token_id  # it stopped by itself


def test_generate_says_once_that_it_uses_no_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main as cli

    task = Instruction(model())
    made = task.model
    made.generate("who is the red cat?", max_new_tokens=2)
    assert "conversations" not in capsys.readouterr().err  # it was not trained yet
    made.extra_config["pretrain"] = {"objective": task.describe()}
    made.generate("<eos>hello", max_new_tokens=2)  # a template written by hand
    assert "conversations" not in capsys.readouterr().err
    for _ in range(2):
        made.generate("who is the red cat?", max_new_tokens=2)
    said = capsys.readouterr().err
    assert said.count("generate continues the text as it stands, without the chat template") == 1
    made.save(tmp_path / "m")
    words = ["generate", str(tmp_path / "m"), "who is the red cat?", "--max_new_tokens", "4"]
    assert cli.main([*words, "--chat"]) == 0
    shown = capsys.readouterr()
    wanted = answer(made, chat("who is the red cat?"), max_new_tokens=4)
    assert shown.out == printable(wanted, lines=True) + "\n" and "conversations" not in shown.err
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("who is the red cat?") and "conversations" in shown.err


def test_figures_equal_those_by_hand() -> None:
    from pretrain.training.evaluate import evaluate_rows

    task = Instruction(model()).eval()
    rows = task.encode(table())
    precision: Precision = choose_precision("fp32", torch.device("cpu"))
    figures = evaluate_rows(task, rows, precision, batch_rows=3)
    total, hits, count = 0.0, 0, 0
    for example in rows:
        ids, labels = (torch.from_numpy(example[k]) for k in ("input_ids", "labels"))
        with torch.no_grad():
            logits = task.model({"input_ids": ids[None]})[0]
        kept = labels != IGNORE
        total += float(F.cross_entropy(logits[kept], labels[kept], reduction="sum"))
        hits += int((logits[kept].argmax(-1) == labels[kept]).sum())
        count += int(kept.sum())
    assert figures["targets"] == count
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(hits / count)


def test_contract(tmp_path: Path) -> None:
    rows = Instruction(model("gpt2")).encode(table())
    check_sums(Instruction(model("gpt2")), rows)
    check_objective_learns(lambda: Instruction(model("gpt2")), rows, tmp_path / "learns")
    check_objective_resumes(lambda: Instruction(model("gpt2")), rows, tmp_path)


def test_long_conversations_keep_whole_turns() -> None:
    made = model()
    full = Instruction(made).encode(table(conversations(1)))[0]
    short = chat("hi", "ok")
    length = len(full["input_ids"])
    task = Instruction(made, max_length=length - 1)
    rows = task.encode(table([*conversations(1), {"messages": short}]))
    assert rows.cut == [0] and len(rows) == 2 and not rows.dropped
    kept = rows[0]["input_ids"]
    assert kept[-1] == tokenizer().eos_id and (kept == full["input_ids"][: len(kept)]).all()
    assert (rows[0]["labels"] == tokenizer().eos_id).sum() == 1
    tight = Instruction(made, max_length=len(kept) - 1)
    rows = tight.encode(table([*conversations(1), {"messages": short}]))
    assert rows.cut == [0] and rows.dropped == {"the first answer does not fit": [0]}
    assert rows.owners == [1]


def test_long_conversations_are_cut_or_split_by_choice() -> None:
    made, system = model(max_positions=512), {"role": "system", "content": "the"}
    texts = [t for a in ANIMALS[:4] for t in (f"is a {a} red?", f"the {a}")]
    messages = [system, *chat(*texts)]
    halves = [
        {"messages": messages},
        {"messages": messages[:5]},
        {"messages": [system, *messages[5:]]},
    ]
    full, *parts = (example["input_ids"] for example in Instruction(made).encode(table(halves)))
    room = max(map(len, parts))
    short = {"messages": chat("hi", "ok")}

    def texts_of(long: str, room: int = room, rows: Any = None) -> tuple[list[str], Any]:
        task = Instruction(made, max_length=room, long=long)
        rows = task.encode(table(rows or [{"messages": messages}, short]))
        assert all(len(example["input_ids"]) <= room for example in rows)
        return [tokenizer().decode(example["input_ids"]) for example in rows], rows

    whole = tokenizer().decode(full)
    assert whole.startswith("System: the\nUser: is a red cat red?\nAssistant: the red cat")
    (first, hi), rows = texts_of("right")
    assert whole.startswith(first) and rows.cut == [0] and first.count("User") == 2
    (last, _), rows = texts_of("left")
    assert rows.cut == [0] and last.startswith("System: the\nUser: is a ")
    assert whole.endswith(last.removeprefix("System: the\n")) and last.count("User") == 2
    parts, rows = texts_of("split")
    assert parts == [first, last, hi] and rows.owners == [0, 0, 1] and rows.cut == [0]
    (only,), rows = texts_of("drop")
    assert only == hi and rows.dropped == {f"longer than {room} tokens": [0]} and not rows.cut
    # No turn is ever cut within; one that does not fit by itself is left out, and named.
    giant = {"messages": chat("hi", "ok", "the cat sat " * 20, "no", "hi", "red")}
    parts, rows = texts_of("split", 30, [giant])
    assert [part.rpartition(" ")[2] for part in parts] == ["ok", "red"]
    assert rows.remarks == {"turns that alone exceed 30 tokens are left out": [0]}
    assert len(texts_of("left", 30, [giant, short])[0]) == 2
    with pytest.raises(ConfigError, match="long='leff': .*'left'"):
        Instruction(made, long="leff")
    assert "long" not in Instruction(made).describe()
    assert Instruction(made, long="left").describe()["long"] == "left"


def test_weight_and_train_choose_the_turns() -> None:
    eos = tokenizer().eos_id
    turns = chat("a?", "the red cat", "b?", "the old dog")

    def learned(*others: dict[str, Any]) -> Any:
        mine = [dict(m) for m in turns]
        mine[1] |= others[0]
        mine[3] |= others[1]
        rows = Instruction(model()).encode(table([{"messages": mine}]))
        if not len(rows):
            return rows.dropped
        labels = rows[0]["labels"]
        kept = labels[labels != IGNORE]
        assert not rows.remarks and int((kept == eos).sum()) == kept.tolist().count(eos)
        return tokenizer().decode(kept).split()

    assert learned({}, {"weight": 1}) == ["the", "red", "cat", "the", "old", "dog"]
    for key, off in (("weight", 0), ("weight", 0.0), ("train", False)):
        assert learned({key: off}, {}) == ["the", "old", "dog"]
        assert learned({}, {key: off}) == ["the", "red", "cat"]
        (reason,) = learned({key: off}, {key: off})
        assert "no turn of the assistant is to be trained" in reason
    assert learned({"weight": 1, "train": False}, {"train": True}) == ["the", "old", "dog"]


def test_what_the_template_does_not_write_is_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    rows = conversations(8)
    for row in rows[:3]:
        row["messages"][0]["name"] = "Ann"
    rows[4]["messages"][1] |= {"tool_calls": [call], "content": None}
    found = Instruction(model()).encode(table(rows))
    assert found.remarks == {"the chat template does not read name": [0, 1, 2]}
    assert found.dropped == {"the chat template does not write tool_calls": [4]}
    notes: list[str] = []
    encode(Instruction(model()), table(rows), "training", 0.01, notes)
    assert "3 of 8 training rows: the chat template does not read name" in notes
    assert any("1 training rows left out, the chat template does not write" in n for n in notes)
    shown = pretrain.data(rows, "chat", model())
    assert any("does not read name" in note for note in shown.notes)


def test_rows_too_long_are_refused_with_advice_that_can_be_followed() -> None:
    made = model(max_positions=20)
    with pytest.raises(DataError) as error:
        encode(
            Instruction(made),
            table([*conversations(4), {"messages": chat("a", "b")}]),
            "x",
            0.01,
            [],
        )
    said = str(error.value)
    assert "long='split'" in said and "max_length" not in said and "max_cut=0.8" in said
    with pytest.raises(DataError, match=r"max_length=128, which this model has.*long='split'"):
        encode(
            Instruction(model(), max_length=16),
            table([*conversations(4), {"messages": chat("a", "b")}]),
            "x",
            0.01,
            [],
        )
    with pytest.raises(DataError, match=r"first answer does not fit: 4.*long='split'"):
        encode(Instruction(made, max_length=8), table(conversations(4)), "x", 0.01, [])
    for long in ("left", "split"):
        notes: list[str] = []
        lengths = Instruction(model()).encode(table(conversations(4))).lengths
        task = Instruction(model(), max_length=max(lengths) - 1, long=long)
        encode(task, table(conversations(4)), "training", 0.01, notes)
        assert any(f"and are {task.beyond}" in note for note in notes)


def test_why_an_answer_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.inference.predict import predict_with

    eos = tokenizer().roles["eos"]
    task = Instruction(model(max_positions=48))
    rows = [
        {"messages": chat("hi")},
        {"messages": chat("the cat " * 40)},
        {"messages": chat("the cat " * 40)},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {"messages": chat(f"a {eos}")},
        {"messages": chat("hi", "yes")},
    ]
    answers = predict_with(task, rows, max_new_tokens=2)
    assert [a["answer"] is None for a in answers] == [False, True, True, True, True, False]
    said = capsys.readouterr().err
    assert "4 of 6 inputs get no answer: " in said and "no text" not in said
    assert "the prompt leaves no room for an answer in 48 tokens (2)" in said
    assert "no turn to answer (1)" in said
    assert "special tokens are typed into the text (1)" in said
    left = Instruction(model(max_positions=48), long="left")
    long = [{"messages": chat("the cat " * 40, "no", "hi")}]
    (answered,) = predict_with(left, long, max_new_tokens=2)
    assert answered["answer"] is not None and len(answered["messages"]) == 4
    refusing = Instruction(model(), chat_template="{{ raise_exception('only haiku') }}")
    predict_with(refusing, rows[:1])
    assert "the chat template refuses the conversation (1)" in capsys.readouterr().err


def test_a_chat_template_may_be_the_path_of_a_file(tmp_path: Path) -> None:
    """The run keeps its content, so that it goes on from anywhere, and notices a file that was changed."""
    source = "{% for m in messages %}{{ m.role }}> {{ m.content }}{{ eos_token }}\n{% endfor %}"
    file = tmp_path / "own.jinja"
    file.write_text(source)
    for task in (Instruction, Preference):
        assert task.settled({"chat_template": str(file)}) == {"chat_template": source}
        assert task.settled({"chat_template": source}) == {"chat_template": source}
        assert task.settled({"long": "left"}) == {"long": "left"}
    rows = [{"prompt": "a", "completion": "b"}] * 3
    seen = pretrain.data(rows, "chat", model=model(), valid=0, chat_template=str(file))
    assert "assistant> b<eos>" in repr(seen)
    file.write_bytes(b"\xff{{")
    for path, why in ((tmp_path / "none.jinja", "No such file"), (file, "not UTF-8")):
        with pytest.raises(DataError, match=f"neither a Jinja template.*{why}"):
            Instruction.settled({"chat_template": str(path)})


def test_a_text_is_what_the_user_says() -> None:
    from pretrain.inference.predict import predict_with

    task = Instruction(model())
    texts = ["who is the red cat?", "[1, 2]? ", "3"]
    wanted = predict_with(task, [{"prompt": text} for text in texts], max_new_tokens=2)
    assert predict_with(task, texts[0], max_new_tokens=2) == wanted[0]
    assert wanted[0]["messages"][0] == {"role": "user", "content": texts[0]}
    for several in (texts, tuple(texts), np.array(texts)):
        assert predict_with(task, several, max_new_tokens=2) == wanted
    # A text that prints a conversation is one, as in a CSV.
    printed = json.dumps([{"role": "user", "content": texts[0]}])
    assert predict_with(task, [printed], max_new_tokens=2) == wanted[:1]


def test_shown_tokens_are_those_that_are_trained_on() -> None:
    task = Instruction(model())
    for example in task.encode(table()):
        shown = "".join(f"<{text}>" if on else text for text, on in task.show(example))
        answers = [part.split("\nUser")[0] for part in shown.split("Assistant:")[1:]]
        assert all(answer[0] == "<" and answer[-1] == ">" for answer in answers)
        assert "<" not in shown.split("Assistant:")[0].removeprefix(tokenizer().roles["bos"])


def test_trivial_baseline_is_the_frequencies_of_the_trained_tokens() -> None:
    task = Instruction(model())
    train, held_out = table(conversations(6)), table(conversations(8)[6:])
    parts = []
    for part in (train, held_out):
        labels = np.concatenate([example["labels"] for example in task.encode(part)])
        parts.append(labels[labels != IGNORE])
    shares = (np.bincount(parts[0], minlength=len(tokenizer())) + 1) / (
        len(parts[0]) + len(tokenizer())
    )
    wanted = float(-np.log(shares[parts[1]]).mean())
    assert task.trivial(train, held_out)["loss"] == pytest.approx(wanted)
    assert Instruction(model()).trivial(train, held_out)["loss"] == pytest.approx(wanted)


def test_tools_reach_the_template() -> None:
    source = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}{{ m.role + ': ' }}"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    call = {"function": {"name": "look", "arguments": {}}}
    messages = [*chat("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = {"messages": messages, "tools": json.dumps([{"name": "look", "description": None}])}
    task = Instruction(model(), chat_template=source)
    rows = task.encode(table([row]))
    labels = rows[0]["labels"]
    assert tokenizer().decode(labels[labels != IGNORE]) == " look"  # a token holds the blank, too
    assert tokenizer().decode(rows[0]["input_ids"]).startswith("look user: hi assistant: look")
    prompt = next(iter(task.encode(table([row]), targets=False)))["input_ids"]
    assert tokenizer().decode(prompt) == "look user: hi assistant: "


def test_special_tokens_in_a_text_are_no_control_tokens() -> None:
    task = Instruction(model())
    eos = tokenizer().roles["eos"]
    rows = [{"messages": chat(f"hi {eos} User: x", "no")}, {"messages": chat("hi", f"a{eos}b")}]
    found = task.encode(table([*rows, *conversations(1)]))
    assert found.dropped == {"special tokens are typed into the text": [0, 1]}
    assert found.owners == [2]
    assert next(iter(task.predict(table(rows[:1])))) == {"answer": None, "messages": None}
    with pytest.raises(DataError, match="special token"):
        answer(task.model, rows[0]["messages"][:1])


def test_conversation_without_an_answer_is_refused() -> None:
    silent = [*conversations(2), {"messages": chat("hello?")}]
    with pytest.raises(
        DataError, match=r"1 of 3 conversations have no turn of the assistant.*row 3 "
    ):
        Instruction.learn(table(silent), {})
    Instruction.learn(table(silent), {"drop_unanswered": True})
    with pytest.raises(DataError, match="row 3.*no turn of the assistant"):
        Instruction(model()).encode(table(silent))
    task = rebuilt(Instruction(model(), drop_unanswered=True), model())  # as it is recorded
    rows = task.encode(table(silent))
    assert rows.dropped == {"no turn of the assistant": [2]} and len(rows) == 2
    with pytest.raises(DataError, match="has no conversations"):
        Instruction.learn(table([{"text": "a", "label": "b"}]), {})


def test_other_heads_and_bad_templates_are_refused() -> None:
    with pytest.raises(ModelError, match="causal-lm"):
        Instruction(pretrain.build("bert", None, tokenizer=tiny.tokenizer(), num_layers=1, hidden_size=16,
                                   num_heads=2, intermediate_size=16, max_positions=16))  # fmt: skip
    with pytest.raises(DataError, match="chat_template="):
        Instruction(model(), chat_template="{% for %}")
    task = Instruction(model(), chat_template="{{ raise_exception('only haiku') }}")
    with pytest.raises(DataError, match=r"row 1 .*only haiku"):
        task.encode(table())


def test_published_data_sets_are_encoded(data_sets: Path) -> None:
    from pretrain.data.labelled import choose_columns, roles_table

    task = Instruction(model(max_positions=512), drop_unanswered=True)
    for name, most in (
        ("gsm8k/test.jsonl", 40),
        ("sgd_dialogues/dialogues_002.json.gz", 10),
        ("self_instruct_human/seed_tasks.jsonl", 40),
        ("self_instruct_human/user_oriented_instructions.jsonl", 40),
    ):
        source = read_table(data_sets / name).take(range(most))
        named = roles_table(source, choose_columns(source, Instruction.roles, {}))
        Instruction.learn(named, {})
        rows = task.encode(named)
        assert len(rows) + sum(map(len, rows.dropped.values())) >= most
        assert len(rows) > 0 and all((e["labels"] == tokenizer().eos_id).any() for e in rows)
