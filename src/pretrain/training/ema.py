"""An exponential moving average of the weights (Polyak averaging), kept in fp32 beside them.

When it is on, what is evaluated and what ``model.safetensors`` holds is the average; the weights that training
goes on with lie in the checkpoint's ``training/`` folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pretrain.nn.layout import local

__all__ = ["WeightAverage"]


class WeightAverage:
    """Average of the parameters of ``module``.

    Args:
        module: the model.
        decay: of the average; 0 switches all of this off.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        params = dict(module.named_parameters()) if decay else {}
        # Where a parameter is shared out among processes, each keeps the average of its own part.
        self._params = {name: local(p.detach()) for name, p in params.items()}
        self._shadow = {name: p.clone() for name, p in self._params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights, after optimizer step ``step``, counted from 0.

        Early on the average is over few steps, so that the random start does not stay in it.
        """
        if self._shadow:
            torch._foreach_lerp_(
                list(self._shadow.values()),
                list(self._params.values()),
                1 - min(self.decay, (1 + step) / (10 + step)),
            )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, shadow in self._shadow.items():
            kept = self._params[name].clone()
            self._params[name].copy_(shadow)
            shadow.copy_(kept)

    def other(self) -> dict[str, Tensor]:
        """What the model does not hold now: inside ``applied`` the raw weights. Empty when switched off."""
        return dict(self._shadow)

    @torch.no_grad()
    def load(self, raw: Mapping[str, Tensor]) -> None:
        """Given a model that holds the average, put it aside and continue from the raw weights."""
        for name, shadow in self._shadow.items():
            shadow.copy_(raw[name])
        self._swap()
