"""Messages name options as the user of the interface writes them."""

import pytest

from pretrain.cli.arguments import interface
from pretrain.cli.main import main
from pretrain.config.spelling import FINETUNE, PREDICT, TRAIN, Interface, column, option, using
from pretrain.errors import DataError


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
