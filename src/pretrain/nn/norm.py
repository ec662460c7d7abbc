"""Layer normalisation (arXiv 1607.06450) and root-mean-square normalisation (arXiv 1910.07467).

Both compute their statistics in fp32 whatever the input's dtype. Under autocast they return the autocast dtype, so that
the three projections after a norm do not each convert its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["LayerNorm", "RMSNorm", "build_norm", "compute_dtype"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with ``x`` runs: autocast's if enabled, else that of ``x``."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, (..., D) -> (..., D), with or without a bias."""

    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        # FSDP2 may provide half-precision weights, which must not lower the precision of the input.
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), (self.size,), self.weight.to(wide), bias, self.eps).to(
            dtype
        )

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, bias={self.bias is not None}"


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, (..., D) -> (..., D); no bias, no mean."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        x, weight = x.to(wide), self.weight.to(wide)
        if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # torch has no fused CPU kernel here; its composite backward costs four times as much as this one.
            y: Tensor = _RMSNormCPU.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
        else:
            y = F.rms_norm(x, (self.size,), weight, self.eps)
        return y.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


class _RMSNormCPU(torch.autograd.Function):
    """Compute y = w · x · r with r = (mean(x²) + eps)^-½, and its gradient with few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(wide, weight, r)
        y: Tensor = (wide * r).mul_(weight).to(x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        size = x.shape[-1]
        dtype = grad.dtype
        grad = grad.to(x.dtype)
        with torch.autocast("cpu", enabled=False):
            product = (grad * x).reshape(-1, size)
            grad_weight = (r.reshape(1, -1) @ product).view(size).to(weight.dtype)
            mean = (product @ weight.to(x.dtype)).view_as(r) / size
            grad_x = (grad * weight).mul_(r)
            grad_x.addcmul_(x, mean.mul_(r * r * r), value=-1)
        return grad_x.to(dtype), grad_weight, None


def build_norm(kind: str, size: int, eps: float, bias: bool = True) -> nn.Module:
    """Return a norm by name: ``layernorm`` or ``rmsnorm`` (which has no bias)."""
    if kind == "rmsnorm":
        return RMSNorm(size, eps)
    if kind == "layernorm":
        return LayerNorm(size, eps, bias)
    raise ValueError(f"norm must be 'layernorm' or 'rmsnorm', not {kind!r}")
