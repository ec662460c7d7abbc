"""AlexNet: convolutions without shortcuts, with max-pools between them (Krizhevsky et al., 2012; arXiv 1404.5997).

The convolutions are those of the second paper, which has one column. As in later networks, batch normalisation takes
the place of local response normalisation, and the mean of the grid that of the two dense layers, with their dropout.
transformers has no AlexNet, so the directories of this family have names of our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from pretrain.errors import ConfigError
from pretrain.models.config import BackboneConfig, Key
from pretrain.models.heads import SequenceHead, architectures_of
from pretrain.models.names import Name
from pretrain.models.resnet import ResNet, ResNetConfig, Shape

__all__ = ["AlexNet", "AlexNetConfig"]

_WIDTHS, _STEM = (192, 384, 256, 256), 64


def _share(part: int) -> dict[str, Any]:
    """Return a size whose layers have one of ``part`` channels of the published ones."""
    return {"embedding_size": _STEM // part, "hidden_sizes": tuple(w // part for w in _WIDTHS)}


@dataclass(frozen=True, kw_only=True)
class AlexNetConfig(ResNetConfig):
    """Fields of AlexNet.

    Attributes:
        kernel_sizes: side of the kernels of each stage.
        stem_size, stem_stride: side and stride (1, 2 or 4) of the first convolution: 11 and 4 are for images of 224
            pixels, 3 and 1 for those of 32 or fewer.
        classifier_dropout: before the classifier; 0.5, as in the paper, when None.
    """

    embedding_size: int = _STEM
    hidden_sizes: tuple[int, ...] = _WIDTHS
    depths: tuple[int, ...] = (1, 1, 1, 1)
    layer_type: str = "plain"
    kernel_sizes: tuple[int, ...] = (5, 3, 3, 3)
    stem_size: int = 11
    stem_stride: int = 4
    zero_init_outputs: bool = False

    title: ClassVar[str] = "alexnet"
    kinds: ClassVar[tuple[str, ...]] = ("plain",)
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": _share(4),
        "small": _share(2),
        "base": _share(1),
    }
    nicknames: ClassVar[Mapping[str, str]] = {}
    residual: ClassVar[bool] = False
    pooled: ClassVar[tuple[int, ...]] = (0, 3)

    def validate(self) -> None:
        object.__setattr__(self, "kernel_sizes", tuple(self.kernel_sizes))
        odd = all(
            type(k) is int and k % 2 and 1 <= k <= 31 for k in (*self.kernel_sizes, self.stem_size)
        )
        if not odd or len(self.kernel_sizes) != len(self.depths):
            raise ConfigError(
                f"kernel_sizes {self.kernel_sizes} and stem_size {self.stem_size} must be odd numbers from 1 to "
                f"31, and kernel_sizes one for each of the {len(self.depths)} stages."
            )
        if self.stem_stride not in (1, 2, 4):
            raise ConfigError(f"stem_stride is {self.stem_stride}; it must be 1, 2 or 4.")
        if self.zero_init_outputs:
            raise ConfigError(
                "zero_init_outputs would leave a network without shortcuts nothing but zeros. Leave it out."
            )
        super().validate()

    def convolutions(self) -> Iterator[Shape]:
        halvings = self.stem_stride.bit_length() - 1
        inner, block = self.embedding_size, 0
        yield Shape(-1, self.num_channels, inner, self.stem_size, self.stem_stride, halvings)
        halvings += 1  # the max-pool behind it
        stages = zip(self.hidden_sizes, self.depths, self.kernel_sizes, strict=True)
        for stage, (outer, depth, kernel) in enumerate(stages):
            for _ in range(depth):
                yield Shape(block, inner, outer, kernel, 1, halvings)
                inner, block = outer, block + 1
            halvings += stage in self.pooled


class AlexNet(ResNet):
    """Images under ``pixel_values``, (B, C, H, W) -> (B, places of the grid, D), row by row."""

    model_type: ClassVar[str] = "alexnet"
    config_class: ClassVar[type[BackboneConfig]] = AlexNetConfig
    prefix: ClassVar[str] = "alexnet."
    architectures: ClassVar[Mapping[str | None, str]] = architectures_of(
        "AlexNet", "ForImageClassification"
    )
    hf_keys: ClassVar[Mapping[str, Key]] = {
        "num_channels": Key("num_channels", 3),
        "embedding_size": Key("embedding_size", _STEM),
        "hidden_sizes": Key("hidden_sizes", _WIDTHS),
        "depths": Key("depths", (1, 1, 1, 1)),
        "kernel_sizes": Key("kernel_sizes", (5, 3, 3, 3)),
        "stem_size": Key("stem_size", 11),
        "stem_stride": Key("stem_stride", 4),
        "activation": Key("hidden_act", "relu"),
        "image_size": Key("image_size", 224),
        "classifier_dropout": Key("classifier_dropout", None, optional=True),
    }

    def build_classifier(self, num_labels: int) -> nn.Module:
        config = self.config
        dropout = 0.5 if config.classifier_dropout is None else config.classifier_dropout
        return SequenceHead(config.hidden_size, num_labels, pool="mean", dropout=dropout)

    def names(self) -> list[Name]:
        owners = ["stem", *(f"layers.{n}.parts.0" for n in range(len(self.layers)))]
        parts = [f"{owner}.{part}" for owner in owners for part in ("convolution", "normalization")]
        return [Name(part, (part,)) for part in parts]

    def classifier_name(self) -> str:
        return "classifier"
