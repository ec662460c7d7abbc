"""The contract that every objective keeps, on the objectives of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract import check_objective
from tiny import Rows, objective


@pytest.mark.parametrize("kind", ["NextToken", "MaskedLM"])
def test_contract(tmp_path: Path, kind: str) -> None:
    check_objective(lambda: objective(kind), Rows(16), tmp_path)
