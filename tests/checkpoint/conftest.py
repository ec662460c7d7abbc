"""A run with two checkpoints, the first of which is its best."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import TrainingState, save_checkpoint
from pretrain.checkpoint.best import BEST, SWEEP, write_choice
from pretrain.models import build


@pytest.fixture(scope="session")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("good")
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_positions": 8, "vocab_size": 9}
    model = build("gpt2", **sizes)
    for step in (5, 9):
        state = TrainingState({}, {"run": {"best_step": 5, "lr": 0.01}, "step": step})
        save_checkpoint(run, model, step=step, tokens=1, pretrain_block={}, training=state)
    write_choice(run / BEST, {"checkpoint": "checkpoint-5"})
    write_choice(run / SWEEP, {"lr": 0.01})
    return run


@pytest.fixture
def run(good_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(good_run, tmp_path / "run")
    return tmp_path / "run"
