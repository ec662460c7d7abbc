"""Mixtures of two training images: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899).

The unit is the row. It is mixed with a partner that its own generator draws among all training rows, so the mixture
depends on the place of the row in the run alone, however a global batch is split into micro-batches and ranks.

Letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pretrain.errors import ConfigError

__all__ = ["Mixing", "Mixture"]


@dataclass(frozen=True)
class Mixture:
    """What one row is mixed with.

    Attributes:
        partner: index of the other row.
        share: weight of the row's own target, from 0 to 1; the partner has the rest.
        box: top, bottom, left and right of the part that comes from the partner; None for a weighted mean.
    """

    partner: int
    share: float
    box: tuple[int, int, int, int] | None = None

    def __call__(self, own: Tensor, other: Tensor) -> Tensor:
        """Return the mixture of two images (C, H, W)."""
        if self.box is None:
            return own * self.share + other * (1.0 - self.share)
        top, bottom, left, right = self.box
        mixed = own.clone()
        mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        return mixed


@dataclass(frozen=True)
class Mixing:
    """How training images are mixed; with both, either for half of the rows.

    Attributes:
        mixup: both parameters of the beta distribution of the weights of a mean of two images; 0 for none.
        cutmix: the same for the area that a box from another image leaves; 0 for none.

    Raises:
        ConfigError: a value is out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not (value == 0 or 0.01 <= value <= 100):
                raise ConfigError(
                    f"{name} is {value}; it must be 0 (none) or from 0.01 to 100, a parameter of the beta distribution "
                    "of the weights: 0.2 changes most images little, 1 makes all weights equally likely."
                )

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def draw(self, rng: np.random.Generator, rows: int, height: int, width: int) -> Mixture:
        """Return the mixture of one row; at least one of the two kinds must be on.

        Args:
            rng: generator of the row.
            rows: number of training rows.
            height: of the image.
            width: of the image.
        """
        partner = int(rng.integers(rows))
        means = bool(self.mixup) and (not self.cutmix or rng.random() < 0.5)
        alpha = self.mixup if means else self.cutmix
        share = float(rng.beta(alpha, alpha))
        if means:
            return Mixture(partner, share)
        side = math.sqrt(1.0 - share)
        row, column = rng.random() * height, rng.random() * width  # the middle of the box
        tall, wide = side * height / 2, side * width / 2
        top, bottom = max(0, round(row - tall)), min(height, round(row + tall))
        left, right = max(0, round(column - wide)), min(width, round(column + wide))
        # The box may be cut off at the border, so the weight is that of the pixels that are left.
        area = (bottom - top) * (right - left)
        return Mixture(partner, 1.0 - area / (height * width), (top, bottom, left, right))
