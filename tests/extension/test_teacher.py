"""A frozen teacher in an own objective: written to no file, recorded by hash, refused if it has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pretrain
from pretrain.errors import TrainingError

HERE = Path(__file__).parent
TEXT = "the cat saw the dog and the dog saw the man\n" * 60
SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}


def sections(out: str, steps: int, seed: int = 0, **more: object) -> dict[str, object]:
    return {
        "data": {"train": "text.txt", "tokenizer": "char", "row_length": 16},
        "model": {"family": "gpt2", "overrides": SMALL},
        "optim": {"schedule": "constant", "lr": 1e-2, "warmup": 0},
        "train": {"out": out, "limit": f"{steps} steps", "batch_rows": 4, "seed": seed},
        **more,
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    pretrain.train(**sections("teacher", 20))


def test_a_teacher_is_recorded_and_never_written(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"class_path": "own_teacher:Distillation", "init_args": {"teacher": "teacher"}}
    run = pretrain.train(**sections("student", 4, seed=1, objective=chosen))
    whole = pretrain.train(**sections("whole", 8, seed=1, objective=chosen))
    again = pretrain.train(**sections("student", 8, seed=1, objective=chosen))
    assert run.step == 4 and again.step == 8
    ours, theirs = (pretrain.load(out, quiet=True).state_dict() for out in ("student", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # resumed bit for bit
    assert again.metrics["loss"] == whole.metrics["loss"]
    names = set()
    for file in Path("student/checkpoint-8").rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    assert names and not any("teacher" in name for name in names)
    state = json.loads(Path("student/checkpoint-8/training/state.json").read_text())
    assert len(state["identity"]["teacher"]) == 64
    # The teacher is no part of the model that reports speak of.
    assert (
        state["run"]["facts"]["parameters"] == pretrain.load("student", quiet=True).num_parameters()
    )
    figures = pretrain.evaluate("student", objective="own_teacher:Distillation")
    assert figures["loss"] == pytest.approx(again.metrics["loss"], rel=1e-6)
    # Its loss is no likelihood of the text, so nothing that holds for one is said of it.
    assert not {"perplexity", "bits_per_byte"} & {*figures, *again.metrics}
    assert (
        "word frequencies" not in capsys.readouterr().err + Path("student/report.html").read_text()
    )
    assert "bits_per_byte" in pretrain.evaluate("student", objective="next-token")
    # The teacher is trained further, so it gives other targets.
    pretrain.train(**sections("teacher", 30))
    with pytest.raises(TrainingError, match="trained with teacher"):
        pretrain.train(**sections("student", 12, seed=1, objective=chosen))
    record = json.loads(Path("student/checkpoint-8/config.json").read_text())["pretrain"]
    assert record["objective"]["teacher"] == "teacher"
    assert record["frozen"] == {
        "teacher": {"path": "teacher/model", "sha256": state["identity"]["teacher"]}
    }


def test_a_teacher_stays_in_evaluation_mode_and_gets_no_gradient(here: None) -> None:
    import own_teacher

    student = pretrain.load("teacher", quiet=True)
    goal = own_teacher.Distillation(student, "teacher")
    goal.train()
    assert goal.model.training and not goal.teacher.training
    assert not any(p.requires_grad for p in goal.teacher.parameters())
