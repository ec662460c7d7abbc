"""Names of other libraries: each means an existing setting, or is answered with one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.cli import main as cli
from pretrain.config import RunConfig, strict_yaml
from pretrain.config.aliases import NAMES, VALUES, Advice, SettingAlias, find
from pretrain.config.check import settings_in, type_of
from pretrain.errors import ConfigError
from pretrain.finetuning.keywords import from_keywords
from pretrain.finetuning.settings import TuneConfig
from pretrain.models import FAMILIES, family_class
from pretrain.objectives import TASKS, objective_class, task_class

KINDS = {"train": RunConfig, "finetune": TuneConfig}
SETTINGS = {
    name: {key: {f.name: f for f in dataclasses.fields(of) if f.init} for key, of in kind.SECTIONS.items()}
    for name, kind in KINDS.items()
}  # fmt: skip
WORDS = sorted({(command, word) for command in KINDS for entry in NAMES for word in entry.names})


def error(kind: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        kind.load(*args)
    return str(caught.value)


@pytest.mark.parametrize("entry", NAMES, ids=lambda entry: entry.names[0])
def test_every_entry_names_settings_of_a_command(entry: SettingAlias) -> None:
    fitting = [command for command, fields in SETTINGS.items() if entry.fits(fields)]
    assert fitting
    for setting in entry.settings:
        section, name, *item = setting.split(".")
        for command in fitting:
            field = SETTINGS[command][section][name]
            assert not item or "dict" in str(field.type), setting
            if item and name == "overrides":
                configs = [family_class(family).config_class for family in FAMILIES]
                assert all(item[0] in {f.name for f in dataclasses.fields(c)} for c in configs)
    # A later entry with the same names must be reachable where the earlier does not fit.
    assert any(
        find(word, SETTINGS[command]) == (entry.setting, entry)
        for command in fitting
        for word in entry.names
    )


def test_no_name_hides_a_setting() -> None:
    for command, fields in SETTINGS.items():
        for section, names in fields.items():
            for name in names:
                assert type_of(KINDS[command].SECTIONS, f"{section}.{name}") is not None
                found = find(name, fields)
                if found is not None and not (found[1] and found[1].advice):
                    assert found[0].rpartition(".")[2] == name, f"{name} means {found[0]}"


@given(
    st.sampled_from(WORDS), st.sampled_from([None, 1, 0.5, "text", "bf16", ["a"], {"a": 1}, True])
)
def test_any_name_with_any_value_is_a_setting_or_a_sentence_that_names_one(
    word: tuple[str, str], value: Any
) -> None:
    command, name = word
    kind, fields = KINDS[command], SETTINGS[command]
    known = [f"{section}.{key}" for section, names in fields.items() for key in names]
    try:
        config = kind.load(None, {name: value})
    except ConfigError as caught:
        text = str(caught)
        # An argument of pretrain.finetune is named as in Python: "lr is ...".
        named = {key.partition(".")[2] for key in known} & {text.partition(" ")[0]}
        assert any(key in text for key in known) or name in text or named, text
        if "is not a setting" in text:
            assert any(key in text for key in known) or " of pretrain " in text, text
    else:
        again = kind.load(strict_yaml.parse(config.to_yaml())[0])
        assert again == config and set(again.to_dict()) == set(kind.SECTIONS)


def test_values_have_counterparts() -> None:
    for setting, words in VALUES.items():
        for word, value in words.items():
            section, _, name = setting.partition(".")
            for fields in SETTINGS.values():
                if name in fields.get(section, {}) and not isinstance(value, Advice):
                    kind = KINDS["train"] if fields is SETTINGS["train"] else KINDS["finetune"]
                    loaded = getattr(getattr(kind.load(None, {setting: word}), section), name)
                    assert loaded == value
    for name, word in VALUES["task.name"].items():
        if isinstance(word, Advice):
            assert any(task in word.text for task in TASKS), name
            assert word.text in error(TuneConfig, {"task": name})
        else:
            assert task_class(word).name == word
    assert all(objective_class(str(name)) for name in VALUES["objective.class_path"].values())


def test_names_work_in_yaml_and_are_written_under_our_names(tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "learning_rate: 1e-4\ntrain:\n  batch_size: 16\nmax_steps: 100\nbf16: yes\nsave_steps: 10\n"
        "warmup_ratio: 0.1\nreport_to: none\nmodel: gpt2:tiny\nobjective: mlm\nmlm_probability: 0.3\n"
    )
    config = RunConfig.load(path, {"output_dir": "runs/x", "data": ["a.txt", "b.txt"]})
    assert config == RunConfig.load(
        {
            "optim": {"lr": 1e-4, "warmup": 0.1},
            "train": {
                "batch_rows": 16,
                "limit": "100 steps",
                "save_every": "10 steps",
                "precision": "bf16",
                "out": "runs/x",
            },
            "model": {"family": "gpt2", "size": "tiny"},
            "objective": {"class_path": "MaskedLM", "init_args": {"rate": 0.3}},
            "data.train": ["a.txt", "b.txt"],
        }
    )
    assert "learning_rate" not in config.to_yaml() and "batch_size" not in config.to_yaml()
    # A name of the command line replaces the setting of the file, and the other way round.
    assert RunConfig.load(path, {"train.batch_rows": 8}).train.batch_rows == 8
    assert RunConfig.load({"train.batch_rows": 8}, {"batch_size": 16}).train.batch_rows == 16
    path.write_text("train:\n  limit: 5\n  batch_size: -1\n")
    assert error(RunConfig, path).startswith(f"{path}:3: train.batch_rows is -1")
    path.write_text("resume: true\n")
    assert error(RunConfig, path).startswith(f"{path}:1: 'resume' is not a setting: ")


def test_the_same_name_in_each_command() -> None:
    assert RunConfig.load({"epochs": 3}).train.limit == "3 epochs"
    assert TuneConfig.load({"num_train_epochs": 3}).train.epochs == 3
    assert RunConfig.load({"max_seq_length": 64}).data.row_length == 64
    assert TuneConfig.load({"max_seq_length": 64}).data.max_length == 64
    assert RunConfig.load({"text_column": "body"}).data.text == "body"
    assert TuneConfig.load({"text_column": "body"}).data.columns == {"text": "body"}
    assert RunConfig.load({"save_total_limit": 3}).train.keep == 3
    assert "train.eval_every" in error(TuneConfig, {"save_total_limit": 3})
    assert TuneConfig.load({"lora_r": 8, "task": "ner"}).task.name == "token-classification"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"batch_size": 8, "train": {"batch_rows": 8}}, ["batch_size", "both train.batch_rows"]),
        ({"model": "gpt2:tiny", "model.size": "small"}, ["model and model.size are both"]),
        ({"model.family": "bert", "model": "gpt2"}, ["model.family and model are both"]),
        ({"bf16": True, "fp16": True}, ["bf16 and fp16", "train.precision"]),
        ({"warmup_ratio": 2.0}, ["warmup_ratio is 2", "optim.warmup"]),
        ({"max_steps": "many"}, ["max_steps", "a whole number", "'many'"]),
        ({"max_steps": -1}, ["train.limit"]),
        ({"per_device_train_batch_size": 8}, ["train.micro_rows", "train.batch_rows 8"]),
        ({"gradient_accumulation_steps": 4}, ["train.micro_rows", "divided by 4"]),
        ({"batchsize": 8}, ["'batch_size'", "'train.batch_rows'"]),
        ({"lerning_rate": 8}, ["'learning_rate'", "'optim.lr'"]),
        ({"train": {"learning_rate": 1}}, ["'train.learning_rate'", "'optim.lr'"]),
        ({"name": "first"}, ["train.out"]),
        ({"objective": 3}, ["objective", "section"]),
        ({"model": 3}, ["model", "section"]),
    ],
)
def test_what_is_refused(given: dict[str, Any], parts: list[str]) -> None:
    text = error(RunConfig, given)
    assert all(part in text for part in parts), text


def test_models_by_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    for text, family, size, checkpoint in (
        ("gpt2", "gpt2", "auto", None),
        ("gpt2:tiny", "gpt2", "tiny", None),
        ("package.module:Class", "package.module:Class", "auto", None),
        ("package.module:Class:tiny", "package.module:Class", "tiny", None),
        ("runs/x", "qwen3", "auto", "runs/x"),
        ("./x", "qwen3", "auto", "./x"),
        ("hub:org/name", "qwen3", "auto", "hub:org/name"),
        ("mine", "qwen3", "auto", "mine"),
    ):
        model = RunConfig.load({"model": text}).model
        assert (model.family, model.size, model.checkpoint) == (family, size, checkpoint)
        assert TuneConfig.load({"model": text}).model.checkpoint == text
    replaced = RunConfig.load({"model.checkpoint": "runs/x"}, {"model": "gpt2:tiny"}).model
    assert (replaced.family, replaced.checkpoint) == ("gpt2", None)


def test_names_on_the_command_line(capsys: Any) -> None:
    words = "train --batch_size 8 --learning_rate 1e-3 --bf16 --max_steps 50 --model gpt2:tiny --data a.txt"
    words += " --objective masked-lm --overrides.num_layers 3 --n_head 4"
    assert cli.main([*words.split(), "--eval_every", "100", "--show_config"]) == 0
    shown = RunConfig.load(strict_yaml.parse(capsys.readouterr().out)[0])
    assert (shown.train.batch_rows, shown.train.limit, shown.train.eval_every) == (
        8,
        "50 steps",
        "100 steps",
    )
    assert (shown.optim.lr, shown.train.precision, shown.data.train) == (1e-3, "bf16", "a.txt")
    assert (shown.model.family, shown.model.size) == ("gpt2", "tiny")
    assert shown.model.overrides == {"num_layers": 3, "num_heads": 4}
    assert shown.objective.class_path == "MaskedLM"
    words = "finetune --task squad --model runs/x --data a.json --columns.text body --lora_r 8 --epochs 2"
    assert cli.main([*words.split(), "--dora", "--seed", "3", "--show_config"]) == 0
    tuned = TuneConfig.load(strict_yaml.parse(capsys.readouterr().out)[0])
    assert (tuned.task.name, tuned.method.lora, tuned.train.epochs) == ("question-answering", 8, 2)
    assert tuned.method.dora and tuned.data.columns == {"text": "body"} and tuned.train.seed == 3


def test_settings_of_some_sections_only() -> None:
    sections = {key: RunConfig.SECTIONS[key] for key in ("train", "parallel")}
    raw = {
        "task": "ner",
        "batch_size": 64,
        "parallel": {"tp_size": 2},
        "train": {"epochs": 2, "keep": 1, "odd": 3},
    }
    assert settings_in(raw, sections) == {
        "train": {"batch_rows": 64, "limit": "2 epochs", "keep": 1},
        "parallel": {"tp": 2},
    }


def test_names_are_keywords_of_finetune() -> None:
    given = {"batch_size": 8, "num_train_epochs": 2, "lora_r": 4, "text_column": "body"}
    settings, _ = from_keywords(None, "runs/x", "sentiment-analysis", given)
    assert settings.task.name == "classification" and settings.data.columns == {"text": "body"}
    assert (settings.train.batch_rows, settings.train.epochs, settings.method.lora) == (8, 2, 4)
    with pytest.raises(ConfigError, match=r"train\.micro_rows"):
        from_keywords(None, "runs/x", "ner", {"gradient_accumulation_steps": 4})
    with pytest.raises(ConfigError, match="task chat"):
        from_keywords(None, "runs/x", "translation", {})
