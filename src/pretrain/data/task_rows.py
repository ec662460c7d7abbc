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

from pretrain.errors import TokenizerError

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer

__all__ = ["TaskEncoder", "TaskRows"]

_BATCH = 1024  # texts that are encoded at once


class TaskEncoder:
    """Texts, pairs, words and windows to ids.

    Args:
        tokenizer: of the model.
        max_length: tokens that an example may have, framing included.
        segments: the model tells the two texts of a pair apart by ``token_type_ids``.

    What the library gives back for a text is its ``Encoding``: ids, type_ids, offsets, word_ids, sequence_ids, and
    in ``overflowing`` what did not fit.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, segments: bool = False) -> None:
        self.tokenizer, self.max_length, self.segments = tokenizer, max_length, segments
        self._made: Any = None

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
        backend = self._backend()
        if stride is None:
            backend.enable_truncation(self.max_length, strategy="longest_first")
        else:
            backend.enable_truncation(self.max_length, stride=stride, strategy="only_second")
        inputs: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        return self._encode(backend, inputs, framed, pretokenized=False)

    def words(self, sentences: Sequence[Sequence[str]]) -> list[Any]:
        """Encode sentences that come as lists of words; ``word_ids`` of the result say whose piece a token is."""
        backend = self._backend()
        backend.enable_truncation(self.max_length)
        return self._encode(backend, [list(words) for words in sentences], True, pretokenized=True)

    def _backend(self) -> Any:
        if self._made is None:
            import tokenizers

            # Special tokens typed into a text are read as text: a review must not be able to end itself.
            self._made = tokenizers.Tokenizer.from_str(self.tokenizer.plain.to_str())
            self._made.encode_special_tokens = True
            self._made.no_padding()
        return self._made

    def _encode(
        self, backend: Any, inputs: list[Any], framed: bool, *, pretokenized: bool
    ) -> list[Any]:
        found: list[Any] = []
        for i in range(0, len(inputs), _BATCH):
            try:
                found += backend.encode_batch(
                    inputs[i : i + _BATCH], is_pretokenized=pretokenized, add_special_tokens=framed
                )
            except (
                Exception
            ) as error:  # the library raises plain Exception, and panics as another class
                raise TokenizerError(
                    f"The texts cannot be encoded in {self.max_length} tokens: {error}. Give strings without halves "
                    "of surrogate pairs, and a max_length that leaves room for text."
                ) from error
        return found

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
    """

    examples: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    info: list[Any] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: int, example: dict[str, NDArray[Any]], info: Any = None) -> None:
        """Append an example of a row."""
        self.examples.append(example)
        self.owners.append(row)
        self.info.append(info)

    def drop(self, row: int, reason: str) -> None:
        """Note that a row gave no example."""
        self.dropped.setdefault(reason, []).append(row)

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

    def take(self, indices: Iterable[int]) -> TaskRows:
        """The examples at ``indices``; owners stay what they are."""
        chosen = list(indices)
        return TaskRows(
            [self.examples[i] for i in chosen],
            [self.owners[i] for i in chosen],
            [self.info[i] for i in chosen],
        )
