"""A run that is stopped from a keyboard, and one that says nothing."""

from __future__ import annotations

import gc
import itertools
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import Interrupted, TrainingError
from pretrain.evaluation.language import no_run
from pretrain.objectives import Objective
from pretrain.objectives.base import Loss
from pretrain.training.trainer import Hook, Trainer
from pretrain.utils.run_log import read_log
from tiny import Rows, losses, objective, trainer


def _strike(at: int) -> Any:
    def hook(record: Any) -> None:
        if record["step"] == at:
            signal.raise_signal(signal.SIGINT)

    return Hook(hook)


@pytest.mark.parametrize(
    "at", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_has_a_checkpoint_and_a_best_one(tmp_path: Path, at: int) -> None:
    """Also before the first evaluation, which comes after step 4."""
    before = signal.getsignal(signal.SIGINT)
    options: dict[str, Any] = {
        "eval_rows": Rows(4, seed=1),
        "eval_every": "4 steps",
        "optim": {"unfreeze": 0.5},
    }
    goal = objective()
    run = trainer(tmp_path, goal, Rows(8), hooks=[_strike(at)], **options).fit()
    assert run.stopped == "SIGINT" and run.exit_code == 130 and run.step == at
    assert run.checkpoint is not None and run.checkpoint.name == f"checkpoint-{at}"
    assert run.best is not None and run.best.name == f"checkpoint-{4 if at > 4 else at}"
    for path in (run.checkpoint, run.best, run.path):
        assert all(p.isfinite().all() for p in pretrain.load(path, quiet=True).parameters())
    # Nothing of the run stays behind in the process or in the model.
    assert signal.getsignal(signal.SIGINT) is before and gc.isenabled()
    assert all(p.requires_grad for p in goal.parameters())
    rest = trainer(tmp_path, goal, Rows(8), **options).fit()
    whole = trainer(tmp_path / "whole", objective(), Rows(8), **options).fit()
    assert rest.stopped == "limit" and losses(rest.path) == losses(whole.path)
    assert rest.metrics == whole.metrics


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)],
)
def test_a_signal_during_the_start_up_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """A start-up may take minutes, and has nothing to save; a run that is resumed stays as it was."""
    out, before, calls = tmp_path / "run", signal.getsignal(signal.SIGTERM), []

    def struck() -> Any:
        goal = objective()
        plain = goal.forward

        def forward(batch: Any) -> Loss:
            calls.append(1)
            signal.raise_signal(getattr(signal, name))
            return plain(batch)

        monkeypatch.setattr(goal, "forward", forward)
        return goal

    def stopped() -> None:
        with pytest.raises(Interrupted, match="^No step was made since the start") as caught:
            trainer(out, struck(), Rows(8)).fit()
        assert caught.value.code == code and calls.pop() and not calls
        assert signal.getsignal(signal.SIGTERM) is before

    stopped()
    assert not out.exists()
    trainer(out, objective(), Rows(8), limit="3 steps").fit()
    there = sorted(out.rglob("*"))
    stopped()
    assert sorted(out.rglob("*")) == there
    assert trainer(out, objective(), Rows(8)).fit().step == 12


def test_a_signal_before_the_start_up_is_heard_when_it_begins(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer(tmp_path / "run", objective(), Rows(8)).fit(
            begin=lambda: signal.raise_signal(signal.SIGINT)
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("at", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_an_evaluation_is_broken_off_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """There may be no more time than saving takes; the run that goes on ends as if nothing had happened."""
    options: dict[str, Any] = {
        "eval_rows": Rows(12, seed=1),
        "eval_every": "4 steps",
        "micro_rows": 2,
        "patience": 2,
        "optim": {"lr": 3e-2},
    }
    whole = trainer(tmp_path / "whole", objective(), Rows(8), **options).fit()
    goal = objective()
    run, plain, seen = trainer(tmp_path / "cut", goal, Rows(8), **options), goal.forward, []

    def forward(batch: Any) -> Loss:
        if not goal.training and run.state.step == at:
            seen.append(at)
            if len(seen) == 2:
                signal.raise_signal(signal.SIGTERM)
        return plain(batch)

    monkeypatch.setattr(goal, "forward", forward)
    cut = run.fit()
    assert cut.stopped == "SIGTERM" and cut.step == at
    assert len(seen) == 2 + 1  # of six batches; saving looks at the first rows once more
    assert not any(
        "eval" in r and r["step"] == at for r in read_log(tmp_path / "cut" / "log.jsonl")
    )
    rest = trainer(tmp_path / "cut", objective(), Rows(8), **options).fit()
    assert (rest.stopped, rest.step) == (whole.stopped, whole.step)
    assert losses(rest.path) == losses(whole.path) and rest.metrics == whole.metrics
    figures = [
        [(r["step"], r["eval"]) for r in read_log(path / "log.jsonl") if "eval" in r]
        for path in (rest.path, whole.path)
    ]
    assert figures[0] == figures[1] and len(figures[0]) >= 2


def test_a_third_interrupt_acts_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, objective(), Rows(8), hooks=[_strike(2)] * 3).fit()
    assert gc.isenabled()
    assert trainer(tmp_path, objective(), Rows(8)).fit().step == 12


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGHUP", "SIGINT")]
)
def test_two_signals_close_together_are_one_request(
    tmp_path: Path, first: str, second: str
) -> None:
    """A terminal and a scheduler, or a scheduler that repeats itself: the run saves all the same."""

    def strike(record: Any) -> None:
        if record["step"] == 2:
            signal.raise_signal(getattr(signal, first))
            signal.raise_signal(getattr(signal, second))

    run = trainer(tmp_path, objective(), Rows(8), hooks=[strike]).fit()
    assert (run.stopped, run.step) == (first, 2)
    assert run.checkpoint == tmp_path / "checkpoint-2"


def test_who_asks_again_after_a_while_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.training.state._SAME_REQUEST", -1.0)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, objective(), Rows(8), hooks=[_strike(2)] * 2).fit()


@pytest.mark.parametrize(
    ("how", "background", "save_every"),
    [
        ("deleted", False, "0 steps"),
        ("deleted", True, "1 steps"),
        ("renamed", True, "0 steps"),
        ("replaced", False, "1 steps"),
        ("emptied", False, "0 steps"),
        ("half emptied", True, "1 steps"),
    ],
)
def test_a_run_whose_directory_is_taken_away_is_saved_beside_it(
    tmp_path: Path, how: str, background: bool, save_every: str
) -> None:
    out, away = tmp_path / "a run", tmp_path / "away"
    whole = trainer(tmp_path / "whole", objective(), Rows(8)).fit()

    def take_away(record: Any) -> None:
        if record["step"] == 5:
            if how == "deleted":
                while out.exists():  # a save may be going on in it
                    shutil.rmtree(out, ignore_errors=True)
            elif "emptied" in how:
                for name in ("run.lock", "log.jsonl", "run.yaml"):
                    (out / name).unlink()
                if how == "half emptied":
                    (out / "mine").write_text("kept")
            else:
                out.rename(away)
            if how == "replaced":
                out.mkdir()

    train = {"save_every": save_every, "async_save": background}
    task = trainer(out, objective(), Rows(8), hooks=[take_away], **train)
    with pytest.raises(TrainingError, match=r"was (deleted|renamed|emptied) ") as caught:
        task.fit(lambda: (out / "run.yaml").write_text("settings"))
    fallback, said = tmp_path / "a run.rescued-1", str(caught.value)
    assert str(fallback) in said and (str(away) in said) == (how in ("renamed", "replaced"))
    assert ("was emptied" in said) == ("emptied" in how)
    assert (fallback / "run.yaml").read_text() == "settings"
    subprocess.run(said.rpartition("again: ")[2], shell=True, check=True, cwd=tmp_path)
    assert how != "half emptied" or (tmp_path / "a run.other" / "mine").read_text() == "kept"
    began: list[Any] = []
    assert trainer(out, objective(), Rows(8), hooks=[began.append]).fit().step == 12
    assert all(r["step"] > 5 for r in began) and losses(out) == losses(whole.path)


@pytest.mark.parametrize("kind", ["removed", "folder", "cut", "larger", "appended", "edited"])
def test_log_and_settings_that_are_taken_away_are_written_again(
    tmp_path: Path, kind: str, capfd: Any
) -> None:
    whole, out = trainer(tmp_path / "whole", objective(), Rows(8)).fit(), tmp_path / "run"

    def take_away(record: Any) -> None:
        for name in ("log.jsonl", "run.yaml") if record["step"] == 5 else ():
            if kind == "cut" and name == "log.jsonl":
                os.truncate(out / name, 40)
                continue
            text = (out / name).read_text()
            if kind == "appended":
                (out / name).write_text(f"{text}{{}}\n")
                continue
            (out / name).unlink()
            if kind == "edited":  # as by sed -i
                (out / name).write_text(text.replace("e", "x"))
            if kind == "larger":
                (out / name).write_text('{"step": 1}\n' * 999)
            if kind == "folder":
                (out / name).mkdir()

    task = trainer(out, objective(), Rows(8), hooks=[take_away], save_every="6 steps")
    task.fit(lambda: (out / "run.yaml").write_text("settings") and None)
    assert losses(out) == losses(whole.path) and (out / "run.yaml").read_text() == "settings"
    said = capfd.readouterr().err
    assert said.count("log.jsonl was removed or changed") == said.count("run.yaml was removed") == 1
    assert trainer(out, objective(), Rows(8), limit="14 steps").fit().step == 14
    assert "damaged" not in capfd.readouterr().err
    assert "run.yaml is missing" not in no_run(tmp_path)
    assert f"run.yaml is missing in {out}" in no_run(out / "checkpoint-12")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
@pytest.mark.parametrize("call", [1, 6])
def test_a_full_memory_is_a_sentence_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, call: int
) -> None:
    goal = objective()
    plain, calls = goal.forward, itertools.count(1)

    def forward(batch: Any) -> Loss:
        if next(calls) >= call:
            raise error
        return plain(batch)

    monkeypatch.setattr(goal, "forward", forward)
    with pytest.raises(TrainingError, match=r"memory.*Lower train\.micro_rows"):
        trainer(tmp_path, goal, Rows(8)).fit()


def starved(monkeypatch: pytest.MonkeyPatch, after: int) -> Any:
    """An objective for which memory does not suffice for more than two rows, ``after`` that many forward passes."""
    goal = objective()
    plain, calls = goal.forward, itertools.count()

    def forward(batch: Any) -> Loss:
        if next(calls) >= after and len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no")
        return plain(batch)

    monkeypatch.setattr(goal, "forward", forward)
    return goal


def test_a_full_memory_makes_smaller_micro_batches_of_the_same_rows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_rows": 8}
    small = trainer(tmp_path / "small", objective(), Rows(32), micro_rows=2, **options)
    small.fit()
    capfd.readouterr()
    big = trainer(tmp_path / "big", starved(monkeypatch, 0), Rows(32), micro_rows=8, **options)
    assert big.fit().step == 12 and big.micro_rows == 2
    said = capfd.readouterr().err
    assert "does not suffice for 8 rows" in said and "does not suffice for 4 rows" in said
    assert losses(tmp_path / "big") == losses(tmp_path / "small")
    weights = zip(big.objective.parameters(), small.objective.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in weights)


def test_a_run_that_ran_out_of_memory_resumes_with_the_rows_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_rows": 8, "micro_rows": 8, "optim": {"schedule": "constant"}}
    whole = trainer(tmp_path / "whole", starved(monkeypatch, 5), Rows(32), **options).fit()
    events = [r for r in whole.history if r.get("event") == "memory"]
    assert [event["micro_rows"] for event in events] == [4, 2]
    assert 1 < events[0]["step"] == events[1]["step"] < 6
    out = tmp_path / "parts"
    trainer(out, starved(monkeypatch, 5), Rows(32), limit="6 steps", **options).fit()
    again = trainer(out, objective(), Rows(32), **options)  # there is enough memory now
    assert again.fit().step == 12 and again.micro_rows == 2
    assert losses(out) == losses(whole.path)
    for rows in (4, 8):  # another size is what it is set to, in later runs as well
        options |= {"micro_rows": rows, "limit": f"{12 + rows} steps"}
        again = trainer(out, objective(), Rows(32), **options)
        assert again.fit().step == 12 + rows and again.micro_rows == rows
    options["limit"] = "12 steps"
    plain = trainer(tmp_path / "plain", objective(), Rows(32), **options).fit()
    for mine, other in zip(losses(whole.path), losses(plain.path), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("what", ["tokenizer", "dropout", "nothing"])
def test_a_resumed_run_notices_another_base(tmp_path: Path, what: str) -> None:
    trainer(tmp_path, objective(), Rows(8), limit="4 steps").fit()
    goal = objective(dropout=0.3 if what == "dropout" else 0.0)
    if what == "tokenizer":
        goal.model.tokenizer = train_from_texts(["another"], "char")
    task = trainer(tmp_path, goal, Rows(8), limit="6 steps")
    if what == "nothing":
        assert task.fit().step == 6
    else:
        with pytest.raises(TrainingError, match=rf"{what}.*was changed since"):
            task.fit()


def test_a_quiet_run_prints_nothing_and_logs_everything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"eval_rows": Rows(4, seed=1), "eval_every": "6 steps"}
    loud = trainer(tmp_path / "loud", objective(), Rows(8), **options)
    loud.fit()
    assert "validation:" in capfd.readouterr().err
    quiet = trainer(tmp_path / "quiet", objective(), Rows(8), **options)
    quiet.quiet = True
    run = quiet.fit()
    assert capfd.readouterr() == ("", "")
    assert losses(tmp_path / "quiet") == losses(tmp_path / "loud")
    evals = [r["eval"] for r in read_log(tmp_path / "quiet" / "log.jsonl") if "eval" in r]
    assert len(evals) == 2 and run.metrics == loud.metrics == evals[-1]


class _Broken(Objective):
    """A loss that is not a number, or only its gradient."""

    def __init__(self, inner: Objective, what: str, when: int) -> None:
        super().__init__(inner.model)
        self.inner, self.what, self.when, self.calls = inner, what, when, 0

    def collate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.collate(*args, **kwargs)

    def forward(self, batch: Any) -> Loss:
        loss: Loss = self.inner(batch)
        self.calls += self.training
        if self.training and self.calls - 2 == self.when:  # two trial runs come first
            if self.what == "loss":
                loss.total = loss.total * math.nan
            else:
                loss.total.register_hook(lambda grad: grad * math.inf)
        return loss


@pytest.mark.parametrize(("what", "good", "scale"), [("loss", 3, 8.0), ("gradient", 1, 4.0)])
def test_only_a_gradient_moves_the_loss_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, good: int, scale: float
) -> None:
    """A loss that is not finite says nothing about the scale: it neither halves nor counts as a good step."""
    task = trainer(tmp_path, _Broken(objective(), what, 3), Rows(8), limit="4 steps")
    seen = []

    def arm(record: Any) -> None:
        seen.append((record["skipped"], task.setup.scaler.scale, task.setup.scaler.good))

    task.hooks = [Hook(arm)]

    set_up = Trainer._set_up

    def with_scale(trainer: Any) -> bool:
        done = set_up(trainer)
        trainer.setup.scaler.enabled, trainer.setup.scaler.scale = True, 8.0
        return done

    monkeypatch.setattr(Trainer, "_set_up", with_scale)
    task.fit()
    assert [skipped for skipped, _, _ in seen] == [False, False, True, False]
    assert seen[1][1:] == (8.0, 2) and seen[-1][1:] == (scale, good)
