"""Several processes started from one: what comes back, what is shown, what happens when they fail or are stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pretrain
from pretrain.distributed.launch import Launched
from pretrain.errors import CheckpointError, ConfigError, DataError, DistributedError
from pretrain.training.launch import on_devices, read_run
from pretrain.utils.run_log import read_log

# An objective of the user's own, on the caller's path of modules, in which the second process comes to grief.
BROKEN = """
import os
from pretrain import NextToken
class Broken(NextToken):
    calls = 0
    def forward(self, batch):
        Broken.calls += 1
        if os.environ.get("RANK") == "1" and Broken.calls == 5:
            {what}
        return super().forward(batch)
"""

# For the processes of this one the disk is full after a few steps.
FULL = """
import errno, os
from pretrain import NextToken
from pretrain.utils import files
def write(descriptor, data):
    raise OSError(errno.ENOSPC, "by hand")
class Full(NextToken):
    calls = 0
    def forward(self, batch):
        Full.calls += 1
        if "RANK" in os.environ and Full.calls == 5:
            files.IO.write = write
        return super().forward(batch)
"""


def sections(**train: Any) -> dict[str, Any]:
    return {
        "data": {"train": "books", "vocab_size": 300, "row_length": 32, "valid": 0.2, "workers": 1},
        "model": {"family": "gpt2", "size": "tiny"},
        "parallel": {"device": "cpu", "threads": 1},
        "train": {"out": "runs/one", "limit": "6 steps", "batch_rows": 4, "log_every": 1} | train,
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with some text, and temporary files beside it: none of them may be left."""
    work, spare = tmp_path / "work", tmp_path / "spare"
    for folder in (work / "books", spare):
        folder.mkdir(parents=True)
    for number in range(12):
        text = " ".join(f"Book {number}: ship {i} sailed at dawn." for i in range(40))
        (work / "books" / f"{number}.txt").write_text(text)
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield work
    assert not processes(spare)


def processes(word: Path) -> list[int]:
    """Processes in whose command line a path stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(word) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def eventually(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.1)
    return False


def strike(run: Path) -> None:
    """Interrupt this process after some steps of a run, as the button of a notebook does it."""

    def later() -> None:
        eventually(lambda: (run / "log.jsonl").exists() and len(losses(run)) > 8, 120)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=later, daemon=True).start()


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_log(run / "log.jsonl") if "lr" in r]


# -------------------------------------------------------------------------------------------- the whole way


def test_two_processes_give_what_one_gives(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same losses, the same run, shown while it goes."""
    alone = pretrain.train(**sections(out="runs/alone"))
    capfd.readouterr()
    run = pretrain.train(devices=2, **sections())
    shown = capfd.readouterr().err
    assert "2 ranks" in shown and "validation: loss" in shown and "done at step 6" in shown
    assert shown.count("validation:") == sum("eval" in r for r in run.history)
    assert run.path == Path("runs/one") and (run.step, run.stopped) == (6, "limit")
    assert losses(run.path) == pytest.approx(losses(alone.path), rel=2e-2)
    assert run.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=2e-2)
    assert run.checkpoint is not None and run.checkpoint.name == "checkpoint-6" and run.best
    assert repr(run).replace("one", "alone")[:40] == repr(alone)[:40]
    assert not list(Path(tempfile.gettempdir()).glob("pretrain-*")), "nothing temporary is left"


@pytest.mark.slow
def test_the_same_call_finds_nothing_left_to_do(place: Path) -> None:
    run = pretrain.train(devices=2, **sections())
    again = pretrain.train(devices=2, **sections())
    assert again.step == 6 and again.history == run.history


@pytest.mark.slow
def test_a_task_is_tuned_on_two_and_opened_here(place: Path) -> None:
    rows = [f"{'good' if i % 2 else 'bad'} film {i},{'yes' if i % 2 else 'no'}" for i in range(60)]
    Path("films.csv").write_text("\n".join(["text,label", *rows]))
    pretrain.train(**sections(out="runs/base", limit="2 steps"))
    options: dict[str, Any] = {"task": "classification", "device": "cpu", "limit": "4 steps"}
    tuned = pretrain.finetune("runs/base", "films.csv", out="runs/t", devices=2, **options)
    assert tuned.run.step == 4 and set(tuned.predict("good film")) >= {"label"}
    assert tuned.metrics["loss"] > 0 and tuned.metrics.keys() >= tuned.trivial.keys() & {"accuracy"}


# ------------------------------------------------------------------------------------------- what goes wrong


def test_an_error_of_a_process_is_raised_as_it_was(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the class that it had there, without the noise of the launcher, and nothing stays behind."""
    with pytest.raises(DataError) as caught:
        pretrain.train(devices=2, **(sections() | {"data": {"train": "nowhere.txt"}}))
    assert "nowhere.txt" in str(caught.value) and "Traceback" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not list(Path(tempfile.gettempdir()).glob("pretrain-*"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        pytest.param(
            "raise ZeroDivisionError('by hand')",
            "ZeroDivisionError: by hand",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_breaks_is_named_with_its_last_lines(
    place: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    """The objective lies where only the caller's sys.path leads; the output of all processes is kept."""
    (place / "own").mkdir()
    (place / "own" / "broken_objective.py").write_text(BROKEN.format(what=what))
    monkeypatch.syspath_prepend(str(place / "own"))
    with pytest.raises(DistributedError) as caught:
        pretrain.train(devices=2, **sections(), objective="broken_objective.Broken")
    text = str(caught.value)
    assert "Process 1 of 2" in text and said in text, text
    kept = Path(text.rsplit(" lies in ", 1)[1].rstrip("."))
    assert sorted(p.parent.name for p in kept.glob("**/stderr.log")) == ["0", "1"]


@pytest.mark.slow
def test_an_interrupt_saves_the_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    strike(Path("runs/one"))
    run = pretrain.train(devices=2, **sections(limit="100000 steps"))
    assert run.stopped == "SIGINT" and run.exit_code == 130 and run.step > 2
    assert run.checkpoint is not None and run.checkpoint.name == f"checkpoint-{run.step}"
    assert "saves and stops" in capfd.readouterr().err
    assert read_run(run.path, "SIGINT").history == run.history


@pytest.mark.slow
def test_an_interrupt_does_not_hide_that_nothing_was_saved(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps since the last checkpoint are lost, which the caller must hear."""
    (place / "full_objective.py").write_text(FULL)
    monkeypatch.syspath_prepend(str(place))
    objective = "full_objective.Full"
    pretrain.train(**sections(limit="2 steps"), objective=objective)
    strike(Path("runs/one"))
    with pytest.raises(CheckpointError, match="The disk is full"):
        pretrain.train(devices=2, **sections(limit="100000 steps"), objective=objective)


@pytest.mark.slow
def test_where_the_name_of_the_host_leads_does_not_matter(place: Path) -> None:
    """As on a laptop in a foreign network: no packet gets to the address that the name has."""
    inside = ["unshare", "-r", "-u", "-m", "sh", "-ec"]
    (place / "hosts").write_text("127.0.0.1 localhost\n192.0.2.1 elsewhere\n")
    rename = "hostname elsewhere; mount --bind hosts /etc/hosts"
    if not shutil.which("unshare") or subprocess.run([*inside, rename]).returncode:
        pytest.skip("needs Linux and permission for namespaces")
    code = f"import pretrain; print(pretrain.train(devices=2, **{sections()!r}).step)"
    env = {**os.environ, "TMPDIR": str(tempfile.gettempdir())}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    words = [*inside, f'{rename}; exec "$0" -c "$1"', sys.executable, code]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as caller:
        try:
            assert caller.communicate(timeout=90)[0].split()[-1:] == ["6"]
        finally:
            caller.kill()  # the rest ends with it


@pytest.mark.slow
def test_nobody_outlives_the_caller(place: Path) -> None:
    """Killed without a chance to clean up, it leaves no process behind, and a run that is saved."""
    code = f"import pretrain\npretrain.train(devices=2, **{sections(limit='100000 steps')!r})"
    env = {**os.environ, "TMPDIR": str(tempfile.gettempdir())}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    caller = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    spare = Path(tempfile.gettempdir())
    assert eventually(lambda: len(losses(Path("runs/one"))) > 2, 120)
    assert len(processes(spare)) == 2
    caller.kill()
    caller.wait()
    assert eventually(lambda: not processes(spare), 60)
    assert read_run(Path("runs/one"), "SIGTERM").step > 2


@pytest.mark.slow
def test_a_notebook_shows_the_run_in_its_cell(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel in which other work has been done already."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    cells = [
        "import torch; torch.randn(8).sum().item(); import pretrain",
        f"run = pretrain.train(devices=2, **{sections()!r}); run",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    nbclient.NotebookClient(notebook, timeout=170, kernel_name="python3").execute()
    pages = [o.get("data", {}).get("text/html", "") for o in notebook.cells[1].outputs]
    (live,) = [page for page in pages if 'class="pt view live"' in page]
    assert "step 6 of 6" in live and "done" in live and "2 ranks" in live
    assert any('class="pt view run"' in page and "<p>Run(" in page for page in pages)


# ---------------------------------------------------------------------------------------------- small parts


def test_none_runs_on_after_the_launch(place: Path) -> None:
    """Also one that hears no signal that it could answer."""
    spare = Path(tempfile.gettempdir())
    settings = pretrain.RunConfig.load(sections(limit="100000 steps"))
    config = settings.save(spare / "train.yaml")
    with Launched(["train", "--config", str(config)], 2) as group:
        assert eventually(lambda: len(processes(spare)) == 2, 60)
        os.killpg(group._processes[0].pid, signal.SIGSTOP)
        assert group.running()
    assert not processes(spare) and not group.folder.exists()


def test_what_other_processes_cannot_have_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        pretrain.train(devices=2, hooks=[print], **sections())
    rows = [{"text": "a", "label": "b"}]
    with pytest.raises(ConfigError, match="train \\(a list\\)"):
        pretrain.finetune("runs/base", rows, task="classification", devices=2)
    with pytest.raises(ConfigError, match="Model"):
        pretrain.finetune(pretrain.build("bert", "tiny"), "a.csv", task="classification", devices=2)
    with pytest.raises(ConfigError, match="compare"):
        pretrain.finetune("m", "a.csv", task="classification", devices=2, compare="scratch")
    settings = pretrain.RunConfig.load(sections())
    assert on_devices("train", settings, 1) is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (
        on_devices("train", settings, 4) is None and on_devices("train", settings, "auto") is None
    )
    with pytest.raises(ConfigError, match="one of 4"):
        on_devices("train", settings, 2)


def test_processes_that_cannot_start_say_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONHOME", "/nowhere")
        with Launched(["train"], 2) as group:
            while group.running():
                time.sleep(0.05)
            error = group.failure()
    assert "failed with exit code 1" in str(error) and "Fatal Python error" in str(error)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DistributedError, match="0 of 2 could not be started: No such file"):
        Launched(["train"], 2)
