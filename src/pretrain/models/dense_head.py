"""Head with outputs at places of an image: a light convolutional decoder of the token grid (SETR, arXiv 2012.15840).

Segmentation reads a score of each class at every place, object detection also the distances to the sides of a box.

Letters: B images, T tokens, D hidden, C outputs, h x w places of the map, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ModelError

__all__ = ["BOX_SIDES", "DENSE", "DenseHead", "doublings"]

DENSE = ("segmentation", "object-detection")
BOX_SIDES = 4  # left, top, right and bottom
_CELL = 4  # the grid is doubled until a place covers at most so many pixels along a side
_WIDEST, _NARROWEST = 256, 32
_GROUPS = 8
_RARE = -2.19  # log odds of 0.1: few places are the centre of an object (arXiv 1904.07850)
_BEFORE = 8  # most tokens before those of the grid, such as a class token
_LARGEST = 6.0  # log of a distance over the stride


def doublings(stride: int) -> int:
    """Return how often the grid is doubled, for places of ``stride`` pixels along a side."""
    return max(0, math.ceil(math.log2(stride / _CELL)))


class Stage(nn.Module):
    """A 3 x 3 convolution, group normalisation and an activation; (B, D, h, w) -> (B, D', h, w)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(_GROUPS, outer)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.convolution(x)))


class DenseHead(nn.Module):
    """Tokens (B, T, D) -> a map (B, C, h, w): scores of the classes, for boxes followed by four distances.

    Args:
        hidden_size: D.
        num_labels: classes.
        stride: pixels of an image along a side of one place of the grid.
        partial: whether the places at the right and at the bottom may lie partly outside of the image (convolutions);
            patches that are not full are left out.
        boxes: whether each place also tells the distances to the sides of a box.

    Attributes:
        cell: pixels along a side of one place of the map.
    """

    def __init__(
        self, hidden_size: int, num_labels: int, *, stride: int, partial: bool, boxes: bool
    ) -> None:
        super().__init__()
        self.stride, self.partial = stride, partial
        self.cell = stride / 2 ** doublings(stride)
        half = hidden_size // 2 // _GROUPS * _GROUPS
        widths = [hidden_size, max(_NARROWEST, min(_WIDEST, half))]
        for _ in range(doublings(stride)):
            widths.append(max(_NARROWEST, widths[-1] // 2 // _GROUPS * _GROUPS))
        self.stages = nn.ModuleList(map(Stage, widths, widths[1:]))
        self.classifier = nn.Linear(widths[-1], num_labels)
        self.sides = nn.Linear(widths[-1], BOX_SIDES) if boxes else None

    def init_parameter(self, name: str, value: Tensor) -> None:
        """Give the scores of segmentation the variance of their inputs, which other heads need not have.

        A step of Adam changes a weight by the learning rate at most, so with the few inputs that there are here, scores
        near zero take over a hundred steps to tell anything but the commonest class.
        """
        if name == "classifier.weight" and self.sides is None and value.any():
            value.mul_(value.shape[1] ** -0.5 / value.std())

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the token grid of an image."""
        more = self.stride - 1 if self.partial else 0
        return (height + more) // self.stride, (width + more) // self.stride

    def places(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the map of an image."""
        factor = 2 ** doublings(self.stride)
        rows, columns = self.grid(height, width)
        return rows * factor, columns * factor

    def forward(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        pixels = batch["pixel_values"].shape[2:]
        rows, columns = self.grid(*pixels)
        if not 0 <= hidden.shape[1] - rows * columns <= _BEFORE:
            raise ModelError(
                f"The backbone returns {hidden.shape[1]} hidden states for {pixels[0]} x {pixels[1]} pixels, and its "
                f"grid_step of {self.stride} pixels means {rows} x {columns} places. Correct grid_step in the class of "
                "the backbone."
            )
        places = hidden[:, -rows * columns :]  # class tokens stand first
        x = places.transpose(1, 2).reshape(len(hidden), -1, rows, columns)
        for i, stage in enumerate(self.stages):
            if i:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = stage(x)
        last = x.permute(0, 2, 3, 1)
        found: Tensor = self.classifier(last)
        if self.sides is not None:
            # Distances are in units of the stride, which lies between those of small and of large objects.
            sides = self.stride * self.sides(last).clamp(-_LARGEST, _LARGEST).exp()
            found = torch.cat((found + _RARE, sides), -1)
        return found.permute(0, 3, 1, 2)

    def to_pixels(self, scores: Tensor, height: int, width: int) -> Tensor:
        """Return scores (B, C, h, w) for every pixel of the images of the batch, (B, C, H, W)."""
        covered = [round(side * self.cell) for side in scores.shape[2:]]
        x = F.interpolate(scores, size=covered, mode="bilinear", align_corners=False)
        x = x[..., :height, :width]
        missing = (0, width - x.shape[3], 0, height - x.shape[2])
        return F.pad(x, missing, mode="replicate") if any(missing) else x

    def weights_per_pixel(self) -> float:
        """Return the number of weights that are applied for one pixel of an image."""
        side, total = float(self.stride), 0.0
        for i, stage in enumerate(self.stages):
            side /= 2 if i else 1
            total += sum(p.numel() for p in stage.parameters() if p.ndim > 1) / side**2
        last = [self.classifier, *([] if self.sides is None else [self.sides])]
        return total + sum(module.weight.numel() for module in last) / side**2
