"""What the families of images and spectrograms share: the vector that a classifier reads, and who may use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.errors import ModelError
from pretrain.exporting import onnx
from pretrain.models import build
from pretrain.models.heads import SequenceHead
from pretrain.objectives import build_objective
from pretrain.objectives.views import LeJEPA, MoCo

SIZES = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 8, "patch_size": 4}
SOUNDS = {"max_length": 24, "num_mel_bins": 16, "patch_size": 8}


def classifier(family: str, **options: Any) -> Any:
    audio = family == "audio-spectrogram-transformer"
    kind = "audio-classification" if audio else "image-classification"
    sizes = SIZES | (SOUNDS if audio else IMAGES) | options
    return build(family, head=kind, labels=("a", "b"), **sizes).eval()


@pytest.mark.parametrize("family", ["vit", "clip", "siglip", "audio-spectrogram-transformer"])
@pytest.mark.parametrize("pooling", ["", "mean"])
def test_features_are_what_the_classifier_reads(family: str, pooling: str):
    if pooling and family != "vit":
        pytest.skip("the classifiers of this family read one thing")
    model = classifier(family, **({"pooling": pooling} if pooling else {}))
    batch = model.backbone.random_batch(torch.Generator().manual_seed(0))
    hidden = model.backbone(batch)
    assert isinstance(model.head, SequenceHead)
    read = model.head._pool(hidden, batch)
    torch.testing.assert_close(model.backbone.pooled(hidden), read)
    patches = hidden[:, model.backbone.lead_tokens :].mean(1)
    torch.testing.assert_close(model.backbone.pooled(hidden, "mean"), patches)


def test_a_model_of_audio_is_not_taken_for_one_of_images():
    model = build("audio-spectrogram-transformer", **SIZES, **SOUNDS)
    with pytest.raises(ModelError, match="needs a model of images without a head"):
        LeJEPA(model)
    with pytest.raises(ModelError, match="ONNX"):
        onnx.check(model)


def test_a_copy_of_the_model_rules_out_tensor_parallelism():
    model = build("vit", **SIZES, **IMAGES, num_channels=1)
    assert model.backbone.config.possible_tp() == [1, 2]
    assert MoCo.copies_model and not LeJEPA.copies_model
    assert build_objective("MoCo", {}, model).copies_model
