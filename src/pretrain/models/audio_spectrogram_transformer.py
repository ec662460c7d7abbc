"""Audio spectrogram transformer (AST, arXiv 2104.01778): an encoder of the patches of a log-mel spectrogram, pre-norm.

Patches are squares of the plane of frequency and time, and may overlap. Before them stand a class token and a
distillation token, as in DeiT; a classifier reads the mean of the two. The head ``masked-image`` is the decoder of a
masked autoencoder (AudioMAE, arXiv 2207.06405), which transformers does not have for this family.

Letters: B clips, T frames, M mel bands, N patches, K visible ones, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.data.audio import AudioProcessor
from pretrain.errors import ConfigError, ModelError
from pretrain.models.backbone import Batch
from pretrain.models.config import BackboneConfig, Key
from pretrain.models.heads import SequenceHead, architectures_of
from pretrain.models.image_backbone import ImageBackbone
from pretrain.models.names import Name
from pretrain.models.vit import ENCODER_KEYS, encoder_names
from pretrain.models.vit_mae import DECODER_KEYS, MaskedConfig, PixelDecoder
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block
from pretrain.nn.norm import LayerNorm

__all__ = ["AST", "ASTConfig"]

_LEAD = 2  # tokens before the patches


@dataclass(frozen=True, kw_only=True)
class ASTConfig(MaskedConfig):
    """Fields of AST; the fields of a decoder are of the head ``masked-image``.

    Attributes:
        num_mel_bins: mel bands of a spectrogram, M.
        max_length: frames of a spectrogram, T.
        frequency_stride: mel bands from one patch to the next; ``patch_size`` when None.
        time_stride: frames from one patch to the next; ``patch_size`` when None.
    """

    norm_eps: float = 1e-12
    num_channels: int = 1
    num_mel_bins: int = 128
    max_length: int = 1024
    frequency_stride: int | None = None
    time_stride: int | None = None

    def __post_init__(self) -> None:
        self.set_defaults(frequency_stride=self.patch_size, time_stride=self.patch_size)
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if self.num_channels != 1:
            raise ConfigError(
                f"num_channels of the model is {self.num_channels}; a spectrogram has 1 channel."
            )
        if self.patch_size > min(self.num_mel_bins, self.max_length):
            raise ConfigError(
                f"patch_size {self.patch_size} is larger than a spectrogram of {self.max_length} frames and "
                f"{self.num_mel_bins} mel bands, so there would be no patch. Make it smaller."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the frequency, and along the time."""
        rows = (self.num_mel_bins - self.patch_size) // (self.frequency_stride or 1) + 1
        return rows, (self.max_length - self.patch_size) // (self.time_stride or 1) + 1

    def check_decoder(self) -> None:
        """Check also that hidden patches share nothing with visible ones, and that nothing lies between patches."""
        super().check_decoder()
        strides = (self.frequency_stride, self.time_stride)
        if strides != (self.patch_size, self.patch_size):
            raise ConfigError(
                f"frequency_stride and time_stride are {strides[0]} and {strides[1]}; patches of {self.patch_size} "
                "that are hidden and predicted must lie side by side, so both must be that number."
            )

    def parameter_count(self) -> int:
        tables = self.patch_size**2 + self.num_patches + _LEAD
        return super().parameter_count() + self.hidden_size * tables


class SpectrogramEmbedding(nn.Module):
    """Embed the patches of spectrograms behind two tokens, (B, T, M) -> (B, 2 + N, D), the time running fastest.

    With ``visible``, (B, K) indices of patches, only these are returned: (B, 2 + K, D).
    """

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        strides = (config.frequency_stride or 1, config.time_stride or 1)
        self.projection = nn.Conv2d(1, config.hidden_size, config.patch_size, strides)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        places = config.num_patches + _LEAD
        self.positions = nn.Parameter(torch.zeros(1, places, config.hidden_size))

    def forward(self, values: Tensor, visible: Tensor | None = None) -> Tensor:
        x = self.projection(values.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        x = x + self.positions[:, _LEAD:]
        if visible is not None:
            x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
        tokens = torch.cat((self.class_token, self.distillation_token), dim=1)
        tokens = (tokens + self.positions[:, :_LEAD]).to(x.dtype)
        return torch.cat((tokens.expand(len(x), -1, -1), x), dim=1)


class AST(ImageBackbone):
    """Encoder of spectrograms; ``input_values`` (B, T, M) -> (B, 2 + N, D), class and distillation token first.

    With ``visible_index``, (B, K) indices of patches, it computes only these: (B, 2 + K, D).
    """

    model_type: ClassVar[str] = "audio-spectrogram-transformer"
    config_class: ClassVar[type[BackboneConfig]] = ASTConfig
    prefix: ClassVar[str] = "audio_spectrogram_transformer."
    lead_tokens: int = _LEAD
    processor_class: ClassVar[Any] = AudioProcessor
    unit_name: ClassVar[str] = "patches"
    architectures: ClassVar[Mapping[str | None, str]] = {
        **architectures_of("AST", "ForAudioClassification"),
        "masked-image": "ASTForPreTraining",
    }
    hf_keys: ClassVar[Mapping[str, Key]] = {
        **{k: v for k, v in ENCODER_KEYS.items() if k not in ("image_size", "num_channels")},
        "qkv_bias": Key("qkv_bias", True),
        "num_mel_bins": Key("num_mel_bins", 128),
        "max_length": Key("max_length", 1024),
        "frequency_stride": Key("frequency_stride", 10),
        "time_stride": Key("time_stride", 10),
        # Of the decoder, which transformers does not have for this family.
        **{name: Key(key.name, None, optional=True) for name, key in DECODER_KEYS.items()},
        "mask_ratio": Key("mask_ratio", 0.75, optional=True),
        "norm_pix_loss": Key("norm_pix_loss", True, optional=True),
    }

    def __init__(self, config: ASTConfig) -> None:
        super().__init__(config)
        block = config.block(attention_bias=config.qkv_bias, output_bias=True)
        self.embedding = SpectrogramEmbedding(config)
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size, config.norm_eps)

    @classmethod
    def default_processor(cls, config: Any) -> AudioProcessor:
        return AudioProcessor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        self.check_inputs(batch["input_values"], cache)
        x = self.drop(self.embedding(batch["input_values"], batch.get("visible_index")))
        x = self.run(x, AttentionMask(), keep=batch.get("keep_index"))
        found: Tensor = self.final_norm(x)
        return found

    # ------------------------------------------------------------------ what a batch is

    def check_inputs(self, values: Tensor, cache: KVCache | None) -> None:
        """Check that there are spectrograms of the size of the positions, and no key-value cache.

        Raises:
            ModelError: there is a cache, or they have another shape.
        """
        self.refuse_cache(cache, "reads audio, so it ")
        wanted = (self.config.max_length, self.config.num_mel_bins)
        if values.ndim != 3 or tuple(values.shape[1:]) != wanted:
            raise ModelError(
                f"input_values has the shape {tuple(values.shape)}; it must be (clips, {wanted[0]} frames, {wanted[1]} "
                "mel bands). The audio processor beside the weights returns that."
            )

    def random_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (2, self.config.max_length, self.config.num_mel_bins)
        return {"input_values": torch.randn(shape, generator=generator)}

    def units(self, batch: Batch) -> int:
        """Return the number of patches of all clips, hidden ones included."""
        patches: int = self.config.num_patches
        return len(batch["input_values"]) * patches

    def id_limits(self) -> dict[str, tuple[str, int]]:
        limit = ("number of patches", self.config.num_patches)
        return {"visible_index": limit, "hidden_index": limit}

    def embeddings(self) -> list[nn.Module]:
        return [self.embedding]

    def pooled(self, hidden: Tensor, how: str | None = None) -> Tensor:
        """As for images; None is the mean of the class and the distillation token, which a classifier reads."""
        return hidden[:, :_LEAD].mean(1) if how is None else super().pooled(hidden, how)

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        config = self.config
        if kind == "masked-image":
            config.check_decoder()
            return PixelDecoder(config, lead=_LEAD)
        norm = LayerNorm(config.hidden_size, config.norm_eps)
        return SequenceHead(config.hidden_size, num_labels, pool="pair", transform=norm)

    # ------------------------------------------------------------------ names on disk

    def names(self) -> list[Name]:
        return [
            *encoder_names(),
            Name("embeddings.distillation_token", ("embedding.distillation_token",)),
        ]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        if kind == "masked-image":
            return PixelDecoder.names(self.config)
        return [
            Name("classifier.layernorm", ("head.transform",), body=False),
            Name("classifier.dense", ("head.classifier",), body=False),
        ]
