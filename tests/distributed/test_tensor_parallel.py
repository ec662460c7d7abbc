"""Models shared by several processes over gloo, against the whole model in each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed.torchrun import launch
from distributed.tp_worker import CASES, CAUSAL, FAMILIES, FOUR

WORKER = Path(__file__).with_name("tp_worker.py")
# Relative to the whole model, in fp32: sums over processes add in another order, and nothing else differs.
LOSS, GRADIENT = 1e-6, 1e-5
EXACT = ("apart", "accuracy", "generated", "wrong")


def figures_of(world: int, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Run the worker in so many processes; the figures of every process."""
    launch(WORKER, world, str(folder), timeout=240)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return figures_of(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return figures_of(4, tmp_path_factory.mktemp("four"))


def check(figures: dict[str, Any]) -> None:
    limits = {"loss": LOSS, "logits": LOSS, "gradient": GRADIENT, "context": GRADIENT}
    for key, value in figures.items():
        if key in EXACT:
            assert value == 0.0, figures
        elif key in limits:
            assert value <= limits[key], figures


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes(name: str, two: list[dict[str, dict[str, Any]]]) -> None:
    for process in two:
        print(name, process[name])
        check(process[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name: str, four: list[dict[str, dict[str, Any]]]) -> None:
    for process in four:
        print(name, process[name])
        check(process[name])


def test_the_cases_measure_what_they_are_for(two: list[dict[str, dict[str, Any]]]) -> None:
    for process in two:
        for family in FAMILIES:
            assert {"loss", "gradient", "apart", "accuracy", "logits"} <= set(process[family])
            assert ("generated" in process[family]) == (family in CAUSAL)
        assert process["foreign_id"]["named"] == 1.0
        # Rounding to half precision dominates: cutting may not add to it.
        assert process["bf16"]["ratio"] <= 1.5
