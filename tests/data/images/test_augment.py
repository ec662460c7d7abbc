"""Random changes are a function of the generator of an image alone, and are those that are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL")

from PIL import Image

from pretrain.data.images import ImageProcessor, Picture, augment
from pretrain.data.images.augment import Augmentation, crop_box
from pretrain.data.images.decode import Stored, in_threads
from pretrain.data.loader import row_rng
from pretrain.errors import ConfigError

SIZE = ImageProcessor(size=10)


def picture(height: int = 23, width: int = 31, mode: str = "RGB") -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


def changed(change: Augmentation, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return change.apply(image, change.view(image.size, SIZE, rng), SIZE, rng)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.01, 0.99), st.integers(0, 1 << 40))
def test_a_crop_lies_inside_and_is_as_large_as_asked(
    height: int, width: int, least: float, position: int
) -> None:
    left, top, right, bottom = crop_box(height, width, least, row_rng(0, "x", position))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    wide, tall = right - left, bottom - top
    if min(height, width) >= 50 and max(height, width) <= 1.2 * min(height, width):
        assert wide * tall >= 0.9 * least * height * width
        assert 0.7 < wide / tall < 1.43


@pytest.mark.parametrize(
    ("height", "width", "least"),
    [(90, 160, 0.8), (1280, 720, 0.8), (375, 1242, 0.5), (40, 400, 0.3)],
)
def test_crops_of_wide_and_tall_images_keep_their_share_and_reach_all_pixels(
    height: int, width: int, least: float
) -> None:
    boxes = [crop_box(height, width, least, row_rng(0, "x", i)) for i in range(60)]
    seen = np.zeros((height, width), bool)
    for left, top, right, bottom in boxes:
        assert (right - left) * (bottom - top) >= 0.97 * least * height * width
        seen[top:bottom, left:right] = True
    assert len(set(boxes)) > 20 and seen.mean() > 0.99


def test_jitter_changes_colours_within_its_range() -> None:
    grey = Image.new("RGB", (10, 10), (100, 100, 100))
    found = [changed(Augmentation(jitter=0.4), grey, row_rng(0, "x", i)) for i in range(200)]
    assert all(
        (one == one[0, 0, 0]).all() for one in found
    )  # brightness alone changes a grey image
    values = np.array([one[0, 0, 0] for one in found], float)
    assert 60 <= values.min() < 66 and 134 < values.max() <= 140 and 96 < values.mean() < 104

    halves = np.zeros((10, 10, 3), np.uint8)
    halves[:5], halves[5:] = (160, 80, 80), (80, 120, 160)
    image = Image.fromarray(halves)
    found = [changed(Augmentation(jitter=0.4), image, row_rng(0, "x", i)) for i in range(200)]
    saturation = np.array([np.ptp(one[0, 0].astype(float)) / one[0, 0].max() for one in found])
    contrast = np.array([np.ptp(one[..., 2].astype(float)) / one[..., 2].mean() for one in found])
    assert np.ptp(saturation) > 0.2 and np.ptp(contrast) > 0.2
    # Places stay where they are, so masks and boxes hold.
    assert all((one[:5] == one[0, 0]).all() and (one[5:] == one[9, 0]).all() for one in found)


def test_no_jitter_draws_nothing() -> None:
    with_it, without = row_rng(0, "x", 1), row_rng(0, "x", 1)
    assert np.array_equal(
        changed(Augmentation(0.5, True, 9, jitter=0.0), picture(), with_it),
        changed(Augmentation(0.5, True, 9), picture(), without),
    )
    assert with_it.random() == without.random()
    with pytest.raises(ConfigError, match="jitter is 1.5"):
        Augmentation(jitter=1.5)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.05, 1.0), st.booleans(), st.integers(0, 30), st.floats(0.0, 1.0),
    st.integers(0, 1 << 62), st.sampled_from(["L", "RGB"]),
)  # fmt: skip
def test_the_position_decides(
    crop: float, flip: bool, strength: int, jitter: float, position: int, mode: str
) -> None:
    change, image = Augmentation(crop, flip, strength, jitter), picture(mode=mode)
    one = changed(change, image, row_rng(3, "collate", position))
    other = changed(change, image, row_rng(3, "collate", position))
    assert one.shape == (10, 10, 3) and one.dtype == np.uint8
    assert np.array_equal(one, other)


def test_nothing_is_changed_without_being_asked() -> None:
    image = picture()
    same = changed(Augmentation(), image, row_rng(0, "x", 0))
    assert np.array_equal(same, SIZE.fitted(image))
    mirrored = {
        changed(Augmentation(flip=True), image, row_rng(0, "x", k)).tobytes() for k in range(20)
    }
    assert mirrored == {SIZE.fitted(image).tobytes(), SIZE.fitted(image.transpose(0)).tobytes()}


def test_other_positions_are_changed_otherwise() -> None:
    for change in (Augmentation(crop=0.3), Augmentation(randaugment=15)):
        made = {changed(change, picture(), row_rng(0, "x", k)).tobytes() for k in range(12)}
        assert len(made) > 8


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.5}, {"randaugment": 31}])
def test_what_is_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Augmentation(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "wide"), [(200, True), (20, False)])
def test_threads_depend_on_the_size_of_the_pictures(
    side: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def counted(function: Any, items: Any) -> Any:
        used.append(True)
        return in_threads(function, items)

    monkeypatch.setattr(augment, "in_threads", counted)
    held = [Stored(Picture(image, "it"), image) for image in [picture(side, side)] * 3]
    found = Augmentation().values(held, SIZE, [], evaluation=True)
    alone = Augmentation().values(held[:1], SIZE, [], evaluation=True)
    assert (
        bool(used) == wide and found.shape == (3, 3, 10, 10) and np.array_equal(found[1], alone[0])
    )
    used.clear()
    Augmentation().values(
        [Stored(Picture(np.asarray(picture()), "it"), picture(), keep=False)],
        SIZE,
        [],
        evaluation=True,
    )
    assert used  # how large it is is not known before it has been decoded
