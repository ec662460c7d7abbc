"""What is wrong with a fine-tuning run by its settings and its checkpoint alone is said before the rows are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pretrain
import tiny
from golden.compare import read_expected
from golden.runs import RUNS
from pretrain.cli.main import main
from pretrain.config.spelling import TRAIN, Interface, using
from pretrain.errors import ConfigError, ModelError
from pretrain.finetuning import job
from pretrain.objectives import OBJECTIVES, TASKS, check_monitor, objective_class, task_class
from pretrain.training.precision import choose_device

SIZES = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32}


@pytest.fixture(autouse=True)
def no_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading any row fails the test."""

    def read(*_: Any) -> Any:
        raise AssertionError("the rows were read")

    with monkeypatch.context() as patch:
        patch.setattr(job, "open_data", read)
        yield


def bert() -> pretrain.Model:
    return pretrain.build("bert", tokenizer=tiny.tokenizer(), **SIZES)


def test_a_task_that_does_not_fit_the_model(tmp_path: Path) -> None:
    path = bert().save(tmp_path / "bert")
    for model in (path, bert()):
        with pytest.raises(
            ModelError, match=r"task chat does not fit.*bert model has no causal-lm"
        ):
            pretrain.finetune(model, "chats.jsonl", task="chat", out=tmp_path / "run")
        with pytest.raises(AssertionError, match="the rows were read"):
            pretrain.finetune(model, "rows.csv", task="classification", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_fits_what_its_base_fits(tmp_path: Path) -> None:
    from pretrain.lora import LoraConfig, apply_lora

    base = bert().save(tmp_path / "bert")
    adapter = apply_lora(pretrain.load(base), LoraConfig(r=2)).save(tmp_path / "adapter")
    with pytest.raises(ModelError, match="no causal-lm head"):
        pretrain.finetune(adapter, "chats.jsonl", task="chat", out=tmp_path / "run")


def test_a_number_of_devices_that_is_none() -> None:
    with pytest.raises(ConfigError, match="devices is 'foo'"):
        pretrain.finetune("bert", "rows.csv", task="classification", devices="foo")


def test_an_unknown_monitor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitor is 'f1'.*classification.*accuracy, macro_f1"):
        pretrain.finetune(bert(), "rows.csv", task="classification", monitor="f1")


def test_a_logger_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'trackio', whose package is not installed"):
        pretrain.finetune(
            bert(), "rows.csv", task="classification", loggers=["trackio"], out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_the_figures_of_a_derived_class_are_known_when_it_is_evaluated() -> None:
    class Own(task_class("classification")):  # type: ignore[misc]
        pass

    check_monitor(Own, "own", "anything")


def test_a_mistyped_other_name_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--model", "m", "--data", "rows.csv", "--task", "stss"]) == 2
    assert "There is no task 'stss'. Did you mean 'sts'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Did you mean 'topic-classification'"):
        pretrain.finetune(bert(), "rows.csv", task="topic")
    for name in ("foo", "ktoo", "reranking"):  # near only to names that are refused, or to none
        with pytest.raises(ConfigError, match=f"no task '{name}'. Known: "):
            pretrain.finetune(bert(), "rows.csv", task=name)
    with pytest.raises(ConfigError, match="Known: audio-classification, captioning, chat"):
        pretrain.finetune(bert(), "rows.csv", task="zzzzzz")


def test_the_device_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for interface, name, fix in (
        (Interface(command=True), "--device", "--device auto"),
        (Interface(), "device", "device='auto'"),
        (TRAIN, "parallel.device", "parallel={'device': 'auto'}"),
    ):
        with using(interface), pytest.raises(ConfigError) as caught:
            choose_device("mps")
        said = str(caught.value)
        assert said.startswith(f"{name} is 'mps'") and f"Use {fix}." in said


def test_every_figure_of_the_golden_runs_may_be_monitored() -> None:
    classes = {name: objective_class(name) for name in OBJECTIVES}
    classes |= {name: task_class(name) for name in TASKS}
    assert all("figures" in vars(cls) for cls in classes.values())
    for name, record in read_expected().items():
        run = RUNS[name]
        chosen = run.task or str(run.settings["objective"]["class_path"])
        for line in record["log"]:
            for figure in set(line.get("eval", {})) - {"targets"}:
                check_monitor(classes[chosen], chosen, figure)
