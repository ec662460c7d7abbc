"""Update rules: AdamW of torch, and what torch lacks: Muon, and decay that spares what the update would not shrink.

Muon (momentum, orthogonalised by a Newton-Schulz iteration): Jordan et al., 2024, with the coefficients of Polar
Express (arXiv 2505.16932).
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.distributed.estimates import MATRICES_TOGETHER
from pretrain.nn.device import local, multiplies_bf16_fast

if TYPE_CHECKING:
    from pretrain.distributed.whole_parameters import MatrixCollectives

__all__ = ["CautiousAdamW", "EagerAdamW", "Muon", "orthogonalize"]

# Polar Express (arXiv 2505.16932): the odd polynomials of degree 5 that bring singular values from 1e-3 to 1 nearest to
# 1 after these five steps together; fewer of them end far from 1. The norm is divided out with a margin of 2 %.
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_MARGIN = 1.02


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of a batch of matrices towards 1, (n, r, c) -> (n, r, c).

    Runs in bf16 where the hardware has fast bf16 products; the iteration corrects its own rounding errors.
    """
    fast = multiplies_bf16_fast(matrices.device)
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (_MARGIN * x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for a, b, c in _POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class _EagerOptimizer(torch.optim.Optimizer):
    """An optimizer without the decorators that keep torch's compiler out of it.

    They import the compiler, which takes a second, and nothing here compiles an optimizer.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class EagerAdamW(_EagerOptimizer, torch.optim.AdamW):
    """AdamW of torch (arXiv 1711.05101)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(_EagerOptimizer):
    """Momentum with orthogonalised updates for 2-D weights; matrices of equal shape are updated in one batch.

    Args:
        params: 2-D parameters, or groups of them.
        lr: spectral norm of an update; multiplied by sqrt(max(1, rows / columns)).
        momentum: coefficient of the Nesterov momentum.
        weight_decay: decoupled weight decay.
        cautious: weights decay only where the update has their sign.
        collectives: distributes the updates over ranks; None computes all of them here. Updates are of full matrices,
            even if parameters are sharded.
        names: names of the parameters, for ``collectives``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        collectives: MatrixCollectives | None = None,
        names: Mapping[Tensor, str] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._collectives, self._names, self._cautious = collectives, dict(names or {}), cautious

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient are skipped."""
        done = 0
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[self._shape(p)].append(p)
            for params in _chunks(shapes):
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
                grads = [local(p.grad) for p in params if p.grad is not None]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                momenta = torch._foreach_lerp(grads, buffers, group["momentum"])
                updates = self._orthogonal(params, momenta, done)
                done += len(params)
                rows, columns = self._shape(params[0])
                scale = max(1.0, rows / columns) ** 0.5
                held = [local(p) for p in params]
                if group["weight_decay"]:
                    share = group["lr"] * group["weight_decay"]
                    if self._cautious:
                        _decay_cautiously(held, updates, share)
                    else:
                        torch._foreach_mul_(held, 1 - share)
                torch._foreach_add_(held, updates, alpha=-group["lr"] * scale)

    def _shape(self, p: Tensor) -> tuple[int, ...]:
        return (
            tuple(p.shape)
            if self._collectives is None
            else self._collectives.full_shape(self._names[p])
        )

    def _orthogonal(
        self, params: Sequence[Tensor], shards: Sequence[Tensor], first: int
    ) -> list[Tensor]:
        """Orthogonalise matrices of which this rank holds shards; return its shards of the results."""
        if self._collectives is None:
            return list(orthogonalize(torch.stack(list(shards))).unbind(0))
        names = [self._names[p] for p in params]
        wholes = list(map(self._collectives.assemble, names, shards))
        return list(
            map(
                self._collectives.own_shard,
                names,
                self._collectives.compute_distributed(wholes, orthogonalize, first),
            )
        )


class CautiousAdamW(EagerAdamW):
    """AdamW whose weights decay only where the update has their sign."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient are skipped."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            moved = [p for p in group["params"] if decay and p.grad is not None]
            # The update has the sign of the first moment.
            moments = [local(self.state[p]["exp_avg"]) for p in moved]
            _decay_cautiously([local(p) for p in moved], moments, group["lr"] * decay)


def _decay_cautiously(weights: Sequence[Tensor], updates: Sequence[Tensor], share: float) -> None:
    """Shrink weights by a share where they have the sign of the update, which is subtracted from them."""
    for weight, update in zip(weights, updates, strict=True):
        weight.sub_(weight * (weight * update > 0), alpha=share)


def _chunks(shapes: Mapping[tuple[int, ...], list[Tensor]]) -> Iterator[list[Tensor]]:
    """Yield parameters of equal shape, as many at a time as may be gathered and updated together."""
    for shape, params in shapes.items():
        most = max(1, MATRICES_TOGETHER // math.prod(shape))
        for start in range(0, len(params), most):
            yield params[start : start + most]
