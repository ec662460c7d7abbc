"""SigLIP: initial values, gradients, saving, and that its texts are read at their last position."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import contract
import pretrain
from pretrain.models import build
from pretrain.models.base import Model

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "max_positions": 6,
    "vision_hidden_size": 48,
    "vision_num_heads": 3,
    "image_size": 8,
    "patch_size": 4,
    "pad_id": 1,
}


def make(seed: int = 0) -> Model:
    return build("siglip", seed=seed, **TINY)


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 61, (rows, 6), generator=generator)
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "input_ids": ids}


def test_the_same_seed_gives_the_same_weights_and_the_scores_begin_as_in_the_paper():
    contract.check_seed(make)
    towers = make().backbone
    assert float(towers.logit_scale.detach()) == pytest.approx(math.log(10))
    assert float(towers.logit_bias.detach()) == -10
    value = towers.text.layers[0].mlp.up.weight.detach()
    assert float(value.std()) == pytest.approx(math.sqrt(2 / (32 + 128)), rel=0.1)


def test_every_parameter_learns():
    model = make()
    images, texts = model.backbone.vectors(batch())
    model.backbone.scores(images, texts).exp().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_text_is_read_at_its_last_position_and_all_tokens_count():
    model = make().eval()
    ids = batch()["input_ids"]
    other = ids.clone()
    other[:, 0] = 5 + (other[:, 0] - 4) % 56
    with torch.no_grad():
        hidden, pooled = model.backbone.encode_texts(ids)
        torch.testing.assert_close(pooled, model.backbone.text_projection(hidden[:, -1]))
        assert not torch.allclose(model({"input_ids": other}), model({"input_ids": ids}))


def test_a_saved_model_opens_and_can_be_inspected(tmp_path: Path):
    model = make().eval()
    model.save(tmp_path / "saved")
    again = pretrain.load(tmp_path / "saved", quiet=True)
    assert torch.equal(again(batch()), model(batch()))
    assert again.hf_config() == model.hf_config()
    about = pretrain.checkpoint.inspect(tmp_path / "saved")
    assert about["family"] == "siglip" and about["parameters"] == model.num_parameters()
