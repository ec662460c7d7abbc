"""Residual networks (arXiv 1512.03385): convolutions with batch normalisation and a shortcut past every block.

Blocks are basic (two 3x3 convolutions: ResNet-18 and -34) or bottlenecks (1x1, 3x3, 1x1: ResNet-50), with the stride on
the 3x3 convolution. ``models.alexnet`` is the same trunk without the shortcuts.

Letters: B images, C channels, H x W pixels or places of a grid, D channels of the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from pretrain.errors import ConfigError, DataError, did_you_mean
from pretrain.models.backbone import Batch, ModelStats
from pretrain.models.config import BackboneConfig, Key
from pretrain.models.heads import IMAGE_HEADS, SequenceHead, architectures_of
from pretrain.models.image_backbone import ImageBackbone
from pretrain.models.names import Name
from pretrain.nn.attention import KVCache
from pretrain.nn.mlp import activation

__all__ = ["ResNet", "ResNetConfig"]

Self = TypeVar("Self", bound="ResNetConfig")

_BASIC, _WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
# Sizes by the number of weighted layers: kind of block, channels and blocks of each stage.
_DEPTHS: dict[str, dict[str, Any]] = {
    "10": {"layer_type": "basic", "hidden_sizes": _BASIC, "depths": (1, 1, 1, 1)},
    "18": {"layer_type": "basic", "hidden_sizes": _BASIC, "depths": (2, 2, 2, 2)},
    "34": {"layer_type": "basic", "hidden_sizes": _BASIC, "depths": (3, 4, 6, 3)},
    "50": {"layer_type": "bottleneck", "hidden_sizes": _WIDE, "depths": (3, 4, 6, 3)},
}
_NAMED = {"tiny": "10", "small": "18", "medium": "34", "base": "50"}
_REDUCTION = 4  # channels of a bottleneck over those of its 3x3 convolution


class Shape(NamedTuple):
    """A convolution: its block (-1 is the stem), channels, kernel, stride, and how often the grid has been halved."""

    block: int
    inner: int
    outer: int
    size: int
    stride: int
    halvings: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inner * self.outer * self.size**2


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(BackboneConfig):
    """Fields of a residual network; ``hidden_size`` and ``num_layers`` follow from them.

    Attributes:
        num_channels: channels of the images.
        embedding_size: channels after the first convolution.
        hidden_sizes: channels of each stage.
        depths: blocks of each stage.
        layer_type: ``basic`` or ``bottleneck``.
        downsample_in_first_stage: halve the grid in the first stage too.
        downsample_in_bottleneck: put the stride of a bottleneck on its first convolution (the original paper) instead
            of the 3x3 one.
        image_size: side of the images that costs are estimated for; images of other sizes are computed too.
        zero_init_outputs: the last normalisation of every block starts at zero (arXiv 1706.02677, section 5.1).

    Class attributes:
        title: name of the family, for messages.
        kinds: values of ``layer_type``.
        sizes: named size -> the fields that it sets; ``nicknames`` are other names of them.
        residual: whether a shortcut leads past every block.
        pooled: stages after which a max-pool halves the grid.
    """

    title: ClassVar[str] = "resnet"
    kinds: ClassVar[tuple[str, ...]] = ("basic", "bottleneck")
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = _DEPTHS
    nicknames: ClassVar[Mapping[str, str]] = _NAMED
    residual: ClassVar[bool] = True
    pooled: ClassVar[tuple[int, ...]] = ()

    vocab_size: int = 0
    max_positions: int = 0
    num_heads: int = 1
    activation: str = "relu"
    zero_init_outputs: bool = True
    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = _WIDE
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    image_size: int = 224

    def __post_init__(self) -> None:
        for name in ("hidden_sizes", "depths"):
            value = getattr(self, name)
            if (
                not isinstance(value, list | tuple)
                or not value
                or not all(type(size) is int and 1 <= size <= 1 << 14 for size in value)
            ):
                raise ConfigError(
                    f"{name} of the model is {value!r}; it must be a list of whole numbers from 1 to {1 << 14}, one "
                    "for each stage."
                )
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "hidden_size", self.hidden_sizes[-1])
        object.__setattr__(self, "num_layers", sum(self.depths))
        super().__post_init__()

    def validate(self) -> None:
        if len(self.hidden_sizes) != len(self.depths):
            raise ConfigError(
                f"hidden_sizes {self.hidden_sizes} and depths {self.depths} describe {len(self.hidden_sizes)} and "
                f"{len(self.depths)} stages. Give one number for each stage in both."
            )
        if self.layer_type not in self.kinds:
            raise ConfigError(
                f"layer_type of the model is {self.layer_type!r}."
                + did_you_mean(self.layer_type, self.kinds)
            )
        super().validate()

    @classmethod
    def size_names(cls) -> tuple[str, ...]:
        return tuple(cls.sizes)

    @classmethod
    def from_size(cls: type[Self], name: str | None = None, **overrides: Any) -> Self:
        """Return the configuration of a depth (``"18"``) or of a named size, with any field overridden.

        Raises:
            ConfigError: unknown size or field; the message suggests the nearest known one.
        """
        for key in ("hidden_size", "num_layers"):
            if key in overrides:
                raise ConfigError(
                    f"{key} of the family {cls.title} follows from its stages. Set hidden_sizes (channels of "
                    "each stage) and depths (blocks of each stage) instead."
                )
        if name is not None:
            size = cls.sizes.get(cls.nicknames.get(name, name))
            if size is None:
                known = [*cls.nicknames, *cls.sizes]
                raise ConfigError(
                    f"There is no {cls.title} of size {name!r}." + did_you_mean(name, known)
                )
            overrides = {**size, **overrides}
        return super().from_size(None, **overrides)

    def convolutions(self) -> Iterator[Shape]:
        """Yield the convolutions of stem and blocks; the shortcut of a block follows its other convolutions."""
        yield Shape(-1, self.num_channels, self.embedding_size, 7, 2, 1)
        inner, block, halvings = self.embedding_size, 0, 2
        for stage, (outer, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
            for place in range(depth):
                halves = place == 0 and (stage > 0 or self.downsample_in_first_stage)
                stride, before = 1 + halves, halvings
                halvings += halves
                if self.layer_type == "basic":
                    yield Shape(block, inner, outer, 3, stride, halvings)
                    yield Shape(block, outer, outer, 3, 1, halvings)
                else:
                    narrow, early = max(1, outer // _REDUCTION), self.downsample_in_bottleneck
                    first, second = (stride, 1) if early else (1, stride)
                    yield Shape(block, inner, narrow, 1, first, halvings if early else before)
                    yield Shape(block, narrow, narrow, 3, second, halvings)
                    yield Shape(block, narrow, outer, 1, 1, halvings)
                if inner != outer or halves:
                    yield Shape(block, inner, outer, 1, stride, halvings)
                inner, block = outer, block + 1

    def places(self, shape: Shape) -> int:
        """Return the number of places of a convolution's output for an image of ``image_size``."""
        return int((-(-self.image_size // 2**shape.halvings)) ** 2)

    def parameter_count(self) -> int:
        return sum(shape.weights for shape in self.convolutions())


class Convolution(nn.Module):
    """A convolution without a bias, batch normalisation and an optional activation; (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, shape: Shape, act: str | None) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            shape.inner, shape.outer, shape.size, shape.stride, shape.size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(shape.outer)
        self.activation = None if act is None else activation(act)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.normalization(self.convolution(x))
        return y if self.activation is None else self.activation(y)


class Residual(nn.Module):
    """Convolutions, and a projection of the input where its shape changes, added; (B, C, H, W) -> (B, C', H', W').

    Args:
        shapes: convolutions of the block; the projection last.
        parts: number of convolutions before the sum.
        act: activation after the sum.
        residual: False leaves out the shortcut.
        pool: halve the grid by a max-pool afterwards.
    """

    def __init__(
        self, shapes: list[Shape], parts: int, act: str, *, residual: bool = True, pool: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.residual = residual
        # In transformers the configured activation follows the sum, and ReLU the convolutions before it.
        self.parts = nn.ModuleList(
            Convolution(shape, "relu" if i < parts - 1 else None)
            for i, shape in enumerate(shapes[:parts])
        )
        self.shortcut = Convolution(shapes[parts], None) if len(shapes) > parts else None
        self.activation = activation(act)
        self.pool = max_pool() if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for part in self.parts:
            y = part(y)
        if self.residual:
            y = y + (x if self.shortcut is None else self.shortcut(x))
        pooled: Tensor = self.pool(self.activation(y))
        return pooled


def max_pool() -> nn.Module:
    """Return the max-pool of these networks, which halves a grid and rounds up."""
    return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)


class ResNet(ImageBackbone):
    """Images under ``pixel_values``, (B, C, H, W) -> (B, places of the grid, D), row by row."""

    model_type: ClassVar[str] = "resnet"
    config_class: ClassVar[type[BackboneConfig]] = ResNetConfig
    prefix: ClassVar[str] = "resnet."
    architectures: ClassVar[Mapping[str | None, str]] = architectures_of("ResNet", *IMAGE_HEADS)
    unit_name: ClassVar[str] = "images"
    lead_tokens: int = 0
    hf_keys: ClassVar[Mapping[str, Key]] = {
        "num_channels": Key("num_channels", 3),
        "embedding_size": Key("embedding_size", 64),
        "hidden_sizes": Key("hidden_sizes", _WIDE),
        "depths": Key("depths", (3, 4, 6, 3)),
        "layer_type": Key("layer_type", "bottleneck"),
        "activation": Key("hidden_act", "relu"),
        "downsample_in_first_stage": Key("downsample_in_first_stage", False),
        "downsample_in_bottleneck": Key("downsample_in_bottleneck", False),
        "image_size": Key("image_size", 224, optional=True),
    }

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        shapes = list(config.convolutions())
        self.halvings = shapes[-1].halvings
        self.parts = {"plain": 1, "basic": 2, "bottleneck": 3}[config.layer_type]
        self.stem = Convolution(shapes[0], config.activation)
        self.pool = max_pool()
        ends = {sum(config.depths[: stage + 1]) - 1 for stage in config.pooled}
        self.layers = nn.ModuleList(
            Residual(
                list(block),
                self.parts,
                config.activation,
                residual=config.residual,
                pool=number in ends,
            )
            for number, block in groupby(shapes[1:], key=lambda shape: shape.block)
        )

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        x = batch["pixel_values"]
        self.check_inputs(x, cache)
        if (
            self.stem.normalization.training
            and len(x) == 1
            and max(x.shape[2:]) <= 2**self.halvings
        ):
            raise DataError(
                f"One image of {x.shape[2]} x {x.shape[3]} pixels leaves one place in the last stage, and "
                "batch normalisation in training needs two. Train with more images at a time (batch_rows, and "
                "micro_rows if it is set), or with larger ones."
            )
        x = self.pool(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        hidden: Tensor = x.flatten(2).transpose(1, 2)
        return hidden

    def embeddings(self) -> list[nn.Module]:
        return [self.stem]

    def units(self, batch: Batch) -> int:
        """Return the number of images."""
        return len(batch["pixel_values"])

    def stats(self) -> ModelStats:
        """Return widths, and what a block keeps: input and output of each normalisation, in fp32."""
        config, layers = self.config, len(self.layers)
        outputs = sum(shape.outer * config.places(shape) for shape in config.convolutions())
        wide = max(config.hidden_sizes)
        return ModelStats(wide, layers, wide, kept=4.0 * 3 * outputs / layers)

    def flops_per_unit(self, weights: int, row_length: int) -> float:
        """Return the operations for an image of ``image_size``: six for each weight and place it is applied to."""
        config = self.config
        products: int = sum(shape.weights * config.places(shape) for shape in config.convolutions())
        return 6.0 * products

    def grid_step(self) -> tuple[int, bool]:
        return 2**self.halvings, True

    def build_classifier(self, num_labels: int) -> nn.Module:
        return SequenceHead(self.config.hidden_size, num_labels, pool="mean")

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        """Initialise convolutions by the fan of their outputs (arXiv 1502.01852)."""
        super().init_parameter(name, value, seed)
        if value.ndim == 4:
            outputs = value[:, 0].numel()
            value.mul_(math.sqrt(2 / outputs) / self.config.initializer_range)
        last = f"parts.{self.parts - 1}.normalization.weight"
        if self.config.zero_init_outputs and name.endswith(last):
            value.zero_()

    def names(self) -> list[Name]:
        pairs = {"embedder.embedder": "stem"}
        numbers = count()
        for stage, depth in enumerate(self.config.depths):
            for place, block in zip(range(depth), numbers, strict=False):
                disk, own = f"encoder.stages.{stage}.layers.{place}", f"layers.{block}"
                pairs |= {f"{disk}.layer.{i}": f"{own}.parts.{i}" for i in range(self.parts)}
                pairs[f"{disk}.shortcut"] = f"{own}.shortcut"
        return [
            Name(f"{disk}.{part}", (f"{own}.{part}",))
            for disk, own in pairs.items()
            for part in ("convolution", "normalization")
        ]

    def classifier_name(self) -> str:
        return "classifier.1"
