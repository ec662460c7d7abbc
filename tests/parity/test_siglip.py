"""SigLIP against transformers: both towers, scores, loss, gradients, and files in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parity.cases import Case, build_theirs, open_ours, relative, save_ours
from parity.test_clip import TEXT, VISION, check_config, differences
from pretrain.errors import ConfigError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.objectives.contrastive import SigmoidContrastive

SIZES = {
    "text_config": TEXT | {"hidden_size": 32, "projection_size": 48},
    "vision_config": VISION | {"image_size": 14},  # 14 = 3 * 4 + 2
}
SAME = {
    "text_config": TEXT,
    "vision_config": VISION | {"hidden_size": 32, "num_attention_heads": 2},
}
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def batch_of(side: int, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (rows, 12), generator=generator)
    ids[0, 8:] = 1
    return {
        "pixel_values": torch.randn(rows, 2, side, side, generator=generator),
        "input_ids": ids,
    }


@pytest.mark.parametrize(("sizes", "side"), [(SIZES, 14), (SAME, 12)], ids=["projected", "same"])
def test_towers_scores_gradients_and_files(sizes: dict[str, Any], side: int, tmp_path: Path):
    theirs = build_theirs(Case("siglip/none", "Siglip", "SiglipModel", sizes))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert not report.missing and not report.unexpected
    batch, towers = batch_of(side), ours.backbone
    wanted = theirs(**batch, return_loss=True)
    hidden, pooled = towers.encode_images(batch["pixel_values"])
    image = wanted.vision_model_output
    assert relative(hidden.detach(), image.last_hidden_state.detach()) <= TOLERANCE
    assert relative(pooled.detach(), image.pooler_output.detach()) <= TOLERANCE
    hidden, pooled = towers.encode_texts(batch["input_ids"])
    text = wanted.text_model_output
    assert relative(hidden.detach(), text.last_hidden_state.detach()) <= TOLERANCE
    assert relative(pooled.detach(), text.pooler_output.detach()) <= TOLERANCE
    scores, gradients = differences(theirs, ours, SigmoidContrastive, batch)
    assert scores <= TOLERANCE and gradients <= 2 * TOLERANCE

    save_ours(ours, tmp_path / "ours")
    again, info = transformers.SiglipModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits_per_image, wanted.logits_per_image)
    check_config(theirs.config.to_dict(), again.config.to_dict())


def test_a_mask_of_the_texts_is_that_of_transformers(tmp_path: Path):
    theirs = build_theirs(Case("siglip/none", "Siglip", "SiglipModel", SIZES))
    theirs.save_pretrained(tmp_path)
    ours, _ = open_ours(tmp_path)
    ids = batch_of(14)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # on the left, so that the last position is a token
    with torch.no_grad():
        wanted = theirs.text_model(ids, attention_mask=mask).pooler_output
        assert relative(ours.backbone.encode_texts(ids, mask)[1], wanted) <= TOLERANCE


def test_a_fresh_model_opens_in_transformers(tmp_path: Path):
    ours = build("siglip", "tiny", vocab_size=97, max_positions=12, image_size=16, patch_size=4)
    save_ours(ours.eval(), tmp_path)
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = batch_of(14) | {"pixel_values": torch.randn(4, 3, 16, 16)}
    with torch.no_grad():
        wanted = theirs.eval()(**batch).logits_per_image
        found = ours.backbone.scores(*ours.backbone.vectors(batch))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_be_is_refused():
    config = build("siglip", "tiny", device="meta").hf_config()
    config["vision_config"]["vision_use_head"] = False
    with pytest.raises(ConfigError, match="vision_use_head"):
        Model.from_hf_config(config)
    with pytest.raises(ConfigError, match="images are not projected"):
        build("siglip", "tiny", projection_dim=8)
