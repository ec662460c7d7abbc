"""Image towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) under a classifier of the mean of the patches.

A ``clip`` or ``siglip`` model that is opened for image classification becomes one of these; its texts are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pretrain.models.backbone import Batch
from pretrain.models.clip import CLIP, image_tower_names, read_part, written_part
from pretrain.models.config import BackboneConfig, ConfigReader, Key, written_keys
from pretrain.models.heads import SequenceHead
from pretrain.models.image_backbone import ImageBackbone
from pretrain.models.names import Name, renamed
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
        pixels = batch["pixel_values"]
        self.check_inputs(pixels, cache)
        self.patches.check(pixels)
        x = self.patches(pixels)
        x = x if self.first_norm is None else self.first_norm(x)
        x = self.run(self.drop(x), AttentionMask())
        hidden: Tensor = x if self.lead_tokens else self.norm(x)
        return hidden

    def units(self, batch: Batch) -> int:
        side: int = self.config.side
        return len(batch["pixel_values"]) * side**2

    def embeddings(self) -> list[nn.Module]:
        return [self.patches]

    def build_classifier(self, num_labels: int) -> nn.Module:
        config = self.config
        pool, dropout = "patches" if self.lead_tokens else "mean", config.classifier_dropout or 0.0
        return SequenceHead(config.hidden_size, num_labels, pool=pool, dropout=dropout)

    def names(self) -> list[Name]:
        return renamed(image_tower_names("vision_model", ""))

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        found = reader.fields_of(cls.config_class, cls.hf_keys)
        return found | read_part(reader, "vision_config", cls.vision_keys, cls)

    def to_hf_config(self) -> dict[str, Any]:
        written = written_keys(self.config, self.hf_keys)
        vision = written_part(self, "vision", self.vision_keys)
        return written | {"vision_config": vision["vision_config"] | self.vision_extra}


class CLIPVision(ImageTower):
    """The image tower of CLIP; what its last block returns is not normalised."""

    model_type: ClassVar[str] = "clip"
    architectures: ClassVar[Mapping[str | None, str]] = {
        **CLIP.architectures,
        None: "CLIPVisionModel",
    }
    hf_keys: ClassVar[Mapping[str, Key]] = CLIP.hf_keys
    vision_keys: ClassVar[Mapping[str, Key]] = _own(CLIP.vision_keys)
    lead_tokens: int = 1


class SiglipVision(ImageTower):
    """The image tower of SigLIP without its attention pool."""

    model_type: ClassVar[str] = "siglip"
    architectures: ClassVar[Mapping[str | None, str]] = {
        **Siglip.architectures,
        None: "SiglipVisionModel",
    }
    vision_keys: ClassVar[Mapping[str, Key]] = _own(Siglip.vision_keys)
    vision_extra: ClassVar[Mapping[str, Any]] = {"vision_use_head": False}
    lead_tokens: int = 0
