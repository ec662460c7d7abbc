"""Limits become steps; micro-batches never change the global batch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.data.prepare import prepare
from pretrain.nn.device import TOKENS_AT_ONCE
from pretrain.training import plan as planning
from pretrain.training import trainer as trainer_module
from pretrain.training.plan import Plan, choose_micro_rows, resolve_amounts
from pretrain.training.state import RunState
from tiny import Rows, objective, tokenizer, trainer

ROWS = Rows(10)
GOAL = objective()


@pytest.mark.parametrize(
    ("limit", "steps"),
    [("7 steps", 7), ("1 epochs", 3), ("2.5 epochs", 7), (f"{ROWS.num_tokens} tokens", 3)],
)
def test_limits(limit: str, steps: int) -> None:
    assert (
        Plan(TrainConfig(limit=limit, batch_rows=4), ROWS, GOAL, len(ROWS)).total_steps() == steps
    )


@pytest.mark.parametrize("count", [7, 40, 2000])
def test_a_limit_in_tokens_counts_no_padding(count: int) -> None:
    """Of rows that record no number of tokens they are counted; the mask, not the length, says what they are."""
    full, short = {"attention_mask": np.ones(16, int)}, {"attention_mask": np.arange(16) < 4}
    rows = [{"input_ids": np.ones(16, int)} | (short if i % 5 else full) for i in range(count)]
    seen = sum(int(row["attention_mask"].sum()) for row in rows)
    plan = Plan(TrainConfig(limit=f"{seen} tokens", batch_rows=1), rows, GOAL, count)
    assert abs(plan.total_steps() - count) <= (0 if count < 512 else 0.05 * count)


def test_rows_that_are_compared_are_counted_by_whole_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row alone is no batch of such an objective."""
    rows = [
        {"input_ids": np.ones(6, int), "attention_mask": np.arange(6) < 4 + i % 3}
        for i in range(60)
    ]
    seen = set[int]()
    whole = type(GOAL).collate
    monkeypatch.setattr(type(GOAL), "couples_examples", True)
    monkeypatch.setattr(
        type(GOAL),
        "collate",
        lambda self, batch, rngs: seen.add(len(batch)) or whole(self, batch, rngs),
    )
    plan = Plan(TrainConfig(limit="300 tokens", batch_rows=6), rows, GOAL, len(rows))
    assert plan.total_steps() == 10 and seen == {6}


def test_a_limit_in_tokens_of_a_mixture_counts_its_sources_by_their_shares(tmp_path: Path) -> None:
    """The rows of one source are full; those of the other are half empty, and come three times of four."""
    for name, length, count in (("full", 640, 10), ("empty", 35, 30)):
        texts = (f"{i % 10} {i // 10} " + "cat " * length for i in range(count))
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    shares = {str(tmp_path / "full.jsonl"): 1, str(tmp_path / "empty.jsonl"): 3}
    rows = prepare(shares, tmp_path / "out", tokenizer=tokenizer(), row_length=64, valid=0).train
    order = rows.order()
    batch = rows.gather(order.indices(0, order.epoch_length))
    visited = int((batch["document_ids"] > 0).sum())
    plan = Plan(TrainConfig(limit=f"{visited} tokens", batch_rows=1), rows, GOAL, len(rows))
    assert abs(plan.total_steps() - order.epoch_length) <= 0.02 * order.epoch_length
    assert abs(rows.num_tokens / len(rows) / rows.tokens_per_row - 1) > 0.05


@pytest.mark.parametrize(
    ("rows", "batch", "limit"),
    [
        (3, 2, "10 epochs"),  # no batch holds a row twice
        (100, 8, "10 epochs"),
        (256, 8, "10 epochs"),
        (512, 16, "10 epochs"),
        (1024, 32, "10 epochs"),
        (3200, 32, "5 epochs"),
        (16000, 32, "1 epochs"),
        (10**6, 32, "1 epochs"),
    ],
)
def test_automatic_rows_of_a_step_and_limit(rows: int, batch: int, limit: str) -> None:
    found = resolve_amounts(TrainConfig(), range(rows))  # type: ignore[arg-type]
    assert (found.batch_rows, found.limit) == (batch, limit)
    steps = -(-rows // batch) * int(limit.split()[0])
    assert steps >= 500 or limit == "10 epochs"
    for micro in (1, 5, 40):
        whole = resolve_amounts(TrainConfig(micro_rows=micro), range(rows)).batch_rows  # type: ignore[arg-type]
        assert whole % micro == 0 and whole <= max(batch, micro)
    given = TrainConfig(limit="7 steps", batch_rows=5)
    assert resolve_amounts(given, range(rows)) == given  # type: ignore[arg-type]


def test_minutes_follow_the_measured_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned at 1 s a step, run at 2 s: the plan halves, and the run ends when the time does."""
    clock = [100.0]
    monkeypatch.setattr(planning.time, "monotonic", lambda: clock[0])
    plan = Plan(TrainConfig(limit="2 minutes", batch_rows=4), ROWS, GOAL, len(ROWS))
    state = RunState(total_steps=plan.total_steps(1.0))
    assert state.total_steps == 120
    totals = []
    while state.step < state.total_steps:
        clock[0] += 2.0
        state.step += 1
        state.seconds = clock[0] - 100.0
        state.total_steps = plan.replan(state)
        totals.append(state.total_steps)
    assert 57 <= state.step <= 60 and 115 <= state.seconds <= 121
    assert all(abs(total - 59) <= 1 for total in totals[5:])


def test_micro_rows_are_a_divisor_that_fits_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 16 * 5)
    found = choose_micro_rows(TrainConfig(batch_rows=12), ROWS, objective(), cpu)
    assert found == 4
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 1)
    goal: Any = objective()
    assert choose_micro_rows(TrainConfig(batch_rows=12), ROWS, goal, cpu) == 1
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 16 * 5)
    for most, rows in ((0, 4), (3, 3), (5, 4), (1, 1)):
        assert choose_micro_rows(TrainConfig(batch_rows=12), ROWS, goal, cpu, most=most) == rows
    fixed = TrainConfig(batch_rows=12, micro_rows=6)
    assert choose_micro_rows(fixed, ROWS, goal, cpu, most=2) == 6, "what is set is kept"
    assert choose_micro_rows(TrainConfig(batch_rows=12), ROWS, goal, cpu, even=True, most=1) == 3
    goal.couples_examples = True
    assert choose_micro_rows(TrainConfig(batch_rows=12), ROWS, goal, cpu) == 12


def test_a_longer_limit_in_minutes_goes_on() -> None:
    plan = Plan(TrainConfig(limit="20 minutes", batch_rows=4), ROWS, GOAL, len(ROWS))
    done = RunState(step=300, total_steps=300, seconds=600.0, limit="10 minutes")
    assert plan.first_total(done, 2.0) == 600
    same = RunState(step=300, total_steps=300, seconds=1200.0, limit="20 minutes")
    assert plan.first_total(same, 2.0) == 300


def test_a_limit_in_minutes_leaves_out_the_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, check, late = time.monotonic, trainer_module.preflight, [0.0]

    def slow(*given: Any) -> float:
        late[0] += 1000.0
        return check(*given)

    def step(record: Any) -> None:
        late[0] += 10.0

    monkeypatch.setattr(time, "monotonic", lambda: clock() + late[0])
    monkeypatch.setattr(trainer_module, "preflight", slow)
    for limit, steps in (("2 minutes", 12), ("4 minutes", 24)):  # the second one resumes
        run = trainer(tmp_path, objective(), ROWS, limit=limit, hooks=[step])
        assert steps - 2 <= run.fit().step <= steps + 2
        assert run.state.seconds < 10 * steps + 30


def test_a_new_run_has_a_step_however_short_its_limit() -> None:
    plan = Plan(TrainConfig(limit="1 seconds", batch_rows=4), ROWS, GOAL, len(ROWS))
    assert plan.first_total(RunState(), 5.0) == plan.total_steps(5.0) == 1
    assert plan.reserve < 0.2
