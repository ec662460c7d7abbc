"""The contract of ``tests/contract.py`` for ViT and its head, its processor and its sizes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("PIL")

from contract import check_model
from pretrain.models import build
from pretrain.models.base import Model

TINY = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "image_size": 12, "patch_size": 4}


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(None, "first"), ("image-classification", "first"), ("image-classification", "mean")],
)
def test_contract(kind: str | None, pooling: str) -> None:
    def make(seed: int) -> Model:
        labels = ("a", "b", "c")
        return build("vit", head=kind, seed=seed, labels=labels, pooling=pooling, **TINY)

    check_model(make, 32 if kind is None else 3)


def test_a_new_model_has_the_processor_of_its_size() -> None:
    model = build("vit", **TINY)
    assert model.head is None and model.tokenizer is None
    assert model.processor.size == (12, 12) and model.processor.channels == 3
    assert build("vit", num_channels=1, **TINY).processor.channels == 1
    assert "vocabulary" not in model.summary()


def test_the_embeddings_have_depth_0() -> None:
    depths = build("vit", **TINY).depths()
    first = {name for name, depth in depths.items() if depth == 0}
    assert first == {
        *("backbone.embedding.class_token", "backbone.embedding.positions"),
        *("backbone.embedding.projection.weight", "backbone.embedding.projection.bias"),
    }


def test_two_random_images_tell_models_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (build("vit", seed=seed, **TINY).eval() for seed in (0, 1))
    batch = one.backbone.random_batch(generator)
    assert batch["pixel_values"].shape == (2, 3, 12, 12)
    assert not torch.equal(one(batch), two(batch))
