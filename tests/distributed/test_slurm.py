"""The batch script: bash can read it, and it runs end to end where the commands of SLURM are small scripts.

They are played after SLURM 22.05: `srun` that gets SIGTERM kills its tasks, `scancel --signal` reaches the tasks alone
and is lost on those that do not run yet, plain `scancel` reaches the tasks and the batch shell.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

from pretrain.checkpoint import latest, verify
from pretrain.cli import main as cli
from pretrain.distributed.slurm import script
from pretrain.errors import ConfigError

CONFIG = """
data: {{train: books, vocab_size: 300, row_length: 32, valid: 0.2, cache: cache, workers: 1}}
model: {{family: gpt2, size: tiny}}
train: {{out: runs/one, limit: {limit}, batch_rows: 4, eval_rows: 2, log_every: 1}}
parallel: {{device: cpu}}
"""
# Starts the command once for each task, on "hosts" that are this machine.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
words, options = sys.argv[1:], {{}}
while words[0].startswith("--"):
    key, _, value = words.pop(0).partition("=")
    options[key] = value
def kill(*_):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
signal.signal(signal.SIGTERM, kill)
with open("steps.txt", "a") as file:
    file.write(" ".join(words[-4:]).replace("\\n", " ") + "\\n")
tasks = []
for node in range(int(options["--ntasks"])):
    env = {{**os.environ, "SLURM_NODEID": str(node), "SLURMD_NODENAME": "localhost"}}
    tasks.append(subprocess.Popen(words, env=env, start_new_session=True))
with open("tasks.txt", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
while None in [task.poll() for task in tasks]:
    if options.get("--kill-on-bad-exit") == "1" and any(task.returncode for task in tasks):
        kill()
    time.sleep(0.02)
os.remove("tasks.txt")
sys.exit(next((abs(task.returncode) for task in tasks if task.returncode), 0))
"""
SCANCEL = """#!/bin/bash
echo "$*" >> scancel.txt
for task in $(cat tasks.txt 2>/dev/null); do kill -TERM "$task"; done
case "$1" in --signal=*) ;; *) kill -TERM "$(cat shell.txt)" ;; esac
"""
# More hosts than a pipe holds: whoever reads one line and leaves ends this by SIGPIPE.
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; seq -f host%g 20000; else echo "$*" >> scontrol.txt; fi
"""
# `date` is called between two steps; where there is a file `between`, the first step is followed by its signal.
DATE = """#!/bin/bash
if [ -e between ] && [ -e steps.txt ]; then
  kill -"$(cat between)" "$(cat shell.txt)"; rm between
fi
echo now
"""
# Stands for Python where a test is about the script alone. Training ends when it is asked to, the first host last.
PLAYED = """#!/bin/bash
case "$*" in *" train "*) ;; *) exit ;; esac
trap 'sleep 1.5; echo >> saved; exit 143' TERM
[ "$SLURM_NODEID" = 0 ] || trap 'exit 143' TERM
echo >> trains
for i in {1..400}; do sleep 0.05; done
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a config and data, and a PATH on which SLURM is played."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for number in range(12):
        text = " ".join(f"Book {number}: ship {i} sailed at dawn." for i in range(40))
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    (tmp_path / "a run.yaml").write_text(CONFIG.format(limit="4 steps"))
    tools = tmp_path / "tools"
    tools.mkdir()
    played = {
        "srun": SRUN.format(python=sys.executable),
        "scancel": SCANCEL,
        "scontrol": SCONTROL,
        "date": DATE,
        "played": PLAYED,
    }
    for name, text in played.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    own = {
        "PATH": f"{place / 'tools'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost,localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "1",
    }
    return {**os.environ, **own}


@contextlib.contextmanager
def begun(place: Path, job: Path, **own: str) -> Iterator[subprocess.Popen[bytes]]:
    """The script in a shell of its own, whose id is in ``shell.txt``; what it says is in ``out.txt``."""
    words = ["bash", "-c", 'echo $$ > shell.txt; exec bash "$0"', str(job)]
    with open(place / "out.txt", "w") as out:
        running = subprocess.Popen(
            words, env={**environment(place), **own}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def wait_until(ready: Callable[[], bool], running: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end and running.poll() is None:
        time.sleep(0.05)


def hurried(place: Path) -> Path:
    """The script, except that it takes a step for started after 3 seconds, not after 10."""
    job = written(place)
    before, text = "began + 10", job.read_text()
    assert text.count(before) == 1
    job.write_text(text.replace(before, "began + 3"))
    return job


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def written(place: Path, *options: str) -> Path:
    words = ["slurm", "--config", "a run.yaml", "--nodes", "2", "--gpus_per_node", "0", *options]
    assert cli.main([*words, "--out", "job.sbatch"]) == 0
    return place / "job.sbatch"


# ------------------------------------------------------------------------------------------------- the text


def test_a_second_file_of_settings_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "b.yaml").write_text("task: classification\n")
    assert cli.main(["slurm", "--config", "a run.yaml", "--config", "b.yaml", "--nodes", "2"]) == 2
    said = capsys.readouterr().err
    assert "one file of settings" in said
    assert "pretrain finetune --config 'a run.yaml' --config b.yaml --show_config" in said


def test_bash_reads_it_and_slurm_finds_its_options(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--nodes 8 --gpus_per_node 8 --time 2-00:00:00 --partition gpu,long --account lab --job_name big"
    (place / "a run.yaml").write_text("train: {batch_rows: 512}\n")
    assert cli.main(["slurm", "--config", "a run.yaml", *words.split()]) == 0
    text = capsys.readouterr().out
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert options.items() >= {
        ("nodes", "8"),
        ("gpus-per-node", "8"),
        ("ntasks-per-node", "1"),
        ("time", "2-00:00:00"),
        ("partition", "gpu,long"),
        ("account", "lab"),
        ("job-name", "big"),
        ("signal", "B:USR1@300"),
    }
    assert text.index("#SBATCH --signal") < text.index("set -euo"), (
        "options end at the first command"
    )
    assert "config='a run.yaml'" in text and "prepare --config" in text and "train --config" in text
    # Every variable of SLURM stands in quotes, or where bash does not split words.
    for line in text.splitlines():
        plain = re.sub(r"\"[^\"]*\"|\$?\(\(.*?\)\)|#.*", "", line)
        assert "$SLURM" not in plain, line


def test_torchrun_waits_for_a_run_that_saves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the grace less what it takes to queue the job again; torch 2.11 cannot be told to."""
    text = script("a run.yaml", nodes=1, gpus_per_node=1, grace=100)
    told = re.findall(r"^export (TORCH_ELASTIC\w+)=(\d+)$", text, re.M)
    assert [value for _, value in told] == ["80"]
    monkeypatch.setenv(*told[0])
    assert getattr(LaunchConfig(1, 1, 1), "shutdown_timeout", 80) == 80


def test_a_task_is_fine_tuned_without_a_step_of_its_own_for_the_data(place: Path) -> None:
    (place / "t.yaml").write_text(
        "data: {train: a.csv}\nmodel: {checkpoint: m}\ntask: {name: classification}\n"
    )
    text = script("t.yaml", nodes=2)
    assert "finetune --config" in text and "prepare" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": 1, "grace": 20}, "grace is 20; it must be at least 30"),
        ({"nodes": 3}, "numbers of processes"),
        ({"nodes": 1, "config": "cut.yaml"}, "parallel.tp of cut.yaml is 4, which does not divide"),
        (
            {"nodes": 2, "config": "automatic.yaml"},
            "train.batch_rows of automatic.yaml is automatic",
        ),
    ],
)
def test_what_would_lose_the_run_is_refused(
    place: Path, options: dict[str, object], said: str
) -> None:
    (place / "automatic.yaml").write_text("train: {micro_rows: 12}\n")
    (place / "cut.yaml").write_text("parallel: {tp: 4}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        script(**({"config": "a run.yaml", "gpus_per_node": 1} | options))  # type: ignore[arg-type]
    assert "automatic.yaml" in script("automatic.yaml", nodes=1, gpus_per_node=1)


def test_a_wrong_config_is_refused_before_it_is_in_the_queue(place: Path) -> None:
    (place / "a run.yaml").write_text("train: {batch_row: 3}\n")
    assert cli.main(["slurm", "--config", "a run.yaml", "--nodes", "2"]) == 2


# ---------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_two_hosts_train_one_model(place: Path) -> None:
    """Data first, then the check, then one process on each of two "hosts"; all of them leave."""
    job = written(place)
    done = subprocess.run(
        ["bash", str(job)],
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = (place / "steps.txt").read_text().splitlines()
    assert len(steps) == 3
    assert steps[0].endswith("prepare --config a run.yaml") and steps[1].endswith("doctor")
    assert steps[2].endswith("train --config a run.yaml")
    assert "no problems found" in done.stdout and "x 2 ranks" in done.stderr
    found = latest(place / "runs" / "one")
    assert found is not None and found.name == "checkpoint-4"
    assert not (place / "scontrol.txt").exists()


@pytest.mark.slow
def test_before_the_time_is_up_the_run_is_saved_and_queued_again(place: Path) -> None:
    (place / "a run.yaml").write_text(CONFIG.format(limit="100000 steps"))
    log = place / "runs" / "one" / "log.jsonl"
    with begun(place, written(place)) as running:
        wait_until(lambda: lines(log) > 0, running, 120)
        assert latest(place / "runs" / "one") is None  # nothing but the signal makes it save
        running.send_signal(signal.SIGUSR1)
        code = running.wait(timeout=60)
    said = (place / "out.txt").read_text()
    assert code != 0 and "goes back into the queue" in said, said
    assert (place / "scancel.txt").read_text() == f"--signal=TERM {os.getpid()}\n"
    assert (place / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    found = latest(place / "runs" / "one")
    assert found is not None, said
    verify(found)


# ------------------------------------------------------------------- signals, where Python is played as well


def test_the_time_is_up_once_and_no_host_is_cut_short(place: Path) -> None:
    """One host leaves at once, the other saves for a while; a second warning asks nobody again."""
    with begun(place, hurried(place), PYTHON="played") as running:
        wait_until(lambda: lines(place / "trains") == 2, running, 30)
        running.send_signal(signal.SIGUSR1)
        wait_until((place / "scancel.txt").exists, running, 30)
        running.send_signal(signal.SIGUSR1)
        code = running.wait(timeout=30)
    assert code == 143 and lines(place / "saved") == 1, (place / "out.txt").read_text()
    assert lines(place / "scancel.txt") == 1
    assert (place / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"


def test_a_step_that_is_being_started_is_asked_when_it_can_hear(place: Path) -> None:
    """SLURM drops a signal to tasks that do not run yet, and says nothing."""
    srun = place / "tools" / "srun"
    srun.write_text(srun.read_text().replace("tasks = []", "tasks = []; time.sleep(1.5)", 1))
    with begun(place, hurried(place), PYTHON="played") as running:
        wait_until(lambda: lines(place / "steps.txt") == 3, running, 30)
        running.send_signal(signal.SIGUSR1)
        code = running.wait(timeout=40)
    assert code == 143 and lines(place / "saved") == 1, (place / "out.txt").read_text()
    assert (place / "scontrol.txt").exists()


@pytest.mark.parametrize("warned", [False, True])
def test_a_job_that_its_user_cancels_does_not_come_back(place: Path, warned: bool) -> None:
    """Also where the time was nearly up as well, and the run was about to be asked."""
    with begun(place, hurried(place), PYTHON="played") as running:
        wait_until(lambda: lines(place / "trains") == 2, running, 30)
        if warned:
            running.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
        subprocess.run([place / "tools" / "scancel", str(os.getpid())], check=True)
        code = running.wait(timeout=30)
    said = (place / "out.txt").read_text()
    assert code == 143 and "does not go back" in said, said
    assert lines(place / "scancel.txt") == 1  # the script itself has asked nobody
    assert not (place / "scontrol.txt").exists()


@pytest.mark.parametrize(("name", "queued"), [("USR1", True), ("TERM", False)])
def test_a_signal_between_two_steps_starts_no_other(place: Path, name: str, queued: bool) -> None:
    job = written(place)
    (place / "between").write_text(name)
    with begun(place, job, PYTHON="played") as running:
        code = running.wait(timeout=30)
    said = (place / "out.txt").read_text()
    assert code == 143 and lines(place / "steps.txt") == 1, said
    assert (place / "scontrol.txt").exists() == queued, said


def test_a_run_that_fails_is_not_queued_again(place: Path) -> None:
    (place / "tools" / "played").write_text("#!/bin/bash\nexit 3\n")
    with begun(place, written(place), PYTHON="played") as running:
        code = running.wait(timeout=30)
    assert code == 3 and "failed with exit code 3" in (place / "out.txt").read_text()
    assert lines(place / "steps.txt") == 1 and not (place / "scontrol.txt").exists()
