"""Image processor: images to pixel values by the settings in ``preprocessor_config.json``, as in transformers.

Resizing, cropping, rescaling and normalising equal those of transformers' Pillow processors of ViT (arXiv 2010.11929),
DeiT, CLIP, SigLIP, BiT and ConvNeXt (also ResNet), whose settings are read and written in their own form.

Letters: B images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pretrain.data.images.decode import Picture, in_numpy, to_channels
from pretrain.errors import ConfigError, DataError, did_you_mean
from pretrain.utils.files import note, read_bytes
from pretrain.utils.strict_json import parse_json, to_json

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["FILE", "NESTED", "ImageProcessor", "SavedProcessor"]

FILE, NESTED = "preprocessor_config.json", "processor_config.json"
_LARGEST = 1 << 14  # of a side; far above every published model
_HALF = (0.5, 0.5, 0.5)
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SQUARE = {"height": 224, "width": 224}
_COMMON: dict[str, Any] = {
    "do_resize": True,
    "size": _SQUARE,
    "resample": 2,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALF,
    "image_std": _HALF,
    "do_convert_rgb": None,
    "crop_pct": None,
}
_CROPPED: dict[str, Any] = {
    **_CLIP,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": _SQUARE,
    "do_convert_rgb": True,
}
# Class name in the file -> the settings of that class where they differ from the common ones.
_KINDS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {},
    "DeiTImageProcessor": {
        "size": {"height": 256, "width": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": _SQUARE,
    },
    "CLIPImageProcessor": _CROPPED,
    "BitImageProcessor": _CROPPED,
    "SiglipImageProcessor": {"resample": 3, "do_convert_rgb": True},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 0.875},
}
# Those that take a whole number for height and width, unless the file says otherwise; others for the shorter side.
_SQUARES = ("ViTImageProcessor", "DeiTImageProcessor")
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
# The class that transformers takes for a model whose file names none, where it is not that of ViT.
_OF_MODELS = {
    "deit": "DeiTImageProcessor",
    "clip": "CLIPImageProcessor",
    "git": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "bit": "BitImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "resnet": "ConvNextImageProcessor",
    "convnext": "ConvNextImageProcessor",
}
# Keys without an effect on the pixel values, of this or an earlier version of transformers; default_to_square has one
# on what a size of one number means.
_WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "default_to_square"),
    *("input_data_format", "device", "disable_grouping", "return_tensors", "image_seq_length"),
    *("_valid_processor_keys", "transformers_version", "pad_size", "auto_map"),
}
# Keys that are accepted with these values only.
_ONLY = {
    "do_pad": (None, False),
    "data_format": (None, "channels_first"),
    "do_reduce_labels": (None, False),
    "reduce_labels": (None, False),
    "size_divisor": (None,),
    "max_size": (None,),
    "rescale_offset": (None, False),
}


class SavedProcessor:
    """Base class of the processors that ``preprocessor_config.json`` describes.

    Class attributes:
        only: keys that are accepted with these values only.
        makes: what it makes of inputs, for messages.

    Attributes:
        settings: all other keys with their values.
    """

    only: ClassVar[Mapping[str, tuple[Any, ...]]]
    makes: ClassVar[str]
    settings: dict[str, Any]

    def check_key(self, key: str, value: Any) -> bool:
        """Check a key of the file, and whether it is one of ``settings``.

        Raises:
            ConfigError: the key is not known, or its value is not implemented.
        """
        if key in self.only and value not in self.only[key]:
            raise ConfigError(
                f"{FILE}: {key!r} is {value!r}, which is not implemented; supported: "
                f"{', '.join(map(repr, self.only[key]))}."
            )
        if key not in self.only and key not in self.settings:
            raise ConfigError(
                f"{FILE} has the key {key!r}, which is not known, so the {self.makes} might be wrong."
                f"{did_you_mean(key, self.settings)} If it has no effect, remove it."
            )
        return key in self.settings

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``preprocessor_config.json``."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write ``preprocessor_config.json``."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, FILE).write_bytes(to_json(self.to_dict()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all settings."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


class ImageProcessor(SavedProcessor):
    """Resizes, crops, rescales and normalises images, by the keys of ``preprocessor_config.json``.

    Args:
        kind: class in transformers whose steps and defaults are used.
        **settings: keys of the file: ``size`` (a number, ``{"height", "width"}`` or ``{"shortest_edge"}``),
            ``resample`` (Pillow's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic), ``crop_size``, ``image_mean``,
            ``image_std``, ``rescale_factor``, the switches ``do_resize``, ``do_center_crop``, ``do_rescale``,
            ``do_normalize``.

    Attributes:
        settings: all keys with their values.
        channels: channels of the pixel values: as many as ``image_mean`` has values, 1 (grey) or 3 (RGB). Images are
            converted to it, whatever ``do_convert_rgb`` says.
        size: height and width of the pixel values; None if they depend on the image.
        extra: keys without an effect, which are written back.

    Raises:
        ConfigError: an unknown key, or a value that is not possible.
    """

    only = _ONLY
    makes = "pixel values"

    def __init__(self, kind: str = "ViTImageProcessor", /, **settings: Any) -> None:
        name = kind.replace("FeatureExtractor", "ImageProcessor")
        name = name.removesuffix("Fast").removesuffix("Pil")
        if name not in _KINDS:
            raise ConfigError(
                f"{FILE}: the image processor {kind!r} is not implemented.{did_you_mean(name, _KINDS)} If its steps "
                'are only resizing, cropping, rescaling and normalising, write "image_processor_type": '
                '"ViTImageProcessor" with all settings. load(..., tokenizer=False) opens the model without it.'
            )
        self.kind, self.settings, self.extra = name, {**_COMMON, **_KINDS[name]}, dict[str, Any]()
        for key, value in settings.items():
            self._set(key, value)
        self._check()

    def _set(self, key: str, value: Any) -> None:
        if key in _WITHOUT_EFFECT or not self.check_key(key, value):
            self.extra[key] = value
        elif value is not None:
            self.settings[key] = value
        elif key in _STEPS:
            # In transformers null is false, whatever the class does where the key is missing.
            self.settings[key] = False

    def _check(self) -> None:
        """Bring all settings into one form and check them."""
        chosen = self.settings
        square = self.extra.get("default_to_square")
        if square is None:
            square = self.kind in _SQUARES
        for key in ("size", "crop_size"):
            if chosen[key] is not None:
                chosen[key] = _size_of(key, chosen[key], square=bool(square) or key == "crop_size")
        if chosen["do_center_crop"] and "height" not in (chosen["crop_size"] or ()):
            raise ConfigError(f"{FILE}: do_center_crop needs crop_size with height and width.")
        if self.kind == "ConvNextImageProcessor" and "shortest_edge" not in chosen["size"]:
            raise ConfigError(f"{FILE}: the size of a {self.kind} is {{'shortest_edge': ...}}.")
        if not _is_real(chosen["resample"]) or chosen["resample"] not in range(6):
            raise ConfigError(
                f"{FILE}: resample is {chosen['resample']!r}; it must be a number of Pillow from 0 to 5, such as 2 "
                "(bilinear) or 3 (bicubic)."
            )
        chosen["resample"] = int(chosen["resample"])
        for key, value in chosen.items():
            if key.startswith("do_") and type(value) is not bool and value is not None:
                raise ConfigError(f"{FILE}: {key} is {value!r}; it must be true or false.")
        for key in ("image_mean", "image_std"):
            chosen[key] = _numbers(key, chosen[key])
        if len(chosen["image_mean"]) != len(chosen["image_std"]):
            raise ConfigError(f"{FILE}: image_mean and image_std have different lengths.")
        if chosen["do_normalize"] and not all(chosen["image_std"]):
            raise ConfigError(f"{FILE}: image_std holds 0, by which values would be divided.")
        for key in ("rescale_factor", "crop_pct"):
            value = chosen[key]
            if value is not None and not (_is_real(value) and value > 0):
                raise ConfigError(f"{FILE}: {key} is {value!r}; it must be a number above 0.")
        if not 0.05 <= (chosen["crop_pct"] or 1) <= 1:
            raise ConfigError(f"{FILE}: crop_pct is {chosen['crop_pct']}; it must be 0.05 to 1.")
        self.channels: int = len(chosen["image_mean"])
        self.size: tuple[int, int] | None = self._final_size()

    def _final_size(self) -> tuple[int, int] | None:
        chosen = self.settings
        crop, size = chosen["crop_size"], chosen["size"]
        if chosen["do_center_crop"]:
            return crop["height"], crop["width"]
        if not chosen["do_resize"]:
            return None
        if self.kind == "ConvNextImageProcessor":
            return size["shortest_edge"], size["shortest_edge"]
        return (size["height"], size["width"]) if "height" in size else None

    # ------------------------------------------------------------------ files

    @classmethod
    def from_directory(cls, directory: str | Path) -> ImageProcessor | None:
        """Read ``preprocessor_config.json``, or the image part of ``processor_config.json``; None without both.

        Raises:
            ConfigError: a key or a value is not supported.
            CheckpointCorrupt: the file is no JSON object.
        """
        directory = Path(directory)
        found = _mapping(directory / FILE)
        if found is None:
            whole = _mapping(directory / NESTED)
            nested = (whole or {}).get("image_processor")
            if not isinstance(nested, Mapping):
                return None
            found = dict(nested)
        kind = found.get("image_processor_type") or found.get("feature_extractor_type")
        if kind is None:
            family = (_mapping(directory / "config.json") or {}).get("model_type", "vit")
            kind = _OF_MODELS.get(str(family), "ViTImageProcessor")
        return cls(str(kind), **{str(key): value for key, value in found.items()})

    def to_dict(self) -> dict[str, Any]:
        chosen = {key: value for key, value in self.settings.items() if value is not None}
        chosen |= {key: list(chosen[key]) for key in ("image_mean", "image_std")}
        kept = {k: v for k, v in self.extra.items() if k in ("processor_class",)}
        return {"image_processor_type": self.kind, **chosen, **kept}

    def __repr__(self) -> str:
        size = "their own size" if self.size is None else f"{self.size[0]} x {self.size[1]}"
        return f"ImageProcessor({self.kind}: {self.channels} channels, {size})"

    # ------------------------------------------------------------------ pixels

    def __call__(self, images: Any) -> dict[str, torch.Tensor]:
        """Return ``pixel_values`` (B, C, H, W), float32.

        Args:
            images: a list of images, or one: paths, bytes of files, arrays (H, W) or (H, W, C) of uint8, images of
                Pillow, or ``Picture`` objects.

        Raises:
            DataError: an image cannot be read, or the images become of different sizes.
        """
        import torch

        arrays = []
        for number, image in enumerate(_listed(images), start=1):
            picture, remark = image_of(image, f"image {number}").read()
            if remark:
                note(f"{image_of(image, f'image {number}')}: {remark}")
            arrays.append(self.values(self.fitted(picture)))
        if len({array.shape for array in arrays}) > 1:
            shapes = sorted({f"{a.shape[1]} x {a.shape[2]}" for a in arrays})
            raise DataError(
                f"The images of a batch become of different sizes ({', '.join(shapes[:4])}), because the settings keep "
                'their proportions. Give one image at a time, or an image processor with "size": {"height", "width"} '
                "or do_center_crop."
            )
        return {"pixel_values": torch.from_numpy(np.stack(arrays))}

    def fitted(self, image: Image) -> NDArray[np.uint8]:
        """Convert, resize and crop a decoded image; (H, W, C)."""
        image, chosen = to_channels(image, self.channels), self.settings
        size = chosen["size"]
        if chosen["do_resize"] and self.kind == "ConvNextImageProcessor":
            edge = size["shortest_edge"]
            if edge < 384:
                image = self._resized(image, *_keeping(image, int(edge / chosen["crop_pct"])))
                array = self.cropped(self.array(image), edge, edge)
            else:
                array = self.array(self._resized(image, edge, edge))
        elif chosen["do_resize"]:
            exact = "height" in size
            goal = (
                (size["height"], size["width"]) if exact else _keeping(image, size["shortest_edge"])
            )
            array = self.array(self._resized(image, *goal))
        else:
            array = self.array(image)
        if chosen["do_center_crop"]:
            array = self.cropped(array, chosen["crop_size"]["height"], chosen["crop_size"]["width"])
        return array

    def _resized(self, image: Image, height: int, width: int) -> Image:
        return image.resize((width, height), resample=self.settings["resample"])

    def array(self, image: Image) -> NDArray[np.uint8]:
        """Return a decoded image as (H, W, C), without resizing."""
        values = np.asarray(to_channels(image, self.channels))
        return values if values.ndim == 3 else values[..., None]

    @staticmethod
    def cropped(array: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
        """Cut (height, width) out of the middle of (H, W, C); a smaller image is surrounded with black."""
        tall, wide = array.shape[:2]
        top, left = (tall - height) // 2, (wide - width) // 2
        if top < 0 or left < 0:
            canvas = np.zeros((max(height, tall), max(width, wide), array.shape[2]), array.dtype)
            down, right = -(-(len(canvas) - tall) // 2), -(-(canvas.shape[1] - wide) // 2)
            canvas[down : down + tall, right : right + wide] = array
            # The window moves with the image; transformers does not let it begin before the canvas.
            top, left, array = max(0, top + down), max(0, left + right), canvas
        return array[top : top + height, left : left + width]

    def values(self, array: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rescale and normalise (H, W, C) bytes; (C, H, W) float32."""
        chosen = self.settings
        values = array.astype(np.float32)
        if chosen["do_rescale"]:
            values *= np.float32(chosen["rescale_factor"])
        if chosen["do_normalize"]:
            values -= np.float32(chosen["image_mean"])
            values /= np.float32(chosen["image_std"])
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def image_of(value: Any, name: str) -> Picture:
    """Return a value as a ``Picture``; a path is its own name."""
    if isinstance(value, Picture):
        return value
    if isinstance(value, str | Path):
        return Picture(value, str(value))
    return Picture(in_numpy(value), name)


def _listed(images: Any) -> Sequence[Any]:
    if isinstance(images, list | tuple):
        return images
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _keeping(image: Image, shortest: int) -> tuple[int, int]:
    """Return height and width with that shortest side, in the proportions of the image."""
    width, height = image.size
    long = int(shortest * max(width, height) / min(width, height))
    return (long, shortest) if width <= height else (shortest, long)


def _mapping(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no such file."""
    if not path.is_file():
        return None
    found = parse_json(read_bytes(path, limit=1 << 20), path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return found


def _size_of(key: str, value: Any, *, square: bool) -> dict[str, int]:
    """Return a size as ``{"height", "width"}`` or ``{"shortest_edge"}``, whatever its form in the file."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    known = ({"height", "width"}, {"shortest_edge"})
    found = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
    whole = all(type(side) is int and 1 <= side <= _LARGEST for side in found.values())
    if set(found) not in known or not whole:
        raise ConfigError(
            f"{FILE}: {key} is {value!r}; it must be a number of pixels, {{'height', 'width'}} or "
            f"{{'shortest_edge'}}, each from 1 to {_LARGEST:,}."
        )
    return dict(found)


def _is_real(value: Any) -> bool:
    """Whether a value is a number, within the range of float32."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e38


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else (value,) * 3
    if not all(map(_is_real, values)) or len(values) not in (1, 3):
        raise ConfigError(
            f"{FILE}: {key} is {value!r}; it must be one number for each channel, 1 (grey) or 3 (RGB)."
        )
    return tuple(map(float, values))
