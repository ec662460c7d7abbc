"""One configuration, many meshes: the same loss curve, the same rows, and every mesh goes on from every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed.cluster import launch, merged, once

HERE = Path(__file__).parent
MESHES = ("1", "DDP 2", "FSDP2 2", "TP 2", "FSDP2 x TP 4")
FAMILIES = ("gpt2", "llama", "bert", "modernbert")
WITHIN = 1e-6  # of the loss, relative


def _curves(folder: Path) -> None:
    parts = []
    for what in ("curves", "resume"):
        for size in (1, 2, 4):
            parts.append(folder / f"{what}-{size}.json")
            launch(HERE / "runs.py", size, what, str(parts[-1]), str(folder))
    merged(folder, parts)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = once(tmp_path_factory, "meshes", _curves)
    return found


def _worst(one: list[float], two: list[float]) -> float:
    assert len(one) == len(two)
    return max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_every_mesh_has_the_curve_of_one_device(
    seen: dict[str, Any], mesh: str, family: str, accumulate: int
) -> None:
    one, other = seen[f"1|{family}|{accumulate}"], seen[f"{mesh}|{family}|{accumulate}"]
    assert len(other["losses"]) == 10
    assert len(set(other["losses"])) == 10
    assert _worst(one["losses"], other["losses"]) < WITHIN
    assert _worst([one["held_out"]], [other["held_out"]]) < WITHIN
    assert _worst(one["norms"], other["norms"]) < 1e-4
    # Cut or not, the operations of a token are those of the whole model, and the peak is that of all devices.
    assert _worst(one["work"], other["work"]) < 1e-9
    assert {k: sorted(v) for k, v in one["rows"].items()} == {
        k: sorted(v) for k, v in other["rows"].items()
    }


@pytest.mark.parametrize("after", MESHES)
@pytest.mark.parametrize("before", MESHES)
def test_every_mesh_goes_on_from_every_other(seen: dict[str, Any], before: str, after: str) -> None:
    whole, part = seen["1|llama|1"], seen[f"cut|{before}"]
    resumed = seen[f"{before}|{after}"]
    rows = part["rows"] | resumed["rows"]
    assert sorted(part["rows"]) == ["0", "1", "2", "3"]
    assert sorted(resumed["rows"], key=int) == [str(i) for i in range(4, 10)]
    # No row is lost, none comes twice.
    assert {k: sorted(v) for k, v in rows.items()} == {
        k: sorted(v) for k, v in whole["rows"].items()
    }
    assert _worst(part["losses"], whole["losses"][:4]) < WITHIN
    assert _worst(resumed["losses"], whole["losses"]) < WITHIN
    assert _worst([resumed["held_out"]], [whole["held_out"]]) < WITHIN


def _extras(folder: Path) -> None:
    parts = [folder / f"extras-{size}.json" for size in (1, 2, 4)]
    for size, part in zip((1, 2, 4), parts, strict=True):
        launch(HERE / "runs.py", size, "extras", str(part), str(folder))
    merged(folder, parts)


# Half precision rounds where a sum is cut; Muon makes much of the directions in which a gradient is almost nothing.
@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("muon", 1e-4),
        ("ema", WITHIN),
        ("layers", WITHIN),
        ("bf16", 1e-3),
        ("full", WITHIN),
        ("selective", WITHIN),
        ("compiled", WITHIN),
        ("async", WITHIN),
        ("from", WITHIN),
    ],
)
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_settings_mean_the_same_on_every_mesh(
    tmp_path_factory: pytest.TempPathFactory, mesh: str, name: str, within: float
) -> None:
    seen = once(tmp_path_factory, "extras", _extras)
    # What is compiled is held against what is not.
    one, other = seen[f"1|{name.replace('compiled', 'selective')}"], seen[f"{mesh}|{name}"]
    assert len(other["losses"]) == (3 if name == "from" else 6)
    assert _worst(one["losses"], other["losses"]) < within
    assert _worst([one["held_out"]], [other["held_out"]]) < within


def _bits(folder: Path, count: int) -> None:
    parts = [folder / f"bits-{size}.json" for size in (1, 2, 4)]
    for size, part in zip((1, 2, 4), parts, strict=True):
        launch(HERE / "runs.py", size, "bits", str(part), str(folder), str(count), timeout=600)
    merged(folder, parts)


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_reproducible_runs_have_the_same_bits_on_1_2_and_4_processes(
    tmp_path_factory: pytest.TempPathFactory, count: int
) -> None:
    seen = once(tmp_path_factory, f"bits-{count}", lambda folder: _bits(folder, count))
    differing = [
        seed
        for seed in range(count)
        if not seen[f"1|{seed}"] == seen[f"2|{seed}"] == seen[f"4|{seed}"]
    ]
    assert not differing
    assert len({seen[f"1|{seed}"]["weights"] for seed in range(count)}) == count
