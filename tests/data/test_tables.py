"""Labelled rows from every source: equal content, places of rows, real files, and what is wrong said with its place."""

from __future__ import annotations

import csv
import enum
import gzip
import json
import tracemalloc
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
from pretrain.config.spelling import Interface, using
from pretrain.data.labels import is_missing, spelled
from pretrain.data.readers import Reading
from pretrain.data.table_readers import conll_sentences, delimited_texts
from pretrain.data.tables import Table, parts_of_file, read_table, splits, stream_chunks
from pretrain.errors import DataError

ROWS = [
    {"text": 'a film, "good"', "label": "pos"},
    {"text": "très long\nand dull", "label": "neg"},
    {"text": "日本", "label": "pos"},
]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def csv_text(rows: list[list[str]], **options: Any) -> str:
    import io

    out = io.StringIO()
    csv.writer(out, lineterminator="\n", **options).writerows(rows)
    return out.getvalue()


def refused(source: Any, *parts: str, **options: Any) -> str:
    with pytest.raises(DataError) as told:
        read_table(source, **options)
    text = str(told.value)
    for part in parts:
        assert part in text, text
    assert len(text) < 900, text
    return text


# ------------------------------------------------------------------------------------------- same content


def test_every_source_gives_the_same_table(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    zstandard = pytest.importorskip("zstandard")
    cells = [["text", "label"], *[[r["text"], r["label"]] for r in ROWS]]
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    frame = pandas.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "a.parquet")
    sources: list[Any] = [
        write(tmp_path, "a.csv", csv_text(cells)),
        write(tmp_path, "bom.csv", b"\xef\xbb\xbf" + csv_text(cells).encode()),
        write(tmp_path, "crlf.csv", csv_text(cells, quoting=csv.QUOTE_ALL).encode()),
        write(tmp_path, "a.tsv", csv_text(cells, delimiter="\t")),
        write(tmp_path, "all.tsv", csv_text(cells, delimiter="\t", quoting=csv.QUOTE_ALL)),
        write(tmp_path, "a.csv.gz", gzip.compress(csv_text(cells).encode())),
        write(tmp_path, "a.jsonl", lines),
        write(tmp_path, "a.ndjson", lines),
        write(tmp_path, "lines.json", lines),
        write(tmp_path, "b.jsonl.zst", zstandard.ZstdCompressor().compress(lines.encode())),
        write(tmp_path, "a.json", json.dumps(ROWS, indent=2)),
        write(tmp_path, "columns.json", json.dumps(frame.to_dict("list"))),
        write(tmp_path, "data.json", json.dumps({"version": 1, "data": ROWS})),
        tmp_path / "a.parquet",
        write(tmp_path, "b.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes())),
        str(tmp_path / "a.p*t"),
        ROWS,
        tuple(ROWS),
        frame.to_dict("list"),
        {"text": frame["text"].to_numpy(), "label": frame["label"]},
        frame,
        frame.set_index(np.array([5, 9, 7])),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_format("numpy"),
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
        {"train": str(tmp_path / "a.csv"), "validation": tmp_path / "a.tsv"},
    ]
    first = read_table(ROWS)
    assert list(first.rows()) == ROWS and len(first) == 3 and first.names == ["text", "label"]
    for source in sources:
        table = read_table(source)
        assert table.columns == first.columns, source
        assert table.fingerprint == first.fingerprint
        assert read_table(table) is table


def test_places(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",a\n\nb,c\n')
    table = read_table(path)
    assert [table.where(i) for i in (0, 1)] == [f"{path}, line 2", f"{path}, line 5"]
    assert table.name == "a.csv"
    assert table.take([1]).where(0) == f"{path}, line 5"
    assert table.take([1, 0]).take([1]).row(0) == {"text": "two\nlines", "label": "a"}
    rows = read_table(ROWS)
    assert rows.name == "a list of 3 rows"
    assert rows.where(1) == "row 2 of a list (index 1)"
    assert rows.take([2, 0]).where(0) == "row 3 of a list (index 2)"
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert read_table(path).where(1) == f"{path}, line 3"
    path = write(tmp_path, "a.json", '[{"a": 1}, {"a": 2}]')
    assert read_table(path).where(1) == f"row 2 of {path}"


def test_values_stay_as_they_are() -> None:
    rows = [
        {"a": 1, "b": 0.5, "c": None, "d": ["x"], "e": {"k": [1]}, "f": True},
        {"a": np.int64(2), "b": np.float32(0.5), "c": np.array([1, 2]), "d": ("y",), "e": {"k": np.array([])},
         "f": np.bool_(False)},
    ]  # fmt: skip
    table = read_table(rows)
    assert table.row(0) == rows[0]
    assert table.row(1) == {"a": 2, "b": 0.5, "c": [1, 2], "d": ["y"], "e": {"k": []}, "f": False}
    assert [type(table.row(1)[name]) for name in "abf"] == [int, float, bool]
    assert read_table([{"a": "half \ud83d pair"}]).row(0) == {"a": "half ? pair"}


def test_missing_values_of_pandas_are_none(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "n": [1.0, np.nan],
            "t": ["x", None],
            "i": pandas.array([1, None], "Int64"),
            "d": [["a"], ["b", "c"]],
        }
    )
    want = {"n": [1.0, None], "t": ["x", None], "i": [1, None], "d": [["a"], ["b", "c"]]}
    assert read_table(frame).columns == want
    frame.to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").columns["d"] == want["d"]


class _Frame(SimpleNamespace):
    def __len__(self) -> int:
        return 2


def test_the_order_of_an_enum_of_polars_is_kept() -> None:
    """With the classes that do not occur; the categories of a ``Categorical`` are those of all frames, in no order."""
    listed = SimpleNamespace(to_list=lambda: ["low", "mid", "high"])
    frame = _Frame(
        columns=["text", "label", "kind"],
        dtypes=[
            SimpleNamespace(),
            SimpleNamespace(categories=listed),
            SimpleNamespace(categories=object()),
        ],
        to_dicts=None,
        to_dict=lambda as_series: {
            "text": ["a", "b"],
            "label": ["low", "high"],
            "kind": ["x", "y"],
        },
    )
    assert read_table(frame).orders == {"label": ["low", "mid", "high"]}
    polars = pytest.importorskip("polars")
    cells = polars.Series(["low", "high"], dtype=polars.Enum(["low", "mid", "high"]))
    found = read_table(polars.DataFrame({"text": ["a", "b"], "label": cells}))
    assert found.orders == {"label": ["low", "mid", "high"]}


@pytest.mark.parametrize("missing", ["NA", "NaT", "nan"])
def test_missing_values_in_rows_are_none_at_any_depth(missing: str) -> None:
    value = getattr(pytest.importorskip("pandas"), missing, np.nan)
    rows = [{"text": value, "label": "a"}, {"text": "x", "label": ["b", value]}]
    plain = read_table(rows).columns
    assert plain["label"][0] == "a" and plain["label"][1][0] == "b" and plain["text"][1] == "x"
    assert all(map(is_missing, (plain["text"][0], plain["label"][1][1])))
    by_column = read_table({name: [row[name] for row in rows] for name in rows[0]}).columns
    assert str(by_column) == str(plain)  # a NaN is not equal to itself


def test_named_tuples_name_their_columns() -> None:
    """Rows of ``itertuples`` are no pairs of a text and a label in this order."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"label": ["a", "b"], "text": ["x", "y"]})
    columns = {"label": ["a", "b"], "text": ["x", "y"]}
    assert read_table(list(frame.itertuples(index=False))).columns == columns
    assert read_table(list(frame.itertuples())).columns == {"Index": [0, 1], **columns}
    named = read_table(list(frame.itertuples(index=False)), columns=["of", "in"])
    assert named.columns == {"of": ["a", "b"], "in": ["x", "y"]}


def test_members_of_an_enum_of_texts_are_kept_as_runs_have_begun_with_them() -> None:
    """Their classes are named as ``str`` prints a member."""
    tone = enum.Enum("tone", {"GOOD": "good", "BAD": "bad"}, type=str)
    cells = read_table([{"label": tone["GOOD"]}]).columns["label"]
    assert cells == ["good"] and spelled(cells[0]) == "tone.GOOD"


def test_names_of_classes_are_kept(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, 0], "tags": [[0, 1], []]}
    data = datasets.Dataset.from_dict(rows, features=kinds)
    data.to_parquet(str(tmp_path / "a.parquet"))
    for source in (data, tmp_path / "a.parquet"):
        table = read_table(source)
        assert table.columns == rows
        assert table.label_names == {"label": ["neg", "pos"], "tags": ["O", "B-x"]}
        assert table.take([0]).label_names == table.label_names
    picked = data.select([1]).shuffle(seed=0)
    assert read_table(picked).columns["label"] == [0]
    plain = read_table(rows)
    assert plain.fingerprint != read_table(data).fingerprint


def test_splits_of_a_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict(test=part.select([0]), train=part)
    assert len(read_table(both)) == 3
    assert "split 'train' is used of 2 splits (not used: test)" in capsys.readouterr().err
    assert list(splits(both)) == ["test", "train"] and len(read_table(splits(both)["test"])) == 1
    assert splits(part) == {} and splits(ROWS) == {} and splits({"text": ["a"]}) == {}
    refused(datasets.DatasetDict(a=part, b=part), "splits a, b", "data['a']")
    refused(part.to_iterable_dataset(), "streamed")


def test_the_transform_of_a_data_set_is_applied(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "a": datasets.ClassLabel(names=["x", "y"])}
        | {"b": datasets.ClassLabel(names=["x", "y"])}
    )
    rows = {"text": ["A", "B"], "a": [0, 1], "b": [0, 1]}

    def change(batch: dict[str, Any]) -> dict[str, Any]:
        lower = [text.lower() for text in batch["text"]]
        return {
            "text": lower,
            "a": batch["a"],
            "b": [1 - b for b in batch["b"]],
            "n": np.ones(len(lower), int),
        }

    data = datasets.Dataset.from_dict(rows, features=kinds).with_transform(change)
    for source in (data, datasets.DatasetDict(train=data)):
        table = read_table(source)
        assert list(table.rows()) == list(data)
        assert table.label_names == {
            "a": ["x", "y"]
        }  # those of b do not belong to the numbers that it has now
        assert "transform" in capsys.readouterr().err
    assert read_table(data.select([1])).row(0) == {"text": "b", "a": 1, "b": 0, "n": 1}


def test_fingerprint() -> None:
    base = read_table(ROWS)
    assert (
        read_table([{"label": r["label"], "text": r["text"]} for r in ROWS]).fingerprint
        == base.fingerprint
    )
    others = [
        ROWS[::-1],
        ROWS[:2],
        [r | {"id": 1} for r in ROWS],
        [{"text": r["text"], "labels": r["label"]} for r in ROWS],
    ]
    made = [read_table(rows).fingerprint for rows in others] + [base.fingerprint]
    assert len(set(made)) == len(made)
    kinds = [read_table([{"a": value}]).fingerprint for value in (1, 1.0, "1", True, None, [1])]
    assert len(set(kinds)) == 6
    # Two sets of one content, whose order differs because 8 and 0 share a place.
    one, other = (read_table([{"a": set(order)}]) for order in ((0, 8), (8, 0)))
    assert list(one.columns["a"][0]) != list(other.columns["a"][0])
    assert one.fingerprint == other.fingerprint


# -------------------------------------------------------------------------------------- headers and quotes


def test_columns_name_a_file_without_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "1,Good\n2,Bad\n")
    table = read_table(path, columns=["label", "text"])
    assert table.columns == {"label": ["1", "2"], "text": ["Good", "Bad"]} and not table.hint
    assert table.where(0).endswith("line 1")
    assert read_table(path, header=False).names == ["column_1", "column_2"]
    assert (
        "columns=['label', 'text']" in read_table(path).hint
        and "'1', 'Good'" in read_table(path).hint
    )
    headed = write(tmp_path, "b.csv", "Label, text\n1,Good\n")
    assert read_table(headed, columns=["label", "text"]).columns == {
        "label": ["1"],
        "text": ["Good"],
    }
    assert len(read_table(headed, columns=["label", "text"], header=False)) == 2
    assert read_table(headed, columns=["y", "x"], header=True).columns == {
        "y": ["1"],
        "x": ["Good"],
    }
    assert read_table(headed).names == ["Label", "text"]
    refused(path, "names 3 columns", "have 2", "'1', 'Good'", columns=["a", "b", "c"])
    refused(path, "twice", columns=["a", "a"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["review,stars", "a good film,1", "a bad film,2.5"], True),
        (["review,kind", "a good film,pos", "a bad film,neg", "good,pos", "bad,neg"], True),
        (["a good film,pos", "a bad film,neg", "good,pos", "bad,neg"], False),
        (["good,1", "bad,2"], False),
        (["review,kind"], False),
    ],
)
def test_a_header_that_names_make_a_row_is_told(
    lines: list[str], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "a.csv", "\n".join(lines) + "\n")
    assert len(read_table(path, columns=["text", "label"])) == len(lines)
    assert ("looks like a header" in capsys.readouterr().err) == said
    for header in (True, False):
        if len(lines) > 1:
            read_table(path, columns=["text", "label"], header=header)
    assert "looks like" not in capsys.readouterr().err
    index = write(tmp_path, "c.csv", ",text\n0,Good\n")
    assert read_table(index).names == ["column_1", "text"]
    assert read_table([("Good", 1)], columns=["text", "label"]).row(0) == {
        "text": "Good",
        "label": 1,
    }
    refused([("Good", 1)], "columns=")
    refused([("Good", 1), ("Bad",)], "index 1", "1 values", columns=["text", "label"])
    refused(write(tmp_path, "a.jsonl", '{"a": 1}\n'), "jsonl", "columns", columns=["b"])


def test_quotes_of_tsv_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quotes enclose cells only where the whole file is written as a CSV writer writes it."""
    stray = write(tmp_path, "stray.tsv", 'text\tlabel\n"I say\ta\nhe said "no"\tb\n"whole"\tc\n')
    assert read_table(stray).columns["text"] == ['"I say', 'he said "no"', '"whole"']
    quoting_people = write(tmp_path, "people.tsv", 'text\n"Yes."\n"He said ""no""."\nplain\n')
    assert read_table(quoting_people).columns["text"][0] == '"Yes."'
    assert read_table(quoting_people, quoting=True).columns["text"][0] == "Yes."
    written = write(
        tmp_path, "written.tsv", 'text\tlabel\n"He said ""no"""\ta\nplain\tb\n"x, y"\tb\n'
    )
    capsys.readouterr()
    assert read_table(written).columns["text"] == ['He said "no"', "plain", "x, y"]
    assert "quoting=False" in capsys.readouterr().err
    assert read_table(written, quoting=False).columns["text"][0] == '"He said ""no"""'
    returns = write(tmp_path, "cr.tsv", "text\tlabel\r\na\rb\tc\r\n")
    assert read_table(returns).row(0) == {"text": "a\rb", "label": "c"}
    refused(write(tmp_path, "a.csv", 'text,label\n"open,b\n'), "a.csv:2", "quoting=False")
    semicolons = write(tmp_path, "semi.csv", "text;label\na;b\n")
    assert read_table(semicolons).row(0) == {"text": "a", "label": "b"}
    assert read_table(semicolons, delimiter=";").row(0) == {"text": "a", "label": "b"}
    refused(semicolons, "one character", delimiter=";;")


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("text;label;note, more\nhello;a;x\n", {"text": "hello", "label": "a", "note, more": "x"}),
        ("text|a, b\nx|1, 2\ny|3\n", {"text": "x", "a, b": "1, 2"}),
        ('text;"a, b, c"\n"x;\n;y";1\nz, z, z, z;2\n', {"text": "x;\n;y", "a, b, c": "1"}),
        ("text,a|b|c\nx,1\ny,2\n", {"text": "x", "a|b|c": "1"}),
        ("sep=;\ntext;a, b\nx;1\n", {"text": "x", "a, b": "1"}),
        # A comma that divides all rows alike is the delimiter, whatever else texts hold.
        ("text,joy;anger;fear\nx,1;0;0\ny,0;1;0\n", {"text": "x", "joy;anger;fear": "1;0;0"}),
        ('text,b\n"x |y| z",1|0\n"x |y| z",0|1\n', {"text": "x |y| z", "b": "1|0"}),
        ("sep=-\r\ntext-label\r\nx-1\r\n", {"text": "x", "label": "1"}),
    ],
)
def test_the_delimiter_is_the_one_that_fits_the_rows(
    tmp_path: Path, text: str, row: dict[str, str]
) -> None:
    """The usual one was taken wherever the first line held it, and the line of Excel was the header."""
    path = write(tmp_path, "a.csv", text)
    assert read_table(path).row(0) == row
    assert next(stream_chunks(path, 9)).rows[0] == row
    assert (
        next(text for text, _ in delimited_texts(path, "csv", Reading(text="text"))) == row["text"]
    )


def test_a_row_that_another_delimiter_fits_names_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text;label, x\nhello, you;a, b, c\n")
    refused(path, "every row has 2 of them; say so: delimiter=';'", delimiter=",")
    told = refused(write(tmp_path, "b.csv", "a,b\nx,y\nx,y,z\n"), "b.csv:3 has 3 columns")
    assert told.endswith("this row.")
    path = write(tmp_path, "c.csv", "sep=;\na;b\nx;y\nx;y;z\n")
    refused(path, "c.csv:4 has 3 columns")


cells_of_text = st.text(st.sampled_from("ab \"\t\n,é'’日"), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(cells_of_text, cells_of_text.filter(bool)), min_size=1, max_size=6),
    st.sampled_from([",", "\t"]),
    st.booleans(),
)
def test_what_a_csv_writer_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    every: bool,
) -> None:
    """A written TSV file is read back where it has a cell that only quoting can hold, or has no quotes at all."""
    folder = tmp_path_factory.mktemp("written")
    rule = csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL
    text = csv_text([["one", "two"], *map(list, rows)], delimiter=delimiter, quoting=rule)
    path = write(folder, "a.csv" if delimiter == "," else "a.tsv", text)
    table = read_table(path)
    assert list(zip(*table.columns.values(), strict=True)) == rows


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.sampled_from('ab ",é'), min_size=1, max_size=8)] * 2),
        min_size=1,
        max_size=6,
    )
)
def test_raw_tsv_lines_are_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    text = "one\ttwo\n" + "".join(f"{a}\t{b}\n" for a, b in rows)
    table = read_table(write(folder, "a.tsv", text), quoting=False)
    assert list(zip(*table.columns.values(), strict=True)) == rows


# ------------------------------------------------------------------------------------------- other formats


def test_conll(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\n"
    table = read_table(write(tmp_path, "a.conll", text))
    assert table.columns == {
        "tokens": [["EU", "rejects"], ["Peter"]],
        "ner_tags": [["B-ORG", "O"], ["B-PER"]],
    }
    assert table.where(1).endswith("line 6")
    tabs = read_table(write(tmp_path, "b.conll", "a b\tO\n#x\tB-y\n\t\n\nc\tO"))
    assert tabs.columns["tokens"] == [["a b", "#x"], ["c"]]
    refused(write(tmp_path, "c.conll", "a\tO\nb\n"), "c.conll:2", "no tag")
    refused(write(tmp_path, "d.conll", "a\tO\nb\tX\tO\n"), "d.conll:2", "3 columns")
    refused(write(tmp_path, "e.conll", "a\tO\nb\t \n"), "e.conll:2", "empty tag", r"'b\t '")
    refused(write(tmp_path, "f.conllu", "1\ta\tb\n"), "f.conllu:1", "has 10")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{0}\t{1}\t{2}", "the first column counts the words"), ("{0} {1} NN {2}", "the first column counts the words"),
        ("{2}\t{1}", "first column has tags such as 'I-LOC'"), ("{1}\t{2}", ""), ("{1} {0} NN {2}", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [0, 1])
def test_columns_of_conll_in_other_orders(
    line: str, told: str, first: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GermEval 2014 counts the words of a sentence, and the MIT corpora have the tag in front."""
    words = [["John", "in", "New", "York"], ["Mary"], ["1", "2"]]
    tags = [["B-PER", "O", "B-LOC", "I-LOC"], ["B-PER"], ["O", "O"]]
    blocks = [
        "".join(
            line.format(k, *pair) + "\n"
            for k, pair in enumerate(zip(*both, strict=True), start=first)
        )
        for both in zip(words, tags, strict=True)
    ]
    path = write(tmp_path, "a.conll", "\n".join(blocks))
    assert read_table(path).columns == {"tokens": words, "ner_tags": tags}
    assert (told in capsys.readouterr().err) if told else not capsys.readouterr().err


def test_the_cells_of_a_conll_file_are_not_all_held(tmp_path: Path) -> None:
    path = write(tmp_path, "a.conll", ("a NN B-NP O\n" * 20 + "\n") * 200)
    tracemalloc.start()
    try:
        assert sum(len(words) for _, words, _ in conll_sentences(path)) == 4000
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 25 * path.stat().st_size  # 14 times; 41 with all cells
    finally:
        tracemalloc.stop()


def test_comments_in_conll_are_no_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "# file 7\n\n# id 1 domain=en\nEU _ _ B-ORG\n# _ _ O\n\n# id 2 x=y\nEU _ _ O\n"
    table = read_table(write(tmp_path, "a.conll", text))
    assert table.columns["tokens"] == [["EU", "#"], ["EU"]] and table.where(1).endswith("line 8")
    assert "are taken for comments: 3, the first is line 1" in capsys.readouterr().err
    tabs = read_table(write(tmp_path, "b.conll", "# id 1\n#\tO\n#1\tB-X\nEU\tO\n"))
    assert tabs.columns["tokens"] == [["#", "#1", "EU"]]
    refused(write(tmp_path, "c.conll", "a\tO\n# id 1 x=y\nb\tO\n"), "c.conll:2")


def test_json_of_other_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2, "b": 3}\n{"b": 4}\n')
    assert read_table(path).columns == {"a": [1, 2, None], "b": [None, 3, 4]}
    told = capsys.readouterr().err
    assert "'b' (1 of 3 rows" in told and f"'a' (1 of 3 rows, first: {path}:3)" in told
    refused(write(tmp_path, "b.json", '{"a": [1], "b": [1, 2]}'), "b.json: the columns differ")
    refused(write(tmp_path, "c.json", '{"a": {"b": 1}, "c": 2}'), "no table", "records")
    refused(write(tmp_path, "d.json", '["x"]'), "row 1", "str")
    refused(write(tmp_path, "e.json", '[{"a": 1},\n {"a" 2}]'), "e.json:2:7")
    refused(write(tmp_path, "f.jsonl", '{"a": 1}\n{"a": NaN}\n'), "f.jsonl:2", "NaN")
    refused(write(tmp_path, "g.json", '[{"a": NaN}]'), "g.json", "NaN")
    refused(write(tmp_path, "h.json", '[{"a": 1, "a": 2}]'), "twice")
    refused(write(tmp_path, "i.json", "[" * 100_000), "i.json")
    refused(write(tmp_path, "j.jsonl", "[1]\n"), "j.jsonl:1", "list")
    torn = write(tmp_path, "k.jsonl", '{"a": 1}\n{"a": ')
    assert len(read_table(torn)) == 1 and "torn" in capsys.readouterr().err
    half = write(tmp_path, "l.jsonl", '{"a": ["\\ud83d"]}\n')
    assert read_table(half).row(0) == {"a": ["?"]}


@pytest.mark.parametrize(
    "orient", [None, "columns", "index", "split", "records", "table", "one row"]
)
def test_json_of_pandas(tmp_path: Path, orient: str | None) -> None:
    """Rows stand in the order of the file, as pandas itself reads them."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"text": ["a", "b", "c"], "label": [2, 0, 1], "data": ["x", None, "z"]}, index=[5, 11, 2]
    )
    if orient == "one row":
        frame, orient = frame[:1], None
    path = tmp_path / "a.json"
    frame.to_json(path, **({"orient": orient} if orient else {}))
    told = pandas.read_json(path, **({"orient": orient} if orient else {}))
    table = read_table(path)
    assert [row["text"] for row in table.rows()] == list(told["text"])
    for name in ("text", "label", "data"):
        assert table.columns[name] == read_table(told).columns[name]
    assert set(table.names) - {"index"} == {"text", "label", "data"}


def test_json_of_pandas_that_is_ambiguous(tmp_path: Path) -> None:
    cure = "orient='records'"
    refused(write(tmp_path, "a.json", '[["a", 1], ["b", 0]]'), "without the names", cure)
    refused(write(tmp_path, "b.json", '{"data": [["a", 1]]}'), "without the names", cure)
    refused(write(tmp_path, "c.json", '{"0": {"0": "a"}}'), "rows or columns", cure)
    refused(write(tmp_path, "d.json", '{"a": {"b": "c"}}'), "rows or columns", cure)
    split = '{"columns": ["a", "b"], "data": [["x", 1], ["y"]]}'
    refused(write(tmp_path, "e.json", split), "row 2 of", "1 values")
    # An index by date, and rows of which one lacks a column.
    path = write(tmp_path, "f.json", '{"2024-01-01": {"a": 1, "b": 2}, "2024-01-02": {"a": 3}}')
    assert read_table(path).columns == {"a": [1, 3], "b": [2, None]}


def test_json_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"train": ROWS, "dev": ROWS[:1], "test": ROWS[1:]}
    path = write(tmp_path, "a.json", json.dumps(parts))
    assert list(read_table(path, name="train").rows()) == ROWS
    assert not capsys.readouterr().err
    assert list(read_table(path, name="validation").rows()) == ROWS[:1]
    assert list(read_table(path, name="test").rows()) == ROWS[1:]
    assert list(read_table(path).rows()) == ROWS == list(read_table(parts).rows())
    assert capsys.readouterr().err.count("'train' is used of 3 splits (not used: dev, test)") == 2
    assert parts_of_file(path) == ["train", "valid", "test"] and parts_of_file(ROWS) == []
    columns = write(tmp_path, "b.json", json.dumps({"train": {"text": ["a"]}, "test": []}))
    assert read_table(columns).columns == {"text": ["a"]} and parts_of_file(columns) == ["train"]
    one = write(tmp_path, "c.json", json.dumps({"test": ROWS}))
    assert list(read_table(one).rows()) == ROWS
    refused(
        write(tmp_path, "d.json", json.dumps({"dev": ROWS, "test": ROWS})), "none called 'train'"
    )
    words = write(tmp_path, "e.json", '{"train": ["steam", "diesel"], "test": ["x", "y"]}')
    assert read_table(words).names == ["train", "test"] and parts_of_file(words) == []


def test_squad(tmp_path: Path) -> None:
    paragraph = {
        "context": "A cat.",
        "qas": [
            {"id": "1", "question": "What?", "answers": [{"text": "cat", "answer_start": 2}]},
            {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
        ],
    }
    squad = {"version": "2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    table = read_table(write(tmp_path, "a.json", json.dumps(squad)))
    assert table.names == ["id", "context", "question", "answers"]
    assert table.columns["answers"] == [
        {"text": ["cat"], "answer_start": [2]},
        {"text": [], "answer_start": []},
    ]
    del paragraph["qas"][1]["question"]
    refused(
        write(tmp_path, "b.json", json.dumps(squad)), "data[0].paragraphs[0].qas[1]", "'question'"
    )
    del squad["data"][0]["paragraphs"][0]["context"]
    refused(write(tmp_path, "c.json", json.dumps(squad)), "'context'")


# ------------------------------------------------------------------------------------------ hostile input


def test_broken_files_are_told_with_their_place(tmp_path: Path) -> None:
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.conll", "a.conllu"):
        refused(write(tmp_path, name, ""), name)
    refused(write(tmp_path, "h.csv", "text,label\n"), "h.csv", "no rows", "text, label")
    refused(write(tmp_path, "h.json", "[]"), "no rows")
    refused(
        write(tmp_path, "r.csv", "text,label\na,b\nc,d,e\n"), "r.csv:3", "3 columns", "header has 2"
    )
    refused(write(tmp_path, "r.tsv", "text\tlabel\na\tb\nc\n"), "r.tsv:3", "1 columns")
    refused(write(tmp_path, "n.csv", "1,2\n3\n"), "n.csv:2", "first row has 2", columns=["a", "b"])
    refused(
        write(tmp_path, "d.csv", "text,text\na,b\n"), "d.csv:1", "'text' twice", "columns=[...]"
    )
    for name in ("u.csv", "u.tsv", "u.jsonl", "u.json", "u.conll"):
        refused(write(tmp_path, name, b'{"a": 1}\nab\xe9,x\tO\n'), f"{name}:2:3", "UTF-8")
    refused(write(tmp_path, "b.csv", b"\x89PNG\r\n\x1a\n\0\0"), "b.csv", "binary")
    refused(write(tmp_path, "b2.csv", b"a,b\n1,2\n\0\0"), "b2.csv", "binary")
    refused(write(tmp_path, "z.csv", gzip.compress(b"text\na\n")), "gzip")
    refused(write(tmp_path, "p.parquet", b"PAR1 nothing"), "parquet")
    refused(write(tmp_path, "g.csv.gz", gzip.compress(b"text\na\n" * 9)[:-9]), "damaged or cut")
    refused(write(tmp_path, "t.txt", "text\tlabel\na\tb\n"), "format='tsv'")
    assert len(read_table(tmp_path / "t.txt", format="tsv")) == 1
    refused(tmp_path / "t.txt", "Did you mean 'tsv'", format="tsvv")


@pytest.mark.parametrize("splits", [False, True])
def test_what_the_datasets_library_saved_is_told_how_to_give(splits: bool, tmp_path: Path) -> None:
    """In Python as an object; on the command line as a file that the printed command writes."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a", "label": "b"}])
    folder = tmp_path / "saved"
    (datasets.DatasetDict(train=rows) if splits else rows).save_to_disk(folder)
    refused(folder, f"datasets.load_from_disk({str(folder)!r})")
    with using(Interface(command=True)), pytest.raises(DataError, match="load_from_disk") as error:
        read_table(folder)
    written = str(error.value).split('python -c "')[1].removesuffix('".')
    exec(written.replace("rows.parquet", str(tmp_path / "rows.parquet")))
    assert read_table(tmp_path / "rows.parquet").columns == {"text": ["a"], "label": ["b"]}


def test_decimals_of_databases_stay_what_they_are(tmp_path: Path) -> None:
    """Also whole ones: runs know their rows by the types of the cells, and `predict` passes columns through."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given = [Decimal("0.00"), Decimal("2.00"), Decimal("1.50")]
    pq.write_table(pa.table({"text": list("abc"), "label": given}), tmp_path / "a.parquet")
    rows = [{"text": "a", "label": value} for value in given]
    for table in (read_table(tmp_path / "a.parquet"), read_table(rows)):
        assert [*map(repr, table.columns["label"])] == [*map(repr, given)]


def test_headers_of_joined_files_are_no_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A header of one name may be a text, and so may any row of a file whose names are given."""
    part = "text,label\na,x\nb,y\n"
    path = write(tmp_path, "all.csv", part * 3)
    table = read_table(path)
    assert table.columns == {"text": ["a", "b"] * 3, "label": ["x", "y"] * 3}
    assert "rows that repeat the header are left out: line 4, 7" in capsys.readouterr().err
    assert table.where(2).endswith("line 5")
    assert len(read_table(path, columns=["text", "label"], header=False)) == 9
    assert len(read_table(path, columns=["t", "l"], header=True)) == 6
    assert read_table(write(tmp_path, "one.csv", "text\na\ntext\n")).columns == {
        "text": ["a", "text"]
    }
    for joined in ("\ufefftext,label\na,x\n\ufefftext,label\nb,y\n", "text,label\na,x\ntext, label\nb,y\n",
                   '"text","label"\na,x\n\ufeff"text","label"\nb,y\n'):  # fmt: skip
        file = write(tmp_path, "joined.csv", joined)
        assert read_table(file).columns == {"text": ["a", "b"], "label": ["x", "y"]}
        (chunk,) = stream_chunks(file, 8)
        assert len(chunk.rows) == len(read_table(file, name="inputs")) == 3
    assert "kept, so that every row has its answer: line 3" in capsys.readouterr().err
    documents = pretrain.prepare(
        path, tmp_path / "out", tokenizer="char", valid=0.0, keep_duplicates=True
    )
    assert documents.manifest["splits"]["train"]["documents"] == 6


def test_what_is_no_table(tmp_path: Path) -> None:
    path = write(tmp_path, "reviews.csv", "text,label\na,b\n")
    write(tmp_path, "more.csv", "text,label\na,b\n")
    refused(str(path).replace("reviews", "review"), "Did you mean", "reviews.csv")
    refused(tmp_path, "folder", "reviews.csv")
    refused(str(tmp_path / "*.csv"), "2 files")
    for name, call in (("a.xlsx", "read_excel('"), ("a.HTML", "')[0]"), ("a.pkl", "read_pickle('")):
        refused(write(tmp_path, name, "x"), "Give pandas.", call)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.arrow")
    with using(Interface(command=True)):
        code = refused(saved, "datasets.Dataset.from_file").split('python -c "')[1].split('"')[0]
    exec(code.replace("rows.csv", str(tmp_path / "rows.csv")))
    assert read_table(tmp_path / "rows.csv").columns == read_table(ROWS).columns
    refused("hub:ag_news", "load_dataset('ag_news')")
    refused("x" * 5000, "a text of 5,000 characters")
    refused("a\0b.csv", "")
    refused(7, "valid is a int", name="valid")
    refused([], "no rows")
    refused({}, "no rows")
    refused(["good", "bad"], "index 0", "str 'good'", '"text"')
    refused(["a.csv", "b.csv"], "one path")
    refused([{"a": 1}, None], "index 1", "NoneType")
    refused({"text": ["a", "b"], "label": [1]}, "differ in length", "'label': 1")
    refused({"text": "a"}, "list for every column")
    refused(ROWS, "columns=", columns=["a", "b"])
    refused(ROWS, "format=", format="csv")
    with pytest.raises(DataError, match="differ in length"):
        Table("t", {"a": [1], "b": []})
    pandas = pytest.importorskip("pandas")
    refused(pandas.DataFrame([[1, 2]], columns=["a", "a"]), "'a' twice")
    refused(pandas.DataFrame({"a": []}), "no rows")


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """Whatever bytes are changed, cut or put in: rows, or a DataError that names the file; never anything else."""
    pandas = pytest.importorskip("pandas")
    cells = [["text", "label"], *[[r["text"], r["label"]] for r in ROWS]]
    squad = {
        "data": [
            {"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}
        ]
    }
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    whole = {
        "a.csv": csv_text(cells).encode(),
        "a.tsv": csv_text(cells, delimiter="\t").encode(),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "a.json": json.dumps(ROWS).encode(),
        "squad.json": json.dumps(squad).encode(),
        "a.conll": b"a\tO\nb\tB-x\n\nc\tO\n",
        "a.conllu": b"# text = a\n1\ta\ta\tX\t_\t_\t0\troot\t_\t_\n\n",
        "a.csv.gz": gzip.compress(csv_text(cells).encode()),
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for name, data in whole.items():
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                place = int(rng.integers(len(broken)))
                kind = rng.integers(3)
                if kind == 0:
                    broken[place] = int(rng.integers(256))
                elif kind == 1:
                    broken[place:place] = bytes(rng.choice(list(b'"\n\r\t,{}[]\0\xff'), 2).tolist())
                elif place:
                    del broken[place:]
            path = write(tmp_path, name, bytes(broken))
            try:
                table = read_table(path)
                fault = ""
            except DataError as error:
                fault = str(error)
            outcomes[bool(fault)] += 1
            assert name in fault or (len(table) and table.where(0) and table.fingerprint)
    assert min(outcomes.values()) > 50, outcomes


# ---------------------------------------------------------------------------------------------- real data

REAL: list[tuple[str, int, dict[str, Any], list[str]]] = [
    ("ag_news/train.csv", 6600, {"columns": ["label", "title", "text"]}, ["label", "title", "text"]),
    ("ag_news/test.csv", 1000, {"header": False}, ["column_1", "column_2", "column_3"]),
    ("sms_spam/sms.tsv", 5574, {"columns": ["label", "text"]}, ["label", "text"]),
    ("query_wellformedness/dev.tsv", 3750, {"columns": ["text", "score"]}, ["text", "score"]),
    ("sick/trial.txt", 500, {"format": "tsv"},
     ["pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment"]),
    ("sick/test.txt", 4927, {"format": "tsv"}, []),
    ("cad_nli/revised_premise_train.tsv", 3332, {}, ["sentence1", "sentence2", "gold_label"]),
    ("pud_parallel/pud_en_de_fr.tsv", 1000, {}, ["id", "en", "de", "fr"]),
    ("wiki_split/tune.tsv.gz", 5000, {"columns": ["whole", "parts"]}, ["whole", "parts"]),
    ("wnut17/train.conll", 3394, {}, ["tokens", "ner_tags"]),
    ("wnut17/dev.conll", 1009, {}, []),
    ("wnut17/test.conll", 1287, {}, []),
    ("ud_english_ewt/dev.conllu", 2001, {}, ["tokens", "pos_tags"]),
    ("ud_english_ewt/test.conllu", 2077, {}, []),
    ("xquad_en/xquad.en.json", 1190, {}, ["id", "context", "question", "answers"]),
    ("banking77/train.csv", 10003, {}, ["text", "category"]),
    ("banking77/test.csv", 3080, {}, []),
    ("movie_reviews/reviews.jsonl.gz", 2000, {}, ["id", "split", "label", "text"]),
    ("sgd_dialogues/dialogues_002.json.gz", 128, {}, ["dialogue_id", "services", "turns"]),
    ("self_instruct_human/seed_tasks.jsonl", 175, {}, ["id", "name", "instruction", "instances", "is_classification"]),
    ("self_instruct_human/user_oriented_instructions.jsonl", 252, {}, []),
    ("crows_pairs/crows_pairs_anonymized.csv", 1508, {}, []),
    ("gsm8k/train.jsonl", 7473, {}, ["question", "answer"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "rows", "options", "names"), REAL, ids=[row[0] for row in REAL])
def test_real_files(
    data_sets: Path, path: str, rows: int, options: dict[str, Any], names: list[str]
) -> None:
    table = read_table(data_sets / path, **options)
    assert len(table) == rows
    assert not names or table.names == names
    line = table.where(rows - 1)
    assert path in line and (table.unit == "row" or int(line.rsplit(" ", 1)[1]) >= rows)


def test_content_of_real_files(data_sets: Path) -> None:
    """The values themselves, against other readers."""
    pandas = pytest.importorskip("pandas")
    spam = read_table(data_sets / "sms_spam/sms.tsv", columns=["label", "text"])
    assert spam.columns["label"].count("spam") == 747
    assert sum('"' in text for text in spam.columns["text"]) > 100
    for part in ("train", "dev", "test"):
        path = data_sets / f"stsb_open_subset/{part}.tsv"
        frame = pandas.read_csv(
            path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False
        )
        table = read_table(path)
        assert len(table) == {"train": 2999, "dev": 1000, "test": 879}[part]
        assert table.columns == frame.to_dict("list")
    for path in sorted((data_sets / "cad_nli").glob("*.tsv")):
        frame = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        assert read_table(path).columns == frame.to_dict("list"), path
    squad = read_table(data_sets / "xquad_en/xquad.en.json")
    assert len(set(squad.columns["context"])) == 240
    for row in squad.rows():
        for text, start in zip(*row["answers"].values(), strict=True):
            assert row["context"][start : start + len(text)] == text
    words = read_table(data_sets / "wnut17/test.conll").columns
    assert sum(map(len, words["tokens"])) == 23_394
    assert {tag[:2] for tags in words["ner_tags"] for tag in tags} == {"O", "B-", "I-"}
    tagged = read_table(data_sets / "ud_english_ewt/dev.conllu").columns
    assert tagged["tokens"][0] == ["From", "the", "AP", "comes", "this", "story", ":"]
    assert len({tag for tags in tagged["pos_tags"] for tag in tags}) == 17


def test_many_columns_give_a_short_message(tmp_path: Path) -> None:
    from pretrain.data.labelled import choose_columns
    from pretrain.objectives.classification import Classification

    names = [f"feature_{k}" for k in range(50_000)]
    path = tmp_path / "wide.csv"
    path.write_text(",".join(names) + "\n" + ",".join("0" * len(names)) + "\n")
    table = read_table(path)
    assert len(table.names) == 50_000
    for source in (table, read_table([dict.fromkeys(names, 0.5)])):
        with pytest.raises(DataError) as caught:
            choose_columns(source, Classification.roles, {})
        assert len(str(caught.value)) < 2_000
    assert "50,000 in all" in str(caught.value)
    path.write_text(",".join([*names, "feature_7"]) + "\n")
    with pytest.raises(DataError, match="'feature_7' twice"):
        read_table(path)


def test_a_line_of_odd_blanks_in_conll_is_named(tmp_path: Path) -> None:
    refused(write(tmp_path, "b.conll", "sea NN\n\u2003\u2003\nship NN\n"), "b.conll:2")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "conll"])
def test_files_in_another_encoding(encoding: str, kind: str, tmp_path: Path) -> None:
    rows = [{"text": "café über", "label": "naïf"}, {"text": "b", "label": "ç"}]
    mark = "," if kind == "csv" else "\t"
    lines = [mark.join(row.values()) for row in rows]
    content = {
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n",
        "json": json.dumps(rows, ensure_ascii=False),
        "conll": "\n".join(lines) + "\n",
    }.get(kind, "\n".join([mark.join(rows[0]), *lines]) + "\n")
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content.encode(encoding))
    table = read_table(path, encoding=encoding)
    if kind == "conll":
        assert table.columns["tokens"] == [[row["text"] for row in rows]]
    else:
        assert list(table.rows()) == rows
    if encoding == "cp1252":
        with pytest.raises(DataError, match="encoding='cp1252'"):
            read_table(path)
    with pytest.raises(DataError, match="encoding"):
        read_table(rows, encoding=encoding)


def test_keys_that_are_the_same_column_as_text_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"row 2 of data \(index 1\).*the same column as text: \[1, '1'\]"
    ):
        read_table([{"1": "a"}, {1: "b", "1": "c"}])
