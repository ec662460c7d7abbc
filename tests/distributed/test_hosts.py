"""The watchdog between hosts, each a network namespace of this machine, when the link between them is cut for good."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from distributed.lifeline_worker import Crew
from distributed.netns import Hosts, permitted
from pretrain.parallel import record
from pretrain.parallel.lifeline import EXIT_LOST

SILENCE = 3.0

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


@pytest.mark.parametrize("how", ["cut", "unplug"])
def test_both_sides_of_a_cut_link_name_whom_they_lost(
    how: str, hosts: Hosts, port: int, crews: list[Crew]
) -> None:
    for number, crew in enumerate(crews):
        ranks = [2 * number, 2 * number + 1]
        orders = {"steps": 1000, "attempt": how, "run_dir": str(crew.folder)}
        orders |= {"options": {"silence": SILENCE}}
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
    assert codes == dict.fromkeys(range(4), EXIT_LOST)
    late = max(at for crew in crews for _, at in crew.ended.values()) - began
    print(f"\nall left {late:.2f} s after the link was {how}")
    assert late < SILENCE + 5
    lost = [json.loads((crew.folder / record.FILE).read_text()) for crew in crews]
    assert {lost[0]["rank"], *(one["rank"] for one in lost[0]["also"])} == {2, 3}
    assert lost[1]["rank"] == 0 and all(one["kind"] == "silent" for one in lost)
    for rank in range(4):
        named = lost[rank // 2]["rank"]
        assert f"Rank {named} of 4" in crews[rank // 2].err(rank)
    if how == "cut":
        hosts.mend(1)
