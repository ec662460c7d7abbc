"""FSDP2 on one CUDA device: what wrapping may change, and weights kept on the host. Run with pytest -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.parallel.world import World, world_left_behind
from pretrain.training.trainer import Trainer
from tiny import Rows, objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _losses(out: Path, **parallel: Any) -> list[float]:
    with world_left_behind():
        trainer = Trainer(
            objective(),
            Rows(40),
            optim=OptimConfig(lr=3e-3),
            train=TrainConfig(
                out=str(out),
                limit="6 steps",
                batch_rows=8,
                micro_rows=4,
                precision="fp32",
                log_every=1,
                eval_every="0 steps",
            ),
            parallel=ParallelConfig(device="cuda", **parallel),
            eval_data=Rows(8, seed=5),
            quiet=True,
            world=World(),
        )
        run = trainer.fit()
        trainer.world.leave()
    return [r["loss"] for r in run.history if "grad_norm" in r]


@pytest.mark.parametrize("more", [{}, {"cpu_offload": True}])
def test_one_device_alone_trains_as_it_does_unwrapped(tmp_path: Path, more: dict[str, Any]) -> None:
    plain = _losses(tmp_path / "plain")
    wrapped = _losses(tmp_path / "wrapped", strategy="fsdp", **more)
    assert wrapped == pytest.approx(plain, rel=1e-5)
