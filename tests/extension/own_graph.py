"""A graph transformer with a bias of the attention by distance (Graphormer, arXiv 2106.05234), and masked nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pretrain import Objective, RowSource
from pretrain.models.backbone import Backbone
from pretrain.models.config import BackboneConfig
from pretrain.nn.attention import AttentionMask
from pretrain.nn.block import Block, BlockConfig
from pretrain.objectives.base import Loss

KINDS, FAR = (
    3,
    4,
)  # kinds of nodes, besides that of a hidden one; the largest distance that is told apart


@dataclass(frozen=True, kw_only=True)
class GraphConfig(BackboneConfig):
    vocab_size: int = 0
    max_positions: int = 0


class Graph(Backbone):
    model_type, config_class, causal, prefix = "own-graph", GraphConfig, False, ""
    architectures = {None: "OwnGraphModel"}
    unit_name = "nodes"

    def __init__(self, config):
        super().__init__(config)
        self.kinds = nn.Embedding(KINDS + 1, config.hidden_size)
        self.distances = nn.Embedding(FAR + 1, config.num_heads)
        sizes = {"num_heads": config.num_heads, "intermediate_size": config.intermediate_size}
        block = BlockConfig(hidden_size=config.hidden_size, **sizes)
        self.layers = nn.ModuleList(Block(block) for _ in range(config.num_layers))

    def units(self, batch):
        return int((batch["graph_ids"] != 0).sum())

    def id_limits(self):
        return {"node_kinds": ("kinds of nodes", KINDS + 1)}

    def embeddings(self):
        return [self.kinds, self.distances]

    def forward(self, batch, *, cache=None):
        bias = self.distances(batch["distances"]).permute(0, 3, 1, 2)  # (B, H, N, N)
        mask = AttentionMask(documents=batch["graph_ids"], bias=bias)
        n = len(self.layers)
        return self.run(self.kinds(batch["node_kinds"]), [mask] * n, [None] * n, cache)


class MaskedNodes(Objective):
    """Cross entropy of the kinds of hidden nodes."""

    def __init__(self, model):
        super().__init__(model)
        self.decoder = nn.Linear(model.backbone.config.hidden_size, KINDS)

    def collate(self, examples, rngs, *, evaluation=False):
        size = max(len(example["node_kinds"]) for example in examples)
        batch = {
            "node_kinds": torch.zeros(len(examples), size, dtype=torch.long),
            "labels": torch.full((len(examples), size), -100),
            "graph_ids": torch.zeros(len(examples), size, dtype=torch.long),
            "distances": torch.full((len(examples), size, size), FAR),
        }
        for i, (example, rng) in enumerate(zip(examples, rngs, strict=True)):
            kinds = torch.from_numpy(example["node_kinds"])
            n, hidden = len(kinds), int(rng.integers(len(kinds)))
            batch["labels"][i, hidden] = kinds[hidden]
            batch["node_kinds"][i, :n] = kinds
            batch["node_kinds"][i, hidden] = KINDS
            batch["graph_ids"][i, :n] = 1
            batch["distances"][i, :n, :n] = torch.from_numpy(example["distances"])
        return batch

    def forward(self, batch):
        labels = batch["labels"]
        scores = self.decoder(self.model.backbone(batch))[labels != -100]
        wanted = labels[labels != -100]
        total = nn.functional.cross_entropy(scores, wanted, reduction="sum")
        return Loss(
            total, (labels != -100).sum(), {"accuracy": (scores.argmax(-1) == wanted).sum()}
        )


def rings(count: int = 120) -> RowSource:
    """Rings of 4 to 9 nodes; the kind of a node repeats along the ring, so that neighbours tell a hidden one."""
    rows = []
    for i in range(count):
        n = 4 + i % 6
        place = np.arange(n)
        apart = np.abs(place[:, None] - place[None])
        distances = np.minimum(np.minimum(apart, n - apart), FAR)
        rows.append({"node_kinds": np.full(n, i % KINDS), "distances": distances})
    return RowSource(rows[20:], rows[:20], name="rings")
