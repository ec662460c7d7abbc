"""The batch script: bash can read it, and it runs end to end where `srun` and `scontrol` are small scripts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.checkpoint import latest
from pretrain.errors import ConfigError
from pretrain.parallel.slurm import Job, script

CONFIG = """
data: {{train: books, vocab_size: 300, row_length: 32, valid: 0.2, cache: cache, workers: 1}}
model: {{family: gpt2, size: tiny}}
train: {{out: runs/one, limit: {limit}, batch_rows: 4, eval_rows: 2, log_every: 1}}
parallel: {{device: cpu}}
"""
# Starts the command once for each task, on "hosts" that are this machine; signals reach the tasks alone.
SRUN = """#!{python}
import os, signal, subprocess, sys
words, count = sys.argv[1:], 1
while words[0].startswith("--"):
    key, _, value = words.pop(0).partition("=")
    if key == "--ntasks":
        count = int(value)
tasks = []
for node in range(count):
    env = {{**os.environ, "SLURM_NODEID": str(node), "SLURMD_NODENAME": "localhost"}}
    tasks.append(subprocess.Popen(words, env=env, start_new_session=True))
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGTERM, forward)
with open("steps.txt", "a") as file:
    file.write(" ".join(words[-4:]).replace("\\n", " ") + "\\n")
codes = [task.wait() for task in tasks]
sys.exit(next((abs(code) for code in codes if code), 0))
"""
# More hosts than a pipe holds: whoever reads one line and leaves ends this by SIGPIPE.
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; seq -f host%g 20000; else echo "$*" >> scontrol.txt; fi
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
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
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


def written(place: Path, *options: str) -> Path:
    words = ["slurm", "--config", "a run.yaml", "--nodes", "2", "--gpus_per_node", "0", *options]
    assert cli.main([*words, "--out", "job.sbatch"]) == 0
    return place / "job.sbatch"


# ------------------------------------------------------------------------------------------------- the text


def test_bash_reads_it_and_slurm_finds_its_options(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--nodes 8 --gpus_per_node 8 --time 2-00:00:00 --partition gpu --account lab --job_name big"
    )
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
        ("partition", "gpu"),
        ("account", "lab"),
        ("job-name", "big"),
        ("signal", "B:TERM@300"),
    }
    assert text.index("#SBATCH --signal") < text.index("set -euo"), (
        "options end at the first command"
    )
    assert "config='a run.yaml'" in text and "prepare --config" in text and "train --config" in text
    # Every variable of SLURM stands in quotes, or where bash does not split words.
    for line in text.splitlines():
        plain = re.sub(r"\"[^\"]*\"|\$?\(\(.*?\)\)|#.*", "", line)
        assert "$SLURM" not in plain, line


def test_a_task_is_fine_tuned_without_a_step_of_its_own_for_the_data(place: Path) -> None:
    (place / "t.yaml").write_text(
        "data: {train: a.csv}\nmodel: {checkpoint: m}\ntask: {name: classification}\n"
    )
    text = script("t.yaml", Job(nodes=2))
    assert "finetune --config" in text and "prepare" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": 1, "time": "soon"}, "24:00:00"),
        ({"nodes": 1, "partition": "a b"}, "partition"),
        ({"nodes": 1, "partition": "a,"}, "commas"),
        ({"nodes": 1, "account": "a,b"}, "account"),
        ({"nodes": 1, "job_name": "x\n#SBATCH --uid=0"}, "job_name"),
        ({"nodes": 3}, "numbers of processes"),
    ],
)
def test_what_slurm_or_the_batch_cannot_take_is_refused(
    place: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        script("a run.yaml", Job(gpus_per_node=1, **options))  # type: ignore[arg-type]


def test_several_partitions_may_be_named(place: Path) -> None:
    assert "#SBATCH --partition=gpu,gpu-long\n" in script(
        "a run.yaml", Job(nodes=1, gpus_per_node=1, partition="gpu,gpu-long")
    )


def test_a_wrong_config_is_refused_before_it_is_in_the_queue(place: Path) -> None:
    (place / "a run.yaml").write_text("train: {batch_row: 3}\n")
    assert cli.main(["slurm", "--config", "a run.yaml", "--nodes", "2"]) == 2


# ---------------------------------------------------------------------------------------------- end to end


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


def test_before_the_time_is_up_the_run_is_saved_and_queued_again(place: Path) -> None:
    (place / "a run.yaml").write_text(CONFIG.format(limit="100000 steps"))
    job = written(place)
    with open(place / "out.txt", "w") as out:
        running = subprocess.Popen(
            ["bash", str(job)], env=environment(place), stdout=out, stderr=subprocess.STDOUT
        )
        log = place / "runs" / "one" / "log.jsonl"
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end and running.poll() is None:
                if log.exists() and log.stat().st_size:
                    break
                time.sleep(0.2)
            running.send_signal(signal.SIGTERM)
            code = running.wait(timeout=60)
        finally:
            running.kill()
    said = (place / "out.txt").read_text()
    assert code != 0 and "goes back into the queue" in said, said
    assert (place / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    found = latest(place / "runs" / "one")
    assert found is not None, said
