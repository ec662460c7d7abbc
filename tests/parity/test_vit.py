"""Our ViT against transformers': hidden states, logits, gradients, files in both directions, images of other sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parity.cases import Case, build_theirs, difference, open_ours, save_ours
from pretrain.errors import ConfigError, ModelError
from pretrain.models import build
from pretrain.models.base import Model

TOLERANCE = 1e-5
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 8,
}
CASES = [
    Case("vit/image-classification", "ViT", "ViTForImageClassification", SIZES),
    Case("vit/none", "ViT", "ViTModel", SIZES),
    Case(
        "vit/image-classification/plain",
        "ViT",
        "ViTForImageClassification",
        SIZES | {"qkv_bias": False, "hidden_act": "gelu_new", "num_channels": 1},
    ),
    Case(
        "vit/image-classification/odd",
        "ViT",
        "ViTForImageClassification",
        SIZES | {"image_size": 27, "layer_norm_eps": 1e-5},
    ),
]
# Parameters of transformers 5 -> the names that all versions of it write.
ON_DISK = {
    r"layers\.(\d+)\.attention\.([qkv])_proj": r"encoder.layer.\1.attention.attention.\2",
    r"layers\.(\d+)\.attention\.o_proj": r"encoder.layer.\1.attention.output.dense",
    r"layers\.(\d+)\.mlp\.fc1": r"encoder.layer.\1.intermediate.dense",
    r"layers\.(\d+)\.mlp\.fc2": r"encoder.layer.\1.output.dense",
    r"(?<!encoder\.)layers\.(\d+)\.layernorm": r"encoder.layer.\1.layernorm",
}
WORDS = {"q": "query", "k": "key", "v": "value"}


def on_disk(name: str) -> str:
    for pattern, disk in ON_DISK.items():
        name = re.sub(pattern, disk, name)
    return re.sub(
        r"attention\.attention\.([qkv])\b", lambda m: f"attention.attention.{WORDS[m[1]]}", name
    )


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pixels(case: Case, height: int = 0, width: int = 0) -> torch.Tensor:
    size, channels = case.options["image_size"], case.options.get("num_channels", 3)
    shape = (3, channels, height or size, width or size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outputs(theirs: Any, ours: Model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = theirs(pixel_values=x, interpolate_pos_encoding=True)
    wanted = found.logits if "logits" in found else found.last_hidden_state
    return ours({"pixel_values": x}), wanted


def differences(theirs: Any, ours: Model, x: torch.Tensor) -> tuple[float, float]:
    """Largest relative error of the outputs, and of the gradient of any tensor; see ``parity.cases.compare``."""
    mine, wanted = outputs(theirs, ours, x)
    return difference(theirs, wanted, ours, mine, on_disk)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_outputs_gradients_and_files(case: Case, tmp_path: Path) -> None:
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert report.missing == [] and [n for n in report.unexpected if "pooler" not in n] == []
    size = case.options["image_size"]
    for height, width in ((size, size), (size + 8, size + 16)):
        if case.label.endswith("odd") and height != size:
            continue  # transformers rounds the grid of such images in another way
        worst = differences(theirs, ours, pixels(case, height, width))
        assert max(worst) <= TOLERANCE
    save_ours(ours, tmp_path / "ours")
    architecture = getattr(transformers, case.architecture)
    again, info = architecture.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert [k for k in info["missing_keys"] if "pooler" not in k] == []
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    x = pixels(case)
    with torch.no_grad():
        assert torch.equal(outputs(again.eval(), ours, x)[1], outputs(theirs, ours, x)[1])
    before, after = theirs.config.to_dict(), again.config.to_dict()
    for key in set(before) - {"transformers_version", "_name_or_path"}:
        assert before[key] == after.get(key), key


def test_transformers_does_not_take_a_classifier_of_the_mean_for_its_own(tmp_path: Path) -> None:
    mean = build(
        "vit", head="image-classification", labels=3, pooling="mean", hidden_size=32, num_heads=2,
        num_layers=1, image_size=16, patch_size=8,
    )  # fmt: skip
    save_ours(mean, tmp_path)
    _, info = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert "classifier.weight" in info["missing_keys"]
    again, report = open_ours(tmp_path)
    assert not report.missing and again.backbone.config.pooling == "mean"
    x = {"pixel_values": torch.randn(2, 3, 16, 16)}
    wanted = mean.head.classifier(mean.backbone(x)[:, 1:].mean(1))
    torch.testing.assert_close(again(x), wanted)


def test_what_is_not_implemented_is_refused() -> None:
    config = {"model_type": "vit", "architectures": ["ViTModel"], **SIZES}
    assert Model.from_hf_config(config | {"image_size": [24, 24]}).backbone.config.image_size == 24
    for sides in ([24, 32], [24, 24, 24], [24, "24"], [24], []):
        with pytest.raises(ConfigError, match="image_size"):
            Model.from_hf_config(config | {"image_size": sides})
    with pytest.raises(ConfigError, match="no patch"):
        Model.from_hf_config(config | {"patch_size": 32})
    model = Model.from_hf_config(config).materialize()
    with pytest.raises(ModelError, match=r"shape \(2, 1, 24, 24\).* 3 channels"):
        model({"pixel_values": torch.zeros(2, 1, 24, 24)})
    with pytest.raises(ModelError, match="less than one patch"):
        model({"pixel_values": torch.zeros(2, 3, 24, 7)})


@pytest.mark.parametrize("size", [(24, 24), (32, 40)])
def test_the_attention_that_the_report_shows(size: tuple[int, int], tmp_path: Path) -> None:
    """That of the class token in the last block, mean over heads."""
    case = CASES[0]
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.set_attn_implementation("eager")
    ours, _ = open_ours(tmp_path / "theirs")
    x = pixels(case, *size)
    found = theirs(pixel_values=x, interpolate_pos_encoding=True, output_attentions=True)
    wanted = found.attentions[-1].mean(1)[:, 0, 1:].reshape(3, size[0] // 8, size[1] // 8)
    assert torch.allclose(ours.train().backbone.attention_map(x), wanted, atol=1e-6)
    assert ours.backbone.training
