"""The image processor gives the pixel values of transformers' own, reads and writes its file, and refuses the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL")

from PIL import Image

from pretrain.data.images import ImageProcessor
from pretrain.errors import ConfigError, DataError, PretrainError

KINDS = ("ViT", "DeiT", "CLIP", "Siglip", "Bit", "ConvNext")


def theirs(kind: str, **options: Any) -> Any:
    import importlib

    name = kind.lower()
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    return getattr(module, f"{kind}ImageProcessorPil")(**options)


def photo(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, so that a wrong resampling shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 120 * np.sin(x / (3 + c) + y / (5 + c)) for c in range(3)], -1)
    array = np.clip(waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def both(kind: str, images: list[Image.Image], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = theirs(kind, **options)(images, return_tensors="pt")["pixel_values"]
    return ImageProcessor(f"{kind}ImageProcessor", **options)(images)["pixel_values"], wanted


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_equal_those_of_transformers(kind: str) -> None:
    images = [photo(240, 300), photo(500, 260, seed=1)]
    mine, wanted = both(kind, images)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


OPTIONS = [
    ("ViT", {"size": 32}),
    ("ViT", {"size": {"height": 24, "width": 40}, "resample": 0}),
    ("ViT", {"size": {"height": 24, "width": 24}, "resample": 1, "do_normalize": False}),
    ("ViT", {"size": 16, "do_rescale": False, "image_mean": [3.0, 4.0, 5.0]}),
    ("ViT", {"size": 30, "rescale_factor": 1 / 127.5, "resample": 4}),
    ("CLIP", {"size": 40, "crop_size": 32}),
    ("CLIP", {"size": {"shortest_edge": 20}, "crop_size": {"height": 31, "width": 28}}),
    ("CLIP", {"do_resize": False, "crop_size": 90}),
    ("Bit", {"size": {"shortest_edge": 33}, "do_center_crop": True, "crop_size": 33}),
    ("ConvNext", {"size": {"shortest_edge": 60}, "crop_pct": 0.9}),
    ("ConvNext", {"size": {"shortest_edge": 400}}),
    ("ConvNext", {"size": {"shortest_edge": 60}, "do_center_crop": True, "crop_size": 40}),
    # A null, which is no default of the class.
    *(("CLIP", {"crop_size": 30, key: None}) for key in ("do_center_crop", "do_rescale", "do_normalize")),
    ("DeiT", {"do_center_crop": None}), ("CLIP", {"do_resize": None, "crop_size": 40}),
    # What a size of one number means.
    *((kind, {"size": 40, "do_center_crop": True, "crop_size": 32, **square})
      for kind in ("ViT", "DeiT", "CLIP", "Bit", "Siglip")
      for square in ({}, {"default_to_square": True}, {"default_to_square": False})),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_settings_have_the_effect_that_they_have_in_transformers(
    kind: str, options: dict[str, Any]
) -> None:
    images = [photo(50, 67), photo(81, 45, seed=1)]
    if kind == "CLIP" and options.get("do_center_crop", True) is None:
        images = images[:1]  # which then keep their proportions
    mine, wanted = both(kind, images, **options)
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_any_size_is_cropped_as_in_transformers(
    height: int, width: int, edge: int, crop: int, resample: int
) -> None:
    options = {"size": {"shortest_edge": edge}, "crop_size": crop, "resample": resample}
    mine, wanted = both("CLIP", [photo(height, width)], **options)
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_read_and_written_in_both_directions(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    other = theirs(kind, image_mean=[0.1, 0.2, 0.3])
    other.save_pretrained(tmp_path / "theirs")
    found = ImageProcessor.from_directory(tmp_path / "theirs")
    assert found is not None and found.channels == 3
    image = [photo(230, 270)]
    wanted = other(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found(image)["pixel_values"], wanted, rtol=0, atol=1e-6)
    found.save(tmp_path / "ours")
    again = ImageProcessor.from_directory(tmp_path / "ours")
    assert again is not None and again.fingerprint == found.fingerprint
    opened = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(
        opened(image, return_tensors="pt")["pixel_values"], wanted, rtol=0, atol=1e-6
    )


def test_older_files_and_files_of_processors_are_read(tmp_path: Path) -> None:
    assert ImageProcessor.from_directory(tmp_path) is None
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 48, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    found = ImageProcessor.from_directory(tmp_path)
    assert found is not None and found.size == (48, 48)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_processor_type": "CLIPImageProcessor"}})
    )
    found = ImageProcessor.from_directory(tmp_path)
    assert found is not None and found.size == (224, 224) and found.kind == "CLIPImageProcessor"
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 100}}')
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    found = ImageProcessor.from_directory(tmp_path)
    assert found is not None and found.kind == "ConvNextImageProcessor" and found.size == (100, 100)


def test_the_class_of_a_model_whose_file_names_none_is_that_of_transformers(
    tmp_path: Path,
) -> None:
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 100}}')
    for family in ("git", "clip", "siglip", "dinov2", "resnet", "deit", "vit"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        wanted = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        found = ImageProcessor.from_directory(tmp_path)
        assert found is not None and f"{found.kind}Pil" == type(wanted).__name__


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"image_meen": [0.5]}, "image_mean"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 5}}, "size"),
        ({"size": -3}, "size"),
        ({"resample": 17}, "resample"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std holds 0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": [0.5]}, "different lengths"),
        ({"rescale_factor": "a"}, "rescale_factor"),
        ({"do_center_crop": True}, "crop_size"),
        ({"image_processor_type": "Mask2FormerImageProcessor"}, "Mask2Former"),
        *(({"resample": value}, "resample is") for value in ("bicubic", [], 2.7, True, 10**400)),
        ({"kind": "ViTImageProcessor"}, "the key 'kind'"),
        ({"self": 1}, "the key 'self'"),
        ({"do_resize": "false"}, "do_resize is 'false'"),
        ({"rescale_factor": True}, "rescale_factor is True"),
        ({"rescale_factor": 10**400}, "rescale_factor is"),
        ({"image_mean": [True, 1, 1]}, "image_mean is"),
        *(({"crop_pct": value}, "crop_pct is") for value in (1e-9, 1.5)),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    wrong: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(ConfigError, match=told):
        ImageProcessor.from_directory(tmp_path)


def test_grey_images_become_rgb_and_the_other_way_round() -> None:
    grey = photo(20, 20, mode="L")
    rgb = ImageProcessor(size=20)(grey)["pixel_values"]
    assert rgb.shape == (1, 3, 20, 20) and torch.equal(rgb[:, 0], rgb[:, 2])
    one = ImageProcessor(size=20, image_mean=[0.5], image_std=[0.5])
    assert one.channels == 1
    torch.testing.assert_close(one(np.asarray(grey))["pixel_values"], rgb[:, :1])
    assert one(photo(20, 20))["pixel_values"].shape == (1, 1, 20, 20)


def test_images_of_different_sizes_are_refused_where_the_settings_keep_them() -> None:
    keeps = ImageProcessor("CLIPImageProcessor", do_center_crop=False, size=20)
    assert keeps.size is None
    assert keeps(photo(40, 60))["pixel_values"].shape == (1, 3, 20, 30)
    with pytest.raises(DataError, match="different sizes"):
        keeps([photo(40, 60), photo(60, 40)])
    with pytest.raises(PretrainError, match="image 2 .* array of float64"):
        keeps([photo(40, 40), np.zeros((4, 4))])
