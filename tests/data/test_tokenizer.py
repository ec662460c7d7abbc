"""Tokenizers round-trip, keep their special tokens apart, and open in transformers with equal ids."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from data.scripts import letters
from pretrain.data import encoding
from pretrain.data.encoding import FastEncoder, _slow
from pretrain.data.pretokenize import gpt4
from pretrain.data.task_rows import blanks_before_words
from pretrain.data.tokenizer import Tokenizer, train_from_texts, train_tokenizer
from pretrain.data.tokenizer_build import KINDS, ROLES
from pretrain.data.word_boundaries import BYTE_ALPHABET
from pretrain.errors import DataError, TokenizerError

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 1995, isn't it?\n\n  Indented\tand tabbed.\n",
    "Über naïve cafés: “quotes”, — dashes…  αβγ Привет 你好 مرحبا \r\n x² ½ 🦊",
    "def f(x):\n    return x ** 2  # <mask> <eos> are only text here\n",
] * 4
WILD = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from(" \n\t's<>aé²")),
    max_size=120,
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_from_texts(TEXTS, request.param, vocab_size=400)


def test_special_tokens_are_distinct(tokenizer: Tokenizer) -> None:
    ids = [getattr(tokenizer, f"{role}_id") for role in ROLES]
    assert None not in ids and len(set(ids)) == 5
    assert tokenizer.special_ids == set(ids)
    assert tokenizer.frame([7, 8]) == [tokenizer.bos_id, 7, 8, tokenizer.eos_id]
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.vocab)


@given(text=WILD)
@settings(max_examples=150, deadline=None)
def test_bpe_gives_any_text_back(text: str) -> None:
    tokenizer = _cached("bpe")
    assert tokenizer.decode(tokenizer.encode(text, special=False), skip_special=False) == text


@given(text=WILD)
@settings(max_examples=150, deadline=None)
def test_characters_give_any_text_back(text: str) -> None:
    tokenizer = _cached("char")
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.unk_id not in ids


@given(texts=st.lists(WILD, min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
def test_the_short_cut_gives_the_ids_of_the_library(kind: str, texts: list[str]) -> None:
    backend = _cached(kind).plain
    fast = FastEncoder(backend)
    assert fast.rule == kind
    for _ in range(2):
        ids, lengths = fast.encode(texts)
        expected, sizes = _slow(backend, texts)
        assert ids.tolist() == expected.tolist() and lengths.tolist() == sizes.tolist()


# Spaces of one to three bytes, contractions, letters and digits of one to four, and characters of no or a new class.
PIECES = [
    *" \0\t\n\r\xa0\u2028\u3000\x1c\u200b\u180e", " ", "\n", "1", "'", "  ", "\n\n", " \n", *"aé中ſ1²٣.-¿“\u0301",
    *"\U0001f600\U0001fae8\U0001d4b3'stmd", "'re", "'ve", "'ll", "'LL", "'S", "'ſ", "word", " word", "word\0", "12345",
    "<tool>", "antidisestablishmentarian", "x" * 300,
]  # fmt: skip


def _splitting(name: str) -> tokenizers.Tokenizer:
    """A tokenizer that splits as BERT, or as one of the published ones with byte-level BPE."""
    if name == "bert":
        return _cached("wordpiece").plain
    backend = tokenizers.Tokenizer.from_str(_cached("bpe").plain.to_str())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if name == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif name in ("qwen2", "llama3"):
        expression = gpt4(r"\p{N}" if name == "qwen2" else r"\p{N}{1,3}")
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(expression), "isolated"))
        steps[1].use_regex = False
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if steps[1:] else steps[0]
    if name in ("qwen2", "neox"):
        backend.normalizer = normalizers.NFC()
        plain = ["  ", "<tool>"] if name == "neox" else ["<tool>"]
        backend.add_tokens([tokenizers.AddedToken(text, special=False) for text in plain])
    backend.encode_special_tokens = True
    return backend


SPLITTINGS = ("bert", "gpt2", "smollm", "neox", "qwen2", "llama3")


def _check_ids(backend: tokenizers.Tokenizer, fast: FastEncoder, texts: list[str]) -> None:
    ids, lengths = fast.encode(texts)
    expected, sizes = _slow(backend, texts)
    assert np.array_equal(ids, expected) and np.array_equal(lengths, sizes)


@pytest.mark.parametrize("bits", [2, 20])
@pytest.mark.parametrize("name", SPLITTINGS)
def test_words_are_found_where_the_library_finds_them(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoding, "_SLOT_BITS", bits
    )  # with 2, most words meet another one in their slot
    backend = _splitting(name)
    fast = FastEncoder(backend)
    assert fast.rule == ("wordpiece" if name == "bert" else "bpe")

    @given(texts=st.lists(st.lists(st.sampled_from(PIECES)).map("".join), min_size=1, max_size=8))
    @settings(max_examples=100, deadline=None)
    def check(texts: list[str]) -> None:
        _check_ids(backend, fast, texts)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_character_is_split_as_the_library_splits_it(name: str) -> None:
    backend = _splitting(name)
    fast = FastEncoder(backend)
    chars = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for first in range(0, len(chars), 4000):
        part = chars[first : first + 4000]
        _check_ids(backend, fast, [f"a{c}b1{c} {c}.{c}{c}'s{c}\n{c}a.\n {c}{c}1234" for c in part])


def test_most_texts_are_encoded_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastEncoder(_splitting("qwen2"))
    monkeypatch.setattr(encoding, "_slow", None)
    fast._encode_words = fast._words.encode = encoding._one_by_one(fast.backend)
    ids, lengths = fast.encode([*TEXTS, "", "an emoji \U0001f600", "e\u0301"[:1]])
    assert len(ids) == lengths.sum()
    for text in ("<tool>", "e\u0301", "'ſ", "\U0001fae8"):
        with pytest.raises(TypeError):
            fast.encode(["plain", text])


def test_two_tokens_with_one_id() -> None:
    vocab = {char: index for index, char in enumerate(BYTE_ALPHABET)} | {"th": 256, "the": 256}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _check_ids(backend, FastEncoder(backend), ["the th", "then", "th"])


def test_special_token_of_one_character_is_text_in_a_document() -> None:
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model = models.BPE(vocab=bytes_ | {"a": 256, "b": 257}, merges=[], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["b", "c"])
    backend.encode_special_tokens = True
    fast = FastEncoder(backend)
    assert fast.rule == "char"
    _check_ids(backend, fast, ["abc", "é"])


def test_many_added_tokens_are_left_to_the_library() -> None:
    backend = _splitting("gpt2")
    backend.add_tokens([f"<|{number / 50:.2f}|>" for number in range(1501)])  # the times of Whisper
    fast = FastEncoder(backend)
    assert fast.rule is None
    _check_ids(backend, fast, [*TEXTS, "<|0.02|> word <|30.00|>"])


_KEPT: dict[str, Tokenizer] = {}


def _cached(kind: str) -> Tokenizer:
    if kind not in _KEPT:
        _KEPT[kind] = train_from_texts(TEXTS, kind, vocab_size=400)
    return _KEPT[kind]


def test_special_tokens_in_a_document_are_text(tokenizer: Tokenizer) -> None:
    spelt = tokenizer.roles["mask"]
    assert tokenizer.mask_id in tokenizer.encode(f"a {spelt} b")
    assert tokenizer.mask_id not in tokenizer.encode(f"a {spelt} b", special=False)


def test_opens_in_transformers_with_equal_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, max_length=128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:3]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    for role in ROLES:
        assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer, f"{role}_id")
    assert theirs.cls_token_id == tokenizer.bos_id and theirs.sep_token_id == tokenizer.eos_id
    assert theirs.model_max_length == 128 and len(theirs) == len(tokenizer)
    assert theirs("fox")["input_ids"][0] == tokenizer.bos_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lowercase", [False, True])
def test_the_same_text_trains_the_same_tokenizer(kind: str, lowercase: bool) -> None:
    made = [train_from_texts(TEXTS, kind, vocab_size=300, lowercase=lowercase) for _ in range(6)]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 1
    assert sorted(made[0].vocab.values()) == list(range(len(made[0])))


def test_save_and_open_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for again in (Tokenizer.from_directory(tmp_path), Tokenizer.open(tmp_path / "tokenizer.json")):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.kind == tokenizer.kind and again.roles == tokenizer.roles
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "tokenizer.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_tokens_beyond_the_vocabulary_of_the_model_are_not_written(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """They are left out beside a model that has no row for them, and must not come back without it."""
    tokenizer.save(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unk_token": "<nowhere>"}))
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "vocab_size": len(tokenizer)})
    )
    opened = Tokenizer.from_directory(tmp_path / "model")
    assert len(opened) == len(tokenizer) and "<nowhere>" not in opened.vocab
    opened.save(tmp_path / "again")
    again = Tokenizer.from_directory(tmp_path / "again")
    assert len(again) == len(opened) and again.fingerprint == opened.fingerprint


def test_opens_what_transformers_saved_with_extra_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _cached("bpe").save(tmp_path / "a")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    theirs.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    theirs.save_pretrained(tmp_path / "b")
    ours = Tokenizer.open(tmp_path / "b")
    turn = ours.vocab["<turn>"]
    assert turn in ours.special_ids and ours.encode("<turn>") == [turn]
    ours.save(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    assert config["extra_special_tokens"] == config["additional_special_tokens"] == ["<turn>"]
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "c")) == len(ours)


def test_a_token_that_no_file_calls_special_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|endoftext|>", "<mask>", "<pad>", "<s>", "</s>", "en", *sorted(alphabet)]
    vocab = {name: index for index, name in enumerate(names)}
    made = transformers.GPT2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=["en"])
    made.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config | {"language": "en"}))
    ours = Tokenizer.open(tmp_path / "a")
    assert ours.mask_id == 1 and ours.pad_id == 2  # which objectives may use nevertheless
    ours.save(tmp_path / "b")
    blanks_before_words(ours).save(tmp_path / "c")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    for folder in ("b", "c"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert again.special_tokens_map == theirs.special_tokens_map
        assert again.all_special_tokens == theirs.all_special_tokens
        text = " a<mask> <pad></s>"
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
    assert Tokenizer.open(tmp_path / "b").fingerprint == ours.fingerprint


def test_wordpiece_keeps_case_unless_asked() -> None:
    assert _cached("wordpiece").decode(_cached("wordpiece").encode("The dog")) == "The dog"
    lower = train_from_texts(TEXTS, "wordpiece", vocab_size=400, lowercase=True)
    assert lower.decode(lower.encode("THE Dog")) == "the dog"


def test_bert_vocabulary_gives_the_reference_ids(data_sets: Path, tmp_path: Path) -> None:
    folder = data_sets / "tokenizer_vocabs"
    bert = Tokenizer.from_directory(folder / "bert-base-uncased")
    assert (bert.pad_id, bert.bos_id, bert.eos_id, bert.mask_id) == (0, 101, 102, 103)
    with gzip.open(
        folder / "test_vectors" / "bert_uncased_squad_questions.jsonl.gz", "rt", encoding="utf-8"
    ) as lines:
        cases = [json.loads(line) for line in lines]
    found = bert.encode_batch([case["question"] for case in cases])
    assert sum(ids != case["ids"] for ids, case in zip(found, cases, strict=True)) == 0
    fast, lengths = FastEncoder(bert.plain).encode([case["question"] for case in cases])
    assert fast.tolist() == [index for case in cases for index in case["ids"]]
    assert lengths.tolist() == [len(case["ids"]) for case in cases]


def test_gpt2_vocabulary_gives_the_reference_ids(data_sets: Path) -> None:
    folder = data_sets / "tokenizer_vocabs"
    gpt2 = Tokenizer.from_directory(folder / "gpt2")
    case = json.loads(
        (folder / "test_vectors" / "gpt2_encoded_tokens.json").read_text(encoding="utf-8")
    )
    assert gpt2.encode(case["text"]) == case["token_ids"]
    assert (
        gpt2.eos_id == 50256
        and gpt2.bos_id is None
        and gpt2.suffix == [50256]
        and gpt2.prefix == []
    )


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.open(tmp_path)
    _cached("bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.open(tmp_path)


def test_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="Did you mean 'bpe'"):
        train_from_texts(TEXTS, "bpee")
    with pytest.raises(TokenizerError, match="too small"):
        train_from_texts(TEXTS, "bpe", vocab_size=100)
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        Tokenizer.open(tmp_path)
    with pytest.raises(TokenizerError, match="Did you mean 'char'"):
        Tokenizer.open("chars")
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        _cached("bpe").decode([10**6])
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(tmp_path / "e.txt")


def test_train_tokenizer_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0] * 5, encoding="utf-8")
    tokenizer = train_tokenizer(tmp_path, "bpe", vocab_size=300, sample_bytes=200)
    assert tokenizer.vocab_size <= 300


@pytest.mark.parametrize("script", ["han", "kana and han", "korean", "thai", "arabic", "latin"])
def test_wordpiece_knows_the_characters_of_every_script(script: str) -> None:
    """Thousands of characters of falling frequency, in words with blanks between or in long runs without."""
    rng = np.random.default_rng(3)
    known = {
        "han": [chr(0x4E00 + 5 * k) for k in range(4000)],
        "kana and han": [chr(0x3041 + k) for k in range(86)] + [chr(0x4E00 + 7 * k) for k in range(2500)],
        "korean": [chr(0xAC00 + 4 * k) for k in range(2700)],
        "thai": letters("thai"), "arabic": letters("arabic"), "latin": letters("latin"),
    }[script]  # fmt: skip
    share = 1 / (np.arange(len(known)) + 5)
    text = rng.choice(known, 150_000, p=share / share.sum())
    if script in ("korean", "arabic", "latin"):
        text[rng.random(len(text)) < 0.25] = " "
    else:
        text[:: 300 if script == "thai" else 30] = "。"
    texts = ["".join(text[k : k + 2000]) for k in range(0, len(text), 2000)]
    made = train_from_texts(texts, "wordpiece", vocab_size=8192)
    ids = np.concatenate(made.encode_batch(texts, special=False))
    assert float((ids == made.unk_id).mean()) < 0.01
    assert len(made) <= 8192
    again, _ = FastEncoder(made.plain).encode(texts)
    assert np.array_equal(again, ids) and FastEncoder(made.plain).rule == "wordpiece"


def test_long_words_are_cut_and_not_unknown(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = _cached("wordpiece")
    text = "fox" * 90 + " the " + "http" * 60
    assert made.unk_id not in made.encode(text)
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == made.encode(text)
