"""Learning-rate decay by layer and gradual unfreezing, for fine-tuning.

Layer-wise decay of the learning rate as in BEiT and MAE (arXiv 2106.08254, 2111.06377): the head keeps the full
rate. (ELECTRA counts from one layer higher, so the same factor means something else there.) Gradual unfreezing:
ULMFiT, arXiv 1801.06146.
"""

from __future__ import annotations

import math

from torch import Tensor

from pretrain.config import OptimConfig
from pretrain.objectives.base import Objective
from pretrain.training.state import RunState

__all__ = ["Layers"]


class Layers:
    """Depths of the trainable parameters: 0 for embeddings, i + 1 for block i, ``top`` for all after the blocks.

    Parameters of the objective outside the model have depth ``top`` too. Parameters that are frozen on construction
    are not included, and stay frozen.

    Args:
        objective: the model and other trained modules.
        settings: the ``optim`` section.

    Attributes:
        scales: factor on the learning rate of every parameter, ``layer_decay ** (top - depth)``.
        fresh: parameters that were newly initialised, not loaded.
    """

    def __init__(self, objective: Objective, settings: OptimConfig) -> None:
        model = objective.model
        depths = model.depths()
        named: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.top = len(model.backbone.blocks()) + 1
        self._depths: dict[Tensor, int] = {
            p: depths[named[p]] if p in named else self.top
            for p in objective.parameters()
            if p.requires_grad
        }
        self._unfreeze = settings.unfreeze
        self.scales = {p: settings.layer_decay ** (self.top - d) for p, d in self._depths.items()}
        self.fresh = {p for p in self._depths if p not in named or named[p] in model.fresh}

    def lowest_unfrozen(self, step: int, total: int) -> int:
        """Return the depth of the lowest unfrozen layer at ``step`` of ``total``; one with parameters always is."""
        span = self._unfreeze * total
        released = (
            d for d in range(self.top + 1) if step >= math.floor(span * (self.top - d) / self.top)
        )
        return min(min(released), max(self._depths.values(), default=0))

    def unfreeze(self, state: RunState) -> bool:
        """Unfreeze the layers that are due at this step of a run; return True if any was newly unfrozen.

        Layers are never frozen again, even if the run becomes longer.
        """
        lowest, before = self.lowest_unfrozen(state.step, state.total_steps), state.unfrozen_from
        state.unfrozen_from = lowest if before is None else min(lowest, before)
        self.unfreeze_from(state.unfrozen_from)
        return state.unfrozen_from != before

    def unfreeze_from(self, lowest: int) -> None:
        """Unfreeze the layers from depth ``lowest`` on, and freeze those below."""
        for p, depth in self._depths.items():
            p.requires_grad_(depth >= lowest)
