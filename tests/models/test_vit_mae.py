"""ViT-MAE: the contract of all families, which patches are computed and predicted, sizes, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import pretrain
from contract import check_model
from pretrain.errors import ConfigError, ModelError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.models.vit_mae import ViTMAEConfig
from pretrain.objectives.masked_image import MaskedImage

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
    "decoder_num_layers": 3,
    "decoder_hidden_size": 24,
    "decoder_num_heads": 3,
}


def make(seed: int = 0, head: str | None = "masked-image") -> Model:
    return build("vit_mae", head=head, seed=seed, **TINY)


def test_the_body_keeps_the_contract():
    check_model(lambda seed: make(seed, None), 32)


def visible(*rows: list[int]) -> dict[str, torch.Tensor]:
    images = torch.randn((len(rows), 2, 12, 12), generator=torch.Generator().manual_seed(1))
    return {"pixel_values": images, "visible_index": torch.tensor(rows)}


def test_hidden_pixels_have_no_influence_and_visible_ones_do():
    model = make().eval()
    batch = visible([0, 5, 7], [2, 3, 4])
    with torch.no_grad():
        wanted = model(batch)
        assert model.backbone(batch).shape == (2, 4, 32) and wanted.shape == (2, 9, 32)
        other = {**batch, "pixel_values": batch["pixel_values"].clone()}
        other["pixel_values"][0, :, 0:4, 4:8] += 1  # patch 1, hidden
        assert torch.equal(model(other), wanted)
        other["pixel_values"][0, :, 4:8, 8:12] += 1  # patch 5, visible
        changed = model(other)
    assert not torch.equal(changed[0], wanted[0]) and torch.equal(changed[1], wanted[1])


def test_the_order_of_visible_patches_does_not_matter():
    model = make().eval()
    batch = visible([0, 5, 7], [2, 3, 4])
    with torch.no_grad():
        swapped = {**batch, "visible_index": batch["visible_index"].flip(1)}
        torch.testing.assert_close(model(swapped), model(batch))


def test_all_patches_visible_equals_naming_none():
    model = make().eval()
    batch = visible(list(range(9)))
    with torch.no_grad():
        torch.testing.assert_close(model(batch), model({"pixel_values": batch["pixel_values"]}))


def test_every_parameter_learns_and_the_positions_are_none():
    model = make()
    model(visible([0, 5, 7], [2, 3, 4])).square().sum().backward()
    names = dict(model.named_parameters())
    assert not any(name.endswith("positions") for name in names)
    for name, parameter in names.items():
        assert parameter.grad is not None, name
    assert {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"} <= set(
        model.disk_state()
    )


def test_one_size_gives_the_light_decoder_of_the_paper():
    base = ViTMAEConfig.from_size("base")
    assert (base.decoder_hidden_size, base.decoder_num_layers, base.decoder_num_heads) == (
        512,
        8,
        16,
    )
    assert (base.num_patches, base.num_visible) == (196, 49)
    tiny = ViTMAEConfig.from_size("tiny", image_size=28, patch_size=4)
    assert (tiny.decoder_hidden_size, tiny.decoder_num_layers) == (64, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "not a multiple of patch_size 5"),
        ({"decoder_hidden_size": 30}, "decoder_hidden_size 30 must be a multiple of 4"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 of 9 patches leaves 0 visible"),
        ({"mask_ratio": 0.95}, "at least one must be visible and one hidden"),
        ({"image_size": 1 << 20}, "image_size of the model is 1048576"),
        ({"decoder_num_layers": 0}, "decoder_num_layers of the model is 0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        build("vit_mae", **(TINY | change))


def test_an_encoder_that_hides_nothing_is_opened_and_not_pre_trained(tmp_path):
    """As transformers users save it, to read the features of whole images."""
    model = make()
    model.save(tmp_path / "mae")
    config = json.loads((tmp_path / "mae" / "config.json").read_text())
    (tmp_path / "mae" / "config.json").write_text(json.dumps(config | {"mask_ratio": 0.0}))
    (tmp_path / "mae" / "manifest.json").unlink()
    opened = pretrain.load(tmp_path / "mae", quiet=True)
    pixels = {"pixel_values": torch.randn(2, 2, 12, 12)}
    assert torch.equal(opened.backbone.eval()(pixels), model.backbone.eval()(pixels))
    with pytest.raises(ConfigError, match=r"mask_ratio 0\.0 .* one hidden"):
        MaskedImage(opened)
    assert MaskedImage(opened, mask_ratio=0.5).num_visible == 4


def test_an_image_of_another_size_is_named():
    with pytest.raises(ModelError, match=r"must be \(images, 2, 12, 12\)"):
        make()({"pixel_values": torch.zeros(1, 2, 16, 16)})


def test_a_saved_model_opens_and_can_be_inspected(tmp_path):
    model = make().eval()
    model.save(tmp_path / "saved")
    again = pretrain.load(tmp_path / "saved", quiet=True)
    batch = visible([0, 5, 7])
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))
    assert again.head_kind == "masked-image"
    body = pretrain.load(tmp_path / "saved", head="none", quiet=True)
    assert body.head is None and body.backbone.max_length == 0
    about = pretrain.checkpoint.inspect(tmp_path / "saved")
    positions = sum(buffer.numel() for buffer in model.buffers())
    assert about["parameters"] == model.num_parameters() + positions


def test_a_classifier_starts_from_the_encoder(tmp_path):
    """It becomes a ViT, as in transformers, with new weights in the classifier alone."""
    model = make().eval()
    model.save(tmp_path / "saved")
    vit = pretrain.load(tmp_path / "saved", head="image-classification", quiet=True)
    assert type(vit.backbone).__name__ == "ViT"
    assert vit.fresh == {"head.classifier.weight", "head.classifier.bias"}
    batch = {"pixel_values": torch.randn(2, 2, 12, 12)}
    with torch.no_grad():
        torch.testing.assert_close(vit.backbone(batch), model.backbone(batch))
    written = vit.hf_config()
    assert written["architectures"] == ["ViTForImageClassification"]
    assert written["model_type"] == "vit" and not any("decoder" in key for key in written)
