"""Settings of all tests: one thread per process, no network, a cache of their own, and the shared data sets."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Before torch is imported anywhere: several test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# A shell that starts the tests in the background lets them ignore Ctrl-C, and their children, too; some are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
_made: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """One cache for all processes of a test run; a user's own is neither read nor filled."""
    if not hasattr(config, "workerinput"):
        _made.append(tempfile.mkdtemp(prefix="pretrain-tests-"))
        os.environ["PRETRAIN_CACHE"] = _made[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def data_sets() -> Path:
    """Folder of the shared data sets; tests that need it are skipped where it is not, and fail in CI."""
    folder = Path(os.environ.get("PRETRAIN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"no data sets in {folder}; set PRETRAIN_TEST_DATA")
        pytest.skip(f"no data sets in {folder}; set PRETRAIN_TEST_DATA")
    return folder
