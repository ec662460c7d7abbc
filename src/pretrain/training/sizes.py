"""Sizes of a model family: parameters, estimated memory, and measured time and loss.

``sizes.json`` is written by docs/sizes.py, which trains the small sizes on one CPU thread; a size that was not trained
there has no figures for time and loss.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.distributed.estimates import MeshShape, Needs, memory
from pretrain.models import build, own_family
from pretrain.printing import aligned

__all__ = ["Size", "Sizes", "sizes"]

# The run that the estimate of the memory is for: AdamW, bf16 compute on a GPU, so many tokens or images at once.
_VOCABULARY, _ROW, _TOKENS, _IMAGES = 8192, 512, 4096, 32


@dataclass(frozen=True)
class Size:
    """One size of a family.

    Attributes:
        name: value of ``model.size``.
        layers, width, heads: number of blocks, hidden size, heads of attention.
        parameters: number of parameters.
        memory: estimated bytes at the peak of a step; ``Sizes.assumed`` says of which.
        seconds: seconds of one CPU thread per million tokens; None if not measured.
        loss: held-out loss (nats per target) after the tokens that ``Sizes.measured`` says; None if not measured.
    """

    name: str
    layers: int
    width: int
    heads: int
    parameters: int
    memory: float
    seconds: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Sizes:
    """All sizes of a family; printed as a table.

    Attributes:
        family: name of the family.
        rows: the sizes, smallest first.
        assumed: what parameters and memory are computed for.
        measured: how time and loss were measured.
    """

    family: str
    rows: tuple[Size, ...]
    assumed: str
    measured: str

    def __str__(self) -> str:
        head = ("size", "layers x width", "parameters", "memory", "s / M tokens", "loss")
        lines = [head]
        for row in self.rows:
            lines.append(
                (
                    row.name,
                    f"{row.layers} x {row.width}",
                    f"{row.parameters / 1e6:,.1f} M",
                    f"{row.memory / 2**30:,.1f} GiB",
                    "not measured" if row.seconds is None else f"{row.seconds:,.0f}",
                    "not measured" if row.loss is None else f"{row.loss:.2f}",
                )
            )
        known = any(row.seconds is not None for row in self.rows)
        note = textwrap.wrap(f"{self.family}, {self.assumed} {self.measured * known}", 80)
        return "\n".join([*aligned(lines, left=1), "", *note])

    __repr__ = __str__


def sizes(family: str) -> Sizes:
    """Return the sizes of a family: parameters, memory of training, time and loss where they were measured.

    Args:
        family: a key of ``FAMILIES``, or ``"package.module:Class"``.

    Returns:
        The sizes; ``print`` shows them as a table.

    Raises:
        ConfigError: there is no such family.
    """
    measurements = json.loads(Path(__file__).with_name("sizes.json").read_text(encoding="utf-8"))
    figures = measurements["figures"].get(family, {})
    cls, rows = own_family(family), []
    texts = cls.processor_class is None
    inputs, passed = f"with a vocabulary of {_VOCABULARY:,}", f"{_TOKENS:,} tokens"
    for name in cls.config_class.size_names():
        options: dict[str, Any] = {"vocab_size": _VOCABULARY} if texts else {}
        model = build(family, name, device="meta", **options)
        config, backbone = model.backbone.config, model.backbone
        length, at_once = _ROW, _TOKENS
        if not texts:
            batch = backbone.random_batch(torch.Generator())
            values = batch.get("pixel_values", batch.get("input_values"))
            assert values is not None
            (rows_of, *_), (height, wide) = values.shape, values.shape[-2:]
            length = backbone.units(batch) // rows_of
            at_once = _IMAGES * length
            inputs, passed = f"with images of {height} x {wide} pixels", f"{_IMAGES} images"
            if values.ndim == 3:
                inputs = f"with audio of {height:,} frames of {wide} mel bands"
                passed = f"{_IMAGES} recordings"
        count = sum(parameter.numel() for parameter in model.parameters())
        needs = Needs(
            **vars(backbone.stats()),
            parameters=count,
            trainable=count,
            row_length=length,
            tied=bool(getattr(model.head, "tied", True)),
            micro_tokens=at_once,
        )
        needed = memory(needs, MeshShape(), "single", at_once).total
        shape = (config.num_layers, config.hidden_size, config.num_heads)
        rows.append(Size(name, *shape, count, needed, **figures.get(name, {})))
    assumed = f"{inputs}. Memory is an estimate: AdamW, bf16, {passed} in a forward pass."
    return Sizes(family, tuple(rows), assumed, measurements["measured"])
