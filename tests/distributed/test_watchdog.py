"""The watchdog with real processes: who is lost is found, named alike by all, and everybody leaves in time."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distributed.watchdog_worker import PHASES, Crew
from pretrain.distributed import record
from pretrain.distributed.watchdog import EXIT_LOST, Member, Watchdog
from pretrain.errors import DistributedError

DEATH = 5.0  # seconds in which the survivors must have left
LONG = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(tmp_path_factory.mktemp("crew"))
    yield crew
    crew.close()


@pytest.fixture
def crew(server: Crew, tmp_path: Path) -> Iterator[Crew]:
    server.folder = tmp_path
    yield server
    server.kill()


def start(crew: Crew, size: int = 3, **orders: Any) -> Any:
    """Start a run and return its store, which must be kept."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    orders = {"steps": LONG, "run_dir": str(crew.folder)} | orders
    crew.start(list(range(size)), size, store.port, orders)
    return store


def said(crew: Crew, rank: int) -> dict[str, Any]:
    """The record that a rank printed."""
    lines = [line for line in crew.err(rank).splitlines() if line.startswith("first failure: ")]
    assert len(lines) == 1, crew.err(rank)
    return dict(json.loads(lines[0].removeprefix("first failure: ")))


def written(crew: Crew) -> dict[str, Any]:
    return dict(json.loads((crew.folder / record.FILE).read_text()))


def survivors(crew: Crew, lost: int, since: float, limit: float, size: int = 3) -> dict[str, Any]:
    """All others have left in time with the same record, which is in the file too; returns it."""
    others = [rank for rank in range(size) if rank != lost]
    codes = crew.wait(limit + 5, others)
    assert {rank: codes.get(rank) for rank in others} == dict.fromkeys(others, EXIT_LOST)
    late = max(crew.ended[rank][1] for rank in others) - since
    print(f"\nsurvivors left after {late:.2f} s")
    assert late <= limit
    records = [said(crew, rank) for rank in others]
    assert all(one == records[0] for one in records)
    assert records[0]["rank"] == lost and records[0]["pid"] == crew.pids[lost]
    assert records[0]["host"] == socket.gethostname()
    for rank in others:
        assert f"Rank {lost} of {size}" in crew.err(rank) and "goes on" in crew.err(rank)
    file = written(crew)
    assert {key: file[key] for key in ("rank", "pid", "what", "step", "run")} == {
        key: records[0][key] for key in ("rank", "pid", "what", "step", "run")
    }
    assert not list(crew.folder.glob(".*"))
    return records[0]


@pytest.mark.parametrize("lost", [2, 0])
def test_a_killed_process_ends_the_others(crew: Crew, lost: int) -> None:
    keep = start(crew)
    crew.until(1, "step 3")
    found = survivors(crew, lost, crew.signal(lost, signal.SIGKILL), DEATH)
    assert found["kind"] == "died" and found["step"] <= 20
    assert found["phase"] in ("start", *PHASES)
    stacks = {rank: one["stack"] for one in written(crew)["stacks"] for rank in one["ranks"]}
    assert set(stacks) >= ({0, 1} if lost else set()) or 1 in stacks or 2 in stacks
    assert any("watchdog_worker.py" in line for one in stacks.values() for line in one)
    assert not any(line.startswith("/") for one in stacks.values() for line in one)
    del keep


@pytest.mark.parametrize("lost", [1, 0])
def test_a_stopped_process_ends_the_others(crew: Crew, lost: int) -> None:
    keep = start(crew, options={"silence": 3.0})
    crew.until(1, "step 1")
    found = survivors(crew, lost, crew.signal(lost, signal.SIGSTOP), 3.0 + 1.0 + DEATH)
    assert found["kind"] == "silent" and "stopped by a signal" in found["what"]
    woken = crew.signal(lost, signal.SIGCONT)
    assert crew.wait(5.0)[lost] == EXIT_LOST
    assert crew.ended[lost][1] - woken < DEATH and f"Rank {lost} of 3" in crew.err(lost)
    del keep


def test_a_process_that_hangs_is_named_with_its_stack(crew: Crew) -> None:
    keep = start(crew, hang=[1, 3], options={"timeout": 2.0, "silence": 20.0})
    crew.until(0, "step 2")
    codes = crew.wait(2.0 + DEATH + 3)
    assert codes == dict.fromkeys(range(3), EXIT_LOST)
    records = [said(crew, rank) for rank in range(3)]
    assert all(one == records[0] for one in records)
    one = records[0]
    assert (one["rank"], one["kind"], one["phase"], one["step"]) == (1, "hung", "forward", 3)
    assert "looping" in one["stack"].split("\n")[-1] and "does not wait" in one["what"]
    assert one["pid"] == crew.pids[1] and written(crew)["stack"] == one["stack"]
    stacks = {tuple(one["ranks"]): one["stack"] for one in written(crew)["stacks"]}
    assert any("all_reduce" in stack[-1] for ranks, stack in stacks.items() if 1 not in ranks)
    del keep


def test_another_collective_than_the_others_is_a_hang_too(crew: Crew) -> None:
    keep = start(crew, odd=[1, 2], options={"timeout": 2.0, "silence": 20.0})
    codes = crew.wait(2.0 + DEATH + 6)
    # gloo notices some mismatches by itself, which is then the error of the one that noticed
    assert len(codes) == 3 and set(codes.values()) <= {1, EXIT_LOST}
    records = [said(crew, rank) for rank in range(3) if codes[rank] == EXIT_LOST]
    assert records and all(one == records[0] for one in records)
    assert records[0]["kind"] in ("hung", "raised")
    del keep


@pytest.mark.parametrize("rank", [0, 2])
def test_an_exception_is_told_to_the_others(crew: Crew, rank: int) -> None:
    keep = start(crew, **{"raise": [rank, 3]})
    codes = crew.wait(20)
    assert codes == {one: 1 if one == rank else EXIT_LOST for one in range(3)}
    times = [at for _, at in crew.ended.values()]
    assert max(times) - min(times) < DEATH
    records = [said(crew, one) for one in range(3) if one != rank]
    assert records[0] == records[1] and records[0]["kind"] == "raised"
    assert records[0]["what"] == "RuntimeError: the bolt is loose" and records[0]["step"] == 3
    assert "the bolt is loose" in records[0]["stack"] and written(crew)["rank"] == rank
    assert "Traceback" in crew.err(rank) and "first failure" not in crew.err(rank)
    del keep


def test_an_error_that_all_raise_is_everybodys_own(crew: Crew) -> None:
    (crew.folder / record.FILE).write_text('{"run": "of an earlier attempt"}\n')
    keep = start(crew, refuse=["all", 2])
    assert crew.wait(20) == dict.fromkeys(range(3), 2)
    for rank in range(3):
        assert crew.err(rank).strip() == f"error: no rows are left on rank {rank}"
    assert (crew.folder / record.FILE).exists(), "nothing has succeeded since"
    del keep


def test_a_normal_end_is_no_loss_and_forgets_an_earlier_one(crew: Crew) -> None:
    (crew.folder / record.FILE).write_text('{"run": "of an earlier attempt"}\n')
    keep = start(crew, steps=4, fork=True, options={"timeout": 1.0})
    assert crew.wait(25) == dict.fromkeys(range(3), 0)
    for rank in range(3):
        assert crew.out(rank).endswith("done\n") and not crew.err(rank)
    assert not (crew.folder / record.FILE).exists()
    del keep


def test_leaving_without_a_goodbye_is_a_death_even_if_a_child_lives_on(crew: Crew) -> None:
    keep = start(crew, leave=[1, 4], fork=True)
    crew.wait(20, [1])
    found = survivors(crew, 1, crew.ended[1][1], DEATH)
    assert found["kind"] == "died" and crew.ended[1][0] == 3
    del keep


def test_all_stopped_and_continued_goes_on(crew: Crew) -> None:
    """A terminal's Ctrl-Z, or a machine that sleeps, stops everybody; the time is held against nobody."""
    keep = start(crew, steps=20, options={"silence": 3.0, "timeout": 3.0})
    crew.until(0, "step 2")
    for rank in range(3):
        crew.signal(rank, signal.SIGSTOP)
    time.sleep(3.6)
    for rank in range(3):
        crew.signal(rank, signal.SIGCONT)
    assert crew.wait(30) == dict.fromkeys(range(3), 0), crew.err(0)
    del keep


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "silent")])
def test_all_leave_when_the_store_of_the_launcher_is_lost(
    crew: Crew, number: int, kind: str
) -> None:
    code = (
        "import sys, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "sys.stdin.read()"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        port = int(launcher.stdout.readline())
        orders = {"steps": LONG, "run_dir": str(crew.folder), "options": {"silence": 3.0}}
        crew.start([0, 1], 2, port, orders)
        crew.until(1, "step 1")
        launcher.send_signal(number)
        began = time.time()
        assert crew.wait(3.0 + DEATH + 3) == {0: EXIT_LOST, 1: EXIT_LOST}
        assert max(at for _, at in crew.ended.values()) - began < 3.0 + DEATH
        launcher.kill()
    for rank in range(2):
        found = said(crew, rank)
        assert (found["rank"], found["kind"]) == (0, kind) and "store" in found["what"]
    assert written(crew)["rank"] == 0


# ------------------------------------------------------------------------------------------ without processes


def test_one_process_has_nothing_to_watch() -> None:
    with Watchdog(None, 0, 1) as watchdog:
        watchdog.mark("forward", 1)
    watchdog.fail(RuntimeError("x"))
    with pytest.raises(ValueError), Watchdog(None, 0, 1):
        raise ValueError


def test_marks_are_cheap() -> None:
    watchdog = Watchdog(None, 0, 1)
    began = time.perf_counter()
    for step in range(20_000):
        watchdog.mark("forward", step)
    assert (
        time.perf_counter() - began
    ) / 20_000 < 20e-6  # well below a microsecond on a quiet machine


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(DistributedError, match=r"rank 0 of 2 waited 0\.3 seconds for rank 1\."):
        Watchdog(dist.HashStore(), 0, 2, patience=0.3)
    with pytest.raises(DistributedError, match=r"rank 1 of 2 waited .* seconds for rank 0\."):
        Watchdog(dist.HashStore(), 1, 2, patience=0.3)


def test_what_waits_is_told_from_what_works() -> None:
    waiting = [
        "torch/distributed/distributed_c10d.py:10 all_reduce: work.wait()",
        "pretrain/training/trainer.py:9 _step: values = torch.stack([a, b]).tolist()",
        "pretrain/training/trainer.py:9 run: loss.backward()",
    ]
    working = [
        "train.py:3 looping: time.sleep(1)",
        "pretrain/data/loader.py:9 read: rows = file.read(10)",
        "",
    ]
    assert all(record.is_waiting(f"outer.py:1 main: run()\n{line}") for line in waiting)
    assert not any(record.is_waiting(line) for line in working)


def test_a_failed_collective_is_no_first_failure_while_a_process_is_missing() -> None:
    """As of a process that dies alone on its host, where no other one can look for it."""

    def member(rank: int, sent: float, error: str | None = None) -> Member:
        beat = {"rank": rank, "host": "a", "pid": 1, "phase": "backward", "step": 2, "signs": 1}
        found = None if error is None else {"rank": rank, "what": error}
        beat |= {"time": sent, "done": False, "tentative": error is not None, "error": found}
        return Member().update(json.dumps(beat).encode(), sent)

    watchdog = Watchdog(None, 0, 1)
    watchdog._interval = 1.0
    lost = member(2, 9.5)
    watchdog._members = {0: member(0, 10.0, "RuntimeError: gone"), 1: member(1, 11.0), 2: lost}
    assert watchdog._first_error(10.3) is None and watchdog._first_error(12.4) is None
    found = watchdog._first_error(12.6)
    assert found is not None and (found["rank"], found["kind"]) == (2, "silent")
    assert "since rank 0 failed: RuntimeError: gone" in found["what"]
    watchdog._members[2] = member(2, 10.4)
    found = watchdog._first_error(10.6)
    assert found is not None and found["rank"] == 0


def test_processes_that_all_close_at_once_do_not_hang() -> None:
    watchdog = Watchdog(None, 0, 1, timeout=1.0)
    beat = {"rank": 0, "phase": "save", "signs": 1, "time": 0.0, "error": None, "done": False}
    watchdog._members = {0: Member().update(json.dumps(beat).encode(), 0.0)}
    assert watchdog._all_ranks_stalled(9.0) and not watchdog._all_ranks_stalled(3.0)
    watchdog._members[0].beat["done"] = True  # rank 0 reads this before it stops watching
    assert not watchdog._all_ranks_stalled(9.0)


def test_the_record_names_no_place_of_this_machine(tmp_path: Path) -> None:
    found = {"rank": 1, "what": f"OSError: {tmp_path}/secret/rows.bin is gone", "run": "a"}
    record.write(tmp_path, found, {0: record.main_stack(), 1: ""})
    text = (tmp_path / record.FILE).read_text()
    assert "rows.bin" in text and str(tmp_path) not in text and "secret" not in text
    assert "test_watchdog.py" in text and str(Path(__file__).parent) not in text
    record.write(tmp_path, found | {"what": "later"}, {})
    assert (tmp_path / record.FILE).read_text() == text  # the first one counts
    record.write(tmp_path, found | {"run": "b"}, {})
    assert json.loads((tmp_path / record.FILE).read_text())["run"] == "b"
