"""The contract of ``tests/contract.py`` for AST and its heads, its processor, its grid and its sizes."""

from __future__ import annotations

import pytest
import torch

from contract import check_model
from pretrain.errors import ConfigError
from pretrain.models import build
from pretrain.models.base import Model

FAMILY = "audio-spectrogram-transformer"
TINY = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_mel_bins": 8, "max_length": 12, "patch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "outputs"), [(None, 32), ("audio-classification", 3)])
def test_contract(kind: str | None, outputs: int) -> None:
    def make(seed: int) -> Model:
        strides = {"frequency_stride": 3, "time_stride": 3}
        return build(FAMILY, head=kind, seed=seed, labels=("a", "b", "c"), **TINY, **strides)

    check_model(make, outputs)


def test_a_new_model_is_pre_trained_by_masks_and_has_the_processor_of_its_size() -> None:
    model = build(FAMILY, **TINY)
    assert model.head_kind == "masked-image" and model.backbone.config.grid == (2, 3)
    assert model.processor.shape == (12, 8) and model.tokenizer is None
    assert model.backbone.units({"input_values": torch.zeros(5, 12, 8)}) == 30


def test_the_embeddings_have_depth_0() -> None:
    first = {name for name, depth in build(FAMILY, **TINY).depths().items() if depth == 0}
    assert len(first) == 5 and all(name.startswith("backbone.embedding.") for name in first)


def test_only_visible_patches_are_computed_and_keep_their_places() -> None:
    model = build(FAMILY, head=None, **TINY).eval()
    values = torch.randn(2, 12, 8)
    every = torch.arange(6).expand(2, -1)
    plain = model({"input_values": values})
    torch.testing.assert_close(model({"input_values": values, "visible_index": every}), plain)
    turned = model({"input_values": values, "visible_index": every.flip(1)})
    torch.testing.assert_close(turned[:, 2:].flip(1), plain[:, 2:])
    assert model({"input_values": values, "visible_index": every[:, :2]}).shape == (2, 4, 32)


def test_patches_that_overlap_or_leave_gaps_are_not_masked() -> None:
    for change in ({"frequency_stride": 3}, {"time_stride": 5}, {"mask_ratio": 0.99}):
        with pytest.raises(ConfigError, match="side by side|at least one must be visible"):
            build(FAMILY, **TINY, **change)
        build(FAMILY, head="audio-classification", labels=2, **TINY, **change)
