"""Random changes of training images: resized crops (arXiv 1409.4842), mirroring, RandAugment (1909.13719), and mixtures
of two images: mixup (1710.09412) and CutMix (1905.04899).

Each image has its own generator, keyed by its position in the run, so that the changes depend neither on the other
images of a batch nor on the number of workers, and a resumed run draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.images.decode import Picture, Stored, in_threads, to_channels
from pretrain.errors import ConfigError
from pretrain.utils.imports import pillow

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from pretrain.data.images.processor import ImageProcessor

__all__ = ["Augmentation", "Mixing", "Mixture", "View"]

_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
_LARGE = 96 * 96  # pixels of an image from which a batch is decoded by several threads
_STEPS = 30  # strengths of RandAugment


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


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image before it is normalised.

    Attributes:
        crop: smallest share of the area of an image that a random crop keeps; 1 is no crop.
        flip: mirror half of the images from left to right.
        randaugment: strength, 1 to 30, of two random operations of RandAugment; 0 for none.
        jitter: most by which brightness, contrast and colour change, each by a factor of its own between 1 - jitter and
            1 + jitter and in random order; 0 for not at all.

    Raises:
        ConfigError: a value is out of range.
    """

    crop: float = 1.0
    flip: bool = False
    randaugment: int = 0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop is {self.crop}; it must be above 0 and at most 1 (no crop).")
        if not 0 <= self.randaugment <= _STEPS:
            raise ConfigError(
                f"randaugment is {self.randaugment}; it must be 0 (none) to {_STEPS}."
            )
        if not 0 <= self.jitter <= 1:
            raise ConfigError(f"jitter is {self.jitter}; it must be 0 (none) to 1.")

    def view(
        self, image: tuple[int, int], processor: ImageProcessor, rng: np.random.Generator
    ) -> View:
        """Draw what is seen of an image of this width and height, by a processor whose ``size`` is known."""
        assert processor.size is not None
        whole = View.whole(image, processor.size)
        box = crop_box(image[1], image[0], self.crop, rng) if self.crop < 1 else whole.box
        return View(box, processor.size, bool(self.flip and rng.random() < 0.5))

    def apply(
        self, image: Image, view: View, processor: ImageProcessor, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """Return an image changed as ``view`` says, then in colour and by RandAugment as ``rng`` draws; (H, W, C)."""
        image = to_channels(image, processor.channels)
        if self.crop < 1:
            height, width = view.size
            image = image.resize((width, height), processor.settings["resample"], view.box)
        if view.flip:
            image = image.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            image = _jittered(image, self.jitter, rng)
        if self.randaugment:
            for _ in range(2):
                image = _changed(image, self.randaugment, rng)
        return processor.array(image) if self.crop < 1 else processor.fitted(image)

    def values(
        self,
        held: Sequence[Any],
        processor: ImageProcessor,
        rngs: Sequence[np.random.Generator],
        *,
        evaluation: bool,
    ) -> NDArray[np.float32]:
        """Return the pixel values of a batch, (B, C, H, W); in evaluation nothing is changed."""
        return self.seen(held, processor, rngs, evaluation=evaluation)[0]

    def seen(
        self,
        held: Sequence[Any],
        processor: ImageProcessor,
        rngs: Sequence[np.random.Generator],
        *,
        evaluation: bool,
    ) -> tuple[NDArray[np.float32], list[View]]:
        """Return the pixel values of a batch, (B, C, H, W), and the view of each image; in evaluation it is whole.

        Args:
            held: the images, ``Stored`` or whatever a ``Picture`` is made from.
            processor: normalises them; its ``size`` must be known.
            rngs: generators of the images.
            evaluation: whether the batch is for evaluation.
        """

        def one(i: int) -> Any:
            given = held[i]
            stored = isinstance(given, Stored)
            image = given.image() if stored else Picture(given, "an image").read()[0]
            assert processor.size is not None
            if evaluation:
                whole = View.whole(image.size, processor.size)
                return processor.values(processor.fitted(image)), whole
            view = self.view(image.size, processor, rngs[i])
            return processor.values(self.apply(image, view, processor, rngs[i])), view

        # Threads pay for images of some size, before or after scaling.
        wide = max(map(_pixels, held), default=0) >= _LARGE
        wide = wide or math.prod(processor.size or (0, 0)) >= _LARGE
        found = list((in_threads if wide else map)(one, range(len(held))))
        return np.stack([values for values, _ in found]), [view for _, view in found]


def _pixels(given: Any) -> int:
    """Return the number of pixels of an image; one that has not been decoded counts as large."""
    array = given.pixels if isinstance(given, Stored) else given
    return math.prod(array.shape[:2]) if isinstance(array, np.ndarray) else _LARGE


def crop_box(
    height: int, width: int, least: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random part with a share of the area from ``least`` to 1.

    The proportions are between 3:4 and 4:3. Where no such part is found, an image of such proportions is kept whole,
    and a part of any other has those of the image: of a wide one, the middle alone would be seen in every epoch.
    """
    area = height * width
    for _ in range(_TRIES):
        target = area * rng.uniform(least, 1.0)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        wide, tall = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            break
    else:
        usual = _RATIO[0] <= width / height <= _RATIO[1]
        side = 1.0 if usual else math.sqrt(rng.uniform(least, 1.0))
        wide, tall = max(1, round(width * side)), max(1, round(height * side))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    return left, top, left + wide, top + tall


def _jittered(image: Image, most: float, rng: np.random.Generator) -> Image:
    """Change brightness, contrast and colour in random order."""
    from PIL import ImageEnhance

    kinds: Any = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for k in rng.permutation(3):
        image = kinds[k](image).enhance(rng.uniform(1 - most, 1 + most))
    return image


def _changed(image: Image, strength: int, rng: np.random.Generator) -> Image:
    """Apply one random operation of RandAugment, in a random direction."""
    from PIL import ImageEnhance, ImageOps

    module, share = pillow(), strength / _STEPS
    smooth = module.Resampling.BILINEAR
    sign = 1 if rng.random() < 0.5 else -1
    kind = int(rng.integers(14))
    enhancers: dict[int, Any] = {
        0: ImageEnhance.Brightness,
        1: ImageEnhance.Color,
        2: ImageEnhance.Contrast,
        3: ImageEnhance.Sharpness,
    }
    if kind in enhancers:
        changed: Image = enhancers[kind](image).enhance(1 + sign * 0.9 * share)
        return changed
    if kind < 9:
        matrix = {
            4: (1, sign * 0.3 * share, 0, 0, 1, 0),
            5: (1, 0, 0, sign * 0.3 * share, 1, 0),
            6: (1, 0, sign * 0.3 * share * image.width, 0, 1, 0),
            7: (1, 0, 0, 0, 1, sign * 0.3 * share * image.height),
        }.get(kind)
        if matrix is None:
            return image.rotate(sign * 30 * share, resample=smooth)
        return image.transform(image.size, module.Transform.AFFINE, matrix, resample=smooth)
    if kind == 9:
        return ImageOps.posterize(image, 8 - round(4 * share))
    if kind == 10:
        return ImageOps.solarize(image, 256 - round(255 * share))
    if kind == 11:
        return ImageOps.autocontrast(image)
    if kind == 12:
        return ImageOps.equalize(image)
    return image


@dataclass(frozen=True)
class Mixture:
    """What one row is mixed with: another one that its own generator draws among all training rows.

    The mixture depends on the place of the row in the run alone, however a global batch is split into micro-batches
    and ranks.

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
