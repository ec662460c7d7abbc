"""Prediction of the next patch: what is seen, what is predicted, and the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contract import check_objective
from pretrain.data.loader import row_rngs
from pretrain.errors import DataError, ModelError
from pretrain.models import build
from pretrain.objectives import build_objective
from pretrain.objectives.next_patch import NextPatch

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
}


def objective(**options: Any) -> NextPatch:
    found = build_objective("NextPatch", options, build("vit", None, **TINY))
    assert isinstance(found, NextPatch)
    return found


def rows(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.1, (count, 2, 12, 12)).astype(np.float32)
    for i, image in enumerate(images):
        image[i % 2, :, i % 10 : i % 10 + 3] += 2
    return [{"pixel_values": image} for image in images]


def test_contract(tmp_path: Path) -> None:
    check_objective(objective, rows(16), tmp_path)


def test_a_patch_is_predicted_from_the_prefix_and_the_patches_before_it() -> None:
    goal = objective().eval()
    batch = goal.collate(rows(3), row_rngs(0, "collate", 0, 3))
    batch["prefix"] = torch.tensor([0, 4, 8])
    assert int(goal.count(batch)) == 9 + 5 + 1

    def answers(pixels: torch.Tensor, row: int) -> list[float]:
        """The sum of the predicted pixels of every patch."""
        with torch.no_grad():
            one = {"pixel_values": pixels[row : row + 1], "prefix": batch["prefix"][row : row + 1]}
            hidden: list[torch.Tensor] = []
            handle = goal.predictor.register_forward_hook(lambda m, i, o: hidden.append(o))
            goal(one)
            handle.remove()
        return hidden[0][0].sum(-1).tolist()

    for row, prefix in enumerate((0, 4, 8)):
        before = answers(batch["pixel_values"], row)
        for patch in range(9):
            changed = batch["pixel_values"].clone()
            top, left = 4 * (patch // 3), 4 * (patch % 3)
            changed[row, :, top : top + 4, left : left + 4] += 1
            after = answers(changed, row)
            differs = [abs(a - b) > 1e-6 for a, b in zip(before, after, strict=True)]
            # What predicts patch i reads patch i - 1 and those before it, and the whole prefix.
            wanted = [patch < i or patch < prefix for i in range(9)]
            assert differs == wanted, (prefix, patch)


def test_the_loss_is_the_squared_error_behind_the_prefix() -> None:
    goal = objective().eval()
    batch = goal.collate(rows(4), row_rngs(0, "collate", 0, 4))
    predicted: list[torch.Tensor] = []
    goal.predictor.register_forward_hook(lambda module, given, found: predicted.append(found))
    with torch.no_grad():
        loss = goal(batch)
    total = 0.0
    for row, prefix in enumerate(batch["prefix"].tolist()):
        for patch in range(prefix, 9):
            top, left = 4 * (patch // 3), 4 * (patch % 3)
            pixels = batch["pixel_values"][row, :, top : top + 4, left : left + 4].double()
            wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            found = predicted[0][row, patch].double().view(4, 4, 2).permute(2, 0, 1)
            total += float((found - wanted).square().mean())
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert int(loss.count) == sum(9 - prefix for prefix in batch["prefix"].tolist())


def test_other_models_are_refused() -> None:
    with pytest.raises(ModelError, match="Build the family vit"):
        NextPatch(build("vit_mae", None, **TINY))


def test_images_of_another_size_are_refused() -> None:
    goal = objective()
    for shape in ((2, 16, 12), (2, 8, 8)):
        with pytest.raises(DataError, match=f"{shape[1]} x {shape[2]} pixels.* 12 x 12"):
            goal.collate([{"pixel_values": np.zeros(shape, np.float32)}], row_rngs(0, "x", 0, 1))
