"""Devices, compute types and loss scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.errors import ConfigError
from pretrain.training.precision import (
    LossScale,
    choose_device,
    choose_precision,
    evaluation_precision,
    evaluation_setting,
    recorded_precision,
)

CPU = torch.device("cpu")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="hundreds of times slower"):
        choose_precision("fp16", CPU)


def test_auto_says_why_and_unknown_names_are_refused() -> None:
    chosen = choose_precision("auto", CPU)
    assert chosen.name in ("bf16", "fp32") and "CPU" in chosen.reason
    with pytest.raises(ConfigError, match="bf16"):
        choose_precision("bf1", CPU)
    with pytest.raises(ConfigError, match="cuda"):
        choose_device("cude")


def test_figures_are_taken_in_fp32_where_the_weights_allow_it() -> None:
    low, full = choose_precision("bf16", CPU), choose_precision("fp32", CPU)
    assert evaluation_precision("fp32", low).dtype is torch.float32
    assert evaluation_precision("train", low) is low
    assert evaluation_precision("fp32", full) is full
    gathered = evaluation_precision("fp32", low, gathered=torch.bfloat16)
    assert gathered.name == "bf16" and "FSDP2" in gathered.reason


def test_fp8_is_bf16_with_other_products_and_for_training_only() -> None:
    chosen = choose_precision("fp8", CPU, training=True)
    assert chosen.dtype is torch.bfloat16 and "slow" in chosen.reason
    with pytest.raises(ConfigError, match="precision of training"):
        choose_precision("fp8", CPU)
    assert evaluation_precision("train", chosen).name == "bf16"
    assert evaluation_precision("fp32", chosen).name == "fp32"
    with pytest.raises(ConfigError, match="no float8 products"):
        choose_precision("fp8", torch.device("mps"), training=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "auto"])
def test_a_run_of_any_precision_is_evaluated_on_a_device_that_trains_in_another(
    precision: str,
) -> None:
    train: Any = TrainConfig(precision=precision)
    assert recorded_precision(evaluation_setting(train), CPU).name == "fp32"
    expected = {"bf16": "bf16", "fp8": "bf16", "auto": choose_precision("auto", CPU).name}
    train.eval_precision = "train"
    found = recorded_precision(evaluation_setting(train), CPU).name
    assert found == expected.get(precision, "fp32")


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="no cuda device"):
        choose_device("cuda")


def test_the_gpu_of_a_mac_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device().type == "mps"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("cpu") == CPU
    for name in ("auto", "mps"):
        with pytest.raises(ConfigError, match="device='cpu'"):
            choose_device(name)


def test_loss_scale_halves_grows_and_is_exact_in_a_checkpoint() -> None:
    scale = LossScale(True, scale=8.0, interval=2)
    scale.update(False)
    assert scale.scale == 4.0
    scale.update(True)
    again = LossScale(True, interval=2)
    again.load(scale.state())
    for each in (scale, again):
        each.update(True)
    assert scale.state() == again.state() == {"scale": 8.0, "good": 0}
    grads = [torch.full((3,), 16.0)]
    scale.unscale(grads)
    assert torch.equal(grads[0], torch.full((3,), 2.0))
