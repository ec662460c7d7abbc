"""The feed-forward layer of a block, plain or gated (GLU variants: arXiv 2002.05202; squared ReLU: 2109.08668)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.nn.kernels import dropout
from pretrain.nn.tensor_parallel import Group, copy_to_tensor_parallel, row_linear

__all__ = ["ACTIVATIONS", "MLP", "activation"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _linear(x: Tensor) -> Tensor:
    return x


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# Some functions have several names, because published configurations spell them differently.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": _relu2,
    "quick_gelu": _quick_gelu,
    "tanh": torch.tanh,
    "gelu_python": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "mish": F.mish,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "linear": _linear,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation function of that name."""
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` when gated; (B, T, D) -> (B, T, D).

    Attributes:
        parallel: tensor-parallel group that the inner width is split over; None if this rank has all of it.
    """

    parallel: Group | None = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        act: str,
        *,
        gated: bool,
        bias: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation(act)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel is not None:
            x = copy_to_tensor_parallel(x, self.parallel)
        if self.gate is None:
            x = self.activation(self.up(x))
        else:
            x = self.activation(self.gate(x)) * self.up(x)
        x = self.down(x) if self.parallel is None else row_linear(self.down, x, self.parallel)
        return dropout(x, self.dropout, self.training)
