"""``pretrain.data``: what fine-tuning would see, without training anything."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from finetuning.conftest import ANIMALS, rows_of
from pretrain.errors import ConfigError, DataError
from pretrain.finetuning.preview import look


def test_classes_lengths_and_examples(checkpoint: str) -> None:
    rows = rows_of(58)
    rows += [{"text": "the cat " * 50, "label": "cat"}, {"text": " ", "label": "dog"}]
    found = look(rows, "classification", checkpoint, max_length=30, valid=0.25)
    assert found.rows == {"train": 45, "valid": 15} and found.cut <= 1
    assert {name: sum(counts.values()) for name, counts in found.classes.items()} == found.rows
    assert tuple(found.classes["train"]) == ANIMALS
    assert max(found.lengths) <= 30 and len(found.examples) == 3
    text = repr(found)
    assert "cat" in text and "15" in text
    assert "<" in found._repr_html_()


def test_without_a_model_words_are_counted() -> None:
    found = look(rows_of(30))
    assert found.tokenizer == "" and found.examples == [] and "tokens" not in found.length_line
    words = sorted(len(r["text"].split()) for r in rows_of(30))
    assert sum(found.lengths) <= sum(words) and len(found.lengths) == 27  # the labels are not read


@pytest.mark.parametrize(
    ("task", "row", "count"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}, 3),
        ("chat", {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]}, 4),
        ("chat", {"prompt": "a b", "completion": "c d e"}, 5),
        ("preference", {"prompt": "a b", "chosen": "c", "rejected": "d e"}, 5),
        ("token-classification", {"tokens": ["a", "b"], "tags": ["O", "B-X"]}, 2),
        ("question-answering", {"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [2]}}, 3),
    ],
)  # fmt: skip
def test_without_a_model_words_of_every_form_are_counted(
    task: str, row: dict[str, Any], count: int
) -> None:
    assert look([row] * 4, task, valid=0).lengths == [count] * 4


def test_columns_and_numbers(checkpoint: str) -> None:
    rows = [{"review": r["text"], "stars": len(r["text"])} for r in rows_of(30)]
    found = look(rows, "regression", checkpoint, text="review", label="stars")
    assert not found.classes and found.rows["train"] == 27


def test_numbers_with_names_are_counted(checkpoint: str) -> None:
    rows = [{"text": r["text"], "label": ANIMALS.index(r["label"])} for r in rows_of(30)]
    found = look(rows, model=checkpoint, labels=list(ANIMALS), valid=0)
    assert found.classes["train"] == dict.fromkeys(ANIMALS, 10)


@pytest.mark.parametrize("spell", [float, str, lambda k: [k]])
def test_labels_are_counted_as_they_are_read(spell: Any) -> None:
    rows = [{"text": r["text"], "label": spell(ANIMALS.index(r["label"]))} for r in rows_of(30)]
    found = look(rows, valid=0, problem="single_label")
    assert list(found.classes["train"].values()) == [10, 10, 10]


def test_held_out_classes_are_counted_by_their_names() -> None:
    datasets = pytest.importorskip("datasets")
    train, valid = rows_of(30), rows_of(60)[40:]
    parts = {}
    for part, rows, names in (("train", train, ANIMALS), ("validation", valid, ANIMALS[::-1])):
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
        parts[part] = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    counts = Counter(row["label"] for row in valid)
    assert len(set(counts.values())) > 1
    assert look(parts).classes["valid"] == {animal: counts[animal] for animal in ANIMALS}


@pytest.mark.parametrize("spell", [str.split, str])
def test_tags_of_words_are_no_classes_of_rows(spell: Any) -> None:
    rows = [{"tokens": spell("the cat"), "tags": spell(f"O {tag}")} for tag in "ABAB"]
    assert look(rows, "token-classification", valid=0).classes == {}


def test_classes_of_pixels_and_objects_are_named() -> None:
    pytest.importorskip("PIL")
    image = np.zeros((8, 8), np.uint8)
    objects = [{"image": image, "boxes": [[0, 0, 4, 4]], "label": [k]} for k in ("cat", "dog")]
    masks = [{"image": image, "mask": np.eye(8, dtype=np.uint8)}] * 2
    for rows, task, line in (
        (objects, "object-detection", "2 labels: cat, dog"),
        ([dict(row, label=["cat"]) for row in objects], "object-detection", "1 label: cat"),
        (masks, "segmentation", "2 labels: 0, 1"),
    ):
        assert line in look(rows, task, valid=0).notes


def test_several_labels(checkpoint: str) -> None:
    rows = [{"text": r["text"], "label": [r["label"]]} for r in rows_of(30)]
    assert look(rows, model=checkpoint).rows["train"] == 27


def test_nothing_is_written(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain.finetuning.preview.look(rows_of(12), model=checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"text": "revue"}, DataError, "revue"), ({"task": "clasification"}, ConfigError, "classification"),
        ({"max_lenght": 5}, ConfigError, "max_length"), ({"max_length": 2}, ConfigError, "max_length"),
    ],
)  # fmt: skip
def test_what_cannot_be(given: dict[str, Any], error: type, words: str, checkpoint: str) -> None:
    with pytest.raises(error, match=words):
        look(rows_of(12), **({"model": checkpoint} | given))
