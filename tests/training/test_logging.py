"""log.jsonl survives kills and resumes; loggers are asked for by name."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import ConfigError
from pretrain.training.logging import RunLog, make_loggers, read_log
from tiny import Rows, objective, trainer


def test_resume_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, None)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    again = RunLog(path, 3)
    again.write({"step": 4, "loss": 0.25})
    again.close()
    assert [r["step"] for r in read_log(path)] == [1, 2, 3, 4]
    assert read_log(path)[2]["loss"] == 1 / 3, "a number lost bits"


def test_a_fresh_run_starts_a_fresh_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n')
    RunLog(path, None).close()
    assert read_log(path) == []


def test_non_finite_numbers_are_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, None)
    log.write({"step": 1, "loss": math.nan, "eval": {"loss": math.inf}})
    log.close()
    (line,) = path.read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "loss": "nan", "eval": {"loss": "inf"}}


def test_unknown_and_missing_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensorboard"):
        make_loggers(["tensorbord"], tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'pretrain\[wandb\]'"):
        make_loggers(["wandb"], tmp_path, {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracked_loggers_get_training_and_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[Any] = []
    fake = types.SimpleNamespace(
        init=lambda **kw: calls.append(("init", kw["name"])),
        log=lambda figures, step: calls.append((step, figures)),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
    trainer(
        tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=1), limit="2 steps", loggers=[name]
    ).fit()
    assert calls[0] == ("init", tmp_path.name) and calls[-1] == ("finish", None)
    keys = {key for step, figures in calls[1:-1] for key in figures}
    assert {"train/loss", "train/lr", "train/tokens_per_second", "eval/loss"} <= keys
    assert [step for step, _ in calls[1:-1]] == [1, 2, 2]


def test_every_line_has_what_the_report_reads(tmp_path: Path) -> None:
    trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=1), limit="3 steps").fit()
    lines = read_log(tmp_path / "log.jsonl")
    for line in lines:
        if "eval" in line:
            assert {"loss", "perplexity", "accuracy", "bits_per_byte", "targets"} <= line[
                "eval"
            ].keys()
        else:
            assert {
                "step",
                "loss",
                "lr",
                "tokens",
                "tokens_per_second",
                "mfu",
                "seconds",
            } <= line.keys()


def test_the_last_step_is_always_in_the_log(tmp_path: Path) -> None:
    trainer(tmp_path, objective(), Rows(8), limit="17 steps", log_every=10).fit()
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl") if "grad_norm" in line]
    assert steps == [*range(1, 11), 17]
