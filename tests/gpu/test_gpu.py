"""What only a CUDA device can show: precision modes, the loss scaler, equality with the CPU. Run with -m gpu."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig
from pretrain.training.feed import to_device
from pretrain.training.precision import choose_precision
from tiny import Rows, losses, objective, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _fit(out: Path, kind: str, precision: str, compile: bool = False, **options: Any) -> Any:
    task = trainer(
        out, objective(kind), Rows(16), eval_rows=Rows(4, seed=1), precision=precision, **options
    )
    task.parallel = ParallelConfig(device="cuda", compile=compile)
    run = task.fit()
    return task, run


@pytest.mark.parametrize("kind", ["NextToken", "MaskedLM"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_in_every_precision(tmp_path: Path, kind: str, precision: str) -> None:
    task, run = _fit(tmp_path, kind, precision, limit="60 steps")
    line = losses(run.path)
    assert line[-1][1] < 0.9 * line[0][1]
    assert next(task.objective.parameters()).dtype is torch.float32
    assert task.scaler.enabled == (precision == "fp16")


@pytest.mark.parametrize("kind", ["NextToken", "MaskedLM"])
def test_loss_and_gradients_equal_the_cpu(kind: str) -> None:
    cpu = objective(kind)
    gpu = copy.deepcopy(cpu).cuda()
    from pretrain.data.loader import row_rngs

    batch = cpu.collate(list(Rows(4)), row_rngs(0, "collate", 0, 4))
    a, b = cpu(batch), gpu(to_device(batch, torch.device("cuda")))
    a.total.backward()
    b.total.backward()
    torch.testing.assert_close(a.total, b.total.cpu(), rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad.cpu(), rtol=1e-3, atol=1e-4, msg=name)


def test_fp16_overflow_is_skipped_and_the_scale_is_saved(tmp_path: Path) -> None:
    task, _ = _fit(tmp_path, "NextToken", "fp16", limit="4 steps")
    scale = task.scaler.state()
    again = trainer(
        tmp_path,
        objective(),
        Rows(16),
        eval_rows=Rows(4, seed=1),
        precision="fp16",
        limit="6 steps",
    )
    again.parallel = ParallelConfig(device="cuda")
    again.fit()
    assert again.scaler.scale == scale["scale"] and again.scaler.good == scale["good"] + 2


def test_compiled_blocks_learn(tmp_path: Path) -> None:
    _, run = _fit(tmp_path, "NextToken", "bf16", limit="30 steps", compile=True)
    line = losses(run.path)
    assert line[-1][1] < line[0][1]


def test_auto_precision_says_why() -> None:
    chosen = choose_precision("auto", torch.device("cuda"))
    assert chosen.name in ("bf16", "fp16") and chosen.reason
