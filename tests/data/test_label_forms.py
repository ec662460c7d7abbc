"""Labels in every form in which data sets publish them: one set of classes and one set of targets from all."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.config.spelling import FINETUNE, using
from pretrain.data.labelled import choose_columns, roles_table
from pretrain.data.labels import finite_numbers, printed_list, printed_mapping, read_several
from pretrain.data.tables import Table, read_table
from pretrain.errors import DataError
from pretrain.objectives.classification import Classification

NAMES = ("anger", "joy", "love")
SETS = st.lists(st.sets(st.sampled_from(NAMES)), min_size=1, max_size=12)


def where(i: int) -> str:
    return f"row {i + 1}"


def full(rows: list[set[str]]) -> list[set[str]]:
    """With rows that show every name alone and in two combinations, so that all forms say what there is."""
    return [{"anger"}, {"joy", "love"}, {"joy"}, {"anger", "love"}, {"love"}, *rows]


def learned(source: Any, path: Path | None = None, names: Any = None, **options: Any) -> Any:
    """Labels and the set of names of each row, as training finds them."""
    source = source if isinstance(source, Table) else read_table(source)
    columns: dict[str, Any] = {} if names is None else {"label": list(names)}
    table = roles_table(source, choose_columns(source, Classification.roles, columns, quiet=True))
    found = Classification.learn(table, options)
    tidied = Classification.tidy(table, found, options)
    assert Classification.learn(tidied, {"labels": found.labels}).strata == found.strata
    sets = [set(row) if isinstance(row, list) else {row} for row in tidied.columns["label"]]
    return found.labels, sets, found


def cells(rows: list[set[str]], form: str) -> list[Any]:
    ordered = [sorted(row, reverse=True) for row in rows]
    hot = [[n in row for n in NAMES] for row in rows]
    return {
        "names": ordered,
        "padded names": [[f" {n}\t" for n in row] for row in ordered],
        "names and nothing": [[*row, None, float("nan"), " "] for row in ordered],
        "sets": [set(row) for row in ordered],
        "vectors of int": [[int(x) for x in row] for row in hot],
        "vectors of float": [[float(x) for x in row] for row in hot],
        "vectors of bool": hot,
        "arrays": [np.array(row, dtype=np.int8) for row in hot],
        "class numbers": [[NAMES.index(n) for n in row] for row in ordered],
        "mappings": [{n: float(n in row) for n in NAMES} for row in rows],
        "printed mappings": [str({n: int(n in row) for n in NAMES}) for row in rows],
        "printed by Python": [str(row) for row in ordered],
        "printed as JSON": [json.dumps(row) for row in ordered],
        "printed by NumPy": [str(np.array(row, dtype=object)) for row in ordered],
        "printed arrays": [repr(np.array(row, dtype=object)) for row in ordered],
        "printed scalars of NumPy": [repr([np.str_(n) for n in row]) for row in ordered],
        "printed vectors": [str(np.array(row, dtype=int)) for row in hot],
        "printed vectors of float": [str(np.array(row, dtype=float)) for row in hot],
        "joined by commas": [",".join(row) for row in ordered],
        "joined by commas and blanks": [", ".join(row) for row in ordered],
        "joined by bars": ["|".join(row) for row in ordered],
        "joined by semicolons": ["; ".join(row) for row in ordered],
    }[form]


FORMS = [
    *("names", "padded names", "names and nothing", "sets", "vectors of int", "vectors of float"),
    *("vectors of bool", "arrays", "class numbers", "mappings", "printed mappings"),
    "printed by Python",
    *("printed as JSON", "printed by NumPy", "printed arrays", "printed scalars of NumPy"),
    *("printed vectors", "printed vectors of float", "joined by commas"),
    *("joined by commas and blanks", "joined by bars", "joined by semicolons"),
]
NUMBERED = ("vectors", "arrays", "class numbers", "printed vectors")


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(SETS)
def test_every_form_of_a_list_gives_the_same(form: str, rows: list[set[str]]) -> None:
    rows = full(rows)
    options = {"labels": list(NAMES)} if form.startswith(NUMBERED) else {}
    source = [{"text": f"t{i}", "label": cell} for i, cell in enumerate(cells(rows, form))]
    labels, sets, found = learned(source, **options)
    assert labels == NAMES and sets == rows, form
    assert found.options["problem"] == "multi_label"
    # The caller's order is kept, also for classes that do not occur.
    if not form.startswith(NUMBERED) and not form.endswith("mappings"):
        wider = ["love", "anger", "fear", "joy"]
        assert learned(source, labels=wider)[:2] == (tuple(wider), rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", ["csv", "tsv", "jsonl", "parquet", "datasets", "pandas", "columns"]
)
def test_every_form_in_every_source(form: str, kind: str, tmp_path: Path) -> None:
    rows = full([set(), {"anger", "joy", "love"}])
    values = cells(rows, form)
    text = all(isinstance(value, str) for value in values)
    options = {"labels": list(NAMES)} if form.startswith(NUMBERED) else {}
    made = [{"text": f"t{i}", "label": value} for i, value in enumerate(values)]
    plain = form not in ("sets", "arrays", "names and nothing")
    path = tmp_path / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        if not text:
            pytest.skip("a text file holds texts")
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerow(["text", "label"])
            writer.writerows([[row["text"], row["label"]] for row in made])
        source: Any = path
    elif kind == "jsonl":
        if not plain:
            pytest.skip("not a form of JSON")
        path.write_text("\n".join(map(json.dumps, made)) + "\n")
        source = path
    elif kind == "parquet":
        if not plain:
            pytest.skip("not a form of parquet")
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(made), path)
        source = path
    elif kind == "datasets":
        if not plain:
            pytest.skip("not a form of datasets")
        source = pytest.importorskip("datasets").Dataset.from_list(made)
    elif kind == "pandas":
        pandas = pytest.importorskip("pandas")
        source = pandas.DataFrame(made, index=[7] * len(made))
    else:
        source = {"text": [r["text"] for r in made], "label": values}
    labels, sets, _ = learned(source, **options)
    assert (labels, sets) == (NAMES, rows)


@pytest.mark.parametrize("spell", [int, float, bool, str, lambda x: str(bool(x)).lower()])
def test_one_column_for_each_label(spell: Any) -> None:
    rows = full([])
    source = [
        {"text": f"t{i}", "id": i, **{n: spell(n in row) for n in NAMES}}
        for i, row in enumerate(rows)
    ]
    for order in (NAMES, NAMES[::-1]):
        assert learned(source, names=order)[:2] == (order, rows)
    with using(FINETUNE), pytest.raises(DataError, match=r"write label=\['anger', 'joy', 'love'\]"):
        learned(source)
    source[2]["joy"] = -1
    with pytest.raises(DataError, match=r"row 3 .*'joy' holds -1.*without a label"):
        learned(source, names=NAMES)


def test_lists_of_class_labels_keep_names_and_order() -> None:
    datasets = pytest.importorskip("datasets")
    names = ["zeal", "awe", "joy", "never"]
    made = {"text": ["a", "b", "c"], "labels": [[0, 2], [], [1]]}
    source = datasets.Dataset.from_dict(made).cast_column(
        "labels", datasets.Sequence(datasets.ClassLabel(names=names))
    )
    assert learned(source)[:2] == (tuple(names), [{"zeal", "joy"}, set(), {"awe"}])
    other = ["awe", "joy", "never", "zeal"]
    assert learned(source, labels=other)[0] == tuple(other)
    assert learned(source, labels=other)[1] == [{"zeal", "joy"}, set(), {"awe"}]
    assert learned(source, labels=["w", "x", "y", "z"])[1] == [{"w", "y"}, set(), {"x"}]


def test_the_order_of_a_set_does_not_matter() -> None:
    made = [
        read_several([set(order), {1}], str).rows for order in ((0, 8), (8, 0))
    ]  # 8 and 0 share a place, so that the sets have another order
    assert made[0] == made[1] == [[0, 8], [1]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[0.3, 0.7], [1.0, 0.0]], "row 1.*0.3.*round"),
        ([[1.0, 0.0], [1.0, 0.0, 0.0]], "row 1.*vector.*2 to 3 items"),
        ([[0, 0, 1], [1, 0]], "row 1.*vector.*2 to 3 items"),
        ([[True], [False]], "one place"),
        (["['a', 'b']", "a"], "row 2.*printed list"),
        ([["a"], "b"], "row 2.*lists of labels"),
        ([["a"], None], "row 2.*lists of labels"),
        ([[1, 0, 0], [0, 1, 0], None], "row 3.*zeros, where the lists are vectors"),
        ([{"a": 1, "b": 0.5}, {"a": 0, "b": 1}], "row 1.*'b'.*0.5"),
        (
            ["sport", "sport,news", "arts,film", "opera"],
            r"label_separator=','.*problem='single_label'",
        ),
        (["2,5", "3", "1,0"], "decimal comma.*label_separator"),
        ([["a", ["b"]], ["c"]], "must have"),
    ],
)
def test_forms_that_are_refused(values: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        learned([{"text": f"t{i}", "label": value} for i, value in enumerate(values)])


@pytest.mark.parametrize(
    "cells",
    [
        ["[a, b]", "[a]", "[b]", "[]"], ["{a,b}", "{a}", "{b}", "{}"], ["[a, b]", "[ a ]", "['b']", " [] "],
        ['{"choices":["a","b"]}', "a", "b", ""], ['{"choices": ["a", "b"]}', '{"choices":["a"]}', "b", " "],
    ],
)  # fmt: skip
def test_lists_as_postgresql_label_studio_and_people_write_them(cells: list[str]) -> None:
    source = [{"text": "t", "label": cell} for cell in cells]
    for options in ({}, {"labels": ["a", "b"]}, {"checkpoint_labels": ("a", "b")}):
        assert learned(source, **options)[:2] == (("a", "b"), [{"a", "b"}, {"a"}, {"b"}, set()])
    if "choices" in cells[0]:
        each = tuple(sorted({cell.strip() for cell in cells if cell.strip()}))
        named = [row for row in source if row["label"].strip()]
        assert learned(named, problem="single_label")[0] == each
        assert learned(named, begun_labels=each)[0] == each  # as an earlier version began a run


def test_names_in_brackets_alone_are_names() -> None:
    labels, _, _ = learned([{"text": "t", "label": name} for name in ("[a]", "[b]", "{c}")])
    assert labels == ("[a]", "[b]", "{c}")


def test_vectors_in_a_column_that_is_declared_to_hold_class_numbers() -> None:
    datasets = pytest.importorskip("datasets")

    def of(rows: list[list[int]], names: list[str]) -> Any:
        kind = datasets.Sequence(datasets.ClassLabel(names=names))
        features = datasets.Features({"text": datasets.Value("string"), "label": kind})
        return datasets.Dataset.from_dict({"text": ["t"] * len(rows), "label": rows}, features)

    hot = [[1, 0, 0], [0, 1, 1]]
    for names in (["no", "yes"], ["a", "b", "c"]):
        with pytest.raises(DataError, match=r"row 1 .*looks like a vector.*label_form='vectors'"):
            learned(of(hot, names))
        labels = tuple("abc") if len(names) == 3 else tuple("012")
        wanted = [{labels[0]}, {labels[1], labels[2]}]
        assert learned(of(hot, names), label_form="vectors")[:2] == (labels, wanted)
    assert learned(of(hot, ["no", "yes"]), label_form="vectors", labels=[*"abc"])[0] == tuple("abc")
    repeated = [{"a", "b"}, {"a", "b"}]  # as an earlier version began a run
    assert learned(of(hot, [*"abc"]), begun_labels=tuple("abc"))[:2] == (tuple("abc"), repeated)
    for form in (None, "numbers"):
        assert read_several([[[0]], [[1]]], where, names=["a", "b"], form=form).rows == [
            [[0]],
            [[1]],
        ]
    for rows in ([[0, 1], [1]], [[0, 1], [1, 0]], [[2, 2], [1]], [[], [1]]):
        sets = [{"abc"[k] for k in row} for row in rows]
        assert learned(of(rows, [*"abc"]))[:2] == (tuple("abc"), sets)


def test_digits_without_a_mark_between_can_be_vectors() -> None:
    cells = ["100", "010", "011", "100"]
    source = [{"text": "t", "label": cell} for cell in cells]
    with pytest.raises(DataError, match="'100', which can be a vector of 3 zeros and ones"):
        learned(source)
    for options in (
        {"label_form": "vectors", "labels": [*"abc"]}, {"labels": [*"abc"]}, {"checkpoint_labels": tuple("abc")},
    ):  # fmt: skip
        assert learned(source, **options)[:2] == (tuple("abc"), [{"a"}, {"b"}, {"b", "c"}, {"a"}])
    assert learned(source, label_form="vectors")[0] == ("0", "1", "2")
    for options in (
        {"label_separator": ""},
        {"problem": "single_label"},
        {"label_form": "numbers"},
    ):
        assert learned(source, **options)[0] == ("010", "011", "100")
    for names in (
        ("000", "001"),
        ("100", "101", "110"),
        ("01", "10", "11"),
        ("001", "002", "010"),
        ("0", "1", "10"),
    ):
        assert learned([{"text": "t", "label": name} for name in names])[0] == names


def test_when_a_comma_stands_between_labels() -> None:
    def read(values: list[str], **options: Any) -> Any:
        return learned([{"text": str(i), "label": v} for i, v in enumerate(values)], **options)

    garden = ["Home, Garden & Tools", "Toys", "Home, Garden & Tools", "Toys"]
    labels, _, found = read(garden)
    assert labels == ("Home, Garden & Tools", "Toys") and found.options["problem"] == "single_label"
    assert "have ',' in their name" in found.notes[0] and "label_separator=','" in found.notes[0]
    assert read(garden, label_separator=",")[0] == ("Garden & Tools", "Home", "Toys")
    joined = ["a,b", "a", "b,c", "c", ""]
    labels, sets, found = read(joined)
    assert (labels, sets[-1]) == (("a", "b", "c"), set())
    assert "',' stands between" in found.notes[0] and "1 of 5 rows" in found.notes[1]
    assert read(joined[:-1], problem="single_label")[0] == ("a", "a,b", "b,c", "c")
    assert read(["2,14,3", "27", "3,27", "2"])[0] == ("2", "3", "14", "27")
    assert read(["<python><c#>", "<c#>", "<python>"])[0] == ("c#", "python")
    assert read(["a b", "b", "a"], label_separator=" ")[0] == ("a", "b")
    one_hot = [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    labels, _, found = learned(
        [{"text": str(i), "label": v} for i, v in enumerate(one_hot)], problem="single_label"
    )
    assert labels == ("0", "1", "2") and found.strata == [0, 2, 1]
    with pytest.raises(DataError, match="row 1 .*has 2 labels.*problem='multi_label'"):
        learned([{"text": "a", "label": [0, 1, 1]}] * 2, problem="single_label")
    assert read(["a", "b", "a"], problem="multi_label")[1] == [{"a"}, {"b"}, {"a"}]


@pytest.mark.parametrize(
    "mark", [" ", "  ", "/", " / ", "+", " & ", "\n", "\t", ":", "::", "#", "，", "、", "；", " • "]
)
def test_marks_that_stand_in_names_more_often_than_between_labels(mark: str) -> None:
    """Kaggle's sets of images have blanks between labels: a class for each combination is said or refused."""
    rows = [{"anger"}, {"joy", "love"}, {"joy"}, {"anger", "love"}, {"love"}]
    source = [{"text": "t", "label": mark.join(sorted(row))} for row in rows]
    with pytest.raises(
        DataError, match="several labels with .* between them, or one: label_separator="
    ):
        learned(source)
    between = mark.strip() or mark[0]
    for options in (
        {"label_separator": between}, {"labels": list(NAMES)}, {"checkpoint_labels": NAMES}, {"problem": "multi_label"},
    ):  # fmt: skip
        assert learned(source, **options)[:2] == (NAMES, rows)
    for options in ({"label_separator": ""}, {"problem": "single_label"}):
        assert len(learned(source, **options)[0]) == 5


def test_numbers_with_blanks_between_are_class_numbers_if_others_stand_alone() -> None:
    cells = ["16 0", "7 1 2 0", "5", "0", "16 0"]
    source = [{"text": "t", "label": cell} for cell in cells]
    with pytest.raises(DataError, match="label_separator=' '"):
        learned(source)
    labels, sets, _ = learned(source, label_separator=" ")
    assert labels == ("0", "1", "2", "5", "7", "16") and sets == [set(c.split()) for c in cells]


def test_combinations_without_lone_parts_are_classes_with_a_line() -> None:
    tags = [
        "haze primary",
        "clear primary",
        "clear primary water",
        "haze primary water",
        "cloudy",
        "haze clear water",
    ]
    source = [{"text": "t", "label": tag} for tag in tags]
    labels, _, found = learned(source)
    assert labels == tuple(sorted(tags)) and "label_separator=' '" in str(found.notes)


@pytest.mark.parametrize(
    "names",
    [
        ("agree", "strongly agree", "neutral", "disagree", "strongly disagree"),
        ("very good", "good", "bad", "very bad"),
        ("New York", "York", "Leeds"), ("science fiction", "science", "fiction", "young adult"),
        ("TCP/IP", "TCP", "UDP"),
        ("C", "C#", "C++"), ("1 0", "0 1", "1 1"), ("0/1", "1/1", "0/0"), ("B-PER", "I-PER", "O"),
        ("PG", "PG-13", "13"), ("0", "1", "1/2", "2"), ("12", "12:30", "30"), ("+", "+/-", "-"),
        ("News", "News/Sports", "News/World"), ("class 1", "class 2", "1", "2"),
    ],
)  # fmt: skip
def test_names_that_share_words_stay_names(names: tuple[str, ...]) -> None:
    labels, _, found = learned([{"text": "t", "label": name} for name in names * 2])
    assert labels == tuple(sorted(names)) and not any("label_separator" in n for n in found.notes)


HOT = ([1, 0, 1], [0, 1, 0])
JOINED = [",", ";", "|", " ", ", "]


@pytest.mark.parametrize("options", [{}, {"problem": "multi_label"}])
@pytest.mark.parametrize("spell", [str, lambda x: f"{x}.0", lambda x: str(bool(x)).lower()])
def test_vectors_whose_places_are_texts(spell: Any, options: dict[str, Any]) -> None:
    rows = [[spell(x) for x in row] for row in HOT]
    for labels in (["a", "b", "c"], None):
        given = options if labels is None else {**options, "labels": labels}
        wanted = learned([{"text": str(i), "label": row} for i, row in enumerate(HOT)], **given)[:2]
        assert wanted[1] == ([{"a", "c"}, {"b"}] if labels else [{"0", "2"}, {"1"}])
        forms = [rows, [str(row) for row in rows], *([m.join(r) for r in rows] for m in JOINED)]
        for cells in forms:
            source = [{"text": str(i), "label": cell} for i, cell in enumerate(cells)]
            *found, told = learned(source, **given)
            assert tuple(found) == wanted and told.options["label_form"] == "vectors", cells
        for mark in JOINED:
            source = [{"text": str(i), "label": mark.join(row)} for i, row in enumerate(rows)]
            assert learned(source, **given, label_separator=mark)[:2] == wanted
        source = [{"text": str(i), "label": str(row)} for i, row in enumerate(rows)]
        assert learned(source, **given, label_separator=",")[:2] == wanted


@pytest.mark.parametrize("mark", [None, *JOINED])
def test_texts_that_are_vectors_with_a_single_one_are_a_choice(mark: str | None) -> None:
    def read(rows: list[list[int]], **options: Any) -> Any:
        cells = [list(map(str, row)) if mark is None else mark.join(map(str, row)) for row in rows]
        source = read_table([{"text": str(i), "label": c} for i, c in enumerate(cells)])
        found = Classification.learn(source, {"problem": "single_label", **options})
        return found, Classification.tidy(source, found, options).columns["label"]

    one_hot = [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    found, tidied = read(one_hot, labels=["a", "b", "c"])
    assert found.strata == [0, 2, 1] and tidied == ["a", "c", "b"]
    several = [[1, 0, 1], [0, 1, 0]]
    if mark is None:
        with pytest.raises(DataError, match="row 1 .*has 2 labels"):
            read(several)
    else:
        assert read(several)[0].labels == tuple(sorted(mark.join(map(str, r)) for r in several))
        assert read(one_hot, label_separator="")[1] == [mark.join(map(str, r)) for r in one_hot]


@pytest.mark.parametrize("mark", [*JOINED, "[%s, %s]"])
def test_a_single_label_is_the_text_of_a_pair(mark: str) -> None:
    def read(rows: list[Any], **options: Any) -> Any:
        cells = [mark % row if "%" in mark else mark.join(row) for row in rows]
        source = read_table([{"text": str(i), "label": cell} for i, cell in enumerate(cells)])
        found = Classification.learn(source, {"problem": "single_label", **options})
        tidied = Classification.tidy(source, found, options).columns["label"]
        return found.labels, tidied, cells

    for rows in ([("1", "0"), ("0", "1")], [("1", "0"), ("0", "1"), ("1", "1"), ("0", "0")]):
        labels, tidied, cells = read(rows)
        assert labels == tuple(sorted(cells)) and tidied == cells
    assert read([("1", "0"), ("0", "1")], labels=["a", "b"])[:2] == (("a", "b"), ["a", "b"])


def test_pairs_with_a_blank_are_names_unless_a_row_has_two_zeros() -> None:
    def read(cells: list[str], **options: Any) -> Any:
        rows = [{"text": str(i), "label": cell} for i, cell in enumerate(cells)]
        found = Classification.learn(read_table(rows), options)
        return found.labels, Classification.tidy(read_table(rows), found, options).columns["label"]

    pairs = ["1 0", "0 1", "1 1"]
    assert read(pairs) == (("0 1", "1 0", "1 1"), pairs)
    assert read(["1 1 0", "1 0"]) == (("1 0", "1 1 0"), ["1 1 0", "1 0"])
    assert read(["1 0", "0 0"])[1] == [["0"], []]
    assert read(pairs, labels=["a", "b"])[1] == [["a"], ["b"], ["a", "b"]]
    assert read(pairs, problem="multi_label")[1] == [["0"], ["1"], ["0", "1"]]


@pytest.mark.parametrize("cells", [["1 0", "0 0"], ["1 0 1", "0 1 0"], ["1;0;0", "0;1;0"]])
@pytest.mark.parametrize("problem", ["single_label", "multi_label", None])
def test_a_run_that_began_with_a_class_for_each_text_goes_on(
    cells: list[str], problem: str | None
) -> None:
    source = read_table([{"text": str(i), "label": f" {c}"} for i, c in enumerate(cells)])
    options = {"begun_labels": tuple(sorted(cells)), "problem": problem}
    found = Classification.learn(source, options)
    lone = [[c] for c in cells] if problem == "multi_label" else cells
    assert found.labels == tuple(sorted(cells))
    assert Classification.tidy(source, found, options).columns["label"] == lone


def test_pairs_of_zeros_and_ones() -> None:
    def read(cells: list[Any], **options: Any) -> Any:
        return learned([{"text": str(i), "label": c} for i, c in enumerate(cells)], **options)[1]

    pairs = ["1,0", "0,1"]
    for cells in (pairs, ["1, 0", "0, 1"], ["1, 0", "0 ,1", "0, 0"]):
        with pytest.raises(DataError, match="label_form='vectors' or label_form='numbers'"):
            read(cells)
    with pytest.raises(DataError, match="label_separator='' for one class for each text.$"):
        read(["1, 0", "0, 1"])
    assert read(["0, 1", "1", "0"]) == [{"0", "1"}, {"1"}, {"0"}]
    vectors, numbers = [{"0"}, {"1"}], [{"0", "1"}] * 2
    for cells in (pairs, ["1|0", "0|1"], [["1", "0"], ["0", "1"]], [[1, 0], [0, 1]]):
        assert read(cells, labels=["a", "b"]) == [{"a"}, {"b"}]
        assert read(cells, label_form="vectors") == vectors
        assert read(cells, label_form="numbers") == numbers
    assert read(pairs, label_separator=",") == read(pairs, problem="multi_label") == vectors
    # Where the labels are called so, lists of texts are their names.
    assert read([["1", "0"], ["0", "1"]], labels=["0", "1"]) == numbers


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        (["1;0;0", "0;1;0"], "row 1 .*'1;0;0'.* 0 stands there twice.*label_form='vectors'"),
        (["2 1", "1 0 1"], "row 2 .*'1 0 1'.* 1 stands there twice"),
        ([[1, 0, 0], [0, 1, 0]], r"row 1 .*\[1, 0, 0\].* 0 stands there twice"),
        (["[1, 0, 0]", "[0, 1, 0]"], r"row 1 .*'\[1, 0, 0\]'.* 0 stands there twice"),
        ([["1", "0", "0"], ["2"]], "row 1 .* 0 stands there twice"),
        ([[True, False], [False, True]], "row 1 .*'True' is none"),
        (["yes", "no"], "row 1 .*'yes' is none.*leave the option out"),
        ([["a"], ["b"]], "row 1 .*'a' is none"),
    ],
)
def test_class_numbers_that_were_asked_for_and_are_none(cells: list[Any], fault: str) -> None:
    source = read_table([{"text": str(i), "label": cell} for i, cell in enumerate(cells)])
    with pytest.raises(DataError, match=fault):
        Classification.learn(source, {"label_form": "numbers"})


@pytest.mark.parametrize("mark", [",", "|", ";", " ", "; "])
def test_class_numbers_that_were_asked_for(mark: str) -> None:
    def table(rows: list[list[str]]) -> Table:
        return read_table([{"text": str(i), "label": mark.join(r)} for i, r in enumerate(rows)])

    source = table([["1", "0"], ["0", "2"], ["1"]])
    options = {"label_form": "numbers"}
    found = Classification.learn(source, options)
    assert found.strata == [("0", "1"), ("0", "2"), ("1",)]
    assert found.options["label_form"] == "numbers" and "between class numbers" in found.notes[0]
    with pytest.raises(DataError, match="row 2 .* 1 stands there twice"):
        Classification.tidy(table([["1", "0"], ["1", "0", "1"]]), found, options)
    single = {**options, "problem": "single_label"}
    assert Classification.learn(table([["1"], ["0"]]), single).labels == ("0", "1")


@pytest.mark.parametrize("mark", [";", "|", None])
@pytest.mark.parametrize("nothing", [None, "", " "])
def test_a_row_with_nothing_beside_pairs(mark: str | None, nothing: Any) -> None:
    pairs: list[Any] = [["1", "0"], ["0", "1"]]
    if mark is None:
        nothing = []
    cells = [nothing, *(pairs if mark is None else map(mark.join, pairs))]
    source = read_table([{"text": str(i), "label": cell} for i, cell in enumerate(cells)])
    for options in ({}, {"labels": ["a", "b"]}):
        with pytest.raises(DataError, match="row 1 .*label_form='numbers'") as told:
            Classification.learn(source, options)
        assert f"label is {nothing!r}, and" in str(told.value)
    numbers = Classification.learn(source, {"label_form": "numbers"})
    assert numbers.strata == [(), ("0", "1"), ("0", "1")]
    texts = [{"text": "x", "label": cell} for cell in ("", "1;0;0", "0;1;0")]
    with pytest.raises(DataError, match="row 1 .*label is '', and.* vector of 3") as told:
        Classification.learn(read_table(texts), {})
    assert "label_form" not in str(told.value)


@pytest.mark.parametrize(
    ("train", "held", "wanted"),
    [
        ([[0], [1], [0, 1]], [[0, 1], [1, 0]], [["a", "b"]] * 2),
        (["0", "1", "0|1"], ["0|1", "1|0"], [["a", "b"]] * 2),
        ([["0"], ["1"], ["0", "1"]], [["0", "1"]], [["a", "b"]]),
        ([[0], [2], [0, 1]], [[0, 1], [1, 0]], [["a", "b"]] * 2),
        ([[0], [2], [0, 1]], [[1, 0, 1]], [["a", "c"]]),
        ([[0, 1], [1, 1]], [[1], [0]], None),
        ([[0, 1, 0], [1, 0, 1]], [[1, 2]], None),
        (["0,1,0", "1,0,1"], ["1,0"], None),
        ([[0, 1, 0], [1, 0, 1]], [["a", "b"]], [["a", "b"]]),
    ],
)
def test_further_rows_have_the_form_of_the_training_rows(
    train: list[Any], held: list[Any], wanted: Any
) -> None:
    def table(cells: list[Any]) -> Table:
        return read_table([{"text": str(i), "label": cell} for i, cell in enumerate(cells)])

    three = any(c in ([2], [0, 1, 0], "0,1,0") for c in train)
    options = {"labels": ["a", "b", "c"] if three else ["a", "b"]}
    found = Classification.learn(table(train), options)
    if wanted is None:
        with pytest.raises(DataError, match="row 1 .*must be a vector of . zeros and ones"):
            Classification.tidy(table(held), found, options)
    else:
        tidied = Classification.tidy(table(held), found, options).columns["label"]
        assert [sorted(row) for row in tidied] == wanted


@pytest.mark.parametrize("nothing", [None, "", float("nan"), []])
def test_a_row_with_nothing_is_the_same_in_all_parts(nothing: Any) -> None:
    def table(cells: list[Any]) -> Table:
        return read_table([{"text": str(i), "label": cell} for i, cell in enumerate(cells)])

    columns: list[tuple[list[Any], dict[str, Any], bool]] = [
        (["a", "b"], {}, False),
        (["a", "b"], {"problem": "multi_label"}, nothing != []),
        (["a", "b", "a,b"], {}, nothing != []),
        ([["a"], ["b"]], {}, nothing == []),
        ([[1, 0, 1], [0, 1, 0]], {}, False),
        (["1,0,1", "0,1,0"], {}, False),
    ]
    for cells, options, empty in columns:
        found = Classification.learn(table(cells), options)
        if empty:
            more = Classification.learn(table([*cells, nothing]), options)
            for learned in (found, more):
                tidied = Classification.tidy(table([*cells, nothing]), learned, options)
                assert tidied.columns["label"][-1] == []
            continue
        # One row of lists makes the other cells those that are wrong.
        wrong = len(cells) + 1 if nothing != [] or isinstance(cells[0], list) else 1
        with pytest.raises(DataError, match=f"row {wrong} "):
            Classification.learn(table([*cells, nothing]), options)
        with pytest.raises(DataError, match=f"row {wrong} "):
            Classification.tidy(table([*cells, nothing]), found, options)


def test_rows_that_are_tidied_are_no_vectors() -> None:
    cells: list[Any] = [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    source = read_table([{"text": str(i), "label": cell} for i, cell in enumerate(cells)])
    found = Classification.learn(source, {})
    tidied = Classification.tidy(source, found, {}).take([0, 1])
    assert tidied.columns["label"] == [["0", "1"]] * 2
    assert Classification.tidy(tidied, found, {}).columns["label"] == [["0", "1"]] * 2


def test_printed_lists() -> None:
    assert (
        printed_list("[]")
        == printed_list(" set() ")
        == printed_list("array([], dtype=object)")
        == []
    )
    assert printed_list("['it\\'s', \"x\"]") == ["it's", "x"]
    assert printed_list("['a' 'b'\n 'c']") == ["a", "b", "c"]
    assert printed_list("[1. 0. 1.]") == [1.0, 0.0, 1.0]
    assert printed_list("[np.int64(1), None, nan, True]") == [1, None, None, True]
    assert printed_list("[joy, love]") == ["joy", "love"]
    for text in ("joy", "[music]", "a [b]", "[", "", "(a, b)", "[a] and [b]", "{'a': 1}"):
        assert printed_list(text) is None


@given(
    st.dictionaries(st.text(max_size=8), st.lists(st.text(max_size=8)) | st.integers() | st.none())
)
@settings(max_examples=100, deadline=None)
def test_printed_mappings_are_read_back(mapping: dict[str, Any]) -> None:
    arrays = {
        k: np.array(v, dtype=object) if isinstance(v, list) else v for k, v in mapping.items()
    }
    for text in (repr(mapping), json.dumps(mapping), repr(arrays)):
        assert printed_mapping(f" {text}\n") == mapping
    assert printed_mapping(repr([mapping])) == printed_mapping(json.dumps([mapping])) == [mapping]


def test_other_texts_are_no_printed_mappings() -> None:
    for text in (
        "",
        "{",
        "{a}",
        "{'a'}",
        "['a']",
        "{'a': f}",
        "{'a': f()}",
        "[{}, 1]",
        "{'a': 1} b",
    ):
        assert printed_mapping(text) is None
    for text in (
        "{" * 9999,
        "{" + "-" * 99999 + "1}",
        "{'a': " + "[" * 999 + "}",
        "{'a': '\0'}",
        "{[]: 1}",
    ):
        assert printed_mapping(text) is None


def test_class_numbers_may_be_decimals_of_databases() -> None:
    """One for each row, lists, vectors, mappings and a column per label; others and too large ones are refused."""

    def decimal(value: Any) -> Any:
        if isinstance(value, list):
            return [decimal(item) for item in value]
        if isinstance(value, dict):
            return {name: decimal(item) for name, item in value.items()}
        return Decimal(f"{value}.00")

    one, several = [0, 2, 1, 2], [[0], [2, 0], [1], [3, 2, 1]]
    vectors = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]]
    mappings = [dict(zip(NAMES, row, strict=True)) for row in vectors]
    for labels in (one, several, vectors, mappings):
        given_as = [[{"text": f"t{i}", "label": cell} for i, cell in enumerate(column)]
                    for column in (labels, decimal(labels))]  # fmt: skip
        plain, read = (learned(rows) for rows in given_as)
        assert plain[:2] == read[:2] and plain[2].strata == read[2].strata
    columns = [{"text": f"t{i}", **decimal(row)} for i, row in enumerate(mappings)]
    assert (
        learned(columns, names=NAMES)[:2]
        == learned([{"text": f"t{i}", **row} for i, row in enumerate(mappings)], names=NAMES)[:2]
    )
    for wrong in ("1.5", "1E+999999999", "NaN"):
        rows = [{"text": f"t{i}", "label": Decimal(x)} for i, x in enumerate(("0", wrong, "1"))]
        with pytest.raises(DataError, match=r"row 2.*label holds Decimal.*a whole number"):
            learned(rows)


@given(st.lists(st.text(max_size=8), max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_python_and_json_print_is_read_back(items: list[str]) -> None:
    assert printed_list(repr(items)) == items
    assert printed_list(repr(tuple(items))) == items
    encodable = [item.encode("utf-8", "replace").decode() for item in items]
    assert printed_list(json.dumps(encodable, ensure_ascii=False)) == encodable


@given(st.lists(st.text(max_size=12) | st.lists(st.integers(0, 1), max_size=3), max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_column_is_read_or_refused(values: list[Any]) -> None:
    try:
        found = read_several(values, where)
    except DataError:
        return
    assert found.rows is None or len(found.rows) == len(values)


def test_marks_that_only_very_long_labels_have_do_not_part_them() -> None:
    assert read_several(["cat", "dog", "x\n" + "y" * 1000], where).rows is None


@pytest.mark.parametrize("values", [["1,5", "", "2,5"], ["1,5", "1e300"]])
def test_commas_are_blamed_only_where_the_value_at_fault_has_one(values: list[str]) -> None:
    with pytest.raises(DataError) as told:
        finite_numbers(values, where, what="targets", cure="Correct it.")
    assert "comma" not in str(told.value)
    with pytest.raises(DataError, match="A comma is a decimal one only"):
        finite_numbers(["1,5", "2.5"], where, what="targets", cure="Correct it.")


def test_known_names_are_names_whatever_they_look_like() -> None:
    cells = ["[a]", "b, c", "[0, 1]", "[a]"]
    for always, rows in ((False, None), (True, [[cell] for cell in cells])):
        found = read_several(cells, where, labels=["[a]", "b, c", "[0, 1]"], always=always)
        assert (found.rows, found.names, found.notes) == (rows, None, [])
    given = read_several(["0 1", "1 0"], where, labels=["0 1", "1 0"], form="numbers", strict=True)
    assert given.rows == [["0", "1"], ["1", "0"]]  # the form that the caller gave
