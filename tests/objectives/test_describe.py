"""What config.json records about an objective: evaluation builds the same one from it."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from pretrain.models import build
from pretrain.objectives import OBJECTIVES, build_objective

IMAGES: dict[str, Any] = {
    "num_layers": 1, "hidden_size": 16, "num_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
PAIRS = IMAGES | {"vocab_size": 40, "max_positions": 8, "eos_id": 4, "pad_id": 1}
DECODER = {"decoder_num_layers": 1, "decoder_hidden_size": 16, "decoder_num_heads": 2}
AUDIO = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_mel_bins": 16, "max_length": 32}
VIEWS = {
    "crop": 0.5, "flip": True, "randaugment": 3, "projection": 8, "pooling": "first",
}  # fmt: skip
NAMES = ["dark", "bright"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "NextToken": (lambda: tiny.objective("NextToken").model, {}),
    "MaskedLM": (
        lambda: tiny.objective("MaskedLM").model,
        {"rate": 0.3, "eval_rate": 0.2, "mask_share": 0.7, "random_share": 0.2, "final_rate": 0.15},
    ),
    "MaskedImage": (
        lambda: build("vit_mae", **IMAGES, **DECODER),
        {"mask_ratio": 0.5, "norm_pixels": False, "crop": 0.5, "flip": True},
    ),
    "NextPatch": (
        lambda: build("vit", None, **IMAGES),
        {"norm_pixels": False, "crop": 0.5, "flip": True},
    ),
    "LeJEPA": (
        lambda: build("vit", None, **IMAGES),
        VIEWS | {"views": 3, "weight": 0.1, "directions": 2},
    ),
    "SimCLR": (lambda: build("vit", None, **IMAGES), VIEWS | {"temperature": 0.3}),
    "MoCo": (
        lambda: build("vit", None, **IMAGES),
        VIEWS | {"temperature": 0.3, "momentum": 0.9, "freeze_patches": False},
    ),
    "Contrastive": (
        lambda: build("clip", **PAIRS),
        {"crop": 0.5, "flip": True, "randaugment": 3, "label_smoothing": 0.1},
    ),
    "SigmoidContrastive": (
        lambda: build("siglip", **PAIRS),
        {"crop": 0.5, "flip": True, "randaugment": 3},
    ),
    "ImageClassification": (
        lambda: build("vit", head="image-classification", labels=NAMES, **IMAGES),
        {"problem": "multi_label", "threshold": 0.3},
    ),
    "AudioClassification": (
        lambda: build(
            "audio-spectrogram-transformer", head="audio-classification", labels=NAMES, **AUDIO
        ),
        {"problem": "multi_label", "threshold": 0.3},
    ),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_is_rebuilt_from_what_is_recorded_about_it(kind: str) -> None:
    model, options = CASES[kind]
    for given in ({}, options):
        recorded = build_objective(kind, given, model()).describe()
        assert recorded["name"] == kind and given.items() <= recorded.items()
        arguments = {k: v for k, v in recorded.items() if k not in ("name", "task")}
        assert build_objective(kind, arguments, model()).describe() == recorded
