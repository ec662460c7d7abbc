"""CLIP (arXiv 2103.00020): a tower for images and one for texts, whose vectors are compared by their cosine.

Letters: B rows, T tokens, N patches, D hidden, P size of the vectors of both towers, L blocks of a tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.images.pairs import PairProcessor
from pretrain.errors import ConfigError, ModelError
from pretrain.models.backbone import Backbone, Batch, ModelStats
from pretrain.models.config import BackboneConfig, ConfigReader, Key, written_keys
from pretrain.models.heads import architectures_of
from pretrain.models.image_backbone import image_processor, random_images
from pretrain.models.names import Name, renamed
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block, BlockConfig, columns_of, run_block
from pretrain.nn.norm import LayerNorm, compute_dtype
from pretrain.nn.patches import PatchEmbedding

__all__ = [
    "CLIP",
    "VISION_KEYS",
    "CLIPConfig",
    "PairBackbone",
    "TowersConfig",
    "TwoTowers",
    "image_tower_names",
    "read_part",
    "written_part",
]

# transformers has no dropout in these families and ignores the key, so it is there for training alone.
DROPOUT = Key("dropout", 0.0, optional=True)
# Sizes of an image tower in vision_config.
VISION_KEYS: Mapping[str, Key] = {
    "vision_hidden_size": Key("hidden_size", 768),
    "vision_intermediate_size": Key("intermediate_size", 3072),
    "vision_num_layers": Key("num_hidden_layers", 12),
    "vision_num_heads": Key("num_attention_heads", 12),
    "num_channels": Key("num_channels", 3),
    "image_size": Key("image_size", 224, square=True),
    "patch_size": Key("patch_size", 16, square=True),
}
# An end token that old files name wrongly; transformers then pools at the largest id.
_LEGACY_EOS = 2


@dataclass(frozen=True, kw_only=True)
class TowersConfig(BackboneConfig):
    """Fields of two towers; those that all families share describe the text tower.

    Attributes:
        vision_hidden_size, vision_num_layers, vision_num_heads, vision_intermediate_size: sizes of the image tower;
            those of the text tower when None.
        image_size: side of the images in pixels.
        patch_size: side of a patch.
        num_channels: channels of the images.
        projection_dim: P; D of the text tower when None.
    """

    max_positions: int = 77
    vision_hidden_size: int | None = None
    vision_num_layers: int | None = None
    vision_num_heads: int | None = None
    vision_intermediate_size: int | None = None
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    projection_dim: int | None = None

    learned_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        width = self.vision_hidden_size or self.hidden_size
        self.set_defaults(
            vision_hidden_size=width,
            vision_num_layers=self.num_layers,
            vision_num_heads=self.num_heads,
            vision_intermediate_size=4 * width,
            projection_dim=self.hidden_size,
        )
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}, so an image would have no "
                "patch. Make it smaller: a divisor of image_size."
            )
        width, heads = self.vision_hidden_size or 0, self.vision_num_heads or 1
        if width % heads:
            raise ConfigError(
                f"vision_hidden_size {width} is not a multiple of vision_num_heads {heads}. Change one of them."
            )

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2

    def divisible(self) -> dict[str, int]:
        names = ("vision_num_heads", "vision_intermediate_size")
        return super().divisible() | {name: getattr(self, name) for name in names}

    def vision_block(self) -> BlockConfig:
        """Return the options of the blocks of the image tower."""
        return replace(
            self.block(),
            hidden_size=self.vision_hidden_size or 0,
            num_heads=self.vision_num_heads or 1,
            intermediate_size=self.vision_intermediate_size or 0,
            num_kv_heads=None,
            head_dim=None,
        )

    def parameter_count(self) -> int:
        d, inner = self.vision_hidden_size or 0, self.vision_intermediate_size or 0
        tables = self.num_channels * self.patch_size**2 + self.num_patches
        image = d * (tables + (self.vision_num_layers or 0) * (4 * d + 2 * inner))
        return super().parameter_count() + image


class TextTower(nn.Module):
    """Token and position embeddings, blocks and a last norm."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, size)
        self.position_embedding = nn.Embedding(config.max_positions, size)
        self.layers = nn.ModuleList(Block(config.block()) for _ in range(config.num_layers))
        self.norm = LayerNorm(size, config.norm_eps)


class ImageTower(nn.Module):
    """Patches, blocks, a last norm, and in CLIP a norm before the first block."""

    def __init__(self, config: TowersConfig, *, class_token: bool, first_norm: bool) -> None:
        super().__init__()
        block = config.vision_block()
        size = block.hidden_size
        shape = (size, config.image_size, config.patch_size, config.num_channels)
        # CLIP has a class token and no bias, SigLIP a bias and no class token.
        self.patches = PatchEmbedding(*shape, class_token=class_token, bias=not class_token, lead=0)
        self.first_norm = LayerNorm(size, block.norm_eps) if first_norm else None
        self.layers = nn.ModuleList(Block(block) for _ in range(config.vision_num_layers or 0))
        self.norm = LayerNorm(size, block.norm_eps)

    def embed(self, pixels: Tensor) -> Tensor:
        """Return what the first block reads, (B, C, H, W) -> (B, T, D).

        Raises:
            ModelError: the images are not of the size of the model.
        """
        self.patches.check(pixels)
        x: Tensor = self.patches(pixels)
        return x if self.first_norm is None else self.first_norm(x)


def tower_std(config: TowersConfig, name: str, *, image: bool) -> float:
    """Return the standard deviation of an initial matrix of a tower: ``initialize_parameters`` of CLIP's code."""
    width = (config.vision_hidden_size if image else config.hidden_size) or 1
    layers = (config.vision_num_layers if image else config.num_layers) or 1
    base = 1 / math.sqrt(width)
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        return 0.0 if config.zero_init_outputs else base / math.sqrt(2 * layers)
    return math.sqrt(0.5 / width) if name.endswith("mlp.up.weight") else base


def image_tower_names(disk: str, own: str) -> dict[str, str]:
    """Return name on disk -> name in memory of an image tower; see ``tower_names``."""
    return tower_names(disk, own) | {
        f"{disk}.embeddings.class_embedding": f"{own}patches.class_token",
        f"{disk}.embeddings.patch_embedding": f"{own}patches.projection",
        f"{disk}.embeddings.position_embedding.weight": f"{own}patches.positions",
        f"{disk}.pre_layrnorm": f"{own}first_norm",  # so it is spelled in the files
        f"{disk}.post_layernorm": f"{own}norm",
    }


def tower_names(disk: str, own: str) -> dict[str, str]:
    """Return name on disk -> name in memory of the parts of a block of one tower.

    Args:
        disk: name of the tower on disk.
        own: prefix of its names in memory.
    """
    parts = {
        "layer_norm1": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.out_proj": "attention.output",
        "layer_norm2": "mlp_norm",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    return {
        f"{disk}.encoder.layers.{{n}}.{part}": f"{own}layers.{{n}}.{memory}"
        for part, memory in parts.items()
    }


def read_part(
    reader: ConfigReader, part: str, keys: Mapping[str, Key], family: type[Backbone]
) -> dict[str, Any]:
    """Return the fields of one tower, from ``text_config`` or ``vision_config`` of config.json.

    Args:
        reader: of config.json.
        part: the key.
        keys: field -> its key in there.
        family: class of the model.

    Raises:
        ConfigError: an older key of the file, which transformers reads too, has other values.
    """

    def read(key: str, given: Mapping[str, Any]) -> dict[str, Any]:
        inner = ConfigReader(given, f"{family.model_type} ({key})")
        return inner.fields_of(family.config_class, keys)

    found = read(part, reader.mapping(part) or {})
    if (given := reader.mapping(f"{part}_dict")) is not None:
        # transformers lets this older key, with its defaults, take precedence.
        older = read(f"{part}_dict", given)
        if wrong := next((name for name in keys if older[name] != found[name]), None):
            raise ConfigError(
                f"config.json: {part}_dict and {part} do not agree on {keys[wrong].name!r}. Correct {part}, and remove "
                f"{part}_dict."
            )
    return found


def written_part(backbone: Backbone, part: str, keys: Mapping[str, Key]) -> dict[str, Any]:
    """Return ``text_config`` or ``vision_config`` of config.json, where ``part`` is ``text`` or ``vision``."""
    kind = {"model_type": f"{backbone.model_type}_{part}_model"}
    return {f"{part}_config": kind | written_keys(backbone.config, keys)}


class PairBackbone(Backbone):
    """Base class of the families that read images under ``pixel_values`` and texts under ``input_ids``."""

    processor_class: ClassVar[Any] = PairProcessor
    unit_name: ClassVar[str] = "patches and tokens"

    @classmethod
    def default_processor(cls, config: Any) -> PairProcessor | None:
        images = image_processor(config)
        return None if images is None else PairProcessor(None, images)

    def units(self, batch: Batch) -> int:
        """Return the patches of the images and the tokens of the texts, without padding."""
        patches: int = self.config.num_patches
        images = len(batch["pixel_values"]) * patches if "pixel_values" in batch else 0
        return images + (super().units(batch) if "input_ids" in batch else 0)

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        """Initialise as usual; the class token, a vector, is drawn like a row of a matrix."""
        super().init_parameter(name, value[None] if name.endswith("class_token") else value, seed)


class TwoTowers(PairBackbone):
    """Unit vectors of the images under ``pixel_values`` and the texts under ``input_ids``: (images + texts, P)."""

    causal: ClassVar[bool] = False
    prefix: ClassVar[str] = ""
    default_task: ClassVar[str | None] = "image-text-retrieval"
    text: TextTower
    image: ImageTower
    logit_scale: nn.Parameter

    # ------------------------------------------------------------------ implemented by the family

    def encode_images(self, pixels: Tensor, *, whole: bool = True) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of the image tower and the pooled vectors, as transformers does.

        Unless ``whole``, the states may be only those that are pooled, and the last block computes no others.
        """
        raise NotImplementedError

    def encode_texts(
        self, ids: Tensor, mask: Tensor | None = None, *, whole: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of the text tower and the pooled vectors; see ``encode_images``."""
        raise NotImplementedError

    def image_vectors(self, pixels: Tensor) -> Tensor:
        """Return the vectors of images, not normalised, (B, C, H, W) -> (B, P)."""
        return self.encode_images(pixels, whole=False)[1]

    def text_vectors(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the vectors of texts, not normalised, (B, T) -> (B, P)."""
        return self.encode_texts(ids, mask, whole=False)[1]

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the similarity of unit vectors, times the learned scale, in fp32, (images, texts)."""
        # The rounding of bf16 times a scale of 100 would be as large as the differences between scores.
        with torch.autocast(images.device.type, enabled=False):
            return self.logit_scale.float().exp() * (images.float() @ texts.float().T)

    @property
    def end_id(self) -> int | None:
        """The token at which a text is read, which every text must hold; None if there is none."""
        return None

    # ------------------------------------------------------------------ shared

    @property
    def token_embedding(self) -> nn.Embedding:
        """The token embedding of the text tower, which tensor parallelism cuts."""
        return self.text.token_embedding

    def vectors(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return unit vectors of the images and of the texts of a batch, in fp32; None for what it lacks.

        Raises:
            ModelError: it has neither, or packed texts.
        """
        if "document_ids" in batch:
            raise ModelError(
                f"A {self.model_type} model gives one vector to each row, but these rows are packed with several "
                "documents (document_ids). Put one text in each row."
            )
        images = texts = None
        if "pixel_values" in batch:
            images = F.normalize(self.image_vectors(batch["pixel_values"]).float(), dim=-1)
        if "input_ids" in batch:
            found = self.text_vectors(batch["input_ids"], batch.get("attention_mask"))
            texts = F.normalize(found.float(), dim=-1)
        if images is None and texts is None:
            raise ModelError(
                f"A batch with {', '.join(batch)} has nothing for either tower of a {self.model_type} model. Give "
                "pixel_values, input_ids, or both."
            )
        return images, texts

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        self.refuse_cache(cache, "")
        return torch.cat([rows for rows in self.vectors(batch) if rows is not None])

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embed ids with their positions, (B, T) -> (B, T, D)."""
        _, columns = self.span({"input_ids": ids}, None)
        x = self.look_up(self.text.token_embedding, ids)
        return x + self.text.position_embedding.weight[:columns]

    def through(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        x: Tensor,
        mask: AttentionMask,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks of one tower, (B, T, D) -> (B, T, D), or only (B, K) columns of each row in the last one."""
        if self.compiled:
            first: Any = layers[0]
            width: int = first.attention.head_dim
            mask.prepare(x.shape[1], x.device, compute_dtype(x), width)
        for i, layer in enumerate(layers):
            x = run_block(layer, x, keep if i == len(layers) - 1 else None, mask=mask)
        return x

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the image tower, then those of the text tower."""
        return [*self.image.layers, *self.text.layers]

    def embeddings(self) -> list[nn.Module]:
        return [self.image.patches, self.text.token_embedding, self.text.position_embedding]

    def random_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        batch = super().random_batch(generator)
        if self.config.eos_id is not None:
            batch["input_ids"][:, -1] = self.config.eos_id
        return batch | random_images(self.config, generator)

    def id_limits(self) -> dict[str, tuple[str, int]]:
        return {"input_ids": ("vocabulary", self.vocab_size)}

    def stats(self) -> ModelStats:
        config = self.config
        return ModelStats(
            hidden=max(config.hidden_size, config.vision_hidden_size),
            layers=max(config.num_layers, config.vision_num_layers),
            intermediate=max(config.intermediate_size, config.vision_intermediate_size),
            vocabulary=self.vocab_size,
        )

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        super().init_parameter(name, value, seed)
        if name.endswith("logit_scale"):
            value.fill_(self.first_scale())

    def first_scale(self) -> float:
        """Return the logarithm of the initial scale of the scores."""
        raise NotImplementedError

    # ------------------------------------------------------------------ names and files

    def names(self) -> list[Name]:
        pairs = tower_names("text_model", "text.") | image_tower_names("vision_model", "image.")
        pairs |= {
            "text_model.embeddings.token_embedding": "text.token_embedding",
            "text_model.embeddings.position_embedding": "text.position_embedding",
            "text_model.final_layer_norm": "text.norm",
        }
        return renamed(pairs)

    # Fields in text_config and vision_config of config.json; those in both must be equal there.
    text_keys: ClassVar[Mapping[str, Key]]
    vision_keys: ClassVar[Mapping[str, Key]]

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        found = reader.fields_of(cls.config_class, cls.hf_keys)
        for part, keys in (("text_config", cls.text_keys), ("vision_config", cls.vision_keys)):
            for name, value in read_part(reader, part, keys, cls).items():
                if name in cls.hf_keys:
                    continue  # projection_dim of a tower alone, of which this model has no use
                if name in found and found[name] != value:
                    key = keys[name].name
                    raise ConfigError(
                        f"config.json: {key!r} is {value!r} in {part} and {found[name]!r} in text_config, which this "
                        f"package does not implement for {cls.model_type}: both towers have the same."
                    )
                found[name] = value
        return found

    def to_hf_config(self) -> dict[str, Any]:
        written = written_keys(self.config, self.hf_keys)
        written |= written_part(self, "text", self.text_keys)
        return written | written_part(self, "vision", self.vision_keys)


_SHARED = {
    "attention_dropout": Key("attention_dropout", 0.0),
    "initializer_range": Key("initializer_range", 0.02),
    "dropout": DROPOUT,
}


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(TowersConfig):
    """Fields of CLIP.

    Attributes:
        eos_id: the token that ends every text, whose hidden state is the vector of the text.
        largest_id: the vector of a text is that of its largest id, as in the files that name 2 as their end token.
        logit_scale_init_value: logarithm of the initial scale of the scores, ln(1 / 0.07).
    """

    vocab_size: int = 49408
    activation: str = "quick_gelu"
    eos_id: int | None = 49407
    largest_id: bool = False
    logit_scale_init_value: float = 2.6592

    def validate(self) -> None:
        super().validate()
        if self.largest_id:
            return
        if self.eos_id is None:
            raise ConfigError(
                "eos_id of a clip model must be set to an id of its vocabulary: the vector of a text is the hidden "
                "state of its end token."
            )
        if self.eos_id == _LEGACY_EOS:
            raise ConfigError(
                f"eos_id {_LEGACY_EOS} cannot be saved for transformers, which then takes the token with the largest "
                "id for the end of a text (as in old files). Use a tokenizer whose end token has another id."
            )


class CLIP(TwoTowers):
    """Image tower with a class token, causal text tower; projections of both to P."""

    model_type: ClassVar[str] = "clip"
    config_class: ClassVar[type[BackboneConfig]] = CLIPConfig
    architectures: ClassVar[Mapping[str | None, str]] = architectures_of(
        "CLIP", "ForImageClassification"
    )
    successors: ClassVar[Mapping[str, str]] = {
        "image-classification": "pretrain.models.image_tower:CLIPVision"
    }
    hf_keys: ClassVar[Mapping[str, Key]] = {
        "projection_dim": Key("projection_dim", 512),
        "logit_scale_init_value": Key("logit_scale_init_value", 2.6592),
    }
    text_keys: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size", 49408),
        "hidden_size": Key("hidden_size", 512),
        "intermediate_size": Key("intermediate_size", 2048),
        "projection_dim": Key("projection_dim", 512),
        "num_layers": Key("num_hidden_layers", 12),
        "num_heads": Key("num_attention_heads", 8),
        "max_positions": Key("max_position_embeddings", 77),
        "activation": Key("hidden_act", "quick_gelu"),
        "norm_eps": Key("layer_norm_eps", 1e-5),
        **_SHARED,
        "pad_id": Key("pad_token_id", 1),
        "bos_id": Key("bos_token_id", 49406),
        "eos_id": Key("eos_token_id", 49407),
    }
    vision_keys: ClassVar[Mapping[str, Key]] = {
        **VISION_KEYS,
        "patch_size": Key("patch_size", 32, square=True),
        "projection_dim": Key("projection_dim", 512),
        "activation": Key("hidden_act", "quick_gelu"),
        "norm_eps": Key("layer_norm_eps", 1e-5),
        **_SHARED,
    }

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        width, size = config.vision_hidden_size or 0, config.projection_dim or 0
        self.image = ImageTower(config, class_token=True, first_norm=True)
        self.text = TextTower(config)
        self.image_projection = nn.Linear(width, size, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, size, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))

    @property
    def end_id(self) -> int | None:
        end: int | None = None if self.config.largest_id else self.config.eos_id
        return end

    def encode_images(self, pixels: Tensor, *, whole: bool = True) -> tuple[Tensor, Tensor]:
        tower = self.image
        x = tower.embed(pixels)
        first = None if whole else torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        hidden = self.through(tower.layers, x, AttentionMask(), first)
        return hidden, tower.norm(hidden[:, 0])

    def encode_texts(
        self, ids: Tensor, mask: Tensor | None = None, *, whole: bool = True
    ) -> tuple[Tensor, Tensor]:
        batch = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        if self.config.largest_id:
            last = ids.argmax(dim=-1)
        else:
            ends = ids == self.config.eos_id
            if ids.is_cpu and not bool(ends.any(dim=1).all()):
                raise ModelError(
                    f"Row {int((~ends.any(dim=1)).nonzero()[0])} of input_ids has no end token "
                    f"(eos_id {self.config.eos_id}), whose hidden state is the vector of a text. Encode the texts with "
                    "the tokenizer of the model, and keep the end token when cutting them."
                )
            last = ends.int().argmax(dim=-1)  # the first, because padding may have the same id
        last = last[:, None]
        seen = AttentionMask.from_batch(batch, causal=True)
        x = self.through(self.text.layers, self.embed_tokens(ids), seen, None if whole else last)
        hidden = self.text.norm(x)
        return hidden, (columns_of(hidden, last) if whole else hidden)[:, 0]

    def image_vectors(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.image_projection(self.encode_images(pixels, whole=False)[1])
        return found

    def text_vectors(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.text_projection(self.encode_texts(ids, mask, whole=False)[1])
        return found

    def first_scale(self) -> float:
        scale: float = self.config.logit_scale_init_value
        return scale

    def init_std(self, name: str) -> float:
        """Return the standard deviations of the published code; see ``tower_std``."""
        if ".text." in name and "embedding" in name:
            return 0.01 if "position" in name else 0.02
        if "patches.projection" in name:
            return super().init_std(name)
        return tower_std(self.config, name, image=".image" in name)

    def names(self) -> list[Name]:
        return [
            *super().names(),
            Name("visual_projection", ("image_projection",)),
            Name("text_projection", ("text_projection",)),
            Name("logit_scale", ("logit_scale",), scalar=True),
        ]

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        found = super().fields_from_hf(reader)
        return found | {"largest_id": found["eos_id"] == _LEGACY_EOS}
