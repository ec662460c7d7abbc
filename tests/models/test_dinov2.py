"""The contract of ``tests/contract.py`` for DINOv2, what its classifier reads, and the tasks of images on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import pretrain
from contract import check_model
from pretrain.errors import ConfigError, ModelError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.models.heads import SequenceHead
from pretrain.objectives.image_classification import ImageClassification
from pretrain.objectives.next_patch import NextPatch

TINY = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "image_size": 12, "patch_size": 4}
FAMILIES = ("dinov2", "dinov2_with_registers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [None, "image-classification"])
@pytest.mark.parametrize("gated", [False, True])
def test_contract(family: str, kind: str | None, gated: bool) -> None:
    def make(seed: int) -> Model:
        labels = ("a", "b", "c")
        return build(family, head=kind, seed=seed, labels=labels, use_swiglu_ffn=gated, **TINY)

    check_model(make, 32 if kind is None else 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classifier_reads_the_class_token_and_the_mean_of_the_patches(family: str) -> None:
    model = build(family, head="image-classification", labels=("a", "b"), **TINY).eval()
    lead = model.backbone.lead_tokens
    assert lead == (5 if family.endswith("registers") else 1)
    batch = model.backbone.random_batch(torch.Generator().manual_seed(0))
    hidden = model.backbone(batch)
    assert hidden.shape == (2, lead + 9, 32) and isinstance(model.head, SequenceHead)
    mean = hidden[:, lead:].mean(1)
    read = model.head._pool(hidden, batch)
    torch.testing.assert_close(read, torch.cat((hidden[:, 0], mean), dim=1))
    assert torch.equal(model.backbone.pooled(hidden), hidden[:, 0])
    torch.testing.assert_close(model.backbone.pooled(hidden, "mean"), mean)
    with pytest.raises(ConfigError, match="reads the class token beside the mean of the patches"):
        ImageClassification(model, pooling="mean")


def test_layer_scale_mask_token_and_registers_start_as_published() -> None:
    model = build("dinov2_with_registers", layerscale_value=1e-3, **TINY)
    state = model.disk_state()
    scale = state["encoder.layer.1.layer_scale2.lambda1"]
    assert torch.equal(scale, torch.full((32,), 1e-3))
    assert not state["embeddings.mask_token"].any() and state["embeddings.mask_token"].ndim == 2
    assert not state["embeddings.register_tokens"].any()
    assert "embeddings.mask_token" not in build("dinov2", use_mask_token=False, **TINY).disk_state()


def test_the_parameters_are_counted_before_they_are_made() -> None:
    for family in FAMILIES:
        for gated in (False, True):
            model = build(family, use_swiglu_ffn=gated, **TINY)
            counted = sum(p.numel() for p in model.parameters() if p.ndim > 1)
            counted -= model.backbone.embedding.class_token.numel()
            assert model.backbone.config.parameter_count() == counted


def test_the_next_patch_needs_a_class_token_alone_before_the_patches() -> None:
    NextPatch(build("dinov2", **TINY))
    with pytest.raises(ModelError, match="Build the family vit"):
        NextPatch(build("dinov2_with_registers", **TINY))


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_of_images(family: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 90, (12, 12, 3), np.uint8) + 120 * (k % 2) for k in range(24)]
    build(family, **TINY).save(tmp_path / "base")
    options = {"limit": "8 steps", "batch_rows": 8, "lr": 3e-3, "quiet": True, "device": "cpu"}
    rows = [{"image": x, "label": "ab"[k % 2]} for k, x in enumerate(images)]
    run = pretrain.finetune(
        tmp_path / "base", rows, task="image-classification", out=tmp_path / "classes", **options
    )
    assert run.predict(images[0]) == pretrain.load(run.save(tmp_path / "saved")).predict(images[0])
    masks = [{"image": x, "mask": (x[..., 0] > 100).astype(np.uint8)} for x in images]
    run = pretrain.finetune(
        tmp_path / "base", masks, task="segmentation", labels=["dark", "light"],
        out=tmp_path / "masks", **options,
    )  # fmt: skip
    assert run.predict(images[0])["mask"].shape == (12, 12)
    found = pretrain.probe(tmp_path / "base", rows, method="means")
    assert found["accuracy"] > 0.9
