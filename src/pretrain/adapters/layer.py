"""A linear layer with a low-rank update beside its frozen weight: LoRA (arXiv 2106.09685) and DoRA (2402.09353).

Letters: r rank, I inputs, O outputs, s scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.nn.tensor_parallel import Group, all_reduce

__all__ = ["LoraLinear"]


class LoraLinear(nn.Linear):
    """``x W^T + s (x A^T) B^T``; under DoRA the rows of W + s B A are then stretched to learned lengths.

    It takes the place of the layer it is made from and holds the same ``weight`` and ``bias``, so the model's names
    stay as they are. Layers that are one matrix on disk share one A, which the first of them owns.

    Args:
        linear: the layer to replace, (O, I).
        r: rank.
        scale: s.
        dropout: on the input of the update.
        dora: learn a length per output row, ``lora_magnitude`` (O,).
        first: the layer that owns A; None if it is this one.

    Attributes:
        parallel: processes that share the layer by its inputs; None where this one has all of them.

    Class attributes:
        tensor_parallel: how the update is shared by several processes in a layer cut by its outputs (``column``) or
            its inputs (``row``): the dimension that is cut, or None for what stays whole with a partial gradient.
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
        # Beside a base that is read later stand real matrices: nothing else would give them their values.
        device = "cpu" if linear.weight.is_meta else linear.weight.device
        place: dict[str, Any] = {"device": device, "dtype": torch.float32}
        # In a tuple the other layer is not a child of this one: A has one owner and one name.
        self._first = () if first is None else (first,)
        if first is None:
            self.lora_A = nn.Parameter(torch.zeros(r, linear.in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **place))
        self.lora_magnitude = None
        if dora:
            self.lora_magnitude = nn.Parameter(torch.zeros(linear.out_features, **place))
            self.reset_magnitude()

    def down(self) -> Tensor:
        """A, (r, I)."""
        return self._first[0].lora_A if self._first else self.lora_A

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the lengths to those that the rows have now, so that DoRA changes nothing."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self._row_norms())

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """(O,) lengths of the rows of W + s B A; a constant to the gradient (section 4.3 of the DoRA paper)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            norms: Tensor = torch.linalg.vector_norm(self.sum_weight(), dim=1)
            if self.parallel is not None:
                norms = all_reduce(norms.square(), self.parallel).sqrt()
            return norms

    def sum_weight(self) -> Tensor:
        """(O, I) W + s B A."""
        update = self.scale * (self.lora_B @ self.down())
        return self.weight.to(update.dtype) + update

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """(O, I) the matrix that does what this layer does, in fp32."""
        weight = self.sum_weight()
        if self.lora_magnitude is None:
            return weight
        return weight * self._stretch()[:, None]

    def _stretch(self) -> Tensor:
        """(O,) learned length over length."""
        assert self.lora_magnitude is not None
        norms = self._row_norms()
        return self.lora_magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """What ``forward`` adds the bias to, (..., I) -> (..., O): linear, so shares of it add up."""
        return self._run(x, None)

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        update = F.linear(F.linear(dropped, self.down()), self.lora_B) * self.scale
        if self.lora_magnitude is None:
            return F.linear(x, self.weight, bias) + update
        # In fp32 under autocast too: lengths change by less than half precision can tell.
        stretch = self._stretch()
        if dropped is x:
            y = (F.linear(x, self.weight) + update) * stretch
            return (y if bias is None else y + bias).to(update.dtype)
        # What dropout leaves is stretched, and the base stays whole, as in peft.
        y = F.linear(x, self.weight, bias)
        y = y + (stretch - 1) * F.linear(dropped, self.weight) + stretch * update
        return y.to(update.dtype)

    def plain(self) -> nn.Linear:
        """The layer without its update."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        kind = "LoRA" if self.lora_magnitude is None else "DoRA"
        return f"{super().extra_repr()}, {kind} r={self.r}, scale={self.scale:g}"
