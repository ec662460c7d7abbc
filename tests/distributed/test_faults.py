"""Signals to a real training run: it stops together, or leaves together, and goes on bit for bit.

The whole table, every signal to each rank in each phase, is printed by ``fault_table.py``; here are a few of its cells.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed.cluster import environment
from distributed.fault_table import SIGNALS, STRATEGIES, WORKER, Stage, events, result, trial
from distributed.fault_worker import PHASES
from pretrain.distributed.watchdog import EXIT_LOST

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="its processes end with their parent on Linux only"
)

LATE = 5.0  # seconds from a death to the end of the last survivor
FAST = {
    ("ddp", "SIGSTOP", "forward", 0),
    ("fsdp", "SIGKILL", "start", 0),
}
CELLS = [
    pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow)
    for cell in itertools.product(STRATEGIES, [s.name for s in SIGNALS], PHASES, range(2))
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.mark.parametrize(("strategy", "name", "phase", "rank"), CELLS)
def test_a_lost_rank_is_named_and_the_run_goes_on(
    stage: Stage, strategy: str, name: str, phase: str, rank: int
) -> None:
    number = signal.Signals[name]
    seen = trial(stage, strategy, rank, phase, number)
    print(seen)
    assert seen.named and seen.placed and seen.ended == 0
    assert seen.exact, "the losses or the weights are not those of a run without the fault"
    if number == signal.SIGTERM:
        assert seen.codes == [143, 143]
        # Everything that was learned is saved.
        assert seen.resumed == {"start": 0, "data": 5, "evaluate": 6, "save": 6}.get(phase, 6)
    else:
        assert seen.codes[1 - rank] == EXIT_LOST and seen.codes[rank] == -signal.SIGKILL
        assert seen.resumed == (0 if phase == "start" else 4)
        assert seen.seconds < LATE + (seen.silence if number == signal.SIGSTOP else 0.0)


def _again(stage: Stage, out: Path, strategy: str = "ddp", processes: int = 2) -> dict[str, Any]:
    """The same command once more, to the end."""
    Path(f"{out}.events").unlink()
    _, code = stage.run(strategy, [], out=out, restarts=0, processes=processes)
    assert code == 0, stage.errors(out)
    return result(out)


@pytest.mark.slow
def test_a_process_that_is_asked_again_and_again_saves_all_the_same(stage: Stage) -> None:
    """As by SLURM and by torchrun: SIGTERM to all at once, and more of them while the run saves."""
    again = [0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8]
    fault = {"rank": "all", "phase": "backward", "step": 4, "signal": 15, "again": again}
    out, code = stage.run("ddp", [fault], restarts=0)
    assert code == 1 and [e["code"] for e in events(out, "exit")] == [143, 143], stage.errors(out)
    assert (out / "checkpoint-5").is_dir()
    assert _again(stage, out) == stage.wanted("ddp")


def test_all_stop_by_one_signal_though_each_got_another(stage: Stage) -> None:
    faults = [
        {"rank": rank, "phase": "forward", "step": 3, "signal": number, "into": 0.1}
        for rank, number in ((0, 15), (1, 2))
    ]
    out, _ = stage.run("fsdp", faults, restarts=0)
    assert [e["code"] for e in events(out, "exit")] == [130, 130], stage.errors(out)
    assert _again(stage, out, "fsdp") == stage.wanted("fsdp")


@pytest.mark.slow
def test_a_second_interrupt_of_one_process_ends_all_at_once(stage: Stage) -> None:
    fault = {"rank": 1, "phase": "save", "step": 6, "signal": 2, "into": 0, "again": [0.05, 0.1]}
    slow = {"rank": 0, "phase": "save", "step": 6, "signal": 0, "into": 2.0}
    out, _ = stage.run("ddp", [fault, slow], restarts=0)
    codes = {e["rank"]: e["code"] for e in events(out, "exit")}
    assert codes == {0: EXIT_LOST, 1: 130}, stage.errors(out)
    assert _again(stage, out) == stage.wanted("ddp")


def test_torchrun_that_is_asked_to_stop_waits_for_the_checkpoint(stage: Stage) -> None:
    fault = {"rank": 0, "phase": "update", "step": 4, "signal": 0, "into": 1.0}
    out = stage.folder / "asked"
    stage.begin("ddp", [fault], out=out, restarts=2)
    end = time.monotonic() + 60
    while not events(out, "began"):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(stage.launcher.pid, signal.SIGTERM)
    assert stage.launcher.wait(60) == 143
    assert [e["code"] for e in events(out, "exit")] == [143, 143], stage.errors(out)
    assert _again(stage, out) == stage.wanted("ddp")


@pytest.mark.slow
def test_torchrun_starts_a_run_again_as_often_as_it_takes(stage: Stage) -> None:
    faults = [
        {"rank": 1, "phase": "forward", "step": 3, "signal": 9, "attempt": 0},
        {"rank": 0, "phase": "save", "step": 6, "signal": 9, "attempt": 1},
    ]
    out, code = stage.run("fsdp", faults, restarts=2)
    assert code == 0, stage.errors(out)
    assert [next(iter(events(out, "began", attempt)))["step"] for attempt in range(3)] == [
        0,
        2,
        4,
    ]
    assert result(out) == stage.wanted("fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_processes_resume_bit_for_bit(stage: Stage, strategy: str) -> None:
    """Where more than two add up, who comes first must not depend on where the run began."""
    fault = {"rank": 2, "phase": "data", "step": 4, "signal": 15}
    out, code = stage.run(strategy, [fault], processes=4)
    assert code == 0, stage.errors(out)
    assert result(out) == stage.wanted(strategy, 4)


@pytest.mark.slow
def test_with_the_command_line_of_torchrun(stage: Stage) -> None:
    """Nothing is forked here: the whole way out of a process of its own, which a launcher hurries."""
    out = stage.folder / "plain"
    config = stage.config(out, "ddp")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += ["--max-restarts=1", str(WORKER), "train", "--config", str(config)]
    fault = '[{"rank": 1, "phase": "forward", "step": 4, "signal": 15}]'
    env = environment() | {"FAULTS": fault, "EVENTS": f"{out}.events"}
    process = subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # its processes end with it
    assert process.returncode == 0, said
    assert [e["code"] for e in events(out, "left")] == [143, 143, 0, 0]
    assert "exitcode: 143" in said and "exitcode: -15" not in said
    assert {e["step"] for e in events(out, "began", 1)} == {5}
    assert result(out) == stage.wanted("ddp")
