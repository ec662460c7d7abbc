"""What the first lines of a run suggest for text that is read several times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain
from pretrain.training.preflight import most_repeated, remarks, suggest
from tiny import TEXTS, objective, prepared_rows


@pytest.mark.parametrize(
    ("epochs", "muon", "decay"),
    [(1, False, False), (2, True, False), (10, True, False), (11, True, True), (21, False, False)],
)
def test_small_text_is_given_the_recipe_of_its_epochs(
    tmp_path: Path, epochs: float, muon: bool, decay: bool
) -> None:
    rows = prepared_rows(tmp_path, TEXTS, 16)
    trainer: Any = SimpleNamespace(
        train_data=rows,
        about={},
        optim=SimpleNamespace(name="adamw"),
        lr_reason="chosen for the width",
        objective=objective(),
    )
    said = suggest(trainer, epochs) or ""
    assert ("optim.name=muon" in said, "optim.weight_decay=1, dropout=0.1" in said) == (muon, decay)
    for other in (
        {"about": {"parent": "base"}},
        {"optim": SimpleNamespace(name="muon")},
        {"lr_reason": ""},
        {"objective": objective("MaskedLM")},
        {"train_data": [{}]},
    ):
        assert suggest(SimpleNamespace(**vars(trainer) | other), epochs) is None  # type: ignore[arg-type]


def test_the_source_of_a_mixture_that_is_read_most_is_named(tmp_path: Path) -> None:
    """An epoch has as many rows as all sources, so the share of a small one is many readings of it."""
    (tmp_path / "large.txt").write_text(" ".join(f"word{i}" for i in range(2000)))
    (tmp_path / "small.txt").write_text(" ".join(f"term{i}" for i in range(100)))
    sources = {str(tmp_path / "large.txt"): 1, str(tmp_path / "small.txt"): 1}
    found = pretrain.prepare(sources, tmp_path / "data", vocab_size=300, row_length=32, valid=0.0)
    name, repeats = most_repeated(found.train)
    large, small = found.train.source_rows
    assert name.endswith("small.txt") and repeats == pytest.approx((large + small) / 2 / small, 0.1)
    trainer: Any = SimpleNamespace(
        train=SimpleNamespace(batch_rows=large + small),
        train_data=found.train,
        eval_data=None,
        setup=SimpleNamespace(plan=SimpleNamespace(epoch_rows=large + small)),
        about={"parent": "base"},
        objective=objective(),
    )
    line = remarks(trainer, 4)[1]  # of four epochs
    assert f"small.txt is read {4 * repeats:.0f} times" in line and "a smaller share of it" in line
    assert most_repeated(prepared_rows(tmp_path, TEXTS, 16)) == ("every text", 1.0)
