"""Rows of a run: columns, split, rows that recur, and what is cut."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
from finetuning.conftest import ANIMALS, model_of, rows_of
from pretrain.config.spelling import FINETUNE, Interface, using
from pretrain.data.tables import read_table
from pretrain.errors import ConfigError, DataError
from pretrain.finetuning.keywords import from_keywords
from pretrain.finetuning.rows import Data, encode, open_data
from pretrain.finetuning.start import begun_as
from pretrain.objectives import check_options, task_class
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.classification import Classification
from pretrain.objectives.embedding import Embedding


@using(FINETUNE)
def opened(rows: Any, task: type = Classification, **options: Any) -> Data:
    tuned, objects = from_keywords(None, "m", "classification", {"train": rows, **options})
    return open_data(tuned, objects, task)


def test_a_run_that_has_begun_keeps_its_columns(checkpoint: str, tmp_path: Path) -> None:
    """A name that is recognised since would change its rows."""
    pairs = [{"query": f"cat {i}", "document": f"dog {i}", "neg": f"fox {i}"} for i in range(9)]
    tuned, objects = from_keywords(None, "m", "embedding", {"train": pairs, "valid": 0.2})
    begun = {"begun_columns": {"anchor": "query", "positive": "document"}}
    kept = open_data(tuned, objects, Embedding, None, begun)
    assert kept.train.names == kept.valid.names == ["anchor", "positive"]
    new = open_data(tuned, objects, Embedding)
    assert new.train.names == new.valid.names == ["anchor", "positive", "negative"]
    named, objects = from_keywords(None, "m", "embedding", {"train": pairs, "negative": "neg"})
    assert "negative" in open_data(named, objects, Embedding, None, begun).train.names
    found = pretrain.finetune(
        checkpoint,
        pairs,
        "embedding",
        out=tmp_path / "run",
        limit="1 steps",
        quiet=True,
        device="cpu",
    )
    assert begun_as(found.run.path, Embedding)["begun_columns"] == new.columns


def test_a_run_that_has_begun_keeps_pairs_of_which_a_column_says_that_they_do_not_match() -> None:
    """Columns that are refused since were read when it began, and its rows are still those."""
    pairs = [{"query": f"cat {i}", "answer": f"dog {i}", "relevance": i % 2} for i in range(9)]
    tuned, objects = from_keywords(None, "m", "embedding", {"train": pairs, "valid": 0.2})
    begun = {"begun_columns": {"anchor": "query", "positive": "answer"}}
    assert open_data(tuned, objects, Embedding, None, begun).counts == {"train": 7, "valid": 2}
    with pytest.raises(DataError, match="relevance"):
        open_data(tuned, objects, Embedding)


def test_negatives_that_a_model_was_trained_without_are_told(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among more candidates the figures are lower."""
    pairs = [{"query": f"cat {i}", "answer": f"dog {i}"} for i in range(9)]
    given: dict[str, Any] = {"limit": "1 steps", "quiet": True, "device": "cpu"}
    pretrain.finetune(checkpoint, pairs, "embedding", out=tmp_path / "run", **given)
    rows = tmp_path / "more.jsonl"
    for neg in ({}, {"neg": "fox"}):
        rows.write_text("\n".join(json.dumps({**pair, **neg}) for pair in pairs))
        capsys.readouterr()
        pretrain.evaluate(tmp_path / "run", rows)
        assert ("'neg' is read as negative, which" in capsys.readouterr().err) == bool(neg)


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


def test_classes_that_only_recurring_rows_have_are_named() -> None:
    gone = [{"text": "gone", "label": "owl"}] * 3
    found = opened(rows_of(40) + gone, valid=gone[:1])
    assert found.left_out == 3
    assert any("no training row of the class 'owl' is left" in note for note in found.notes)
    numbers = [{"text": f"{i} a", "label": float(i % 2)} for i in range(9)]
    numbers += [{"text": "gone", "label": 2.0}] * 2
    found = opened(numbers, valid=numbers[-1:])
    assert any("no training row of the class '2.0' is left" in note for note in found.notes)
    several = [{"text": f"{i} a", "label": ["cat", "dog"][: 1 + i % 2]} for i in range(9)]
    gone = [{"text": "gone", "label": ["cat", "owl"]}]
    found = opened(several + gone, valid=gone)
    assert any("no training row of the class 'owl' is left" in note for note in found.notes)


def test_one_text_with_two_partners_does_not_recur() -> None:
    rows = [{"text": "a cat", "pair": f"b {i}", "label": ANIMALS[i % 3]} for i in range(12)]
    found = opened(rows, valid=[{"text": "a cat", "pair": "b 3", "label": "cat"}])
    assert found.recurring == {"valid": 1} and found.left_out == 1


def test_questions_about_one_image_stand_on_one_side() -> None:
    pytest.importorskip("PIL")
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    rows = [
        {"image": images[i // 2], "question": f"what {i % 2}", "text": f"it {i}"} for i in range(40)
    ]

    def seen(table: Any) -> set[str]:
        return {image.digest for image in table.columns["image"]}

    for asked in (rows, [{k: v for k, v in row.items() if k != "question"} for row in rows]):
        found = opened(asked, Captioning, valid=0.2)
        assert found.counts == {"train": 32, "valid": 8} and found.left_out == 0
        assert not seen(found.train) & seen(found.valid)
        assert any("whole groups by 'image' (20 in all)" in note for note in found.notes)
    single = opened(rows[::2], Captioning, valid=0.2)
    assert single.counts == {"train": 16, "valid": 4}
    assert not any("whole groups" in note for note in single.notes)
    given = opened(rows, Captioning, valid=[{**rows[0], "question": "another"}])
    assert given.counts == {"train": 38, "valid": 1} and given.recurring == {"valid": 2}


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


def test_named_tuples_are_read_by_their_names() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows_of(12))[["label", "text"]]
    found = opened(list(frame.itertuples(index=False)))
    assert found.learned.labels == opened(rows_of(12)).learned.labels


@pytest.mark.parametrize("fields", ["a b", "q topic", "sentence cls", "_0 _1"])
def test_named_tuples_without_known_names_are_read_by_position(fields: str) -> None:
    named = collections.namedtuple("named", fields, rename=True)
    found = opened([named(row["text"], row["label"]) for row in rows_of(12)])
    assert found.learned.labels == opened(rows_of(12)).learned.labels


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


# ------------------------------------------------------------------------------------------- splits and groups

SPLITS = {
    "of lists": lambda parts: parts,
    "of columns": lambda parts: {
        name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in parts.items()
    },
    "of tuples": lambda parts: {
        name: [(row["text"], row["label"]) for row in rows] for name, rows in parts.items()
    },
    "of frames": lambda parts: {
        name: pytest.importorskip("pandas").DataFrame(rows, index=["x"] * len(rows))
        for name, rows in parts.items()
    },
    "of arrow tables": lambda parts: {
        name: pytest.importorskip("pyarrow").Table.from_pylist(rows) for name, rows in parts.items()
    },
    "DatasetDict": lambda parts: pytest.importorskip("datasets").DatasetDict(
        {
            name: pytest.importorskip("datasets").Dataset.from_list(rows)
            for name, rows in parts.items()
        }
    ),
}


@pytest.mark.parametrize("form", SPLITS)
@pytest.mark.parametrize("held", ["validation", "dev", None])
def test_the_splits_of_one_object_are_used(form: str, held: str | None) -> None:
    rows = rows_of(60)
    parts = {"train": rows[:40], "test": rows[50:]} | ({held: rows[40:50]} if held else {})
    found, plain = opened(SPLITS[form](parts)), opened(rows[:40], test=rows[50:])
    if held:
        plain = opened(rows[:40], valid=rows[40:50], test=rows[50:])
    assert found.counts == plain.counts and found.learned.labels == plain.learned.labels
    for name in found.counts:
        assert getattr(found, name).columns == getattr(plain, name).columns
    # What the caller names goes before.
    assert opened(SPLITS[form](parts), test=rows[:3], valid=0.5).counts["test"] == 3


def test_the_splits_of_a_json_file_are_used(tmp_path: Path) -> None:
    rows, path = rows_of(60), tmp_path / "a.json"
    parts = {"train": rows[:40], "dev": rows[40:50], "test": rows[50:]}
    path.write_text(json.dumps(parts))
    found, plain = opened(str(path)), opened(parts)
    assert found.counts == plain.counts == {"train": 40, "valid": 10, "test": 10}
    for name in found.counts:
        assert getattr(found, name).columns == getattr(plain, name).columns
    assert opened(path, test=rows[:3], valid=0.5).counts["test"] == 3


def test_the_matched_parts_of_mnli_are_used() -> None:
    rows = rows_of(60)
    parts = {
        "train": rows[:20],
        "validation_matched": rows[20:30],
        "validation_mismatched": rows[30:40],
    }
    found = opened(parts | {"test_matched": rows[40:55], "test_mismatched": rows[55:]})
    assert found.counts == {"train": 20, "valid": 10, "test": 15}


def test_a_test_split_without_labels_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(60)
    hidden = [{**row, "label": "-1"} for row in rows[50:]]
    found = opened({"train": rows[:50], "test": hidden})
    assert found.test is None and "test split is not used" in found.notes[-1]
    with pytest.raises(DataError, match="-1 marks a row without"):
        opened(rows[:50], test=hidden)


@pytest.mark.parametrize(
    ("task", "name", "known", "hidden"),
    [
        ("question-answering", "answers", {"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}),
        ("question-answering", "answers", "cat", "{'text': array([], dtype=object), 'answer_start': []}"),
        ("classification", "labels", ["cat", "dog"], []),
        ("regression", "label", 2.5, -1),
        ("token-classification", "label", [1, 0], [-1, -1]),
        ("token-classification", "label", [1, 0], "[-100, -100]"),
    ],
)  # fmt: skip
def test_a_test_split_whose_answers_are_held_back_is_left(
    task: str, name: str, known: Any, hidden: Any
) -> None:
    """What is empty, -1 or -100 in all rows would be measured as if it were meant; one row of another kind means it."""
    cls = task_class(task)

    def rows(seed: int, target: Any) -> list[dict[str, Any]]:
        texts = [row["text"] for row in rows_of(12, seed)]
        if name == "answers":
            return [{"question": "who", "context": f"the cat {t}", name: target} for t in texts]
        if task == "token-classification":
            return [{"tokens": t.split()[:2], name: target} for t in texts]
        return [{"text": text, name: target} for text in texts]

    others = {"regression": 1.0, "classification": ["dog"]}.get(task, known)
    train, test = [*rows(0, known)[1:], rows(0, others)[0]], rows(1, hidden)
    found = opened({"train": train, "test": test}, task=cls)
    assert found.test is None and f"is not used: {name[:5]}" in found.notes[-1]
    mixed = opened({"train": train, "test": [*test, rows(2, known)[0]]}, task=cls)
    assert mixed.counts["test"] == 13
    if hidden == -1:
        meant = opened({"train": [*train, rows(3, -1)[0]], "test": test}, task=cls)
        assert meant.counts["test"] == 12


def grouped(groups: list[int], seed: int = 0) -> list[dict[str, Any]]:
    rows = rows_of(len(groups), seed)
    return [
        {"text": f"{row['text']} {i}", "label": row["label"], "author": g}
        for i, (row, g) in enumerate(zip(rows, groups, strict=True))
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=60, max_size=150),
    st.floats(0.05, 0.5),
    st.integers(0, 5),
)
def test_rows_of_one_group_stand_on_one_side(groups: list[int], share: float, seed: int) -> None:
    rows = grouped(groups)
    if len(set(groups)) < 10:  # so few may hold a class whole
        return
    found = opened(rows, valid=share, group="author", seed=seed)
    author = {row["text"]: row["author"] for row in rows}
    train, valid = (
        {author[t] for t in part.columns["text"]} for part in (found.train, found.valid)
    )
    assert not train & valid and len(found.valid)
    assert set(found.train.columns["label"]) == set(ANIMALS)
    largest = max(groups.count(g) for g in groups)
    assert len(found.valid) <= share * len(rows) + largest
    again = opened(rows, valid=share, group="author", seed=seed)
    assert again.valid.columns == found.valid.columns


def test_groups_meet_the_shares_where_they_can() -> None:
    rows = grouped([i // 4 for i in range(600)])
    found = opened(rows, valid=0.2, group="author")
    held = [found.valid.columns["label"].count(label) for label in ANIMALS]
    assert len(found.valid) == pytest.approx(120, abs=8) and max(held) - min(held) <= 6
    assert "whole groups by 'author' (150 in all)" in found.notes[0]


def test_groups_of_given_splits_are_compared() -> None:
    rows = grouped([i // 4 for i in range(80)])
    found = opened(rows[:60], valid=rows[58:], test=rows[70:], group="author")
    lines = [line for line in found.notes if "groups by" in line]
    assert lines == [
        "1 groups by 'author' occur both in 4 training rows and in the validation rows, so the validation figure "
        "does not measure unseen groups"
    ]
    with pytest.raises(DataError, match="no column 'autor' for group='autor'.*'author'"):
        opened(rows, group="autor")
    lone = [{**row, "author": None} for row in rows]
    assert 6 <= len(opened(lone, group="author").valid) <= 10
    other = [{**row, "text": f"{row['text']} again"} for row in lone]
    assert not [
        line for line in opened(lone, valid=other, group="author").notes if "groups" in line
    ]


@pytest.mark.parametrize("spell", [str, float, "{}.0".format])
def test_a_group_that_is_a_number_is_one_in_any_spelling(spell: Any) -> None:
    rows = grouped([i // 4 for i in range(80)])
    held = [{**row, "author": spell(row["author"])} for row in rows[58:]]
    found = opened(rows[:60], valid=held, group="author")
    assert any("1 groups by 'author' occur both in 4" in line for line in found.notes)


# ------------------------------------------------------------------------------- labels of a checkpoint, options


def test_labels_of_a_checkpoint_are_kept() -> None:
    rows, known = rows_of(30), ("fox", "cat", "dog")

    def read(values: list[Any], **given: Any) -> Any:
        made = [{"text": row["text"], "label": v} for row, v in zip(rows, values, strict=False)]
        table, objects = from_keywords(None, "m", "classification", {"train": made, **given})
        return open_data(table, objects, Classification, known)

    names = [row["label"] for row in rows]
    for values in (
        names,
        [name.upper() for name in names],
        [f" {name}" for name in names],
        [known.index(name) for name in names],
        [str(known.index(name)) for name in names],
        [[float(name == label) for label in known] for name in names],
        [[known.index(name)] for name in names],
    ):
        found = read(values)
        assert found.learned.labels == known
        truth = {r["text"]: r["label"] for r in rows}
        for table in (found.train, found.valid):
            strata = Classification.learn(table, {"checkpoint_labels": known}).strata
            plain = [known[k] if isinstance(k, int) else k[0] for k in strata]
            assert plain == [truth[t] for t in table.columns["text"]]
    assert read(["cat", "fox"] * 15).learned.labels == known
    for values, words in (
        (["0", "cat", "1"] * 10, "mixes names and numbers"),
        (["neg", "pos"] * 15, r"'neg' is not among the classes of the checkpoint.*labels=\["),
        (["cat", "cow"] * 15, "'cow' is not among"),
        ([0, 3] * 15, "'0' is not among"),
    ):
        with pytest.raises(DataError, match=words):
            read(values)
    assert read(["neg", "pos"] * 15, labels=["pos", "neg"]).learned.labels == ("pos", "neg")
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog", "fox"]),
        }
    )
    made = datasets.Dataset.from_list(rows, features=features)
    table, objects = from_keywords(None, "m", "classification", {"train": made})
    found = open_data(table, objects, Classification, known)
    assert found.learned.labels == known
    assert [known[k] for k in found.learned.strata] == [row["label"] for row in rows]


def test_held_out_class_labels_may_have_another_order() -> None:
    datasets = pytest.importorskip("datasets")

    def part(rows: list[Any], names: list[str]) -> Any:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        return datasets.Dataset.from_list(rows, features=features)

    rows = rows_of(40)
    found = opened(
        part(rows[:30], ["cat", "dog", "fox"]), valid=part(rows[30:], ["fox", "dog", "cat"])
    )
    model = model_of("bert", head="sequence-classification", labels=found.learned.labels)
    task = Classification(model, **found.learned.options)
    assert task.truth(found.valid) == [row["label"] for row in rows[30:]]


class Own(Classification):
    """A task of one's own."""

    def __init__(self, model: Any, *, sharpness: float = 1.0, **others: Any) -> None:
        super().__init__(model, **others)


class Strict(Classification):
    """Another, without further arguments."""

    def __init__(
        self, model: Any, *, sharpness: float = 1.0, mode: Literal["a", "b"] = "a"
    ) -> None:
        super().__init__(model)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        (
            Classification,
            {"label_smooting": 0.1},
            "label_smooting: .*Did you mean 'label_smoothing'",
        ),
        (
            Classification,
            {"label_smoothing": "much"},
            "label_smoothing must be a number, found 'much'",
        ),
        (Classification, {"label_separator": 3}, "label_separator must be text"),
        (Classification, {"labels": "a"}, "labels must be a list or a mapping"),
        (Classification, {"max_length": 12}, "not an option of the task"),
        (Strict, {"sharpnes": 1.0}, "Did you mean 'sharpness'"),
        (Strict, {"sharpness": True}, "sharpness must be a number"),
        (Strict, {"mode": "c"}, "it must be one of a, b"),
        (Own, {"sharpness": [1]}, "sharpness must be a number"),
    ],
)
def test_options_that_the_task_does_not_have(task: Any, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_options(task, options)
    with (
        using(Interface(command=True, others="task.options.")),
        pytest.raises(ConfigError) as caught,
    ):
        check_options(task, options)
    assert f"--task.options.{next(iter(options))}" in str(caught.value) or "max_length" in options


def test_options_that_a_task_takes() -> None:
    check_options(
        Classification, {"labels": ["a", "b"], "class_weights": "balanced", "codes": None}
    )
    check_options(
        Classification, {"labels": {1: "a"}, "label_smoothing": 0, "label_separator": None}
    )
    check_options(Own, {"sharpness": 2, "threshold": 0.4})
    check_options(Strict, {"mode": "b"})


def test_how_files_are_read_is_said_once(tmp_path: Path) -> None:
    rows = rows_of(40)
    path = tmp_path / "rows.dat"
    text = "\n".join(f"é {row['text']}\x1f{row['label']}" for row in rows)
    path.write_bytes(text.encode("cp1252"))
    options = {
        "format": "csv",
        "names": ["text", "label"],
        "delimiter": "\x1f",
        "encoding": "cp1252",
    }
    held = tmp_path / "held.jsonl"
    held.write_bytes(
        json.dumps({**rows[0], "text": "ça"}, ensure_ascii=False).encode("cp1252") + b"\n"
    )
    named = path.rename(path.with_suffix(".json"))  # the format goes before the name
    assert len(opened(str(named), **options).train) == 36
    named.rename(path)
    for valid, count in ((0.1, 4), (rows[:3], 3), (str(held), 1)):
        found = opened(str(path), valid=valid, **options)
        assert len(found.valid) == count and found.train.columns["text"][0].startswith("é ")
