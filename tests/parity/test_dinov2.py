"""DINOv2, with and without registers, against transformers: outputs, gradients, files, other sizes, pixel values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import pretrain
from parity.cases import (
    Case,
    backward_in_one_direction,
    build_theirs,
    gradient_error,
    open_ours,
    relative,
    save_ours,
)
from pretrain.errors import ConfigError
from pretrain.models.base import Model

TOLERANCE = 1e-5
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 3,
    "image_size": 32,
    "patch_size": 8,
    "layerscale_value": 0.7,
}
GATED = {"use_swiglu_ffn": True, "qkv_bias": False, "use_mask_token": False, "num_channels": 1}


def case_of(head: str, registers: bool = False, variant: str = "", **options: Any) -> Case:
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    family = "dinov2_with_registers" if registers else "dinov2"
    kind = "ForImageClassification" if head != "none" else "Model"
    return Case(f"{family}/{head}{variant}", name, name + kind, SIZES | options)


CASES = [
    case_of("image-classification"),
    case_of("none"),
    case_of("image-classification", variant="/gated", **GATED),
    case_of("image-classification", registers=True),
    case_of("none", registers=True, variant="/gated", use_swiglu_ffn=True, num_register_tokens=3),
]
# Parameters in the memory of transformers -> names in files.
ON_DISK = {
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.down_proj": "mlp.weights_out",
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pixels(case: Case, height: int = 32, width: int = 32) -> Tensor:
    shape = (3, case.options.get("num_channels", 3), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def answer(theirs: Any, x: Tensor) -> Tensor:
    found = theirs(pixel_values=x)
    out: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return out


def gradients(theirs: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            for pattern, disk in ON_DISK.items():
                name = re.sub(pattern, disk, name)
            found[name] = parameter.grad
    for name in [name for name in found if ".gate_proj." in name]:
        parts = (found.pop(name), found.pop(name.replace("gate_proj", "up_proj")))
        found[name.replace("gate_proj", "weights_in")] = torch.cat(parts)
    return found


def differences(theirs: Any, ours: Model, x: Tensor) -> tuple[float, float]:
    """Largest relative error of the outputs, and of the gradient of any tensor; see ``parity.cases.compare``."""
    mine, wanted = ours({"pixel_values": x}), answer(theirs, x)
    backward_in_one_direction((theirs, wanted), (ours, mine))
    return relative(mine.detach(), wanted.detach()), gradient_error(ours, gradients(theirs))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_outputs_gradients_and_files(case: Case, tmp_path: Path) -> None:
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert report.missing == [] and report.unexpected == []
    for height, width in ((32, 32), (48, 40), (16, 24)):  # positions for larger and smaller grids
        assert max(differences(theirs, ours, pixels(case, height, width))) <= TOLERANCE
    save_ours(ours, tmp_path / "ours")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(value, stored[1][name]) for name, value in stored[0].items())
    architecture = getattr(transformers, case.architecture)
    again, info = architecture.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(answer(again.eval(), pixels(case)), answer(theirs, pixels(case)))
    before, after = theirs.config.to_dict(), again.config.to_dict()
    for key in set(before) - {"transformers_version", "_name_or_path"}:
        assert before[key] == after.get(key), key


def test_a_sub_layer_is_left_out_for_whole_images() -> None:
    """In training alone; what is kept is scaled, so that the mean stays."""
    config = {"model_type": "dinov2", "architectures": ["Dinov2Model"], **SIZES}
    model = Model.from_hf_config(config | {"drop_path_rate": 0.5}).materialize()
    block: Any = model.backbone.blocks()[0]
    x = torch.ones(4000, 2, 3)
    assert torch.equal(block.eval()._kept(x), x)
    torch.manual_seed(0)
    kept = block.train()._kept(x)
    assert sorted(kept.unique().tolist()) == [0.0, 2.0]
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept)) and abs(kept.mean() - 1) < 0.05


def test_the_published_processor_and_a_directory_that_names_none(tmp_path: Path) -> None:
    """The settings of the published checkpoints: the shorter side to 256, the middle of 224."""
    pytest.importorskip("PIL")
    build_theirs(CASES[0]).save_pretrained(tmp_path)
    written = {
        "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
        "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
        "do_resize": True, "rescale_factor": 0.00392156862745098,
    }  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (300, 410, 3), np.uint8)
    for kind in ({"image_processor_type": "BitImageProcessor"}, {}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(written | kind))
        ours = pretrain.load(tmp_path, quiet=True)
        theirs = transformers.BitImageProcessorPil(**written)
        wanted = theirs(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours.processor([image])["pixel_values"], wanted)
        ours.save(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
        assert saved["image_processor_type"] == "BitImageProcessor"
        assert all(saved[key] == value for key, value in written.items())


def test_what_is_not_possible_is_refused() -> None:
    config = {"model_type": "dinov2", "architectures": ["Dinov2Model"], **SIZES}
    for change, message in (
        ({"mlp_ratio": 0}, "mlp_ratio of the model is 0"),
        ({"mlp_ratio": 2.5}, "'mlp_ratio' is 2.5; it must be a whole number"),
        ({"drop_path_rate": 1.0}, "drop_path_rate of the model is 1.0; it must be below 1"),
        ({"image_size": [32, 48]}, "only squares"),
        ({"patch_size": 64}, "no patch"),
    ):
        with pytest.raises(ConfigError, match=message):
            Model.from_hf_config(config | change)
    with pytest.raises(ConfigError, match="change mlp_ratio"):
        pretrain.build("dinov2", "tiny", intermediate_size=100)
    with pytest.raises(ConfigError, match="must be true"):
        pretrain.build("dinov2_with_registers", "tiny", use_mask_token=False)
