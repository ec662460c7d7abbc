"""Answers to conversations: what the model reads, what is left out, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pretrain
from inference import chatty
from pretrain.errors import DataError
from pretrain.inference.chat import Chat, chat
from pretrain.inference.generate import Stream


def test_an_answer_whole_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chatty.talker()
    asked = chatty.say(monkeypatch, "\n so it is. ")
    assert chat(model, "is it?") == model.chat("is it?") == "so it is."
    stream = model.chat("is it?", stream=True)
    assert isinstance(stream, Stream)
    pieces = list(stream)
    assert "".join(pieces) == "so it is." and len(pieces) > 3 and stream.finish_reason == "stop"
    assert set(chatty.texts(asked)) == {"<user>is it?<assistant>"}


def test_an_answer_ends_before_a_stop_text(monkeypatch: pytest.MonkeyPatch) -> None:
    chatty.say(monkeypatch, "yes. User: and")
    model = chatty.talker()
    assert chat(model, "a", stop="User:") == "yes."
    model.generation_config["stop_strings"] = ["s."]
    assert chat(model, "a") == "ye"


def test_asking_leaves_the_ends_of_the_checkpoint_and_obeys_all_of_them(tmp_path: Path) -> None:
    model = chatty.talker()
    assert model.tokenizer is not None and model.tokenizer.eos_id is not None
    ends = [model.tokenizer.eos_id, 7]
    model.generation_config |= {"eos_token_id": ends, "pad_token_id": 3, "max_new_tokens": 5}
    before = dict(model.generation_config)
    end = {"sequence_bias": [[[7], 99.0]]}
    answer = chat(model, "a", stream=True, **end)
    assert list(answer) == ["#"] and (answer.new_tokens, answer.finish_reason) == (1, "stop")
    long = chat(model, "a", stream=True, sequence_bias=[[[8], 99.0]])
    assert len(list(long)) <= 5 and (long.new_tokens, long.finish_reason) == (5, "length")
    assert chat(model, "a", stream=True, max_new_tokens=2).new_tokens <= 2
    assert model.generation_config == before and model.generate([5], **end) == [5, 7]
    # A model that is trained on conversations ends at the same ids, and at its template's end.
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tuned = pretrain.finetune(
        model, [{"messages": turns}] * 12, task="chat", out=tmp_path, epochs=1, quiet=True, valid=0
    )
    assert pretrain.load(tuned.path, quiet=True).generation_config.items() >= before.items()


def test_a_long_conversation_keeps_its_last_turns_and_the_system_prompt() -> None:
    session = Chat(chatty.talker(256))
    lead = [{"role": "system", "content": "short"}]
    turns = [
        {"role": role, "content": f"{n} " + "x" * 20}
        for n in range(9)
        for role in ("user", "assistant")
    ]
    asked = [*lead, *turns, {"role": "user", "content": "why?"}]
    kept, ids = session.fit(asked, 30)
    assert 3 < len(kept) < len(asked) and kept[0] == lead[0] and kept[1]["role"] == "user"
    assert kept[1:] == asked[len(asked) - len(kept) + 1 :] and ids == session.prompt(kept)
    assert len(ids) <= 256 - 30 < len(session.prompt([*lead, *asked[-len(kept) - 1 :]]))
    # The room for an answer is at most a quarter of the positions, whatever is asked for.
    assert len(session.fit(asked, 10**6)[1]) > 256 // 2
    short = [*lead, asked[-1]]
    assert session.fit(short, 30) == (short, session.prompt(short))
    # A last turn that leaves less room than that is answered as far as it goes.
    ids = session.fit([*turns, {"role": "user", "content": "y" * 220}], 30)[1]
    assert 226 < len(ids) < 256
    with pytest.raises(DataError, match=r"reads 256.*Shorten"):
        session.fit([*turns, {"role": "user", "content": "y" * 250}], 30)


@pytest.mark.parametrize("given", [None, 3, {"role": "user", "content": "a"}])
def test_what_is_no_conversation_is_refused(given: Any) -> None:
    with pytest.raises(DataError, match="a conversation is a list of messages"):
        chatty.talker().chat(given)


def test_a_typed_special_token_is_refused() -> None:
    model = chatty.talker()
    assert model.tokenizer is not None
    with pytest.raises(DataError, match="special token"):
        chat(model, f"a {model.tokenizer.roles['eos']} b", stream=True)


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_a_chat_model_reads_conversations_in_every_form(form: str, tmp_path: Path) -> None:
    """Whatever form the rows had that it was trained on."""
    turns = [{"role": "user", "content": "red cat?"}, {"role": "assistant", "content": "old dog"}]
    rows = {
        "messages": [{"messages": turns}] * 12,
        "prompt": [{"prompt": "red cat?", "answer": "old dog"}] * 12,
    }
    other = "prompt" if form == "messages" else "messages"
    model = chatty.talker(256)
    tuned = pretrain.finetune(
        model, rows[form], "chat", valid=rows[other], limit="1 steps", device="cpu", quiet=True,
        out=tmp_path / "run",
    )  # fmt: skip
    assert tuned.metrics["loss"] > 0
    assert tuned.evaluate(rows[form])["loss"] == pytest.approx(tuned.evaluate(rows[other])["loss"])
