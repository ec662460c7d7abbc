"""Whether the blocks of a run are compiled: a function of the setting, the device and the length of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig, RunConfig, TrainConfig
from pretrain.training import compiling
from pretrain.training.compiling import decide_for, eager_seconds, should_compile
from pretrain.training.plan import Plan
from tiny import Rows, losses, objective, trainer

H100 = 989e12


def gpt(parameters: float, rows: int = 512, tokens: int = 1024) -> float:
    """FLOPs of a step of a model of that size."""
    return 6.0 * parameters * rows * tokens


@pytest.mark.parametrize(
    ("steps", "flops", "compiled"),
    [
        (10_000, gpt(85e6), True),
        (100, gpt(85e6), False),
        (100, gpt(7e9), True),
        (20, gpt(1e6), False),
    ],
)
def test_long_runs_on_cuda_are_compiled(steps: int, flops: float, compiled: bool) -> None:
    seconds = eager_seconds(steps, flops, H100)
    found, why = should_compile("auto", "cuda", seconds)
    assert found == compiled
    saved = 0.136 * seconds
    assert f"saves about {saved:,.0f} s" in why and (saved > 60) == compiled


def test_more_devices_make_a_run_shorter() -> None:
    steps, flops = 2_000, gpt(85e6)
    assert should_compile("auto", "cuda", eager_seconds(steps, flops, H100))[0]
    assert not should_compile("auto", "cuda", eager_seconds(steps, flops, 64 * H100))[0]


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_auto_never_compiles(device: str) -> None:
    assert should_compile("auto", device, 1e9) == (False, "auto compiles on CUDA only")


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("setting", [True, False])
def test_what_is_configured_is_done(setting: bool, device: str) -> None:
    for seconds in (0.0, 1e9):
        assert should_compile(setting, device, seconds) == (setting, "as configured")


def test_a_run_is_measured_by_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "peak_flops", lambda precision: 1e8)
    goal, rows = objective(), Rows(8)
    world = SimpleNamespace(size=1, broadcast_object=lambda value: value)

    def decided(limit: str, device: str = "cuda", setting: Any = "auto") -> bool:
        train = TrainConfig(limit=limit, batch_rows=4)
        run: Any = SimpleNamespace(
            parallel=ParallelConfig(compile=setting),
            device=torch.device(device),
            train=train,
            objective=goal,
            world=world,
        )
        precision: Any = None
        return decide_for(run, Plan(train, rows, goal, len(rows)), precision, 16)[0]

    assert decided("8 minutes") and not decided("7 minutes")
    step = goal.flops(4 * 16, 0, 16)
    enough = int(60 / 0.136 / eager_seconds(1, step, 1e8)) + 1
    assert decided(f"{enough} steps") and not decided(f"{enough - 2} steps")
    assert not decided("100000 minutes", "cpu") and decided("1 steps", "cpu", True)


def test_on_the_cpu_auto_is_the_same_as_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for setting in ("auto", False):
        run = trainer(tmp_path / str(setting), objective(dropout=0.1), Rows(8), limit="3 steps")
        run.parallel = ParallelConfig(device="cpu", compile=setting)  # type: ignore[arg-type]
        run.fit()
    said = capfd.readouterr().err
    assert "eager blocks (auto compiles on CUDA only)" in said
    assert "eager blocks (as configured)" in said
    assert losses(tmp_path / "auto") == losses(tmp_path / "False")


def test_the_setting_is_yes_no_or_auto() -> None:
    assert ParallelConfig().compile == "auto"
    for given, value in ((True, True), ("no", False), ("auto", "auto")):
        settings = RunConfig.load({"parallel.compile": given})
        assert settings.parallel.compile == value
        assert RunConfig.load(settings.to_dict()).parallel.compile == value
