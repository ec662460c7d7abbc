"""Two towers with a contrastive loss (CLIP, arXiv 2103.00020): images and texts in one space."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from own_vit import Scaler, ViT, ViTConfig, squares
from torch import nn
from torch.nn import functional as F

from pretrain import Objective, RowSource, Tokenizer, train_tokenizer
from pretrain.models.gpt2 import GPT2, GPT2Config
from pretrain.objectives.base import Loss, stack


class PairProcessor:
    """Tokenizer and image processor of the two towers."""

    def __init__(self, tokenizer, images):
        self.tokenizer, self.images = tokenizer, images
        text = tokenizer.fingerprint + images.fingerprint
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def save(self, directory):
        self.tokenizer.save(directory)
        self.images.save(directory)

    @classmethod
    def from_directory(cls, directory):
        return cls(Tokenizer.from_directory(directory), Scaler.from_directory(directory))


@dataclass(frozen=True, kw_only=True)
class TowersConfig(ViTConfig):
    text_length: int = 8


class Towers(ViT):
    """The image tower is the ViT that it inherits; the text tower is a GPT-2 beside it."""

    model_type, config_class, processor_class = "own-towers", TowersConfig, PairProcessor
    architectures = {None: "OwnTowersModel"}
    unit_name = "patches and tokens"

    def __init__(self, config):
        super().__init__(config)
        sizes = {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "num_heads")}
        text = GPT2Config(**sizes, num_layers=config.num_layers, max_positions=config.text_length)
        self.text = GPT2(text)
        self.scale = nn.Parameter(torch.empty(()))

    def init_parameter(self, name, value, seed):
        super().init_parameter(name, value, seed)
        if name.endswith("scale"):
            value.fill_(math.log(10.0))

    def units(self, batch):
        return super().units(batch) + batch["input_ids"].numel()

    def blocks(self):
        return [*self.layers, *self.text.layers]

    def embeddings(self):
        return [self.patches, *self.text.embeddings()]

    def forward(self, batch, *, cache=None):
        pictures = super().forward(batch).mean(1)
        texts = self.text({"input_ids": batch["input_ids"]})[:, -1]
        return torch.stack([F.normalize(x.float(), dim=-1) for x in (pictures, texts)])


class Contrast(Objective):
    couples_examples = True

    def collate(self, examples, rngs, *, evaluation=False):
        return stack(examples, ("pixel_values", "input_ids"))

    def count(self, batch):
        return torch.tensor(len(batch["input_ids"]))

    def forward(self, batch):
        images, texts = self.model.backbone(batch)
        all_images, first = self.whole_batch(images)
        all_texts, _ = self.whole_batch(texts)
        scale = self.model.backbone.scale.exp()
        target = first + torch.arange(len(images), device=images.device)
        logits = scale * images @ all_texts.T, scale * texts @ all_images.T
        total = sum(F.cross_entropy(x, target, reduction="sum") for x in logits) / 2
        right = sum((x.argmax(-1) == target).sum() for x in logits) / 2
        return Loss(total, torch.tensor(len(images)), {"retrieved": right})


def pairs(count: int = 40) -> RowSource:
    """Images of squares with a text of three letters for its colour and place."""
    source = squares(count)
    texts = [f"{'rgb'[i % 3]}{i % 4}{i % 5}" for i in range(count)]
    corpus = Path("pairs.txt")
    corpus.write_text("\n".join(texts), encoding="utf-8")
    tokenizer = train_tokenizer(corpus, "char")
    ids = [np.array(tokenizer.encode(text)[:3]) for text in texts]
    images = [*source.valid, *source.train]
    rows = [{**image, "input_ids": row} for image, row in zip(images, ids, strict=True)]
    overrides = {**source.overrides, "vocab_size": len(tokenizer)}
    processor = PairProcessor(tokenizer, source.processor)
    return RowSource(rows[8:], rows[:8], processor=processor, overrides=overrides)
