"""Fine-tuning tasks and adapters on meshes: the curve and the figures of one device, and a checkpoint that opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pretrain
import tiny
from distributed.cluster import launch, merged, once
from pretrain.models import build

HERE = Path(__file__).parent
MESHES = ("DDP 2", "FSDP2 2", "TP 2")
CASES = ("classification", "lora", "dora", "regression", "language")


def _tuned(folder: Path) -> None:
    for family in ("gpt2", "bert"):
        model = build(
            family,
            None,
            tokenizer=tiny.tokenizer(),
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            intermediate_size=48,
            max_positions=32,
            dropout=0.0,
            attention_dropout=0.0,
        )
        model.save(folder / family)
    parts = [folder / "1.json", folder / "2.json"]
    for size, part in zip((1, 2), parts, strict=True):
        launch(HERE / "tuning.py", size, str(part), str(folder))
    merged(folder, parts)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = once(tmp_path_factory, "tuning", _tuned)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_tasks_and_adapters_run_on_every_mesh(seen: dict[str, Any], mesh: str, case: str) -> None:
    one, other = seen[f"1|{case}"], seen[f"{mesh}|{case}"]
    assert len(other["losses"]) > 1
    assert other["losses"] == pytest.approx(one["losses"], rel=2e-6)
    assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
    opened = pretrain.load(other["checkpoint"])
    assert (opened.adapter is not None) == (case in ("lora", "dora"))


def test_rows_that_are_compared_with_each_other_stay_on_one_process(seen: dict[str, Any]) -> None:
    """A contrastive loss over a batch does not add up over shares of it; its matrices can be shared all the same."""
    assert seen["TP 2|pairs"] == pytest.approx(seen["1|pairs"], rel=2e-6, abs=1e-6)
    for mesh in ("DDP 2", "FSDP2 2"):
        assert "tp" in seen[f"{mesh}|pairs"]
