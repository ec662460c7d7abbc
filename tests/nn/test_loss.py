"""The chunked loss against torch's own cross entropy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from pretrain.nn import loss
from pretrain.nn.loss import chunked_cross_entropy


def _case(n: int, d: int, v: int, seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(v, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=g)
    return hidden, weight, bias, labels


@given(
    n=st.integers(1, 40),
    d=st.integers(1, 8),
    v=st.integers(2, 30),
    chunk=st.integers(1, 50),
    cap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equals_plain_cross_entropy(
    n: int, d: int, v: int, chunk: int, cap: float | None, seed: int
) -> None:
    hidden, weight, bias, labels = _case(n, d, v, seed)
    labels[::3] = -100
    total, correct = chunked_cross_entropy(
        hidden, weight, labels, bias=bias, softcap=cap, chunk=chunk
    )
    (total * 0.5).backward()
    ours = [hidden.grad, weight.grad, bias.grad]
    hidden.grad = weight.grad = bias.grad = None
    logits = hidden @ weight.T + bias
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    plain = cross_entropy(logits, labels, reduction="sum")
    (plain * 0.5).backward()
    # The softmax is fp32 by design, so fp64 inputs agree to fp32's precision.
    torch.testing.assert_close(total.double(), plain.detach(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, [hidden.grad, weight.grad, bias.grad], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
    hits = ((logits.argmax(1) == labels) & (labels != -100)).sum()
    assert correct == hits


@given(
    n=st.integers(1, 40),
    v=st.integers(2, 30),
    chunk=st.integers(1, 50),
    cached=st.integers(1, 200),
    cap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_rows_in_turn_equal_whole_chunks(
    n: int, v: int, chunk: int, cached: int, cap: float | None, dtype: torch.dtype, seed: int
) -> None:
    hidden, weight, bias, labels = _case(n, 6, v, seed)
    inputs = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    labels[::3] = -100

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype):
            total, hits = chunked_cross_entropy(
                inputs[0], inputs[1], labels, bias=inputs[2], softcap=cap, chunk=chunk
            )
        return [total.detach(), hits, *torch.autograd.grad(total, inputs)]

    plain, plain_hits, *plain_grads = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "WIDE", {"cpu": cached})
        total, hits, *grads = run()
    torch.testing.assert_close(total, plain, rtol=1e-6, atol=1e-6)
    assert hits == plain_hits
    torch.testing.assert_close(grads, plain_grads, rtol=1e-5, atol=1e-6)


def test_fully_masked_batch_is_zero() -> None:
    hidden, weight, _, labels = _case(6, 4, 10, 0)
    total, correct = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    total.backward()
    assert total == 0 and correct == 0
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_no_target_at_all() -> None:
    hidden, weight, _, labels = _case(6, 4, 10, 0)
    total, _ = chunked_cross_entropy(hidden[:0], weight, labels[:0])
    total.backward()
    assert total == 0


def test_ignored_row_may_hold_nan() -> None:
    hidden, weight, _, labels = _case(6, 4, 10, 0)
    with torch.no_grad():
        hidden[2] = float("nan")
    labels[2] = -100
    total, _ = chunked_cross_entropy(hidden, weight, labels)
    total.backward()
    assert total.isfinite() and hidden.grad is not None and hidden.grad[2].eq(0).all()


def test_loss_does_not_touch_labels() -> None:
    hidden, weight, _, labels = _case(6, 4, 10, 0)
    before = labels.clone()
    chunked_cross_entropy(hidden, weight, labels)
    assert torch.equal(before, labels)


def test_no_buffer_of_all_logits() -> None:
    """Peak extra memory is a chunk of logits, not N x V of them."""
    n, d, v, chunk = 4096, 8, 512, 64
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.numel())
            return out

    with Watch():
        total, _ = chunked_cross_entropy(hidden, weight, torch.randint(0, v, (n,)), chunk=chunk)
        total.backward()
    assert largest <= max(chunk * v, n * d, v * d)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_stays_close(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 32), torch.randn(100, 32) * 0.1
    labels = torch.randint(0, 100, (256,))
    exact, _ = chunked_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", dtype=dtype):
        low, _ = chunked_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(low, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ties_are_no_hits(softcap: float | None) -> None:
    """Equal logits count for the lowest id alone, as in argmax: bf16 logits tie often."""
    torch.manual_seed(0)
    labels = torch.arange(40) % 10
    zero, weight = torch.zeros(40, 8), torch.randn(10, 8)
    assert chunked_cross_entropy(zero, weight, labels, softcap=softcap)[1] == 4
    coarse, rows = torch.randint(-1, 2, (400, 4)).float(), torch.randint(-1, 2, (30, 4)).float()
    labels = torch.randint(0, 30, (400,))
    logits = coarse @ rows.T
    assert (logits == logits.amax(1, keepdim=True)).sum() > 800  # of 400 rows
    hits = (logits.argmax(1) == labels).sum()
    assert chunked_cross_entropy(coarse, rows, labels, softcap=softcap, chunk=64)[1] == hits


def test_the_triton_kernel_by_its_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so the tests of the kernel get their own process."""
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("loss_kernel_on_cpu.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
