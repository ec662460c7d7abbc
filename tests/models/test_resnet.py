"""Residual networks: the contract as far as it applies, sizes, costs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import contract
import pretrain
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.errors import CheckpointError, ConfigError, DataError, ModelError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.models.resnet import ResNetConfig
from pretrain.objectives.image_classification import ImageClassification
from pretrain.training.optim import build_optimizers
from pretrain.training.trainer import Trainer

TINY = {"embedding_size": 8, "hidden_sizes": (8, 16), "depths": (2, 1), "image_size": 16}


def make(seed: int = 0, kind: str = "basic", **options: object) -> Model:
    sizes = {**TINY, "layer_type": kind, "zero_init_outputs": False, **options}
    return build("resnet", head="image-classification", seed=seed, labels=3, **sizes)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_contract(kind: str):
    contract.check_shapes(make(kind=kind), 3)
    contract.check_seed(lambda seed: make(seed, kind))
    contract.check_init(make(kind=kind))
    contract.check_gradients(make(kind=kind))
    contract.check_save_and_load(lambda seed: make(seed, kind))
    contract.check_overfit(make(kind=kind))
    with pytest.raises(ConfigError, match="would update .*running_mean twice"):
        make(kind=kind).backbone.set_activation_checkpointing("full")


def test_fresh_blocks_are_the_identity_where_the_shape_stays():
    model = make(zero_init_outputs=True).eval()
    x = torch.rand(2, 8, 4, 4)
    assert torch.equal(model.backbone.layers[0](x), x)


def test_the_last_hidden_states_are_the_grid_row_by_row():
    model = make().eval()
    images = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        hidden = model.backbone({"pixel_values": images})
        assert hidden.shape == (2, 4 * 3, 16)  # halved three times
        torch.testing.assert_close(
            model({"pixel_values": images}), model.head.classifier(hidden.mean(1))
        )


@pytest.mark.parametrize("size", ["18", "50"])
def test_counted_operations(size: str):
    model = build("resnet", size, head="image-classification", labels=2, image_size=64).train()
    with FlopCounterMode(display=False) as counter:
        hidden = model.backbone({"pixel_values": torch.zeros(1, 3, 64, 64).requires_grad_()})
        hidden.sum().backward()
    said = model.backbone.flops_per_unit(0, 1)
    assert said == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (2, 1, 1)}, "describe 2 and 3 stages"),
        ({"hidden_sizes": ()}, r"hidden_sizes of the model is \(\)"),
        ({"depths": (2, 0)}, r"depths of the model is \(2, 0\)"),
        ({"layer_type": "bottelneck"}, "Did you mean"),
        ({"hidden_size": 32}, "Set hidden_sizes"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        build("resnet", **{**TINY, **change})


def test_an_unknown_size_is_refused():
    assert ResNetConfig.from_size("small").depths == (2, 2, 2, 2)
    with pytest.raises(ConfigError, match="no resnet of size '19'"):
        ResNetConfig.from_size("19")


def test_another_number_of_channels_is_named():
    with pytest.raises(ModelError, match=r"must be \(images, 3, height, width\)"):
        make()({"pixel_values": torch.zeros(1, 1, 16, 16)})


def test_a_saved_model_opens_with_its_statistics(tmp_path: Path):
    model = make()
    for _ in range(3):
        model({"pixel_values": torch.randn(4, 3, 16, 16) * 3 + 1})
    model.eval().save(tmp_path / "saved")
    again = pretrain.load(tmp_path / "saved", quiet=True)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert torch.equal(again(batch), model(batch))
    assert int(again.backbone.stem.normalization.num_batches_tracked) == 3
    assert pretrain.checkpoint.inspect(tmp_path / "saved")["family"] == "resnet"
    body = pretrain.load(tmp_path / "saved", head="none", quiet=True)
    assert torch.equal(body(batch), model.backbone(batch))
    state = model.disk_state()
    lost = "resnet.encoder.stages.1.layers.0.layer.1.normalization.running_var"
    with pytest.raises(CheckpointError, match=f"lack {lost}"):
        make().load_disk_state({k: v for k, v in state.items() if k != lost})


def test_one_place_of_one_image_cannot_be_normalised():
    model = make().train()
    side = 2**model.backbone.halvings
    small, larger = (
        torch.zeros(1, model.backbone.config.num_channels, n, n) for n in (side, side + 1)
    )
    with pytest.raises(DataError, match="batch normalisation in training needs two"):
        model({"pixel_values": small})
    model({"pixel_values": small.repeat(2, 1, 1, 1)})
    model({"pixel_values": larger})
    model.eval()({"pixel_values": small})


def test_norms_get_no_weight_decay():
    model = make()
    groups = build_optimizers(
        model, OptimConfig(lr=1e-3, weight_decay=0.1), model.backbone.blocks(), torch.device("cpu")
    ).optimizers[0].param_groups  # fmt: skip
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        plain = "normalization" in name or name.endswith("bias")
        assert (id(parameter) in decayed) != plain, name


@pytest.mark.parametrize(("rows", "fixed"), [(8, True), (16, False)])
def test_statistics_of_a_trained_model_are_kept_when_batches_are_small(
    rows: int, fixed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """And those of a new model never, or it would have none."""
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    data = [{"pixel_values": image, "labels": k % 3} for k, image in enumerate(images.numpy())]
    trained = make()
    trained({"pixel_values": images})

    def run(model: Model, name: str, limit: str) -> tuple[Model, Trainer]:
        goal = ImageClassification(model, crop=1.0)
        trainer = Trainer(
            goal, data, optim=OptimConfig(lr=1e-3, schedule="constant", warmup=0),
            train=TrainConfig(out=str(tmp_path / name), limit=limit, batch_rows=rows),
            parallel=ParallelConfig(device="cpu"),
        )  # fmt: skip
        trainer.fit()
        return model, trainer

    before = {name: value.clone() for name, value in trained.named_buffers()}
    tuned, trainer = run(trained, "tuned", "2 steps")
    assert trainer.state.fixed_statistics is fixed
    assert ("statistics of the model are kept" in capsys.readouterr().err) is fixed
    for name, value in tuned.named_buffers():
        assert torch.equal(value, before[name]) is fixed, name
    weights = [p for p in tuned.parameters() if p.ndim == 4]
    assert any(not torch.equal(p, q) for p, q in zip(weights, make().parameters(), strict=False))
    if fixed:
        resumed, trainer = run(make(seed=3), "tuned", "3 steps")
        assert trainer.state.fixed_statistics
        assert torch.equal(
            resumed.backbone.stem.normalization.running_var,
            before["backbone.stem.normalization.running_var"],
        )
        scratch, trainer = run(make(), "scratch", "1 steps")
        assert not trainer.state.fixed_statistics
        assert int(scratch.backbone.stem.normalization.num_batches_tracked) == 1
