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
from tiny import Rows, losses, objective, trainer


def compiled_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_blocks(self: Backbone, **options: Any) -> None:
        for block in self.blocks():
            block.compile(backend=backend)
        self.compiled = True

    torch._dynamo.reset()
    monkeypatch.setattr(Backbone, "compile_blocks", compile_blocks)


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_a_compiler_that_is_wrong_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """It gives the right results with the wrong gradient, as that of torch 2.11 did beside collectives."""

    def wrong(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            return [
                x.detach() + factor * (x - x.detach()) if isinstance(x, torch.Tensor) else x
                for x in graph(*args)
            ]

        return run

    compiled_by(wrong, monkeypatch)
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
