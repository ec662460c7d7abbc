"""Bulk encoding of texts, the most expensive part of ``prepare``.

Words recur, so texts are split into words and the words are looked up in a cache; only new words go through the
``tokenizers`` library. A batch of texts is split and looked up by operations on the array of its UTF-8 bytes. The ids
are exactly those of the library: the cache is used only for tokenizers for which this is known to hold (byte-level BPE
with GPT-2's expression, BERT's WordPiece, single characters), and only on text of characters whose class has not
changed between releases of Unicode; all other text is encoded by the library.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pretrain.data.tokenizer_build import WORDPIECE_CUT, library_errors
from pretrain.data.word_boundaries import BYTE_ALPHABET

__all__ = ["Encoded", "FastEncoder"]

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
Places = NDArray[np.int64]

# Bounds of the word cache, in words and in ids; words of more bytes hardly recur, so they are not cached.
_MAX_WORDS = 1 << 18
_MAX_IDS = 1 << 21
_MAX_BYTES = 200
# Slots of the hash table of words, as a power of two.
_SLOT_BITS = 20
# Follows the texts of a batch, so that sixteen bytes can be read from the place of each of theirs.
_PADDING = bytes(16)


class _Words:
    """Numbers of words, assigned in the order of first occurrence, and the ids of each word.

    Words of up to 16 bytes are compared as two integers with the word that has their slot in a hash table. All others,
    and those whose slot belongs to another word, are looked up in a dictionary. Number 0 is no word.
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
        factors = np.array([[0x9E3779B97F4A7C15], [0xD6E8FEB86659FD93]], dtype=np.uint64)
        slots = ((keys * factors).sum(axis=0) >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
        numbers: Places = self.slots[slots].astype(np.int64)
        short = sizes <= 2 * 8
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
        self.rule = _rule(json.loads(backend.to_str()))
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
        ends = (
            np.cumsum(lengths + 1) - 1
        )  # of the texts: the places of line feeds that belong to none
        if self.rule == "wordpiece":
            starts, sizes = _blank_words(data, int(ends[-1]))
        else:
            classes, unsafe = _classes(data, ends)
            if len(unsafe):
                return self._around(texts, np.unique(np.searchsorted(ends, unsafe)))
            starts, sizes = _gpt2_words(data, classes, ends)
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

    def _around(self, texts: Sequence[str], slow: Places) -> Encoded:
        """Encode the texts at the places ``slow`` by the library, and all others from the cache."""
        late, late_lengths = _slow(self.backend, [texts[k] for k in slow.tolist()])
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
    if not BYTE_ALPHABET.keys() <= vocab.keys():
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


# ------------------------------------------------------------------------------------------------ words

# BERT splits at whitespace and punctuation and normalises each character by itself, so a string between ASCII
# whitespace has the same tokens wherever it occurs.
_BLANK_BYTES = bytes(byte in b" \t\n\r" for byte in range(256))


def _blank_words(data: bytes, end: int) -> tuple[Places, Places]:
    """Return places and sizes of the words between ASCII whitespace in the first ``end`` bytes, which one follows."""
    blank = np.frombuffer(data.translate(_BLANK_BYTES), dtype=np.bool_, count=end + 1)
    bounds = np.flatnonzero(np.diff(blank, prepend=True))  # of words, of blanks, and so on
    return bounds[::2], bounds[1::2] - bounds[::2]


# Classes of characters in GPT-2's expression; texts end with a byte of a class of its own.
_LETTER, _NUMBER, _OTHER, _SPACE, _END, _UNSAFE, _UNKNOWN = range(7)
_SPACES = frozenset(
    map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)  # fmt: skip


def _class(char: str) -> int:
    """Return the class of a character.

    It is unsafe if its Unicode category is unassigned or a surrogate, or if it had another class in Unicode 3.2.
    """
    groups = {"L": _LETTER, "N": _NUMBER, "Z": _SPACE}
    category, before = unicodedata.category(char), unicodedata.ucd_3_2_0.category(char)
    now = groups.get(category[0], _OTHER)
    if category in ("Cn", "Cs") or now != groups.get(before[0], _OTHER):
        return _UNSAFE
    return _SPACE if char in _SPACES else now


_ASCII_CLASSES = bytes(_class(chr(code)) if code < 128 else _UNKNOWN for code in range(256))


@cache
def _class_table() -> NDArray[np.uint8]:
    """Classes of all characters by code point, unknown until they are asked for."""
    return np.full(0x110000, _UNKNOWN, dtype=np.uint8)


def _classes(data: bytes, ends: Places) -> tuple[NDArray[np.uint8], Places]:
    """Return the class of the character that each byte is of, and the places of unsafe characters."""
    classes = np.frombuffer(bytearray(data.translate(_ASCII_CLASSES)), dtype=np.uint8)
    unsafe = np.zeros(0, dtype=np.int64)
    if not data.isascii():
        leads = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) >= 0xC0)
        codes = _codes(data.decode("utf-8"))
        codes = codes[codes >= 0x80]
        table = _class_table()
        for code in np.unique(codes[table[codes] == _UNKNOWN]).tolist():
            table[code] = _class(chr(code))
        found = table[codes]
        unsafe = leads[found == _UNSAFE]
        for place, least in enumerate((0, 0x80, 0x800, 0x10000)):
            longer = codes >= least
            classes[leads[longer] + place] = found[longer]
    classes[ends] = _END
    return classes, unsafe


def _gpt2_words(data: bytes, classes: NDArray[np.uint8], ends: Places) -> tuple[Places, Places]:
    r"""Return places and sizes of what GPT-2's expression finds in texts that end at ``ends``.

    It is ``'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``: a word is a run of one class;
    the last space before a word of another class belongs to that word if it is U+0020, and is a word if not; and a
    contraction is a word wherever its apostrophe begins one.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    classes = classes[: ends[-1] + 1]
    before, here = classes[:-1], classes[1:]
    is_start = np.ones(len(classes), dtype=bool)
    np.not_equal(before, here, out=is_start[1:])
    is_start[ends[:-1] + 1] = True
    is_start[ends] = True
    after_space = (before == _SPACE) & (here < _SPACE)
    is_start[1:] ^= after_space & (octets[: len(before)] == ord(" "))
    is_start[:-1] |= after_space
    # A space of several bytes begins at the first of them.
    inside = np.flatnonzero(is_start & ((octets[: len(classes)] & 0xC0) == 0x80))
    is_start[inside] = False
    is_start[inside - np.where(octets[inside - 1] >= 0xC0, 1, 2)] = True

    quotes = np.flatnonzero(is_start & (octets[: len(classes)] == ord("'")))
    for letters in (b"s", b"t", b"re", b"ve", b"m", b"ll", b"d"):
        follows = np.logical_and.reduce(
            [octets[quotes + 1 + k] == letter for k, letter in enumerate(letters)]
        )
        is_start[quotes[follows] + 1] = False
        is_start[quotes[follows] + 1 + len(letters)] = True
    starts = np.flatnonzero(is_start)
    is_text = np.ones(len(starts), dtype=bool)
    is_text[np.searchsorted(starts, ends)] = False
    return starts[is_text], np.diff(starts, append=len(classes))[is_text]


def _integers(data: bytes, places: Places, sizes: Places) -> NDArray[np.uint64]:
    """Return up to eight bytes from each place as an integer; ``sizes`` below 0 and above 8 count as these."""
    eights = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))
    masks = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)
    return eights[places] & masks[np.clip(sizes, 0, 8)]
