"""Schedules count optimizer steps, start learning at once and end where they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.training.schedule import SCHEDULES, lr_factor


@given(
    total=st.integers(1, 2000),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 1),
    min_lr=st.floats(0, 1),
)
def test_bounds_and_shape(
    total: int, schedule: str, warmup: float, decay: float, min_lr: float
) -> None:
    factors = [
        lr_factor(s, total, schedule=schedule, warmup=warmup, decay=decay, min_lr=min_lr)
        for s in range(total)
    ]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[0] > 0
    peak = factors.index(max(factors))
    assert all(a <= b + 1e-12 for a, b in zip(factors[:peak], factors[1 : peak + 1], strict=False))
    assert all(a >= b - 1e-12 for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False))


def test_named_points() -> None:
    wsd = [lr_factor(s, 100, schedule="wsd", warmup=10, decay=0.4, min_lr=0.0) for s in range(100)]
    assert wsd[0] == pytest.approx(0.1) and wsd[9] == 1.0 and wsd[59] == 1.0
    assert wsd[80] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.025)
    cosine = lr_factor(55, 100, schedule="cosine", warmup=10, min_lr=0.1)
    assert cosine == pytest.approx(0.55)
    assert lr_factor(50, 100, schedule="linear", warmup=0, min_lr=0.0) == pytest.approx(0.5)


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="cosine"):
        lr_factor(0, 10, schedule="cosin")
