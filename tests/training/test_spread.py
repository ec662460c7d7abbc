"""What `auto` is told of a run: the numbers that learn, and how they are stepped and gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig
from pretrain.finetuning.start import freeze
from pretrain.lora import LoraConfig, apply_lora
from pretrain.parallel.estimates import Sizes, memory
from pretrain.training.optim import Muon, build_optimizers
from pretrain.training.precision import Precision
from pretrain.training.spread import needs_of
from pretrain.training.trainer import Trainer
from tiny import Rows, objective, trainer

CPU = torch.device("cpu")


def ready(out: Path, goal: Any, precision: str = "fp32", **optim: Any) -> Trainer:
    """A trainer that has its device and its precision, and has not begun."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    task = trainer(out, goal, Rows(8), optim=optim)
    task.device, task.precision = CPU, Precision(precision, types[precision], CPU, "as configured")
    return task


# ------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("how", ["all", "lora", "backbone", "blocks"])
def test_muon_is_counted_where_it_steps(tmp_path: Path, how: str) -> None:
    """With frozen weights, too: what was counted has the moments that training makes."""
    goal = objective()
    if how == "lora":
        apply_lora(goal.model, LoraConfig(r=2))
    elif how == "backbone":
        freeze(goal.model, "backbone")
        goal.model.head.untie()  # something must learn
    elif how == "blocks":
        freeze(goal.model, 1)
    task = ready(tmp_path, goal, name="muon")
    needs = needs_of(task, 1)
    blocks = goal.model.backbone.blocks()
    made = build_optimizers(goal, task.optim, blocks, CPU).optimizers
    stepped = [
        p for o in made if isinstance(o, Muon) for group in o.param_groups for p in group["params"]
    ]
    assert needs.muon == sum(p.numel() for p in stepped) <= needs.trainable
    assert (needs.muon == 0) == (how == "backbone")
    for p in goal.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for optimizer in made:
        optimizer.step()
    state = [v for o in made for s in o.state.values() for v in s.values()]
    moments = sum(t.numel() for t in state if isinstance(t, torch.Tensor) and t.ndim)
    assert memory(needs, Sizes(), "single", 16).moments == 4 * moments


# ------------------------------------------------------------------------------------ the type of the gather


@pytest.mark.parametrize(
    ("precision", "adapter", "gathered"),
    [
        ("bf16", None, 2),
        ("bf16", "lora", 2),
        ("bf16", "dora", 4),
        ("fp16", None, 4),
        ("fp16", "lora", 4),
        ("fp32", "lora", 4),
    ],
)
def test_the_estimate_knows_the_type_of_the_gather(
    tmp_path: Path, precision: str, adapter: str | None, gathered: int
) -> None:
    goal = objective()
    if adapter is not None:
        apply_lora(goal.model, LoraConfig(r=2, dora=adapter == "dora"))
    needs = needs_of(ready(tmp_path, goal, precision), 1)
    assert needs.gather_bytes == gathered
    assert needs.compute_bytes == (4 if precision == "fp32" else 2)
    cast = memory(needs, Sizes(1, 2, 1), "fsdp", 16).casts
    assert (cast > 0) == (gathered == 4 and precision != "fp32")


@pytest.mark.parametrize(("dora", "seen"), [(False, torch.bfloat16), (True, torch.float32)])
def test_an_adapter_is_gathered_in_half_precision_unless_it_measures_lengths(
    tmp_path: Path, dora: bool, seen: torch.dtype
) -> None:
    goal = objective()
    apply_lora(goal.model, LoraConfig(r=2, dora=dora))
    task = trainer(tmp_path, goal, Rows(8), precision="bf16", limit="1 steps")
    task.parallel = ParallelConfig(device="cpu", strategy="fsdp")
    found = set()
    for block in goal.model.backbone.blocks():
        block.attention.register_forward_pre_hook(
            lambda module, *_: found.update(p.dtype for p in module.parameters())
        )
    try:
        task.fit()
    finally:
        task.world.leave()
    assert found == {seen}
