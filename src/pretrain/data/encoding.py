"""Bulk encoding of texts, the most expensive part of ``prepare``.

Words recur, so texts are split into words and the words are looked up in a cache; only new words go through the
``tokenizers`` library. A batch of texts is split and looked up by operations on the array of its UTF-8 bytes. The ids
are exactly those of the library: the cache is used only for tokenizers for which this is known to hold (byte-level BPE
with the expression of GPT-2 or GPT-4, BERT's WordPiece, single characters), and only on text of characters whose class
has not changed between releases of Unicode; all other text is encoded by the library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any
from unicodedata import is_normalized

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pretrain.data.pretokenize import (
    Places,
    blank_words,
    character_classes,
    code_points,
    split_rule,
    split_words,
    splits_like_bert,
)
from pretrain.data.tokenizer_build import library_errors
from pretrain.data.word_boundaries import BYTE_ALPHABET

__all__ = ["Encoded", "FastEncoder"]

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]

# Bounds of the word cache, in words and in ids; words of more bytes hardly recur, so they are not cached.
_MAX_WORDS = 1 << 18
_MAX_IDS = 1 << 21
_MAX_BYTES = 200
# Added tokens that are looked for in the text one by one; from some hundreds on the library alone is faster.
_MAX_ADDED = 100
# Slots of the hash table of words, as a power of two.
_SLOT_BITS = 20
# Follows the texts of a batch, so that sixteen bytes can be read from the place of each of theirs.
_PADDING = bytes(16)


class _Words:
    """Numbers of words, assigned in the order of first occurrence, and the ids of each word.

    Words of up to 15 bytes are compared with the word that has their slot in a hash table; bytes and size make two
    integers. All others, and those whose slot belongs to another word, are looked up in a dictionary. Number 0 is no
    word.
    """

    def __init__(self, encode: Callable[[list[bytes]], Encoded]) -> None:
        self.encode = encode
        self.numbers: dict[bytes, int] = {}
        self.slots = np.zeros(1 << _SLOT_BITS, dtype=np.int32)
        self.keys = np.full((2, 1), 2**64 - 1, dtype=np.uint64)  # those of no text in UTF-8
        self.ids = np.zeros(0, dtype=np.uint32)
        self.starts = np.zeros(1, dtype=np.int64)
        self.sizes = np.zeros(1, dtype=np.int64)

    def look_up(self, data: bytes, starts: Places, sizes: Places) -> Places:
        """Return the numbers of the words that start at ``starts`` of ``data``, with ``sizes`` in bytes."""
        keys = np.stack([_integers(data, starts, sizes), _integers(data, starts + 8, sizes - 8)])
        keys[1] |= sizes.astype(np.uint64) << np.uint64(56)  # a word may end with NUL
        factors = np.array([[0x9E3779B97F4A7C15], [0xD6E8FEB86659FD93]], dtype=np.uint64)
        slots = ((keys * factors).sum(axis=0) >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
        numbers: Places = self.slots[slots].astype(np.int64)
        short = sizes <= 15
        known = short & (self.keys[0][numbers] == keys[0]) & (self.keys[1][numbers] == keys[1])
        others = np.flatnonzero(~known)
        # Words with an empty slot are represented by one of them, and those that equal it get its number.
        new = others[short[others] & (self.slots[slots[others]] == 0)]
        self.slots[slots[new]] = np.arange(len(new))
        like = new[self.slots[slots[new]]]
        is_like = (like != new) & (keys[:, like] == keys[:, new]).all(axis=0)
        like, new = like[is_like], new[is_like]
        known[new] = True
        others = others[~known[others]]
        first: list[int] = []  # where new words occur
        fresh: list[bytes] = []
        found = self.numbers
        for place, start, size in zip(
            others.tolist(), starts[others].tolist(), sizes[others].tolist(), strict=True
        ):
            word = data[start : start + size]
            number = found.get(word)
            if number is None:
                number = found[word] = len(self.sizes) + len(fresh)
                first.append(place)
                fresh.append(word)
            numbers[place] = number
        numbers[new] = numbers[like]
        others = others[short[others]]
        self.slots[slots[others]] = numbers[others]
        if fresh:
            self._add(fresh)
            self.keys = np.concatenate([self.keys, keys[:, first]], axis=1)
        return numbers

    def _add(self, fresh: list[bytes]) -> None:
        ids, sizes = self.encode(fresh)
        self.starts = np.concatenate([self.starts, len(self.ids) + np.cumsum(sizes) - sizes])
        self.sizes = np.concatenate([self.sizes, sizes])
        self.ids = np.concatenate([self.ids, ids])
        for word in fresh:
            if len(word) > _MAX_BYTES:
                del self.numbers[word]

    @property
    def is_full(self) -> bool:
        return len(self.sizes) > _MAX_WORDS or len(self.ids) > _MAX_IDS


class FastEncoder:
    """Encode many texts in one process; special tokens spelt in a text are read as plain text.

    Args:
        backend: a tokenizer that has ``encode_special_tokens`` set.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        description = json.loads(backend.to_str())
        self.rule = _rule(description)
        self._split = split_rule(description.get("pre_tokenizer") or {})
        self._composed = description.get("normalizer") is not None  # texts are normalised to NFC
        self._added = [
            token["content"].encode("utf-8")
            for token in description.get("added_tokens", [])
            if not token["special"]
        ]
        self._vocab: dict[str, int] = backend.get_vocab() if self.rule == "char" else {}
        self._table = _character_table(backend) if self.rule == "char" else None
        self._encode_words = _model_alone(backend) if self.rule == "bpe" else _one_by_one(backend)
        self._words = _Words(self._encode_words)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the concatenated ids of all texts, and the number of ids of each."""
        if self._table is not None:
            return self._characters(texts)
        if self.rule not in ("bpe", "wordpiece") or not texts:
            return _slow(self.backend, texts)
        encoded = [text.encode("utf-8") for text in texts]
        data = b"\n".join([*encoded, _PADDING])
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ends = np.cumsum(lengths + 1) - 1  # the line feeds after the texts, which belong to none
        if self._split is None:
            starts, sizes = blank_words(data, int(ends[-1]))
        else:
            classes, unsafe = character_classes(data, ends, self._split)
            slow = set(np.searchsorted(ends, unsafe).tolist())
            for token in self._added:
                if token in data:
                    slow.update(k for k, text in enumerate(encoded) if token in text)
            if self._composed and not data.isascii():
                slow.update(k for k, text in enumerate(texts) if not is_normalized("NFC", text))
            if slow:
                return self._around(texts, sorted(slow))
            starts, sizes = split_words(data, classes, ends, self._split)
        return self._join(self._words.look_up(data, starts, sizes), np.searchsorted(starts, ends))

    def _join(self, numbers: Places, words: Places) -> Encoded:
        """Return the ids of words given by their numbers; ``words`` counts those up to the end of each text."""
        cached = self._words
        sizes = cached.sizes[numbers]
        stops = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(cached.starts[numbers] - stops[:-1], sizes)
        ids = cached.ids[np.arange(len(shift)) + shift]
        if cached.is_full:
            self._words = _Words(self._encode_words)
        return ids, np.diff(stops[words], prepend=0)

    def _around(self, texts: Sequence[str], slow: list[int]) -> Encoded:
        """Encode the texts at the places ``slow`` by the library, and all others from the cache."""
        late, late_lengths = _slow(self.backend, [texts[k] for k in slow])
        is_slow = np.zeros(len(texts), dtype=bool)
        is_slow[slow] = True
        ids, lengths = self.encode([texts[k] for k in np.flatnonzero(~is_slow).tolist()])
        total = np.empty(len(texts), dtype=np.int64)
        total[is_slow], total[~is_slow] = late_lengths, lengths
        is_late = np.repeat(is_slow, total)
        result = np.empty(len(is_late), dtype=np.uint32)
        result[is_late], result[~is_late] = late, ids
        return result, total

    def _characters(self, texts: Sequence[str]) -> Encoded:
        assert self._table is not None
        counts = np.array([len(text) for text in texts], dtype=np.int64)
        codes = code_points("".join(texts))
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


def _slow(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> Encoded:
    with library_errors("the tokenizer cannot encode a text"):
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    parts = [encoding.ids for encoding in found]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return np.fromiter(
        chain.from_iterable(parts), dtype=np.uint32, count=int(lengths.sum())
    ), lengths


def _one_by_one(backend: tokenizers.Tokenizer) -> Callable[[list[bytes]], Encoded]:
    """Return a function that does what `_slow` does, for words that the tokenizer never joins, in one call for all."""

    def encode(words: list[bytes]) -> Encoded:
        with library_errors("the tokenizer cannot encode a text"):
            encoding = backend.encode(
                [word.decode("utf-8") for word in words],
                is_pretokenized=True,
                add_special_tokens=False,
            )
        owners = np.array(encoding.word_ids, dtype=np.int64)
        return np.array(encoding.ids, dtype=np.uint32), np.bincount(owners, minlength=len(words))

    return encode


def _model_alone(backend: tokenizers.Tokenizer) -> Callable[[list[bytes]], Encoded]:
    """Return what `_one_by_one` does, for byte-level BPE, which takes half as long if the words are not cut again."""
    vocab = backend.get_vocab(with_added_tokens=False)
    shared = len(set(vocab.values())) < len(vocab)  # the length of a token is not known from its id
    if shared or not BYTE_ALPHABET.keys() <= vocab.keys():
        return _one_by_one(backend)
    alphabet = np.zeros(256, dtype="<u4")
    alphabet[list(BYTE_ALPHABET.values())] = [ord(char) for char in BYTE_ALPHABET]
    lengths = np.zeros(max(vocab.values()) + 1, dtype=np.int64)  # of tokens, in bytes
    lengths[list(vocab.values())] = [len(token) for token in vocab]
    model = tokenizers.Tokenizer(backend.model)
    model.pre_tokenizer = tokenizers.pre_tokenizers.CharDelimiterSplit("\n")

    def encode(words: list[bytes]) -> Encoded:
        stops = np.cumsum([len(word) for word in words])
        codes = alphabet[np.frombuffer(b"".join(words), dtype=np.uint8)]
        between = np.insert(codes, stops[:-1], ord("\n"))  # which no byte is written as
        ids, _ = _slow(model, [between.tobytes().decode("utf-32-le")])
        counts = np.searchsorted(np.cumsum(lengths[ids]), stops, side="right")
        return ids, np.diff(counts, prepend=0)

    return encode


def _rule(description: dict[str, Any]) -> str | None:
    """Return the name of the fast rule that reproduces the ids of this tokenizer, or None."""
    plain = [token for token in description.get("added_tokens", []) if not token["special"]]
    model, cutter, normalizer = (
        description.get(key) for key in ("model", "pre_tokenizer", "normalizer")
    )
    kind = (model or {}).get("type")
    if kind == "BPE" and model and not model.get("dropout"):
        if cutter is None and model.get("byte_fallback") and not model.get("merges"):
            vocab = model.get("vocab", {})
            has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
            return "char" if has_bytes and not plain and normalizer is None else None
        whole = not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
        composed = all(is_normalized("NFC", token["content"]) for token in plain)
        if (
            whole
            and normalizer in (None, {"type": "NFC"})
            and composed
            and len(plain) <= _MAX_ADDED
            and split_rule(cutter or {})
        ):
            return "bpe"
    bert = {"type": "BertNormalizer", "clean_text": True}
    if kind == "WordPiece" and not plain and splits_like_bert(cutter) and normalizer:
        return "wordpiece" if all(normalizer.get(key) == bert[key] for key in bert) else None
    return None


def _character_table(backend: tokenizers.Tokenizer) -> NDArray[np.int64]:
    table = np.full(0x110000, -1, dtype=np.int64)
    for name, index in backend.get_vocab(with_added_tokens=False).items():
        if len(name) == 1:
            table[ord(name)] = index
    return table


def _integers(data: bytes, places: Places, sizes: Places) -> NDArray[np.uint64]:
    """Return up to eight bytes from each place as an integer; ``sizes`` below 0 and above 8 count as these."""
    eights = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))
    masks = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)
    return eights[places] & masks[np.clip(sizes, 0, 8)]
