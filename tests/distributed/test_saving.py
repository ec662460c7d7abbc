"""Checkpoints of models that FSDP2 has cut, written and read over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.cluster import environment
from distributed.saving_worker import LIMIT
from distributed.torchrun import launch
from pretrain.checkpoint import latest, verify
from pretrain.distributed.record import FILE
from pretrain.distributed.watchdog import EXIT_LOST, SLOW

WORKER = Path(__file__).with_name("saving_worker.py")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("processes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_the_files_do_not_show_who_wrote_them(processes, tmp_path):
    """24 and 61 rows over 3 processes are cut unevenly."""
    launch(WORKER, processes, "same", str(tmp_path))
    assert (tmp_path / "done").exists()
    expected = contents(tmp_path / "one" / "checkpoint-2")
    assert "training/optimizer.safetensors" in expected
    for run in ("at-once", "background"):
        assert contents(tmp_path / run / "checkpoint-2") == expected


def in_two_processes(how: str, folder: Path) -> list[int]:
    """Exit codes of the worker's two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        about = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(WORKER), how, str(folder)]
        running.append(subprocess.Popen(command, env={**environment(), **about}))
    try:
        return [process.wait(timeout=170) for process in running]
    finally:
        for process in running:
            process.kill()


def test_a_process_that_is_killed_while_it_saves(tmp_path):
    assert in_two_processes("killed", tmp_path) == [0, -9]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["seconds"] < 60
    assert os.listdir(tmp_path / "run") == ["checkpoint-1"]
    verify(tmp_path / "run" / "checkpoint-1")
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert len(list((tmp_path / "run" / "checkpoint-1").glob("model-*"))) > 1


@pytest.mark.slow
def test_a_slow_disk_in_the_background_is_no_hang(tmp_path):
    """All wait for a file that takes longer than the limit, and every tensor of it is progress."""
    assert in_two_processes("slow", tmp_path) == [0, 0]
    waited = [float((tmp_path / f"waited-{rank}").read_text()) for rank in range(2)]
    assert min(waited) > 1.5 * LIMIT * SLOW["save"], "too short to show anything"
    verify(tmp_path / "run" / "checkpoint-1")
    assert not (tmp_path / "run" / FILE).exists()


@pytest.mark.slow
def test_the_process_whose_writer_is_stuck_is_named(tmp_path):
    """Its main thread waits for the writer, and the other process for the main thread."""
    assert in_two_processes("stuck", tmp_path) == [EXIT_LOST, EXIT_LOST]
    found = json.loads((tmp_path / "run" / FILE).read_text())
    assert (found["rank"], found["kind"], found["phase"]) == (1, "hung", "save"), found
    assert "does not wait" in found["what"]
    assert "join" in found["stack"], "its main thread waits for its writer"
    stacks = {rank: one["stack"] for one in found["stacks"] for rank in one["ranks"]}
    assert "torch/distributed/" in stacks[0][-1], "the other one waits for it"


@pytest.mark.slow
def test_a_writer_at_work_does_not_hide_a_process_that_hangs(tmp_path):
    assert in_two_processes("hung", tmp_path) == [EXIT_LOST, EXIT_LOST]
    found = json.loads((tmp_path / "run" / FILE).read_text())
    assert (found["rank"], found["kind"], found["phase"]) == (1, "hung", "forward"), found
    assert "looping" in found["stack"].split("\n")[-1]
    assert latest(tmp_path / "run") is None, "it was noticed only when nothing was written any more"
