"""Golden runs have the figures of ``expected.json``, and directories of an earlier version still open and go on.

``python -m golden`` compares byte for byte on one machine; see ``__main__.py``, also for writing expected.json anew.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from distributed.cluster import once
from distributed.torchrun import launch
from golden import runs, stored_runs
from golden.compare import TOLERANCES, differences, portable, read_expected
from pretrain.objectives import TASKS

EXPECTED = read_expected()
RESUMED = [name for name in runs.RUNS if runs.RUNS[name].stop]


def named(*, processes: int) -> list[Any]:
    """The names of runs in so many processes as parameters, slow ones marked."""
    return [
        pytest.param(name, marks=(pytest.mark.slow,) if run.slow else ())
        for name, run in runs.RUNS.items()
        if run.processes == processes
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Place of the runs in one process; those that others start from are trained once."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture
def on_meshes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Records of the runs in two processes: of the quick ones, or, for a slow test, of all."""
    slow = request.node.get_closest_marker("slow") is not None
    names = [
        name for name, run in runs.RUNS.items() if run.processes == 2 and (slow or not run.slow)
    ]

    def make(place: Path) -> None:
        runs.make(place, names, launch)
        records = {name: runs.record(place, name) for name in names}
        (place / "result.json").write_text(json.dumps(records), encoding="utf-8")

    found: dict[str, Any] = once(tmp_path_factory, f"golden-meshes-{len(names)}", make)
    return found


def assert_as_expected(name: str, record: dict[str, Any]) -> None:
    found = list(differences(EXPECTED[name], portable(record), runs.RUNS[name].precision, name))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", named(processes=1))
def test_run(folder: Path, name: str) -> None:
    runs.make(folder, [name])
    assert_as_expected(name, runs.record(folder, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", named(processes=2))
def test_run_on_mesh(on_meshes: dict[str, Any], name: str) -> None:
    assert_as_expected(name, on_meshes[name])


# ------------------------------------------------------------------------------------------ what is expected


def test_every_run_and_task_has_figures() -> None:
    assert set(EXPECTED) == set(runs.RUNS)
    assert not set(TASKS) - {run.task for run in runs.RUNS.values()}
    for name, expected in EXPECTED.items():
        losses = [line["loss"] for line in expected["log"] if "grad_norm" in line]
        evaluations = [line["eval"]["loss"] for line in expected["log"] if "eval" in line]
        assert len(losses) >= 4 and len(set(losses)) == len(losses), name
        assert len(evaluations) >= 2 and all(map(math.isfinite, losses + evaluations)), name
        assert len(expected["tensors"]) >= 9, name
        assert expected["inspect"]["manifest"] == "holds", name
        assert len(expected["files"]) > 8 and expected["config"]["pretrain"]["metrics"], name


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_runs_end_like_whole_ones(name: str) -> None:
    """Also where one of them stops, it saves and measures nothing else than the whole one."""
    resumed, whole = EXPECTED[name], EXPECTED[name.removesuffix("-resumed")]
    assert resumed["tensors"] == whole["tensors"]
    assert [line for line in resumed["log"] if "grad_norm" in line] == [
        line for line in whole["log"] if "grad_norm" in line
    ]


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from _leaves(part, (*place, key))
    else:
        yield place, value


@pytest.mark.parametrize("name", ["gpt2", "bf16", "lora"])
def test_comparison_sees_every_change(name: str) -> None:
    """Of each single entry of a record, and only beyond the tolerance."""
    expected, precision = EXPECTED[name], runs.RUNS[name].precision
    assert not list(differences(expected, copy.deepcopy(expected), precision))
    seen = 0
    for place, value in _leaves(expected):
        changed = copy.deepcopy(expected)
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        if isinstance(value, float):
            holder[place[-1]] = value * (1 + TOLERANCES[precision][0] / 2)
            assert not list(differences(expected, changed, precision)), place
            holder[place[-1]] = value * (1 + 30 * TOLERANCES[precision][0]) + 0.003
        elif isinstance(value, int):
            holder[place[-1]] = value + 1
        else:
            holder[place[-1]] = f"{value}?"
        assert len(list(differences(expected, changed, precision))) == 1, place
        del holder[place[-1]]
        assert list(differences(expected, changed, precision)), place
        seen += 1
    assert seen > 150


def test_byte_for_byte_comparison_has_no_tolerance() -> None:
    one, other = {"a": [1.0, {"sha256": "ab"}]}, {"a": [math.nextafter(1.0, 2), {"sha256": "ac"}]}
    assert not list(differences(one, copy.deepcopy(one)))
    assert len(list(differences(one, other))) == 2


# ------------------------------------------------------------------------------------------ stored directories

FIGURES = json.loads((stored_runs.STORED / "figures.json").read_text(encoding="utf-8"))
_USES = [(use, name) for use, (_, names) in stored_runs.USES.items() for name in names]


def test_every_use_of_the_stored_directories_has_figures() -> None:
    assert [(use, name) for use, of in FIGURES.items() for name in of] == _USES
    assert len(_USES) == 17
    for name, log in FIGURES["resumed"].items():
        (stored,) = stored_runs.STORED.glob(f"{name}/checkpoint-*")
        assert log[-1]["step"] > int(stored.name.rpartition("-")[2])


@pytest.mark.parametrize(("use", "name"), _USES)
def test_stored_directory(tmp_path: Path, use: str, name: str) -> None:
    """It is used in another place than where it was written, as after a project was moved."""
    with stored_runs.moved(tmp_path / "project"):
        logs = {path: path.read_bytes() for path in Path().glob("*/log.jsonl")}
        figures = json.loads(json.dumps(stored_runs.USES[use][0](name)))
        if use == "resumed":  # and not begun anew, which would give the same figures
            log, before = Path(name, "log.jsonl").read_bytes(), logs.pop(Path(name, "log.jsonl"))
            assert log.startswith(before) and len(log) > len(before)
        assert all(path.read_bytes() == log for path, log in logs.items())
    found = list(differences(FIGURES[use][name], figures, "fp32", f"{use}/{name}"))
    assert not found, "\n".join(found)
