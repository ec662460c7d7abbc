"""An encoder-decoder (T5, arXiv 1910.10683) that writes what was cut from a text: two stacks with cross attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pretrain.models.backbone import Backbone
from pretrain.models.config import BackboneConfig
from pretrain.nn.attention import AttentionMask
from pretrain.nn.block import Block, BlockConfig
from pretrain.objectives.base import Loss, Objective


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(BackboneConfig):
    decoder_layers: int = 2


class Seq2Seq(Backbone):
    model_type, config_class, prefix = "own-seq2seq", Seq2SeqConfig, ""
    architectures = {None: "OwnSeq2SeqModel"}

    def __init__(self, config):
        super().__init__(config)
        sizes = {"num_heads": config.num_heads, "intermediate_size": config.intermediate_size}
        plain = BlockConfig(hidden_size=config.hidden_size, **sizes)
        crossed = BlockConfig(hidden_size=config.hidden_size, cross_attention=True, **sizes)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(plain) for _ in range(config.num_layers))
        self.decoder = nn.ModuleList(Block(crossed) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def blocks(self):
        return [*self.layers, *self.decoder]

    def embeddings(self):
        return [self.token_embedding, self.places]

    def units(self, batch):
        return sum(batch[key].numel() for key in ("input_ids", "decoder_input_ids"))

    def embed(self, ids):
        place = torch.arange(ids.shape[1], device=ids.device)
        return self.look_up(self.token_embedding, ids) + self.places(place)

    def forward(self, batch, *, cache=None):
        n, mask = len(self.layers), AttentionMask()
        context = self.run(self.embed(batch["input_ids"]), [mask] * n, [None] * n, None)
        x = self.embed(batch["decoder_input_ids"])
        for block in self.decoder:
            x = block(x, mask=AttentionMask(causal=True), context=context, context_mask=mask)
        return self.norm(x)


class CutSpan(Objective):
    """Next token of a span that was cut out of the text and is marked there by the pad token."""

    def __init__(self, model, span: int = 4):
        super().__init__(model)
        self.span, self.mark = span, model.tokenizer.pad_id

    def collate(self, examples, rngs, *, evaluation=False):
        ids = np.stack([example["input_ids"] for example in examples]).astype(np.int64)
        first = [int(rng.integers(1, ids.shape[1] - self.span)) for rng in rngs]
        cut = np.stack([row[i : i + self.span] for row, i in zip(ids, first, strict=True)])
        text = [
            np.concatenate([row[:i], [self.mark], row[i + self.span :]])
            for row, i in zip(ids, first, strict=True)
        ]
        before = np.concatenate([np.full((len(cut), 1), self.mark), cut[:, :-1]], 1)
        arrays = {"input_ids": np.stack(text), "decoder_input_ids": before, "labels": cut}
        return {key: torch.from_numpy(value) for key, value in arrays.items()}

    def forward(self, batch):
        hidden = self.model.backbone(batch)
        scores = hidden @ self.model.backbone.token_embedding.weight.T
        total = nn.functional.cross_entropy(
            scores.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )
        return Loss(total, torch.tensor(batch["labels"].numel()))

    def describe(self):
        return {"name": "CutSpan", "span": self.span}
