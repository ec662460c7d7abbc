"""ViT-MAE against transformers: logits, loss and gradients with the same hidden patches, files in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity.cases import Case, build_theirs, gradient_error, open_ours, relative, save_ours
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.objectives.masked_image import MaskedImage

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 12,
    "patch_size": 3,
    "num_channels": 2,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 40,
}
CASES = [
    Case("vit_mae/masked-image", "ViTMAE", "ViTMAEForPreTraining", SIZES),
    Case(
        "vit_mae/masked-image",
        "ViTMAE",
        "ViTMAEForPreTraining",
        SIZES | {"norm_pix_loss": True, "mask_ratio": 0.6, "qkv_bias": False, "hidden_act": "relu"},
    ),
]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def images(rows: int = 3) -> tuple[Tensor, Tensor]:
    """Images, and the noise that chooses the visible patches."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 2, 12, 12, generator=generator), torch.rand(
        rows, 16, generator=generator
    )


def batch_of(pixels: Tensor, noise: Tensor, model: Any) -> dict[str, Tensor]:
    """Our batch with the patches that transformers leaves visible."""
    order, kept = noise.argsort(dim=1), model.backbone.config.num_visible
    visible, hidden = (part.sort(dim=1).values for part in (order[:, :kept], order[:, kept:]))
    return {"pixel_values": pixels, "visible_index": visible, "hidden_index": hidden}


def differences(theirs: Any, ours: Model) -> tuple[float, float]:
    """Largest relative error of the predicted pixels, and of the gradient of the loss of any tensor."""
    pixels, noise = images()
    batch = batch_of(pixels, noise, ours)
    wanted, loss = theirs(pixels, noise=noise), MaskedImage(ours)(batch)
    wanted.loss.backward()
    (loss.total / loss.count).backward()
    # Names in memory differ from those on disk in transformers 5; its own table of names is not public.
    gradients = {
        name.replace("vit.layers.", "vit.encoder.layer.")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("attention.o_proj", "attention.output.dense")
        .replace("mlp.fc1", "intermediate.dense")
        .replace("mlp.fc2", "output.dense"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    del batch["hidden_index"]  # theirs has all pixels
    return relative(ours(batch).detach(), wanted.logits.detach()), gradient_error(ours, gradients)


@pytest.mark.parametrize("case", CASES, ids=["pixels", "normalised"])
def test_logits_loss_gradients_and_files(case: Case, tmp_path: Path):
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert not report.missing and not report.unexpected
    assert max(differences(theirs, ours)) <= TOLERANCE
    pixels, noise = images()
    with torch.no_grad():
        wanted, loss = theirs(pixels, noise=noise), MaskedImage(ours)(batch_of(pixels, noise, ours))
    assert int(loss.count) == int(wanted.mask.sum())
    assert relative(loss.total / loss.count, wanted.loss) <= TOLERANCE

    save_ours(ours, tmp_path / "ours")
    again, info = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels, noise=noise).logits, wanted.logits)
    before, after = theirs.config.to_dict(), again.config.to_dict()
    for key in set(before) - {"transformers_version", "_name_or_path"}:
        assert before[key] == after.get(key), key


def test_files_with_the_names_of_transformers_4_and_5(tmp_path: Path):
    """5.23 writes the decoder as decoder_encoder.layer, 4 as decoder_layers; both open, and we write the latter."""
    theirs = build_theirs(CASES[0])
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ours, _ = open_ours(tmp_path)
    assert any(name.startswith("decoder.decoder_layers.0.") for name in ours.disk_state())
    old = {
        name.replace("decoder_encoder.layer.", "decoder_layers."): value
        for name, value in stored.items()
    }
    assert set(old) == set(ours.disk_state())
    parallel = {f"module.{name}": value for name, value in stored.items()}
    for names in (stored, old, parallel):
        save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again, report = open_ours(tmp_path)
        assert not report.missing and not report.unexpected
        assert all(torch.equal(a, b) for a, b in zip(again.buffers(), ours.buffers(), strict=True))


def test_a_fresh_model_opens_in_transformers(tmp_path: Path):
    ours = build("vit_mae", "tiny", image_size=28, patch_size=4, num_channels=1).eval()
    save_ours(ours, tmp_path)
    theirs, info = transformers.AutoModelForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels, noise = torch.randn(2, 1, 28, 28), torch.rand(2, 49)
    with torch.no_grad():
        wanted = theirs.eval()(pixels, noise=noise)
        batch = batch_of(pixels, noise, ours)
        del batch["hidden_index"]  # theirs has all pixels
        found = ours(batch)
    torch.testing.assert_close(found, wanted.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_the_encoder_opens_as_a_vit_of_transformers(kind: str, tmp_path: Path):
    """A pooler or a classifier is new, the decoder is not used, and nothing else is said."""
    ours = build("vit_mae", "tiny", image_size=28, patch_size=4, num_channels=1).eval()
    save_ours(ours, tmp_path)
    config = transformers.ViTConfig(**{
        key: value
        for key, value in json.loads((tmp_path / "config.json").read_text()).items()
        if key not in ("model_type", "architectures", "torch_dtype")
    })  # fmt: skip
    theirs, info = getattr(transformers, kind).from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    new = ("pooler.", "classifier.")
    assert all(key.startswith(new) for key in info["missing_keys"])
    assert all(key.startswith("decoder.") for key in info["unexpected_keys"])
    pixels = torch.randn(2, 1, 28, 28)
    body = theirs if kind == "ViTModel" else theirs.vit
    with torch.no_grad():
        wanted = body.eval()(pixels).last_hidden_state
        found = ours.backbone({"pixel_values": pixels})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
