"""A residual network (arXiv 1512.03385) of somebody's own, with BatchNorm, and its objective: one file.

resnet.py FOLDER {ddp,fsdp} PRECISION    trains in FOLDER/{ddp,fsdp}; every rank writes its buffers to a file
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.models import build
from pretrain.models.backbone import Backbone, ModelStats
from pretrain.models.config import BackboneConfig, Key
from pretrain.models.names import Name
from pretrain.objectives.base import Loss, Objective, stack
from pretrain.training.trainer import Trainer

_PIXELS = 36  # of an image


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(BackboneConfig):
    vocab_size: int = 0
    max_positions: int = 0
    channels: tuple[int, ...] = (4, 8, 8)


class Unit(nn.Module):
    """Two convolutions and, where the number of channels changes, a projection beside them."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(Backbone):
    """Images (B, 1, H, W) under ``pixel_values`` -> (B, D)."""

    model_type = "tiny-resnet"
    config_class = ResNetConfig
    prefix = "resnet."
    prefixes = ("resnet.",)
    hf_keys = {"channels": Key("hidden_sizes", (4, 8, 8))}
    architectures = {
        None: "TinyResNet",
        "sequence-classification": "TinyResNetForSequenceClassification",
    }
    unit_name = "images"

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        sizes = config.channels
        self.stem = nn.Conv2d(1, sizes[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(sizes[0])
        self.layers = nn.ModuleList(Unit(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, batch: Mapping[str, Tensor], *, cache: Any = None) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(batch["pixel_values"] * self.scale)))
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))

    def embeddings(self) -> list[nn.Module]:
        return [self.stem, self.stem_norm]

    def units(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["pixel_values"])

    def id_limits(self) -> dict[str, tuple[str, int]]:
        return {}

    def stats(self) -> ModelStats:
        wide = max(self.config.channels)
        return ModelStats(wide, len(self.layers), wide, kept=4.0 * 6 * wide * _PIXELS)

    def flops_per_unit(self, weights: int, row_length: int) -> float:
        return 6.0 * weights * _PIXELS

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        return Classifier(self.config.channels[-1], num_labels)

    def names(self) -> list[Name]:
        layer = "layers.{n}."
        pairs = {"layer.0.convolution": "first", "layer.0.normalization": "first_norm"}
        pairs |= {"layer.1.convolution": "second", "layer.1.normalization": "second_norm"}
        pairs |= {"shortcut.convolution": "shortcut"}
        rules = [Name("encoder." + layer + disk, (layer + own,)) for disk, own in pairs.items()]
        stem = {"embedder.convolution": "stem", "embedder.normalization": "stem_norm"}
        return [*(Name(disk, (own,)) for disk, own in stem.items()), *rules]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        return [
            Name(f"classifier.{i}", (f"head.{n}",), body=False)
            for i, n in enumerate(("norm", "out"))
        ]


class Classifier(nn.Module):
    def __init__(self, size: int, labels: int) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(size), nn.Linear(size, labels)

    def forward(self, hidden: Tensor, batch: Any = None) -> Tensor:
        return self.out(self.norm(hidden))


class Classify(Objective):
    """Cross entropy of one label per image."""

    def collate(self, examples: Any, rngs: Any, *, evaluation: bool = False) -> dict[str, Tensor]:
        return stack(examples, ("labels", "pixel_values"))

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        logits = self.model(batch).float()
        total = F.cross_entropy(logits, batch["labels"], reduction="sum")
        right = (logits.argmax(-1) == batch["labels"]).sum().float()
        return Loss(total, torch.tensor(float(len(logits))), {"accuracy": right})


def images(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Bright squares on the left or on the right."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        image = rng.normal(0.0, 1.0, (1, 6, 6)).astype(np.float32)
        image[:, :, 3 * (i % 2) : 3 * (i % 2) + 3] += 2.0
        rows.append({"pixel_values": image, "labels": np.int64(i % 2)})
    return rows


def trainer(out: Path, *, strategy: str = "auto", limit: int = 6, **options: Any) -> Trainer:
    model = build(
        "extension.resnet:ResNet", head="sequence-classification", labels=2, device="meta"
    )
    optim = {k: options.pop(k) for k in ("ema",) if k in options}
    settings = {"out": str(out), "limit": f"{limit} steps", "batch_rows": 8, "micro_rows": 4}
    settings |= {"precision": "fp32", "save_every": "3 steps", "eval_every": "0 steps", "keep": 9}
    return Trainer(
        Classify(model),
        images(40),
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0.0, **optim),
        train=TrainConfig(**(settings | options)),
        parallel=ParallelConfig(device="cpu", strategy=strategy),
        eval_data=images(8, seed=1),
        quiet=True,
    )


if __name__ == "__main__":
    from extension import resnet  # the objective's own name is in the checkpoints
    from pretrain.distributed.world import current_world

    task = resnet.trainer(
        Path(sys.argv[1]) / sys.argv[2], strategy=sys.argv[2], precision=sys.argv[3]
    )
    task.fit()
    held = {name: b.clone() for name, b in task.objective.named_buffers()}
    torch.save(held, Path(sys.argv[1]) / f"{sys.argv[2]}-{current_world().rank}.pt")
