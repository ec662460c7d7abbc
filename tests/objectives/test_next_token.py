"""Targets of the next-token objective never cross a document."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import DataError, ModelError
from pretrain.objectives.next_token import NextToken


def _objective() -> NextToken:
    backbone = SimpleNamespace(model_type="gpt2", vocab_size=50)
    model: Any = SimpleNamespace(head_kind="causal-lm", tokenizer=None, backbone=backbone)
    return NextToken(model)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), padding=st.integers(0, 4))
def test_label_is_the_next_token_of_the_same_document(lengths: list[int], padding: int) -> None:
    total = sum(lengths) + padding
    ids = np.arange(1, total + 1)
    documents = np.concatenate(
        [np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(padding)]
    )
    row = {"input_ids": ids, "document_ids": documents.astype(np.int64)}
    objective = _objective()
    batch = objective.collate([row], [np.random.default_rng(0)])
    labels = batch["labels"][0].tolist()
    end = 0
    for length in lengths:
        start, end = end, end + length
        assert labels[start : end - 1] == ids[start + 1 : end].tolist()
        assert labels[end - 1] == -100
    assert all(label == -100 for label in labels[end:])
    assert int(objective.count(batch)) == sum(n - 1 for n in lengths) == len(batch["target_index"])


def test_padding_mask_counts_as_a_document() -> None:
    row = {"input_ids": np.array([5, 6, 7, 0]), "attention_mask": np.array([1, 1, 1, 0])}
    batch = _objective().collate([row], [np.random.default_rng(0)])
    assert batch["labels"].tolist() == [[6, 7, -100, -100]]


def test_labels_of_the_rows_are_the_targets_as_in_transformers() -> None:
    ids = np.arange(5, 13)
    row = {
        "input_ids": ids,
        "document_ids": np.array([1, 1, 1, 1, 1, 2, 2, 0]),
        "labels": np.where(np.arange(8) < 2, -100, ids),
    }
    batch = _objective().collate([row] * 2, [np.random.default_rng(0)] * 2)
    assert batch["labels"].tolist() == [[-100, 7, 8, 9, -100, 11, -100, -100]] * 2
    assert int(_objective().count(batch)) == 8
    with pytest.raises(DataError, match="need labels of one shape"):
        _objective().collate(
            [row, {k: row[k] for k in ("input_ids", "document_ids")}],
            [np.random.default_rng(0)] * 2,
        )


def test_bits_per_byte() -> None:
    figures = _objective().summarize(6.931471805599453, 10.0, {}, {"targets_per_byte": 0.5})
    assert figures["bits_per_byte"] == pytest.approx(0.5)
    assert figures["perplexity"] == pytest.approx(2.0)


def test_bidirectional_model_is_refused() -> None:
    backbone = SimpleNamespace(model_type="bert", vocab_size=50)
    model: Any = SimpleNamespace(head_kind="masked-lm", tokenizer=None, backbone=backbone)
    with pytest.raises(ModelError, match="MaskedLM"):
        NextToken(model)
