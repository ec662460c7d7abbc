"""Rows of a run: columns, split, rows that recur, and what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetuning.conftest import ANIMALS, model_of, rows_of
from pretrain.data.tables import read_table
from pretrain.errors import DataError
from pretrain.finetuning.rows import Data, encode, open_data
from pretrain.finetuning.settings import from_keywords
from pretrain.objectives.classification import Classification


def opened(rows: Any, task: type = Classification, **given: Any) -> Data:
    settings, objects = from_keywords(None, "m", "classification", {"train": rows, **given})
    return open_data(settings, objects, task)


def test_a_tenth_of_every_class_is_held_out() -> None:
    found = opened(rows_of(90))
    assert found.counts == {"train": 81, "valid": 9} and found.test is None
    assert sorted(found.valid.columns["label"]) == sorted(ANIMALS * 3)
    texts = [*found.train.columns["text"], *found.valid.columns["text"]]
    assert sorted(texts) == sorted(r["text"] for r in rows_of(90))
    again, other = opened(rows_of(90)), opened(rows_of(90), seed=1)
    assert again.fingerprint == found.fingerprint != other.fingerprint
    assert again.valid.columns == found.valid.columns != other.valid.columns


def test_labels_in_the_order_that_is_given() -> None:
    assert opened(rows_of(12), labels=["fox", "cat", "dog"]).learned.labels == ("fox", "cat", "dog")


def test_names_of_a_class_column() -> None:
    datasets = pytest.importorskip("datasets")
    names = ["zebra", "cat", "dog"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    made = datasets.Dataset.from_dict(
        {"text": [f"the {i}" for i in range(9)], "label": [1, 2, 0] * 3}, features=features
    )
    assert opened(made).learned.labels == tuple(names)


def test_rows_that_recur_are_dropped_from_training_alone() -> None:
    rows = rows_of(40)
    found = opened(
        rows, valid=[{**rows[0], "text": rows[0]["text"].upper() + " !"}], test=rows[5:8]
    )
    assert found.counts == {"train": 36, "valid": 1, "test": 3} and found.left_out == 4
    assert found.recurring == {"valid": 1, "test": 3}
    left = set(found.train.columns["text"])
    assert not left & {rows[i]["text"] for i in (0, 5, 6, 7)}
    assert len([n for n in found.notes if "recur" in n]) == 2


def test_one_text_with_two_partners_does_not_recur() -> None:
    rows = [{"text": "a cat", "pair": f"b {i}", "label": ANIMALS[i % 3]} for i in range(12)]
    found = opened(rows, valid=[{"text": "a cat", "pair": "b 3", "label": "cat"}])
    assert found.recurring == {"valid": 1} and found.left_out == 1


def test_a_row_that_recurs_in_two_parts_counts_in_each() -> None:
    rows = rows_of(40)
    found = opened(rows, valid=rows[2:8], test=rows[5:8])
    assert found.recurring == {"valid": 6, "test": 3} and found.left_out == 6
    assert "3 training rows recur in the test rows and were left out" in found.notes


def test_held_out_rows_may_name_their_columns_otherwise() -> None:
    train = [{"review": r["text"], "stars": r["label"]} for r in rows_of(12)]
    found = opened(train, text="review", label="stars", valid=rows_of(6, 4))
    assert found.valid.names and set(found.valid.names) >= {"text", "label"}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows_of(30)))
    found = opened(path)
    assert found.names["train"] == "rows.csv" and sum(found.counts.values()) == 30
    assert "rows.csv, line" in found.valid.where(0)


def task_of(**options: Any) -> Classification:
    return Classification(model_of(head="sequence-classification", labels=ANIMALS), **options)


@pytest.mark.parametrize(
    ("allowed", "fails"), [(0.01, True), (0.1, True), (0.25, False), (1.0, False)]
)
def test_what_does_not_fit(allowed: float, fails: bool) -> None:
    rows = rows_of(10)
    for i in (3, 8):
        rows[i] = {"text": "the cat " * 30, "label": "cat"}
    notes: list[str] = []
    table = read_table(rows)
    if fails:
        with pytest.raises(
            DataError, match=r"2 of 10 training rows \(20.00%\).*row 4.*max_cut=0\.2[01]"
        ):
            encode(task_of(max_length=20), table, "training", allowed, notes)
        return
    found = encode(task_of(max_length=20), table, "training", allowed, notes)
    assert found.longest == 20 and notes == [
        "2 of 10 training rows (20.00%) exceed 20 tokens and are cut"
    ]


def test_the_share_that_the_error_names_is_enough() -> None:
    """Whoever does what the message says gets no second error."""
    import re

    rows = rows_of(300)
    for i in range(14):  # 4.67 %
        rows[i] = {"text": f"the cat {i} " * 30, "label": "cat"}
    table, task = read_table(rows), task_of(max_length=20)
    with pytest.raises(DataError) as caught:
        encode(task, table, "training", 0.01, [])
    named = re.search(r"max_cut=([\d.]+\d)", str(caught.value))
    assert named is not None
    encode(task, table, "training", float(named[1]), [])


def test_empty_texts_are_left_out_and_said() -> None:
    notes: list[str] = []
    rows = [*rows_of(4), *({"text": " ", "label": "cat"} for _ in range(5))]
    table = read_table(rows)
    assert len(encode(task_of(), table, "training", 0.01, notes)) == 4
    assert notes == [
        f"5 training rows left out, empty text: {', '.join(table.where(i) for i in (4, 5, 6))}, ..."
    ]
    with pytest.raises(DataError, match="None of the 5"):
        encode(task_of(), read_table(rows[4:]), "training", 0.01, notes)
