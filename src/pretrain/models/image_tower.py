"""Image towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) under a classifier of the mean of the patches.

A ``clip`` or ``siglip`` model that is opened for image classification becomes one of these; its texts are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from pretrain.models.backbone import Batch
from pretrain.models.clip import CLIP, image_tower_names, read_part
from pretrain.models.config import BackboneConfig, ConfigReader, Key
from pretrain.models.heads import SequenceHead
from pretrain.models.image_backbone import ImageBackbone
from pretrain.models.names import Name
from pretrain.models.siglip import Siglip
from pretrain.models.vit import ViTConfig
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block
from pretrain.nn.norm import LayerNorm
from pretrain.nn.patches import PatchEmbedding

__all__ = ["CLIPVision", "ImageTowerConfig", "SiglipVision"]


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig(ViTConfig):
    """Fields of an image tower.

    Attributes:
        projection_dim, logit_scale_init_value: of the comparison with texts; kept for the file.
    """

    pooling: str = "mean"
    activation: str = "quick_gelu"
    patch_size: int = 32
    norm_eps: float = 1e-5
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592


def _own(keys: Mapping[str, Key]) -> dict[str, Key]:
    """Return the keys of an image tower by the fields of ``ImageTowerConfig``."""
    kept = {name: key for name, key in keys.items() if name != "projection_dim"}
    return {name.removeprefix("vision_"): key for name, key in kept.items()}


class ImageTower(ImageBackbone):
    """Encoder of image patches; ``pixel_values`` (B, C, H, W) -> (B, P, D), behind a class token if there is one."""

    config_class: ClassVar[type[BackboneConfig]] = ImageTowerConfig
    prefix: ClassVar[str] = ""
    prefixes: ClassVar[tuple[str, ...]] = ()
    unit_name: ClassVar[str] = "patches"
    vision_keys: ClassVar[Mapping[str, Key]]
    vision_extra: ClassVar[Mapping[str, Any]] = {}  # further keys of vision_config, as written

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__(config)
        sizes = (config.hidden_size, config.image_size, config.patch_size, config.num_channels)
        token = bool(self.lead_tokens)
        self.patches = PatchEmbedding(*sizes, class_token=token, bias=not token, lead=0)
        self.first_norm = LayerNorm(config.hidden_size, config.norm_eps) if token else None
        self.layers = nn.ModuleList(Block(config.block()) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)
        if token:
            # It normalises the class token alone, which the classifier does not read; files hold it.
            self.norm.requires_grad_(False)

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        pixels, layers = batch["pixel_values"], len(self.layers)
        self.check_inputs(pixels, cache)
        self.patches.check(pixels)
        x = self.patches(pixels)
        x = x if self.first_norm is None else self.first_norm(x)
        x = self.run(self.drop(x), [AttentionMask()] * layers, [None] * layers, None)
        hidden: Tensor = x if self.lead_tokens else self.norm(x)
        return hidden

    def units(self, batch: Batch) -> int:
        side: int = self.config.side
        return len(batch["pixel_values"]) * side**2

    def embeddings(self) -> list[nn.Module]:
        return [self.patches]

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        config = self.config
        pool, dropout = "patches" if self.lead_tokens else "mean", config.classifier_dropout or 0.0
        return SequenceHead(config.hidden_size, num_labels, pool=pool, dropout=dropout)

    def names(self) -> list[Name]:
        pairs = image_tower_names("vision_model", "")
        return [Name(disk, (own,)) for disk, own in pairs.items()]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        return [Name("classifier", ("head.classifier",), body=False)]

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        specs = {spec.name: spec for spec in fields(cls.config_class)}
        found = {name: reader.read(specs[name], key) for name, key in cls.hf_keys.items()}
        return found | read_part(reader, "vision_config", cls.vision_keys, specs, cls.model_type)

    def to_hf_config(self) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for name, key in self.hf_keys.items():
            written |= key.write(getattr(self.config, name))
        inner: dict[str, Any] = {"model_type": f"{self.model_type}_vision_model"}
        for name, key in self.vision_keys.items():
            inner |= key.write(getattr(self.config, name))
        return written | {"vision_config": {**inner, **self.vision_extra}}


class CLIPVision(ImageTower):
    """The image tower of CLIP; what its last block returns is not normalised."""

    model_type: ClassVar[str] = "clip"
    architectures: ClassVar[Mapping[str | None, str]] = {
        None: "CLIPVisionModel",
        "image-classification": "CLIPForImageClassification",
    }
    hf_keys: ClassVar[Mapping[str, Key]] = CLIP.hf_keys
    vision_keys: ClassVar[Mapping[str, Key]] = _own(CLIP.vision_keys)
    lead_tokens: int = 1


class SiglipVision(ImageTower):
    """The image tower of SigLIP without its attention pool."""

    model_type: ClassVar[str] = "siglip"
    architectures: ClassVar[Mapping[str | None, str]] = {
        None: "SiglipVisionModel",
        "image-classification": "SiglipForImageClassification",
    }
    vision_keys: ClassVar[Mapping[str, Key]] = _own(Siglip.vision_keys)
    vision_extra: ClassVar[Mapping[str, Any]] = {"vision_use_head": False}
    lead_tokens: int = 0
