"""Small rows and checkpoints that the tests of fine-tuning share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tiny
from pretrain.models import build

ANIMALS = ("cat", "dog", "fox")
_WORDS = [
    "the",
    "red",
    "old",
    "big",
    "sly",
    "sat",
    "on",
    "mat",
    "and",
    "looked",
    "at",
    "log",
    "box",
]
SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
QUICK: dict[str, Any] = {
    "lr": 1e-2, "limit": "6 steps", "batch_rows": 8, "eval_every": "3 steps", "precision": "fp32",
    "device": "cpu", "valid": 0.25, "quiet": True,
}  # fmt: skip


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, animal in it), no two alike."""
    rng = np.random.default_rng(seed)
    made: dict[str, str] = {}
    while len(made) < count:
        words = [str(w) for w in rng.choice(_WORDS, int(rng.integers(3, 14)))]
        animal = ANIMALS[len(made) % 3]
        words.insert(int(rng.integers(len(words))), animal)
        made.setdefault(" ".join(words), animal)
    return list(made.items())


def rows_of(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose class is the animal that stands in them."""
    return [{"text": text, "label": animal} for text, animal in texts(count, seed)]


def model_of(family: str = "bert", **options: Any) -> Any:
    """A tiny model with its language head."""
    more = {} if family in ("llama", "qwen3", "modernbert") else {"dropout": 0.0}
    given = {"max_positions": 64, **SIZES, **more, **options}
    return build(family, None, tokenizer=tiny.tokenizer(), **given)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked-language checkpoint of BERT's kind."""
    return str(model_of().save(tmp_path_factory.mktemp("start") / "bert"))
