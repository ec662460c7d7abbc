"""Directories that appear whole, the sweeping of litter, and what is refused at the start."""

from __future__ import annotations

import math
import os
import stat

import pytest

from faults.faulty_io import FaultyIO
from pretrain.errors import CheckpointError
from pretrain.utils import directories, files
from pretrain.utils.directories import (
    check_writable,
    discard,
    moved_aside,
    publish,
    sweep,
    temporary_directory,
)
from pretrain.utils.files import write_file


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_publish_new_and_over_an_old_one(tmp_path):
    for content in (b"one", b"two"):
        with temporary_directory(tmp_path / "t") as temporary:
            write_file(temporary / "f", content)
            publish(temporary, tmp_path / "t")
        assert tree(tmp_path) == {"t/f": content}


def test_what_is_not_published_is_removed(tmp_path):
    def interrupted():
        with temporary_directory(tmp_path / "t") as temporary:
            write_file(temporary / "f", b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_discard_removes_links_and_not_what_they_point_to(tmp_path):
    (tmp_path / "t" / "inner").mkdir(parents=True)
    (tmp_path / "keep").write_bytes(b"x")
    os.symlink(tmp_path / "keep", tmp_path / "t" / "link")
    os.symlink(tmp_path, tmp_path / "t" / "inner" / "up")
    discard(tmp_path / "t")
    assert tree(tmp_path) == {"keep": b"x"}


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_sweep_touches_only_our_own_pattern(tmp_path):
    pid = dead_pid()
    ours = [f".pretrain-{kind}-{pid}-0123abcd-checkpoint-3" for kind in ("new", "gone")]
    foreign = [
        *("checkpoint-3.tmp", "tmp", ".tmp-1", ".pretrain", f"pretrain-new-{pid}-0123abcd-x"),
        *(
            f".pretrain-new-{pid}-0123abc-x",
            f".pretrain-mine-{pid}-0123abcd-x",
            ".pretrain-new-x-0123abcd-x",
        ),
    ]
    for name in [*ours, *foreign]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(b"x")
    (tmp_path / "target").mkdir()
    os.symlink("target", tmp_path / f".pretrain-new-{pid}-ffffffff-x")
    assert sorted(sweep(tmp_path)) == sorted(ours)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*foreign, "target", f".pretrain-new-{pid}-ffffffff-x"]
    )
    assert sweep(tmp_path) == []


def test_sweep_leaves_what_a_live_process_is_writing(tmp_path):
    (tmp_path / f".pretrain-new-{os.getppid()}-0123abcd-t").mkdir()
    assert sweep(tmp_path) == []
    with temporary_directory(tmp_path / "t"):
        assert sweep(tmp_path) == []
        assert (
            len(sweep(tmp_path, exclusive=True)) == 1
        )  # the holder of the lock knows better, its own stays
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_sweep_gives_a_directory_its_name_back(tmp_path):
    aside = tmp_path / f".pretrain-old-{dead_pid()}-0123abcd-t"
    aside.mkdir()
    (aside / "f").write_bytes(b"x")
    assert moved_aside(tmp_path) == {"t": aside}
    sweep(tmp_path)
    assert tree(tmp_path) == {"t/f": b"x"}
    assert moved_aside(tmp_path) == {}


def test_check_writable_makes_the_directory_and_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b", 1000)
    assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path / "a" / "b") == []


def test_read_only_directory_is_refused_at_the_start(tmp_path):
    """As an ordinary user: a child process gives up its rights where the tests run as root."""
    tmp_path.chmod(0o555)
    if os.getuid() != 0:
        with pytest.raises(CheckpointError, match="cannot be written"):
            check_writable(tmp_path)
        tmp_path.chmod(0o755)
        return
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and parent.name.startswith("pytest"):
            parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setuid(65534)
            check_writable(tmp_path)
        except CheckpointError as error:
            code = 0 if "cannot be written" in str(error) and str(tmp_path) in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("code", ["EACCES", "EROFS", "ENOSPC", "EIO"])
def test_check_writable_tries_every_call(tmp_path, monkeypatch, code):
    counting = FaultyIO()
    monkeypatch.setattr(files, "IO", counting)
    check_writable(tmp_path / "run")
    for number in range(len(counting.calls)):
        monkeypatch.setattr(files, "IO", FaultyIO(number, code))
        with pytest.raises(CheckpointError, match="run"):
            check_writable(tmp_path / f"run-{number}")


def test_too_little_space_is_refused_at_the_start(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"needs 1,000,000,000,000,000,000 bytes, [\d,]+ bytes are free"
    ):
        check_writable(tmp_path, 10**18)


def test_a_target_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    os.symlink("nowhere", tmp_path / "link")
    for name in ("file", "fifo", "link"):
        with pytest.raises(CheckpointError, match="not a directory"):
            check_writable(tmp_path / name)
    with pytest.raises(CheckpointError):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="not a directory"):
        check_writable("/dev/null")


def test_names_and_modes(tmp_path):
    assert math.isfinite(files.free_bytes(tmp_path))
    path = directories.temporary_name(tmp_path / "checkpoint-3", "new")
    files.IO.mkdir(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~os.umask(os.umask(0o022))
