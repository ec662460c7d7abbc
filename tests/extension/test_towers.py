"""Own towers with a contrastive loss: a processor of two parts, blocks of two stacks, two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pretrain
import pretrain.models

HERE = Path(__file__).parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{Path(pretrain.__file__).parents[1]}")
    monkeypatch.chdir(tmp_path)
    pretrain.models._OWN.clear()
    for name in ("own_vit", "own_towers"):
        sys.modules.pop(name, None)


def train(steps: int, out: str, **more: object) -> object:
    sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 2}
    return pretrain.train(
        data={"source": "own_towers:pairs"},
        model={"family": "own_towers:Towers", "overrides": sizes},
        objective={"class_path": "own_towers:Contrast"},
        optim={"lr": 1e-2, "schedule": "constant", "warmup": 0},
        train={
            "out": out,
            "limit": f"{steps} steps",
            "batch_rows": 16,
            "eval_every": "100%",
            "precision": "fp32",  # two processes equal one to 1e-5; in bf16, the choice of some CPUs, to 1e-3
        },
        parallel={"device": "cpu"},
        **more,
    )


def losses(out: str) -> list[float]:
    rows = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_train_resume_load_evaluate(here: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(60, "run")
    assert "rows of 7 patches and tokens" in capsys.readouterr().err
    assert losses("run")[-1] < 0.7 * losses("run")[0]
    assert run.metrics["retrieved"] > 0.25  # chance is 0.125
    train(4, "part")
    train(8, "part")
    train(8, "whole")
    assert losses("part") == losses("whole")
    with safe_open("run/checkpoint-60/model.safetensors", "pt") as opened:
        names = set(opened.keys())
    assert {
        "patches.weight",
        "layers.1.mlp.up.weight",
        "text.layers.1.mlp.up.weight",
        "scale",
    } <= names
    pretrain.models._OWN.clear()
    model = pretrain.load("run", family="own_towers:Towers")
    assert model.tokenizer is model.processor.tokenizer and model.processor.images is not None
    assert model.depths()["backbone.text.layers.0.mlp.up.weight"] == 3
    figures = pretrain.evaluate(
        "run", "own_towers:pairs", objective="own_towers:Contrast", batch_rows=8
    )
    assert figures["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    batch = {
        "pixel_values": torch.zeros(1, 3, 8, 8),
        "input_ids": torch.zeros(1, 3, dtype=torch.long),
    }
    assert model(batch).shape == (2, 1, 16)


def test_two_processes_equal_one(here: None) -> None:
    train(5, "one")
    train(5, "two", devices=2)
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
