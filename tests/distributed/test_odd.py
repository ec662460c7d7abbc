"""Objectives that do not treat all processes alike: the sums are those of one device, or there is an error."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from distributed.cluster import once
from distributed.torchrun import launch
from pretrain.config import ParallelConfig
from pretrain.distributed.unused_parameters import find_used_parameters
from pretrain.distributed.world import World
from pretrain.models.backbone import Backbone
from pretrain.objectives.next_token import NextToken
from tiny import Rows, losses, objective, trainer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def make(folder: Path) -> None:
        launch(HERE / "odd.py", 2, str(folder / "result.json"), str(folder))

    found: dict[str, Any] = once(tmp_path_factory, "odd", make)
    return found


def test_gradients_that_only_some_processes_have_are_summed_by_name(seen: dict[str, Any]) -> None:
    """FSDP2 packs the gradients that there are: those of two parameters were added to each other."""
    assert seen["fsdp"]["losses"] == pytest.approx(seen["ddp"]["losses"], rel=1e-6)
    assert len(set(seen["ddp"]["losses"])) == 4


def test_what_no_gradient_reaches_does_not_decay(seen: dict[str, Any]) -> None:
    assert set(seen["ddp"]["never"]) == set(seen["fsdp"]["never"]) == {1.0}


def test_all_processes_have_the_buffers_of_the_first(seen: dict[str, Any]) -> None:
    for strategy in ("ddp", "fsdp"):
        assert len(set(seen[strategy]["buffers"])) == 1


def test_processes_agree_on_the_micro_batch_that_is_fastest_on_the_slowest(
    seen: dict[str, Any],
) -> None:
    assert seen["measured"] == {"rows": [2, 2]}


class _WithUnused(NextToken):
    """An objective with a parameter that no gradient reaches."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.unused = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("backend", ["gloo", "cuda:gloo"])  # the latter has none for CPU tensors
def test_fsdp_on_one_process_inside_a_group_of_ones_own(tmp_path: Path, backend: str) -> None:
    run = trainer(tmp_path / "plain", _WithUnused(objective().model), Rows(8), limit="3 steps")
    run.fit()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        cut = trainer(tmp_path / "cut", _WithUnused(objective().model), Rows(8), limit="3 steps")
        cut.parallel, cut.world = ParallelConfig(device="cpu", strategy="fsdp"), World.find()
        cut.fit()
    finally:
        dist.destroy_process_group()
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "plain"), rtol=1e-6)


def test_the_leaves_of_a_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = (self.used(x) * self.frozen).sum() + self.unused(x).detach().sum()
            return y

    root = Two()
    found = find_used_parameters(root, [root], lambda: root(torch.ones(2, 3)))
    assert found == {"used.weight", "used.bias"}


def test_sharded_blocks_that_cannot_be_compiled_run_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed pass has gathered weights, which must not stay."""

    def missing(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("no C++ compiler")

    torch._dynamo.reset()
    compile_blocks = functools.partialmethod(Backbone.compile_blocks, backend=missing)
    monkeypatch.setattr(Backbone, "compile_blocks", compile_blocks)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, setting in (("plain", False), ("failed", True)):
            run = trainer(tmp_path / name, objective(), Rows(8), limit="3 steps")
            run.parallel = ParallelConfig(device="cpu", strategy="fsdp", compile=setting)
            run.world = World.find()
            run.fit()
            assert run.setup.strategy.compiled == (
                False,
                "compiling failed" if setting else "as configured",
            )
    finally:
        dist.destroy_process_group()
    assert losses(tmp_path / "failed") == losses(tmp_path / "plain")
