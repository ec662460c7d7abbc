"""Number of steps of a run, and size of its micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import torch

from pretrain.config import TrainConfig, parse_limit
from pretrain.data.loader import Examples, Loader, row_rngs
from pretrain.data.order import Order
from pretrain.errors import ConfigError
from pretrain.nn.device import tokens_at_once
from pretrain.objectives.base import Objective
from pretrain.training.state import RunState

__all__ = ["Plan", "choose_micro_rows", "mean_length", "resolve_amounts", "row_length"]

# Rows, drawn at random, whose units are counted where the data record none; the first number suffices if all are alike.
_COUNTED = (16, 512)

# Automatic amounts: rows of a step, with the fewest steps of an epoch; steps of a run, with the most epochs.
_BATCHES, _EPOCH_STEPS = (32, 16, 8), 32
_STEPS, _EPOCHS = 500, 10


def resolve_amounts(train: TrainConfig, data: Examples) -> TrainConfig:
    """Return the settings with an automatic batch size and an automatic limit replaced by numbers for these rows.

    Both depend on the number of rows only, never on the machine, so that a run can be repeated and resumed anywhere.
    """
    limit, batch = train.limit, train.batch_rows
    if batch and limit != "auto":
        return train
    rows = Loader(data, seed=0).epoch_length if len(data) else 0
    if not batch:
        batch = next((size for size in _BATCHES if rows >= size * _EPOCH_STEPS), _BATCHES[-1])
        while batch > max(rows, 1):
            batch //= 2
        micro = train.micro_rows or 1
        batch = max(batch // micro, 1) * micro
    if limit == "auto":
        steps = max(1, math.ceil(rows / batch))
        limit = f"{min(_EPOCHS, math.ceil(_STEPS / steps))} epochs"
    return dataclasses.replace(train, limit=limit, batch_rows=batch)


def row_length(data: Examples, objective: Objective) -> int:
    """Return the units of the longest row: as the data record it, else those of the first row and its padding."""
    if longest := int(getattr(data, "longest", 0)):
        return longest
    first = data[0]
    if objective.unit_name == "tokens" and "input_ids" in first:
        return len(first["input_ids"])
    return max(1, objective.units(objective.collate([first], row_rngs(0, "collate", 0, 1))))


def mean_length(data: Examples, objective: Objective) -> float:
    """Return the mean units per row; padding counts if all rows are padded to one length."""
    if not getattr(data, "longest", 0):
        return float(row_length(data, objective))
    return max(1.0, float(getattr(data, "num_tokens", 0)) / len(data))


def choose_micro_rows(
    train: TrainConfig,
    data: Examples,
    objective: Objective,
    device: torch.device,
    *,
    share: int = 0,
    even: bool = False,
    most: int = 0,
) -> int:
    """Return the rows per forward pass: as configured, else the largest divisor of the share within a budget of units.

    Rows of unequal length must fit the budget on average, and the longest rows four times the budget.

    Args:
        train: batch settings.
        data: provides the row lengths.
        objective: counts the units of a row; may couple the rows of a batch.
        device: determines the budget.
        share: rows of a global batch per rank; 0 is all of them.
        even: make the same choice for 1, 2, 4 and 8 ranks, as far as the batch is divisible.
        most: rows that fit into memory, which limit an automatic choice; 0 is no limit.

    Raises:
        ConfigError: the share is not a multiple of the micro-batch, or the objective couples its examples and the
            batch would be split.
    """
    share = share or train.batch_rows
    rows = train.micro_rows
    if rows == 0:
        whole = math.gcd(train.batch_rows, 8) if even else 1
        tokens = tokens_at_once(device)
        mean, longest = mean_length(data, objective), row_length(data, objective)
        budget = max(1, min(int(tokens / mean), 4 * tokens // longest))
        budget = min(budget, most) if most and not even else budget
        cut = train.batch_rows // whole if even else share
        rows = max(d for d in range(1, cut + 1) if cut % d == 0 and d <= budget)
        rows = share if objective.couples_examples else rows
    if share % rows:
        near = [d for d in range(1, share + 1) if share % d == 0]
        of = f" ({share} for each process)" if share != train.batch_rows else ""
        raise ConfigError(
            f"train.batch_rows {train.batch_rows}{of} is no multiple of train.micro_rows {rows}. "
            f"micro_rows may be one of {', '.join(map(str, near))}."
        )
    if objective.couples_examples and rows != share:
        each = "" if share == train.batch_rows else f", of which each process takes {share}"
        raise ConfigError(
            f"{type(objective).__name__} compares the rows of a batch with each other, so its loss does not add "
            f"up over micro-batches: leave train.micro_rows out (0). A batch has {train.batch_rows} rows{each}; start "
            "more processes to give each of them fewer."
        )
    return rows


class Plan:
    """Convert ``train.limit`` to optimizer steps.

    Steps and epochs are exact and known before step 0, tokens by the mean of the rows. Minutes are those of training,
    without start-up, and are converted by the measured pace, again after every step, so that the schedule ends when
    the time does.
    """

    def __init__(
        self, train: TrainConfig, data: Examples, objective: Objective, epoch_rows: int
    ) -> None:
        self.limit = parse_limit(train.limit)
        self._text = train.limit
        self._batch_rows = train.batch_rows
        self.epoch_rows = epoch_rows
        self._data, self._objective = data, objective
        self._kept = 0
        self._first: tuple[float, int] | None = None
        # Seconds kept for the last evaluation and the last checkpoint; of a short limit in minutes a tenth of it.
        self.reserve = min(1.0, 6 * self.limit.value)

    @functools.cached_property
    def units_per_row(self) -> float:
        """Mean units of the rows that training visits, without padding: as the data record it, else counted."""
        data, objective = self._data, self._objective
        if recorded := getattr(data, "tokens_per_row", 0):
            return float(recorded)
        if tokens := getattr(data, "num_tokens", 0):
            return float(tokens / len(data))
        # Rows that are compared with each other are counted by whole batches, because fewer may be no batch.
        size = min(self._batch_rows, len(data)) if objective.couples_examples else 1
        order, counts = Order(len(data)), list[int]()
        for most in _COUNTED:
            if len(set(counts)) != 1:
                rows = order.indices(0, min(max(most, size), len(data))).tolist()
                groups = (rows[i : i + size] for i in range(0, len(rows) - size + 1, size))
                batches = (
                    objective.collate(
                        [data[i] for i in group], row_rngs(0, "collate", group[0], size)
                    )
                    for group in groups
                )
                counts = [objective.units(batch) for batch in batches]
        return max(1.0, sum(counts) / len(counts) / size)

    def keep(self, state: RunState) -> None:
        """Keep the steps of a run that goes on with its limit, by whichever rule they were counted."""
        if state.limit == self._text:
            self._kept = state.total_steps

    def total_steps(self, seconds_per_step: float = 1.0) -> int:
        """Return the steps of the whole run; ``seconds_per_step`` is used for a limit in minutes only."""
        value = self.limit.value
        if self._kept and self.limit.kind != "minutes":
            return self._kept
        if self.limit.kind == "steps":
            return max(1, int(value))
        if self.limit.kind == "epochs":
            return max(1, math.ceil(round(value * self.epoch_rows / self._batch_rows, 6)))
        if self.limit.kind == "tokens":
            return max(1, math.ceil(value / (self.units_per_row * self._batch_rows)))
        return max(1, int(value * 60 / max(seconds_per_step, 1e-6)))

    def first_total(self, state: RunState, seconds_per_step: float) -> int:
        """Return the steps of the whole run when it starts or resumes, possibly with another limit."""
        if self.limit.kind != "minutes":
            return self.total_steps()
        if state.limit == self._text:
            return state.total_steps
        left = self.limit.value * 60 - state.seconds
        fewest = 0 if state.step else 1
        return state.step + max(fewest, int(left / max(seconds_per_step, 1e-6)))

    def replan(self, state: RunState, broadcast: Callable[[int], int] = int) -> int:
        """Return the steps of the whole run, estimated after a step; broadcast, because clocks differ."""
        return (
            state.total_steps if self.limit.kind != "minutes" else broadcast(self._replanned(state))
        )

    def _replanned(self, state: RunState) -> int:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, state.step)
        left = self.limit.value * 60 - self.reserve - state.seconds
        if left <= 0:
            return state.step
        steps = state.step - self._first[1]
        if steps < 3:
            return max(state.total_steps, state.step + 1)
        return state.step + max(1, int(left * steps / (now - self._first[0])))
