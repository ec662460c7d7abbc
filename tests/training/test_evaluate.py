"""What an evaluation gathers: sums of any shape, joined lists, plain figures, the same whatever the batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import TrainingError
from pretrain.nn.loss import IGNORE
from pretrain.objectives import Objective
from pretrain.objectives.base import Loss
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_precision
from tiny import Rows, objective, trainer

CPU = choose_precision("fp32", torch.device("cpu"))
KINDS = 4


class _Counting(Objective):
    """The loss of another objective, a histogram of its labels, and the labels themselves."""

    def __init__(self, inner: Objective) -> None:
        super().__init__(inner.model)
        self.inner = inner
        self.seen: Mapping[str, Any] = {}

    def collate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.collate(*args, **kwargs)

    def forward(self, batch: Any) -> Loss:
        loss: Loss = self.inner(batch)
        labels = batch["labels"][batch["labels"] != IGNORE]
        loss.metrics["histogram"] = torch.bincount(labels % KINDS, minlength=KINDS)
        loss.metrics["labels"] = [int(label) for label in labels]
        loss.metrics["rows"] = list(batch["labels"])
        return loss

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        self.seen = dict(metrics)
        odd: dict[str, Any] = {
            "per_class": metrics["histogram"],
            "names": ["a"],
            "share": np.float32(0.25),
            "zero_d": torch.tensor(3),
            "undefined": float("nan"),
        }
        return super().summarize(total, count, metrics, stats) | odd


@given(batch_rows=st.integers(1, 9), seed=st.integers(0, 50), limit=st.integers(0, 7))
@settings(max_examples=15, deadline=None)
def test_sums_and_lists_do_not_depend_on_the_batch(batch_rows: int, seed: int, limit: int) -> None:
    goal, rows = _Counting(objective()), Rows(7, seed=seed)
    figures = evaluate_rows(goal, rows, CPU, batch_rows=batch_rows, limit=limit)
    take = range(7) if limit in (0, 7) else [i * 7 // limit for i in range(limit)]
    labels: list[int] = []
    for row in take:
        ids, documents = rows[row]["input_ids"], rows[row]["document_ids"]
        inside = (documents[:-1] == documents[1:]) & (documents[:-1] != 0)
        labels += [int(label) for label in ids[1:][inside]]
    assert goal.seen["labels"] == labels and len(goal.seen["rows"]) == len(take)
    assert goal.seen["histogram"].dtype == torch.float64
    want = np.bincount(np.array(labels) % KINDS, minlength=KINDS)
    assert np.array_equal(np.asarray(goal.seen["histogram"]), want)
    assert isinstance(goal.seen["accuracy"], float) and figures["targets"] == len(labels)
    assert figures["accuracy"] == goal.seen["accuracy"] / len(labels)


def test_figures_are_plain_numbers() -> None:
    figures = evaluate_rows(_Counting(objective()), Rows(4), CPU, batch_rows=2)
    assert set(figures) == {"loss", "accuracy", "share", "zero_d", "undefined", "targets"}
    assert all(type(value) is float for value in figures.values())
    assert figures["share"] == 0.25 and figures["zero_d"] == 3.0 and np.isnan(figures["undefined"])


def test_the_default_summary_divides_numbers_and_leaves_the_rest() -> None:
    goal = Objective(objective().model)
    metrics = {"correct": 3.0, "table": torch.ones(2, 2), "pairs": [1, 2]}
    assert goal.summarize(8.0, 4.0, metrics, {}) == {"loss": 2.0, "correct": 0.75}


def test_a_large_count_is_summed_without_rounding() -> None:
    """2^24 + 1 ones: an fp32 sum would lose the last."""

    class Big(_Counting):
        def forward(self, batch: Any) -> Loss:
            loss = super().forward(batch)
            first = bool((batch["input_ids"] == rows[0]["input_ids"][0]).all(0)[0])
            loss.metrics["histogram"] = torch.tensor([2.0**24 if first else 1.0])
            return loss

    rows = Rows(2)
    rows[1]["input_ids"][0] = rows[0]["input_ids"][0] + 1
    goal = Big(objective())
    evaluate_rows(goal, rows, CPU, batch_rows=1)
    assert goal.seen["histogram"].tolist() == [2.0**24 + 1]


@pytest.mark.parametrize("later", [torch.zeros(3), [1, 2], torch.zeros(())])
def test_a_metric_that_changes_its_shape_is_named(later: Any) -> None:
    class Changing(_Counting):
        calls = 0

        def forward(self, batch: Any) -> Loss:
            loss = super().forward(batch)
            Changing.calls += 1
            loss.metrics["histogram"] = torch.zeros(2) if Changing.calls == 1 else later
            return loss

    with pytest.raises(TrainingError, match="'histogram' of Changing.*return a list"):
        evaluate_rows(Changing(objective()), Rows(4), CPU, batch_rows=2)


@pytest.mark.parametrize(
    ("monitor", "rows", "evaluations"),
    [("loss", 4, 10), ("loss", 150, 8), ("accuracy", 150, 10)],
)
def test_evaluations_come_as_often_as_they_are_worth(
    tmp_path: Path, monitor: str, rows: int, evaluations: int
) -> None:
    """Less often if they are most of the work, unless a figure that scatters chooses the best of them."""
    task = trainer(
        tmp_path,
        objective(),
        Rows(16),
        eval_rows=Rows(rows, seed=5),
        limit="80 steps",
        batch_rows=2,
        monitor=monitor,
        eval_every="auto",
    )
    assert sum("eval" in record for record in task.fit().history) == evaluations
