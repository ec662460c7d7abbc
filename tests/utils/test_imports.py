"""Calls of functions and classes that a user names, with arguments from settings."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.errors import ConfigError
from pretrain.utils.imports import call_named


class Base:
    def __init__(self, model: Any, *, depth: int = 2) -> None:
        self.depth = depth


class Passing(Base):
    def __init__(self, model: Any, *, rate: float, **others: Any) -> None:
        super().__init__(model, **others)


def failing(rate: float) -> None:
    {}.update(None, rate=rate)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 1, "deph": 3}, r"x\.deph: Passing has no such argument. Did you mean 'depth'\?"),
        ({"rat": 1}, r"x\.rate is missing; Passing needs it"),
        ({"rate": 1, "zzz": 3}, r"x\.zzz: Passing has no such argument. Known: depth, rate"),
    ],
)
def test_arguments_that_do_not_fit_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call_named(Passing, given, "x.{}".format, None)


def test_other_calls_are_left_alone() -> None:
    assert call_named(Passing, {"rate": 1, "depth": 5}, str, None).depth == 5
    with pytest.raises(TypeError):
        call_named(failing, {"rate": 1}, str)
