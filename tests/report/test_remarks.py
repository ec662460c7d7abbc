"""Remarks that only need the records of a run."""

from __future__ import annotations

import pytest

from pretrain.report.remarks import compare_with_unigram


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (7.1, "no better than word frequencies alone, 7: nothing is learned from the context"),
        (6.9, "1% below the 7 of word frequencies alone: the model has learned little more than these"),
        (3.5, "50% below the 7 of word frequencies alone"),
    ],
)  # fmt: skip
def test_the_distance_from_word_frequencies_in_words(loss: float, words: str) -> None:
    assert compare_with_unigram(loss, 7.0) == words
