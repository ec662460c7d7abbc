"""One configuration, many meshes: the same loss curve, the same rows, and every mesh goes on from every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed.cluster import merged, once
from distributed.torchrun import launch

HERE = Path(__file__).parent
MESHES = ("1", "DDP 2", "FSDP2 2", "TP 2", "FSDP2 x TP 4")
FAMILIES = ("gpt2", "llama", "bert", "modernbert")
WITHIN = 1e-6  # of the loss, relative


# A causal family whose curve resumed runs go along, and one of both kinds of mask with accumulation.
QUICK_CURVES = ("llama|1", "modernbert|3")
QUICK_STARTS = ("FSDP2 x TP 4",)  # whose checkpoints every mesh goes on from
QUICK_EXTRAS = ("layers", "bf16", "from")
FOUR = MESHES[
    -1
]  # four processes are slow on few cores: the quick runs train one curve, and go on from it
BITS = 2  # random configurations that are run on 1, 2 and 4 processes


def run_all(folder: Path, *phases: dict[int, tuple[str, ...]]) -> None:
    """Start ``runs.py`` on every number of processes, the largest first, once for each phase."""
    files = []
    for k, parts in enumerate(phases):
        for size in (4, 2, 1):
            files.append(folder / f"{k}-{size}.json")
            launch(HERE / "runs.py", size, str(files[-1]), str(folder), *parts[size], timeout=900)
    merged(folder, files)


EVERYTHING = (
    dict.fromkeys((1, 2, 4), ("curves=", "extras=", "bits=50")),
    dict.fromkeys((1, 2, 4), ("resume=",)),
)
# What goes on from a checkpoint of four processes finds it in the same phase.
_AFTER = (f"bits={BITS}", f"resume={','.join(QUICK_STARTS)}")
_FEW = (f"curves={','.join(QUICK_CURVES)}", f"extras={','.join(QUICK_EXTRAS[:-1])}", *_AFTER)
SOME = ({1: _FEW, 2: _FEW, 4: (f"curves={QUICK_CURVES[0]}", *_AFTER)},)


def quick(condition: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a test that is slow unless the condition holds."""
    return () if condition else (pytest.mark.slow,)


@pytest.fixture
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the quick runs gave, or, for a slow test, all of them."""
    slow = request.node.get_closest_marker("slow") is not None
    name, chosen = ("meshes-all", EVERYTHING) if slow else ("meshes", SOME)
    found: dict[str, Any] = once(tmp_path_factory, name, lambda folder: run_all(folder, *chosen))
    return found


def _worst(one: list[float], two: list[float]) -> float:
    assert len(one) == len(two)
    return max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("mesh", "family", "accumulate"),
    [
        pytest.param(
            mesh,
            family,
            accumulate,
            marks=quick(f"{family}|{accumulate}" in QUICK_CURVES[: 1 if mesh == FOUR else None]),
        )
        for mesh in MESHES[1:]
        for family in FAMILIES
        for accumulate in (1, 3)
    ],
)
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
@pytest.mark.parametrize(
    "before",
    [pytest.param(mesh, marks=quick(mesh in QUICK_STARTS)) for mesh in MESHES],
)
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


# Half precision rounds where a sum is cut; Muon makes much of the directions in which a gradient is almost nothing.
@pytest.mark.parametrize(
    ("mesh", "name", "within"),
    [
        pytest.param(mesh, name, within, marks=quick(name in QUICK_EXTRAS and mesh != FOUR))
        for mesh in MESHES[1:]
        for name, within in {
            **dict.fromkeys(
                ("layers", "full", "from", "ema", "selective", "compiled", "async"), WITHIN
            ),
            "bf16": 1e-3,
            "muon": 1e-4,
        }.items()
    ],
)
def test_settings_mean_the_same_on_every_mesh(
    seen: dict[str, Any], mesh: str, name: str, within: float
) -> None:
    # What is compiled is held against what is not.
    one, other = seen[f"1|{name.replace('compiled', 'selective')}"], seen[f"{mesh}|{name}"]
    assert len(other["losses"]) == (3 if name == "from" else 6)
    assert _worst(one["losses"], other["losses"]) < within
    assert _worst([one["held_out"]], [other["held_out"]]) < within


@pytest.mark.parametrize("count", [BITS, pytest.param(50, marks=pytest.mark.slow)])
def test_reproducible_runs_have_the_same_bits_on_1_2_and_4_processes(
    seen: dict[str, Any], count: int
) -> None:
    runs = [[seen[f"bits {size}|{seed}"] for size in (1, 2, 4)] for seed in range(count)]
    differing = [seed for seed, (one, two, four) in enumerate(runs) if not one == two == four]
    assert not differing
    assert len({one["weights"] for one, _, _ in runs}) == count
