"""Settings of all tests: one thread per process, no network, folders and a cache of their own, the shared data sets."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import TOKEN, FakeHub

# Before torch is imported anywhere: several test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# Collecting imports and builds much and throws little away.
gc.disable()

# A shell that starts the tests in the background lets them ignore Ctrl-C, and their children, too; some are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
# Folders of tests lie in memory where there is room: they hold many small files that are flushed to the disk, which
# takes a fifth of the time of all tests.
_MEMORY, _ROOM = Path("/dev/shm"), 6 << 30
_made: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """One cache for all processes of a test run; a user's own is neither read nor filled."""
    if not hasattr(config, "workerinput"):
        if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))
        _made.append(tempfile.mkdtemp(prefix="pretrain-tests-"))
        os.environ["PRETRAIN_CACHE"] = _made[0]


def pytest_collection_finish() -> None:
    """Keep what is imported out of later garbage collections, of which every training run makes several."""
    if (
        "PYTEST_XDIST_WORKER" in os.environ
    ):  # many tests: what most of them import at last is imported at once
        for name in ("pandas", "sklearn.linear_model", "torch._dynamo", "torch.distributed.fsdp"):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    frozen = gc.get_freeze_count()
    gc.get_freeze_count = lambda: frozen  # a training run asks, and counting walks all of them


@pytest.hookimpl(tryfirst=True)  # the first answer ends this hook, and the loop of xdist answers
def pytest_runtestloop() -> None:
    """Collect garbage again, in the processes that run tests and in the one that distributes them."""
    gc.enable()


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on loopback with a cache of its own, for this process and its children, in an empty working directory."""
    from huggingface_hub import constants

    with FakeHub() as served:
        cache = tmp_path / "cache" / "hub"
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for key, value in {
            "HF_ENDPOINT": served.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        }.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield served
