"""Which checkpoint is the best: any figure, either direction, never one that is not a number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import TrainingError
from pretrain.objectives import Objective
from pretrain.objectives.base import Loss
from pretrain.training.state import RunState
from pretrain.training.validation import LOWER_IS_BETTER, improves, score
from tiny import Rows, objective, trainer


class _Scripted(Objective):
    """Passes through, and adds a figure whose values are given: one for the check before the run, then the rest."""

    def __init__(self, inner: Objective, values: list[float], name: str = "f1") -> None:
        super().__init__(inner.model)
        self.inner, self.values, self.figure = inner, list(values), name

    def collate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.collate(*args, **kwargs)

    def forward(self, batch: Any) -> Loss:
        return self.inner(batch)

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        figures = self.inner.summarize(total, count, metrics, stats)
        # The probe rows have no bytes; only whole evaluations take from the script.
        return figures | {self.figure: self.values.pop(0) if stats else 0.0}


def _run(out: Path, values: list[float], name: str = "f1", **options: Any) -> Any:
    goal = _Scripted(objective(), [0.0, *values], name)
    settings: dict[str, Any] = {
        "eval_rows": Rows(4, seed=9),
        "limit": f"{len(values)} steps",
        "eval_every": "1 steps",
        "monitor": name,
        "keep": 1,
    }
    task = trainer(out, goal, Rows(8), **(settings | options))
    return task, task.fit()


NAN = math.nan


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("f1", [0.1, 0.9, 0.3, 0.5], 2),
        ("rmse", [0.7, 0.9, 0.3, 0.5], 3),
        ("pearson", [NAN, 0.2, NAN, 0.1], 2),
        ("mcc", [-0.5, NAN, -0.25, -0.75], 3),
    ],
)
def test_the_best_checkpoint_is_that_of_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, values: list[float], best: int
) -> None:
    task, run = _run(tmp_path, values, name)
    assert run.best is not None and run.best.name == f"checkpoint-{best}" and run.best.is_dir()
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation:" in line]
    marked = [i + 1 for i, line in enumerate(lines) if line.endswith("(best)")]
    assert marked[-1] == best
    want = values[best - 1]
    assert task.state.best_score == (want if name == "rmse" else -want)


def test_a_line_says_why_the_last_evaluation_is_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = _run(tmp_path, [0.5, 0.49])
    assert run.best.name == "checkpoint-2"
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation:" in line]
    assert lines[0].endswith("(best)") and lines[1].endswith("better by less than chance)")


@pytest.mark.parametrize(
    ("patience", "every", "rows", "said"),
    [
        (3, "2 steps", 4, None),
        (5, "2 steps", 4, "which is evaluated 5 times until its end"),
        (9, "2 steps", 4, "which is evaluated 5 times until its end"),
        (1, "0 steps", 4, "which is evaluated 1 time until its end"),
        (1, "2 steps", 0, "because nothing is evaluated; leave it out, or hold out rows"),
        (0, "0 steps", 0, None),
    ],
)
def test_a_patience_that_stops_nothing_is_said(
    tmp_path: Path, capsys: Any, patience: int, every: str, rows: int, said: str | None
) -> None:
    held_out = Rows(rows, seed=1) if rows else None
    task = trainer(
        tmp_path, objective(), Rows(12), eval_rows=held_out, limit="10 steps",
        patience=patience, eval_every=every,
    )  # fmt: skip
    task.fit()
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train.patience")]
    assert len(lines) == (said is not None) and all(str(said) in line for line in lines)


def test_patience_follows_the_figure(tmp_path: Path) -> None:
    _, run = _run(tmp_path, [0.5, 0.4, NAN, 0.45, 0.9, 0.9], patience=3)
    assert run.stopped == "patience" and run.step == 4 and run.best.name == "checkpoint-1"


def test_nothing_but_nan_leaves_the_newest(tmp_path: Path) -> None:
    task, run = _run(tmp_path, [NAN, NAN, NAN])
    assert task.state.best_step == 0 and run.best == run.checkpoint
    assert run.checkpoint.name == "checkpoint-3" and "f1 nan" in repr(run)
    _, finished = _run(tmp_path, [], limit="3 steps")  # what it knows now, it has read from the log
    assert math.isnan(finished.metrics["f1"]) and "f1 nan" in repr(finished)


def test_an_unknown_figure_is_named_before_the_first_step(tmp_path: Path) -> None:
    task = trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(4, seed=9), monitor="f2")
    with pytest.raises(TrainingError, match=r"monitor is 'f2'.*loss, accuracy.*bits_per_byte"):
        task.fit()
    assert task.state.step == 0 and not list(tmp_path.glob("checkpoint-*"))
    # Bits per byte need the text behind the rows, which the few rows of a probe have not.
    known = trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(4), monitor="bits_per_byte")
    assert known.fit().best is not None


def test_the_best_of_figures_that_cannot_be_compared_begins_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, [0.9, 0.5])
    monkeypatch.setattr(_Scripted, "figures_changed", lambda self, rows: len(rows) == 4)
    _, run = _run(tmp_path, [0.4, 0.2], limit="4 steps")
    assert run.best is not None and run.best.name == "checkpoint-3"
    err = capsys.readouterr().err
    assert "earlier version" in err and "better by less than chance" not in err


def test_the_score_of_a_resumed_run_goes_on(tmp_path: Path) -> None:
    _run(tmp_path, [0.5, 0.8])
    task, run = _run(tmp_path, [0.7, 0.6], limit="4 steps")
    assert task.state.best_step == 2 and run.best.name == "checkpoint-2"
    # Another figure has its own best.
    task, run = _run(tmp_path, [0.3, 0.4], "mae", limit="6 steps")
    assert task.state.best_step == 5 and task.state.best_score == 0.3


def test_losses_on_other_rows_are_not_compared(tmp_path: Path) -> None:
    _run(tmp_path, [0.5, 0.8], eval_rows=Rows(4, seed=9))
    for rows, limit, best in ((4, "4 steps", 2), (3, "6 steps", 5)):
        task, _ = _run(tmp_path, [0.3, 0.2], limit=limit, eval_rows=Rows(rows, seed=9))
        assert task.state.best_step == best, rows
    assert task.state.best_score == -0.3 and task.state.eval_rows == 3


def test_states_from_before_there_were_monitors_are_read() -> None:
    old = {"step": 7, "best_loss": 1.5, "best_step": 5, "evals_since_best": 1}
    state = RunState.from_json(old)
    assert (state.best_score, state.monitor, state.best_step) == (1.5, "loss", 5)
    assert RunState.from_json({"step": 7, "best_loss": None}).best_score == math.inf


@given(
    st.builds(
        RunState,
        step=st.integers(0, 9),
        best_score=st.floats(allow_nan=False),
        unfrozen_from=st.none() | st.integers(0, 3),
        monitor=st.sampled_from(["loss", "f1"]),
    )
)
def test_a_state_reads_back_what_it_wrote(state: RunState) -> None:
    again = RunState.from_json(state.to_json())
    finite = math.isfinite(state.best_score)
    assert again.best_score == (state.best_score if finite else math.inf)
    assert (again.step, again.unfrozen_from, again.monitor) == (
        state.step,
        state.unfrozen_from,
        state.monitor,
    )


def test_two_attributes_keep_their_old_keys_on_disk() -> None:
    plain = RunState(eval_pending=True, unfrozen_from=2).to_json()
    assert plain["owed"] is True and plain["lowest"] == 2
    assert not plain.keys() & {"eval_pending", "unfrozen_from"}
    again = RunState.from_json(plain)
    assert again.eval_pending and again.unfrozen_from == 2


@given(
    st.lists(st.tuples(st.sampled_from([0.2, 0.5, NAN]), st.sampled_from([NAN, 1.0, 2.0, 3.0])), min_size=1)
)  # fmt: skip
def test_of_equal_figures_the_lower_loss_is_better(values: list[tuple[float, float]]) -> None:
    """Also to patience, and across a save: the state that was written goes on."""
    state = RunState(monitor="accuracy")
    best: tuple[float, float, int] | None = None
    for step, (accuracy, loss) in enumerate(values, 1):
        state = RunState.from_json(json.loads(json.dumps(state.to_json())))
        state.step = step
        tie = best is not None and accuracy == best[0] and loss < best[1]
        wanted = not math.isnan(accuracy) and (best is None or accuracy > best[0] or tie)
        assert improves(state, {"accuracy": accuracy, "loss": loss}, "accuracy") is wanted
        best = (accuracy, loss, step) if wanted else best
        assert state.best_step == (0 if best is None else best[2])
        assert state.evals_since_best == (step if best is None else step - best[2])


@pytest.mark.parametrize(
    ("name", "best", "last", "targets", "chosen"),
    [
        ("accuracy", 0.80, 0.77, 100, True),  # the standard error is 0.04
        ("accuracy", 0.80, 0.80, 100, True),
        ("accuracy", 0.80, 0.75, 100, False),
        ("accuracy", 0.80, 0.79, 10_000, False),  # 0.004
        ("accuracy", 1.00, 1.00, 100, False),  # no chance in it, so the lower loss decides
        ("accuracy", 0.80, NAN, 100, False),
        ("mcc", -0.1, -0.1, 100, False),
        ("loss", 0.80, 0.81, 100, False),
        ("mae", 0.80, 0.80, 100, False),
    ],
)
def test_the_last_evaluation_is_the_best_but_for_chance(
    name: str, best: float, last: float, targets: float, chosen: bool
) -> None:
    """Its loss may be higher: a model grows too sure of itself before it grows worse."""
    state = RunState(monitor=name, step=1)
    assert improves(state, {name: best, "loss": best, "targets": targets}, name)
    state.step = 2
    figures = {"loss": 2.0, name: last, "targets": targets}
    assert improves(state, figures, name, last=True) is chosen
    assert state.best_step == (2 if chosen else 1)
    # A run that goes on has to beat the figure of the checkpoint that is kept.
    assert state.best_score == score({name: last if chosen else best}, name)
    again = RunState(monitor=name, step=1)
    improves(again, {name: best, "loss": best, "targets": targets}, name)
    again.step = 2
    assert not improves(again, figures, name), "only at the end of the schedule"


@given(st.lists(st.floats(allow_infinity=False), min_size=1), st.sampled_from(["mae", "accuracy"]))
def test_the_best_of_a_sequence(values: list[float], name: str) -> None:
    state = RunState(monitor=name)
    for step, value in enumerate(values, 1):
        state.step = step
        improves(state, {name: value}, name)
    numbers = [v for v in values if not math.isnan(v)]
    if not numbers:
        assert state.best_step == 0 and state.evals_since_best == len(values)
        return
    best = min(numbers) if name == "mae" else max(numbers)
    assert values.index(best) + 1 == state.best_step
    assert state.evals_since_best == len(values) - state.best_step
    assert score({name: best}, name) == state.best_score


def test_lower_is_better_names_losses_only() -> None:
    assert "mse" in LOWER_IS_BETTER and "accuracy" not in LOWER_IS_BETTER
