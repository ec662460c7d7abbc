"""Batch scripts for SLURM: one task on each host, which runs torchrun; the run saves before its time limit.

The script is plain bash that can be read and changed. Before the time limit SLURM sends SIGUSR1 to the batch shell
only, which has SLURM send SIGTERM to the tasks of the step (`srun` would kill them if it got SIGTERM itself). The run
saves, and the job is requeued, where the same command resumes it. A job that is cancelled gets SIGTERM and is not
requeued.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.check import read_file, write_text
from pretrain.distributed.mesh import check_batch
from pretrain.errors import ConfigError

__all__ = ["Job", "add_slurm", "is_task", "script", "write"]

_WORD = re.compile(r"[\w.@%+-]+")
_WORDS = re.compile(rf"{_WORD.pattern}(,{_WORD.pattern})*")
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}")


@dataclass(frozen=True)
class Job:
    """The resources and options of a SLURM job.

    Attributes:
        nodes: number of hosts.
        gpus_per_node: GPUs of each host, with one process per GPU; 0 is one process on the CPU.
        time: time limit as SLURM writes it: ``24:00:00`` or ``2-00:00:00``.
        partition: partition, or several separated by commas; by default that of the site.
        account: account to charge; by default that of the site.
        job_name: name of the job; by default that of the config file.
        grace: seconds before the time limit at which the run is asked to save.
        restarts: how often torchrun restarts all processes after one of them has failed.
    """

    nodes: int
    gpus_per_node: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    job_name: str | None = None
    grace: int = 300
    restarts: int = 3

    def checked(self) -> Job:
        """Return this job if its values are valid for SLURM.

        Raises:
            ConfigError: a number or a name is not valid.
        """
        for key, low in (("nodes", 1), ("gpus_per_node", 0), ("grace", 30), ("restarts", 0)):
            if getattr(self, key) < low:
                raise ConfigError(f"--{key} is {getattr(self, key)}; it must be at least {low}.")
        if not _TIME.fullmatch(self.time):
            raise ConfigError(
                f"--time is {self.time!r}; write 24:00:00 (hours) or 2-00:00:00 (days)."
            )
        for key, form in (("partition", _WORDS), ("account", _WORD), ("job_name", _WORD)):
            value = getattr(self, key)
            if value is not None and not form.fullmatch(value):
                several = ", and commas between several" if form is _WORDS else ""
                raise ConfigError(
                    f"--{key} is {value!r}; SLURM takes letters, digits and . _ - there{several}."
                )
        return self


_TEMPLATE = """\
#!/bin/bash
{header}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# So many seconds before the end this shell alone gets SIGUSR1; scancel, and the end itself, send SIGTERM.
#SBATCH --signal=B:USR1@{grace}

# Written by `pretrain slurm`. Submit it from the directory that the paths of the config start at, with the
# environment active: sbatch {name}
set -euo pipefail

config={config}
python=${{PYTHON:-python}}
processes={processes}  # on each host

asked=0 cancelled=0 step=0 told=0
trap 'asked=1; tell' USR1
trap 'cancelled=1' TERM
trap finish EXIT

# tell: ask the run to save and stop. Not through srun, which answers SIGTERM by killing its tasks; scancel with a
# signal reaches the tasks alone. Once: torchrun that is asked again leaves without waiting for its processes.
tell() {{
  if ((step && !told && !cancelled)); then
    told=1
    # SLURM drops a signal to tasks that are just being started.
    while ((SECONDS < began + 10 && !cancelled)); do sleep 1 || true; done
    ((cancelled)) || scancel --signal=TERM "$SLURM_JOB_ID" || true
  fi
}}

# Whether the job goes back into the queue.
finish() {{
  local code=$?
  if ((code && cancelled)); then
    echo "$(date -Is) told to end: the job does not go back into the queue; sbatch resumes its last checkpoint"
  elif ((code && asked)); then
    echo "$(date -Is) the time is up: the job goes back into the queue and will resume its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID" || echo "SLURM did not take it back; submit it again: sbatch" {name}
  elif ((code)); then
    echo "$(date -Is) failed with exit code $code"
  fi
}}

# wait_for COMMAND...: run it to its end, unless the job has been asked to end before.
wait_for() {{
  local code
  if ((asked || cancelled)); then exit 143; fi
  began=$SECONDS
  "$@" &
  step=$!
  if ((asked)); then tell; fi
  # A signal interrupts `wait`; when the command has ended, asking once more gives its own exit code.
  while wait "$step" || true; kill -0 "$step" 2>/dev/null; do :; done
  code=0
  wait "$step" || code=$?
  step=0
  return "$code"
}}

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${{hosts%%$'\\n'*}}
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$(( SLURM_CPUS_ON_NODE / processes > 0 ? SLURM_CPUS_ON_NODE / processes : 1 ))
# Several networks? Name the fast one: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# How long torchrun waits for a run that saves before it kills it; that of torch 2.11 always waits half a minute.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={shutdown}

# on_all NAME RESTARTS WORDS...: `pretrain WORDS` in all processes of all hosts. The host that leaves first gives the
# others a minute: they may still be saving.
on_all() {{
  local name=$1 restarts=$2
  shift 2
  # What stands in single quotes is expanded on each host.
  exec srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \\
    --cpu-bind=none --kill-on-bad-exit=0 --wait=60 bash -c '
      python=$1; shift
      exec "$python" -m torch.distributed.run --rdzv-conf "is_host=$(( SLURM_NODEID == 0 ))" \\
        --local-addr "$SLURMD_NODENAME" "$@"
    ' run "$python" --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" \\
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID-$name" \\
    --max-restarts "$restarts" -m pretrain "$@"
}}
{prepare}
echo "$(date -Is) looking at the hosts"
wait_for on_all doctor 0 doctor

echo "$(date -Is) {command}"
wait_for on_all run {restarts} {command} --config "$config"
"""

_PREPARE = """
# The data are prepared before there is a group of processes, whose patience ends; what is there already is kept.
echo "$(date -Is) preparing the data"
wait_for srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \\
  "$python" -m pretrain prepare --config "$config"
"""


def add_slurm(parser: Any) -> None:
    """Declare the options of ``pretrain slurm``."""
    add = parser.add_argument
    add("--config", type=str, required=True, help="YAML file of pretrain train or finetune")
    add("--nodes", type=int, required=True, help="hosts")
    add("--gpus_per_node", type=int, default=8, help="GPUs of a host; 0 is one process on its CPU")
    add("--time", type=str, default="24:00:00", help="limit: 24:00:00, or 2-00:00:00 for days")
    add("--partition", type=str | None, default=None, help="a, or a,b; not given, the site's own")
    add("--account", type=str | None, default=None, help="who pays; not given, the site's own")
    add("--job_name", type=str | None, default=None, help="name; not given, that of the config")
    add("--grace", type=int, default=300, help="seconds before the end in which the run saves")
    add("--restarts", type=int, default=3, help="how often all start again after a failure")
    add("--out", type=str | None, default=None, help="file to write; not given, it is printed")


def write(config: str | os.PathLike[str], *, out: str | None = None, **options: Any) -> str:
    """Write the script to ``out`` and return its path, or return the script itself; either ends with a line feed.

    Args:
        config: see `script`.
        out: file to write, or None.
        **options: fields of `Job`.

    Raises:
        ConfigError: see `script`; or the file cannot be written.
    """
    text = script(config, Job(**options), out or "job.sbatch")
    return text if out is None else f"{write_text(Path(out), text)}\n"


def is_task(config: str | os.PathLike[str]) -> bool:
    """Return whether a config file is one of ``pretrain finetune``.

    Raises:
        ConfigError: the file cannot be read.
    """
    return "task" in read_file(Path(config))[0]


def script(config: str | os.PathLike[str], job: Job, name: str = "job.sbatch") -> str:
    """Return the batch script that runs a config file of ``pretrain train`` or ``pretrain finetune``.

    Args:
        config: YAML file; one with a section ``task`` is for ``pretrain finetune``.
        job: the resources and options.
        name: name of the script, for the comment on how to submit it.

    Raises:
        ConfigError: the config cannot be read, its batch cannot be shared by so many processes, or the job is not
            valid for SLURM.
    """
    job, path = job.checked(), Path(config)
    sections, _ = read_file(path)
    command = "finetune" if is_task(path) else "train"
    processes = max(1, job.gpus_per_node)
    train, parallel = (sections.get(key) or {} for key in ("train", "parallel"))
    check_batch(
        job.nodes * processes,
        int(parallel.get("tp", 1)),
        int(train.get("batch_rows", 32)),
        int(train.get("micro_rows", 0)),
    )
    given = {
        "job-name": job.job_name or re.sub(r"[^\w.-]", "-", path.stem),
        "nodes": str(job.nodes),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
    }
    return _TEMPLATE.format(
        header="\n".join(f"#SBATCH --{key}={value}" for key, value in given.items() if value),
        grace=job.grace,
        shutdown=job.grace - 20,  # the rest is for a step that has just started and for requeueing
        restarts=job.restarts,
        name=shlex.quote(name),
        config=shlex.quote(os.fspath(path)),
        processes=processes,
        command=command,
        prepare=_PREPARE if command == "train" else "",
    )
