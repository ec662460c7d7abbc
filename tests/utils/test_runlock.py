"""Two runs never share a directory, and a dead one never blocks it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time

import pytest

from pretrain.errors import CheckpointError, RunLocked
from pretrain.utils.runlock import RunLock, is_held


def holder(run):
    """A child that holds the lock until it is killed; returns its pid once it has it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        RunLock(run).acquire()
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    return child


def test_two_runs_in_one_directory(tmp_path):
    child = holder(tmp_path / "run")
    began = time.monotonic()
    with pytest.raises(RunLocked) as caught:
        RunLock(tmp_path / "run").acquire()
    assert time.monotonic() - began < 2
    assert caught.value.pid == child
    assert caught.value.host == socket.gethostname()
    assert re.match(r"\d{4}-\d\d-\d\dT", caught.value.since)
    assert str(child) in str(caught.value)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunLock(tmp_path / "run"):  # the system gave it back; nothing is stale
        assert is_held(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []
    assert not is_held(tmp_path / "run")


def test_lock_twice_in_one_process(tmp_path):
    with RunLock(tmp_path) as lock:
        assert lock.acquire() is lock
        with pytest.raises(RunLocked) as caught:
            RunLock(tmp_path).acquire()
        assert caught.value.pid == os.getpid()
    with RunLock(tmp_path):
        pass


def test_a_forked_child_neither_holds_nor_breaks_the_lock(tmp_path):
    with RunLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            held = is_held(tmp_path)
            lock.release()
            os._exit(held)
        assert os.waitpid(child, 0)[1] == 0
        assert is_held(tmp_path)
        with pytest.raises(RunLocked):
            RunLock(tmp_path).acquire()


def test_many_contenders_one_at_a_time(tmp_path):
    """Take and release from several processes at once: never two holders, although the file comes and goes."""
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code, done = 0, 0
            while done < 25:
                try:
                    with RunLock(tmp_path):
                        inside = os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL)
                        os.close(inside)
                        os.unlink(tmp_path / "inside")
                        done += 1
                except RunLocked:
                    pass
                except FileExistsError:
                    code = 3
                    break
            os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert os.listdir(tmp_path) == []


def test_a_holder_may_remove_the_directory_with_the_lock(tmp_path):
    """As a run that fails before it begins does; the next one makes it anew."""
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            done, end = 0, time.monotonic() + 20
            while done < 50 and time.monotonic() < end:
                with contextlib.suppress(RunLocked):
                    with RunLock(tmp_path / "run"):
                        done += 1
                    with contextlib.suppress(OSError):
                        os.rmdir(tmp_path / "run")
            os._exit(done < 50)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3


def test_the_lock_sweeps_what_a_killed_save_left(tmp_path):
    (tmp_path / f".pretrain-new-{os.getppid()}-0123abcd-checkpoint-3").mkdir()
    with RunLock(tmp_path):
        assert os.listdir(tmp_path) == ["run.lock"]


def test_lock_says_what_it_cannot_do(tmp_path, monkeypatch, capfd):
    def refuse(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("pretrain.utils.runlock.fcntl.flock", refuse)
    with RunLock(tmp_path):
        assert "cannot lock" in capfd.readouterr().err
    monkeypatch.undo()
    os.symlink("elsewhere", tmp_path / "run.lock")
    with pytest.raises(
        CheckpointError, match=r"run.lock is a symbolic link to elsewhere.*remove it"
    ):
        RunLock(tmp_path).acquire()
    assert not (tmp_path / "elsewhere").exists()
    for make, kind in ((os.mkdir, "a directory"), (os.mkfifo, "a special file")):
        (tmp_path / kind).mkdir()
        make(tmp_path / kind / "run.lock")
        with pytest.raises(CheckpointError, match=f"run.lock is {kind}.*move it away"):
            RunLock(tmp_path / kind).acquire()
