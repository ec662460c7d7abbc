"""What `auto` is told of a run and its machine, alike on all processes, and the micro-batch that comes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig
from pretrain.distributed.estimates import MeshShape, Needs, memory
from pretrain.distributed.mesh import USABLE
from pretrain.distributed.world import World
from pretrain.finetuning.start import freeze
from pretrain.lora import LoraConfig, apply_lora
from pretrain.training import parallelize as spreading
from pretrain.training import preflight
from pretrain.training.optim import build_optimizers
from pretrain.training.parallelize import common_resources, needs_of
from pretrain.training.precision import Precision
from pretrain.training.preflight import describe
from pretrain.training.trainer import Trainer
from pretrain.training.update_rules import Muon
from tiny import Rows, losses, objective, trainer

CPU = torch.device("cpu")


def ready(out: Path, goal: Any, **optim: Any) -> Trainer:
    """A trainer that has its device, and has not begun."""
    task = trainer(out, goal, Rows(8), optim=optim)
    task.device = CPU
    return task


def computing_in(name: str) -> Precision:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Precision(name, types[name], CPU, "as configured")


def needs(task: Trainer, precision: str = "fp32") -> Needs:
    """The sizes of its run with micro-batches of one row."""
    return needs_of(task, computing_in(precision), 1)


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
    needed = needs(task)
    blocks = goal.model.backbone.blocks()
    made = build_optimizers(goal, task.optim, blocks, CPU).optimizers
    stepped = [
        p for o in made if isinstance(o, Muon) for group in o.param_groups for p in group["params"]
    ]
    assert needed.muon == sum(p.numel() for p in stepped) <= needed.trainable
    assert (needed.muon == 0) == (how == "backbone")
    for p in goal.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for optimizer in made:
        optimizer.step()
    state = [v for o in made for s in o.state.values() for v in s.values()]
    moments = sum(t.numel() for t in state if isinstance(t, torch.Tensor) and t.ndim)
    assert memory(needed, MeshShape(), "single", 16).moments == 4 * moments


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
    needed = needs(ready(tmp_path, goal), precision)
    assert needed.gather_bytes == gathered
    assert needed.compute_bytes == (4 if precision == "fp32" else 2)
    cast = memory(needed, MeshShape(1, 2, 1), "fsdp", 16).casts
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
        task.world.destroy_process_group()
    assert found == {seen}


# --------------------------------------------------------------------------------------------- the machine


class Company(World):
    """A process of several, which hears what was said by the others."""

    def __init__(self, local_size: int, others: list[list[Any]]) -> None:
        super().__init__(0, len(others) + 1)
        self.local_size, self._others = local_size, others

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, *self._others]


def test_hosts_that_differ_have_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least memory, and groups of processes that lie inside of every host."""
    monkeypatch.setattr(spreading, "total_memory", lambda: 1200.0)
    alike = Company(4, [[300.0, 300.0, 4]] * 3)
    assert common_resources(CPU, alike) == (300.0, 300.0, 4)
    poorer = Company(4, [[300.0, 250.0, 4], [200.0, 400.0, 4]])
    assert common_resources(CPU, poorer) == (200.0, 250.0, 4)
    assert common_resources(CPU, Company(4, [[300.0, 300.0, 6]])) == (300.0, 300.0, 2)
    assert common_resources(CPU, Company(8, [[None, None, 4]])) == (150.0, 150.0, 4)
    monkeypatch.setattr(spreading, "total_memory", lambda: math.inf)
    assert common_resources(CPU, World()) == (None, None, 1)


def test_a_mesh_is_chosen_by_the_poorest_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rich process and a poor one choose the same, whichever of them asks."""
    monkeypatch.setattr(spreading, "total_memory", lambda: 8.0 * (1 << 30))
    asked = []

    def choose(*args: Any, **options: Any) -> Any:
        needs = options["needs"]
        asked.append((options["device_memory"], options["local"], needs.compute_bytes))
        raise InterruptedError

    monkeypatch.setattr(spreading, "choose_mesh", choose)
    for local, others, precision in ((8, [1.0, 1.0, 2], "bf16"), (2, [1.0, 1.0, 8], "fp32")):
        task = ready(tmp_path, objective())
        task.world = Company(local, [others])
        # Rank 0 says what the run needs, for the hardware of the others may choose another precision.
        task.world.broadcast_object = lambda value: value | {"compute_bytes": 2, "gather_bytes": 2}  # type: ignore[method-assign]
        with pytest.raises(InterruptedError):
            spreading.parallelize(task, computing_in(precision), (False, ""))
    assert asked == [(1.0, 2, 2), (1.0, 2, 2)]


def test_a_cpu_has_what_its_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "total_memory", lambda: 1000.0)
    assert spreading.device_memory(CPU, World()) == 1000.0
    assert spreading.device_memory(CPU, Company(4, [])) == 250.0


# ----------------------------------------------------------------------------------------- the micro-batch


def small_host(monkeypatch: pytest.MonkeyPatch, task: Trainer, rows: int) -> None:
    """A host on which so many rows fit, and not one more."""
    needed = needs(task)
    total = memory(needed, MeshShape(), "single", rows * needed.row_length).total
    monkeypatch.setattr(spreading, "total_memory", lambda: total / USABLE)


def test_a_micro_batch_is_chosen_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roomy = trainer(tmp_path / "roomy", objective(), Rows(24), batch_rows=12, limit="4 steps")
    roomy.fit()
    assert roomy.micro_rows == 12
    small_host(monkeypatch, ready(tmp_path, objective()), 4)
    tight = trainer(tmp_path / "tight", objective(), Rows(24), batch_rows=12, limit="4 steps")
    tight.fit()
    assert tight.micro_rows == tight.setup.strategy.choice.micro_rows == 4
    assert "12 rows = 4 micro x 3 accumulated" in capsys.readouterr().err
    for one, other in zip(losses(tmp_path / "roomy"), losses(tmp_path / "tight"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("why", ["configured", "reproducible", "coupled"])
def test_a_micro_batch_that_is_not_free_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    """And one process, too, is told that it may not fit."""
    goal: Any = objective()
    goal.couples_examples = why == "coupled"
    small_host(monkeypatch, ready(tmp_path, objective()), 1)
    rows = {"micro_rows": 12} if why == "configured" else {}
    task = trainer(tmp_path / "run", goal, Rows(24), batch_rows=12, limit="1 steps", **rows)
    task.parallel = ParallelConfig(device="cpu", reproducible=why == "reproducible")
    task.fit()
    assert task.micro_rows == (3 if why == "reproducible" else 12)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("memory"))
    assert "may not fit" in line and ("micro_rows=1" in line) == (why == "configured")


def test_the_memory_that_is_printed_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest batch has run by then; what the optimizer will add is known."""
    monkeypatch.setattr(preflight, "peak_memory", lambda device: 3.0 * (1 << 30))
    task = trainer(tmp_path, objective(), Rows(8), limit="1 steps")
    task.fit()
    choice = task.setup.strategy.choice
    assert choice.memory is not None
    for advice, size in (("", 1), ("; that may not fit", 1), ("; that may not fit", 2)):
        whole = replace(choice.memory, moments=0.5 * (1 << 30))
        task.setup.strategy.choice = replace(choice, memory=whole, advice=advice)
        task.world.size, before = size, task.world.size
        try:
            lines = describe(task, None, 1, 1.0)
            resumed = describe(task, tmp_path, 1, 1.0)
        finally:
            task.world.size = before
        line = next(line for line in lines if line.startswith("memory"))
        assert line.startswith("memory about 3.50 GiB at the peak, ")
        assert any(line.startswith("memory about 3.00 GiB") for line in resumed)
        # Several processes have said it with the reason of their choice.
        assert line.endswith(advice if size == 1 else "free")
