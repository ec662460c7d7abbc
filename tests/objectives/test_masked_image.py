"""Masked autoencoding: which patches are hidden, what is predicted, what a step costs, and the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contract import check_objective
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.data.images import ImageProcessor
from pretrain.data.loader import row_rngs
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.lora import apply_lora
from pretrain.models import build
from pretrain.nn.buffers import changing_buffers, stored_tensors
from pretrain.objectives.masked_image import MaskedImage
from pretrain.training.trainer import Trainer

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "image_size": 12,
    "patch_size": 3,
    "num_channels": 2,
}


def objective(**options: Any) -> MaskedImage:
    return MaskedImage(build("vit_mae", **TINY), **options)


def rows(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Images of one bright band each, so that the hidden part can be known."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.1, (count, 2, 12, 12)).astype(np.float32)
    for i, image in enumerate(images):
        image[i % 2, :, i % 10 : i % 10 + 3] += 2
    return [{"pixel_values": image} for image in images]


def test_contract(tmp_path: Path) -> None:
    check_objective(objective, rows(16), tmp_path)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 0.9), st.integers(0, 2**31), st.integers(0, 10**6))
def test_the_mask_is_a_pure_function_of_seed_and_place(ratio: float, seed: int, place: int) -> None:
    goal = objective(mask_ratio=ratio)
    visible = int(16 * (1 - ratio))
    batch = goal.collate(rows(3), row_rngs(seed, "collate", place, 3))
    chosen = batch["visible_index"]
    assert chosen.shape == (3, visible) and chosen.dtype == torch.int64
    assert bool((chosen.diff(dim=1) > 0).all())  # ascending, so no patch is there twice
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 16
    assert int(goal.count(batch)) == 3 * (16 - visible)
    alone = goal.collate(rows(3)[1:2], row_rngs(seed, "collate", place + 1, 1))
    assert torch.equal(alone["visible_index"][0], chosen[1])


def test_every_patch_is_hidden_equally_often() -> None:
    goal = objective()
    batch = goal.collate(rows(2000), row_rngs(0, "collate", 0, 2000))
    share = torch.bincount(batch["visible_index"].flatten(), minlength=16) / 2000
    assert share.sub(0.25).abs().max() < 0.05  # five standard deviations of a count


def test_the_loss_is_the_squared_error_of_hidden_patches_alone() -> None:
    goal = objective().eval()
    batch = goal.collate(rows(4), row_rngs(0, "collate", 0, 4))
    with torch.no_grad():
        loss = goal(batch)
        predicted = goal.model({k: v for k, v in batch.items() if k != "hidden_index"})
        hidden = goal.model(batch)
    total = 0.0
    for row, places in enumerate(batch["hidden_index"]):
        assert set(places.tolist()) == set(range(16)) - set(batch["visible_index"][row].tolist())
        torch.testing.assert_close(hidden[row], predicted[row, places])
    for row in range(4):
        for patch in set(range(16)) - set(batch["visible_index"][row].tolist()):
            top, left = 3 * (patch // 4), 3 * (patch % 4)
            pixels = batch["pixel_values"][row, :, top : top + 3, left : left + 3].double()
            wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            found = predicted[row, patch].double().view(3, 3, 2).permute(2, 0, 1)
            total += float((found - wanted).square().mean())
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert int(loss.count) == 48
    plain = objective(norm_pixels=False)
    assert torch.equal(
        plain.targets(batch["pixel_values"])[0, 0, 0], batch["pixel_values"][0, 0, 0, 0]
    )


def test_a_flat_patch_has_a_finite_target() -> None:
    target = objective().targets(torch.full((1, 2, 12, 12), 0.5))
    assert bool((target == 0).all())


def _flops(result: Callable[[], torch.Tensor]) -> int:
    """Operations of a forward and backward pass; torch counts those of attention in its plain form only."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result().sum().backward()
    found: int = counter.get_total_flops()
    return found


def test_the_encoder_computes_the_visible_patches_only() -> None:
    sizes = {"image_size": 56, "patch_size": 4, "num_channels": 1}
    goal = MaskedImage(build("vit_mae", "tiny", **sizes))
    images = [{"pixel_values": np.zeros((1, 56, 56), np.float32)}] * 2
    batch = goal.collate(images, row_rngs(0, "collate", 0, 2))
    encoder = goal.model.backbone
    whole = _flops(lambda: encoder({"pixel_values": batch["pixel_values"]}))
    assert whole > 3 * _flops(lambda: encoder(batch))


def test_the_counted_operations_are_those_of_the_step() -> None:
    sizes = {"image_size": 56, "patch_size": 4, "num_channels": 1}
    goal = MaskedImage(build("vit_mae", "tiny", **sizes))
    images = [{"pixel_values": np.zeros((1, 56, 56), np.float32)}] * 2
    batch = goal.collate(images, row_rngs(0, "collate", 0, 2))
    said = goal.flops(goal.units(batch), int(goal.count(batch)), 196)
    assert said == pytest.approx(_flops(lambda: goal(batch).total), rel=0.1)


def test_arguments_are_recorded_in_the_config_of_the_model() -> None:
    goal = objective(mask_ratio=0.5, norm_pixels=False)
    written = goal.model.hf_config()
    assert (written["mask_ratio"], written["norm_pix_loss"]) == (0.5, False)
    assert goal.describe() == {"name": "MaskedImage", "mask_ratio": 0.5, "norm_pixels": False}
    assert "hides 8 of 16 patches" in goal.survey([])[0]


def test_rows_of_images_are_read_cropped_and_mirrored_by_their_own_generator() -> None:
    pytest.importorskip("PIL")
    goal = MaskedImage(build("vit_mae", **TINY | {"num_channels": 1}), crop=0.5, flip=True)
    goal.model.processor = ImageProcessor(size=12, image_mean=[0.5], image_std=[0.5])
    images = [
        {"image": np.random.default_rng(i).integers(0, 255, (20, 16), np.uint8)} for i in (0, 1)
    ]
    one = goal.collate(images, row_rngs(0, "collate", 0, 2))
    again = goal.collate(images[1:], row_rngs(0, "collate", 1, 1))
    assert one["pixel_values"].shape == (2, 1, 12, 12)
    assert torch.equal(one["pixel_values"][1], again["pixel_values"][0])
    assert torch.equal(one["visible_index"][1], again["visible_index"][0])
    other = goal.collate(images, row_rngs(1, "collate", 0, 2))
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    held = goal.collate(images, row_rngs(1, "collate", 0, 2), evaluation=True)
    wanted = goal.model.processor([image["image"] for image in images])["pixel_values"]
    assert torch.equal(held["pixel_values"], torch.as_tensor(wanted))
    assert goal.describe()["crop"] == 0.5
    with pytest.raises(DataError, match="not changed at random"):
        goal.collate(rows(1), row_rngs(0, "collate", 0, 1))
    goal.model.processor = None
    with pytest.raises(ModelError, match="no image processor"):
        goal.collate(images, row_rngs(0, "collate", 0, 2))


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves 0 visible"):
        objective(mask_ratio=0.99)
    with pytest.raises(ConfigError, match="mask_ratio 0 .* one must be visible and one hidden"):
        objective(mask_ratio=0)
    with pytest.raises(ModelError, match="Build the family vit_mae"):
        MaskedImage(build("vit_mae", head=None, **TINY))


def test_constant_positions_are_no_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files hold them as buffers, but no forward pass changes them: nothing is refused or left out for their sake."""
    goal = objective()
    stored = [name for name in stored_tensors(goal.model) if name.endswith("positions")]
    assert stored == ["backbone.patches.positions", "head.positions"]
    assert not changing_buffers(goal)
    assert changing_buffers(build("resnet", "18", image_size=8, num_channels=1))
    run = Trainer(
        goal, rows(8), optim=OptimConfig(),
        train=TrainConfig(out=str(tmp_path), limit="1 steps", batch_rows=8, micro_rows=4),
        parallel=ParallelConfig(device="cpu", reproducible=True),
    )  # fmt: skip
    run.fit()
    run.parallel.reproducible = False
    monkeypatch.setattr(run.journal, "write", lambda event: None)  # it is closed
    assert run.halve_micro_rows() and run.micro_rows == 2
    apply_lora(goal.model)


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_a_processor_that_keeps_proportions_is_refused(crop: float) -> None:
    goal = MaskedImage(build("vit_mae", **TINY | {"num_channels": 3}), crop=crop)
    goal.model.processor = ImageProcessor("CLIPImageProcessor", do_center_crop=False)
    images = [{"image": np.zeros((12, 15, 3), np.uint8)}] * 2
    with pytest.raises(ModelError, match="keeps the proportions"):
        goal.collate(images, row_rngs(0, "collate", 0, 2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pixel_values": np.zeros((2, 12, 12), np.uint8)}, "pixel_values of the rows are uint8"),
        (
            {"pixels": np.zeros((2, 12, 12))},
            "reads rows with image or pixel_values; these have pixels",
        ),
    ],
)
def test_rows_without_normalised_pixels_are_refused(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        objective().collate([row] * 2, row_rngs(0, "collate", 0, 2))


def test_pixels_in_double_precision_are_read() -> None:
    images = [{"pixel_values": row["pixel_values"].astype(np.float64)} for row in rows(2)]
    assert (
        objective().collate(images, row_rngs(0, "collate", 0, 2))["pixel_values"].dtype
        == torch.float32
    )
