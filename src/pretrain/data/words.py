"""Pre-split sentences for token classification: words, tags, windows, and a tokenizer adapted to separate words."""

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
    """Return the words of each row of the column ``tokens``; printed lists are parsed, other text is split at spaces.

    Raises:
        DataError: a cell is not a list of strings.
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
    """Return the tags of each row of the column ``label``, as spelt in the source.

    Raises:
        DataError: a row has more or fewer tags than words; names the first three.
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
    """Split a sentence into windows of whole words.

    Args:
        sizes: number of tokens of each word.
        room: maximum tokens of a window; a longer word gets its own window.
        overlap: maximum tokens that adjacent windows share.

    Returns:
        First and last word (exclusive) of each window; both increase, and every word is in a window.
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
    """Return a tokenizer that encodes the words of a list as it encodes them in running text.

    Byte-level BPE includes the space before a word in its token, and words of a list have none: ``Paris`` would become
    another token than in the texts that the model was trained on. RoBERTa and GPT-2 have ``add_prefix_space`` for this;
    other tokenizers get a normalizer that prepends a space. If no change is needed, or the change does not help, the
    tokenizer is returned unchanged.
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
        # A model-specific class would overwrite the rules of the file with its own.
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
