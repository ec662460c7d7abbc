"""What only a CUDA device can show: precision modes, the loss scaler, equality with the CPU. Run with -m gpu."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig
from pretrain.models import build
from pretrain.nn import loss, packed
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
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_it_learns_in_every_precision(tmp_path: Path, kind: str, precision: str) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 products")
    task, run = _fit(tmp_path, kind, precision, limit="60 steps")
    line = losses(run.path)
    assert line[-1][1] < 0.9 * line[0][1]
    assert next(task.objective.parameters()).dtype is torch.float32
    assert task.setup.scaler.enabled == (precision == "fp16")


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
    scale = task.setup.scaler.state()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_agree_with_the_eager_computation(dtype: torch.dtype) -> None:
    """Each kernel is compared with the eager computation before its first use, and a warning says if it is not used."""
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss._kernel.__wrapped__(device) is not None
        for head_dim in (16, 64, 128):
            assert packed.has_sequence_kernel.__wrapped__(device, dtype, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [37, 50257])
def test_the_fused_loss_equals_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocabulary: int
) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, device="cuda").requires_grad_()
        for shape in ((300, 64), (vocabulary, 64), (vocabulary,))
    )
    labels = torch.randint(0, vocabulary, (300,), device="cuda")
    labels[::7] = -100

    def run() -> list[torch.Tensor]:
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            total, hits = loss.chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk=128)
        return [total.detach(), hits, *torch.autograd.grad(total, (hidden, weight, bias))]

    fused = run()
    monkeypatch.setattr(loss, "_kernel", lambda device: None)
    for mine, theirs in zip(fused, run(), strict=True):
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm() + 1e-6


@pytest.mark.parametrize("family", ["gpt2", "bert", "modernbert", "qwen3"])
def test_attention_by_sequences_equals_a_dense_mask(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Hidden states and gradients of packed rows in bf16, per document and with a dense mask."""
    model = build(family, "tiny", vocab_size=64, num_layers=3).backbone.cuda().eval()
    documents = torch.tensor([[1] * 20 + [2] * 37 + [3] * 7, [1] * 50 + [0] * 14], device="cuda")
    ids = torch.randint(5, 60, documents.shape, device="cuda")
    batch = {"input_ids": ids, "document_ids": documents}
    real = documents != 0

    def run() -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model(batch)[real].float()
        return [
            hidden.detach(),
            *torch.autograd.grad(
                hidden.square().sum(), list(model.parameters()), allow_unused=True
            ),
        ]

    found = run()
    monkeypatch.setattr("pretrain.nn.attention.has_sequence_kernel", lambda *_: False)
    for mine, theirs in zip(found, run(), strict=True):
        if theirs is not None:
            assert (mine - theirs).norm() <= 3e-2 * theirs.norm() + 1e-5


def test_changing_documents_do_not_recompile() -> None:
    model = build("gpt2", "tiny", vocab_size=64).backbone.cuda()
    model.compile_blocks()
    counters = torch._dynamo.utils.counters
    seen = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        documents = torch.randint(1, 5, (4, 64), generator=generator).sort(dim=1).values
        batch = {"input_ids": torch.randint(0, 64, (4, 64)), "document_ids": documents}
        with torch.autocast("cuda", torch.bfloat16):
            model(to_device(batch, torch.device("cuda"))).float().sum().backward()
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[1] == seen[-1], seen


def test_auto_precision_says_why() -> None:
    chosen = choose_precision("auto", torch.device("cuda"))
    assert chosen.name in ("bf16", "fp16") and chosen.reason
