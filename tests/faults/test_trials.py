"""A small sample of the trials of damage and of mutated input; the scripts take any number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from faults import damage_trials, fuzz_trials


def test_no_damage_is_silent(
    made: tuple[Path, dict[str, Path], list[tuple[str, bool]]],
) -> None:
    table = damage_trials.trials(60, 0, made[0], made=made[1])
    total = sum(table.values(), Counter())
    assert not total["SILENT"] and not total["CRASH"], damage_trials.show(table)
    assert total["error"] > 10 and total["named, same result"] > 2, damage_trials.show(table)


def test_only_our_errors_come_out(tmp_path: Path) -> None:
    table, failures = fuzz_trials.trials(250, 0, tmp_path)
    assert not failures, failures[0]
    total = sum(table.values(), Counter())
    assert total["read"] > 20 and total["PretrainError"] > 20


@pytest.mark.slow
def test_many_damages_and_inputs(tmp_path: Path) -> None:
    (tmp_path / "damage").mkdir()
    table = damage_trials.trials(1500, 1, tmp_path / "damage", large=True)
    total = sum(table.values(), Counter())
    assert not total["SILENT"] and not total["CRASH"], damage_trials.show(table)
    (tmp_path / "fuzz").mkdir()
    assert not fuzz_trials.trials(10_000, 1, tmp_path / "fuzz")[1]
