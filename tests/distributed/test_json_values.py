"""What processes tell each other comes back as it was, to the last bit, and of its own type."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pretrain.distributed.json_values import from_plain, to_plain

SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.floats()
KINDS = [np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint8, np.bool_]
ARRAYS = st.sampled_from(KINDS).flatmap(
    lambda kind: arrays.arrays(kind, arrays.array_shapes(max_dims=3, max_side=4, min_side=0))
)
TENSORS = ARRAYS.map(torch.from_numpy)
VALUES = st.recursive(
    SCALARS | ARRAYS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return (
            one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
        ) or np.array_equal(one, two, equal_nan=True)
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and same(one.numpy(), two.numpy())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    return bool(one == two or (one != one and two != two))


@given(VALUES)
def test_values_survive_the_way_through_json(value: Any) -> None:
    assert same(from_plain(json.loads(json.dumps(to_plain(value)))), value)


def test_numbers_of_numpy_become_plain() -> None:
    found = to_plain([np.float32(0.5), np.int64(3), np.array(2.0), np.bool_(True)])
    assert found == [0.5, 3, 2.0, True] and [type(x) for x in found] == [float, int, float, bool]


def test_objects_are_not_sent() -> None:
    for value in (object(), np.array([object()]), {1, 2}):
        with pytest.raises(TypeError, match="cannot be sent"):
            to_plain(value)
