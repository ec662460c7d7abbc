"""Labelled rows as token ids: framed as ``AutoTokenizer`` frames them, of unequal length, never padded here.

The framing (``[CLS] a [SEP] b [SEP]`` and its relatives) is the post-processor of the tokenizer's own file, so that
what is trained here is what any other library feeds to the saved model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer

__all__ = ["TaskEncoder", "TaskRows"]


class TaskEncoder:
    """Texts, pairs, words and windows to ids.

    Args:
        tokenizer: of the model.
        max_length: tokens that an example may have, framing included.
        segments: the model tells the two texts of a pair apart by ``token_type_ids``.

    Special tokens typed into a text are read as text: a review must not be able to end itself. What comes back for a
    text is what ``Tokenizer.frame_texts`` returns.
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
            stride: tokens by which windows over the *second* text overlap (what does not fit into one window comes
                in ``overflowing``); None cuts the longer of the two.
            framed: put the special tokens around them.
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
        """Encode sentences that come as lists of words; ``word_ids`` of the result say whose piece a token is."""
        return self.tokenizer.frame_texts(
            sentences, max_length=self.max_length, special=False, words=True
        )

    def example(self, encoding: Any) -> dict[str, NDArray[np.int64]]:
        """The arrays of one example: ``input_ids`` (n,) and, where the model has them, ``token_type_ids`` (n,)."""
        arrays = {"input_ids": np.asarray(encoding.ids, dtype=np.int64)}
        if self.segments:
            arrays["token_type_ids"] = np.asarray(encoding.type_ids, dtype=np.int64)
        return arrays


@dataclass
class TaskRows(Sequence[Mapping[str, NDArray[Any]]]):
    """Examples of a task, in the order of their rows; a row may give several (windows over a long text).

    Attributes:
        examples: arrays of each example; all have ``input_ids`` (n,), of unequal n.
        owners: row of the table that each example comes from.
        info: what is needed to turn outputs into answers (offsets, words), for each example; never trained on.
        cut: rows of which something did not fit.
        dropped: reason -> rows that gave no example.
        remarks: what people should know -> rows that it holds for, which give examples all the same.
    """

    examples: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    info: list[Any] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    remarks: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: int, example: dict[str, NDArray[Any]], info: Any = None) -> None:
        """Append an example of a row."""
        self.examples.append(example)
        self.owners.append(row)
        self.info.append(info)

    def drop(self, row: int, reason: str) -> None:
        """Note that a row gave no example."""
        self.dropped.setdefault(reason, []).append(row)

    def remark(self, row: int, text: str) -> None:
        """Note what people should know of a row that is used all the same."""
        self.remarks.setdefault(text, []).append(row)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def __iter__(self) -> Iterator[Mapping[str, NDArray[Any]]]:
        return iter(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example["input_ids"]) for example in self.examples]

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths, default=0)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest text that the model reads by itself: some examples are several, with ``lengths``."""
        found = (example.get("lengths", [len(example["input_ids"])]) for example in self.examples)
        return max((int(max(lengths)) for lengths in found), default=0)

    def largest(self, count: int) -> list[int]:
        """Indices of the ``count`` longest examples."""
        lengths = self.lengths
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])[:count]

    def batches(self, max_rows: int, max_tokens: int) -> Iterator[list[int]]:
        """Indices of examples for one forward pass after another, similar lengths together.

        Args:
            max_rows: examples in a batch.
            max_tokens: of a batch, counted as padded to its longest; a longer example stands alone.
        """
        lengths = self.lengths
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and (len(batch) == max_rows or (len(batch) + 1) * lengths[i] > max_tokens):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def take(self, indices: Iterable[int]) -> TaskRows:
        """The examples at ``indices``; owners stay what they are."""
        chosen = list(indices)
        return TaskRows(
            [self.examples[i] for i in chosen],
            [self.owners[i] for i in chosen],
            [self.info[i] for i in chosen],
        )
