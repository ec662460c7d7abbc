"""Keywords find their sections, typing errors their nearest name, and YAML says the same as Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from finetuning.conftest import rows_of
from pretrain.config import OptimConfig, TrainConfig
from pretrain.config.spelling import Interface, using
from pretrain.errors import ConfigError
from pretrain.finetuning.keywords import from_keywords
from pretrain.finetuning.settings import TuneConfig, check_idle
from pretrain.objectives import check_options
from pretrain.objectives.classification import Classification


def settled(config: Any = None, task: str | None = "classification", **keywords: Any) -> TuneConfig:
    return from_keywords(config, "runs/bert", task, keywords)[0]


def test_keywords_go_to_their_sections() -> None:
    made, objects = from_keywords(
        None, Path("runs/bert"), "classification",
        {
            "train": rows_of(4), "valid": 0.2, "text": "review", "label": "stars", "class_weights": "balanced",
            "labels": ["b", "a"], "lora": 8, "lr": 3e-5, "epochs": 4, "max_length": 64, "device": "cpu", "seed": 7,
            "optim": {"clip": 0.5}, "pair": None,
        },
    )  # fmt: skip
    assert made.model.checkpoint == "runs/bert" and made.task.name == "classification"
    assert made.data.columns == {"text": "review", "label": "stars"} and made.data.valid == 0.2
    assert made.task.options == {"class_weights": "balanced", "labels": ["b", "a"]}
    assert (made.method.lora, made.optim.lr, made.optim.clip) == (8, 3e-5, 0.5)
    assert (made.train.epochs, made.train.seed, made.data.max_length) == (4, 7, 64)
    assert made.parallel.device == "cpu"
    assert list(objects) == ["train"] and made.data.train == "a list"


def test_a_path_is_named_and_not_an_object(tmp_path: Path) -> None:
    made, objects = from_keywords(
        None, "m", "regression", {"train": tmp_path / "a.csv", "test": "b.csv"}
    )
    assert (
        made.data.train == str(tmp_path / "a.csv") and made.data.test == "b.csv" and objects == {}
    )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("epoch", "epochs"), ("labell", "label"), ("class_weight", "class_weights"),
        ("layer_deca", "layer_decay"), ("patients", "patience"), ("mex_length", "max_length"),
    ],
)  # fmt: skip
def test_typing_errors(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=wrong) as caught:
        settled(**{wrong: 1})
    assert right in str(caught.value).split(wrong, 1)[1]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": "fast"}, "sweep"),
        ({"lora": -2}, "lora"),
        ({"max_cut": 2.0}, "max_cut"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"precision": "fp7"}, "precision"),
        ({"optim": {"lrr": 1}}, "lr"),
        ({"limit": "ten steps"}, "limit"),
        ({"valid": -0.5}, "share"),
    ],
)
def test_values_that_cannot_be(
    keywords: dict[str, Any], words: str, checkpoint: str, tmp_path: Path
) -> None:
    import pretrain

    with pytest.raises(ConfigError, match=words):
        pretrain.finetune(
            checkpoint,
            rows_of(24),
            "classification",
            **({"out": tmp_path, "quiet": True} | keywords),
        )


def test_yaml_and_python_say_the_same(tmp_path: Path) -> None:
    made = settled(
        lr="sweep", lrs=[1e-5, 1e-4], betas=[0.9, 0.95], text="review", lora=4, targets=["q_proj"]
    )
    path = made.save(tmp_path / "run.yaml")
    assert TuneConfig.load(path) == made
    assert settled(path, None) == made
    assert settled(path, None, epochs=2).train.epochs == 2
    assert settled(path, None, label="stars").data.columns == {"text": "review", "label": "stars"}


def test_options_of_the_task_are_spelled_as_they_were_given(tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text("task:\n  name: classification\n  options:\n    class_weigths: balanced\n")
    for config in (path, TuneConfig.load(path, {"task.options": {"labels": ["a", "b"]}})):
        made = settled(config, None, epochs=2)
        assert made.task.options["class_weigths"] == "balanced"
        with pytest.raises(
            ConfigError, match=r"tune\.yaml:4: task\.options\.class_weigths: .*class_weights"
        ):
            check_options(Classification, made.task.options, made.spell)
    with using(Interface(command=True, others="task.options.")):
        assert made.spell("labels") == "--task.options.labels"
        other = TuneConfig.load(path, {"task.options.class_weigths": 1})
        assert other.spell("class_weigths") == "--task.options.class_weigths"


def test_every_setting_says_what_it_is() -> None:
    """No field is in two sections under one name, or a keyword would not know where to go."""
    names: dict[str, str] = {}
    for section in ("data", "train", "optim", "method", "parallel"):
        for field in dataclasses.fields(TuneConfig.SECTIONS[section]):
            assert names.setdefault(field.name, section) == section or field.name == "train", (
                field.name
            )


def test_settings_of_pre_training_that_fine_tuning_fixes() -> None:
    for key in ("optim.decay", "train.keep", "train.best", "train.save_every", "train.sample"):
        section, name = key.split(".")
        with pytest.raises(ConfigError, match=f"'{key}' is not a setting"):
            TuneConfig.load({key: 1})
        with pytest.raises(ConfigError, match=name):
            settled(**{name: 1})
        assert name not in TuneConfig().to_dict()[section]
    made = TuneConfig.load({"optim.weight_decay": 0.5, "train.micro_rows": 4})
    optim, train = made.optim.at({"lr": 0.25}), made.train.at("runs/x", "5 steps", save=True)
    assert optim == OptimConfig(
        lr=0.25, muon_lr=0.002, betas=(0.9, 0.999), weight_decay=0.5, schedule="linear", warmup=0.1,
        min_lr=0.0,
    )  # fmt: skip
    assert train == TrainConfig(
        out="runs/x", limit="5 steps", batch_rows=32, micro_rows=4, eval_every="1 epochs", save_every="25%", keep=1,
        monitor="",
    )  # fmt: skip
    trial = made.train.at("runs/x", "5 steps", save=False)
    assert (trial.best, trial.save_every) == (False, "0 steps")


def test_no_task_and_no_model() -> None:
    with pytest.raises(ConfigError, match="task="):
        settled(task=None)
    with pytest.raises(ConfigError, match="model="):
        from_keywords(None, None, "classification", {})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"lr": "fast"}, '"auto" or "sweep"'),
        ({"lr": 0.0}, "above 0"),
        ({"limit": "3 parsecs"}, r"train\.limit"),
        ({"eval_every": "often"}, r"train\.eval_every"),
        ({"valid": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_values_are_found_when_settings_are_read(
    given: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        settled(**given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lr": "sweep", "lrs": [1e-3, -1.0]}, "lrs"),
        ({"lrs": [0.0]}, "lrs"),
        ({"dora": True}, "dora"),
        ({"alpha": 16.0}, "alpha"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"targets": ["query"]}, "targets"),
        ({"patience": 2, "valid": 0}, "patience"),
        ({"patience": 2, "valid": 0.0}, "patience"),
    ],
)
def test_settings_that_would_do_nothing_or_harm(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_idle(settled(**given), None)
    if named in ("dora", "alpha", "lora_dropout", "targets"):
        check_idle(settled(**given, lora=8), None)


def test_a_threshold_is_for_several_classes() -> None:
    made = settled(threshold=0.4)
    check_idle(made, "multi_label")
    with pytest.raises(ConfigError, match="threshold is for texts that may have several"):
        check_idle(made, "single_label")


def test_numbers_as_keys_of_classes() -> None:
    made = settled(labels={0: "neg", 1: "pos"})
    assert made.task.options["labels"] == {"0": "neg", "1": "pos"}
