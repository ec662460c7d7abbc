"""The other arm: subsets in the shares of the classes, and a comparison from end to end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
from finetuning.conftest import QUICK, rows_of
from pretrain.errors import ConfigError, DataError
from pretrain.finetuning.compare import stratified_subset


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.data(), st.integers(0, 99))
def test_subsets_hold_every_class_in_its_share(keys: list[int], data: Any, seed: int) -> None:
    count = data.draw(st.integers(0, len(keys)))
    chosen = stratified_subset(keys, count, seed)
    assert len(chosen) == len(set(chosen)) == count and chosen == sorted(chosen)
    assert chosen == stratified_subset(keys, count, seed)
    whole, part = Counter(keys), Counter(keys[i] for i in chosen)
    for key, n in whole.items():
        assert abs(part[key] - count * n / len(keys)) < 1


def test_seeds_choose_other_rows() -> None:
    keys = [i % 3 for i in range(90)]
    assert len({tuple(stratified_subset(keys, 12, seed)) for seed in range(6)}) == 6


@pytest.mark.parametrize("keys", [[1, 2], None])
def test_more_rows_than_there_are(keys: Any) -> None:
    with pytest.raises(DataError, match="3 training rows"):
        stratified_subset(keys, 3, 0)


def compared(checkpoint: str, out: Path, rows: Any = None, **given: Any) -> Any:
    options = {
        **QUICK,
        "lrs": [1e-2],
        "limit": "3 steps",
        "seeds": 2,
        "compare": "scratch",
        "out": out,
    }
    return pretrain.finetune(checkpoint, rows or rows_of(60), "classification", **(options | given))


@pytest.mark.parametrize("tested", [True, False])
def test_both_arms_and_the_baselines(checkpoint: str, tmp_path: Path, tested: bool) -> None:
    more = {"test": rows_of(20, 7)} if tested else {}
    result = compared(checkpoint, tmp_path / "run", label_counts=[12, 30], **more)
    found = result.comparison
    assert found.metric == "accuracy" and list(found.counts) == [12, 30]
    assert set(found.arms) == {"pretrained", "scratch", "tfidf", "lsa", "probe"}
    for by_count in found.arms.values():
        assert all(
            len(scores) == 2 and all(0 <= x <= 1 for x in scores) for scores in by_count.values()
        )
    assert found.test_rows == (20 if tested else 7)
    table = found.table()
    assert "from scratch" in table and "TF-IDF" in table
    assert not list(tmp_path.glob("*.trial"))
    assert result.metrics and result.run.step == 3


def test_scores_are_those_of_the_trial(checkpoint: str, tmp_path: Path) -> None:
    """Called again it gives the same figures."""
    first = compared(checkpoint, tmp_path / "a").comparison
    again = compared(checkpoint, tmp_path / "a").comparison
    assert first.arms == again.arms


def test_comparisons_that_cannot_be(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds"):
        compared(checkpoint, tmp_path / "a", seeds=1)
    with pytest.raises(DataError, match="500 training rows"):
        compared(checkpoint, tmp_path / "b", label_counts=[500])
    with pytest.raises(DataError, match="held-out"):
        compared(checkpoint, tmp_path / "c", valid=0)


def test_asking_for_all_rows_allows_for_those_that_recur():
    from pretrain.finetuning.compare import _counts

    assert _counts(None, 511, 1) == [511]
    assert _counts([128, 512], 511, 1) == [128, 511]
    assert _counts([513, 128], 511, 1) == [128, 513]  # refused later: there are not so many
