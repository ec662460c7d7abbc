"""The rules of a step: token-true accumulation, skipped numbers, early stops, signals, checks before step 0."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import inspect
import json
import math
import os
import resource
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pretrain
from pretrain.data.row_source import hash_rows
from pretrain.errors import ConfigError, DataError, RunLocked, TrainingError
from pretrain.objectives.base import Loss, Objective
from pretrain.training import trainer as trainer_module
from pretrain.training.precision import LossScale
from pretrain.training.trainer import Hook, Trainer
from tiny import Rows, losses, objective, tokenizer, trainer


def _weights(goal: Objective) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in goal.named_parameters()}


@pytest.mark.parametrize("kind", ["NextToken", "MaskedLM"])
def test_it_learns_and_transformers_names_lie_on_disk(tmp_path: Path, kind: str) -> None:
    goal = objective(kind)
    run = trainer(
        tmp_path / "run", goal, Rows(8), eval_rows=Rows(4, seed=1), limit="60 steps"
    ).fit()
    line = losses(run.path)
    assert len(line) == 60 and line[-1][1] < 0.8 * line[0][1]
    assert run.metrics["targets"] > 0 and run.stopped == "limit" and run.exit_code == 0
    again = pretrain.load(run.path, quiet=True)
    for name, p in goal.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name


@given(
    micro=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 100),
    kind=st.sampled_from(["NextToken", "MaskedLM"]),
)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_accumulation_normalised_by_global_tokens(
    tmp_path_factory: Any, micro: int, seed: int, kind: str
) -> None:
    """8 x 1 = 4 x 2 = 2 x 4 = 1 x 8, although rows have different numbers of targets."""
    results = []
    for size in (8, micro):
        goal = objective(kind)
        out = tmp_path_factory.mktemp("run")
        # Plain gradient steps: AdamW's first steps are signs, which hide a wrong scale.
        task = trainer(
            out, goal, Rows(24, seed=seed), batch_rows=8, micro_rows=size, limit="3 steps"
        )
        task.optim.eps = 1.0
        task.fit()
        results.append((losses(out), _weights(goal)))
    (one, a), (two, b) = results
    for (_, loss_a, norm_a), (_, loss_b, norm_b) in zip(one, two, strict=True):
        assert loss_a == pytest.approx(loss_b, rel=1e-5) and norm_a == pytest.approx(
            norm_b, rel=1e-4
        )
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


class _Poison(Objective):
    """Passes through, but gives a NaN loss at chosen calls."""

    def __init__(self, inner: Objective, when: set[int]) -> None:
        super().__init__(inner.model)
        self.inner, self.when, self.calls = inner, when, 0

    def collate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.collate(*args, **kwargs)

    def forward(self, batch: Any) -> Loss:
        self.calls += self.training
        loss = self.inner(batch)
        # Two trial runs come before the first step.
        if self.training and self.calls - 2 in self.when:
            loss.total = loss.total * float("nan")
        return loss


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_non_finite_step_changes_neither_weights_nor_moments(tmp_path: Path, name: str) -> None:
    goal = _Poison(objective(), {3})
    seen: list[Any] = []
    task = trainer(tmp_path, goal, Rows(8), optim={"name": name}, limit="4 steps")

    def keep(record: Any) -> None:
        moments = {key: value.clone() for key, value in task.setup.optimizers.state().items()}
        seen.append((record["skipped"], _weights(goal), moments))

    task.hooks = [Hook(keep)]
    task.fit()
    assert [skipped for skipped, _, _ in seen] == [False, False, True, False]
    for which in (1, 2):
        for key, value in seen[1][which].items():
            assert torch.equal(value, seen[2][which][key]), key
    assert any(not torch.equal(value, seen[3][1][key]) for key, value in seen[2][1].items())
    assert task.state.skipped == 1
    skipped = [r for r in task.journal.records if r.get("event") == "skipped"]
    assert skipped[0]["step"] == 3 and skipped[0]["rows"] == task.setup.feed.indices(8)


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    goal = _Poison(objective(), {3, 4, 5})
    task = trainer(tmp_path, goal, Rows(8), save_every="1 steps")
    with pytest.raises(TrainingError, match="3 steps in a row.*optim.lr"):
        task.fit()
    kept = pretrain.load(tmp_path, quiet=True)
    assert all(p.isfinite().all() for p in kept.parameters())


def test_a_run_that_diverges_is_told_the_learning_rate_after_an_evaluation_too(
    tmp_path: Path,
) -> None:
    """Samples of text from its scores ended the run, with the advice to copy the weights again."""
    goal = objective()

    def diverge(record: Any) -> None:
        with torch.no_grad():
            next(goal.model.parameters()).fill_(math.nan)

    task = trainer(
        tmp_path, goal, Rows(8), eval_rows=Rows(2, seed=1), eval_every="1 steps", hooks=[diverge]
    )
    with pytest.raises(TrainingError, match=r"3 steps in a row.*optim\.lr"):
        task.fit()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no glibc")
def test_pages_that_a_step_frees_are_kept_for_the_next_one(tmp_path: Path) -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt") or any(
        n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ
    ):
        pytest.skip("the C library is not glibc, or malloc is set by the environment")
    faults, resident = [], []

    def allocate(record: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(1 << 22) for _ in range(6)]  # 6 x 4,096 pages
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        resident.append(_resident())

    trainer(tmp_path, objective(), Rows(8), hooks=[allocate], limit="4 steps").fit()
    assert max(faults[1:]) < 2048, faults
    assert _resident() < resident[-1] - 4 * 2**24  # after the run they go back to the system


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_hooks_see_a_read_only_record(tmp_path: Path) -> None:
    steps: list[int] = []

    def fn(record: Any) -> None:
        steps.append(record["step"])
        with pytest.raises(TypeError):
            record["loss"] = 0.0

    trainer(tmp_path, objective(), Rows(8), hooks=[Hook(fn, every=5)]).fit()
    assert steps == [5, 10]
    trainer(tmp_path / "alone", objective(), Rows(8), hooks=fn, limit="2 steps").fit()
    assert steps == [5, 10, 1, 2]
    with pytest.raises(ConfigError, match="cannot be called"):
        trainer(tmp_path, objective(), Rows(8), hooks=["fn"])
    with pytest.raises(ConfigError, match="every 1 step or more"):
        Hook(fn, every=0)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_saves_and_leaves(tmp_path: Path, name: str, code: int) -> None:
    def strike(record: Any) -> None:
        if record["step"] == 5:
            os.kill(os.getpid(), getattr(signal, name))

    run = trainer(tmp_path, objective(), Rows(8), hooks=[strike]).fit()
    assert run.stopped == name and run.exit_code == code and run.step == 5
    assert run.checkpoint is not None and run.checkpoint.name == "checkpoint-5"
    rest = trainer(tmp_path, objective(), Rows(8)).fit()
    whole = trainer(tmp_path / "whole", objective(), Rows(8)).fit()
    assert losses(rest.path) == losses(whole.path)


def test_early_stop_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        objective(),
        Rows(4),
        eval_rows=Rows(4, seed=9),
        limit="400 steps",
        eval_every="10 steps",
        save_every="10 steps",
        keep=1,
        patience=3,
        optim={"lr": 0.03, "schedule": "constant"},
    ).fit()
    assert run.stopped == "patience" and run.best is not None
    evals = {r["step"]: r["eval"]["loss"] for r in run.history if "eval" in r}
    best = min(evals, key=lambda step: evals[step])
    assert run.best.name == f"checkpoint-{best}" and run.best.is_dir()
    assert run.step == best + 30
    kept = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert kept == sorted({f"checkpoint-{best}", f"checkpoint-{run.step}"})


def test_the_average_of_the_weights_is_what_is_saved(tmp_path: Path) -> None:
    goal = objective()
    trace: list[dict[str, torch.Tensor]] = []
    task = trainer(tmp_path, goal, Rows(8), optim={"ema": 0.5}, limit="5 steps")
    start = _weights(goal)
    task.hooks = [Hook(lambda _: trace.append(_weights(goal)))]
    task.fit()
    average = start
    for step, weights in enumerate(trace):
        share = 1 - min(0.5, (1 + step) / (10 + step))
        average = {k: torch.lerp(v, weights[k], share) for k, v in average.items()}
    saved = pretrain.load(tmp_path, quiet=True).state_dict()
    for key, value in average.items():
        torch.testing.assert_close(saved[key.removeprefix("model.")], value)


def test_a_checkpoint_has_no_figures_of_another_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_every": "2 steps",
        "save_every": "3 steps",
        "best": False,
        "keep": 9,
    }
    trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(4), limit="4 steps", **options).fit()
    blocks = {
        step: json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text())["pretrain"]
        for step in (3, 4)
    }
    assert blocks[3]["metrics"] == {} and "loss" in blocks[4]["metrics"]
    assert "held-out" not in (tmp_path / "checkpoint-3" / "README.md").read_text()


def test_a_run_shortened_to_its_present_step_evaluates_its_weights(tmp_path: Path) -> None:
    def stop(record: Any) -> None:
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {"eval_every": "2 steps", "eval_rows": Rows(4)}
    trainer(tmp_path, objective(), Rows(8), hooks=[stop], **options).fit()
    run = trainer(tmp_path, objective(), Rows(8), **options, limit="3 steps").fit()
    assert [r["step"] for r in run.history if "eval" in r] == [2, 4, 5]
    assert run.checkpoint is not None
    block = json.loads((run.checkpoint / "config.json").read_text())["pretrain"]
    assert run.step == 5 and block["metrics"] == run.metrics


def test_fewer_rows_than_a_batch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 rows and train.batch_rows is 4"):
        trainer(tmp_path, objective(), Rows(3)).fit()
    with pytest.raises(DataError, match="no training rows"):
        trainer(tmp_path, objective(), []).fit()


def test_all_targets_masked(tmp_path: Path) -> None:
    rows = Rows(8)
    for row in rows:
        row["document_ids"] = np.arange(1, 17)
    with pytest.raises(TrainingError, match="have no target at all"):
        trainer(tmp_path, objective(), rows).fit()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["NextToken", "MaskedLM"])
@pytest.mark.parametrize("wrong", [70, -3])
def test_token_id_beyond_the_vocabulary(tmp_path: Path, kind: str, wrong: int) -> None:
    rows = Rows(4)
    assert len(tokenizer()) <= 70
    rows[2]["input_ids"][5] = wrong
    with pytest.raises(DataError, match=f"Training row 2 has input_ids {wrong} at position 5"):
        trainer(tmp_path, objective(kind), rows).fit()


def test_a_bad_id_behind_the_first_batch_is_named_too(tmp_path: Path) -> None:
    rows = Rows(40)
    rows[17]["input_ids"][3] = 9999
    with pytest.raises(DataError, match="Training row 17 has input_ids 9999 at position 3"):
        trainer(tmp_path, objective(), rows, limit="1 epochs").fit()


def test_a_bad_held_out_id_is_named_before_the_first_step(tmp_path: Path) -> None:
    held_out = Rows(2)
    held_out[1]["input_ids"][0] = 9999
    with pytest.raises(DataError, match="Held-out row 1"):
        trainer(tmp_path, objective(), Rows(8), eval_rows=held_out).fit()


def test_labels_that_are_ignored_elsewhere_are_refused_here(tmp_path: Path) -> None:
    """-1 is an ignore index of other codebases; here it would silently train towards token 0."""

    class Shifted(Objective):
        def __init__(self, inner: Objective) -> None:
            super().__init__(inner.model)
            self.inner = inner

        def collate(self, *args: Any, **kwargs: Any) -> Any:
            batch = self.inner.collate(*args, **kwargs)
            batch["labels"][batch["labels"] == -100] = -1
            return batch

        def forward(self, batch: Any) -> Loss:
            return self.inner(batch)

    with pytest.raises(DataError, match="labels -1 .*Ignored labels are -100"):
        trainer(tmp_path, Shifted(objective()), Rows(8)).fit()


def test_ragged_and_foreign_rows(tmp_path: Path) -> None:
    rows = Rows(8)
    rows[3] = {key: value[:9] for key, value in rows[3].items()}
    with pytest.raises(DataError, match="of one shape"):
        trainer(tmp_path, objective(), rows, limit="1 epochs").fit()
    with pytest.raises(DataError, match="input_ids"):
        trainer(tmp_path, objective(), [{"tokens": np.arange(16)}] * 8).fit()
    small = Rows(8)
    for row in small:
        row["input_ids"] = row["input_ids"].astype(np.uint16)
    trainer(tmp_path, objective(), small, limit="1 steps").fit()


def test_row_longer_than_the_positions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="40 tokens, but the model has 32 positions"):
        trainer(tmp_path, objective(), Rows(8, length=40)).fit()


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    second = trainer(tmp_path, objective(), Rows(8))

    def start_another(record: Any) -> None:
        with pytest.raises(RunLocked):
            second.fit()

    trainer(tmp_path, objective(), Rows(8), hooks=[Hook(start_another, every=6)]).fit()


def test_micro_rows_must_divide_the_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1, 2, 4"):
        trainer(tmp_path, objective(), Rows(8), micro_rows=3).fit()


def test_a_coupling_loss_refuses_accumulation(tmp_path: Path) -> None:
    goal = objective()
    goal.couples_examples = True  # type: ignore[misc]
    with pytest.raises(ConfigError, match="compares the rows"):
        trainer(tmp_path, goal, Rows(8), micro_rows=2).fit()


def test_another_model_in_the_same_directory(tmp_path: Path) -> None:
    trainer(tmp_path, objective(), Rows(8), limit="2 steps").fit()
    with pytest.raises(TrainingError, match="holds another model"):
        trainer(tmp_path, objective("MaskedLM"), Rows(8)).fit()


def test_weights_changed_behind_our_back_are_noticed(tmp_path: Path) -> None:
    other = Rows(8, seed=5)
    for row in other:
        row["input_ids"] = np.full_like(row["input_ids"], 7)
    first, again = (
        trainer(tmp_path, objective(), rows, limit=f"{limit} steps")
        for rows, limit in ((Rows(8), 2), (other, 4))
    )
    first.about = again.about = {"fingerprint": "the same"}
    first.fit()
    with pytest.raises(TrainingError, match="probe rows"):
        again.fit()


def test_other_data_or_order_are_noticed_when_resuming(tmp_path: Path) -> None:
    trainer(tmp_path, objective(), Rows(8), limit="2 steps").fit()
    with pytest.raises(TrainingError, match=r"with rows 8 and this run has 9"):
        trainer(tmp_path, objective(), Rows(9), limit="4 steps").fit()
    with pytest.raises(TrainingError, match=r"train.seed 0 and this run has 1"):
        trainer(tmp_path, objective(), Rows(8), limit="4 steps", seed=1).fit()
    changed = trainer(tmp_path, objective(), Rows(8), limit="4 steps")
    changed.about = {"fingerprint": "other"}
    with pytest.raises(TrainingError, match="with data .* and this run has 'other'"):
        changed.fit()
    for held_out in (None, Rows(2)):  # by whichever rows the loss of the checkpoint is probed
        out = tmp_path / str(held_out is None)
        trainer(out, objective(), Rows(8), eval_rows=held_out, limit="2 steps").fit()
        with pytest.raises(TrainingError, match="with data"):
            trainer(out, objective(), Rows(8, seed=5), eval_rows=held_out, limit="4 steps").fit()


def test_a_run_that_recorded_no_fingerprint_goes_on(tmp_path: Path) -> None:
    first = trainer(tmp_path, objective(), Rows(8), limit="2 steps")
    first.fingerprint = None  # as earlier versions
    first.fit()
    assert trainer(tmp_path, objective(), Rows(8), limit="4 steps").fit().step == 4


def test_what_is_hashed_of_rows_does_not_depend_on_addresses() -> None:
    def rows() -> list[dict[str, Any]]:
        names = {"who": ["a", "b"], "what": object()}
        return [{"ids": [1, 2], "uneven": [[1], [2, 3]], "text": "a", "none": None, "more": names}]

    one, two = hash_rows(rows()), hash_rows(rows())
    assert (
        one.digest() == two.digest() != hash_rows([rows()[0] | {"uneven": [[1], [2, 4]]}]).digest()
    )
    assert hash_rows([(1, 2)]).digest() != hash_rows([(1, 3)]).digest()


def test_a_loss_scale_stays_with_fp16(tmp_path: Path) -> None:
    """A run that moves from fp16 to a device with bf16 must not take the scale along."""
    plain = LossScale(False)
    plain.load({"scale": 65536.0, "good": 3})
    assert plain.scale == 1.0
    scaled = LossScale(True, scale=8.0)
    scaled.load(plain.state())
    assert scaled.scale == 8.0


def test_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_rows": Rows(4, seed=9),
        "limit": "400 steps",
        "eval_every": "10 steps",
        "patience": 2,
        "optim": {"lr": 0.03, "schedule": "constant"},
    }
    first = trainer(tmp_path, objective(), Rows(4), **options).fit()
    again = trainer(tmp_path, objective(), Rows(4), **options).fit()
    assert first.stopped == again.stopped == "patience" and first.step == again.step


def test_held_out_rows_without_a_target_are_told_before_the_first_step(tmp_path: Path) -> None:
    held_out = Rows(2)
    for row in held_out:
        row["document_ids"] = np.arange(1, 17)
    with pytest.raises(DataError, match="None of the 2 held-out rows"):
        trainer(tmp_path, objective(), Rows(8), eval_rows=held_out, limit="2 steps").fit()


def test_a_tensor_without_gradient_does_not_break_resuming(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make() -> Objective:
        goal = objective()
        goal.spare = torch.nn.Linear(3, 3)  # type: ignore[assignment]
        return goal

    trainer(tmp_path, make(), Rows(8), limit="2 steps").fit()
    assert "no gradient reaches 2 trainable tensors" in capsys.readouterr().err
    goal = make()
    with torch.no_grad():
        goal.spare.weight.fill_(7.0)  # type: ignore[union-attr,operator]
    assert trainer(tmp_path, goal, Rows(8), limit="4 steps").fit().step == 4
    assert not torch.equal(goal.spare.weight, torch.full((3, 3), 7.0))  # type: ignore[union-attr]


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    """nohup ignores SIGHUP; a run must not start to listen to it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def strike(record: Any) -> None:
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGHUP)

        run = trainer(tmp_path, objective(), Rows(8), hooks=[strike]).fit()
        assert run.stopped == "limit" and run.step == 12
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_half_precision_weights_are_trained_in_fp32(tmp_path: Path) -> None:
    goal = objective()
    goal.bfloat16()
    trainer(tmp_path, goal, Rows(8), limit="1 steps").fit()
    assert all(p.dtype is torch.float32 for p in goal.parameters())


def test_a_finished_run_runs_no_further(tmp_path: Path) -> None:
    first = trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=3)).fit()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoint-12").rglob("*")}
    again = trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=3)).fit()
    assert again.step == 12 and again.metrics == first.metrics
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoint-12").rglob("*")}


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_disturbs_no_caller_and_is_disturbed_by_none(tmp_path: Path, off: Any) -> None:
    """The caller's random state stays, and a caller that computes without gradients gets the same run."""
    states, found = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, goal = torch.get_rng_state(), objective(dropout=0.1)
        with contextlib.nullcontext() if seed == 1 else off():
            trainer(tmp_path / str(seed), goal, Rows(8), limit="3 steps").fit()
            assert torch.is_grad_enabled() == (seed == 1)
        states.append(torch.equal(before, torch.get_rng_state()))
        found.append(losses(tmp_path / str(seed)))
    assert all(states) and found[0] == found[1]


def test_weights_that_no_gradient_can_reach_are_named(tmp_path: Path) -> None:
    with torch.inference_mode():
        goal = objective()
    with pytest.raises(ConfigError, match="inference_mode"):
        trainer(tmp_path, goal, Rows(8)).fit()


def test_the_table_of_a_trainer_says_which_method_sets_what() -> None:
    table: dict[str, set[str]] = {}
    for line in (trainer_module.__doc__ or "").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0] not in ("attribute", "---"):
            table |= {name: set(cells[1].split(", ")) for name in cells[0].split(", ")}
    found: dict[str, set[str]] = {}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(Trainer))).body
    for method in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(method):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and ast.unparse(node.value) == "self":
                found.setdefault(node.attr, set()).add(method.name)
    assert found == table
