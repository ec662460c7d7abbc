"""The environment of processes that a test starts, and what they find, once for all tests that look at it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Of a process that a test starts: one thread, this checkout, no network."""
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Any:
    """What ``make`` writes as ``result.json`` into a folder of its own; one process of a test run makes it."""
    base = factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = base / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = folder / "result.json"
        if not result.exists():
            try:
                make(folder)
            except BaseException as error:
                result.write_text(json.dumps({"failed": str(error)}), encoding="utf-8")
                raise
    found = json.loads(result.read_text(encoding="utf-8"))
    if "failed" in found:
        pytest.fail(found["failed"], pytrace=False)
    return found


def merged(folder: Path, parts: Sequence[Path]) -> None:
    """Put the JSON objects of several files into ``result.json``."""
    found: dict[str, Any] = {}
    for part in parts:
        found |= json.loads(part.read_text(encoding="utf-8"))
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
