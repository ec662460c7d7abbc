"""Saving in the background: what is on the disk is what was in memory when `save` was called, and failures are told."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from checkpoint.test_sharded_saving import contents, layout_of, part_of, tiny, training
from checkpoint.threads import Room, ThreadPeers, at, attempt_all, cut_model, on_all
from faults.faulty_io import FaultyIO
from pretrain.checkpoint import (
    RunLock,
    Saver,
    TrainingState,
    latest,
    load,
    read_training,
    save_checkpoint,
    saving,
)
from pretrain.checkpoint.draft import draft_of
from pretrain.checkpoint.saving import Staging, gathered
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import CheckpointError
from pretrain.models import build
from pretrain.utils import directories, files


class Gate(files.FileIO):
    """Holds every write until it is opened: the disk is slow while training goes on. It shuts behind `last`."""

    last = ""

    def __init__(self) -> None:
        self.open_now, self.reached = threading.Event(), threading.Event()

    def write(self, descriptor, data):
        self.reached.set()
        assert self.open_now.wait(30)
        return super().write(descriptor, data)

    def rename(self, source, target):
        super().rename(source, target)
        if target.name == self.last:
            self.open_now.clear()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(files, "IO", gate)
    yield gate
    gate.open_now.set()


def save(saver, model, step=1, **options):
    return saver.save(
        model,
        step=step,
        tokens=step,
        pretrain_block={"objective": "X"},
        training=training(model),
        **options,
    )


def plainly(run, model, step=1):
    return save_checkpoint(
        run, model, step=step, tokens=step, pretrain_block={"objective": "X"},
        training=training(model),
    )  # fmt: skip


def change(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2).add_(1)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_bytes_are_those_of_a_plain_save(family, in_background, tmp_path):
    model = build(family, tokenizer=train_from_texts(["a quick fox"], "char"), hidden_size=8)
    expected = contents(plainly(tmp_path / "plain", model))
    with Saver(tmp_path / "run", background=in_background) as saver:
        path = save(saver, model)
        assert path == tmp_path / "run" / "checkpoint-1"
        saver.wait()
        assert saver.durable == path and not saver.busy
        assert 0 < saver.stall <= saver.seconds
        assert contents(path) == expected


def test_later_changes_never_reach_the_files(tmp_path, gate):
    """pytorch#144657: weights, moments and everything else that changes in place after `save` has returned."""
    model = tiny()
    state = training(model)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {key: t.clone() for key, t in state.tensors["optimizer"].items()}
    saver = Saver(tmp_path, background=True)
    path = saver.save(model, step=1, tokens=0, pretrain_block={"note": "then"}, training=state)
    assert gate.reached.wait(10) and saver.busy
    assert latest(tmp_path) is None
    change(model)
    for group in state.tensors.values():
        for tensor in group.values():
            tensor.add_(1)
    state.state["step"] = 99
    model.extra_config["later"] = True
    gate.open_now.set()
    saver.close()
    found = load(path, quiet=True)
    assert all(torch.equal(p, wanted[name]) for name, p in found.named_parameters())
    assert "later" not in found.extra_config
    read = read_training(path)
    assert read.state["step"] == 3
    assert all(torch.equal(t, moments[key]) for key, t in read.tensors["optimizer"].items())


def test_one_save_at_a_time(tmp_path, gate):
    model = tiny()
    saver = Saver(tmp_path, background=True)
    save(saver, model, 1)
    assert gate.reached.wait(10)
    gate.last = "checkpoint-1"  # a fast disk would have the second before it is looked at
    release = threading.Timer(0.5, gate.open_now.set)
    release.start()
    began = time.monotonic()
    change(model)
    save(saver, model, 2, keep=1)
    assert time.monotonic() - began > 0.3, "it waited for the one before"
    assert saver.durable == tmp_path / "checkpoint-1"
    gate.open_now.set()
    saver.close()
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    expected = contents(plainly(tmp_path / "plain", model, 2))
    assert contents(tmp_path / "checkpoint-2") == expected


def test_the_memory_of_the_copies_is_used_again(tmp_path):
    model = tiny()
    with Saver(tmp_path, background=True) as saver:
        save(saver, model, 1)
        saver.wait()
        place = saver._staging._block.data_ptr()
        change(model)
        save(saver, model, 2)
        assert saver._staging._block.data_ptr() == place
    assert saver._staging._block.numel() == 0
    assert contents(tmp_path / "checkpoint-2") == contents(plainly(tmp_path / "p", model, 2))


def test_staging_copies_every_kind_of_tensor():
    staging = Staging()
    tensors = [
        torch.randn(3, 5).T,
        torch.tensor(7.0),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.randn(3).to(torch.bfloat16),
        torch.tensor([2**60 + 1]),
        torch.randn(4, requires_grad=True),
    ]
    for _ in range(2):
        for copy, tensor in zip(staging.allocate(tensors, pin=False), tensors, strict=True):
            with torch.no_grad():
                copy.copy_(tensor)
            assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
            assert copy.is_contiguous() and not copy.requires_grad
            assert copy.data_ptr() % copy.element_size() == 0


def test_each_tensor_is_copied_by_one_process_alone(monkeypatch):
    """Where all processes hold everything (DDP), each copies what it will write, and no more."""
    monkeypatch.setattr("pretrain.checkpoint.draft.SMALLEST_SHARE", 1000)
    model = tiny()
    layout = layout_of(model, 4, 1, 1)
    state = training(model)

    def work(peers):
        draft = draft_of(
            model,
            step=1,
            block={},
            training=state,
            max_shard_bytes=10**9,
            layout=at(layout, peers.rank),
            peers=peers,
        )
        draft = gathered(draft, peers)
        return list(draft.parts)

    shares = on_all(4, work)
    together = [key for share in shares for key in share]
    wanted = [*dict(model.named_parameters()), *state.by_key()]
    assert sorted(together) == sorted(wanted)
    assert all(shares)


# ------------------------------------------------------------------------------------------------ failures


def test_a_failure_is_raised_at_the_next_step_and_once(tmp_path, monkeypatch):
    model = tiny()
    saver = Saver(tmp_path, background=True)
    save(saver, model, 1)
    saver.wait()
    before = contents(tmp_path / "checkpoint-1")
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda path: 1000)
        save(saver, model, 2)
        while saver.busy:
            time.sleep(0.01)
    assert saver.failed
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 needs at least [\d,]+ bytes, 1,000 bytes"
    ):
        saver.poll()
    assert not saver.failed
    saver.poll()
    saver.wait()
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert contents(tmp_path / "checkpoint-1") == before
    save(saver, model, 3)
    saver.close()
    assert latest(tmp_path).name == "checkpoint-3"


def test_a_failure_is_not_lost_by_the_next_save_or_at_the_end(tmp_path, monkeypatch):
    model = tiny()
    for end in ("save", "wait", "close"):
        saver = Saver(tmp_path / end, background=True)
        with monkeypatch.context() as patch:
            patch.setattr(files, "IO", FaultyIO(9, "EIO"))
            save(saver, model, 1)
            while saver.busy:
                time.sleep(0.01)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(saver, model, 2) if end == "save" else getattr(saver, end)()


def test_an_error_on_its_way_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)

    def run(error):
        with Saver(tmp_path, background=True) as saver:
            save(saver, tiny(), 1)
            if error:
                raise error

    with pytest.raises(KeyError):
        run(KeyError())
    assert "1,000 bytes are free" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match="1,000 bytes"):
        run(None)


def test_what_is_wrong_with_the_model_itself(tmp_path):
    model = tiny()
    saver = Saver(tmp_path, background=True)
    with pytest.raises(CheckpointError, match="keep is 0"):
        save(saver, model, keep=0)
    with torch.no_grad():
        model.backbone.final_norm.weight[0] = float("inf")
    save(saver, model, 1)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        saver.wait()
    saver.save(
        tiny(), step=1, tokens=0, pretrain_block={}, training=TrainingState({}, {"a": {1: 2}})
    )
    with pytest.raises(CheckpointError, match="must be a text"):
        saver.wait()
    assert list(tmp_path.iterdir()) == []


def test_small_files_are_flushed_while_the_large_ones_are_written(tmp_path, monkeypatch):
    began, write_large, write_small = threading.Event(), saving.write_tensors, files.write_file

    def begin(*arguments, **options):
        began.set()
        return write_large(*arguments, **options)

    def wait(*arguments):
        assert began.wait(30)
        return write_small(*arguments)

    monkeypatch.setattr(saving, "_LARGE", 0)
    monkeypatch.setattr(saving, "write_tensors", begin)
    monkeypatch.setattr(files, "write_file", wait)
    path = save_checkpoint(tmp_path, tiny(), step=1, tokens=0, pretrain_block={})
    assert latest(tmp_path) == path


def test_an_error_in_a_small_file_begins_no_other_large_one(tmp_path, monkeypatch):
    begun, write_large = [], saving.write_tensors
    failed = threading.Event()

    def slowly(path, *arguments, **options):
        begun.append(path)
        assert failed.wait(30)
        return write_large(path, *arguments, **options)

    def fail(*arguments):
        while len(begun) < saving._AT_ONCE:
            time.sleep(0.001)
        threading.Timer(0.2, failed.set).start()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(saving, "_LARGE", 0)
    monkeypatch.setattr(saving, "write_tensors", slowly)
    monkeypatch.setattr(files, "write_file", fail)
    with pytest.raises(CheckpointError):
        saving.save_model(tiny(), tmp_path / "m", max_shard_bytes=1)
    assert len(begun) == saving._AT_ONCE
    assert list(tmp_path.iterdir()) == []


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize("kind", [ZeroDivisionError, Panic])
def test_a_bug_in_the_background_is_a_checkpoint_error_with_its_cause(kind, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise kind("oh")

    monkeypatch.setattr(saving, "write_tensors", broken)
    saver = Saver(tmp_path, background=True)
    save(saver, tiny(), 1)
    with pytest.raises(CheckpointError, match=f"{kind.__name__}: oh") as caught:
        saver.wait()
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("in_background", [False, True])
def test_several_processes(in_background, tmp_path):
    model = tiny()
    layout = layout_of(model, 1, 2, 1)
    expected = contents(plainly(tmp_path / "plain", model))

    def work(peers):
        part = cut_model(model, layout, peers.rank)
        mine = at(layout, peers.rank)
        state = part_of(training(model), layout, peers.rank)
        with Saver(tmp_path / "run", background=in_background, layout=mine, peers=peers) as saver:
            saver.save(part, step=1, tokens=1, pretrain_block={"objective": "X"}, training=state)
            change(part)

    on_all(2, work)
    assert contents(tmp_path / "run" / "checkpoint-1") == expected


@pytest.mark.parametrize("late", [0.5, 1000.0])
def test_a_new_directory_is_seen_late_or_never_by_another_host(late, tmp_path, monkeypatch):
    """As on a network file system, which caches that a name is absent."""
    monkeypatch.setattr(directories, "GRACE", directories.GRACE if late < 1 else 0.3)
    asked, exists = [], Path.exists

    def stale(path):
        if threading.current_thread().name == "process 1" and ".pretrain-new-" in path.name:
            asked.append(time.monotonic())
            if asked[-1] < asked[0] + late:
                return False
        return exists(path)

    monkeypatch.setattr(Path, "exists", stale)
    model = tiny()
    layout = layout_of(model, 1, 2, 1)

    def work(peers):
        threading.current_thread().name = f"process {peers.rank}"
        with Saver(tmp_path, layout=at(layout, peers.rank), peers=peers) as saver:
            part = cut_model(model, layout, peers.rank)
            saver.save(part, step=1, tokens=1, pretrain_block={})

    results = attempt_all(2, work)
    if late < 1:
        assert results == [None, None] and latest(tmp_path).name == "checkpoint-1"
    else:
        assert all("must lie on a file system that all hosts share" in str(r) for r in results)
        assert os.listdir(tmp_path) == []


def test_a_failure_of_one_process_is_told_to_all(tmp_path):
    model = tiny()
    layout = layout_of(model, 1, 3, 1)

    def work(peers):
        part = cut_model(model, layout, peers.rank)
        state = {"step": 1, "odd": {1: 2}} if peers.rank == 1 else {"step": 1}
        saver = Saver(tmp_path, background=True, layout=at(layout, peers.rank), peers=peers)
        saver.save(part, step=1, tokens=1, pretrain_block={}, training=TrainingState({}, state))
        saver.wait()

    results = attempt_all(3, work)
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "must be a text" in str(result) and "(process 1 of 3)" in str(result)


def test_peers_that_go_away_leave_no_litter(tmp_path):
    """What the peers raise reaches the caller, and the temporary directory is gone."""
    model = tiny()
    layout = layout_of(model, 1, 2, 1)

    class Gone(ThreadPeers):
        def gather(self, shards, owners, ranks):
            raise RuntimeError("Connection closed by peer")

    peers = Gone(Room(2), 0)
    peers.all_gather_object = lambda value, progress=True: [value, value]
    saver = Saver(tmp_path, background=True, layout=at(layout, 0), peers=peers)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        saver.save(cut_model(model, layout, 0), step=1, tokens=1, pretrain_block={})
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------ the end of a process


class Slow(files.FileIO):
    """A slow disk."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def write(self, descriptor, data):
        time.sleep(self.seconds)
        return super().write(descriptor, data)


def in_child(action) -> tuple[int, int]:
    """Fork; the child says that it is saving and goes on. Returns its id and the end of a pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action(lambda: os.write(writer, b"s"))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    return child, reader


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.3, 0.5, 0.8])
def test_kill_9_during_a_save_leaves_the_previous_checkpoint(delay, tmp_path):
    def run(say):
        model, saver = tiny(), Saver(tmp_path, background=True)
        save(saver, model, 1, keep=1)
        saver.wait()
        files.IO = Slow(0.03)
        save(saver, model, 2, keep=1)
        say()
        time.sleep(60)

    child, reader = in_child(run)
    assert os.read(reader, 1) == b"s"
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    found = latest(tmp_path)
    assert found is not None and found.name in ("checkpoint-1", "checkpoint-2")
    assert read_training(found).state["step"] == 3
    with RunLock(tmp_path):
        left = set(os.listdir(tmp_path)) - {"run.lock"}
        assert left <= {"checkpoint-1", "checkpoint-2"} and found.name in left


def test_a_process_that_ends_at_once_leaves_litter_that_is_swept(tmp_path):
    def run(say):
        model, saver = tiny(), Saver(tmp_path, background=True)
        save(saver, model, 1)
        saver.wait()
        files.IO = Slow(0.2)
        save(saver, model, 2)
        while len(os.listdir(tmp_path)) < 2:
            time.sleep(0.01)

    child, reader = in_child(run)
    assert os.waitpid(child, 0)[1] == 0
    os.close(reader)
    assert latest(tmp_path).name == "checkpoint-1"
    assert len(os.listdir(tmp_path)) == 2
    with Saver(tmp_path, background=True) as saver:
        save(saver, tiny(), 5)
    assert set(os.listdir(tmp_path)) == {"checkpoint-1", "checkpoint-5"}


SCRIPT = """
import time
from pretrain.checkpoint import Saver
from pretrain.models import build
from pretrain.utils import files
class Slow(files.FileIO):
    def write(self, descriptor, data):
        time.sleep(0.03)
        return super().write(descriptor, data)
files.IO = Slow()
model = build("gpt2", vocab_size=9, hidden_size=8)
Saver({run!r}, background=True).save(model, step=2, tokens=0, pretrain_block={{}})
"""


def test_an_interpreter_that_ends_without_waiting_finishes_the_save(tmp_path):
    script = SCRIPT.format(run=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert latest(tmp_path).name == "checkpoint-2"
