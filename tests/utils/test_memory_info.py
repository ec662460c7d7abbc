"""The memory of the machine and of its container, whose limit counts where it is the smaller one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pretrain.utils import memory_info
from pretrain.utils.memory_info import free_memory, peak_memory, physical_memory, total_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_info, "_CGROUP", tmp_path)
    assert 1 << 28 < total_memory() == physical_memory() < math.inf
    assert 0 < free_memory(CPU) <= total_memory() and 0 < peak_memory(CPU) < total_memory()
    (folder := tmp_path / "memory" if version == 1 else tmp_path).mkdir(exist_ok=True)
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    (folder / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert total_memory() == physical_memory()
    (folder / limit).write_text("123456\n")
    (folder / used).write_text("123000\n")
    assert total_memory() == 123456.0 and free_memory(CPU) == 456.0
    (folder / "memory.stat").write_text("anon 5\ninactive_file 400\n")
    assert free_memory(CPU) == 856.0


def test_a_system_that_reports_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_info, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory_info, "_field", lambda *_: next(iter(())))
    monkeypatch.setattr(memory_info.os, "sysconf", lambda name: int("nothing"))
    assert total_memory() == math.inf and math.isnan(free_memory(CPU)) and peak_memory(CPU) > 0
