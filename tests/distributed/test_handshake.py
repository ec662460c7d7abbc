"""The handshake: who is missing or does not fit is named alike on all ranks; sums and links are tried."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed import store as board
from pretrain.distributed.handshake import (
    check_links,
    differences,
    fingerprint,
    first_mismatch,
    handshake,
    introduce,
    ranks,
    with_time_limit,
)
from pretrain.distributed.store import wait_for_all_ranks
from pretrain.errors import DistributedError


def hello(rank: int, **more: Any) -> dict[str, Any]:
    """An introduction as from a host of its own for every two ranks."""
    about = introduce(torch.device("cpu"), settings="aa", data="bb", model="cc")
    return about | {"host": f"node-{rank // 2}", "pid": 100 + rank} | more


def together(
    size: int,
    change: Callable[[int, dict[str, Any]], None] = lambda rank, one: None,
    **options: Any,
) -> list[Any]:
    """Result or error of every rank, each in a thread of its own; ``options["absent"]`` do not come."""
    store, found = dist.HashStore(), [None] * size  # type: list[Any]
    absent = options.pop("absent", ())
    folders = options.pop("folders", None)

    def run(rank: int) -> None:
        one = hello(rank)
        change(rank, one)
        if folders is not None:
            options_here = options | {"run_dir": folders[rank]}
        else:
            options_here = options
        try:
            found[rank] = handshake(store, rank, one.get("told size", size), one, **options_here)
        except DistributedError as error:
            found[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank,)) for rank in range(size) if rank not in absent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def refused(found: list[Any]) -> str:
    """The one text that all ranks raised."""
    texts = {str(one) for one in found if one is not None}
    assert len(texts) == 1 and all(isinstance(one, DistributedError) for one in found if one)
    return texts.pop()


def test_all_get_what_all_said(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    found = together(4, folders=[run_dir] * 4, timeout=10)
    assert all(one == found[0] for one in found) and len(found[0]) == 4
    assert [one["host"] for one in found[0]] == ["node-0", "node-0", "node-1", "node-1"]
    assert [one.get("sees") for one in found[0]] == [None, "yes", "yes", "yes"]
    assert set(found[0][1]["versions"]) == {"pretrain", "torch", "python"}
    assert not list(run_dir.iterdir())
    assert handshake(None, 0, 1, hello(0))[0]["size"] == 1


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("versions.torch", "2.0", ["versions.torch is '2.0' there", "same versions on all hosts"]),
        ("versions.pretrain", "0.0.1", ["versions.pretrain is '0.0.1'"]),
        ("device.type", "cuda", ["device.type is 'cuda' there, and 'cpu' on rank 0"]),
        ("settings", "ab", ["settings", "same configuration"]),
        ("data", "bc", ["data", "same prepared data"]),
        ("model", "cd", ["model", "same checkpoint"]),
        ("told size", 4, ["size is 4 there, and 3 on rank 0", "--nnodes"]),
    ],
)
def test_a_rank_that_does_not_fit_is_named_on_all(path: str, value: Any, words: list[str]) -> None:
    def change(rank: int, one: dict[str, Any]) -> None:
        if rank == 2:
            *outer, last = path.split(".")
            for key in outer:
                one = one[key]
            one[last] = value

    text = refused(together(3, change, timeout=5))
    assert text.startswith("Rank 2 (host node-1) does not match rank 0: ") and "host node-0" in text
    assert all(word in text for word in words), text


def test_settings_given_whole_name_the_key_that_differs() -> None:
    def change(rank: int, one: dict[str, Any]) -> None:
        one["settings"] = {"optim": {"lr": 1e-3 if rank else 1e-4, "name": "adamw"}}

    text = refused(together(3, change, timeout=5))
    assert "Ranks 1-2 (hosts node-0, node-1) do not match" in text
    assert "settings.optim.lr is 0.001 there, and 0.0001 on rank 0" in text


def test_missing_ranks_are_named_within_the_limit() -> None:
    began = time.monotonic()
    text = refused(together(5, absent=(1, 3, 4), timeout=0.5))
    assert time.monotonic() - began < 3
    assert text.startswith("Rank 1, 3-4 of 5 did not connect within 0.5 seconds")
    for word in ("firewall", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "--nnodes"):
        assert word in text
    text = refused(together(3, absent=(0,), timeout=0.3))
    assert text.startswith("Rank 0 of 3 did not connect")


def test_two_processes_of_one_rank_are_refused() -> None:
    store = dist.HashStore()
    store.add("came/1", 1)
    with pytest.raises(DistributedError, match=r"Two processes are rank 1 of 2.*node-0.*node-rank"):
        handshake(store, 1, 2, hello(1), timeout=1)
    with pytest.raises(DistributedError, match="did not connect"):
        handshake(store, 0, 2, hello(0), timeout=0.1)


def test_a_run_directory_of_its_own_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pretrain.utils.directories.GRACE", 0.3)
    folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    text = refused(together(3, folders=folders, timeout=5))
    assert text.startswith("Rank 2 (host node-1) does not see the run directory")
    assert str(folders[0]) in text and "file system that all hosts share" in text
    blocked = tmp_path / "file"
    blocked.write_text("")
    text = refused(together(2, folders=[blocked / "run"] * 2, timeout=5))
    assert "Rank 0 on host node-0 cannot write" in text


def test_two_ranks_on_one_gpu_are_refused() -> None:
    gpu = {"type": "cuda", "name": "H200", "index": 0, "uuid": "GPU-1"}
    everybody = [
        hello(0, device=gpu | {"uuid": "GPU-0"}),
        hello(1, device=gpu),
        hello(2, device=gpu),
    ]
    text = first_mismatch(everybody, "runs/x")
    assert text.startswith("Ranks 1-2 on host node-0 share one GPU, cuda:0 (H200)")
    assert "--nproc-per-node" in text
    own = [hello(rank, device=gpu | {"uuid": f"GPU-{rank}"}) for rank in range(3)]
    assert first_mismatch(own, "runs/x") == ""
    for one in own:
        one["device"]["uuid"] = ""  # an older torch: host and index must do
    assert first_mismatch(own, "runs/x").startswith("Ranks 0-1 on host node-0")


def test_what_may_differ_is_a_note() -> None:
    everybody = [hello(rank, threads=4 if rank == 3 else 8) for rank in range(5)]
    assert first_mismatch(everybody, "") == ""
    notes = differences(everybody)
    assert len(notes) == 1 and "8 on rank 0-2, 4; 4 on rank 3" in notes[0]
    assert ranks([5, 1, 2, 3, 9]) == "1-3, 5, 9" and ranks([]) == ""


def test_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2}) and len(fingerprint(None)) == 16


# ------------------------------------------------------------------------------------------ links


def times(size: int) -> Callable[[Tensor], None]:
    """An all-reduce as rank 0 of ``size`` sees it when the others have the shares that they should."""

    def add(tensor: Tensor) -> None:
        tensor.mul_(sum(other % 8 + 1 for other in range(size)))

    return add


def test_links_are_measured() -> None:
    found = check_links(times(3), torch.device("cpu"), 0, 3, timeout=20)
    assert set(found) == {"bus_gb_s", "megabytes", "latency_us"}
    assert found["bus_gb_s"] > 0 and found["megabytes"] == 16 and found["latency_us"] > 0


def test_all_ranks_measure_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """On slow links, where the clock of each rank says something else: all must sum tensors of one shape each time."""
    clock, meeting = threading.local(), threading.Barrier(2)
    shares: list[Tensor] = [torch.empty(0)] * 2
    failures: list[BaseException] = []

    def perf_counter() -> float:
        clock.now += clock.step
        return float(clock.now)

    def measure(rank: int) -> None:
        def all_reduce(tensor: Tensor) -> None:
            shares[rank] = tensor
            meeting.wait(20)
            assert shares[0].shape == shares[1].shape
            total = shares[0] + shares[1]
            meeting.wait(20)
            tensor.copy_(total)

        clock.now, clock.step = 0.0, (0.09, 0.13)[rank]
        try:
            check_links(all_reduce, torch.device("cpu"), rank, 2)
        except BaseException as error:
            failures.append(error)
            meeting.abort()

    # Without the thread of a time limit, which has no clock.
    monkeypatch.setattr("pretrain.distributed.handshake.with_time_limit", lambda run, *_: run())
    own_time = SimpleNamespace(perf_counter=perf_counter)
    monkeypatch.setattr("pretrain.distributed.handshake.time", own_time)
    threads = [threading.Thread(target=measure, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_wrong_sum_a_failure_and_a_hang_name_the_rank() -> None:
    def wrong(tensor: Tensor) -> None:
        times(2)(tensor)
        tensor.flatten()[-1:] += 1

    def broken(tensor: Tensor) -> None:
        raise RuntimeError("connection reset by peer")

    released = threading.Event()
    cpu = torch.device("cpu")
    with pytest.raises(DistributedError, match=r"wrong sum on rank 0 of 2 .*number 4098"):
        check_links(wrong, cpu, 0, 2)
    with pytest.raises(DistributedError, match=r"on rank 1 of 2 .*failed: connection reset"):
        check_links(broken, cpu, 1, 2)
    began = time.monotonic()
    with pytest.raises(DistributedError, match=r"on rank 1 of 2 .*did not come back within 0\.2"):
        check_links(lambda tensor: released.wait(10) and None, cpu, 1, 2, timeout=0.2)
    released.set()
    assert time.monotonic() - began < 5


def test_a_host_that_only_finds_itself_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a host's own name the address 127.0.1.1; gloo tells the others to look there."""

    def fails() -> None:
        raise RuntimeError("connect timed out")

    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for here, told in (("2", True), ("4", False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        with pytest.raises(DistributedError, match="connect timed out") as caught:
            with_time_limit(fails, "The connection", torch.device("cpu"), 5)
        assert ("node7, to 127.0.1.1" in str(caught.value)) == told


def test_who_prepares_for_long_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store, said, done = dist.HashStore(), [], threading.Event()  # type: ignore[attr-defined]
    monkeypatch.setattr(board, "_PATIENT", 0.2)

    def first() -> None:
        wait_for_all_ranks(store, 0, 3, say=said.append)
        done.set()

    threading.Thread(target=first, daemon=True).start()
    threading.Thread(
        target=wait_for_all_ranks, args=(store, 2, 3, said.append), daemon=True
    ).start()
    time.sleep(0.7)
    assert not done.is_set() and said and all("rank 1," in line for line in said[1:]), said
    wait_for_all_ranks(store, 1, 3, say=said.append)
    assert done.wait(5)
