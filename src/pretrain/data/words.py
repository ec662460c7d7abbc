"""Sentences that come as lists of words: their tags, windows over them, and a tokenizer that reads words as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pretrain.data.label_forms import printed_list
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError

if TYPE_CHECKING:
    from pretrain.data.tables import Table

__all__ = ["blanks_before_words", "read_tags", "read_words", "word_windows"]


def read_words(table: Table) -> list[list[str]]:
    """The words of every row of the column ``tokens``; a printed list is read, another text cut at its blanks.

    Raises:
        DataError: a cell that is no list of texts.
    """
    found = []
    for i in range(len(table)):
        words = _listed(table, i, "tokens", "words")
        for word in words:
            if not isinstance(word, str):
                raise DataError(
                    f"{table.where(i)}: the word {word!r} is {type(word).__name__}, not a text. Name the column that "
                    "holds lists of words."
                )
        found.append(words)
    return found


def read_tags(table: Table, sentences: Sequence[Sequence[str]]) -> list[list[Any]]:
    """The tags of every row of the column ``label``, as the source spells them.

    Raises:
        DataError: a row with more or fewer tags than words; names the first three.
    """
    found, wrong = [], []
    for i, words in enumerate(sentences):
        tags = _listed(table, i, "label", "tags")
        if len(tags) != len(words):
            wrong.append(f"{table.where(i)}: {len(words)} words, {len(tags)} tags")
        found.append(tags)
    if wrong:
        raise DataError(
            f"{len(wrong)} rows have not one tag for each word: {'; '.join(wrong[:3])}{'; ...' * (len(wrong) > 3)}. "
            "Correct or remove them; tags belong to words, not to sub-word tokens."
        )
    return found


def _listed(table: Table, i: int, role: str, what: str) -> list[Any]:
    value = table.columns[role][i]
    if isinstance(value, str):
        text = value.strip()
        listed = text.startswith(("['", '["')) or (role == "label" and text.startswith("["))
        parsed = printed_list(text) if listed else None
        return value.split() if parsed is None else parsed
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{table.where(i)}: the {what} are {type(value).__name__} {str(value)[:40]!r}. Give a list with one for "
            "each word."
        )
    return list(value)


def word_windows(sizes: Sequence[int], room: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a sentence into windows of whole words.

    Args:
        sizes: tokens of each word.
        room: tokens that a window may have; a longer word has a window to itself.
        overlap: tokens that neighbours share at most.

    Returns:
        First word and last word (exclusive) of each window; both grow, and every word is in a window.
    """
    windows, start = [], 0
    while True:
        end, used = start, 0
        while end < len(sizes) and (end == start or used + sizes[end] <= room):
            used += sizes[end]
            end += 1
        windows.append((start, end))
        if end >= len(sizes):
            return windows
        start, shared = end, 0
        while start - 1 > windows[-1][0] and shared + sizes[start - 1] <= min(
            overlap, room - sizes[end]
        ):
            start -= 1
            shared += sizes[start]


def blanks_before_words(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that encodes words given one by one as it encodes them in a text.

    Byte-level BPE joins a word with the blank before it, and words that come in a list have none: ``Paris`` would be
    another token than in all texts that the model has read. RoBERTa and GPT-2 have ``add_prefix_space`` for this; the
    others get a rule that puts a blank in front. A tokenizer that needs nothing, or that this does not help, is
    returned as it is.
    """
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    if _reads_words_as_text(backend):
        return tokenizer
    config = dict(tokenizer.config)
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = True
        config["add_prefix_space"] = True
    else:
        blank = normalizers.Prepend(" ")
        known = backend.normalizer
        backend.normalizer = blank if known is None else normalizers.Sequence([known, blank])
        # A class of one family would write its own rules over those of the file.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if not _reads_words_as_text(backend):
        return tokenizer
    changed = Tokenizer(backend, tokenizer.roles, config)
    changed.chat_template = tokenizer.chat_template
    return changed


def _reads_words_as_text(backend: Any) -> bool:
    words = ["a", "the", "x7", "Paris"]
    one = backend.encode(words, is_pretokenized=True, add_special_tokens=False)
    return bool(one.ids == backend.encode(" ".join(words), add_special_tokens=False).ids)
