"""GIT against transformers: logits with and without an image, gradients, a cache, and files in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parity.cases import Case, build_theirs, difference, open_ours, relative, save_ours
from parity.test_clip import VISION, check_config
from pretrain.errors import ConfigError, ModelError
from pretrain.models.base import Model
from pretrain.nn.attention import KVCache

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 3,
    "eos_token_id": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
KINDS = {
    "plain": TEXT | {"vision_config": VISION},
    "tied": TEXT | {"tie_word_embeddings": True, "vision_config": VISION | {"hidden_act": "gelu"}},
}
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def case_of(kind: str = "plain") -> Case:
    return Case("git/causal-lm", "Git", "GitForCausalLM", KINDS[kind])


def batch_of(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(rows, 2, 12, 12, generator=generator),
        "input_ids": torch.randint(5, 90, (rows, 7), generator=generator),
    }


def differences(theirs: Any, ours: Model) -> tuple[float, float]:
    """Largest relative error of the logits of the text, and of the gradient of any tensor."""
    batch = batch_of()
    wanted = theirs(**batch).logits[:, -batch["input_ids"].shape[1] :]
    found = ours(batch)
    return difference(theirs, wanted, ours, found)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_files(kind: str, tmp_path: Path):
    case = case_of(kind)
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert not report.missing and not report.unexpected
    logits, gradients = differences(theirs, ours)
    assert logits <= TOLERANCE and gradients <= 2 * TOLERANCE
    ids = {"input_ids": batch_of()["input_ids"]}
    with torch.no_grad():
        assert relative(ours(ids), theirs(**ids).logits) <= TOLERANCE
    save_ours(ours, tmp_path / "ours")
    again, info = transformers.GitForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch_of()).logits, theirs(**batch_of()).logits)
    check_config(theirs.config.to_dict(), again.config.to_dict())


def test_the_image_is_a_prefix_and_the_text_causal(tmp_path: Path):
    build_theirs(case_of()).save_pretrained(tmp_path)
    ours, _ = open_ours(tmp_path)
    batch = batch_of()
    with torch.no_grad():
        whole = ours(batch)
        later = {**batch, "input_ids": batch["input_ids"].clone()}
        later["input_ids"][:, 4:] = 9
        assert torch.equal(ours(later)[:, :4], whole[:, :4])
        other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
        assert not torch.allclose(ours(other)[0], whole[0])
        cache, found = KVCache(32), []
        first = {**batch, "input_ids": batch["input_ids"][:, :3]}
        found.append(ours(first, cache=cache))
        for t in range(3, 7):
            step = {
                "input_ids": batch["input_ids"][:, t : t + 1],
                "position_ids": torch.tensor([[t]]),
            }
            found.append(ours(step, cache=cache))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="one image in each row"):
        ours({**batch, "document_ids": torch.ones(3, 7, dtype=torch.long)})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(side: str, tmp_path: Path):
    theirs = build_theirs(case_of())
    theirs.save_pretrained(tmp_path)
    ours, _ = open_ours(tmp_path)
    batch = batch_of()
    real = torch.ones_like(batch["input_ids"])
    real[1, slice(3) if side == "left" else slice(-3, None)] = 0
    other = {**batch, "input_ids": batch["input_ids"].where(real != 0, 0)}
    with torch.no_grad():
        found = ours({**batch, "attention_mask": real})[real != 0]
        assert torch.equal(ours({**other, "attention_mask": real.bool()})[real != 0], found)
        wanted = theirs(**batch, attention_mask=real).logits[:, -7:][real != 0]
    assert relative(found, wanted) <= TOLERANCE
    with pytest.raises(ModelError, match="attention_mask has the shape"):
        ours({**batch, "attention_mask": real[:, 1:]})


def test_several_frames_are_refused():
    config = {"model_type": "git", "num_image_with_embedding": 6, **KINDS["plain"]}
    with pytest.raises(ConfigError, match="num_image_with_embedding"):
        Model.from_hf_config(config)
