"""The watchdog with real processes: who is lost is found, named alike by all, and everybody leaves in time."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distributed.lifeline_worker import PHASES, Crew
from pretrain.distributed import record
from pretrain.distributed.json_socket import Wire
from pretrain.distributed.lifeline import EXIT_LOST, Lifeline
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
    assert any("lifeline_worker.py" in line for one in stacks.values() for line in one)
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


# ------------------------------------------------------------------------------------------ without processes


def test_one_process_has_nothing_to_watch() -> None:
    with Lifeline(None, 0, 1) as lifeline:
        lifeline.mark("forward", 1)
        with lifeline.waiting():
            pass
    lifeline.fail(RuntimeError("x"))
    with pytest.raises(ValueError), Lifeline(None, 0, 1):
        raise ValueError


def test_marks_are_cheap() -> None:
    lifeline = Lifeline(None, 0, 1)
    began = time.perf_counter()
    for step in range(20_000):
        lifeline.mark("forward", step)
    assert (
        time.perf_counter() - began
    ) / 20_000 < 20e-6  # well below a microsecond on a quiet machine


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(DistributedError, match=r"of 2 processes waited 0\.3 seconds for rank 1"):
        Lifeline(dist.HashStore(), 0, 2, patience=0.3)
    with pytest.raises(DistributedError, match="cannot reach the watchdog of rank 0"):
        Lifeline(dist.HashStore(), 1, 2, patience=0.3)


def test_a_stranger_is_not_let_in() -> None:
    """Without the token of the run a connection is cut off, and what it says is not even parsed for long."""
    store, failures = dist.HashStore(), []

    def build() -> None:
        try:
            Lifeline(store, 0, 2, patience=2.0)
        except DistributedError as error:
            failures.append(str(error))

    hub = threading.Thread(target=build)
    hub.start()
    store.wait(["lifeline"], datetime.timedelta(seconds=30))
    place = json.loads(store.get("lifeline"))
    assert place["addresses"] == ["127.0.0.1"] and len(place["token"]) == 32
    for line in (
        b'{"token": "guess", "rank": 1}\n',
        b'{"rank": 1}\n',
        b'{"token": "\\ud800", "rank": 1}\n',
        b'{"token": "%s", "rank": [1]}\n' % place["token"].encode(),
        b'{"token": "%s", "rank": 1e999}\n' % place["token"].encode(),
        b"x" * 40_000,
        b"[1]\n",
        b'{"token": "%s", "rank": 7}\n' % place["token"].encode(),
        b"\x80\x04K\x01.\n",
    ):
        with socket.create_connection(("127.0.0.1", place["port"]), timeout=5) as sock:
            try:
                sock.sendall(line)
                assert sock.recv(100) == b"", line
            except ConnectionError:
                pass
    hub.join(30)
    assert "seconds for rank 1" in failures[0]


def test_messages_arrive_whole_in_any_pieces() -> None:
    left, right = (Wire(sock) for sock in socket.socketpair())
    left.send({"a": "x" * 100_000})
    left.send({"b": 1})
    received: list[Any] = []
    for _ in range(100):
        left.flush()
        received += right.receive()
        if received and received[-1] == {"b": 1}:
            break
    assert received == [{"a": "x" * 100_000}, {"b": 1}]
    left.send({"c": 2})
    left.send({"d": 3})
    assert right.ask(1.0) == {"c": 2} and right.ask(1.0) == {"d": 3} and right.ask(0.1) is None
    left.close()
    assert right.receive() == [] and right.ended and "without a goodbye" in right.gone


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


def test_a_writer_speaks_for_the_main_thread_only_while_that_waits_for_it() -> None:
    lifeline, ready, done = Lifeline(None, 0, 1), threading.Event(), list[bool]()
    lifeline.mark("update", 3)
    place, signs = lifeline._place, []

    def looping() -> None:
        lifeline.written()
        signs.append(place.signs)
        ready.set()
        while not done:
            time.sleep(0.01)

    for waits in (False, True):
        ready.clear()
        done.clear()
        writer = threading.Thread(target=looping, name="writer")
        with lifeline.awaiting(writer) if waits else contextlib.nullcontext():
            before = place.signs
            writer.start()
            assert ready.wait(10)
            lifeline.written()  # by another thread than the one that is waited for
            assert place.signs == signs[-1] == before + waits
            assert place.phase == ("save" if waits else "update")
            stack = record.main_stack(place.writer)
            assert ("which waits for the thread writer:\n" in stack) == waits
            assert (" looping: " in stack.split("\n")[-1]) == waits
            done.append(True)
            writer.join()
        assert place.writer is None and place.phase == "update"


def test_the_record_names_no_place_of_this_machine(tmp_path: Path) -> None:
    found = {"rank": 1, "what": f"OSError: {tmp_path}/secret/rows.bin is gone", "run": "a"}
    record.write(tmp_path, found, {0: record.main_stack(), 1: ""})
    text = (tmp_path / record.FILE).read_text()
    assert "rows.bin" in text and str(tmp_path) not in text and "secret" not in text
    assert "test_lifeline.py" in text and str(Path(__file__).parent) not in text
    record.write(tmp_path, found | {"what": "later"}, {})
    assert (tmp_path / record.FILE).read_text() == text  # the first one counts
    record.write(tmp_path, found | {"run": "b"}, {})
    assert json.loads((tmp_path / record.FILE).read_text())["run"] == "b"
