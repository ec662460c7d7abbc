"""A linear layer with a low-rank update beside its frozen weight: LoRA (arXiv 2106.09685) and DoRA (2402.09353).

Notation: r is the rank, I the number of inputs, O the number of outputs, s the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.nn.kernels import dropout
from pretrain.nn.tensor_parallel import Group, all_reduce

__all__ = ["LoraLinear"]


class LoraLinear(nn.Linear):
    """``x W^T + s (x A^T) B^T``; with DoRA the rows of W + s B A are then rescaled to learned norms.

    It replaces the layer from which it is made and holds the same ``weight`` and ``bias``, so the parameter names of
    the model do not change. Layers that are one matrix on disk share one A, which the first of them owns.

    Args:
        linear: the layer to replace, (O, I).
        r: rank.
        scale: s.
        dropout: dropout probability on the input of the update.
        dora: learn a magnitude per output row, ``lora_magnitude`` (O,).
        first: the layer that owns A; None if it is this one.

    Attributes:
        parallel: process group over which the inputs of the layer are sharded; None if they are not.

    Class attributes:
        tensor_parallel: tensor parallelism of the parameters of the update in a column-wise (outputs sharded) or
            row-wise (inputs sharded) parallel layer: the sharded dimension, or None for a parameter that is replicated
            and has a partial gradient.
    """

    parallel: Group | None = None
    tensor_parallel: ClassVar[Mapping[str, Mapping[str, int | None]]] = {
        "column": {"lora_A": None, "lora_B": 0, "lora_magnitude": 0},
        "row": {"lora_A": 1, "lora_B": None, "lora_magnitude": None},
    }

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        scale: float,
        dropout: float = 0.0,
        *,
        dora: bool = False,
        first: LoraLinear | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.r, self.scale, self.dropout = r, scale, dropout
        # A and B are materialised even if the base is on the meta device: loading the base does not initialise them.
        device = "cpu" if linear.weight.is_meta else linear.weight.device
        place: dict[str, Any] = {"device": device, "dtype": torch.float32}
        # The tuple keeps `first` from being registered as a submodule, so that A has one owner and one name.
        self._first = () if first is None else (first,)
        if first is None:
            self.lora_A = nn.Parameter(torch.zeros(r, linear.in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **place))
        self.lora_magnitude = None
        if dora:
            self.lora_magnitude = nn.Parameter(torch.zeros(linear.out_features, **place))
            self.reset_magnitude()

    def down(self) -> Tensor:
        """Return A, (r, I)."""
        return self._first[0].lora_A if self._first else self.lora_A

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitudes to the current norms of the rows, so that DoRA does not change the outputs."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self._row_norms())

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Return the norms of the rows of W + s B A, (O,), detached from the graph (section 4.3 of the DoRA paper)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            norms: Tensor = torch.linalg.vector_norm(self.sum_weight(), dim=1)
            if self.parallel is not None:
                norms = all_reduce(norms.square(), self.parallel).sqrt()
            return norms

    def sum_weight(self) -> Tensor:
        """Return W + s B A, (O, I)."""
        update = self.scale * (self.lora_B @ self.down())
        return self.weight.to(update.dtype) + update

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight of an equivalent plain layer in fp32, (O, I)."""
        weight = self.sum_weight()
        if self.lora_magnitude is None:
            return weight
        return weight * self._stretch()[:, None]

    def _stretch(self) -> Tensor:
        """Return the learned magnitudes divided by the norms of the rows, (O,)."""
        assert self.lora_magnitude is not None
        norms = self._row_norms()
        return self.lora_magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Return the output without the bias, (..., I) -> (..., O); the results of input shards can be summed."""
        return self._run(x, None)

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dropped = dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(dropped, self.down()), self.lora_B) * self.scale
        if self.lora_magnitude is None:
            return F.linear(x, self.weight, bias) + update
        # Kept in fp32 under autocast too, because the norms change by less than half precision resolves.
        stretch = self._stretch()
        if dropped is x:
            y = (F.linear(x, self.weight) + update) * stretch
            return (y if bias is None else y + bias).to(update.dtype)
        # As in peft, dropout applies to the rescaling and the update, but not to the product of the base.
        y = F.linear(x, self.weight, bias)
        y = y + (stretch - 1) * F.linear(dropped, self.weight) + stretch * update
        return y.to(update.dtype)

    def plain(self) -> nn.Linear:
        """Return a plain layer with the same weight and bias, without the update."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        kind = "LoRA" if self.lora_magnitude is None else "DoRA"
        return f"{super().extra_repr()}, {kind} r={self.r}, scale={self.scale:g}"
