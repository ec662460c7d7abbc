"""Adapters of models of images against peft, whose names of modules are those in the memory of transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from parity import test_dinov2, test_image_towers, test_vit
from parity.cases import Case, build_theirs
from parity.test_peft import shake
from pretrain.checkpoint import load
from pretrain.lora import LoraConfig, apply_lora, load_adapter, save_adapter

peft = pytest.importorskip("peft")
CASES = {
    "vit": test_vit.CASES[0],
    "vit-body": Case("vit/none", "ViT", "ViTModel", test_vit.CASES[0].options),
    "dinov2": test_dinov2.CASES[0],
    "clip": test_image_towers.case_of("clip"),
}
TOLERANCE = 1e-5


def images_of(model: Any) -> torch.Tensor:
    config = model.backbone.config
    shape = (3, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def gap(theirs: Any, ours: Any) -> float:
    pixels = images_of(ours)
    with torch.no_grad():
        out = (theirs.base_model.model if isinstance(theirs, peft.PeftModel) else theirs)(pixels)
        wanted = out.logits if "logits" in out else out.last_hidden_state
        return float((wanted - ours.eval()({"pixel_values": pixels})).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_ours_opens_there_and_theirs_here(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    transformers.logging.set_verbosity_error()
    build_theirs(case).save_pretrained(tmp_path / "base")
    kind = getattr(transformers, case.architecture)

    ours = load(tmp_path / "base", quiet=True)
    saved = () if name == "vit-body" else ("classifier",)
    renamed = name != "clip"
    attention = ("query", "value") if renamed else ("q_proj", "v_proj")
    shake(apply_lora(ours, LoraConfig(r=4, targets=attention)))
    path = save_adapter(ours, tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    if renamed:
        assert config["target_modules"] == ["q_proj", "v_proj"]
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), path).eval()
    assert gap(theirs, ours) < TOLERANCE
    assert gap(kind.from_pretrained(tmp_path / "base").eval(), ours) > 1e-3

    # Of a body peft would adapt the pooler too, which nobody reads.
    parts = "all-linear" if saved else ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    made = peft.LoraConfig(
        r=3, target_modules=parts, modules_to_save=list(saved) or None,
        rank_pattern={"q_proj": 2}, alpha_pattern={"fc1": 5},
    )  # fmt: skip
    theirs = shake(peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), made)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    opened = load_adapter(tmp_path / "theirs", base=tmp_path / "base")
    assert gap(theirs, opened) < TOLERANCE
    again = save_adapter(opened, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), again).eval()
    assert gap(back, opened) < TOLERANCE


def test_the_names_of_files_are_read_too(tmp_path: Path) -> None:
    """As peft on transformers 4, and earlier versions of this package, have written them."""
    build_theirs(CASES["vit"]).save_pretrained(tmp_path / "base")
    ours = shake(apply_lora(load(tmp_path / "base", quiet=True), LoraConfig(r=4)))
    path = save_adapter(ours, tmp_path / "adapter")
    tensors, renamed = load_file(path / "adapter_model.safetensors"), {}
    for key, value in tensors.items():
        for disk, name in type(ours.backbone).modules_of_peft.items():
            for n in range(ours.backbone.config.num_layers):
                key = key.replace(f"vit.{name}.".format(n=n), f"vit.{disk}.".format(n=n))
        renamed[key] = value
    assert any("encoder.layer.0.attention.attention.query.lora_A" in key for key in renamed)
    assert not any(key in renamed for key in tensors if "lora" in key)
    (path / "manifest.json").unlink(missing_ok=True)
    save_file(renamed, path / "adapter_model.safetensors")
    again = load_adapter(path, base=tmp_path / "base")
    batch = {"pixel_values": images_of(ours)}
    assert torch.equal(again.eval()(batch), ours.eval()(batch))
