"""A run that fails before it begins leaves no new directory, and touches nothing that was there."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from pretrain.errors import DataError, PretrainError, RunLocked
from pretrain.training.trainer import Trainer
from pretrain.utils.runlock import RunLock


def trainer(out: Path, rows: int = 8, **options: Any) -> Trainer:
    return tiny.trainer(out, tiny.objective(), tiny.Rows(rows), **{"limit": "2 steps"} | options)


def fails(made: Trainer, kind: type[BaseException] = PretrainError) -> None:
    def begin() -> None:
        (made.out / "run.yaml").write_text("settings")

    with pytest.raises(kind):
        made.fit(begin)


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_failures_before_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "runs" / "a"
    fails(trainer(out, rows=0), DataError)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.training.trainer.preflight", stop)
        fails(trainer(out), KeyboardInterrupt)
    assert not out.exists()
    for part in ("write_tensors", "Record", "manifest.write_manifest", "directories.publish"):
        with monkeypatch.context() as patch:  # while the model is saved and loaded again
            patch.setattr(f"pretrain.checkpoint.saving.{part}", stop)
            fails(trainer(out), KeyboardInterrupt)
        assert not out.exists(), part
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trackio", None)  # found, and cannot be imported
        fails(trainer(out, loggers=["trackio"]))
    assert not out.exists()
    assert trainer(out).fit().step == 2


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    fails(trainer(tmp_path, rows=0), DataError)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def begin() -> None:
        (out / "mine").write_text("kept")

    with pytest.raises(DataError):
        trainer(out, rows=0).fit(begin)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_run_that_has_begun_stays(tmp_path: Path) -> None:
    fails(trainer(tmp_path / "run", hooks=[stop]), KeyboardInterrupt)
    assert {"run.yaml", "log.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_what_cannot_be_seen_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    out = tmp_path / "run"
    late = trainer(out, hooks=[stop])
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.training.run_directory.run_checkpoints", full)
        fails(late, KeyboardInterrupt)
    assert {"run.yaml", "log.jsonl"} <= {path.name for path in out.iterdir()}


def test_the_directory_of_a_run_that_locks_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    late = trainer(out)
    lock = RunLock(out)

    def beaten(*_: Any) -> Any:
        lock.acquire()
        raise RunLocked(1, "here", "now", out)

    monkeypatch.setattr("pretrain.training.trainer.run_lock", beaten)
    fails(late, RunLocked)
    assert (out / "run.lock").exists()
    lock.release()
