"""The part of an image that a model sees, by which masks and boxes follow the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.images.decode import pillow

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """A part of an image, scaled to the size that the model reads, mirrored or not.

    Attributes:
        box: left, top, right and bottom of the part, in pixels of the image.
        size: height and width that it is scaled to.
        flip: mirrored from left to right.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool = False

    @classmethod
    def whole(cls, image: tuple[int, int], size: tuple[int, int]) -> View:
        """Return the view of a whole image, whose width and height are ``image``."""
        return cls((0, 0, *image), size)

    @property
    def scales(self) -> tuple[float, float]:
        """Pixels that the model reads for one of the image, along x and y."""
        left, top, right, bottom = self.box
        return self.size[1] / (right - left), self.size[0] / (bottom - top)

    def mask(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the part of a mask (H, W): the number of the nearest pixel, since numbers of classes have no mean."""
        module = pillow()
        height, width = self.size
        part = module.fromarray(values).resize((width, height), module.Resampling.NEAREST, self.box)
        array = np.asarray(part)
        return np.ascontiguousarray(array[:, ::-1]) if self.flip else array

    def boxes(self, boxes: NDArray[Any]) -> NDArray[np.float64]:
        """Return boxes (N, 4) of left, top, right, bottom, from pixels of the image to those that the model reads.

        They are not cut at the border of the view.
        """
        found: NDArray[np.float64] = np.array(boxes, np.float64).reshape(-1, 4)
        found = (found - np.tile(self.box[:2], 2)) * np.tile(self.scales, 2)
        if self.flip:
            found[:, [0, 2]] = self.size[1] - found[:, [2, 0]]
        return found

    def original(self, boxes: NDArray[Any]) -> NDArray[np.float64]:
        """Return boxes (N, 4) from pixels that the model reads to those of the image; the inverse of ``boxes``."""
        found: NDArray[np.float64] = np.array(boxes, np.float64).reshape(-1, 4)
        if self.flip:
            found[:, [0, 2]] = self.size[1] - found[:, [2, 0]]
        found /= np.tile(self.scales, 2)
        found += np.tile(self.box[:2], 2)
        return found
