"""The micro-batch that is measured: the fastest that fits, of equal results, and the same when a run is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig
from pretrain.training import dry_run, micro_rows
from pretrain.training.micro_rows import candidates, may_measure
from pretrain.training.trainer import Trainer
from tiny import Rows, losses, objective, trainer

BATCH: dict[str, Any] = {"batch_rows": 16, "limit": "3 steps"}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on the CPU too, however short the run; the rule takes four rows at a time."""
    monkeypatch.setattr(micro_rows, "_EXACT", ())
    monkeypatch.setattr(micro_rows, "_SHARE", float("inf"))
    monkeypatch.setattr("pretrain.training.plan.tokens_at_once", lambda device: 4 * 16)


def clocked(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], fits: int = 1 << 30
) -> None:
    """Let passes take so many seconds by the clock for a number of rows, of which only a few fit into memory."""

    def run_pass(run: Trainer, batch: Any) -> tuple[float, float]:
        rows = len(batch["input_ids"])
        if rows > fits:
            raise torch.OutOfMemoryError("no")
        return dry_run.run_pass(run, batch)[0], seconds(rows)

    monkeypatch.setattr(micro_rows, "run_pass", run_pass)


@pytest.mark.parametrize(
    ("seconds", "fits", "best"),
    [
        (lambda rows: 0.02, 99, 16),
        (lambda rows: 0.02, 8, 8),
        (lambda rows: 0.002 * rows**2, 99, 1),
        (lambda rows: 0.005 * rows, 99, 4),
    ],
    ids=["large", "memory", "small", "equal"],
)
def test_the_fastest_that_fits_is_taken(
    tmp_path: Path,
    measured: None,
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    fits: int,
    best: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    clocked(monkeypatch, seconds, fits)
    run = trainer(tmp_path / "a", objective(), Rows(64), **BATCH)
    run.fit()
    assert run.micro_rows == best == run.state.micro_rows
    (line,) = (x for x in capfd.readouterr().err.splitlines() if x.startswith("global batch"))
    assert f"16 rows = {best} micro x {16 // best} accumulated" in line
    for rows in (1, 2, 4, 8, 16):
        assert (f" {rows}: " in line) == (rows <= fits), line
    fixed = trainer(tmp_path / "b", objective(), Rows(64), micro_rows=best, **BATCH)
    fixed.fit()
    assert losses(tmp_path / "a") == losses(tmp_path / "b"), "measuring left something behind"
    pairs = zip(run.objective.parameters(), fixed.objective.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_a_resumed_run_keeps_the_measured_size(
    tmp_path: Path, measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, lambda rows: 0.02)
    options = BATCH | {"optim": {"schedule": "constant"}}
    for name, limit in (("whole", "6 steps"), ("parts", "3 steps")):
        run = trainer(tmp_path / name, objective(), Rows(64), **options | {"limit": limit})
        run.fit()
        assert run.micro_rows == 16
    clocked(monkeypatch, lambda rows: 0.002 * rows**2)
    again = trainer(tmp_path / "parts", objective(), Rows(64), **options | {"limit": "6 steps"})
    again.fit()
    assert again.micro_rows == 16
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_resumed_run_that_was_not_measured_keeps_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.training.plan.tokens_at_once", lambda device: 4 * 16)
    trainer(tmp_path, objective(), Rows(64), **BATCH).fit()
    monkeypatch.setattr(micro_rows, "_EXACT", ())
    monkeypatch.setattr(micro_rows, "_SHARE", float("inf"))
    clocked(monkeypatch, lambda rows: 0.02)
    again = trainer(tmp_path, objective(), Rows(64), **BATCH | {"limit": "6 steps"})
    assert again.fit().step == 6 and again.micro_rows == 4 and again.state.micro_rows == 0


def test_a_short_run_is_not_measured_and_says_so(
    tmp_path: Path, measured: None, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(micro_rows, "_SHARE", 0.02)
    run = trainer(tmp_path, objective(), Rows(64), **BATCH)
    run.fit()
    assert run.micro_rows == 4 and "not measured: " in capfd.readouterr().err


def _made(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Set a trainer up as ``fit`` does, up to the moment when it would measure."""
    seen: list[Trainer] = []
    monkeypatch.setattr("pretrain.training.preflight.may_measure", lambda it: seen.append(it))
    run.fit()
    run.state.step = 0
    return seen[0]


def test_where_the_size_is_not_free_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _made(trainer(tmp_path / "cpu", objective(), Rows(64), **BATCH), monkeypatch)
    assert not may_measure(run), "the bits of a run on a CPU depend on no clock"
    run.device = torch.device("cuda")
    assert may_measure(run)
    run.state.micro_rows = 2
    assert not may_measure(run), "memory ran out with more"
    run.state.micro_rows, run.state.step = 0, 5
    assert not may_measure(run), "the steps before had another size"
    run.state.step, run.parallel = 0, ParallelConfig(reproducible=True)
    assert not may_measure(run)
    run.parallel, run.train.micro_rows = ParallelConfig(), 4
    assert not may_measure(run)
    run.train.micro_rows, run.objective.couples_examples = 0, True  # type: ignore[misc]
    assert not may_measure(run)


def test_what_does_not_fit_by_the_estimate_is_not_tried(
    tmp_path: Path, measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _made(trainer(tmp_path, objective(), Rows(64), **BATCH), monkeypatch)
    assert candidates(run) == [1, 2, 4, 8, 16]
    needed = {rows: micro_rows._needed(run, rows) for rows in (4, 8, 16)}
    assert needed[4] < needed[8] < needed[16]
    held = (needed[8] + needed[16]) / 2
    monkeypatch.setattr(micro_rows, "common_resources", lambda device, world: (held, None, 1))
    assert candidates(run) == [1, 2, 4, 8]
    run.setup.feed.share_rows, run.setup.feed.micro_rows = 12, 6
    assert candidates(run) == [3, 6, 12][:2] + [12] * (micro_rows._needed(run, 12) < held)
