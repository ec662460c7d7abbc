"""Fine-tuning on images says what is wrong with them, and its results outlive the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

import pretrain
from pretrain.errors import PretrainError

RNG = np.random.default_rng(0)
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def tuned(data: Any, out: Path) -> Any:
    model = pretrain.build("vit", **TINY)
    return pretrain.finetune(
        model, data, "image-classification", valid=0.5, limit="1 steps", out=out, quiet=True
    )


def test_mistakes_are_listed_without_pictures_after_files_were_moved(tmp_path: Path) -> None:
    for k in range(24):
        path = tmp_path / "data" / "abc"[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    found = tuned(tmp_path / "data", tmp_path / "run")
    before = list(found.errors(3))
    assert before and all("picture" in row for row in before)
    (tmp_path / "data").rename(tmp_path / "moved")
    after = list(found.errors(3))
    pictures = ("picture", "attention")
    assert after == [{k: v for k, v in row.items() if k not in pictures} for row in before]
    assert before[0]["where"] in found.report().read_text()


def test_values_from_0_to_1_are_refused_with_the_remedy(tmp_path: Path) -> None:
    rows = {"image": list(RNG.random((8, 8, 8))), "label": ["a", "b"] * 4}
    with pytest.raises(PretrainError, match=r"\(array \* 255\)\.round\(\)"):
        tuned(rows, tmp_path / "run")
