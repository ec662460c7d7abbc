"""GIT: initial weights."""

from __future__ import annotations

import math

import pytest
import torch

import pretrain
from pretrain.models.base import Model

SIZES = {"hidden_size": 64, "num_heads": 4, "num_layers": 2, "image_size": 24, "patch_size": 6}


def make(**options: object) -> Model:
    return pretrain.build("git", vocab_size=200, max_positions=32, **{**SIZES, **options})


def test_the_image_tower_starts_as_that_of_clip() -> None:
    wide = {"hidden_size": 128, "vision_hidden_size": 64, "vision_num_layers": 3}
    model, base = make(initializer_range=0.05, **wide), 1 / math.sqrt(64)
    wanted = {
        "image.patches.positions": 1 / math.sqrt(3),
        "image.patches.projection.weight": 1 / math.sqrt(3 * 3 * 36),
        "image.layers.0.attention.query.weight": base,
        "image.layers.1.attention.output.weight": base / math.sqrt(6),
        "image.layers.2.mlp.up.weight": base / math.sqrt(2),
        "image.layers.2.mlp.down.weight": base / math.sqrt(6),
        "image_projection.weight": 0.05,
        "layers.0.mlp.down.weight": 0.05,
        "token_embedding.weight": 0.05,
    }
    parameters = dict(model.backbone.named_parameters())
    for name, std in wanted.items():
        assert float(parameters[name].detach().std()) == pytest.approx(std, rel=0.1), name
    assert model.backbone.image.patches.class_token.detach().abs().max() > 0


def test_positions_are_as_loud_as_pixels() -> None:
    patches = make().backbone.image.patches
    pixels = torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        content = patches.projection(pixels).std()
        assert float(patches.positions[1:].std() / content) == pytest.approx(1, rel=0.15)
