"""A save is killed at, or refused by, every single system call it makes; then the power is cut at every moment."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults.faulty_io import Disk, FaultyIO, NetworkIO, RecordingIO
from pretrain.checkpoint import (
    RunLock,
    TrainingState,
    latest,
    load,
    read_training,
    save_checkpoint,
    save_model,
    verify,
)
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import CheckpointError
from pretrain.models import build
from pretrain.utils import files


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    tokenizer = train_from_texts(["abc"], "char")
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_positions": 8}
    return build("gpt2", tokenizer=tokenizer, **sizes)


def save(model, run: Path, step: int, keep: int = 1) -> Path:
    training = TrainingState(
        {"optimizer": {"exp_avg/w": torch.full((3,), float(step))}}, {"step": step}
    )
    return save_checkpoint(
        run, model, step=step, tokens=step, pretrain_block={}, training=training, keep=keep
    )


def step_of(path: Path | None) -> int:
    return -1 if path is None else int(path.name.rpartition("-")[2])


def fork(action: Callable[[], None], io: files.FileIO) -> bool:
    """Run `action` in a child with another IO; True if it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            files.IO = io
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def calls_of(action: Callable[[], None], monkeypatch) -> list[tuple[str, str]]:
    io = FaultyIO()
    with monkeypatch.context() as patch:
        patch.setattr(files, "IO", io)
        action()
    return io.calls


def killings(calls):
    """(number of the call, how): before and after each call, and in the middle of each write.

    What lies on the disk after a call lies there before the next one, so "after" is tried for the last alone.
    """
    for number, (name, _) in enumerate(calls):
        yield number, "before"
        if name == "write":
            yield number, "torn"
    yield len(calls) - 1, "after"


@pytest.mark.parametrize(
    ("base", "new"),
    [
        pytest.param((1, 2), 3, id="next-step"),
        pytest.param((1, 2), 2, id="same-step-again", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_call_of_save_and_rotate(model, tmp_path, monkeypatch, base, new, capfd):
    for step in base:
        save(model, tmp_path / "base", step, keep=2)
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    calls = calls_of(lambda: save(model, tmp_path / "dry", new), monkeypatch)
    assert {"open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir"} == {
        name for name, _ in calls
    }
    unfinished = 0
    for number, how in killings(calls):
        run = tmp_path / f"{number}-{how}"
        shutil.copytree(tmp_path / "base", run)
        ended = fork(lambda run=run: save(model, run, new), FaultyIO(number, how))
        assert not ended
        found = latest(run)
        assert step_of(found) >= 2, (number, how, calls[number])
        assert read_training(found, quiet=True).state["step"] == step_of(found)
        unfinished += step_of(found) < new
        with RunLock(run):  # the next start sweeps the litter and finds the same
            assert step_of(latest(run)) == step_of(found)
            left = {name for name in os.listdir(run) if not re.fullmatch(r"checkpoint-\d", name)}
            assert left == {"run.lock"}, (number, how)
        shutil.rmtree(run)
    assert "broken" not in capfd.readouterr().err, (
        "no kill may leave a broken directory under a checkpoint's name"
    )
    assert unfinished > len(calls) / 2 or new in base


def test_killed_while_a_model_directory_is_replaced(model, tmp_path, monkeypatch):
    save_model(model, tmp_path / "base" / "m")
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    calls = calls_of(lambda: save_model(model, tmp_path / "dry" / "m"), monkeypatch)
    for number, how in killings(calls):
        place = tmp_path / "trial"
        shutil.copytree(tmp_path / "base", place)
        assert not fork(lambda place=place: save_model(model, place / "m"), FaultyIO(number, how))
        load(place / "m", quiet=True)
        if number % 7 == 0:
            save_model(model, place / "m")
            assert os.listdir(place) == ["m"], "the next save sweeps what the killed one left"
        shutil.rmtree(place)


@pytest.mark.parametrize(
    "code", ["ENOSPC", *(pytest.param(code, marks=pytest.mark.slow) for code in ("EIO", "EACCES"))]
)
def test_every_call_may_fail(model, tmp_path, monkeypatch, capfd, code):
    """Before the new checkpoint is durable that is an error; what then cannot be deleted is named and stays."""
    for step in (1, 2):
        save(model, tmp_path / "base", step, keep=2)
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    calls = calls_of(lambda: save(model, tmp_path / "dry", 3), monkeypatch)
    rotation = next(i for i, (_, path) in enumerate(calls) if ".pretrain-gone-" in path)
    assert {name for name, _ in calls[rotation:]} == {"rename", "unlink", "rmdir"}
    before = {
        p.relative_to(tmp_path / "base"): p.read_bytes()
        for p in (tmp_path / "base").rglob("*")
        if p.is_file()
    }
    for number in range(len(calls)):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "base", run)
        with monkeypatch.context() as patch:
            patch.setattr(files, "IO", FaultyIO(number, code))
            if number < rotation:
                with pytest.raises(CheckpointError) as caught:
                    save(model, run, 3)
                said = str(caught.value)
            else:
                save(model, run, 3)
                said = capfd.readouterr().err
                assert len(said.splitlines()) == 1 and "cannot be removed" in said
        found = latest(run)
        assert step_of(found) >= (2 if number < rotation else 3)
        if (
            step_of(found) == 2
        ):  # failed before the new one was durable: the old ones are byte-identical
            assert {
                p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()
            } == before
        assert str(run) in said
        save(model, run, 3)
        assert os.listdir(run) == ["checkpoint-3"], "a healthy save afterwards leaves no litter"
        shutil.rmtree(run)


@pytest.mark.parametrize("held", ["model.safetensors", "state.json"])
def test_a_checkpoint_that_somebody_reads_may_be_rotated_out(
    model, tmp_path, monkeypatch, capfd, held
):
    """Neither this save nor the next one nor the next start fails, and it goes once it is closed."""
    disk = NetworkIO({held})
    monkeypatch.setattr(files, "IO", disk)
    save(model, tmp_path, 1)
    assert not capfd.readouterr().err
    save(model, tmp_path, 2)
    said = capfd.readouterr().err
    assert re.fullmatch(r".*gone-.*-checkpoint-1 cannot be removed: Directory not empty.*\n", said)
    left = [str(p) for p in tmp_path.rglob("*") if p.is_file() and "checkpoint-2" not in str(p)]
    assert len(left) == 1 and left[0].endswith(".nfs0001"), "only what is open takes space"
    save(model, tmp_path, 3)
    with RunLock(tmp_path):
        assert step_of(latest(tmp_path)) == 3
    assert "checkpoint-1" not in capfd.readouterr().err, "it was named once"
    disk.held.clear()
    save(model, tmp_path, 4)
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_a_model_directory_that_somebody_reads_may_be_replaced(model, tmp_path, monkeypatch, capfd):
    save_model(model, tmp_path / "m")
    disk = NetworkIO({"model.safetensors"})
    monkeypatch.setattr(files, "IO", disk)
    save_model(model, tmp_path / "m")
    assert "cannot be removed" in capfd.readouterr().err
    verify(tmp_path / "m")
    disk.held.clear()
    save_model(model, tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


def test_disk_full_keeps_previous(model, tmp_path, monkeypatch):
    """The message says where, how much was needed and how much is free; real and announced lack of space."""
    run = tmp_path / "run"
    save(model, run, 1)
    calls = calls_of(lambda: save(model, tmp_path / "dry", 2), monkeypatch)
    io = FaultyIO(next(i for i, (name, _) in enumerate(calls) if name == "write") + 3, "ENOSPC")
    with monkeypatch.context() as patch:
        patch.setattr(files, "IO", io)
        with pytest.raises(
            CheckpointError,
            match=r"checkpoint-2 needs at least [\d,]+ bytes, [\d,]+ bytes are free",
        ):
            save(model, run, 2)
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda path: 1000)
        with pytest.raises(
            CheckpointError, match=r"needs at least [\d,]+ bytes, 1,000 bytes are free"
        ):
            save(model, run, 2)
    assert os.listdir(run) == ["checkpoint-1"]
    verify(run / "checkpoint-1")


def on_small_disk(place: Path, action: Callable[[], None]) -> str | None:
    """Run `action` with a real disk of 1.5 MB at `place`, in a mount namespace that dies with the child.

    Returns the traceback, empty if all went well, or None where the system does not allow it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            new_namespace, private = 0x20000, (1 << 18) | (1 << 14)
            name = str(place).encode()
            if (
                libc.unshare(new_namespace)
                or libc.mount(b"none", b"/", None, private, None)
                or libc.mount(b"tmpfs", name, b"tmpfs", 0, b"size=1500k")
            ):
                os._exit(77)
            action()
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    return None if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77 else said


def test_a_disk_that_is_really_full(model, tmp_path):
    def fill_it():
        save(model, tmp_path / "run", 1)
        (tmp_path / "ballast").write_bytes(b"x" * (files.free_bytes(tmp_path) - 20_000))
        with pytest.raises(CheckpointError, match="disk is full"):
            save(model, tmp_path / "run", 2)
        files.free_bytes = lambda path: 1 << 40  # the estimate was wrong: the writing itself fails
        with pytest.raises(CheckpointError, match="disk is full"):
            save(model, tmp_path / "run", 2)
        assert os.listdir(tmp_path / "run") == ["checkpoint-1"]
        verify(tmp_path / "run" / "checkpoint-1")

    said = on_small_disk(tmp_path, fill_it)
    if said is None:
        pytest.skip("no right to mount a small disk")
    assert not said, said


# ------------------------------------------------------------------------------------------------ power cuts


def recorded(model, root: Path, steps, keep=1) -> tuple[list[tuple], list[tuple[int, int]]]:
    """Log of the calls of several saves into `root/run`, and (log length, acknowledged step)."""
    io, acknowledged = RecordingIO(), []
    before, files.IO = files.IO, io
    try:
        for step in steps:
            save(model, root / "run", step, keep)
            acknowledged.append((len(io.log), step))
    finally:
        files.IO = before
    return io.log, acknowledged


def losses(log, acknowledged, root: Path, scratch: Path, *, draws: int, start: int = 0):
    """Yield the moments after which a power cut loses an acknowledged checkpoint."""
    disk, rng = Disk(root), random.Random(0)
    # nothing unflushed survives, all of it, names without contents (a journal of metadata alone), any part
    choices = [lambda n: 0, lambda n: n, lambda n: n if n < 100 else 0]
    choices += [lambda n: rng.randint(0, n)] * draws
    for moment in range(len(log) + 1):
        due = max((step for length, step in acknowledged if length <= moment), default=-1)
        for choose in choices if moment >= start else ():
            disk.after_power_cut(scratch, choose)
            newest = latest(scratch / "run")
            try:
                verify(newest or scratch)  # all of it, the model card as well
                found = step_of(newest)
            except CheckpointError:
                found = -1
            shutil.rmtree(scratch)
            if found < due:
                yield moment, found, due
        if moment < len(log):
            disk.replay(log[moment])


@pytest.fixture
def plain(model):
    model_without = build(
        "gpt2", num_layers=1, hidden_size=8, num_heads=1, max_positions=8, vocab_size=9
    )
    assert model_without.tokenizer is None  # its library writes past the recording
    return model_without


@pytest.mark.parametrize("steps", [(1, 2), (1, 1)], ids=["two-steps", "same-step-twice"])
def test_power_cut_at_every_moment(plain, tmp_path, steps, capfd):
    (tmp_path / "root").mkdir()
    log, acknowledged = recorded(plain, tmp_path / "root", steps)
    assert list(losses(log, acknowledged, tmp_path / "root", tmp_path / "scratch", draws=3)) == []


def test_every_fsync_is_needed(plain, tmp_path, capfd):
    """The test above has teeth: without any single one of the flushes it finds a lost checkpoint."""
    (tmp_path / "root").mkdir()
    log, acknowledged = recorded(plain, tmp_path / "root", (1, 2))
    flushes = [i for i, entry in enumerate(log) if entry[0] == "fsync"]
    assert len(flushes) > 15
    for index in flushes:
        shorter = log[:index] + log[index + 1 :]
        shifted = [(length - (length > index), step) for length, step in acknowledged]
        lost = losses(
            shorter, shifted, tmp_path / "root", tmp_path / "scratch", draws=1, start=index
        )
        assert next(lost, None), log[index]
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
