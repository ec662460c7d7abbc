"""Linear layers in float8: products and gradients against exact ones of the rounded factors, and whole runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pretrain.checkpoint import latest
from pretrain.errors import ConfigError
from pretrain.lora import LoraConfig, apply_lora
from pretrain.training.float8 import Float8Linear, use_float8
from pretrain.training.trainer import Hook
from tiny import Rows, losses, objective, trainer

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _linear(inputs: int, outputs: int) -> Float8Linear:
    block = nn.Sequential(nn.Linear(inputs, outputs))
    use_float8([block])
    linear = block[0]
    assert isinstance(linear, Float8Linear)
    return linear


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The float8 numbers next to a tensor, its largest magnitude being the largest of the type, in fp64."""
    scale = x.abs().max().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x / scale).to(dtype).double() * scale.double()


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    power=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_the_rounded_factors(
    rows: int, inputs: int, outputs: int, power: int, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = _linear(16 * inputs, 16 * outputs)
    x = (2.0**power * torch.randn(2, rows, 16 * inputs)).requires_grad_()
    grad = (2.0**-power * torch.randn(2, rows, 16 * outputs)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear.product(x)
        assert torch.equal(linear(x), y + linear.bias.bfloat16())
    y.backward(grad)
    assert y.dtype is torch.bfloat16 and y.shape == grad.shape
    weight, of_x, of_weight = linear.weight.detach(), x.grad, linear.weight.grad
    assert of_x is not None and of_weight is not None
    a, w = _rounded(x.detach(), E4M3), _rounded(weight, E4M3)
    g = _rounded(grad.float(), E5M2)
    torch.testing.assert_close(y.double(), a @ w.T, rtol=2**-8, atol=1e-5 * 2.0**power)
    torch.testing.assert_close(of_x.double(), g @ w, rtol=1e-4, atol=1e-5 * 2.0**-power)
    product = g.flatten(0, 1).T @ a.flatten(0, 1)
    torch.testing.assert_close(of_weight.double(), product, rtol=1e-4, atol=1e-4)
    # Rounding costs a few per cent; a wrong scale or factor would cost far more.
    exact = grad.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1)
    assert (of_weight - exact).norm() < 0.15 * exact.norm()


def test_outside_of_training_in_bf16_it_is_the_plain_layer() -> None:
    torch.manual_seed(0)
    linear = _linear(32, 16)
    plain = nn.Linear(32, 16)
    plain.load_state_dict(linear.state_dict())
    x = torch.randn(5, 32)
    assert torch.equal(linear(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(linear(x), plain(x))
        assert torch.equal(linear.eval()(x), plain(x))


def test_inputs_without_rows_and_of_one_row_are_taken() -> None:
    linear = _linear(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.zeros(0, 16)).shape == (0, 32)
        assert linear(torch.zeros(16)).shape == (32,)


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen() -> None:
    linear = _linear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear.product(torch.zeros(3, 16)), torch.zeros(3, 16).bfloat16())
        for value in (torch.nan, torch.inf):
            x = torch.ones(3, 16)
            x[1, 2] = value
            assert not linear(x).isfinite().all()


def test_layers_of_other_sizes_and_with_adapters_stay_as_they_are() -> None:
    block = nn.Sequential(nn.Linear(16, 24), nn.Linear(16, 16))
    assert "1 of 2 linear layers" in use_float8([block]) == use_float8([copy.deepcopy(block)])
    assert type(block[0]) is nn.Linear
    with pytest.raises(ConfigError, match=r"multiples of 16.*train\.precision=auto"):
        use_float8([nn.Sequential(nn.Linear(8, 8))])
    model = objective().model
    apply_lora(model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="layers with an adapter"):
        use_float8(model.backbone.blocks())


@pytest.mark.parametrize("kind", ["NextToken", "MaskedLM"])
def test_a_run_learns_as_in_bf16_and_resumes_to_the_same_bits(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, precision: str, crash_after: int | None = None) -> Any:
        def strike(record: Any) -> None:
            if record["step"] == crash_after:
                raise KeyError(name)

        task = trainer(
            tmp_path / name,
            objective(kind),
            Rows(12),
            eval_rows=Rows(3, seed=4),
            hooks=[Hook(strike)],
            precision=precision,
            eval_precision="train",
            save_every="3 steps",
        )
        task.fit()
        return task

    low = run("bf16", "bf16")
    task = run("fp8", "fp8")
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "12 of 12 linear layers of the blocks multiply in float8" in said
    assert "fp8 compute" in said and "evaluation in bf16" in said
    assert task.setup.eval_precision.name == "bf16"
    assert not any(isinstance(m, Float8Linear) for m in task.objective.modules())
    one, two = losses(low.out), losses(task.out)
    assert one != two
    assert all(abs(a[1] - b[1]) < 0.02 * a[1] for a, b in zip(one, two, strict=True))
    with pytest.raises(KeyError):
        run("again", "fp8", crash_after=7)
    run("again", "fp8")
    assert losses(tmp_path / "again") == two
    ends = [latest(tmp_path / name) for name in ("fp8", "again")]
    first, second = (path and (path / "model.safetensors").read_bytes() for path in ends)
    assert first == second
