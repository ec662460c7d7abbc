"""Resume equals the run that was never interrupted, bit for bit, after any number of crashes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.checkpoint import latest, read_training
from pretrain.errors import CheckpointError, TrainingError
from pretrain.models.base import Model
from pretrain.objectives import build_objective
from pretrain.objectives.next_token import NextToken
from pretrain.training import restore as restoring
from pretrain.training.plan import Plan
from pretrain.training.state import RunState
from pretrain.training.trainer import Hook
from pretrain.utils.files import hash_file
from tiny import TEXTS, Rows, losses, objective, prepared_rows, trainer


class Crash(Exception):
    """What a test throws into the middle of a run."""


def _run(out: Path, kind: str, crash_after: int | None = None, **options: Any) -> Any:
    def strike(record: Any) -> None:
        if record["step"] == crash_after:
            raise Crash

    goal = objective(kind, dropout=options.pop("dropout", 0.0), **options.pop("goal", {}))
    rows, held_out = Rows(10), Rows(3, seed=4)
    task = trainer(out, goal, rows, eval_rows=held_out, hooks=[Hook(strike)], **options)
    task.fit()
    return task


def _same(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    first, second = latest(a), latest(b)
    assert first is not None and second is not None and first.name == second.name
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    one, two = read_training(first), read_training(second)
    assert one.tensors.keys() == two.tensors.keys()
    for stem, tensors in one.tensors.items():
        assert tensors.keys() == two.tensors[stem].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, two.tensors[stem][key]), (stem, key)
    # The digest of the log goes over the lines' clock times; the facts hold the peak memory of the process.
    drop = ("seconds", "window_seconds", "log", "facts")
    states = [{k: v for k, v in t.state["run"].items() if k not in drop} for t in (one, two)]
    assert states[0] == states[1]


@pytest.mark.slow
@given(
    crashes=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    kind=st.sampled_from(["NextToken", "MaskedLM"]),
    name=st.sampled_from(["adamw", "muon"]),
    save=st.integers(1, 7),
    micro=st.sampled_from([1, 2, 4]),
    ema=st.sampled_from([0.0, 0.9]),
    dropout=st.sampled_from([0.0, 0.2]),
    log_every=st.sampled_from([1, 3]),
    precision=st.sampled_from(["fp32", "bf16"]),
    schedule=st.sampled_from(["cosine", "wsd"]),
)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_chain_of_crashes_is_bit_identical(
    tmp_path_factory: Any,
    crashes: list[int],
    kind: str,
    name: str,
    save: int,
    ema: float,
    schedule: str,
    **options: Any,
) -> None:
    """18 steps over 10 rows in batches of 4: seven epochs, and batches that straddle two of them."""
    options |= {
        "limit": "18 steps",
        "save_every": f"{save} steps",
        "eval_every": "5 steps",
        "micro_rows": options.pop("micro"),
        "optim": {"name": name, "ema": ema, "schedule": schedule},
    }
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    _run(whole, kind, **options)
    for crash in crashes:
        try:
            _run(cut, kind, crash_after=crash, **options)
        except Crash:
            continue
        break
    _run(cut, kind, **options)
    _same(whole, cut)


@pytest.mark.parametrize(
    ("kind", "goal"),
    [
        pytest.param("NextToken", {}, marks=pytest.mark.slow),
        ("MaskedLM", {"rate": 0.5, "final_rate": 0.1}),
    ],
)
def test_resume_at_every_step(tmp_path: Path, kind: str, goal: dict[str, float]) -> None:
    """One crash after each step of a run that saves every step: the whole chain equals one run."""
    options: dict[str, Any] = {"limit": "9 steps", "save_every": "1 steps", "micro_rows": 2}
    options |= {"goal": goal}
    _run(tmp_path / "whole", kind, **options)
    for crash in range(1, 9):
        with pytest.raises(Crash):
            _run(tmp_path / "cut", kind, crash_after=crash, **options)
    _run(tmp_path / "cut", kind, **options)
    _same(tmp_path / "whole", tmp_path / "cut")


def test_a_longer_limit_goes_on(tmp_path: Path) -> None:
    """A finished run goes on when the limit is raised; under a constant rate it equals the longer run."""
    optim = {"schedule": "constant", "warmup": 2.0}
    _run(tmp_path / "cut", "NextToken", limit="6 steps", optim=optim)
    _run(tmp_path / "cut", "NextToken", limit="12 steps", optim=optim)
    _run(tmp_path / "whole", "NextToken", limit="12 steps", optim=optim)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("kept", [True, False])
def test_the_best_of_a_run_outlives_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: bool
) -> None:
    """A result stays whole when checkpoints are deleted, also if the command is then given again, or a longer one."""
    optim = {"lr": 3.0, "schedule": "constant"}  # no later step is better than an early one
    options: dict[str, Any] = {"optim": optim, "eval_every": "2 steps", "keep": 1}
    task = _run(tmp_path, "NextToken", limit="8 steps", **options)
    best = tmp_path / f"checkpoint-{task.state.best_step}"
    assert task.state.best_step < 8
    weights = hash_file(tmp_path / "model" / "model.safetensors")
    shutil.rmtree(best)
    if not kept:
        shutil.rmtree(tmp_path / "model")
    for limit in ("8 steps", "10 steps"):
        again = _run(tmp_path, "NextToken", limit=limit, **options)
        said = capsys.readouterr().err
        now = hash_file(tmp_path / "model" / "model.safetensors")
        if kept:
            assert now == weights and again.state.best_step == task.state.best_step
            assert (f"{best.name}, the best of the run, is not there" in said) == (
                limit == "8 steps"
            )
        elif limit == "8 steps":
            assert "so the best begins afresh" in said and again.state.best_step == 0
        else:
            assert again.state.best_step == 10


@pytest.mark.parametrize(
    ("begun", "later", "said"),
    [
        ("8 steps", "16 steps", "is 0.005"),
        ("8 steps", "8 steps", ""),
        ("8 steps", "0.01 epochs", ""),  # one step, but all of the eight have been made
        ("8 steps", "3.2 epochs", ""),  # the same number of steps
    ],
)
def test_a_rate_that_another_length_changes_at_once_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: str, later: str, said: str
) -> None:
    optim = {"schedule": "linear", "warmup": 0.0, "min_lr": 0.0}
    _run(tmp_path, "NextToken", limit=begun, optim=optim)
    assert "the length of the run" not in capsys.readouterr().err
    _run(tmp_path, "NextToken", limit=later, optim=optim)
    line = "the learning rate of the next step is 0.005 and no longer 0.00125, because the length of the run"
    assert (line in capsys.readouterr().err) == bool(said)


def test_a_run_that_another_limit_ends_early_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Crash):
        _run(tmp_path, "NextToken", limit="8 steps", save_every="2 steps", crash_after=4)
    _run(tmp_path, "NextToken", limit="2 steps")
    assert "4 of 8 steps have been made, so none follows: the run ends" in capsys.readouterr().err


def test_a_run_keeps_its_steps_by_whichever_rule_they_were_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"limit": "500 tokens", "save_every": "1 steps"}
    options |= {"goal": {"rate": 0.5, "final_rate": 0.1}}
    whole = _run(tmp_path / "whole", "MaskedLM", **options)
    with pytest.raises(Crash):
        _run(tmp_path / "cut", "MaskedLM", crash_after=3, **options)
    monkeypatch.setattr(Plan, "units_per_row", 2.0)
    assert _run(tmp_path / "cut", "MaskedLM", **options).state.step == whole.state.step
    _same(tmp_path / "whole", tmp_path / "cut")
    longer = _run(tmp_path / "cut", "MaskedLM", **options | {"limit": "800 tokens"})
    assert longer.state.step == 100


@pytest.mark.parametrize("earlier", [False, True])
def test_the_average_of_the_weights_is_neither_begun_nor_ended_by_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    if earlier:  # versions that did not keep the settings of the optimizer
        monkeypatch.setattr(restoring, "optimizer_settings", lambda trainer: {})
    for before, after in ((0.9, 0.0), (0.0, 0.9)):
        out = tmp_path / str(before)
        _run(out, "NextToken", limit="2 steps", optim={"ema": before})
        with pytest.raises(CheckpointError if earlier else TrainingError, match=r"optim\.ema"):
            _run(out, "NextToken", limit="4 steps", optim={"ema": after})


@pytest.mark.parametrize("name", ["ema", "l2_sp"])
def test_the_strength_of_an_average_is_kept(tmp_path: Path, name: str) -> None:
    _run(tmp_path, "NextToken", limit="2 steps", optim={name: 0.5})
    with pytest.raises(TrainingError, match=rf"optim\.{name} 0\.5 and this run has 0\.9"):
        _run(tmp_path, "NextToken", limit="4 steps", optim={name: 0.9})


@pytest.mark.parametrize("changed", [{"rate": 0.9}, {"whole_word": True}, {"final_rate": 0.1}])
def test_an_objective_goes_on_with_its_arguments(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Also with those that its description leaves out as long as they are the defaults."""
    plain: dict[str, Any] = {"rate": 0.3}
    for name, before, after in (("a", plain, plain | changed), ("b", plain | changed, plain)):
        _run(tmp_path / name, "MaskedLM", limit="2 steps", goal=before)
        with pytest.raises(TrainingError, match=rf"MaskedLM with {next(iter(changed))} "):
            _run(tmp_path / name, "MaskedLM", limit="4 steps", goal=after)
        assert _run(tmp_path / name, "MaskedLM", limit="4 steps", goal=before).state.step == 4


class Scaled(NextToken):
    """Without a method ``describe``, and with a frozen module and an argument that it changes."""

    frozen = ("teacher",)

    def __init__(
        self, model: Model, scale: float = 1.0, other: Any = 2, teacher: str | Path = "a"
    ) -> None:
        super().__init__(model)
        self.scale, self.teacher = scale, nn.Linear(2, 2)
        nn.init.zeros_(self.teacher.weight), nn.init.zeros_(self.teacher.bias)
        if isinstance(other, dict):
            other["touched"] = True


def _own(out: Path, steps: int, options: dict[str, Any] | None, **by_hand: Any) -> Any:
    model = objective("NextToken").model
    path = f"{__name__}:Scaled"
    goal = Scaled(model, **by_hand) if options is None else build_objective(path, options, model)
    task = trainer(out, goal, Rows(10), limit=f"{steps} steps")
    task.fit()
    return task.state.step


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {"scale": 3.0}), ({"scale": 3.0}, {}), ({"scale": 3.0}, {"scale": 3.0, "other": 3})],
)
def test_an_objective_without_a_description_is_told_by_its_arguments(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    _own(tmp_path, 2, before)
    with pytest.raises(TrainingError, match=r"Scaled with (scale|other) "):
        _own(tmp_path, 4, after)
    assert _own(tmp_path, 4, before | {"other": 2}) == 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"scale": 3.0}, {"scale": 3.0, "other": 2}),
        ({"teacher": "a"}, {"teacher": "b"}),  # told by its weights
        ({"scale": 3.0}, None),  # by hand: not known
        (None, {"scale": 3.0}),
    ],
)
def test_an_objective_goes_on_where_nothing_is_known_to_differ(
    tmp_path: Path, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> None:
    for steps, options in ((2, before), (4, after)):
        by_hand = {"scale": 3.0} if options is None else {}
        assert _own(tmp_path, steps, options, **by_hand) == steps


def test_a_checkpoint_keeps_arguments_of_any_kind_as_they_were_given(tmp_path: Path) -> None:
    for steps in (2, 4):
        odd: dict[Any, Any] = {1: Path("b"), "worst": math.inf, "few": (1, None)}
        assert _own(tmp_path, steps, {"teacher": Path("a"), "other": odd}) == steps
        block = json.loads((tmp_path / f"checkpoint-{steps}/config.json").read_text())["pretrain"]
        kept = {"1": "b", "worst": "inf", "few": [1, None]}
        assert block["objective"]["init_args"] == {"teacher": "a", "other": kept}


def test_another_precision_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path, "NextToken", limit="2 steps")
    capsys.readouterr()
    assert _run(tmp_path, "NextToken", limit="3 steps", precision="bf16").state.step == 3
    assert (
        "checkpoint-2 was computed in fp32, and the run goes on in bf16" in capsys.readouterr().err
    )
    _run(tmp_path, "NextToken", limit="4 steps", precision="bf16")
    assert "was computed in" not in capsys.readouterr().err


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"limit": "8 steps", "save_every": "2 steps"}
    _run(tmp_path / "whole", "NextToken", **options)
    with pytest.raises(Crash):
        _run(tmp_path / "cut", "NextToken", crash_after=7, **options)
    newest = latest(tmp_path / "cut")
    assert newest is not None and newest.name == "checkpoint-6"
    file = newest / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    capsys.readouterr()
    _run(tmp_path / "cut", "NextToken", **options)
    assert "checkpoint-6" in capsys.readouterr().err
    _same(tmp_path / "whole", tmp_path / "cut")


def _prepared(folder: Path) -> Any:
    """Rows of 24 tokens from documents of which most are longer."""
    rng = np.random.default_rng(0)
    lines = [
        " ".join(rng.choice(TEXTS).split()[0] for _ in range(size)) for size in (90, 9, 150, 60)
    ]
    return prepared_rows(folder, lines, 24)


def test_documents_cut_anew_go_on_where_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _prepared(tmp_path)
    batches: dict[str, list[bytes]] = {}

    def run(name: str, crash_after: int | None = None, **options: Any) -> None:
        def note(record: Any) -> None:
            batch = task.setup.feed.step_at(task.state.rows)[0]["input_ids"]  # of the next step
            batches.setdefault(name, []).append(batch.numpy().tobytes())
            if record["step"] == crash_after:
                raise Crash

        task = trainer(tmp_path / name, objective(), rows, hooks=[Hook(note)], **options)
        task.fit()

    options: dict[str, Any] = {"batch_rows": len(rows), "save_every": "2 steps", "limit": "6 steps"}
    run("whole", **options)
    with pytest.raises(Crash):
        run("cut", crash_after=3, **options)
    run("cut", **options)
    _same(tmp_path / "whole", tmp_path / "cut")
    assert set(batches["cut"]) == set(batches["whole"])
    run("fixed", recut=False, **options)
    fixed = batches["fixed"]
    for batch in batches["whole"][:-1]:  # other rows with the same tokens, none of which is lost
        ids = [np.frombuffer(each, np.int64) for each in (batch, fixed[0])]
        assert np.array_equal(*(np.sort(each) for each in ids))
    cuts = [
        {row.tobytes() for row in np.frombuffer(each, np.int64).reshape(-1, 24)}
        for each in batches["whole"]
    ]
    assert len(set(map(frozenset, cuts))) == len(cuts)
    run("whole", recut=False, **options | {"limit": "9 steps"})
    assert "cut elsewhere in every epoch, as the run began" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on_with_the_same_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _prepared(tmp_path)
    options: dict[str, Any] = {"batch_rows": len(rows), "save_every": "1 steps", "limit": "6 steps"}
    trainer(tmp_path / "fixed", objective(), rows, recut=False, **options).fit()

    def strike(record: Any) -> None:
        if record["step"] == 3:
            raise Crash

    def earlier(plain: Any) -> Any:
        return from_json({key: value for key, value in plain.items() if key != "recut"})

    with pytest.raises(Crash):
        trainer(
            tmp_path / "cut", objective(), rows, hooks=[Hook(strike)], recut=False, **options
        ).fit()
    from_json = RunState.from_json
    monkeypatch.setattr(RunState, "from_json", earlier)
    trainer(tmp_path / "cut", objective(), rows, **options).fit()
    assert losses(tmp_path / "cut") == losses(tmp_path / "fixed")
