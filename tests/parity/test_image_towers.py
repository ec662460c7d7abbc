"""Image classifiers on the towers of CLIP and SigLIP against transformers: logits, gradients, files, fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import pretrain
from parity.cases import Case, build_theirs, difference, open_ours, save_ours
from parity.test_clip import TEXT, VISION, check_config
from pretrain.errors import ConfigError, ModelError
from pretrain.models.base import Model
from pretrain.models.image_tower import ImageTower
from pretrain.objectives.image_classification import ImageClassification

NAMES = {"clip": "CLIP", "siglip": "Siglip"}
TOLERANCE = 1e-5
POOL = "vision_model.head."


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def case_of(family: str, kind: str = "ForImageClassification") -> Case:
    sizes: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION}
    if family == "clip":
        sizes |= {"projection_dim": 24}
        sizes["vision_config"] = VISION | {"projection_dim": 24}
    name = NAMES[family]
    return Case(f"{family}/image-classification", name, name + kind, sizes)


def images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 2, 12, 12, generator=torch.Generator().manual_seed(3))


def differences(theirs: Any, ours: Model) -> tuple[float, float]:
    """Largest relative error of the logits, and of the gradient of any tensor."""
    wanted, found = theirs(images()).logits, ours({"pixel_values": images()})
    return difference(theirs, wanted, ours, found)


@pytest.mark.parametrize("family", NAMES)
def test_logits_gradients_and_files(family: str, tmp_path: Path):
    theirs = build_theirs(case_of(family))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert isinstance(ours.backbone, ImageTower) and not report.missing
    # transformers writes the attention pool of SigLIP, which its classifier does not use.
    assert all(name.startswith(POOL) for name in report.unexpected)
    assert bool(report.unexpected) == (family == "siglip")
    logits, gradients = differences(theirs, ours)
    assert logits <= TOLERANCE and gradients <= 2 * TOLERANCE
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)

    save_ours(ours, tmp_path / "ours")
    kind = getattr(transformers, f"{NAMES[family]}ForImageClassification")
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(images()).logits, theirs(images()).logits)
    before, after = theirs.config.to_dict(), again.config.to_dict()
    (
        after["vision_config"].pop("vision_use_head", None),
        before["vision_config"].pop("vision_use_head", None),
    )
    check_config(before, after)
    assert open_ours(tmp_path / "ours")[1].unexpected == []


@pytest.mark.parametrize("family", NAMES)
def test_a_model_with_both_towers_is_fine_tuned_on_images(family: str, tmp_path: Path):
    pytest.importorskip("PIL")
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 8, "patch_size": 4}
    model = pretrain.build(family, vocab_size=50, eos_id=4, pad_id=1, **sizes)
    model.save(tmp_path / "towers")
    rng = np.random.default_rng(0)
    rows = [
        {"image": rng.integers(0, 90, (8, 8, 3), np.uint8) + 120 * (k % 2), "label": "ab"[k % 2]}
        for k in range(24)
    ]
    runs = []
    for source, name in ((tmp_path / "towers", "path"), (model, "object")):
        run = pretrain.finetune(
            source, rows, task="image-classification", limit="2 steps", batch_rows=8, crop=1.0,
            device="cpu", quiet=True, out=tmp_path / name,
        )  # fmt: skip
        runs.append(run.model.disk_state())
        assert run.model.backbone.model_type == family
        assert not any(key.startswith(("text_model", POOL)) for key in runs[-1])
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())
    run.save(tmp_path / "saved")
    opened = pretrain.load(tmp_path / "saved", quiet=True)
    assert opened.predict(rows[0]["image"]) == run.predict(rows[0]["image"])
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "saved"))
    from PIL import Image

    best = pipe(Image.fromarray(rows[0]["image"]))[0]
    mine = opened.predict(rows[0]["image"])
    assert best["label"] == mine["label"] and best["score"] == pytest.approx(
        mine["score"], abs=1e-5
    )
    with pytest.raises(ModelError, match=r"must be \(images, 3, 8, 8\)"):
        opened({"pixel_values": torch.zeros(1, 3, 16, 16)})


@pytest.mark.parametrize("family", NAMES)
def test_the_body_of_a_tower_opens_again(family: str, tmp_path: Path):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 8, "patch_size": 4}
    model = pretrain.build(family, head="image-classification", labels=2, **sizes)
    model.save(tmp_path / "classifier")
    body = pretrain.load(tmp_path / "classifier", head="none", quiet=True)
    body.save(tmp_path / "body")
    again = pretrain.load(tmp_path / "body", quiet=True)
    assert type(again.backbone) is type(model.backbone) and again.head is None
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert torch.equal(again.eval()(pixels), model.backbone.eval()(pixels))
    headed = pretrain.load(tmp_path / "body", head="image-classification", quiet=True)
    assert type(headed.backbone) is type(model.backbone) and headed.head is not None


@pytest.mark.parametrize("family", NAMES)
def test_the_pooling_of_a_tower_cannot_be_chosen(family: str):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 8, "patch_size": 4}
    model = pretrain.build(family, head="image-classification", labels=["a", "b"], **sizes)
    with pytest.raises(ConfigError, match="always reads the mean of all places"):
        ImageClassification(model, pooling="first")


def test_a_classifier_is_built_from_random_weights_too():
    model = pretrain.build("clip", "tiny", head="image-classification", labels=3, image_size=32)
    assert model({"pixel_values": torch.zeros(2, 3, 32, 32)}).shape == (2, 3)
    assert model.backbone.config.hidden_size == 128 and model.processor.size == (32, 32)
    tower = pretrain.build("vit_mae", "tiny", head="image-classification", image_size=32)
    assert tower.backbone.model_type == "vit"
