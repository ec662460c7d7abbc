"""CLIP against transformers: both towers, scores, loss, gradients, and files in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parity.cases import Case, build_theirs, gradient_error, open_ours, relative, save_ours
from pretrain.errors import ConfigError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.objectives.contrastive import Contrastive

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
}
SIZES = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 24}
OLD = SIZES | {"text_config": TEXT | {"eos_token_id": 2}}  # pooled at the largest id
GELU = {
    "text_config": TEXT | {"hidden_act": "gelu", "eos_token_id": 4, "pad_token_id": 4},
    "vision_config": VISION | {"hidden_act": "gelu"},
    "projection_dim": 24,
}
KINDS = {"quick-gelu": SIZES, "largest-id": OLD, "gelu": GELU}
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def case_of(kind: str) -> Case:
    return Case("clip/none", "CLIP", "CLIPModel", KINDS[kind])


def batch_of(kind: str, rows: int = 5) -> dict[str, Tensor]:
    """Images, and texts of unequal length with an end token and padding after it."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(rows, 2, 12, 12, generator=generator)
    ids = torch.randint(5, 90, (rows, 10), generator=generator)
    pad = KINDS[kind]["text_config"]["pad_token_id"]
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, 9 - row] = 96 if kind == "largest-id" else 4
        ids[row, 10 - row :] = pad
        mask[row, 10 - row :] = 0
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


def differences(theirs: Any, ours: Model, objective: Any, batch: Any) -> tuple[float, float]:
    """Largest relative error of scores and loss, and of the gradient of the loss of any tensor."""
    wanted, loss = theirs(**batch, return_loss=True), objective(ours)(batch)
    scores = ours.backbone.scores(*ours.backbone.vectors(batch))
    mean = loss.total / loss.count
    wanted.loss.backward()
    mean.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    error = relative(scores.detach(), wanted.logits_per_image.detach())
    error = max(error, relative(mean.detach(), wanted.loss.detach()))
    return error, gradient_error(ours, gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_towers_scores_gradients_and_files(kind: str, tmp_path: Path):
    case, batch = case_of(kind), batch_of(kind)
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert not report.missing and not report.unexpected
    wanted = theirs(**batch, return_loss=True)
    towers: Any = ours.backbone
    hidden, pooled = towers.encode_images(batch["pixel_values"])
    image = theirs.vision_model(batch["pixel_values"])
    assert relative(hidden.detach(), image.last_hidden_state.detach()) <= TOLERANCE
    assert relative(pooled.detach(), image.pooler_output.detach()) <= TOLERANCE
    hidden, pooled = towers.encode_texts(batch["input_ids"], batch["attention_mask"])
    text = theirs.text_model(batch["input_ids"], attention_mask=batch["attention_mask"])
    real = batch["attention_mask"].bool()
    assert relative(hidden[real].detach(), text.last_hidden_state[real].detach()) <= TOLERANCE
    assert relative(pooled.detach(), text.pooler_output.detach()) <= TOLERANCE
    images, texts = towers.vectors(batch)
    assert relative(images.detach(), wanted.image_embeds.detach()) <= TOLERANCE
    assert relative(texts.detach(), wanted.text_embeds.detach()) <= TOLERANCE
    assert torch.equal(ours(batch), torch.cat((images, texts)))
    scores, gradients = differences(theirs, ours, Contrastive, batch)
    assert scores <= TOLERANCE and gradients <= 2 * TOLERANCE

    save_ours(ours, tmp_path / "ours")
    again, info = transformers.CLIPModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits_per_image, wanted.logits_per_image)
    check_config(theirs.config.to_dict(), again.config.to_dict())


def check_config(before: dict[str, Any], after: dict[str, Any]) -> None:
    """All keys survive, but projection_dim of the towers, which is that of the model."""
    ignored = {"transformers_version", "_name_or_path", "dtype", "architectures"}
    for key in set(before) - ignored:
        if key in ("text_config", "vision_config"):
            check_config(
                {k: v for k, v in before[key].items() if k != "projection_dim"}, after[key]
            )
        else:
            assert before[key] == after.get(key), key


@pytest.mark.parametrize("part", ["CLIPTextModel", "CLIPVisionModel"])
def test_a_tower_opens_alone_in_transformers(part: str, tmp_path: Path):
    ours, _ = _saved(tmp_path)
    save_ours(ours, tmp_path / "ours")
    theirs, info = getattr(transformers, part).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    batch, towers = batch_of("quick-gelu"), ours.backbone
    with torch.no_grad():
        if part == "CLIPTextModel":
            wanted = theirs.eval()(batch["input_ids"]).pooler_output
            found = towers.encode_texts(batch["input_ids"])[1]
        else:
            wanted = theirs.eval()(batch["pixel_values"]).pooler_output
            found = towers.encode_images(batch["pixel_values"])[1]
    assert relative(found, wanted) <= TOLERANCE


def _saved(folder: Path) -> tuple[Any, Any]:
    build_theirs(case_of("quick-gelu")).save_pretrained(folder)
    return open_ours(folder)


def test_a_fresh_model_opens_in_transformers(tmp_path: Path):
    ours = build("clip", "tiny", vocab_size=97, eos_id=4, image_size=16, patch_size=4).eval()
    save_ours(ours, tmp_path)
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = batch_of("quick-gelu") | {"pixel_values": torch.randn(5, 3, 16, 16)}
    with torch.no_grad():
        wanted = theirs.eval()(**batch).logits_per_image
        found = ours.backbone.scores(*ours.backbone.vectors(batch))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_towers_that_differ_where_they_cannot_are_refused(tmp_path: Path):
    _saved(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    with pytest.raises(ConfigError, match="'hidden_act' is 'gelu' in vision_config"):
        Model.from_hf_config(config)
