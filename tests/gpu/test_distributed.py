"""What one CUDA device shows of many: wrapping, offloading, compilation, masks. Run with pytest -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.distributed.world import World
from pretrain.nn.attention import AttentionMask, attend
from pretrain.training.trainer import Trainer
from tiny import Rows, objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _losses(out: Path, **parallel: Any) -> list[float]:
    world = World()
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
        world=world,
    )
    try:
        run = trainer.fit()
    finally:
        world.destroy_process_group()
    return [r["loss"] for r in run.history if "grad_norm" in r]


@pytest.mark.parametrize("more", [{}, {"cpu_offload": True}])
def test_one_device_alone_trains_as_it_does_unwrapped(tmp_path: Path, more: dict[str, Any]) -> None:
    plain = _losses(tmp_path / "plain")
    wrapped = _losses(tmp_path / "wrapped", strategy="fsdp", **more)
    assert wrapped == pytest.approx(plain, rel=1e-5)


def test_a_sample_is_made_while_blocks_wait_on_the_cpu_or_are_compiled(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The first evaluation; no graph is made for the lengths of the sample, and nothing is said of TF32."""
    _losses(tmp_path / "offloaded", strategy="fsdp", cpu_offload=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        _losses(tmp_path / "compiled", compile=True)
    assert not [w for w in recwarn if "TF32" in str(w.message) or "TensorFloat32" in str(w.message)]


@pytest.mark.parametrize("mode", ["off", "selective", "full"])
def test_compiled_blocks_compute_again_inside_of_their_graph(tmp_path: Path, mode: str) -> None:
    plain = _losses(tmp_path / "plain")
    compiled = _losses(tmp_path / "compiled", compile=True, activation_checkpointing=mode)
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_grouped_queries_under_a_mask_keep_no_scores() -> None:
    """The kernel for all cases keeps (B, H, T, S); with keys repeated a fused one takes them."""
    length = 4096
    make = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 8, length, 64, device="cuda", dtype=torch.bfloat16, generator=make)
    k, v = torch.randn(
        2, 1, 2, length, 64, device="cuda", dtype=torch.bfloat16, generator=make
    ).unbind()
    documents = torch.arange(length, device="cuda")[None] // 700 + 1
    mask = AttentionMask(True, documents, None)
    mask.prepare(length, q.device, q.dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixed = attend(q.requires_grad_(), k, v, mask, 64**-0.5, 0.0)
    mixed.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * length * length * 2 / 2
    with torch.no_grad():
        seen = mask.dense(length, length, q.device)
        assert seen is not None
        shared = [x.repeat_interleave(4, dim=1).float() for x in (k, v)]
        scores = (q.float() @ shared[0].mT / 8).masked_fill(~seen, float("-inf"))
        torch.testing.assert_close(
            mixed.float(), scores.softmax(-1) @ shared[1], rtol=2e-2, atol=2e-2
        )
