"""Rows of unequal length: what fits, what is tried before the first step, and how an error names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import TrainConfig, parse_every
from pretrain.errors import DataError, TrainingError
from pretrain.nn.device import TOKENS_AT_ONCE
from pretrain.objectives import Objective
from pretrain.objectives.base import Loss
from pretrain.training.feed import check_batch
from pretrain.training.plan import choose_micro_rows, mean_length, row_length
from tiny import Rows, objective, trainer

CPU = torch.device("cpu")


class Ragged(list[dict[str, np.ndarray]]):
    """Rows that know how long they are; the longest is never the first."""

    def __init__(self, sizes: Sequence[int]) -> None:
        rng = np.random.default_rng(0)
        super().__init__({"input_ids": rng.integers(5, 60, size)} for size in sizes)
        self.sizes = list(sizes)
        self.num_tokens, self.longest = sum(sizes), max(sizes)

    def largest(self, count: int) -> list[int]:
        return sorted(range(len(self)), key=lambda i: -self.sizes[i])[:count]


class Padding(Objective):
    """Pads the rows of a batch to its longest, and remembers the shapes that it was trained on."""

    def __init__(self, inner: Objective) -> None:
        super().__init__(inner.model)
        self.inner = inner
        self.shapes: list[tuple[int, ...]] = []

    def collate(self, examples: Any, rngs: Any, *, evaluation: bool = False) -> Any:
        width = max(len(example["input_ids"]) for example in examples)
        rows = []
        for example in examples:
            ids = example["input_ids"]
            document = np.zeros(width, np.int64)
            document[: len(ids)] = 1
            padded = np.pad(ids, (0, width - len(ids)))
            rows.append({"input_ids": padded, "document_ids": document})
        return self.inner.collate(rows, rngs, evaluation=evaluation)

    def forward(self, batch: Any) -> Loss:
        if self.training:
            self.shapes.append(tuple(batch["input_ids"].shape))
        return self.inner(batch)


def test_lengths_of_equal_and_unequal_rows() -> None:
    equal, ragged, goal = Rows(4), Ragged([3, 9, 6]), objective()
    assert (row_length(equal, goal), mean_length(equal, goal)) == (16, 16.0)
    assert (row_length(ragged, goal), mean_length(ragged, goal)) == (9, 6.0)
    assert row_length([{"input_ids": np.arange(7), "labels": np.float32(0.5)}], goal) == 7


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=40),
    st.sampled_from([1, 6, 8, 32, 48]),
    st.integers(1, 4096),
)
def test_micro_batches_fit_on_average_and_at_worst(
    sizes: list[int], batch_rows: int, budget: int
) -> None:
    before = TOKENS_AT_ONCE["cpu"]
    TOKENS_AT_ONCE["cpu"] = budget
    try:
        goal: Any = type("Goal", (), {"couples_examples": False})()
        rows = choose_micro_rows(TrainConfig(batch_rows=batch_rows), Ragged(sizes), goal, CPU)
    finally:
        TOKENS_AT_ONCE["cpu"] = before
    assert batch_rows % rows == 0
    if rows > 1:
        assert rows * sum(sizes) / len(sizes) <= budget + 1e-6
        assert rows * max(sizes) <= 4 * budget
    larger = [d for d in range(rows + 1, batch_rows + 1) if batch_rows % d == 0]
    if larger:  # and they are no smaller than they need be
        fits = (
            larger[0] * sum(sizes) / len(sizes) <= budget and larger[0] * max(sizes) <= 4 * budget
        )
        assert not fits


def test_the_longest_rows_are_tried_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Ragged([4, 5, 6, 30, 5, 4, 28, 7, 5, 4, 6, 5])
    goal = Padding(objective())
    run = trainer(tmp_path, goal, rows, micro_rows=2, limit="6 steps").fit()
    assert goal.shapes[0] == (2, 30) and len(goal.shapes) == 2 + 6 * 2
    assert "data 12 rows of up to 30 tokens, 109 in all" in capsys.readouterr().err
    assert run.step == 6


def test_rows_that_do_not_fit_are_told_before_the_first_step(tmp_path: Path) -> None:
    class Small(Padding):
        def forward(self, batch: Any) -> Loss:
            if batch["input_ids"].shape[1] > 20:
                raise torch.OutOfMemoryError("no")
            return super().forward(batch)

    rows = Ragged([4] * 39 + [30])
    task = trainer(tmp_path, Small(objective()), rows)
    with pytest.raises(TrainingError, match=r"1 row of 30 tokens does not fit.*micro_rows"):
        task.fit()
    assert task.state.step == 0


def test_a_row_longer_than_the_positions_is_found_wherever_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="have 33 tokens, but the model has 32 positions"):
        trainer(tmp_path, Padding(objective()), Ragged([4, 4, 33, 4])).fit()


def test_a_bad_id_among_packed_examples_names_all_of_them() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 9999]])}
    with pytest.raises(DataError, match="Training rows 3, 8: one of these has input_ids 9999"):
        check_batch(batch, objective().model, "Training", [3, 8])


@pytest.mark.parametrize(
    ("every", "steps"), [("0.5 epochs", [3, 6, 9, 10]), ("1 epoch", [6, 10]), ("0 epochs", [10])]
)
def test_evaluations_by_the_epoch(tmp_path: Path, every: str, steps: list[int]) -> None:
    """24 rows in batches of 4: an epoch is 6 steps."""
    run = trainer(
        tmp_path,
        objective(),
        Rows(24),
        eval_rows=Rows(2, seed=1),
        eval_every=every,
        save_every=every,
        limit="10 steps",
        best=False,
        keep=9,
    ).fit()
    assert [r["step"] for r in run.history if "eval" in r] == steps
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == steps


@given(st.floats(0.01, 50), st.floats(0.1, 1e4))
def test_an_epoch_interval_is_its_steps(epochs: float, epoch_steps: float) -> None:
    found = parse_every(f"{epochs:.6f} epochs", 7, epoch_steps=epoch_steps)
    assert found == max(1, round(float(f"{epochs:.6f}") * epoch_steps))
