"""Checkpoints of models that FSDP2 has cut, written and read over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.cluster import environment, launch
from pretrain.checkpoint import latest, verify

WORKER = Path(__file__).with_name("saving_worker.py")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_the_files_do_not_show_who_wrote_them(processes, tmp_path):
    """24 and 61 rows over 3 processes are cut unevenly."""
    launch(WORKER, processes, "same", str(tmp_path))
    assert (tmp_path / "done").exists()
    expected = contents(tmp_path / "one" / "checkpoint-2")
    assert "training/optimizer.safetensors" in expected
    for run in ("at-once", "background"):
        assert contents(tmp_path / run / "checkpoint-2") == expected


def test_a_process_that_is_killed_while_it_saves(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        about = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(WORKER), "killed", str(tmp_path)]
        running.append(subprocess.Popen(command, env={**environment(), **about}))
    try:
        codes = [process.wait(timeout=170) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, -9]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["seconds"] < 60
    assert os.listdir(tmp_path / "run") == ["checkpoint-1"]
    verify(tmp_path / "run" / "checkpoint-1")
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert len(list((tmp_path / "run" / "checkpoint-1").glob("model-*"))) > 1
