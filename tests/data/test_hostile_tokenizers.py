"""Tokenizer files and texts that the library chokes on: always TokenizerError or DataError, never a hang."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from pretrain.data import encoding, tokenizer_build, workers
from pretrain.data.encoding import FastEncoder
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.data.workers import encode_batches
from pretrain.errors import DataError, PretrainError, TokenizerError

TEXTS = ["the quick brown fox jumps over the lazy dog, walking and talking. "] * 4


def texts_of(batch: list[str]) -> list[str]:
    return batch


def test_batches_come_back_in_order_and_a_dead_encoding_process_is_told() -> None:
    tokenizer = train_from_texts(TEXTS, "bpe", vocab_size=300)
    batches = [[text] * size for size in (9, 1, 30, 2, 1) for text in (TEXTS[0], "é")]
    alone = list(encode_batches(tokenizer, batches, texts_of, 1))
    children: list[Any] = []
    init = workers._Child.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        children.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers._Child, "__init__", made)
        together = list(encode_batches(tokenizer, batches, texts_of, 3))
        assert len(children) == 3 and all(child.process.poll() is not None for child in children)
        for (batch, one), (other, several) in zip(alone, together, strict=True):
            assert batch is other and all(map(np.array_equal, one, several))
        running = encode_batches(tokenizer, batches, texts_of, 2)
        next(running)
        for child in children[3:]:
            child.process.kill()
        with pytest.raises(DataError, match=r"ended unexpectedly \(exit code -9\).*fewer workers"):
            list(running)


def test_encoding_error_comes_back_from_a_child() -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(TokenizerError, match="cannot encode a text"):
        list(encode_batches(Tokenizer(backend), [["b"]], texts_of, 2))
    with pytest.raises(TokenizerError, match="cannot encode a text"):
        FastEncoder(backend).encode(["b"])
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        Tokenizer(backend).encode("b")


def test_vocabulary_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n[CLS]\ncaf\xe9\n")
    with pytest.raises(TokenizerError, match=r"vocab\.txt cannot be read: it is not UTF-8"):
        Tokenizer.open(tmp_path)


def test_vocabulary_file_without_unk(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(TokenizerError, match=r"vocab\.txt has no \[UNK\]"):
        Tokenizer.open(tmp_path)


def test_empty_token_in_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n\na\n##b\n")
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.vocab[""] == 3
    assert tokenizer.word_starts([4, 5, 3, 4, 4]).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("kind", ["bpe", "char", "wordpiece"])
def test_half_a_surrogate_pair_in_a_text(kind: str) -> None:
    tokenizer, bad = train_from_texts(TEXTS, kind, vocab_size=300), "a \ud83d b"
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer.encode_batch(["fine", bad], special=False),
        lambda: tokenizer.frame_texts(["fine", "fine"], ["fine", bad], max_length=9),
        lambda: tokenizer.frame_texts([["fine"], ["fine", bad]], words=True),
    ]
    said = r"character 2 of it, counted from 0, is the lone surrogate U\+D83D \('a \\ud83d b'\), half of a"
    for call in calls:
        with pytest.raises(TokenizerError, match=f"^text 2 of 2 cannot be encoded: {said}") as told:
            call()
        assert "unknown token" not in str(told.value) and "max_length" not in str(told.value)
    with pytest.raises(TokenizerError, match=f"^text 1 of 1 cannot be encoded: {said}"):
        tokenizer.encode(bad)
    with pytest.raises(TokenizerError, match=r"cannot be encoded .* unknown token"):
        tokenizer.encode_batch(["fine", None])  # type: ignore[list-item]


def test_panic_of_the_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Broken:
        @staticmethod
        def from_str(text: str) -> Any:
            raise failure

    train_from_texts(TEXTS, "char").save(tmp_path)
    monkeypatch.setattr(tokenizer_build.tokenizers, "Tokenizer", Broken)
    failure: BaseException = PanicException("index out of range")
    with pytest.raises(TokenizerError, match="PanicException: index out of range"):
        Tokenizer.open(tmp_path)
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user-here/x", "a\0b"])
def test_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer.open(name)
    for call in (
        lambda: pretrain.prepare(name, quiet=True),
        lambda: pretrain.prepare(f"{name}/*.txt", quiet=True),
        lambda: pretrain.prepare("python", tokenizer=name, quiet=True),
    ):
        with pytest.raises(PretrainError):
            call()


def test_out_and_cache_that_no_directory_can_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    for name in ("~no-such-user-here/x", "x" * 300, "a\0b"):
        with pytest.raises(DataError):
            pretrain.prepare(tmp_path / "a.txt", name, tokenizer="char", quiet=True)
        with pytest.raises(DataError):
            pretrain.prepare(tmp_path / "a.txt", tokenizer="char", cache_dir=name, quiet=True)


def test_stray_id_takes_no_gigabytes(tmp_path: Path) -> None:
    train_from_texts(TEXTS, "char").save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["q"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="the id 4000000000, but has only"):
        Tokenizer.open(tmp_path)


def test_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = train_from_texts(TEXTS, "bpe", vocab_size=300).plain
    monkeypatch.setattr(encoding, "_MAX_IDS", 2000)
    fast = FastEncoder(backend)
    for k in range(6):
        texts = ["x" * 900 + str(k), "short words stay", f"{k}" * 150]
        ids, lengths = fast.encode(texts)
        expected, sizes = encoding._slow(backend, texts)
        assert np.array_equal(ids, expected) and np.array_equal(lengths, sizes)
        assert not any(len(word) > 200 for word in fast._words.numbers)
        assert len(fast._words.ids) <= 2000


def test_lowercase_wordpiece_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The Quick BROWN Fox and the quick brown fox. " * 30)
    options: dict[str, Any] = {"tokenizer": "wordpiece", "vocab_size": 90, "quiet": True}
    cased = pretrain.prepare(tmp_path / "a.txt", **options)
    lower = pretrain.prepare(tmp_path / "a.txt", lowercase=True, **options)
    assert cased.fingerprint != lower.fingerprint
    assert cased.tokenizer.decode(cased.tokenizer.encode("The BROWN")) == "The BROWN"
    assert lower.tokenizer.decode(lower.tokenizer.encode("The BROWN")) == "the brown"
    with pytest.raises(TokenizerError, match="lowercase works with"):
        pretrain.prepare(tmp_path / "a.txt", tokenizer="bpe", lowercase=True, quiet=True)


def test_mutated_tokenizer_file_is_one_of_our_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    train_from_texts(TEXTS, "wordpiece", vocab_size=60).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(damaged)))
            if rng.integers(2):
                damaged[place] = int(rng.integers(32, 127))
            else:
                del damaged[place : place + int(rng.integers(1, 30))]
        file.write_bytes(damaged)
        try:
            tokenizer = Tokenizer.open(tmp_path)
            tokenizer.encode("the walking fox ???")
            tokenizer.word_ids(range(len(tokenizer)))
        except PretrainError:
            refused += 1
    assert refused > 30


def _file_of(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    train_from_texts(TEXTS, "wordpiece", vocab_size=60).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    return file, json.loads(file.read_text())


_REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
_PADDING = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
_LONG = {"type": "TemplateProcessing", "special_tokens": {}, "pair": []}
_MANY = {"[SEP]": {"id": "[SEP]", "ids": [2] * 100_000, "tokens": ["[SEP]"] * 100_000}}
HOSTILE: dict[str, dict[str, Any]] = {
    "padding": {"padding": {**_PADDING, "strategy": {"Fixed": 1 << 40}, "pad_to_multiple_of": None}},
    "padding multiple": {
        "padding": {**_PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 1 << 40}
    },
    "prepend": {"normalizer": {"type": "Prepend", "prepend": "x" * 1_000_000}},
    "replace with much": {"normalizer": {**_REPLACE, "content": "x" * 1_000_000}},
    "replace of nothing": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{**_REPLACE, "pattern": {"String": ""}, "content": "x" * 60}] * 4,
        }
    },
    "replace of anything": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{**_REPLACE, "pattern": {"Regex": "."}, "content": "abc"}] * 40,
        }
    },
    "doubling": {"normalizer": {"type": "Sequence", "normalizers": [_REPLACE] * 40}},
    "doubling in sequences": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [_REPLACE] * 6}] * 6,
        }
    },
    "decoder": {"decoder": {"type": "Sequence", "decoders": [_REPLACE] * 40}},
    "template": {
        "post_processor": {**_LONG, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000}
    },
    "template ids": {
        "post_processor": {
            **_LONG, "single": [{"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "special_tokens": _MANY,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_rules_that_fill_the_memory_are_refused_where_they_are_opened(
    tmp_path: Path, name: str
) -> None:
    file, content = _file_of(tmp_path)
    file.write_text(json.dumps({**content, **HOSTILE[name]}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .* no text needs that"):
        Tokenizer.open(tmp_path)


def test_rules_of_published_tokenizers_are_not_refused(tmp_path: Path) -> None:
    file, content = _file_of(tmp_path)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    quotes = [
        {"type": "Replace", "pattern": {"String": a}, "content": '"'} for a in ("``", "''")
    ] * 4
    blank = {"type": "Prepend", "prepend": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [blank, spaces, *quotes]}
    content["padding"] = {**_PADDING, "strategy": {"Fixed": 8192}, "pad_to_multiple_of": 8}
    file.write_text(json.dumps(content))
    assert Tokenizer.open(tmp_path).encode("a b")


def test_class_whose_rules_stand_in_no_file_is_named(tmp_path: Path) -> None:
    file, _ = _file_of(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "PhobertTokenizer"}')
    with pytest.raises(TokenizerError, match="PhobertTokenizer.*remove tokenizer_class"):
        Tokenizer.open(tmp_path)
    file.unlink()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\0")
    config.write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(
        TokenizerError, match=r"XLMRobertaTokenizer .* sentencepiece\.bpe\.model here.*transformers"
    ):
        Tokenizer.open(tmp_path)
