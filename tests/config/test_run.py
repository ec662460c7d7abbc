"""The settings of a run: surface, defaults, strictness, and YAML that reads back what it wrote."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
from pretrain.config import (
    Limit,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    fields,
    parse_every,
    parse_limit,
    strict_yaml,
)
from pretrain.errors import ConfigError
from pretrain.training.early import prepared_in

SRC = Path(__file__).parents[2] / "src" / "pretrain"

# Every setting there is. Adding one is a decision: it needs code that reads it, a line here and one in the CHANGELOG.
SURFACE = [
    "data.train",
    "data.source",
    "data.source_args",
    "data.valid",
    "data.text",
    "data.separator",
    "data.encoding",
    "data.tokenizer",
    "data.vocab_size",
    "data.row_length",
    "data.cache",
    "data.workers",
    "model.family",
    "model.size",
    "model.checkpoint",
    "model.overrides",
    "objective.class_path",
    "objective.init_args",
    "optim.name",
    "optim.lr",
    "optim.muon_lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.cautious",
    "optim.clip",
    "optim.schedule",
    "optim.warmup",
    "optim.decay",
    "optim.min_lr",
    "optim.ema",
    "optim.layer_decay",
    "optim.unfreeze",
    "optim.l2_sp",
    "train.out",
    "train.limit",
    "train.batch_rows",
    "train.micro_rows",
    "train.eval_every",
    "train.eval_rows",
    "train.save_every",
    "train.async_save",
    "train.keep",
    "train.best",
    "train.monitor",
    "train.patience",
    "train.log_every",
    "train.sample",
    "train.loggers",
    "train.precision",
    "train.eval_precision",
    "train.seed",
    "train.recut",
    "parallel.device",
    "parallel.compile",
    "parallel.activation_checkpointing",
    "parallel.threads",
    "parallel.strategy",
    "parallel.dp_replicate",
    "parallel.dp_shard",
    "parallel.tp",
    "parallel.cpu_offload",
    "parallel.reproducible",
    "parallel.timeout",
]


def error(source: Any = None, overrides: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(source, overrides)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- surface


def test_the_surface_is_frozen() -> None:
    found = [
        f"{section}.{field.name}" for section in RunConfig.SECTIONS for field in fields(section)
    ]
    assert found == SURFACE


def test_every_setting_is_read_by_some_code() -> None:
    """An option that nobody reads lies: each field is read as an attribute somewhere outside of config/run.py."""
    read: set[str] = set()
    for path in SRC.rglob("*.py"):
        if path not in (SRC / "config" / "run.py", SRC / "config" / "check.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
    assert [key for key in SURFACE if key.partition(".")[2] not in read] == []


def test_every_setting_has_a_help_text_and_a_valid_default() -> None:
    for section in RunConfig.SECTIONS:
        for field in fields(section):
            assert len(field.help) > 10, f"{section}.{field.name}"
    assert RunConfig.load() == RunConfig() == RunConfig().validate()


# --------------------------------------------------------------------------------------------- loading


def test_file_dict_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "objective: MaskedLM\noptim:\n  lr: 2e-5\n  betas: [0.9, 0.99]\ntrain:\n  limit: 10 minutes\n"
    )
    config = RunConfig.load(path, {"optim": {"name": "muon"}, "train.seed": 3})
    assert config.objective.class_path == "MaskedLM"
    assert (config.optim.lr, config.optim.betas, config.optim.name) == (2e-5, (0.9, 0.99), "muon")
    assert (config.train.seed, config.train.limit) == (3, "10 minutes")
    assert RunConfig.load({"optim.lr": 1}).optim.lr == 1.0
    assert RunConfig.load({"optim": OptimConfig(lr=0.5)}).optim.lr == 0.5
    assert RunConfig.load({"optim.lr": "auto"}).optim.lr == "auto"
    assert RunConfig.load({"data": None}).data == RunConfig().data


def test_overrides_merge_open_mappings_and_replace_the_rest() -> None:
    base = {
        "model": {"overrides": {"num_layers": 2, "num_heads": 4}},
        "objective": {"class_path": "MaskedLM", "init_args": {"rate": 0.3}},
        "data": {"train": {"a": 1, "b": 2}},
    }
    config = RunConfig.load(base, {"model.overrides.num_layers": 6, "data.train": {"c": 1}})
    assert config.model.overrides == {"num_layers": 6, "num_heads": 4}
    assert config.data.train == {"c": 1.0}
    assert RunConfig.load(base, {"objective.init_args.whole_word": True}).objective.init_args == {
        "rate": 0.3,
        "whole_word": True,
    }
    assert RunConfig.load(base, {"objective": "NextToken"}).objective.init_args == {}
    assert base["model"]["overrides"] == {"num_layers": 2, "num_heads": 4}


def test_sources_may_be_paths_and_prepared_data(tmp_path: Path) -> None:
    class Prepared:
        path = tmp_path

    assert RunConfig.load({"data": {"train": Prepared()}}).data.train == str(tmp_path)
    assert RunConfig.load({"data": {"train": [tmp_path, "b"]}}).data.train == [str(tmp_path), "b"]
    assert "pretrain.prepare" in error({"data": {"train": object()}})


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"optim.lrr": 1}, ["'optim.lrr'", "'optim.lr'"]),
        ({"optimm": {}}, ["'optimm'", "'optim'"]),
        ({"lrr": 1}, ["'lrr'", "'optim.lr'"]),
        ({"train": {"lr": 1}}, ["'train.lr'", "'optim.lr'"]),
        ({"model.rope_theta": 64}, ["'model.rope_theta'", "model.overrides"]),
        ({"objective.rate": 0.1}, ["'objective.rate'", "objective.init_args"]),
        ({"optim.lr": "fast"}, ["optim.lr", "a number or auto", "'fast'"]),
        ({"optim.lr": True}, ["optim.lr", "a number"]),
        ({"optim.lr": None}, ["optim.lr", "a number"]),
        ({"optim.lr": -1e-3}, ["optim.lr", "between"]),
        ({"optim.lr": math.nan}, ["optim.lr", "finite"]),
        ({"optim.lr": math.inf}, ["optim.lr", "finite"]),
        ({"optim.betas": [0.9]}, ["optim.betas", "2 numbers"]),
        ({"optim.betas": [0.9, 1.0]}, ["optim.betas", "between"]),
        ({"optim.name": "adam"}, ["optim.name", "'adamw'"]),
        ({"optim": [1]}, ["optim", "section"]),
        ({"train.batch_rows": -1}, ["train.batch_rows", "between"]),
        ({"train.batch_rows": 1.5}, ["train.batch_rows", "whole number"]),
        ({"train.batch_rows": True}, ["train.batch_rows", "whole number"]),
        ({"train.batch_rows": 4, "train.micro_rows": 8}, ["train.micro_rows", "train.batch_rows"]),
        ({"train.limit": True}, ["train.limit", "text"]),
        ({"train.limit": 0.5}, ["train.limit", "whole number of steps"]),
        ({"train.limit": 10**400}, ["train.limit", "text"]),
        ({"train.eval_every": "often"}, ["train.eval_every", "often"]),
        ({"train.save_every": "200%"}, ["train.save_every"]),
        ({"train.loggers": "wandb"}, ["train.loggers", "a list, e.g. [tensorboard]"]),
        ({"train.loggers": ["wanb"]}, ["train.loggers.0", "'wandb'"]),
        ({"train.out": " "}, ["train.out"]),
        ({"train.out": "a\0b"}, ["train.out"]),
        ({"train.sample": "\ud800"}, ["train.sample"]),
        ({"data.train": 3}, ["data.train"]),
        ({"data.train": []}, ["data.train"]),
        ({"data.train": {"a": 0}}, ["data.train", "weight"]),
        ({"data.train": {"a": "much"}}, ["data.train.a", "a number"]),
        ({"data.valid": 1.0}, ["data.valid"]),
        ({"data.valid": [1]}, ["data.valid"]),
        ({"data.vocab_size": 1 << 40}, ["data.vocab_size", "4,194,304"]),
        ({"data.row_length": 10**12}, ["data.row_length"]),
        ({"model.overrides": {"hidden_size": 1 << 70}}, ["model.overrides.hidden_size"]),
        ({"model.overrides": {"x": math.nan}}, ["model.overrides.x"]),
        ({"model.overrides": {"x": object()}}, ["model.overrides.x"]),
        ({"model.overrides": 3}, ["model.overrides"]),
        ({"objective.class_path": "os; rm"}, ["objective.class_path"]),
        ({"parallel.device": "tpu"}, ["parallel.device", "cpu"]),
        ({"parallel.compile": "on"}, ["parallel.compile", "yes or no"]),
        ({"parallel.strategy": "fspd"}, ["parallel.strategy", "Did you mean 'fsdp'"]),
        ({"parallel.strategy": True}, ["parallel.strategy", "one of auto, ddp, fsdp"]),
        ({"parallel.activation_checkpointing": 1}, ["parallel.activation_checkpointing", "full"]),
        ({"parallel.tp": 0}, ["parallel.tp", "1"]),
        ({"parallel.timeout": 0.5}, ["parallel.timeout", "1.0"]),
    ],
)
def test_wrong_settings_are_named(overrides: dict[str, Any], parts: list[str]) -> None:
    text = error(None, overrides)
    assert all(part in text for part in parts), text
    assert text.endswith((".", "?"))


def test_errors_in_a_file_carry_the_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# comment\noptim:\n  lr: 1e-3\n  epss: 3\n")
    assert error(path).startswith(f"{path}:4: 'optim.epss'")
    path.write_text("optim:\n  lr: fast\n")
    assert error(path).startswith(f"{path}:2: optim.lr")
    # A value from the command line is not blamed on the file.
    path.write_text("optim:\n  lr: 1e-3\n")
    assert error(path, {"optim.lr": "fast"}).startswith("optim.lr")


def test_of_several_files_each_replaces_settings_of_those_before_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "learning_rate: 1e-3\nmin_lr: 0.5\nmodel.overrides: {num_heads: 2, hidden_size: 8}\n"
    )
    second.write_text("optim:\n  lr: 2e-3\nmodel: {overrides: {num_heads: 4}}\nbatch_size: 8\n")
    found = RunConfig.load([first, second], {"train.batch_rows": 16})
    assert (found.optim.lr, found.optim.min_lr, found.train.batch_rows) == (2e-3, 0.5, 16)
    assert found.model.overrides == {"num_heads": 4, "hidden_size": 8}
    assert RunConfig.load([second, first]).optim.lr == 1e-3
    # Errors name the file that holds the value.
    for place, bad, lines in ((second, "optim:\n  lr: -1\n", 2), (first, "a: 1\n", 1)):
        place.write_text(bad)
        with pytest.raises(ConfigError, match=rf"^{place}:{lines}: "):
            RunConfig.load([first, second])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {lr: 1e-3}\noptim.lr: 2e-3\n", ["optim.lr is given twice", "by its full name"]),
        (
            "model: {overrides: {a: 1}}\nmodel.overrides.a: 2\n",
            ["model.overrides and model.overrides.a are both"],
        ),
        ("data: {text: body}\ndata.text.b: c\n", ["data.text and data.text.b are both"]),
        (
            "dropout: 0.1\nmodel: {overrides: {dropout: 0}}\n",
            ["dropout and model.overrides are both"],
        ),
    ],
)
def test_one_setting_has_one_value_in_a_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert all(part in str(caught.value) for part in [str(path), *parts]), caught.value


def test_a_word_that_was_once_a_flag_reads_both(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    written = {"true": "full", "false": "off", "selective": "selective", "off": "off"}
    for text, meant in written.items():
        path.write_text(f"parallel:\n  activation_checkpointing: {text}\n")
        config = RunConfig.load(path)
        assert config.parallel.activation_checkpointing == meant
        assert RunConfig.load(yaml_file(tmp_path, config)) == config
    assert ParallelConfig(activation_checkpointing=True).activation_checkpointing == "full"  # type: ignore[arg-type]
    loaded = RunConfig.load(None, {"parallel.activation_checkpointing": False})
    assert loaded.parallel.activation_checkpointing == "off"
    path.write_text("parallel: {activation_checkpointing: ful}\n")
    assert "Did you mean 'full'" in error(path)


def yaml_file(folder: Path, config: RunConfig) -> Path:
    return config.save(folder / "again.yaml")


def test_changed_objects_are_checked_again() -> None:
    config = RunConfig()
    config.optim.lr = -1.0
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        config.validate()


# ----------------------------------------------------------------------------------------------- saving


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    config = RunConfig.load(
        {
            "data": {"train": {"a:b": 1, "- c": 0.25}, "valid": "last:0.1", "separator": "\n---\n"},
            "optim": {"lr": 1e-7, "eps": 1e-12, "betas": [0.9, 0.999]},
            "model": {
                "overrides": {
                    "rope": {"rope_type": "linear", "factor": 2.0},
                    "layers": [1, None, True],
                }
            },
            "train": {"sample": "1e9", "out": str(tmp_path / "größe 漢"), "loggers": ["wandb"]},
        }
    )
    path = config.save(tmp_path / "deep" / "run.yaml")
    assert RunConfig.load(path) == config
    assert [p.name for p in path.parent.iterdir()] == ["run.yaml"]
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config.to_dict()


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunConfig().save(tmp_path / "file" / "run.yaml")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_what_is_dumped_is_parsed_to_an_equal_value(value: Any) -> None:
    found = strict_yaml.parse(strict_yaml.dump(value))[0]
    assert found == value and repr(found) == repr(value)


@settings(max_examples=300, deadline=None)
@given(TEXT.map(lambda t: t[:200]) | st.text("{}[]:,-&*!|>'\"#%@`? \n\tab01.", max_size=60))
def test_any_text_gives_settings_or_a_named_error(text: str) -> None:
    message = "settings"
    try:
        strict_yaml.parse(text)
    except ConfigError as found:
        message = str(found)
    assert message.startswith("settings")


# -------------------------------------------------------------------------------------------- amounts


def test_limits() -> None:
    assert parse_limit("500 steps") == Limit("steps", 500)
    assert parse_limit("1 step") == Limit("steps", 1)
    assert parse_limit("1e9 tokens") == Limit("tokens", 10**9)
    assert parse_limit("1_000 tokens") == Limit("tokens", 1000)
    assert parse_limit("2.5 epochs") == Limit("epochs", 2.5)
    assert parse_limit(" 10minutes ") == parse_limit("10 min") == Limit("minutes", 10)
    assert parse_limit("2 hours") == Limit("minutes", 120)
    assert parse_limit("500") == parse_limit("500 steps")
    assert isinstance(parse_limit("1e9 tokens").value, int)
    assert str(parse_limit("3 epochs")) == "3 epochs"
    for wrong in (
        "",
        "steps",
        "-1 steps",
        "0 steps",
        "1.5 steps",
        "1e400 tokens",
        "3 parsecs",
        "5%",
        None,
        True,
    ):
        with pytest.raises(ConfigError, match=r"train\.limit"):
            parse_limit(wrong)  # type: ignore[arg-type]


def test_intervals() -> None:
    assert parse_every("200 steps", 1000) == 200
    assert parse_every("5%", 1000) == 50
    assert parse_every("5%", 3) == 1
    assert parse_every("0 steps", 1000) == parse_every("0%", 1000) == 0
    assert parse_every("5", 1000) == 5
    for total, every in ((1, 1), (10, 1), (40, 4), (99, 10), (150, 10), (200, 10), (1000, 50)):
        assert parse_every("auto", total) == every, total
    assert all(total // parse_every("auto", total) <= 21 for total in range(1, 3000))
    for work, every in ((0.0, 50), (10.0, 50), (20.0, 100), (1e6, 125)):
        assert parse_every("auto", 1000, evaluation=work) == every, work
    assert parse_every("5%", 1000, evaluation=1e6) == 50
    with pytest.raises(ConfigError, match=r"train\.save_every"):
        parse_every("auto", 100, "train.save_every")
    for wrong in ("often", "101%", "1.5 steps", "3 hours", "-1 epochs", "-5%", "inf steps"):
        with pytest.raises(ConfigError, match=r"train\.save_every"):
            parse_every(wrong, 100, "train.save_every")


def test_the_dataclasses_are_plain() -> None:
    assert dataclasses.asdict(TrainConfig())["limit"] == "auto"


def test_a_tilde_is_the_home_directory_wherever_something_is_written_or_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to lie in the home directory lay in a folder called ``~``, which one deletes at one's peril."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    given = {"train": {"out": "~/run"}, "model": {"checkpoint": "~/base"}}
    found = pretrain.RunConfig.load(given)
    assert found.train.out == str(home / "run") and found.model.checkpoint == str(home / "base")
    assert found.save("~/run.yaml") == home / "run.yaml"
    assert pretrain.RunConfig.load("~/run.yaml") == found
    model = pretrain.build("gpt2", "tiny", num_layers=1, hidden_size=16, num_heads=2, vocab_size=40)
    assert model.save("~/saved") == home / "saved"
    assert pretrain.load("~/saved", quiet=True).num_parameters() == model.num_parameters()
    assert pretrain.inspect("~/saved")["family"] == "gpt2"
    (home / "text.txt").write_text("one two three four five " * 40)
    pretrain.prepare("~/text.txt", "~/data", vocab_size=270, row_length=16)
    found_again = prepared_in("~/data")
    assert found_again is not None
    assert len(pretrain.Prepared.open("~/data").train) == len(found_again.train)
    assert not any(here.iterdir())
