"""Synthetic scenes of two coloured shapes with captions and questions, made from a seed: exact truth without a licence.

Some pairs of a colour and a shape never occur in training, so that their descriptions must be put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOURS", "SHAPES", "UNSEEN", "Scene", "held_out", "make_scenes", "rows_of"]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 190),
    "white": (240, 240, 240),
    "orange": (240, 140, 30),
    "pink": (250, 150, 190),
    "cyan": (60, 210, 220),
    "brown": (130, 80, 40),
    "grey": (130, 130, 130),
    "lime": (160, 230, 60),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring", "bar", "pillar")
# For each colour, which of the first four shapes and which of the last four never occurs with it in training.
_APART = (
    (1, 0),
    (3, 1),
    (2, 2),
    (0, 3),
    (1, 1),
    (2, 0),
    (0, 3),
    (3, 2),
    (1, 2),
    (2, 3),
    (3, 0),
    (0, 1),
)


def held_out(shift: int = 0) -> frozenset[tuple[str, str]]:
    """Return a quarter of the pairs: two shapes of every colour, three colours of every shape.

    A ``shift`` from 1 to 3 gives other pairs than 0, for choosing settings by them.
    """
    half = len(SHAPES) // 2
    found = set()
    for colour, (low, high) in zip(COLOURS, _APART, strict=True):
        for first, place in ((0, low), (half, high)):
            found.add((colour, SHAPES[first + (place + shift) % half]))
    return frozenset(found)


UNSEEN = held_out()
# The caption begins with the left or the upper shape, so that there is one right caption. Side -> the other way round.
_SIDES = {"left of": "right of", "above": "below"}


@dataclass(frozen=True)
class Scene:
    """Two shapes of different kinds and colours.

    Attributes:
        image: (H, W, 3).
        first: colour and shape.
        side: where the first one is, seen from the second: left of it or above.
        second: colour and shape.
    """

    image: NDArray[np.uint8]
    first: tuple[str, str]
    side: str
    second: tuple[str, str]

    @property
    def caption(self) -> str:
        """Description of the scene."""
        return f"a {' '.join(self.first)} {self.side} a {' '.join(self.second)}"

    def questions(self) -> list[tuple[str, str]]:
        """Return questions, each with its answer."""
        found = []
        for colour, shape in (self.first, self.second):
            found.append((f"what colour is the {shape}?", colour))
            found.append((f"what shape is {colour}?", shape))
        found.append((f"what is {self.side} the {self.second[1]}?", f"a {' '.join(self.first)}"))
        back = _SIDES[self.side]
        found.append((f"what is {back} the {self.first[1]}?", f"a {' '.join(self.second)}"))
        return found


def make_scenes(
    count: int,
    seed: int = 0,
    *,
    unseen: bool = False,
    size: int = 24,
    colours: int = len(COLOURS),
    shapes: int = len(SHAPES),
    apart: frozenset[tuple[str, str]] = UNSEEN,
) -> list[Scene]:
    """Return random scenes.

    Args:
        count: how many.
        seed: of all of them; scene i does not depend on ``count``.
        unseen: whether the first shape of every scene is one of ``apart``; without it none of both is.
        size: H = W.
        colours: only the first of ``COLOURS``, at least six.
        shapes: only the first of ``SHAPES``, at least four.
        apart: pairs that are held out; see ``held_out``.
    """
    pairs = list(product(list(COLOURS)[:colours], SHAPES[:shapes]))
    known = [pair for pair in pairs if pair not in apart]
    firsts = [pair for pair in pairs if (pair in apart) == unseen]
    scenes = []
    for i in range(count):
        rng = np.random.default_rng([seed, i, int(unseen)])
        first = firsts[int(rng.integers(len(firsts)))]
        others = [pair for pair in known if pair[0] != first[0] and pair[1] != first[1]]
        second = others[int(rng.integers(len(others)))]
        side = list(_SIDES)[int(rng.integers(len(_SIDES)))]
        scenes.append(Scene(_draw(first, side, second, size, rng), first, side, second))
    return scenes


def rows_of(scenes: list[Scene], seed: int = 0, *, questions: int = 1) -> list[dict[str, Any]]:
    """Return rows of the task ``captioning``: for every scene a caption and so many different questions, at most six.

    A caption is the answer to the question "describe".
    """
    rows: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        asked = scene.questions()
        # The third number is none of those of ``make_scenes``; a missing one counts as 0, and the choice of the
        # question would then follow from the scene, and tell the answer.
        order = np.random.default_rng([seed, i, 2]).permutation(len(asked))
        for question, answer in [
            ("describe", scene.caption),
            *(asked[k] for k in order[:questions]),
        ]:
            rows.append({"image": scene.image, "question": question, "text": answer})
    return rows


def _draw(
    first: tuple[str, str], side: str, second: tuple[str, str], size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw both shapes on a dark, noisy ground, each in a quarter of the image, side by side."""
    image = rng.integers(0, 40, (size, size, 3)).astype(np.uint8)
    half, upright = size // 2, side == "above"
    lane = half * int(rng.integers(2))
    for start, (colour, shape) in ((0, first), (half, second)):
        radius = int(rng.integers(size // 6, size // 5 + 1))
        along = start + int(rng.integers(radius, half - radius + 1))
        across = lane + int(rng.integers(radius, half - radius + 1))
        row, column = (along, across) if upright else (across, along)
        mask = _mask(shape, size, row, column, radius)
        tint = np.asarray(COLOURS[colour]) + rng.integers(-12, 13, 3)
        image[mask] = np.clip(tint, 0, 255)
    return image


def _mask(shape: str, size: int, row: int, column: int, radius: int) -> NDArray[np.bool_]:
    """Return which pixels a shape covers."""
    y, x = np.mgrid[:size, :size]
    down, across = y + 0.5 - row, np.abs(x + 0.5 - column)
    inside = (np.abs(down) <= radius) & (across <= radius)
    distance = down**2 + across**2
    drawn = {
        "circle": distance <= radius**2,
        "square": inside,
        "triangle": inside & (across <= (down + radius) / 2),
        "cross": inside & ((np.abs(down) <= radius / 3) | (across <= radius / 3)),
        "diamond": np.abs(down) + across <= radius,
        "ring": (distance <= radius**2) & (distance >= radius**2 / 4),
        "bar": inside & (np.abs(down) <= radius / 3),
        "pillar": inside & (across <= radius / 3),
    }
    return np.asarray(drawn[shape], dtype=np.bool_)
