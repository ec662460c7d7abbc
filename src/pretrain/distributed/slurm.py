"""Batch scripts for SLURM: one task on each host, which runs torchrun; the run saves before its time limit.

The script, `slurm.sh.in`, is plain bash that can be read and changed. Before the time limit SLURM sends SIGUSR1 to the
batch shell only, which has SLURM send SIGTERM to the tasks of the step (`srun` would kill them if it got SIGTERM
itself). The run saves, and the job is requeued, where the same command resumes it. A job that is cancelled gets SIGTERM
and is not requeued.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config.check import read_file, settings_in, write_text
from pretrain.config.run import DataConfig, ParallelConfig, TrainConfig
from pretrain.distributed.mesh import check_batch
from pretrain.errors import ConfigError

__all__ = ["OPTIONS", "is_task", "script"]

_PREPARE = """
# The data are prepared before the processes connect, because those do not wait for ever; prepared data are reused.
echo "$(date -Is) preparing the data"
wait_for srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \\
  "$python" -m pretrain prepare --config "$config"
"""


# Options of ``pretrain slurm``: name, type, help, default (... must be given).
OPTIONS: tuple[tuple[Any, ...], ...] = (
    ("--config", str, "YAML file of pretrain train or finetune", ..., {"action": "append"}),
    ("--nodes", int, "hosts", ...),
    ("--gpus_per_node", int, "GPUs of a host; 0 is one process on its CPU", 8),
    ("--time", str, "time limit: 24:00:00, or 2-00:00:00 for days", "24:00:00"),
    ("--partition", str | None, "partition, or several: a,b; by default that of the site"),
    ("--account", str | None, "account to charge; by default that of the site"),
    ("--job_name", str | None, "name of the job; by default that of the config"),
    (
        "--grace",
        int,
        "seconds before the end of --time at which the run is asked to save and stop",
        300,
    ),
    ("--restarts", int, "number of restarts of all processes after a failure", 3),
    ("--out", str | None, "file to write; by default it is printed"),
)


def is_task(config: str | os.PathLike[str]) -> bool:
    """Return whether a config file is one of ``pretrain finetune``.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _has_task(read_file(Path(config))[0])


def _has_task(sections: Mapping[str, Any]) -> bool:
    return any(key.partition(".")[0] == "task" for key in sections)


def _reads_own_rows(sections: Mapping[str, Any]) -> bool:
    """Whether a config of ``pretrain train`` names a source of rows, which are read as they are."""
    return bool(settings_in(sections, {"data": DataConfig})["data"].get("source"))


def script(
    config: str | os.PathLike[str],
    *,
    nodes: int,
    gpus_per_node: int = 8,
    time: str = "24:00:00",
    partition: str | None = None,
    account: str | None = None,
    job_name: str | None = None,
    grace: int = 300,
    restarts: int = 3,
    out: str | None = None,
) -> str:
    """Return the batch script that runs a config file, or write it to ``out`` and return that path with a line feed.

    SLURM itself checks what it is given, when the script is submitted.

    Args:
        config: YAML file; one with a section ``task`` is for ``pretrain finetune``.
        nodes: number of hosts.
        gpus_per_node: GPUs of each host, with one process per GPU; 0 is one process on the CPU.
        time: time limit as SLURM writes it: ``24:00:00`` or ``2-00:00:00``.
        partition: partition, or several separated by commas; by default that of the site.
        account: account to charge; by default that of the site.
        job_name: name of the job; by default that of the config file.
        grace: seconds before the time limit at which the run is asked to save.
        restarts: how often torchrun restarts all processes after one of them has failed.
        out: file to write, or None; its name is in the comment on how to submit it.

    Raises:
        ConfigError: the config cannot be read, its batch cannot be shared by so many processes, a number is too
            small, or the file cannot be written.
    """
    least = {"nodes": (nodes, 1), "gpus_per_node": (gpus_per_node, 0)}
    least |= {"grace": (grace, 30), "restarts": (restarts, 0)}
    for key, (value, low) in least.items():
        if value < low:
            raise ConfigError(f"--{key} is {value}; it must be at least {low}.")
    path = Path(config)
    sections, _ = read_file(path)
    command = "finetune" if _has_task(sections) else "train"
    processes = max(1, gpus_per_node)
    sections_read = settings_in(sections, {"train": TrainConfig, "parallel": ParallelConfig})
    train, parallel = sections_read["train"], sections_read["parallel"]
    tp, micro = int(parallel.get("tp", 1)), int(train.get("micro_rows", 0))
    batch = int(train.get("batch_rows", 0)) or (32 if command == "finetune" else 0)
    if nodes * processes % tp:
        raise ConfigError(
            f"parallel.tp of {path} is {tp}, which does not divide the {nodes * processes} processes."
        )
    if not batch and nodes * processes > tp:
        raise ConfigError(
            f"train.batch_rows of {path} is automatic: 32, 16 or 8 rows, by the data, which {nodes * processes} "
            "processes may not be able to share. Write the rows of a step there, such as batch_rows: 256."
        )
    check_batch(nodes * processes, tp, batch or micro or 32, micro)
    header = {
        "job-name": job_name or re.sub(r"[^\w.-]", "-", path.stem),
        "nodes": nodes,
        "gpus-per-node": gpus_per_node,
        "time": time,
        "partition": partition,
        "account": account,
    }
    values = {
        "header": "\n".join(f"#SBATCH --{key}={value}" for key, value in header.items() if value),
        "grace": grace,
        "shutdown": grace - 20,  # the rest is for a step that has just started and for requeueing
        "restarts": restarts,
        "name": shlex.quote(out or "job.sbatch"),
        "config": shlex.quote(os.fspath(path)),
        "processes": processes,
        "command": command,
        "prepare": _PREPARE if command == "train" and not _reads_own_rows(sections) else "",
    }
    template = Path(__file__).with_name("slurm.sh.in").read_text(encoding="utf-8")
    text = re.sub(r"@(\w+)@", lambda match: str(values[match[1]]), template)
    return text if out is None else f"{write_text(Path(out), text)}\n"
