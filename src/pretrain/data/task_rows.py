"""Labelled rows as token ids, with special tokens as added by ``AutoTokenizer``, of unequal length and not padded.

The special tokens (``[CLS] a [SEP] b [SEP]`` and similar frames) are added by the post-processor of the tokenizer's own
file, so that training sees the same input that other libraries feed to the saved model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.tokenizer import Tokenizer

__all__ = ["TaskEncoder", "TaskRows", "batches_by_length", "blanks_before_words", "word_windows"]


class TaskEncoder:
    """Encodes texts, pairs of texts, lists of words, and windows over long texts.

    Args:
        tokenizer: tokenizer of the model.
        max_length: maximum tokens of an example, special tokens included.
        segments: the model distinguishes the two texts of a pair by ``token_type_ids``.

    Special tokens typed into a text are read as plain text, so that a review cannot end its own example. The encodings
    are those of ``Tokenizer.frame_texts``.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, segments: bool = False) -> None:
        self.tokenizer, self.max_length, self.segments = tokenizer, max_length, segments

    def texts(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        stride: int | None = None,
        framed: bool = True,
    ) -> list[Any]:
        """Encode texts, or pairs of texts.

        Args:
            texts: one for each example.
            pairs: the second text of each example.
            stride: tokens by which windows over the *second* text overlap (windows after the first are in
                ``overflowing``); None truncates the longer of the two texts.
            framed: add the special tokens.
        """
        return self.tokenizer.frame_texts(
            texts,
            pairs,
            max_length=self.max_length,
            strategy="longest_first" if stride is None else "only_second",
            stride=stride or 0,
            special=False,
            framed=framed,
        )

    def words(self, sentences: Sequence[Sequence[str]]) -> list[Any]:
        """Encode sentences given as lists of words; ``word_ids`` of the result maps tokens to words."""
        return self.tokenizer.frame_texts(
            sentences, max_length=self.max_length, special=False, words=True
        )

    def example(self, encoding: Any) -> dict[str, NDArray[np.int64]]:
        """Return the arrays of one example: ``input_ids`` (n,) and, if the model uses them, ``token_type_ids`` (n,)."""
        arrays = {"input_ids": np.asarray(encoding.ids, dtype=np.int64)}
        if self.segments:
            arrays["token_type_ids"] = np.asarray(encoding.type_ids, dtype=np.int64)
        return arrays


@dataclass
class TaskRows(Sequence[Mapping[str, NDArray[Any]]]):
    """Examples of a task, in the order of their rows; a row may have several (windows over a long text).

    Attributes:
        examples: arrays of each example; those of texts have ``input_ids`` (n,), of unequal n.
        owners: row of the table that each example comes from.
        info: data needed to convert outputs into answers (offsets, words), for each example; not used in training.
        cut: rows that were truncated.
        dropped: reason -> rows without an example.
        remarks: remark for the user -> rows that it applies to, which have examples nevertheless.
        size: what every example costs where they have no ``input_ids``: the patches of an image.
    """

    examples: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    info: list[Any] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    remarks: dict[str, list[int]] = field(default_factory=dict)
    size: int = 0

    def add(self, row: int, example: dict[str, NDArray[Any]], info: Any = None) -> None:
        """Append an example of a row."""
        self.examples.append(example)
        self.owners.append(row)
        self.info.append(info)

    def drop(self, row: int, reason: str) -> None:
        """Record that a row has no example, and why."""
        self.dropped.setdefault(reason, []).append(row)

    def remark(self, row: int, text: str) -> None:
        """Record a remark for the user about a row that is used nevertheless."""
        self.remarks.setdefault(text, []).append(row)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def __iter__(self) -> Iterator[Mapping[str, NDArray[Any]]]:
        return iter(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example, or its ``size``."""
        if self.size:
            return [self.size] * len(self.examples)
        return [len(example["input_ids"]) for example in self.examples]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest example."""
        return max(self.lengths, default=0)

    @property
    def longest_document(self) -> int:
        """Number of tokens of the longest document; an example with ``lengths`` consists of several documents."""
        if self.size:
            return self.size
        found = (example.get("lengths", [len(example["input_ids"])]) for example in self.examples)
        return max((int(max(lengths)) for lengths in found), default=0)

    def largest(self, count: int) -> list[int]:
        """Return the indices of the ``count`` longest examples."""
        lengths = self.lengths
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])[:count]

    def take(self, indices: Iterable[int]) -> TaskRows:
        """Return the examples at ``indices`` with their owners and info, but no ``cut``, ``dropped`` or ``remarks``."""
        chosen = list(indices)
        return TaskRows(
            [self.examples[i] for i in chosen],
            [self.owners[i] for i in chosen],
            [self.info[i] for i in chosen],
            size=self.size,
        )


def batches_by_length(
    lengths: Sequence[int], max_rows: int, max_tokens: int
) -> Iterator[list[int]]:
    """Yield batches of indices of similar length for forward passes, shortest first.

    Args:
        lengths: number of tokens of each example.
        max_rows: maximum examples in a batch.
        max_tokens: maximum tokens of a batch, padding to its longest included; a longer example is a batch alone.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == max_rows or (len(batch) + 1) * lengths[i] > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


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
    changed = Tokenizer(backend, tokenizer.stated_roles, config)
    changed.chat_template = tokenizer.chat_template
    changed.named_templates, changed.padding = tokenizer.named_templates, tokenizer.padding
    return changed


def _reads_words_as_text(backend: Any) -> bool:
    words = ["a", "the", "x7", "Paris"]
    one = backend.encode(words, is_pretokenized=True, add_special_tokens=False)
    return bool(one.ids == backend.encode(" ".join(words), add_special_tokens=False).ids)
