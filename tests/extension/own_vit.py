"""A vision transformer that reconstructs masked patches (MAE, arXiv 2111.06377): family, processor, objective, rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pretrain import Objective, RowSource
from pretrain.models.backbone import Backbone
from pretrain.models.config import BackboneConfig
from pretrain.nn.attention import AttentionMask
from pretrain.nn.block import Block, BlockConfig
from pretrain.objectives.base import Loss, stack


class Scaler:
    """Image processor: pixels 0-255 to numbers of mean 0 and deviation 1."""

    def __init__(self, mean=128.0, std=64.0):
        self.settings = {"image_mean": mean, "image_std": std}
        self.fingerprint = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()

    def __call__(self, image):
        return (np.float32(image) - self.settings["image_mean"]) / self.settings["image_std"]

    def save(self, directory):
        Path(directory).mkdir(exist_ok=True)
        Path(directory, "preprocessor_config.json").write_text(json.dumps(self.settings))

    @classmethod
    def from_directory(cls, directory):
        found = json.loads(Path(directory, "preprocessor_config.json").read_text())
        return cls(found["image_mean"], found["image_std"])


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BackboneConfig):
    vocab_size: int = 0
    max_positions: int = 0
    image_size: int = 8
    patch_size: int = 4


class ViT(Backbone):
    model_type, config_class, causal, prefix = "own-vit", ViTConfig, False, ""
    architectures = {None: "OwnViTModel"}
    processor_class, unit_name = Scaler, "patches"

    def __init__(self, config):
        super().__init__(config)
        side = config.image_size // config.patch_size
        self.patches = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.places = nn.Parameter(torch.empty(side * side, config.hidden_size))
        sizes = {"num_heads": config.num_heads, "intermediate_size": config.intermediate_size}
        block = BlockConfig(hidden_size=config.hidden_size, **sizes)
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))

    def units(self, batch):
        return len(batch["pixel_values"]) * len(self.places)

    def id_limits(self):
        return {}

    def embeddings(self):
        return [self.patches]

    def forward(self, batch, *, cache=None):
        x = self.patches(batch["pixel_values"]).flatten(2).transpose(1, 2)
        if "hidden_patches" in batch:
            x = x.masked_fill(batch["hidden_patches"][..., None], 0.0)
        n = len(self.layers)
        return self.run(x + self.places, [AttentionMask()] * n, [None] * n, cache)


class MaskedPatches(Objective):
    """Mean squared error of the pixels of hidden patches."""

    def __init__(self, model, rate: float = 0.5):
        super().__init__(model)
        config, self.rate = model.backbone.config, rate
        self.size = config.patch_size
        self.decoder = nn.Linear(config.hidden_size, 3 * self.size**2)

    def collate(self, examples, rngs, *, evaluation=False):
        batch = stack(examples, ("pixel_values",))
        count = len(self.model.backbone.places)
        order = np.stack([rng.permutation(count) for rng in rngs])
        return {**batch, "hidden_patches": torch.from_numpy(order < int(count * self.rate))}

    def count(self, batch):
        return batch["hidden_patches"].sum()

    def forward(self, batch):
        hidden = batch["hidden_patches"]
        pixels = nn.functional.unfold(batch["pixel_values"], self.size, stride=self.size)
        error = self.decoder(self.model.backbone(batch)) - pixels.transpose(1, 2)
        return Loss(error.square().mean(-1)[hidden].sum(), hidden.sum())

    def describe(self):
        return {"name": "MaskedPatches", "rate": self.rate}


def squares(count: int = 40) -> RowSource:
    """Images with one coloured square each."""
    images, scale = np.zeros((count, 3, 8, 8), np.uint8), Scaler()
    for i, image in enumerate(images):
        image[i % 3, i % 4 : i % 4 + 4, i % 5 : i % 5 + 4] = 50 + 5 * i
    rows = [{"pixel_values": scale(image)} for image in images]
    return RowSource(rows[8:], rows[:8], processor=scale, overrides={"image_size": 8})
