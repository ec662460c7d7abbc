"""A run that is killed and started again is the run that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kill_trials.py"


def _run(objective: str, count: int) -> None:
    # A process of its own: it forks, which a process full of test threads must not.
    command = [sys.executable, str(SCRIPT), "--objective", objective, "--trials", str(count)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} of {count} bit-identical" in done.stdout


@pytest.mark.parametrize(
    "objective", ["NextToken", pytest.param("MaskedLM", marks=pytest.mark.slow)]
)
def test_a_killed_run_is_bit_identical(objective: str) -> None:
    _run(objective, 1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["NextToken", "MaskedLM"])
def test_thirty_killed_runs_are_bit_identical(objective: str) -> None:
    _run(objective, 30)
