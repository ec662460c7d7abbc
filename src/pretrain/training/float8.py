"""Linear layers that multiply in float8 while they are trained (Micikevicius et al. 2022, arXiv 2209.05433).

Activations and weights are cast to e4m3, gradients of the output to e5m2, each with one scale per tensor that maps its
largest magnitude to the largest number of the type. Weights stay in fp32, sums are accumulated in fp32, and everything
that is no linear layer of a block computes in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.errors import ConfigError
from pretrain.nn.norm import compute_dtype

__all__ = ["Float8Linear", "end_float8", "use_float8"]

_MULTIPLE = 16  # every dimension of a product must be a multiple of it
# The largest magnitude of a tensor is raised to this one, so that zeros have a scale.
_SMALLEST = 1e-12


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in float8 in training mode where others do in bf16; otherwise it is ``nn.Linear``.

    A layer, or a shard of one, whose sizes are not multiples of 16 always multiplies as ``nn.Linear``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_in_float8(x):
            return super().forward(x)
        y = self._float8_product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return the output without the bias: (..., in_features) -> (..., out_features)."""
        return self._float8_product(x) if self._is_in_float8(x) else F.linear(x, self.weight)

    def _float8_product(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        count = rows.shape[0]
        padded = F.pad(rows, (0, 0, 0, -count % _MULTIPLE))
        y: Tensor = _Float8Product.apply(padded, self.weight)  # type: ignore[no-untyped-call]
        return y[:count].reshape(*x.shape[:-1], -1)

    def _is_in_float8(self, x: Tensor) -> bool:
        """Return whether the product with ``x`` is in float8."""
        odd = any(size % _MULTIPLE for size in self.weight.shape)
        usual = self.training and compute_dtype(x) is torch.bfloat16
        return usual and not odd and x.ndim > 1 and x.numel() > 0


class _Float8Product(torch.autograd.Function):
    """``x @ weight.T`` in bf16, and its gradients, each as one product in float8: (N, I), (O, I) -> (N, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = _quantize(x, torch.float8_e4m3fn)
        weight8, weight_scale = _quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, x_scale, weight8.t(), weight_scale, torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, grad_scale = _quantize(grad, torch.float8_e5m2)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _product(grad8, grad_scale, _by_column(weight8), weight_scale, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_weight = _product(
                grad8.t().contiguous(), grad_scale, _by_column(x8), x_scale, ctx.dtypes[1]
            )
        return of_x, of_weight


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a contiguous tensor in float8, and the fp32 factor that it must be multiplied with."""
    largest = torch.finfo(dtype).max
    scale = x.detach().abs().amax().float().clamp(min=_SMALLEST) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale


def _by_column(x: Tensor) -> Tensor:
    """Return a matrix with the same values that lies in memory column by column, as a right factor must."""
    return x.t().contiguous().t()


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a @ b`` times both scales; ``a`` lies in memory row by row, ``b`` column by column."""
    whole = F.ScalingType.TensorWise
    with torch.autocast(a.device.type, enabled=False):  # it would round the factors on a CPU
        product: Tensor = F.scaled_mm(a, b, a_scale, whole, b_scale, whole, output_dtype=dtype)
    return product


def end_float8(module: nn.Module) -> None:
    """Let all linear layers of a module multiply as ``nn.Linear`` again."""
    for layer in module.modules():
        if isinstance(layer, Float8Linear):
            layer.__class__ = nn.Linear  # type: ignore[assignment]


def use_float8(blocks: Iterable[nn.Module]) -> str:
    """Let the linear layers of blocks multiply in float8 in training mode; layers with an adapter stay as they are.

    Returns:
        A line that says how many layers do.

    Raises:
        ConfigError: none of them can.
    """
    linears = [
        module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)
    ]
    chosen = [
        linear
        for linear in linears
        if type(linear) in (nn.Linear, Float8Linear)
        and not any(size % _MULTIPLE for size in linear.weight.shape)
    ]
    if not chosen:
        raise ConfigError(
            f"train.precision is fp8, but none of the {len(linears)} linear layers of the blocks can multiply in "
            f"float8: their sizes must be multiples of {_MULTIPLE}, and layers with an adapter do not. "
            "Use train.precision=auto."
        )
    for linear in chosen:
        linear.__class__ = Float8Linear
    return f"{len(chosen)} of {len(linears)} linear layers of the blocks multiply in float8, the others in bf16"
