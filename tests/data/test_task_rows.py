"""Rows as token ids: framed as transformers frames them, and what a text cannot do to its own framing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from finetuning.conftest import model_of
from pretrain.data.task_rows import TaskEncoder, TaskRows
from pretrain.errors import TokenizerError

WORDS = st.sampled_from(
    ["the", "red", "old", "cat", "dog", "sat", "on", "log", "box", "zebra", "é", "."]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    path = model_of().save(tmp_path_factory.mktemp("tokenizer") / "bert")
    return transformers.AutoTokenizer.from_pretrained(Path(path))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.booleans(), st.integers(6, 60))
def test_framing_and_cutting_are_transformers(theirs, rows, paired, room) -> None:
    texts, pairs = [a for a, _ in rows], [b for _, b in rows] if paired else None
    encoder = TaskEncoder(tiny.tokenizer(), room, segments=True)
    wanted = theirs(texts, pairs, truncation=True, max_length=room, return_token_type_ids=True)
    for i, encoding in enumerate(encoder.texts(texts, pairs)):
        found = encoder.example(encoding)
        assert found["input_ids"].tolist() == wanted["input_ids"][i]
        assert found["token_type_ids"].tolist() == wanted["token_type_ids"][i]
        whole = theirs(texts[i], pairs[i] if pairs else None)["input_ids"]
        assert bool(encoding.overflowing) == (len(whole) > room)


def test_a_text_cannot_end_itself() -> None:
    encoder = TaskEncoder(tiny.tokenizer(), 40)
    ids = encoder.texts(["the cat [SEP] sat [CLS] [MASK]"])[0].ids
    special = set(tiny.tokenizer().special_ids) - {tiny.tokenizer().vocab["[UNK]"]}
    assert sum(i in special for i in ids) == 2  # its frame


def test_windows_overlap_and_cover_everything() -> None:
    encoder = TaskEncoder(tiny.tokenizer(), 12)
    context = "the red cat sat on the log and looked at the old dog on the mat"
    whole = encoder.texts([context], framed=False)[0]
    found = TaskEncoder(tiny.tokenizer(), 100).texts([context], framed=False)[0].ids
    windows = encoder.texts(["the cat"], [context], stride=2)[0]
    parts = [windows, *windows.overflowing]
    inner = [[i for i, s in zip(p.ids, p.sequence_ids, strict=True) if s == 1] for p in parts]
    joined = list(inner[0])
    for part in inner[1:]:
        assert part[:2] == joined[-2:]
        joined += part[2:]
    assert joined == found and len(parts) > 1 and len(whole.ids) == 12


def test_an_impossible_text_is_an_error_of_ours() -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        TaskEncoder(tiny.tokenizer(), 12).texts(["a \ud800 b"])


@given(st.lists(st.integers(1, 9), max_size=12))
def test_rows_know_their_lengths(sizes: list[int]) -> None:
    rows = TaskRows()
    for i, size in enumerate(sizes):
        rows.add(2 * i, {"input_ids": np.arange(size)}, f"row {i}")
    assert rows.lengths == sizes and rows.num_tokens == sum(sizes)
    assert rows.longest == max(sizes, default=0) and len(list(rows)) == len(rows) == len(sizes)
    largest = rows.largest(3)
    assert sorted((sizes[i] for i in largest), reverse=True) == sorted(sizes, reverse=True)[:3]
    part = rows.take(largest)
    assert part.owners == [2 * i for i in largest] and part.info == [f"row {i}" for i in largest]
    rows.drop(7, "empty")
    rows.drop(8, "empty")
    assert rows.dropped == {"empty": [7, 8]}
