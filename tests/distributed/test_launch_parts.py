"""Parts of what starts several processes: how many, with what environment, and what their ends mean."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from pretrain.cli.main import main
from pretrain.distributed import launch, launched
from pretrain.distributed.launch import Launched
from pretrain.distributed.launched import count_devices
from pretrain.distributed.world import World
from pretrain.errors import ConfigError, DistributedError, NoTargets
from pretrain.training.live import open_screen
from pretrain.training.relay import Relay


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_devices("auto") == 4 and count_devices(3) == 3 and count_devices("2") == 2
    assert count_devices("auto", "cpu") == 1 and count_devices(64, "cpu") == 64
    with pytest.raises(ConfigError, match="4 GPUs"):
        count_devices(8)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="devices is 3000, but this machine has"):
        count_devices(3000)
    assert count_devices("auto") == 1 and count_devices(2) == 2
    for wrong in (0, -1, True, "all", 2.5):
        with pytest.raises(ConfigError, match="devices is"):
            count_devices(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "rank", "several"),
    [("2", "0", True), ("2", "", False), ("", "0", False), ("", "", False), ("1", "0", False), ("", "x", False),
     ("-1", "0", False), ("-1", "-1", False)],
)  # fmt: skip
def test_variables_of_a_launcher_that_are_empty_or_below_0_are_not_set(
    monkeypatch: pytest.MonkeyPatch, size: str, rank: str, several: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    assert launched.launched() is several
    assert several or World.find().size == 1


@pytest.mark.parametrize(("size", "rank"), [("auto", "0"), ("2.0", "0"), ("2", "x")])
def test_a_variable_of_a_launcher_that_is_no_number_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: str, rank: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    named = f"RANK is {rank!r}" if size == "2" else f"WORLD_SIZE is {size!r}"
    assert main(["doctor"]) == 2
    assert f"The environment variable {named} and no whole number" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_variable_of_one_host_that_is_no_number_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "x")
    assert World().size == 1
    with pytest.raises(ConfigError, match=f"{variable} is 'x' and no whole number"):
        World(0, 2)


def test_variables_that_another_start_left_behind_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DistributedError, match="is to run alone.*: unset RANK WORLD_SIZE"):
        World.find()


def test_the_gpu_of_a_mac_has_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert count_devices(1, "mps") == count_devices("auto") == 1 and count_devices(2, "cpu") == 2
    for device in ("auto", "mps"):
        with pytest.raises(ConfigError, match="parallel.device=cpu"):
            count_devices(2, device)


def ended(folder: Path, codes: dict[int, int], *logs: str) -> Launched:
    """Processes that have ended: their exit codes, but for zeros, and what they wrote to stderr.

    A line ``ERROR: TEXT`` stands for a PretrainError.
    """
    group = object.__new__(Launched)
    group.folder, group.devices, group._asked, group.failures = folder, len(logs), True, codes
    for rank, text in enumerate(logs):
        (place := folder / str(rank)).mkdir()
        (place / "stderr.log").write_text(text)
        if match := re.fullmatch(r"(\w+): (.*)\n", text, re.S):
            (place / launched.ERROR).write_text(json.dumps(match.groups()))
    return group


@pytest.mark.parametrize(
    ("codes", "logs", "broke"),
    [
        ({0: 143, 1: 143}, ("", ""), False),
        ({0: 130}, ("", ""), False),
        ({0: -15, 1: 75}, ("", "DistributedError: rank 0 is lost\n"), False),
        ({0: -15, 1: 1}, ("", "CheckpointError: full\n"), True),
        ({0: -15, 1: -9}, ("", ""), True),
        ({0: 143, 1: 3}, ("", "its last words\n"), True),
    ],
)
def test_what_is_no_agreed_stop(
    tmp_path: Path, codes: dict[int, int], logs: tuple[str, ...], broke: bool
) -> None:
    group = ended(tmp_path, codes, *logs)
    assert group.failed_to_stop() is broke
    if codes.get(1) == 3:
        text = str(group.failure())
        assert "Process 1 of 2 failed with exit code 3" in text and "its last words" in text
    if codes.get(1) == -9:
        assert "s after it was asked to stop" in str(group.failure())


def test_the_error_of_the_cause_is_raised(tmp_path: Path) -> None:
    """Not that of a process that lost its connection to it, which may have ended first."""
    error = ended(
        tmp_path, {0: 1, 1: 1}, "DistributedError: lost\n", "NoTargets: No row\n  has one.\n"
    ).failure()
    assert str(error) == "No row\n  has one." and type(error) is NoTargets


def test_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    threads = [
        launch._environment(n, t, tmp_path)["OMP_NUM_THREADS"] for n, t in ((2, 0), (16, 0), (2, 3))
    ]
    assert threads == ["4", "1", "3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    env = launch._environment(2, 0, tmp_path)
    assert env["OMP_NUM_THREADS"] == "2" and env["WORLD_SIZE"] == "2"
    assert not any(name.startswith("TORCHELASTIC") for name in env), "of another launcher"


def test_the_processes_of_one_host_talk_over_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name in ("lo", "lo0"):
        names = [(1, "eth0"), (2, name)]
        monkeypatch.setattr(launch.socket, "if_nameindex", lambda names=names: names)
        assert launch._environment(2, 0, tmp_path)["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert launch._environment(2, 0, tmp_path)["GLOO_SOCKET_IFNAME"] == "eth0"


def test_a_full_disk_for_the_screen_does_not_end_the_run() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError), open(full, "w") as file:
        file.write("x")
    Relay(full).write("a line")


def test_the_relay_is_the_screen_of_a_launched_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launched.SCREEN, str(tmp_path / "screen.jsonl"))
    screen = open_screen()
    assert isinstance(screen, Relay)
    screen.show(3, {"loss": float("nan")}, 10)
    screen.write("ünïcode\x1b")
    screen.close()
    lines = (tmp_path / "screen.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and '"total": 10' in lines[0]
