"""What the first lines of a run suggest for text that is read several times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.training.preflight import suggest
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
