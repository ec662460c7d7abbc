"""Streaming: pieces that add up to the text without streaming, whatever the tokenizer, the ids and the stop texts."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import tiny
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, ModelError
from pretrain.inference import generate as generation
from pretrain.inference.generate import Stream, generate, without_start, write
from pretrain.models import build
from pretrain.models.base import Model

WORDS = "the cat — 日本 😀 é . ' isn't"


def llama_like() -> Tokenizer:
    """Pieces of SentencePiece with single bytes for what is not in the vocabulary."""
    names = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", "a", "b", "\u2581ab", "日", "\u2581."]
    backend = Backend(
        models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], byte_fallback=True)
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)])
    return Tokenizer(backend)


@cache
def tokenizers() -> dict[str, Tokenizer]:
    texts = [WORDS] * 3
    found = {
        "bytes": train_from_texts(texts, "bpe", vocab_size=270),
        "characters": train_from_texts(["ab. "], "char", vocab_size=300),
        "pieces": llama_like(),
        "words": train_from_texts(texts, "wordpiece", vocab_size=80),
        "cleaned": train_from_texts(texts, "wordpiece", vocab_size=80),
    }
    found["cleaned"].config["clean_up_tokenization_spaces"] = True
    odd = Backend(models.WordLevel({name: i for i, name in enumerate("ab|c")}, unk_token="a"))
    odd.decoder = decoders.CTC(pad_token="a", word_delimiter_token="|")
    return found | {"unknown": Tokenizer(odd)}


@cache
def model_of(kind: str) -> Model:
    return build(
        "gpt2", None, tokenizer=tokenizers()[kind], num_layers=1, hidden_size=8, num_heads=1,
        intermediate_size=8, max_positions=128, vocab_size=len(tokenizers()[kind]),
    )  # fmt: skip


def says(monkeypatch: pytest.MonkeyPatch, script: list[int], width: int) -> None:
    """Let every model write these ids."""

    def scores(self: Any, *_: Any) -> torch.Tensor:
        self.steps_made = getattr(self, "steps_made", itertools.count())
        row = torch.zeros(1, width)
        row[0, script[next(self.steps_made)]] = 1.0
        return row

    monkeypatch.setattr(generation._Decoder, "_scores", scores)


# --------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("kind", ["bytes", "characters", "pieces", "words", "cleaned", "unknown"])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_stable_text_stays(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizers()[kind]
    # Half of the ids come from bytes of characters, which random ones would seldom complete.
    text = [tokenizer.encode(word) for word in ("日", "😀", "é", " isn't .", "a")]
    some = st.lists(st.integers(0, len(tokenizer) - 1).map(lambda i: [i]) | st.sampled_from(text))
    ids, new = (list(itertools.chain(*data.draw(some))) for _ in range(2))
    whole, before = tokenizer.continuation(ids, new), ""
    for end in range(len(new) + 1):
        stable = tokenizer.stable_text(ids, new[:end])
        assert whole.startswith(stable) and stable.startswith(before)
        assert not stable.endswith("\ufffd")
        before = stable


def test_stable_text_comes_soon() -> None:
    """Holding everything back would be stable too."""
    for kind in ("bytes", "characters", "pieces", "words"):
        tokenizer = tokenizers()[kind]
        new = tokenizer.encode("a isn't" if kind == "words" else "ab ab")
        assert tokenizer.stable_text([], new) == tokenizer.decode(new) != ""
    assert tokenizers()["unknown"].stable_text([], [1, 3]) == ""
    bytes_of = tokenizers()["bytes"].encode("a😀")
    assert tokenizers()["bytes"].stable_text([], bytes_of[:-1]) == "a"


@pytest.mark.parametrize("kind", ["bytes", "characters", "pieces"])
@pytest.mark.parametrize("text", ["ภาษาไทยไม่มี", "a नमस्ते b", "👩\u200d👩\u200d👦👍🏽"])
def test_a_text_is_continued_after_any_of_its_characters(kind: str, text: str) -> None:
    """Bytes of characters that the vocabulary lacks are decoded in runs, which are not cut."""
    tokenizer = tokenizers()[kind]
    for k in range(1, len(text)):
        ids, new = tokenizer.encode(text[:k]), tokenizer.encode(text[k:])
        assert tokenizer.decode(ids).lstrip() + tokenizer.continuation(ids, new) == text


def test_a_stop_text_is_found_in_a_long_run_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of("characters"), tokenizers()["characters"]
    said = tokenizer.encode("ภาษาไทยไม่มีช่องว่าง")
    for prompt in ([7], tokenizer.encode("ภาษา")):
        says(monkeypatch, said * 2, len(tokenizer))
        stream = Stream(model, prompt, max_new_tokens=70, stop="ว่า")
        assert "".join(stream) == "ภาษาไทยไม่มีช่อง" and stream.finish_reason == "stop"
        ids = generate(model, prompt, max_new_tokens=70, stop="ว่า")
        assert tokenizer.decode(ids[len(prompt) :]) == "ภาษาไทยไม่มีช่องว่า"


# --------------------------------------------------------------------------------------- the pieces


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["bytes", "pieces"]),
    st.text("ab \n日😀é", max_size=12),
    st.lists(st.text("ab \n日é", min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.integers(0, 30),
)
def test_pieces_add_up_to_the_text(
    kind: str, text: str, stops: list[str], strip: bool, limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        model = model_of(kind)
        tokenizer = tokenizers()[kind]
        assert tokenizer.eos_id is not None
        says(patch, [*tokenizer.encode(text), tokenizer.eos_id] + [5] * 30, len(tokenizer))
        options: dict[str, Any] = {"max_new_tokens": limit, "stop": stops}
        stream = generate(model, "a", stream=True, **options)
        assert isinstance(stream, Stream) and stream.finish_reason is None
        pieces = list(stream)
        assert "".join(pieces) == generate(model, "a", **options) == stream.text
        assert all(pieces) and pieces[0] == "a"
        answer = Stream(model, [7], strip=strip, **options)
        pieces = list(answer)
        whole = write(model, [[7]], **options)[0]
        assert "".join(pieces) == (whole.strip() if strip else whole)
        assert not any(stop in "".join(pieces) for stop in stops)
        if limit > len(tokenizer.encode(text)):
            assert answer.finish_reason == "stop" and not any("\ufffd" in p for p in pieces)
        elif not any(stop in text for stop in stops):
            assert answer.finish_reason == "length" and answer.new_tokens == limit
        assert answer.prompt_tokens == 1


def test_pieces_come_one_by_one_and_a_stop_text_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of("bytes"), tokenizers()["bytes"]
    ids = tokenizer.encode("aé") + tokenizer.encode("b") * 2 + tokenizer.encode("\nUser:x")
    says(monkeypatch, ids + [5] * 30, len(tokenizer))
    assert list(Stream(model, [7], max_new_tokens=30, stop="\nUser:")) == ["a", "é", "b", "b"]
    assert list(Stream(model, [7], max_new_tokens=4, stop="\nUser:")) == ["a", "é", "b", "b"]
    assert "".join(Stream(model, [7], max_new_tokens=5, stop="\nUser:")) == "aébb\n"


def test_the_start_of_a_stop_text_is_held() -> None:
    assert without_start("say <|e", ["<|end|>", "x"]) == "say "
    assert without_start("say <|e.", ["<|end|>"]) == "say <|e."
    assert without_start("aa", ["aab", "b"]) == ""
    assert without_start("aa", []) == "aa"


def test_nothing_is_made_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the modes of torch and the model are the caller's while a piece is out."""
    model = model_of("bytes").train()
    stream = generate(model, "the cat", max_new_tokens=20, seed=0, stream=True)
    assert stream.new_tokens == 0 and next(stream) == "the cat" and stream.new_tokens == 0
    next(stream)
    made = stream.new_tokens
    assert 1 <= made < 20 and model.training and not torch.is_inference_mode_enabled()
    stream.close()
    assert list(stream) == [] and stream.new_tokens == made and stream.finish_reason is None
    model.eval()


def test_what_cannot_be_streamed_is_named() -> None:
    model = model_of("bytes")
    for prompts in (["a", "b"], ["a"], [1, 2], torch.tensor([[1, 2]])):
        with pytest.raises(ConfigError, match="stream works with one text"):
            generate(model, prompts, stream=True)
    with pytest.raises(ConfigError, match="'topk'"):  # at once, and not at the first piece
        generate(model, "a", stream=True, topk=3)
    silent = build("gpt2", "tiny", vocab_size=90)
    with pytest.raises(ModelError, match="tokenizer"):
        Stream(silent, [1])
    masked = build("bert", "tiny", tokenizer=tiny.tokenizer())
    with pytest.raises(ModelError, match="fill_mask"):
        generate(masked, "a", stream=True)


def test_answers_are_cut_before_stop_texts() -> None:
    """Also those to prompts of ids, whose text is not that of the last tokens."""
    model = model_of("bytes")
    text = write(model, [[7, 8]], max_new_tokens=20, seed=3)[0]
    assert len(text) > 4
    assert write(model, [[7, 8]], max_new_tokens=20, seed=3, stop=text[2:4])[0] == text[:2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "é", "<mark>", "<turn>"]), min_size=1, max_size=8),
    st.sampled_from(["<mark>", "b<mark>", "<turn>ab", "<mark><turn>é", "a<turn>b<mark>"]),
)
def test_a_stop_text_may_have_special_tokens(said: list[str], stop: str) -> None:
    """They end the text and are not shown; what stands before and after them is held back until it is known."""
    tokenizer = train_from_texts([WORDS] * 3, "bpe", vocab_size=270)
    tokenizer.backend.add_special_tokens(["<mark>", "<turn>"])
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.config)
    model = build(
        "gpt2", None, tokenizer=tokenizer, num_layers=1, hidden_size=8, num_heads=1,
        intermediate_size=8, max_positions=64, vocab_size=len(tokenizer),
    )  # fmt: skip
    ids = tokenizer.encode("".join(said))
    whole = "".join(said)
    wanted = whole[: whole.index(stop)] if stop in whole else whole
    wanted = wanted.replace("<mark>", "").replace("<turn>", "")
    with pytest.MonkeyPatch.context() as patch:
        says(patch, [*ids, tokenizer.eos_id or 0], len(tokenizer))
        stream = Stream(model, [7], max_new_tokens=30, stop=stop)
        assert "".join(stream) == write(model, [[7]], max_new_tokens=30, stop=stop)[0] == wanted
        made = generate(model, [7], max_new_tokens=30, stop=stop)[1:]
        end = len(tokenizer.encode(whole[: whole.find(stop) + len(stop)]))
        assert made == (ids[:end] if stop in whole else [*ids, tokenizer.eos_id])
        assert generate(model, "a", max_new_tokens=30, stop=stop) == "a" + wanted
