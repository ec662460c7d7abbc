"""Words in token ids against words in the text, for scripts with blanks and without, under every kind of tokenizer."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.scripts import SCRIPTS, TOKENIZERS, documents, letters, tokenizer
from pretrain.data.tokenizer import Tokenizer, train_from_texts


def _groups(made: Tokenizer, text: str) -> list[str]:
    ids = made.encode(text, special=False)
    words = made.word_ids(ids)
    return [
        made.decode([ids[k] for k in np.flatnonzero(words == word)]) for word in np.unique(words)
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("walking, talked\nBig", ["walking", ",", " talked", "\n", "Big"]),
        ("it's 3.14", ["it", "'", "s", " 3", ".", "14"]),
        ("中国人 ok", ["中", "国", "人", " ok"]),
        ("ภาษาไทยดี", ["ภ", "า", "ษ", "า", "ไ", "ท", "ย", "ดี"]),
        ("カタカナと漢字abc語", [*"カタカナと漢字", "abc", "語"]),
        ("한국어 좋다", ["한국어", " 좋다"]),
        ("किताब पढ़ी", ["किताब", " पढ़ी"]),
        ("cafe\u0301 noir", ["cafe\u0301", " noir"]),
        ("👩\u200d👧 🇫🇷", ["👩\u200d", "👧", " ", "🇫", "🇷"]),
    ],
)
def test_words_of_known_texts(text: str, words: list[str]) -> None:
    """By bytes, where every character is torn, and by characters."""
    for kind, size in (("bpe", 265), ("char", 1000)):
        assert _groups(train_from_texts([text], kind, vocab_size=size), text) == words


_MIXED = st.lists(
    st.sampled_from(
        sorted({*"ab1é ,.\n-", *(c for s in SCRIPTS for c in letters(s)[:3])}, key=ord)
    ),
    max_size=40,
).map("".join)


def _expected(text: str) -> list[str]:
    """The same rule as a regular expression over characters of one class each."""
    spaced = {c for s, (_, _, size) in SCRIPTS.items() if size for c in letters(s)} | set("ab1é")
    shape = "".join("L" if c in spaced else "B" if c == " " else "o" for c in text)
    return [text[m.start() : m.end()] for m in re.finditer("B?L+|.", shape)]


@given(text=_MIXED)
@example(text="中ab 国 ab")
@settings(max_examples=150, deadline=None)
def test_words_are_those_of_the_text(text: str) -> None:
    """Where every token is a character, and where every token is a byte."""
    text = unicodedata.normalize("NFC", text)
    for made in (tokenizer("char", "latin"), tokenizer("bpe", "latin", 261)):
        assert _groups(made, text) == _expected(text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_word_where_there_are_no_blanks_is_long(kind: str) -> None:
    """A word is a token, or a character; tokens that tear characters at both ends form chains, but short ones."""
    for script, (_, _, size) in SCRIPTS.items():
        if size:
            continue
        made = tokenizer(kind, script)
        for text in documents(script)[:4]:
            ids = made.encode(text, special=False)
            sizes = np.bincount(made.word_ids(ids))
            assert sizes.max() <= 20 and sizes.mean() <= 4, (
                script,
                kind,
                sizes.max(),
                sizes.mean(),
            )


def test_special_tokens_and_ids_beyond_the_vocabulary_are_words_of_their_own() -> None:
    made = tokenizer("bpe", "latin")
    (a,) = made.encode("a", special=False)
    torn = made.vocab["¤"]  # a byte from the middle of a character
    assert made.word_starts([a, a, made.bos_id, a, torn, made.mask_id, torn, 10**6, -1, a]).tolist() == [
        True, False, True, True, False, True, True, True, True, True,
    ]  # fmt: skip
    assert made.word_starts([]).tolist() == []
