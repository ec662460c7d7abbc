"""Bulk encoding of texts, the most expensive part of ``prepare``.

Words recur, so texts are split into words by a regular expression and the words are looked up in a cache; only new
words go through the ``tokenizers`` library. The ids are exactly those of the library: the cache is used only for
tokenizers for which this is known to hold (byte-level BPE with GPT-2's expression, BERT's WordPiece, single
characters), and only on text of characters whose class has not changed between releases of Unicode; all other text is
encoded by the library.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pretrain.data.tokenizer_build import WORDPIECE_CUT, library_errors

__all__ = ["Encoded", "FastEncoder"]

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]

# Bounds of the word cache, in words and in ids; words of more letters hardly recur, so they are not cached.
_MAX_WORDS = 1 << 18
_MAX_IDS = 1 << 21
_MAX_LETTERS = 200


class _Words(dict[str, int]):
    """Numbers of words, assigned in the order of first lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[str] = []
        self.total = 0

    def __missing__(self, word: str) -> int:
        number = self[word] = self.total
        self.total += 1
        self.fresh.append(word)
        return number


class FastEncoder:
    """Encode many texts in one process; special tokens spelt in a text are read as plain text.

    Args:
        backend: a tokenizer that has ``encode_special_tokens`` set.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.rule = _rule(json.loads(backend.to_str()))
        self._vocab: dict[str, int] = backend.get_vocab() if self.rule == "char" else {}
        self._table = _character_table(backend) if self.rule == "char" else None
        self._reset()

    def _reset(self) -> None:
        self._words = _Words()
        self._ids = np.zeros(0, dtype=np.uint32)
        self._starts = np.zeros(0, dtype=np.int64)
        self._sizes = np.zeros(0, dtype=np.int64)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the concatenated ids of all texts, and the number of ids of each."""
        if self._table is not None:
            return self._characters(texts)
        if self.rule not in ("bpe", "wordpiece"):
            return _slow(self.backend, texts)
        find = _gpt2_words().findall if self.rule == "bpe" else _BLANK_WORDS.findall
        unsafe = _unsafe() if self.rule == "bpe" else None
        words: list[str] = []
        counts = np.zeros(len(texts), dtype=np.int64)
        slow: list[int] = []
        if (
            unsafe is not None
            and not unsafe[_codes("".join(t for t in texts if not t.isascii()))].any()
        ):
            unsafe = None
        for k, text in enumerate(texts):
            if unsafe is not None and not text.isascii() and unsafe[_codes(text)].any():
                slow.append(k)
                continue
            found = find(text)
            counts[k] = len(found)
            words += found
        ids, lengths = self._look_up(words, counts)
        if not slow:
            return ids, lengths
        late, late_lengths = _slow(self.backend, [texts[k] for k in slow])
        return _merge(ids, lengths, late, late_lengths, np.array(slow))

    def _look_up(self, words: list[str], counts: NDArray[np.int64]) -> Encoded:
        numbers = np.fromiter(map(self._words.__getitem__, words), dtype=np.int64, count=len(words))
        if self._words.fresh:
            ids, sizes = _word_by_word(self.backend, self._words.fresh)
            self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(sizes) - sizes])
            self._sizes = np.concatenate([self._sizes, sizes])
            self._ids = np.concatenate([self._ids, ids])
            for word in self._words.fresh:
                if len(word) > _MAX_LETTERS:
                    del self._words[word]
            self._words.fresh.clear()
        sizes = self._sizes[numbers]
        stops = np.cumsum(sizes)
        place = np.arange(int(stops[-1]) if len(stops) else 0)
        result = self._ids[place + np.repeat(self._starts[numbers] - (stops - sizes), sizes)]
        bounds = np.concatenate([[0], stops])[np.concatenate([[0], np.cumsum(counts)])]
        if self._words.total > _MAX_WORDS or len(self._ids) > _MAX_IDS:
            self._reset()
        return result, np.diff(bounds)

    def _characters(self, texts: Sequence[str]) -> Encoded:
        assert self._table is not None
        counts = np.array([len(text) for text in texts], dtype=np.int64)
        codes = _codes("".join(texts))
        ids = self._table[codes]
        unknown = ids < 0
        if not unknown.any():
            return ids.astype(np.uint32), counts
        # A character that is not in the vocabulary becomes the tokens of its UTF-8 bytes.
        spelt = [
            f"<0x{byte:02X}>"
            for code in codes[unknown].tolist()
            for byte in chr(code).encode("utf-8")
        ]
        sizes = np.ones(len(codes), dtype=np.int64)
        sizes[unknown] = 1 + np.searchsorted([0x80, 0x800, 0x10000], codes[unknown], side="right")
        result = np.repeat(ids, sizes)
        result[np.repeat(unknown, sizes)] = [self._vocab[name] for name in spelt]
        stops = np.concatenate([[0], np.cumsum(sizes)])
        return result.astype(np.uint32), np.diff(stops[np.concatenate([[0], np.cumsum(counts)])])


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _slow(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> Encoded:
    with library_errors("the tokenizer cannot encode a text"):
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    parts = [encoding.ids for encoding in found]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return np.fromiter(
        chain.from_iterable(parts), dtype=np.uint32, count=int(lengths.sum())
    ), lengths


def _word_by_word(backend: tokenizers.Tokenizer, words: list[str]) -> Encoded:
    """Return what `_slow` does, for words that the tokenizer never joins: one call for all takes two thirds as long."""
    with library_errors("the tokenizer cannot encode a text"):
        encoding = backend.encode(words, is_pretokenized=True, add_special_tokens=False)
    owners = np.array(encoding.word_ids, dtype=np.int64)
    return np.array(encoding.ids, dtype=np.uint32), np.bincount(owners, minlength=len(words))


def _merge(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], late: NDArray[np.uint32], late_lengths: NDArray[np.int64],
    places: NDArray[np.int64],
) -> Encoded:  # fmt: skip
    """Insert the ids of the texts at ``places``, which the library encoded, among those of the other texts."""
    total = lengths.copy()
    total[places] = late_lengths
    is_late = np.zeros(len(lengths), dtype=bool)
    is_late[places] = True
    mask = np.repeat(is_late, total)
    result = np.empty(int(total.sum()), dtype=np.uint32)
    result[mask] = late
    result[~mask] = ids
    return result, total


def _rule(description: dict[str, Any]) -> str | None:
    """Return the name of the fast rule that reproduces the ids of this tokenizer, or None."""
    if any(not token.get("special") for token in description.get("added_tokens", [])):
        return None
    model, cutter, normalizer = (
        description.get(key) for key in ("model", "pre_tokenizer", "normalizer")
    )
    kind = (model or {}).get("type")
    if kind == "BPE" and normalizer is None and model and not model.get("dropout"):
        if cutter is None and model.get("byte_fallback") and not model.get("merges"):
            vocab = model.get("vocab", {})
            return "char" if all(f"<0x{byte:02X}>" in vocab for byte in range(256)) else None
        plain = not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
        wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        if plain and cutter and all(cutter.get(key) == value for key, value in wanted.items()):
            return "bpe"
    bert = {"type": "BertNormalizer", "clean_text": True}
    if kind == "WordPiece" and _cuts_like_bert(cutter) and normalizer:
        return "wordpiece" if all(normalizer.get(key) == bert[key] for key in bert) else None
    return None


def _cuts_like_bert(cutter: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer splits like BERT's, or like the one that this package trains WordPiece with."""
    if cutter and cutter.get("type") == "Sequence":
        first, *others = cutter.get("pretokenizers") or [None]
        parts = [other.get("pattern") for other in others]
        return _cuts_like_bert(first) and parts in ([], [{"Regex": WORDPIECE_CUT}])
    return cutter == {"type": "BertPreTokenizer"}


def _character_table(backend: tokenizers.Tokenizer) -> NDArray[np.int64]:
    table = np.full(0x110000, -1, dtype=np.int64)
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    for name, index in backend.get_vocab().items():
        if len(name) == 1 and name not in special:
            table[ord(name)] = index
    return table


# BERT splits at whitespace and punctuation and normalises each character by itself, so a string between ASCII
# whitespace has the same tokens wherever it occurs.
_BLANK_WORDS = re.compile(r"[^ \t\n\r]+")
_BLANKS = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@cache
def _classes() -> tuple[str, str, list[bool]]:
    """Return the letters and the numbers as ranges of a regular expression, and which characters are unsafe.

    A character is unsafe if its Unicode category is unassigned, a surrogate, or another than in Unicode 3.2. So are all
    from U+30000 on: they are rare, and to ask for the category of each takes as long as to encode a megabyte.
    """
    old = unicodedata.ucd_3_2_0
    ranges: dict[str, list[list[int]]] = {"L": [], "N": []}
    unsafe = [False] * 0x30000 + [True] * (0x110000 - 0x30000)
    for code in range(0x30000):
        char = chr(code)
        category = unicodedata.category(char)
        if category != old.category(char) or category in ("Cn", "Cs"):
            unsafe[code] = True
        elif (group := ranges.get(category[0])) is not None:
            if group and group[-1][1] == code - 1:
                group[-1][1] = code
            else:
                group.append([code, code])
    letters, numbers = (
        "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in group)
        for group in ranges.values()
    )
    return letters, numbers, unsafe


@cache
def _gpt2_words() -> re.Pattern[str]:
    letters, numbers, _ = _classes()
    s = _BLANKS
    return re.compile(
        f"'(?:[stmd]|re|ve|ll)| ?[{letters}]+| ?[{numbers}]+| ?[^{s}{letters}{numbers}]+|[{s}]+(?![^{s}])|[{s}]+"
    )


@cache
def _unsafe() -> NDArray[np.bool_]:
    return np.array(_classes()[2])
