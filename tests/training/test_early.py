"""Checks before the data are read: each mistake is found, in every command that trains from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pretrain
import tiny
from pretrain.cli.main import main
from pretrain.errors import CheckpointError, ConfigError, DataError, ModelError

SETTINGS = {
    "data": {"train": "python", "row_length": 32},
    "model": {
        "family": "gpt2",
        "size": "tiny",
        "overrides": {"hidden_size": 32, "max_positions": 32},
    },
    "parallel": {"device": "cpu"},
}


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any data fails the test."""

    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr("pretrain.training.run.prepare", read)
    monkeypatch.setattr("pretrain.training.run.open_rows", read)


@pytest.mark.parametrize(
    "command",
    [pretrain.train, pretrain.bench, pretrain.lr_range_test],
    ids=["train", "bench", "lr-range"],
)
@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"model": {"size": "tinny"}}, "tinny"),
        ({"model": "gtp2:tiny"}, "'gpt2'"),
        ({"model": {"overrides": {"hiden_size": 8}}}, "hidden_size"),
        ({"model": {"overrides": {"num_heads": 7}}}, "num_heads"),
        ({"model": {"overrides": {"seed": 7}}}, "set elsewhere"),
        ({"model": "/no/such/run"}, "/no/such/run"),
        ({"objective": "mlm", "init_args": {"rat": 0.3}}, "objective.init_args.rat"),
        (
            {"objective": "mlm"},
            "no masked-lm head.*bert, roberta, modernbert.*Train this one with objective='next-token'",
        ),
        (
            {"model": "bert"},
            "no causal-lm head.*gpt2, llama, mistral, qwen2, qwen3. Train this one with objective='masked-lm'",
        ),
        (
            {"model": "vit"},
            "no causal-lm head.*Train this one with objective='ImageClassification'",
        ),
        (
            {"row_length": 33},
            "33 tokens, but the gpt2 model has 32 positions.*'row_length': 32.*max_positions 33",
        ),
        ({"objective": "NextTokken"}, "'NextToken'"),
        ({"objective": "chat"}, r"a task of fine-tuning: finetune\(task='chat'\)"),
        ({"device": "mps"}, r"parallel={'device': 'auto'}"),
        (
            {"monitor": "acuracy"},
            "loss, accuracy, perplexity, bits_per_byte. Did you mean 'accuracy'",
        ),
        ({"batch_sise": 8}, "'batch_size'"),
    ],
)
def test_mistakes_are_found_before_the_data_are_read(
    command: Any, given: dict[str, Any], match: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError, ModelError), match=match):
        command(SETTINGS, **given)


@pytest.mark.parametrize("rows", [[{"image": "a.png"}], "photos", {"text": ["a"]}])
def test_rows_that_are_no_source_are_refused(rows: Any, tmp_path: Path) -> None:
    for family in ("vit_mae", "gpt2"):
        with pytest.raises(ConfigError, match="must be a RowSource.*pretrain.finetune"):
            pretrain.train(rows=rows, model={"family": family}, train={"out": str(tmp_path / "a")})


def test_a_number_of_devices_that_is_none() -> None:
    with pytest.raises(ConfigError, match="devices is 'foo'"):
        pretrain.train(SETTINGS, devices="foo")


def test_a_logger_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'trackio', whose package is not installed"):
        pretrain.train(SETTINGS, loggers=["trackio"])
    for command in (pretrain.bench, pretrain.lr_range_test):  # these log nothing
        with pytest.raises(AssertionError, match="the data were read"):
            command(SETTINGS, loggers=["trackio"])


@pytest.mark.parametrize(
    ("family", "length"),
    [("gpt2", 32), ("llama", 32), ("bert", 32), ("roberta", 31), ("modernbert", 32)],
)
def test_rows_as_long_as_the_positions_are_let_through(family: str, length: int) -> None:
    objective = "next-token" if family in ("gpt2", "llama") else "mlm"
    chosen = {"family": family, "objective": objective, "row_length": length}
    with pytest.raises(AssertionError, match="the data were read"):
        pretrain.train(SETTINGS, **chosen)
    with pytest.raises(ConfigError, match=f"{length + 1} tokens, but the {family} model"):
        pretrain.train(SETTINGS, **chosen | {"row_length": length + 1})


def test_a_text_that_is_not_there_is_named_first() -> None:
    with pytest.raises(DataError, match="no such file"):
        pretrain.train(SETTINGS, data="nowhere", row_length=33)


def test_a_checkpoint_is_judged_by_its_configuration(tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32}
    path = pretrain.build("gpt2", tokenizer=tiny.tokenizer(), **sizes).save(tmp_path / "gpt2")
    chosen = {"data": {"train": "python", "row_length": 32}, "model": str(path)}
    for command in (pretrain.train, pretrain.lr_range_test):
        with pytest.raises(AssertionError, match="the data were read"):
            command(chosen)
        with pytest.raises(
            ConfigError, match="has the head 'causal-lm'.*trains 'masked-lm'.*'next-token'"
        ):
            command(chosen, objective="mlm")
        with pytest.raises(
            ConfigError, match=r"33 tokens, but the gpt2 model has 32 positions.*: 32}\.$"
        ):
            command(chosen, row_length=33)


def test_the_objective_is_spelt_as_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "lr-range", "bench"):
        assert main([command, "--model", "bert:tiny"]) == 2
        assert "Train this one with --objective masked-lm." in capsys.readouterr().err
