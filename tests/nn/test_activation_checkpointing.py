"""Activation checkpointing and compiling, alone and together: equal losses and gradients, one graph for all blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain.data.loader import row_rngs
from pretrain.errors import ConfigError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.nn.attention import KVCache
from pretrain.nn.block import Block, BlockConfig
from pretrain.objectives import build_objective
from tiny import Rows, tokenizer


def made(family: str) -> Model:
    return build(
        family,
        None,
        tokenizer=tokenizer(),
        num_layers=9,  # more than the compiler would make of one function
        hidden_size=16,
        num_heads=4,
        intermediate_size=24,
        max_positions=32,
        dropout=0.0,
        attention_dropout=0.0,
    )


def run(model: Model, *, packed: bool, low: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of two batches of unequal length, and the sum of their gradients."""
    kind = "NextToken" if model.backbone.causal else "MaskedLM"
    objective, losses = build_objective(kind, {}, model).train(), []
    for length in (16, 24):
        rows = Rows(4, length=length)
        for row in rows if not packed else ():
            row["document_ids"][:] = 1
            row["position_ids"][:] = range(length)
        batch: Any = objective.collate(rows, row_rngs(0, "collate", 0, 4))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            total = objective(batch).total
        total.backward()
        losses.append(float(total.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# The mode in which compiled and recomputed operations meet; a compilation takes many seconds.
QUICK = (("selective", True, True),)


@pytest.mark.parametrize(
    ("mode", "packed", "low"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(("off", "selective", "full"), (False, True), (False, True))
    ],
)
def test_compiled_blocks_compute_the_same(mode: str, packed: bool, low: bool) -> None:
    wanted, gradients = run(made("llama"), packed=packed, low=low)
    torch._dynamo.reset()
    counters.clear()
    model = made("llama")
    model.backbone.set_activation_checkpointing(mode)
    model.backbone.compile_blocks(backend="aot_eager")
    losses, found = run(model, packed=packed, low=low)
    assert losses == pytest.approx(wanted, rel=1e-5 if low else 1e-6)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        far = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert far < (2e-2 if low else 1e-5), name
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "selective", "full"])
def test_the_default_compiler_takes_them_too(mode: str) -> None:
    wanted, _ = run(made("llama"), packed=True, low=False)
    torch._dynamo.reset()
    model = made("llama")
    model.backbone.set_activation_checkpointing(mode)
    model.backbone.compile_blocks()
    assert run(model, packed=True, low=False)[0] == pytest.approx(wanted, rel=1e-5)


def test_blocks_become_what_they_were() -> None:
    model = made("gpt2")
    wanted, _ = run(model, packed=True, low=False)
    model.backbone.set_activation_checkpointing("full")
    model.backbone.compile_blocks(backend="aot_eager")
    model.backbone.plain_blocks()
    torch._dynamo.reset()
    counters.clear()
    assert run(model, packed=True, low=False)[0] == wanted
    assert not counters["stats"]


class Squared(Block):
    """A block of an own family, which counts how often it is computed."""

    calls = 0

    def _forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls += 1
        return x * x


def test_less_is_kept_in_training_alone() -> None:
    model = made("llama")
    block = Squared(BlockConfig(4, 1, 4))
    model.backbone.layers = torch.nn.ModuleList([block])
    x = torch.ones(3, requires_grad=True)
    for mode, training, calls in (("off", True, 1), ("full", True, 2), ("full", False, 1)):
        model.backbone.set_activation_checkpointing(mode)
        block.train(training).calls = 0
        block(x).sum().backward()
        assert block.calls == calls, mode
    block.train().calls = 0
    block(x, cache=KVCache(4)).sum().backward()
    assert block.calls == 1
    with torch.no_grad():
        block(x)
    assert block.calls == 2


def test_a_block_that_does_not_know_it_is_refused_by_name() -> None:
    class Own(Block):
        def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
            return x

    model = made("llama")
    for block in (Own(BlockConfig(4, 1, 4)), torch.nn.Linear(4, 4)):
        model.backbone.layers = torch.nn.ModuleList([block])
        model.backbone.set_activation_checkpointing("off")
        with pytest.raises(ConfigError, match=f"{type(block).__name__}.*name that method _forward"):
            model.backbone.set_activation_checkpointing("full")
