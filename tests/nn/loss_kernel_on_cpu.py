"""The Triton kernel of the loss against the eager computation; run by ``test_loss`` in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain.nn.loss as loss
from pretrain.nn.loss_kernel import cross_entropy_


@given(
    n=st.integers(1, 8),
    v=st.sampled_from([2, 7, 100, 5000]),
    cap=st.sampled_from([None, 5.0]),
    lift=st.sampled_from([1.0, 1024.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8, deadline=None)
def test_equals_the_eager_chunk(
    n: int, v: int, cap: float | None, lift: float, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, v, generator=g)).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    logits[::2] = logits[::2].round()  # ties
    labels[1::3] = -100
    logits[1::3] = float("nan")  # of ignored rows
    total, hits, grad = loss._chunk(logits.clone(), labels, cap, True, None)
    kept = logits.clone()
    same = cross_entropy_(kept, labels, softcap=cap, gradient=False)
    assert torch.equal(kept.nan_to_num(), logits.nan_to_num())
    found = cross_entropy_(logits, labels, softcap=cap, lift=lift)
    torch.testing.assert_close(found, (total, hits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, found)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    torch.testing.assert_close(logits.float() / lift, grad, **near)


def test_a_nan_in_a_row_with_a_label_is_seen() -> None:
    logits = torch.zeros(2, 9)
    logits[1, 4] = float("nan")
    total, _ = cross_entropy_(logits, torch.tensor([0, 1]))
    assert total.isnan()


@pytest.mark.parametrize(
    ("dtype", "biased"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_the_whole_loss_with_the_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, biased: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, generator=g).requires_grad_()
    weight = torch.randn(37, 8, generator=g).requires_grad_()
    bias = torch.randn(37, generator=g).requires_grad_() if biased else None
    labels = torch.randint(0, 37, (10,), generator=g)
    labels[3] = -100
    inputs = [hidden, weight, *([] if bias is None else [bias])]

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            total, hits = loss.chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk=4)
        return [total.detach(), hits, *torch.autograd.grad(total, inputs)]

    def run_with(kernel: Any) -> list[torch.Tensor]:
        monkeypatch.setattr(loss, "_kernel", lambda device: kernel)
        return run()

    used = []
    eager = run_with(None)
    fused = run_with(lambda *a, **k: used.append(1) or cross_entropy_(*a, **k))
    assert len(used) == 3
    near = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for mine, theirs in zip(fused, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near)
