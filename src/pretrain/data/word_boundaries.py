"""Word boundaries in a row of token ids, in scripts with and without spaces between words.

Ids are converted back to the bytes of their text and words are found there, so the result does not depend on how a
tokenizer splits a character: a token begins a word if its first byte does. A word is a run of letters, digits and
marks with the space before it; in scripts that are written without spaces it is a single character with its marks. Any
other character is a word by itself.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

__all__ = ["BYTE_ALPHABET", "WordFinder", "token_bytes"]

# Classes of characters.
_OTHER, _LETTER, _UNSPACED, _MARK, _BLANK, _UNKNOWN = range(6)
# Scripts without spaces between words, by the beginning of their characters' Unicode names: those of the line breaking
# classes ID (ideographs, kana) and SA (South East Asia), and similar ones.
_UNSPACED_NAMES = (
    "CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC", "BOPOMOFO", "KANGXI", "YI ", "TANGUT", "NUSHU",
    "KHITAN", "THAI", "LAO", "KHMER", "MYANMAR", "TAI ", "NEW TAI LUE", "AHOM", "CHAM", "TIBETAN", "JAVANESE",
    "BALINESE",
)  # fmt: skip
_JOINERS = "\u200c\u200d"  # inside words of Persian and Indic scripts, and inside emoji
# Represents tokens that are not text; this byte never occurs in UTF-8, and the character after it begins a word.
_BREAK = b"\xff"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_METASPACE = "\u2581"


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each printable character of byte-level BPE represents (the table of GPT-2)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {
        chr(256 + k): byte for k, byte in enumerate(others)
    }


BYTE_ALPHABET = _byte_alphabet()


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether the names of tokens use the printable byte characters of byte-level BPE."""
    parts = (backend.decoder, backend.pre_tokenizer, backend.normalizer)
    return any(part is not None and b"ByteLevel" in part.__getstate__() for part in parts)


def token_bytes(
    backend: tokenizers.Tokenizer, vocab: Mapping[str, int], special: Collection[int], size: int
) -> list[bytes]:
    """Return the UTF-8 bytes, possibly of part of a character, that each id below ``size`` represents; never empty.

    The backend determines how the names of its tokens spell text; ``special`` ids are no text.
    """
    byte_level = _is_byte_level(backend)
    model = type(backend.model).__name__
    whole_words = model in ("WordPiece", "WordLevel")  # spaces are not part of the tokens
    prefix = getattr(backend.model, "continuing_subword_prefix", None) or ""
    suffix = getattr(backend.model, "end_of_word_suffix", None) or ""
    found = [_BREAK] * size
    for name, index in vocab.items():
        if index in special or not name:
            continue
        if byte_level and all(char in BYTE_ALPHABET for char in name):
            found[index] = bytes(BYTE_ALPHABET[char] for char in name)
            continue
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte is not None and not whole_words:
            found[index] = bytes([int(byte[1], 16)])
            continue
        inside = bool(prefix) and name.startswith(prefix)
        last = bool(suffix) and name.endswith(suffix)
        text = name.removeprefix(prefix).removesuffix(suffix)
        data = text.replace(_METASPACE, " ").encode("utf-8", "replace")
        begins = whole_words and not inside
        found[index] = (_BREAK * begins + data + _BREAK * last) or _BREAK
    return found


class WordFinder:
    """Finds the word boundaries of rows.

    Args:
        tokens: the bytes of every id; see :func:`token_bytes`.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._sizes = np.array([len(data) for data in tokens], dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._bytes = np.frombuffer(b"".join(tokens), dtype=np.uint8)
        self._classes = np.full(0x110000, _UNKNOWN, dtype=np.int8)

    def starts(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Return (T,) True where a token begins a word; ids outside the table are treated as non-text."""
        if not len(ids):
            return np.zeros(0, dtype=bool)
        known = (ids >= 0) & (ids < len(self._sizes))
        tokens = np.where(known, ids, 0)
        sizes = np.where(known, self._sizes[tokens], 1)
        stops = np.cumsum(sizes)
        places = np.arange(int(stops[-1])) + np.repeat(self._firsts[tokens] - stops + sizes, sizes)
        text = np.where(np.repeat(known, sizes), self._bytes[places], _BREAK[0])
        result: NDArray[np.bool_] = self._word_starts(text)[stops - sizes]
        return result

    def _word_starts(self, text: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (N,) True at the first byte of each word."""
        after_break = np.concatenate([[True], text[:-1] == _BREAK[0]])
        first = np.flatnonzero(((text & 0xC0) != 0x80) | after_break)
        classes = self._classes_of(_characters(text, first))
        # A mark belongs to the character before it, so the character after marks is compared with that one's class.
        base = np.maximum.accumulate(np.where(classes == _MARK, 0, np.arange(len(classes))))
        before = np.concatenate([[_OTHER], classes[base][:-1]])
        joined = (classes == _MARK) | (
            (classes == _LETTER) & ((before == _LETTER) | (before == _BLANK))
        )
        result = np.zeros(len(text), dtype=bool)
        result[first] = ~joined | after_break[first]
        return result

    def _classes_of(self, codes: NDArray[np.int64]) -> NDArray[np.int8]:
        classes = self._classes[codes]
        if (classes == _UNKNOWN).any():
            for code in np.unique(codes[classes == _UNKNOWN]).tolist():
                self._classes[code] = _class_of(chr(code))
            classes = self._classes[codes]
        return classes


def _characters(text: NDArray[np.uint8], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the code points that begin at ``first``; 0 for incomplete or invalid UTF-8."""
    data = np.concatenate([text, np.zeros(3, dtype=np.uint8)]).astype(np.int64)
    lead = data[first]
    tails = [data[first + k] & 0x3F for k in (1, 2, 3)]
    size = np.searchsorted([0x80, 0xC2, 0xE0, 0xF0, 0xF5], lead, side="right")  # 1: not a lead byte
    codes = np.zeros(len(first), dtype=np.int64)
    two, three, four = (size == k for k in (2, 3, 4))
    codes[size == 0] = lead[size == 0]
    codes[two] = ((lead & 0x1F) << 6 | tails[0])[two]
    codes[three] = ((lead & 0x0F) << 12 | tails[0] << 6 | tails[1])[three]
    codes[four] = ((lead & 0x07) << 18 | tails[0] << 12 | tails[1] << 6 | tails[2])[four]
    whole = np.diff(first, append=len(text)) >= np.maximum(size, 1)
    return np.where(whole & (size < 5) & (codes < 0x110000), codes, 0)


def _class_of(char: str) -> int:
    if char == " ":
        return _BLANK
    if unicodedata.category(char).startswith("M") or char in _JOINERS:
        return _MARK
    if not char.isalnum():
        return _OTHER
    name = unicodedata.name(char, "IDEOGRAPHIC")  # the only unnamed letters are ideographs
    return _UNSPACED if name.startswith(_UNSPACED_NAMES) else _LETTER
