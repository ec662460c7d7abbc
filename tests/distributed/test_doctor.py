"""``pretrain doctor``, alone and as several processes: what it prints, finds and returns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main as cli
from pretrain.distributed import doctor

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

FACTS: dict[str, Any] = {
    "host": "node-a", "system": "Linux 6.1, x86_64", "device": "cpu", "gpus": [], "cores": 8, "threads": 8,
    "versions": {"pretrain": "1.0", "torch": "2.11", "python": "3.11.2"},
    "memory": {"free": 20 << 30, "total": 32 << 30}, "disk": 99 << 30, "shared_memory": 8 << 30,
    "speed": {"fp32": 1e11, "bf16": 3e12, "bf16_fast": True},
    "network": [{"name": "eth0", "address": "10.0.0.7", "speed": 25000}], "backends": {"gloo": True, "nccl": False},
}  # fmt: skip
GPU = {"name": "H200", "free": 139 << 30, "total": 141 << 30, "capability": "9.0"}


def test_alone_it_describes_this_machine(capsys: Any) -> None:
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["backends"]["gloo"]
    assert found["speed"]["fp32"] > 1e8
    assert found["memory"]["total"] >= found["memory"]["free"] > 0
    assert any(one["address"] == "127.0.0.1" for one in found["network"])
    assert all(len(line) < 200 for line in doctor.describe(found))


@pytest.mark.parametrize(
    ("change", "device", "words"),
    [
        ({}, "cuda", ["no cuda device", "without CUDA", "install"]),
        ({}, "mps", ["no mps device", "this is Linux 6.1, x86_64", "--device auto"]),
        ({"system": "Darwin 23, arm64"}, "mps", ["no mps device", "Update macOS"]),
        ({"system": "Darwin 23, arm64"}, "cuda", ["No torch for macOS", "--device auto"]),
        ({"memory": {"free": 1 << 20, "total": 1}}, "cpu", ["0.0 GiB of memory"]),
        ({"disk": 1 << 20}, "cpu", ["of disk are free", "--out"]),
        ({"shared_memory": 64 << 20}, "cpu", ["/dev/shm has only 64 MiB", "--shm-size"]),
        ({"backends": {"gloo": False, "nccl": False}}, "cpu", ["no torch.distributed"]),
        ({"gpus": [GPU, GPU], "device": "cuda"}, "cuda", ["no NCCL"]),
    ],
)
def test_each_problem_has_its_remedy(
    change: dict[str, Any], device: str, words: list[str], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_: FACTS | change)
    assert doctor.doctor(device) == 1
    out = capsys.readouterr().out
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 1 and all(word in problems[0] for word in words), out


@pytest.mark.parametrize("seconds", ["0", "-1", "1e9"])
def test_a_time_limit_that_no_attempt_can_keep_is_refused(seconds: str, capsys: Any) -> None:
    assert cli.main(["doctor", "--device", "cpu", "--timeout", seconds]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--timeout is {float(seconds):g}, but" in said and "above 0" in said


def test_a_good_machine_is_described(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_: FACTS | {"gpus": [GPU], "device": "cuda"})
    assert doctor.doctor("cuda") == 0
    out = capsys.readouterr().out
    for words in (
        "cuda:0 ", "H200, 139.0 GiB free of 141.0 GiB, compute capability 9.0", "20.0 GiB free of 32.0 GiB",
        "bf16 3.0 TFLOP/s", "eth0 10.0.0.7, 25 Gbit/s", "no problems found",
    ):  # fmt: skip
        assert words in out
    assert cli.main(["doctor", "--device", "tpu"]) == 2
    assert "--device is 'tpu'" in capsys.readouterr().err


def ranks(port: int, *words: str, **env: str) -> list[subprocess.Popen[str]]:
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain", "doctor", "--device", "cpu", *words],
            env=ENV | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)} | env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_several_processes_print_one_table(tmp_path: Path) -> None:
    pair = ranks(free_port(), "--out", str(tmp_path / "run"))
    said = [process.communicate(timeout=90) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    lines = said[0][0].splitlines()
    assert lines[0].split()[:3] == ["rank", "host", "device"] and "GB/s" in lines[0]
    for rank, process in enumerate(pair):
        row = lines[1 + rank].split()
        assert row[:2] == [str(rank), f"{socket.gethostname()}/{process.pid}"]
    assert lines[-1] == "no problems found" and not said[1][0]


def test_a_slow_rank_is_noted() -> None:
    everybody = [
        {"host": f"n{rank}", "speed": {"bf16": 1e12 if rank != 2 else 4e11}} for rank in range(4)
    ]
    (note,) = doctor._stragglers(everybody)
    assert "rank 2 (host n2) computes at 40%" in note
