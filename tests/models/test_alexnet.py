"""AlexNet: the convolutional trunk without shortcuts; sizes, costs, files of our own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import contract
import pretrain
from pretrain.errors import CheckpointError, ConfigError
from pretrain.models import build
from pretrain.models.base import Model

TINY = {
    "embedding_size": 8, "hidden_sizes": (12, 16, 16, 8), "image_size": 16, "stem_size": 3,
    "stem_stride": 1, "classifier_dropout": 0.0,
}  # fmt: skip


def make(seed: int = 0, **options: object) -> Model:
    return build("alexnet", head="image-classification", seed=seed, labels=3, **{**TINY, **options})


def test_contract():
    contract.check_shapes(make(), 3)
    contract.check_seed(make)
    contract.check_init(make())
    contract.check_gradients(make())
    contract.check_save_and_load(make)
    contract.check_overfit(make())


def test_the_convolutions_are_those_of_the_paper():
    """torchvision's have 2,469,696 weights and biases; norms are in the place of the 1,152 biases."""
    model = build("alexnet", head=None, device="meta")
    parts = (model.backbone.stem, *model.backbone.layers)
    weights = [p for part in parts for p in part.parameters() if p.ndim == 4]
    assert sum(p.numel() for p in weights) == 2_469_696 - 1_152
    assert [tuple(p.shape) for p in weights] == [
        (64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3),
    ]  # fmt: skip
    images = {"pixel_values": torch.zeros(1, 3, 224, 224, device="meta")}
    assert model.to("meta").backbone(images).shape == (1, 7 * 7, 256)
    assert len(model.backbone.blocks()) == 4


def test_there_is_no_shortcut_and_a_pool_after_the_second_and_the_last_convolution():
    model = make().eval()
    first, second = model.backbone.layers[:2]
    x = torch.rand(2, 8, 8, 8)
    assert first(x).shape == (2, 12, 4, 4) and second(first(x)).shape == (2, 16, 4, 4)
    with torch.no_grad():
        second.parts[0].normalization.weight.zero_()
        assert not second(first(x)).any()


def test_counted_operations():
    model = build("alexnet", "tiny", head=None, image_size=64).train()
    with FlopCounterMode(display=False) as counter:
        images = torch.zeros(1, 3, 64, 64).requires_grad_()
        model({"pixel_values": images}).sum().backward()
    assert model.backbone.flops_per_unit(0, 1) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_directory_is_ours_and_transformers_does_not_open_it_as_another_model(tmp_path: Path):
    model = make()
    model({"pixel_values": torch.randn(4, 3, 16, 16) * 3 + 1})
    model.eval().save(tmp_path / "saved")
    again = pretrain.load(tmp_path / "saved", quiet=True)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert torch.equal(again(batch), model(batch))
    body = pretrain.load(tmp_path / "saved", head="none", quiet=True)
    assert torch.equal(body(batch), model.backbone(batch))
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="alexnet"):
        transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    lost = "alexnet.layers.2.parts.0.normalization.running_var"
    state = {key: value for key, value in model.disk_state().items() if key != lost}
    with pytest.raises(CheckpointError, match=f"lack {lost}"):
        make().load_disk_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_sizes": (5, 3)}, "one for each of the 4 stages"),
        ({"stem_size": 4}, "odd numbers"),
        ({"stem_stride": 3}, "1, 2 or 4"),
        ({"layer_type": "basic"}, "layer_type of the model is 'basic'"),
        ({"zero_init_outputs": True}, "nothing but zeros"),
        ({"hidden_size": 32}, "family alexnet follows"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        make(**change)
