"""Mixtures of two images: what is drawn, and that targets have the share of the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.images.augment import Mixing, Mixture
from pretrain.data.loader import row_rng
from pretrain.errors import ConfigError

ALPHA = st.one_of(st.just(0.0), st.floats(0.05, 8.0))


@settings(max_examples=150, deadline=None)
@given(
    ALPHA, ALPHA, st.integers(1, 40), st.integers(1, 40), st.integers(1, 99), st.integers(0, 1 << 50)
)  # fmt: skip
def test_the_share_is_that_of_the_pixels(
    mixup: float, cutmix: float, height: int, width: int, rows: int, position: int
) -> None:
    mixing = Mixing(mixup, cutmix)
    if not mixing:
        return
    found = mixing.draw(row_rng(0, "collate", position), rows, height, width)
    assert found == mixing.draw(row_rng(0, "collate", position), rows, height, width)
    assert 0 <= found.partner < rows and 0 <= found.share <= 1
    mixed = found(torch.ones(2, height, width), torch.zeros(2, height, width))
    assert float(mixed.mean()) == pytest.approx(found.share, abs=1e-5)
    assert (found.box is None) == bool((mixed == mixed[0, 0, 0]).all()) or found.share in (0, 1)
    if not cutmix:
        assert found.box is None
    if not mixup:
        assert found.box is not None


def test_both_kinds_partners_and_weights_are_drawn_as_said() -> None:
    drawn = [Mixing(0.4, 1.0).draw(row_rng(0, "x", k), 10, 32, 32) for k in range(2000)]
    means = [found for found in drawn if found.box is None]
    assert 0.46 < len(means) / len(drawn) < 0.54
    counts = np.bincount([found.partner for found in drawn], minlength=10)
    assert counts.min() > 140
    # The variance of a beta distribution with both parameters a is 1 / (4 (2a + 1)).
    spread = np.var([found.share for found in means])
    assert spread == pytest.approx(1 / (4 * 1.8), rel=0.1)


def test_a_mixture_leaves_both_images_as_they_are() -> None:
    own, other = torch.rand(3, 4, 4), torch.rand(3, 4, 4)
    before = own.clone(), other.clone()
    for found in (Mixture(0, 0.3), Mixture(0, 0.75, (0, 2, 1, 3))):
        mixed = found(own, other)
        assert not torch.equal(mixed, own)
    assert torch.equal(own, before[0]) and torch.equal(other, before[1])
    assert torch.equal(mixed[:, :2, 1:3], other[:, :2, 1:3])
    assert torch.equal(mixed[:, 2:], own[:, 2:])


@pytest.mark.parametrize("wrong", [{"mixup": -0.1}, {"cutmix": 1000.0}, {"mixup": 0.001}])
def test_what_is_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Mixing(**wrong)
