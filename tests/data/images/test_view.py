"""Masks and boxes move with the pixels of their image, whatever is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL")

from PIL import Image

from pretrain.data.images import ImageProcessor
from pretrain.data.images.augment import Augmentation, View
from pretrain.data.loader import row_rng, row_rngs

# Nearest neighbours, so that the pixels of an image are those of its mask.
NEAREST = ImageProcessor(
    size={"height": 24, "width": 32}, resample=0, image_mean=[0.0], image_std=[1.0]
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 90), st.integers(8, 90), st.floats(0.1, 1.0), st.booleans(),
    st.integers(0, 1 << 60),
)  # fmt: skip
def test_a_mask_is_where_its_pixels_are(
    height: int, width: int, crop: float, flip: bool, position: int
) -> None:
    mask = np.random.default_rng(position).integers(0, 256, (height, width), dtype=np.uint8)
    change = Augmentation(crop, flip)
    rngs = [row_rng(0, "x", position)]
    values, (view,) = change.seen([mask], NEAREST, rngs, evaluation=False)
    pixels = (values[0, 0] * 255).round().astype(np.uint8)
    assert np.array_equal(view.mask(mask), pixels)
    again, (whole,) = change.seen([mask], NEAREST, rngs, evaluation=True)
    assert np.array_equal(whole.mask(mask), (again[0, 0] * 255).round().astype(np.uint8))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_box_surrounds_the_same_pixels(data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(20, 90)) for _ in range(2))
    left, right = sorted(
        data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True))
    )
    top, bottom = sorted(
        data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True))
    )
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    change = Augmentation(data.draw(st.floats(0.2, 1.0)), data.draw(st.booleans()))
    view = change.view(
        (width, height), NEAREST, row_rng(0, "x", data.draw(st.integers(0, 1 << 60)))
    )
    ((x0, y0, x1, y1),) = view.boxes(np.asarray([[left, top, right, bottom]]))
    assert x0 < x1 and y0 < y1
    rows, columns = np.nonzero(view.mask(mask))
    if len(rows):  # the middle of each of its pixels lies in the box
        assert x0 - 1e-6 <= columns.min() + 0.5 and columns.max() + 0.5 <= x1 + 1e-6
        assert y0 - 1e-6 <= rows.min() + 0.5 and rows.max() + 0.5 <= y1 + 1e-6
    inside = max(x0, 0) + 1 < min(x1, 32) and max(y0, 0) + 1 < min(y1, 24)
    assert len(rows) or not inside


def test_the_position_in_the_run_decides_what_is_seen() -> None:
    change = Augmentation(0.3, True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    alone = [
        change.seen([image], NEAREST, row_rngs(1, "x", k, 1), evaluation=False) for k in range(6)
    ]
    values, views = change.seen([image] * 6, NEAREST, row_rngs(1, "x", 0, 6), evaluation=False)
    assert views == [found[1][0] for found in alone] and len(set(views)) == 6
    assert np.array_equal(values, np.concatenate([found[0] for found in alone]))
    assert {view.flip for view in views} == {True, False}
    assert View.whole((40, 30), (24, 32)).boxes(np.asarray([[0, 0, 40, 30]])).tolist() == [
        [0, 0, 32, 24]
    ]
