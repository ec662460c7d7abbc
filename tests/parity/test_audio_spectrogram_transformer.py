"""Our AST against transformers': hidden states, logits, gradients, files in both directions, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parity.cases import Case, build_theirs, difference, open_ours, save_ours
from parity.test_vit import on_disk
from pretrain.errors import ConfigError, ModelError
from pretrain.models import build
from pretrain.models.base import Model

TOLERANCE = 1e-5
FAMILY = "audio-spectrogram-transformer"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
    "num_mel_bins": 20,
    "max_length": 34,
    "frequency_stride": 5,
    "time_stride": 6,
}
CASES = [
    Case(f"{FAMILY}/audio-classification", "AST", "ASTForAudioClassification", SIZES),
    Case(f"{FAMILY}/none", "AST", "ASTModel", SIZES),
    Case(
        f"{FAMILY}/audio-classification/plain",
        "AST",
        "ASTForAudioClassification",
        SIZES
        | {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "time_stride": 8},
    ),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def outputs(theirs: Any, ours: Model) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn((3, 34, 20), generator=torch.Generator().manual_seed(1))
    found = theirs(input_values=x)
    wanted = found.logits if "logits" in found else found.last_hidden_state
    return ours({"input_values": x}), wanted


def differences(theirs: Any, ours: Model) -> tuple[float, float]:
    """Largest relative error of the outputs, and of the gradient of any tensor; see ``parity.cases.compare``."""
    mine, wanted = outputs(theirs, ours)
    return difference(theirs, wanted, ours, mine, on_disk)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_outputs_gradients_and_files(case: Case, tmp_path: Path) -> None:
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert report.missing == [] and report.unexpected == []
    assert max(differences(theirs, ours)) <= TOLERANCE
    save_ours(ours, tmp_path / "ours")
    architecture = getattr(transformers, case.architecture)
    again, info = architecture.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(outputs(again.eval(), ours)[1], outputs(theirs, ours)[1])
    before, after = theirs.config.to_dict(), again.config.to_dict()
    for key in set(before) - {"transformers_version", "_name_or_path"}:
        assert before[key] == after.get(key), key


def test_a_pre_trained_encoder_opens_in_transformers(tmp_path: Path) -> None:
    ours = build(
        FAMILY,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        patch_size=4,
        num_mel_bins=8,
        max_length=16,
    )
    assert ours.head_kind == "masked-image"
    save_ours(ours, tmp_path)
    theirs, info = transformers.ASTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and all("decoder" in key for key in info["unexpected_keys"])
    x = torch.randn(2, 16, 8)
    with torch.no_grad():
        wanted = theirs.eval()(input_values=x).last_hidden_state
        torch.testing.assert_close(
            ours.eval().backbone({"input_values": x}), wanted, rtol=1e-5, atol=1e-5
        )
    again, report = open_ours(tmp_path)
    assert not report.missing and again.head_kind == "masked-image"
    assert torch.equal(again({"input_values": x}), ours({"input_values": x}))


def test_what_is_not_implemented_is_refused() -> None:
    config = {"model_type": FAMILY, "architectures": ["ASTModel"], **SIZES}
    assert Model.from_hf_config(config | {"patch_size": [8, 8]}).backbone.config.patch_size == 8
    with pytest.raises(ConfigError, match="patch_size"):
        Model.from_hf_config(config | {"patch_size": [8, 4]})
    with pytest.raises(ConfigError, match="no patch"):
        Model.from_hf_config(config | {"patch_size": 24})
    with pytest.raises(ConfigError, match="must lie side by side"):
        Model.from_hf_config(config | {"architectures": ["ASTForPreTraining"]})
    model = Model.from_hf_config(config).materialize()
    with pytest.raises(ModelError, match=r"shape \(2, 20, 34\).*34 frames, 20 mel bands"):
        model({"input_values": torch.zeros(2, 20, 34)})
