"""Values of arguments in Python: what is no whole number is an error that names the argument."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
import tiny
from pretrain.config.check import check_count
from pretrain.errors import ConfigError
from pretrain.models import build

BAD = [2.5, 2.0, True, math.nan, math.inf, "3", [2]]


@pytest.mark.parametrize("value", BAD)
def test_a_count_is_a_whole_number_in_all_functions(value: Any, tmp_path: Path) -> None:
    size: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32}
    model = build("bert", "tiny", tokenizer=tiny.tokenizer(), **size)
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    calls = {
        "batch_size": lambda: model.embed("the cat", batch_size=value),
        "batch_rows": lambda: pretrain.evaluate("nowhere", batch_rows=value),
        "limit": lambda: pretrain.evaluate("nowhere", limit=value),
        "vocab_size": lambda: pretrain.train_tokenizer(str(text), vocab_size=value),
        "row_length": lambda: pretrain.prepare(str(text), tmp_path / "out", row_length=value),
        "workers": lambda: pretrain.prepare(str(text), tmp_path / "out", workers=value),
        "steps": lambda: pretrain.bench(data={"train": str(text)}, steps=value),
        "steps ": lambda: pretrain.lr_range_test(data={"train": str(text)}, steps=value),
    }
    for name, call in calls.items():
        with pytest.raises(ConfigError, match=f"{name.strip()} is .*must be a whole number"):
            call()


def test_a_count_has_a_least_value_and_may_be_of_numpy() -> None:
    for least, good, bad in ((1, 1, 0), (0, 0, -1), (2, np.int64(2), np.int64(1))):
        assert type(check_count("n", good, least)) is int
        with pytest.raises(ConfigError, match=f"n is .*a whole number of at least {least}"):
            check_count("n", bad, least)
    check_count("n", -5, None)


def test_scalars_of_numpy_are_numbers_in_settings() -> None:
    given = {
        "optim": {"lr": np.float32(0.5)},
        "train": {"batch_rows": np.int64(8), "limit": np.int64(3), "best": np.bool_(False)},
        "model": {"overrides": {"num_layers": np.int64(1)}},
    }
    found = pretrain.RunConfig.load(given)
    assert (found.optim.lr, found.train.batch_rows, found.train.limit) == (0.5, 8, "3 steps")
    assert found.train.best is False and type(found.model.overrides["num_layers"]) is int
    with pytest.raises(ConfigError, match=r"train\.seed must be a whole number, found 1\.5"):
        pretrain.RunConfig.load({"train": {"seed": np.float64(1.5)}})
