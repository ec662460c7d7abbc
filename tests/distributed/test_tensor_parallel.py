"""Models shared by several processes over gloo, against the whole model in each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed.tp_worker import CASES, CAUSAL, FAMILIES, FOUR

WORKER = Path(__file__).with_name("tp_worker.py")
# Relative to the whole model, in fp32: sums over processes add in another order, and nothing else differs.
LOSS, GRADIENT = 1e-6, 1e-5
EXACT = ("apart", "accuracy", "generated", "wrong")


def launch(world: int, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Run the worker ``world`` times; the figures of every process."""
    outs = [folder / f"{rank}.json" for rank in range(world)]
    logs = [folder / f"{rank}.log" for rank in range(world)]
    root = WORKER.parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src")}
    running = []
    for rank in range(world):
        command = [sys.executable, str(WORKER), str(rank), str(world)]
        with logs[rank].open("w") as log:
            running.append(
                subprocess.Popen(
                    [*command, str(folder / "store"), str(outs[rank])],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                )
            )
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads(out.read_text()) for out in outs]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return launch(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return launch(4, tmp_path_factory.mktemp("four"))


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
