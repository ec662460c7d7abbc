"""The cluster plan of the documentation: its arithmetic, and its tables as the script prints them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import cluster_plan as plan
import pytest

from pretrain.distributed.estimates import MeshShape, activation_bytes

DOCS = Path(__file__).resolve().parents[1] / "docs"


LLAMA = replace(plan.LLAMA, checkpointing="selective")


def test_traffic_is_that_of_rings() -> None:
    count = LLAMA.parameters
    ddp = plan.traffic(LLAMA, MeshShape(8, 1, 1), "ddp", 8192, 4)
    assert ddp.average == 2 * 7 / 8 * 4 * count and ddp.gather == ddp.reduce == ddp.matrices == 0
    fsdp = plan.traffic(LLAMA, MeshShape(1, 8, 1), "fsdp", 8192, 4)
    assert fsdp.gather == 4 * 2 * 7 / 8 * 2 * count and fsdp.reduce == 4 * 7 / 8 * 4 * count
    kept = plan.traffic(LLAMA, MeshShape(1, 8, 1), "fsdp", 8192, 4, reshard=False)
    assert kept.gather == fsdp.gather / 2
    once = plan.traffic(LLAMA, MeshShape(1, 8, 1), "fsdp", 8192, 4, whole=True)
    assert once.total < fsdp.total / 4
    hybrid = plan.traffic(LLAMA, MeshShape(8, 8, 1), "fsdp", 8192, 4)
    assert hybrid.average == 2 * 7 / 8 * 4 * count / 8 and hybrid.hosts == (1, 8, 1)
    tp = plan.traffic(LLAMA, MeshShape(1, 1, 2), "single", 100)
    assert tp.matrices == (32 * 4 + 2) * 2 * 1 / 2 * 100 * 4096 * 2 and tp.gather == 0
    assert plan.traffic(LLAMA, MeshShape(), "single", 8192).total == 0
    wide = plan.traffic(replace(LLAMA, gather_bytes=4), MeshShape(1, 8, 1), "fsdp", 8192, 4)
    assert wide.gather == 2 * fsdp.gather


def test_groups_over_hosts_share_the_way_out() -> None:
    wide = plan.traffic(LLAMA, MeshShape(1, 64, 1), "fsdp", 8192)
    assert wide.members == (8, 1, 1) and wide.hosts == (8, 1, 1)
    hidden, waited = wide.seconds(450e9, 50e9)
    assert waited == 0 and hidden == pytest.approx((wide.gather + wide.reduce) / 8 / 50e9, rel=0.2)
    thin = plan.traffic(LLAMA, MeshShape(8, 1, 8), "ddp", 8192)
    assert thin.hosts == (1, 8, 1) and thin.seconds(450e9, 50e9)[1] > 0


def test_time_and_checkpoints() -> None:
    assert plan.flops_per_token(LLAMA) == pytest.approx(57.9e9, rel=0.01)
    assert plan.checkpoint_bytes(LLAMA) == 12 * LLAMA.parameters
    # Muon has no moments of matrices that are frozen.
    frozen = replace(LLAMA, trainable=0, muon=LLAMA.parameters)
    assert plan.checkpoint_bytes(frozen) == 4 * LLAMA.parameters
    moved = plan.traffic(LLAMA, MeshShape(8, 8, 1), "fsdp", 8192, 8)
    fast = plan.step_seconds(1e15, moved, peak=1e15, efficiency=0.4, link=450e9, network=50e9)
    slow = plan.step_seconds(1e15, moved, peak=1e15, efficiency=0.4, link=450e9, network=1e9)
    assert fast == pytest.approx(2.5) and slow > fast
    assert plan.save_interval(2.0, 10_000.0) == pytest.approx(200.0)
    best = plan.lost_share(2.0, 200.0, 0.0, 10_000.0)
    assert best < min(plan.lost_share(2.0, t, 0.0, 10_000.0) for t in (100.0, 400.0))


def test_the_plan_in_the_documentation_is_what_the_script_prints() -> None:
    """Every number of the tables, of the line that a run prints, and of the settings below them."""
    text = (DOCS / "distributed.md").read_text(encoding="utf-8")
    for name, made in (("plan", plan.table()), ("alternatives", plan.alternatives())):
        found = re.search(f"<!-- {name}: begin -->\\n(.*?)\\n<!-- {name}: end -->", text, re.S)
        assert found and found[1] == made, f"run docs/cluster_plan.py and paste the table {name}"
    assert plan.reasons() in text
    rows = plan.rows_of(plan.H100)
    steps = re.search(r"save_every: (\d+) steps", text)
    assert steps and rows["save_every"].startswith(f"{steps[1]} steps")
    assert f"activation_checkpointing: {rows['activation_checkpointing']}" in text
    for share in (plan.EAGER, plan.COMPILED, plan.SCALING):
        assert f"{share:.1%}".replace("%", " %") in text
    kept = [
        activation_bytes(replace(LLAMA, checkpointing=m), 1) / 32
        for m in ("off", "selective", "full")
    ]
    shares = f"÷ {kept[0] / kept[1]:.1f} (selective), ÷ {kept[0] / kept[2]:.1f} (full)"
    assert shares in text, shares
