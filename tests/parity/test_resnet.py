"""Residual networks against transformers: logits, gradients, running statistics, and files in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parity.cases import Case, build_theirs, difference, open_ours, save_ours
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.nn.buffers import stored_tensors

BASIC = {
    "num_channels": 2,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [2, 1],
    "layer_type": "basic",
}
WIDE = BASIC | {"hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"}
KINDS = {
    "basic": BASIC,
    "bottleneck": WIDE,
    "bottleneck-early-stride": WIDE | {"downsample_in_bottleneck": True, "hidden_act": "gelu"},
    "first-stage-halved": BASIC | {"downsample_in_first_stage": True},
}
CASES = [
    Case("resnet/image-classification", "ResNet", "ResNetForImageClassification", options)
    for options in KINDS.values()
]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def theirs_of(case: Case) -> Any:
    """A model of transformers whose running statistics are not those of a fresh one."""
    model = build_theirs(case)
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        else:
            buffer.fill_(7)
        assert "running" in name or "tracked" in name
    return model


def images() -> Tensor:
    return torch.randn(4, 2, 34, 30, generator=torch.Generator().manual_seed(3))


def differences(theirs: Any, ours: Model) -> tuple[float, float]:
    """Largest relative error of the logits, and of the gradient of any tensor."""
    wanted, found = theirs(images()).logits, ours({"pixel_values": images()})
    return difference(theirs, wanted, ours, found)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", CASES, ids=list(KINDS))
def test_logits_gradients_statistics_and_files(case: Case, training: bool, tmp_path: Path):
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert not report.missing and not report.unexpected
    theirs.train(training), ours.train(training)
    logits, gradients = differences(theirs, ours)
    assert logits <= TOLERANCE and gradients <= 2 * TOLERANCE
    after, state = ours.disk_state(), theirs.state_dict()
    assert set(after) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
    assert int(after["resnet.embedder.embedder.normalization.num_batches_tracked"]) == 7 + training

    save_ours(ours, tmp_path / "ours")
    again, info = transformers.ResNetForImageClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again.load_state_dict({k: v for k, v in after.items() if k in state})
    for name, value in again.state_dict().items():
        assert torch.equal(value, after[name]), name
    before, config = theirs.config.to_dict(), again.config.to_dict()
    for key in set(before) - {"transformers_version", "_name_or_path"}:
        assert before[key] == config.get(key), key


@pytest.mark.parametrize("size", ["18", "34", "50"])
def test_published_sizes_are_those_of_transformers(size: str):
    """The number of parameters of the published networks, counted by torchvision's documentation too."""
    model = build("resnet", size, head="image-classification", labels=1000, device="meta")
    millions = {"18": 11_689_512, "34": 21_797_672, "50": 25_557_032}
    assert model.num_parameters() == millions[size]
    config = transformers.ResNetConfig(**{
        key: value
        for key, value in model.hf_config().items()
        if key not in ("model_type", "architectures", "torch_dtype")
    })  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.ResNetForImageClassification(config)
    wanted = {name: value.shape for name, value in theirs.state_dict().items()}
    tensors = stored_tensors(model)
    found = {entry.disk: tensors[entry.memory[0]].shape for entry in model.entries()}
    assert found == wanted


def test_the_body_alone(tmp_path: Path):
    case = Case("resnet/none", "ResNet", "ResNetModel", WIDE)
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path)
    ours, report = open_ours(tmp_path)
    assert not report.missing and not report.unexpected and ours.head is None
    with torch.no_grad():
        wanted = theirs(images()).last_hidden_state
        found = ours({"pixel_values": images()})
    torch.testing.assert_close(found, wanted.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
