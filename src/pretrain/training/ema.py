"""Exponential moving average of the weights (Polyak averaging), kept in fp32.

If enabled, evaluations and ``model.safetensors`` use the average; the raw weights, from which training continues, are
in the ``training/`` folder of the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pretrain.nn.device import local

__all__ = ["WeightAverage"]


class WeightAverage:
    """Average of the parameters of ``module``; its buffers, such as running statistics, are averages already.

    Args:
        module: the model.
        decay: decay of the average; 0 disables it.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        params = dict(module.named_parameters()) if decay else {}
        # Every rank keeps the average of its own shards.
        self._params = {name: local(p.detach()) for name, p in params.items()}
        self._shadow = {name: p.clone() for name, p in self._params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step ``step``, counted from 0.

        The decay is smaller in early steps, so that the random initialisation does not stay in the average.
        """
        if self._shadow:
            torch._foreach_lerp_(
                list(self._shadow.values()),
                list(self._params.values()),
                1 - min(self.decay, (1 + step) / (10 + step)),
            )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the average into the model within the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, shadow in self._shadow.items():
            trained = self._params[name].clone()
            self._params[name].copy_(shadow)
            shadow.copy_(trained)

    def other(self) -> dict[str, Tensor]:
        """Return the weights that are not in the model now: inside ``applied`` the raw ones. Empty if disabled."""
        return dict(self._shadow)

    @torch.no_grad()
    def load(self, raw: Mapping[str, Tensor]) -> None:
        """Given a model that holds the average, set that aside and put the raw weights into the model."""
        for name, shadow in self._shadow.items():
            shadow.copy_(raw[name])
        self._swap()
