"""What is tried before step 0: it leaves nothing behind, and compiled blocks are held against plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config import ParallelConfig
from pretrain.errors import TrainingError
from pretrain.models.backbone import Backbone
from pretrain.training import setup
from tiny import Rows, losses, objective, trainer


def compiled_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_blocks(self: Backbone, **options: Any) -> None:
        for block in self.blocks():
            block.compile(backend=backend)
        self.compiled = True

    torch._dynamo.reset()
    monkeypatch.setattr(Backbone, "compile_blocks", compile_blocks)


def wrong(factor: float) -> Any:
    """Return a compiler whose results are right and whose gradients are wrong by a factor."""

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            return [
                x.detach() + factor * (x - x.detach()) if isinstance(x, torch.Tensor) else x
                for x in graph(*args)
            ]

        return run

    return compiler


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_a_compiler_that_is_wrong_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """It gives the right results with the wrong gradient, as that of torch 2.11 did beside collectives."""

    compiled_by(wrong(factor), monkeypatch)
    run = trainer(tmp_path, objective(), Rows(8), limit="2 steps")
    run.parallel = ParallelConfig(device="cpu", compile=True)
    with pytest.raises(TrainingError, match=r"compiles this model wrongly: set parallel\.compile"):
        run.fit()


def test_a_compiler_that_is_right_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "plain", objective(), Rows(8), limit="3 steps").fit()
    compiled_by("aot_eager", monkeypatch)
    run = trainer(tmp_path / "compiled", objective(), Rows(8), limit="3 steps")
    run.parallel = ParallelConfig(device="cpu", compile=True)
    run.fit()
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-5)


def test_blocks_that_cannot_be_compiled_run_eagerly_after_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise FileNotFoundError("No working C++ compiler found\nlines of its trace")

    trainer(tmp_path / "plain", objective(dropout=0.1), Rows(8), limit="3 steps").fit()
    compiled_by(missing, monkeypatch)
    capfd.readouterr()
    run = trainer(tmp_path / "other", objective(dropout=0.1), Rows(8), limit="3 steps")
    run.parallel = ParallelConfig(device="cpu", compile=True)
    run.fit()
    lines = [x for x in capfd.readouterr().err.splitlines() if "compil" in x and "/" not in x]
    assert len(lines) == 2 and "eager blocks (compiling failed)" in lines[1], lines
    assert lines[0].endswith("so they run eagerly: No working C++ compiler found")
    assert losses(tmp_path / "other") == losses(tmp_path / "plain")


def test_an_error_of_the_model_is_not_taken_for_one_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_by("eager", monkeypatch)
    goal = objective()
    monkeypatch.setattr(goal, "forward", lambda batch: batch["nothing"])
    run = trainer(tmp_path, goal, Rows(8), limit="3 steps")
    run.parallel = ParallelConfig(device="cpu", compile=True)
    with pytest.raises(KeyError, match="nothing"):
        run.fit()


def test_auto_does_without_a_compiler_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "plain", objective(), Rows(8), limit="3 steps").fit()
    compiled_by(wrong(3.0), monkeypatch)
    monkeypatch.setattr(setup, "decide_for", lambda *about: (True, "for this test"))
    trainer(tmp_path / "auto", objective(), Rows(8), limit="3 steps").fit()
    said = capfd.readouterr().err
    assert "compiles this model wrongly: its blocks run eagerly" in said
    assert "eager blocks (compiled wrongly)" in said
    assert losses(tmp_path / "auto") == losses(tmp_path / "plain")
