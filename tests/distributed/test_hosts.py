"""Hosts, each a network namespace of this machine, when the link between them is cut for good.

First the watchdog alone, then torchrun on two hosts and a real training run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.fault_table import SILENCE, STEPS, WORKER, Stage, events, found, result
from distributed.netns import Hosts, permitted
from distributed.torchrun import Torchrun
from distributed.watchdog_worker import Crew
from pretrain.distributed import record
from pretrain.distributed.watchdog import EXIT_LOST

WATCHED = 3.0  # seconds of silence in the tests of the watchdog alone

pytestmark = pytest.mark.skipif(bool(why := permitted()), reason=why)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def port(hosts: Hosts) -> Iterator[int]:
    """A store on host 0, beside the ranks, as an agent of torchrun holds it."""
    code = (
        "import sys, torch.distributed as dist\n"
        "store = dist.TCPStore('0.0.0.0', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [*hosts.inside(0), sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        yield int(process.stdout.readline())
        process.stdin.close()


@pytest.fixture(scope="module")
def crews(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Crew]]:
    made = [Crew(tmp_path_factory.mktemp(f"host{n}"), *hosts.inside(n)) for n in range(2)]
    yield made
    for crew in made:
        crew.close()


@pytest.mark.parametrize("how", ["cut", pytest.param("unplug", marks=pytest.mark.slow)])
def test_both_sides_of_a_cut_link_name_whom_they_lost(
    how: str, hosts: Hosts, port: int, crews: list[Crew]
) -> None:
    for number, crew in enumerate(crews):
        ranks = [2 * number, 2 * number + 1]
        orders = {"steps": 1000, "attempt": how, "run_dir": str(crew.folder)}
        orders |= {"options": {"silence": WATCHED}}
        crew.start(
            ranks,
            4,
            port,
            orders,
            MASTER_ADDR=hosts.addresses[0],
            LOCAL_WORLD_SIZE="2",
            GLOO_SOCKET_IFNAME="net0",
        )
    crews[0].until(0, "step 3", 60)
    began = time.time()
    getattr(hosts, how)(1)
    codes = crews[0].wait(20) | crews[1].wait(5)
    hosts.mend(1) if how == "cut" else hosts.plug(1)
    assert codes == dict.fromkeys(range(4), EXIT_LOST)
    late = max(at for crew in crews for _, at in crew.ended.values()) - began
    print(f"\nall left {late:.2f} s after the link was {how}")
    assert late < WATCHED + 5
    lost = [json.loads((crew.folder / record.FILE).read_text()) for crew in crews]
    assert {lost[0]["rank"], *(one["rank"] for one in lost[0]["also"])} == {2, 3}
    assert lost[1]["rank"] == 0 and all(one["kind"] == "silent" for one in lost)
    for rank in range(4):
        named = lost[rank // 2]["rank"]
        assert f"Rank {named} of 4" in crews[rank // 2].err(rank)


def _ended(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked how."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_a_training_run_on_two_hosts_outlives_a_cut_link(
    hosts: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("training")
    stage, launchers = Stage(folder), list[Torchrun]()
    try:
        wanted = stage.wanted("ddp")
        for number in range(2):
            (folder / f"host{number}").mkdir()
            launchers.append(Torchrun(folder / f"host{number}", *hosts.inside(number)))
        out = folder / "run"
        config = stage.config(out, "ddp")

        def start(port: int, *faults: dict[str, object]) -> None:
            for number, launcher in enumerate(launchers):
                words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
                words += ["--rdzv-endpoint", f"{hosts.addresses[0]}:{port}"]
                # Both have one name here, by which the launcher cannot tell whose the address is.
                words += ["--rdzv-conf", f"is_host={number == 0}"]
                words += ["--local-addr", hosts.addresses[number], "--redirects", "3"]
                words += ["--log-dir", f"{out}.logs/{number}", str(WORKER)]
                words += ["train", "--config", str(config)]
                env = {"EVENTS": f"{out}.events", "FAULTS": json.dumps(faults)}
                launcher.start(words, workers=1, GLOO_SOCKET_IFNAME="net0", **env)

        start(29400, {"rank": 1, "phase": "forward", "step": 5, "signal": 0, "into": 1.0})
        end = time.time() + 60
        while not events(out, "reached"):
            assert time.time() < end, stage.errors(out) + launchers[0].said()
            time.sleep(0.02)
        time.sleep(0.5)  # the others learn of the phase
        hosts.cut(1)
        began = time.time()
        running = [one["pid"] for one in events(out, "began")]
        assert len(running) == 2
        # The launchers are no witnesses: one of them is cut off from its store, and waits for that.
        while not all(_ended(pid) for pid in running):
            assert time.time() < began + SILENCE + 5, stage.errors(out)
            time.sleep(0.02)
        print(f"\nboth processes left {time.time() - began:.1f} s after the link was cut")
        for rank in range(2):
            lost = found(Path(f"{out}.logs", str(rank)), 0)
            assert (lost["rank"], lost["kind"]) == (1 - rank, "silent")
            phase = ("backward", "forward")[1 - rank]  # rank 0 waits there for the other
            assert (lost["phase"], lost["step"]) == (phase, 5), stage.errors(out)
        assert stage.errors(out).count(f"stops with exit code {EXIT_LOST}") == 2
        for launcher in launchers:
            launcher.kill()
        hosts.mend(1)

        (folder / "run.events").unlink()
        start(29401)
        codes = [launcher.wait(60) for launcher in launchers]
        assert codes == [0, 0], stage.errors(out) + "".join(one.said() for one in launchers)
        assert {one["step"] for one in events(out, "began")} == {4}
        assert result(out) == wanted and wanted["steps"] == STEPS
    finally:
        hosts.mend(1)
        for launcher in launchers:
            launcher.close()
        stage.close()
