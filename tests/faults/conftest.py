"""What the product writes, made once for the tests that damage it or plant links in its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import products, watched


@pytest.fixture(scope="session")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Path], list[tuple[str, bool]]]:
    """Where it lies, name -> directory of each product, and what was opened for writing."""
    work = tmp_path_factory.mktemp("products")
    with watched.watching() as opened:
        found = products.make(work)
    return work, found, opened
