"""CLIP: the contract as far as it applies, sizes of both towers, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import contract
import pretrain
from pretrain.errors import CheckpointError, ConfigError, ModelError
from pretrain.lora.attach import probe
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.models.clip import CLIP
from pretrain.models.config import ConfigReader
from pretrain.models.names import from_disk, slice_from_disk
from pretrain.nn.layout import ShardSlice

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "max_positions": 12,
    "vision_hidden_size": 48,
    "vision_num_heads": 3,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 24,
    "eos_id": 4,
    "pad_id": 1,
}


def make(seed: int = 0, **options: object) -> Model:
    return build("clip", seed=seed, **{**TINY, **options})


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 61, (rows, 7), generator=generator)
    ids[:, -1] = 4
    return {
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def test_the_same_seed_gives_the_same_weights():
    contract.check_seed(make)


def test_initial_statistics_are_those_of_the_paper():
    model = make()
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith("logit_scale"):
            assert float(value) == pytest.approx(math.log(1 / 0.07), abs=1e-3)
        elif value.ndim < 2 and not name.endswith("class_token"):
            assert bool((value == float(name.endswith("weight"))).all()), name
        elif value.numel() > 1000:
            std = model.backbone.init_std(name)
            assert float(value.std()) == pytest.approx(std, rel=0.1), name
    assert model.backbone.image.patches.class_token.detach().abs().max() > 0


def test_every_parameter_learns():
    model = make()
    images, texts = model.backbone.vectors(batch())
    model.backbone.scores(images, texts).logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_recomputing_activations_changes_no_gradient():
    model, grads = make(), []
    for mode in ("off", "full", "selective"):
        model.zero_grad()
        model.backbone.set_activation_checkpointing(mode)
        model.train()(batch()).square().mul(torch.arange(24.0)).sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        grads.append([grad.clone() for grad in found])
    assert len(grads[0]) > 40
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_either_tower_alone_and_both():
    model = make().eval()
    whole = batch()
    with torch.no_grad():
        images = model({"pixel_values": whole["pixel_values"]})
        texts = model({"input_ids": whole["input_ids"]})
        both = model(whole)
    torch.testing.assert_close(both, torch.cat((images, texts)))
    torch.testing.assert_close(both.norm(dim=1), torch.ones(6))
    assert model.backbone.units(whole) == 3 * 4 + 3 * 7


def test_padding_changes_no_vector():
    model = make().eval()
    whole = batch()
    padded = {
        "input_ids": torch.cat((whole["input_ids"], torch.ones(3, 4, dtype=torch.long)), 1),
        "attention_mask": torch.cat((whole["attention_mask"], torch.zeros(3, 4).long()), 1),
    }
    with torch.no_grad():
        wanted = model({"input_ids": whole["input_ids"]})
        torch.testing.assert_close(model(padded), wanted)
        padded.pop("attention_mask")
        torch.testing.assert_close(model(padded), wanted)


def test_the_outputs_of_two_models_can_be_compared():
    assert probe(make()).shape == (4, 24)


def test_depths_run_through_both_towers():
    depths = make().depths()
    assert depths["backbone.image.layers.0.mlp.up.weight"] == 1
    assert depths["backbone.text.layers.1.mlp.up.weight"] == 4
    assert depths["backbone.text.token_embedding.weight"] == 0
    assert depths["backbone.logit_scale"] == 5


def test_a_saved_model_opens_and_can_be_inspected(tmp_path: Path):
    model = make().eval()
    model.save(tmp_path / "saved")
    again = pretrain.load(tmp_path / "saved", quiet=True)
    assert torch.equal(again(batch()), model(batch()))
    assert again.hf_config() == model.hf_config()
    about = pretrain.checkpoint.inspect(tmp_path / "saved")
    assert about["family"] == "clip" and about["parameters"] == model.num_parameters()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_dropout_is_kept_in_the_file(family: str, tmp_path: Path):
    sizes = {key: value for key, value in TINY.items() if key != "projection_dim"}
    for rate in (0.0, 0.25):
        model = build(family, dropout=rate, **sizes)
        model.save(tmp_path / str(rate))
        again = pretrain.load(tmp_path / str(rate), quiet=True).backbone.config
        assert again.dropout == rate
        assert ("dropout" in model.hf_config()["text_config"]) == (rate > 0)


@pytest.mark.parametrize("part", ["text", "vision"])
def test_an_older_key_that_says_otherwise_is_refused(part: str):
    """transformers lets it take precedence, also with defaults for what it does not name."""
    config = make().hf_config()
    same = config[f"{part}_config"]

    def read(given: object) -> dict[str, object]:
        return CLIP.fields_from_hf(ConfigReader({**config, f"{part}_config_dict": given}, "clip"))

    assert read(None) == read(same)
    short = {k: v for k, v in same.items() if k != "num_hidden_layers"}
    for given, key in (({**same, "hidden_size": 64}, "hidden_size"), (short, "num_hidden_layers")):
        with pytest.raises(ConfigError, match=f"{part}_config do not agree on '{key}'"):
            read(given)


def test_the_scale_has_no_dimension_on_disk_and_one_in_memory():
    """torch shards no parameter without dimensions; a slice is read as other tensors are."""
    model = make()
    entry = next(entry for entry in model.entries() if entry.disk == "logit_scale")
    assert model.backbone.logit_scale.shape == (1,)
    stored = model.disk_state()["logit_scale"]
    assert stored.shape == ()
    name, shapes = "backbone.logit_scale", {"backbone.logit_scale": (1,)}
    assert from_disk(entry, stored, shapes)[0][1].shape == (1,)
    for start, count in ((0, 1), (1, 0)):
        region = ShardSlice((start,), (count,))
        part = slice_from_disk(entry, name, region, shapes, lambda box: stored)
        assert part.tolist() == [float(stored)] * count
    with pytest.raises(CheckpointError, match=r"has the shape \(1,\), but the model needs \(\)"):
        from_disk(entry, stored[None], shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_id": None}, "eos_id of a clip model must be set"),
        ({"eos_id": 2}, "eos_id 2 cannot be saved for transformers"),
        ({"patch_size": 9}, "patch_size 9 is larger than image_size 8"),
        ({"vision_num_heads": 5}, "vision_hidden_size 48 is not a multiple of vision_num_heads 5"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        make(**change)


def test_batches_that_no_tower_reads_are_named():
    model = make()
    with pytest.raises(ModelError, match="nothing for either tower"):
        model({"labels": torch.zeros(2)})
    packed = {"input_ids": batch()["input_ids"], "document_ids": torch.ones(3, 7).long()}
    with pytest.raises(ModelError, match="packed with several"):
        model(packed)
    with pytest.raises(ModelError, match=r"must be \(images, 3, 8, 8\)"):
        model({"pixel_values": torch.zeros(1, 3, 9, 9)})


def test_no_images_have_no_vectors():
    assert make().embed(np.empty((0, 8, 8, 3), np.uint8)).shape == (0, TINY["projection_dim"])
