"""Messages name options as the user of the interface writes them."""

import inspect

import pytest

import tiny
from pretrain import evaluate
from pretrain.cli.arguments import interface
from pretrain.cli.main import main
from pretrain.config.spelling import (
    EVALUATE,
    FINETUNE,
    PREDICT,
    SEARCH,
    STREAM,
    TRAIN,
    Interface,
    column,
    columns,
    option,
    reads_with,
    using,
)
from pretrain.data.tables import read_table
from pretrain.errors import DataError
from pretrain.inference.predict import predict_file
from pretrain.inference.text_files import embed_file, search_file

READING = ("format", "names", "delimiter", "quoting", "encoding")


def command(name):
    return interface(name)


@pytest.mark.parametrize(
    ("where", "format", "text", "names", "labels", "task"),
    [
        (
            FINETUNE,
            "format='tsv'",
            "text='a b'",
            "names=['x', ...]",
            "labels={1: 'no', ...}",
            "task='chat'",
        ),
        (
            PREDICT,
            "format='tsv'",
            "columns={'text': 'a b'}",
            "names=['x', ...]",
            "labels={1: 'no', ...}",
            "task='chat'",
        ),
        (
            "finetune",
            "--data.format tsv",
            "--data.columns.text 'a b'",
            "--data.names '[x, ...]'",
            "--task.options.labels '{1: no, ...}'",
            "--task chat",
        ),
    ],
    ids=["finetune", "predict", "pretrain finetune"],
)
def test_an_option_is_spelled_for_each_interface(where, format, text, names, labels, task):
    with using(command(where) if isinstance(where, str) else where):
        assert option("format", "tsv") == format
        assert column("text", "a b") == text
        assert option("names", ["x", ...]) == names
        assert option("task", "chat") == task
        assert option("labels", {1: "no", ...: ...}) == labels


def test_other_commands_and_what_stands_without_a_value():
    assert option("names", ["a"]) == "columns=['a']"  # read_table, outside of any command
    assert option("labels", [...]) == "labels=[...]"
    with using(TRAIN):
        assert column("text") == "data={'text': ...}"
    with using(command("train")):
        assert (column("text"), option("limit")) == ("--data.text ...", "--train.limit ...")
    with using(command("prepare")):
        assert (column("text"), option("separator", "\n\n")) == ("--text ...", "--separator '\n\n'")
    with using(command("predict")):
        assert column("text", "review") == "--columns.text review"


def test_a_command_stays_what_was_entered_and_ends_with_its_error():
    with using(Interface(command=True, others="a.")), using(FINETUNE):
        assert option("quoting", False) == "--a.quoting false"
    with pytest.raises(ZeroDivisionError), using(FINETUNE):
        1 / 0  # noqa: B018
    assert option("names") == "columns=..."


def test_the_same_mistake_is_told_in_the_words_of_its_interface(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "x"}\n')
    assert main(["prepare", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "Choose one with --text ..." in capsys.readouterr().err
    from pretrain import prepare

    with pytest.raises(DataError, match="Choose one with text=..."):
        prepare(str(file), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("function", "interface"),
    [(evaluate, EVALUATE), (predict_file, PREDICT), (embed_file, STREAM), (search_file, SEARCH)],
)
def test_only_options_that_a_function_has_are_advised(function, interface):
    with using(interface):
        had = {name for name in READING if reads_with(name)}
    assert had == set(READING) & set(inspect.signature(function).parameters)


def test_only_options_that_a_command_has_are_advised(tmp_path, capsys):
    (tmp_path / "n.txt").write_text("a\n")
    (tmp_path / "latin.csv").write_bytes(b"id;text\n" + "1;caf\xe9\n".encode("cp1252") * 40)
    for words, advised in (
        (["evaluate", "{}", "--task", "sts", "--data", "n.txt"], ""),
        (["finetune", "--model", "{}", "--task", "regression", "--data", "n.txt"], "--data.format tsv"),
        (["search", "{}", "a query", "latin.csv"], ""),
        (["embed", "{}", "latin.csv", "--out", "v.npy"], "--encoding cp1252"),
    ):  # fmt: skip
        model = tmp_path / "model"
        if not model.exists():
            tiny.objective("MaskedLM").model.save(model)
        files = {name: str(tmp_path / name) for name in ("n.txt", "latin.csv", "v.npy")}
        assert main([files.get(word, word.format(model)) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Rename it" in said or "convert it" in said.lower()
        assert advised in said and (advised or "--" not in said), said


def test_a_file_whose_first_line_is_a_row(tmp_path):
    (tmp_path / "a.csv").write_text("same,same\n")
    for where, cure in (
        (FINETUNE, r"name the columns, in their order in the file: names=\[\.\.\.\]"),
        (EVALUATE, "put a line with the names"),
    ):
        with using(where), pytest.raises(DataError, match=cure):
            read_table(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (FINETUNE, "text='a b', label=['x', 'y']"),
        (PREDICT, "columns={'text': 'a b', 'label': ['x', 'y']}"),
        ("finetune", "--data.columns.text 'a b' --data.columns.label '[x, y]'"),
    ],
)
def test_several_columns_are_written_as_one_call_takes_them(where, text):
    with using(command(where) if isinstance(where, str) else where):
        assert columns({"text": "a b", "label": ["x", "y"]}) == text
