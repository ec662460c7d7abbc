"""Pre-tokenization of many texts at once: where the words are between which a tokenizer merges nothing.

Words are found by operations on the array of the UTF-8 bytes of a batch, exactly where the pre-tokenizers of the
``tokenizers`` library find them.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.tokenizer_build import WORDPIECE_CUT

__all__ = [
    "GPT2", "Places", "SplitRule", "blank_words", "character_classes", "code_points", "gpt4", "split_rule",
    "split_words", "splits_like_bert",
]  # fmt: skip

Places = NDArray[np.int64]


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the code points of the characters."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def splits_like_bert(cutter: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer splits like BERT's, or like the one that this package trains WordPiece with."""
    if cutter and cutter.get("type") == "Sequence":
        first, *others = cutter.get("pretokenizers") or [None]
        parts = [other.get("pattern") for other in others]
        return splits_like_bert(first) and parts in ([], [{"Regex": WORDPIECE_CUT}])
    return cutter == {"type": "BertPreTokenizer"}


# BERT splits at whitespace and punctuation and normalises each character by itself, so a string between ASCII
# whitespace has the same tokens wherever it occurs.
_BLANK_BYTES = bytes(byte in b" \t\n\r" for byte in range(256))


def blank_words(data: bytes, end: int) -> tuple[Places, Places]:
    """Return places and sizes of the words between ASCII whitespace in the first ``end`` bytes, which one follows."""
    blank = np.frombuffer(data.translate(_BLANK_BYTES), dtype=np.bool_, count=end + 1)
    bounds = np.flatnonzero(np.diff(blank, prepend=True))  # of words, of blanks, and so on
    return bounds[::2], bounds[1::2] - bounds[::2]


@dataclass(frozen=True)
class SplitRule:
    """One of the expressions that split texts into words before byte-level BPE.

    Attributes:
        gpt4: that of GPT-4, Llama 3 and Qwen, and not GPT-2's.
        digits: the most digits of a word; 0 for any number.
        digits_first: digits are split off before the expression is applied, as by SmolLM and StarCoder.
    """

    gpt4: bool = False
    digits: int = 0
    digits_first: bool = False


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gpt4(digits: str, endings: str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)") -> str:
    """Return the expression of GPT-4 with a way to split digits, and one of its ways to write contractions."""
    letters = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
    return endings + letters + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_SPELT_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_RULES = {GPT2: SplitRule()}
for _digits, _most in ((r"\p{N}", 1), (r"\p{N}{1,3}", 3)):
    _RULES[gpt4(_digits)] = _RULES[gpt4(_digits, _SPELT_OUT)] = SplitRule(gpt4=True, digits=_most)


def split_rule(pre_tokenizer: dict[str, Any]) -> SplitRule | None:
    """Return how byte-level BPE splits texts into words, or None if its expression is not known here."""
    steps = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    if not 1 <= len(steps) <= 2:
        return None
    first, last = steps[0], steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if len(steps) == 1:
            return SplitRule()
        is_apart = first == {"type": "Digits", "individual_digits": True}
        return SplitRule(digits=1, digits_first=True) if is_apart else None
    pattern = first.get("pattern", {}).get("Regex", "")
    wanted = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return _RULES.get(pattern) if first == wanted else None


# Classes of characters in these expressions. The line feed after a text has a class of its own.
_LETTER, _NUMBER, _OTHER, _SPACE, _BREAK, _END, _UNSAFE, _UNKNOWN = range(8)
_LONG_S = 0x17F  # a letter that is an s where case is ignored
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


_ASCII = bytes(_class(chr(code)) if code < 128 else _UNKNOWN for code in range(256))
_ASCII_AND_BREAKS = bytes(_BREAK if byte in b"\r\n" else _ASCII[byte] for byte in range(256))


@cache
def _class_table() -> NDArray[np.uint8]:
    """Classes of all characters by code point, unknown until they are asked for."""
    return np.full(0x110000, _UNKNOWN, dtype=np.uint8)


def character_classes(
    data: bytes, ends: Places, rule: SplitRule
) -> tuple[NDArray[np.uint8], Places]:
    """Return the class of the character that each byte is of, and the places of unsafe characters."""
    ascii_classes = _ASCII_AND_BREAKS if rule.gpt4 else _ASCII
    classes = np.frombuffer(bytearray(data.translate(ascii_classes)), dtype=np.uint8)
    unsafe = np.zeros(0, dtype=np.int64)
    if not data.isascii():
        leads = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) >= 0xC0)
        codes = code_points(data.decode("utf-8"))
        codes = codes[codes >= 0x80]
        table = _class_table()
        for code in np.unique(codes[table[codes] == _UNKNOWN]).tolist():
            table[code] = _class(chr(code))
        found = table[codes]
        unsafe = leads[(found == _UNSAFE) | (codes == _LONG_S if rule.gpt4 else False)]
        for place, least in enumerate((0, 0x80, 0x800, 0x10000)):
            longer = codes >= least
            classes[leads[longer] + place] = found[longer]
    classes[ends] = _END
    return classes, unsafe


def split_words(
    data: bytes, classes: NDArray[np.uint8], ends: Places, rule: SplitRule
) -> tuple[Places, Places]:
    """Return places and sizes of the words that an expression finds in texts that end at ``ends``.

    A word is a run of one class. The last space before a word of another class belongs to that word if it is U+0020,
    or of any kind before letters in the expression of GPT-4, and else is a word. A contraction is a word wherever its
    apostrophe begins one. In the expression of GPT-4 a single other character that begins a word belongs to the letters
    after it; for line breaks see `_join_breaks`.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    classes = classes[: ends[-1] + 1]
    before, here = classes[:-1], classes[1:]
    is_start = np.ones(len(classes), dtype=bool)
    np.not_equal(before, here, out=is_start[1:])
    if rule.gpt4:
        _join_breaks(classes, is_start)
    is_start[ends[:-1] + 1] = True
    is_start[ends] = True
    after_space = (before == _SPACE) & (here < _SPACE)
    joined = octets[: len(before)] == ord(" ")
    if rule.gpt4:
        joined = ((here == _OTHER) & joined) | (here == _LETTER)
    if rule.digits_first:
        after_space &= here != _NUMBER
    is_start[1:] ^= after_space & joined
    is_start[:-1] |= after_space
    inside = np.flatnonzero(is_start & ((octets[: len(classes)] & 0xC0) == 0x80))
    is_start[inside] = False
    is_start[_first_bytes(octets, inside)] = True
    if rule.gpt4:
        letters = np.flatnonzero((before == _OTHER) & (here == _LETTER)) + 1
        is_start[letters[is_start[_first_bytes(octets, letters - 1)]]] = False

    quotes = np.flatnonzero(is_start & (octets[: len(classes)] == ord("'")))
    case = 0x20 if rule.gpt4 else 0  # the bit that makes ASCII letters small
    for ending in (b"s", b"t", b"re", b"ve", b"m", b"ll", b"d"):
        follows = np.logical_and.reduce(
            [octets[quotes + 1 + k] | case == letter for k, letter in enumerate(ending)]
        )
        is_start[quotes[follows] + 1] = False
        is_start[quotes[follows] + 1 + len(ending)] = True
    if rule.digits:
        is_first = (octets[: len(classes)] & 0xC0) != 0x80
        numbers = np.flatnonzero((classes == _NUMBER) & is_first)
        firsts = np.flatnonzero(classes[numbers - 1] != _NUMBER)
        nth = np.arange(len(numbers)) - np.repeat(firsts, np.diff(firsts, append=len(numbers)))
        is_start[numbers[nth % rule.digits == 0]] = True
    starts = np.flatnonzero(is_start)
    is_text = np.ones(len(starts), dtype=bool)
    is_text[np.searchsorted(starts, ends)] = False
    return starts[is_text], np.diff(starts, append=len(classes))[is_text]


def _join_breaks(classes: NDArray[np.uint8], is_start: NDArray[np.bool_]) -> None:
    """Join line breaks with what is before them: other characters, or all space that those do not end.

    Given are the starts of runs of one class.
    """
    starts = np.flatnonzero(is_start)
    breaks = np.flatnonzero(classes[starts] == _BREAK)
    previous = classes[starts[breaks] - 1]
    is_start[starts[breaks[(previous == _OTHER) | (previous == _SPACE)]]] = False
    spaces = breaks[previous == _SPACE] - 1
    between = (classes[starts[spaces] - 1] == _BREAK) & (classes[starts[spaces - 1] - 1] != _OTHER)
    is_start[starts[spaces[between]]] = False


def _first_bytes(octets: NDArray[np.uint8], places: Places) -> Places:
    """Return the places of the first bytes of the characters that have a byte at ``places``."""
    for _ in range(3):
        places = places - ((octets[places] & 0xC0) == 0x80)
    return places
