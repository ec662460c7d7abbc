"""Fine-tuning on several processes of this machine: they train, and the calling process loads the result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError
from pretrain.finetuning.job import Job
from pretrain.finetuning.result import Finetuned
from pretrain.finetuning.rows import encode
from pretrain.training.launch import on_devices

if TYPE_CHECKING:
    from pretrain.training.state import Run

__all__ = ["check_spread", "read_back", "train_on"]


def check_spread(model: Any, objects: Mapping[str, Any], compare: str | None) -> None:
    """Check that other processes can run the job: they read files and cannot access the memory of this one.

    Args:
        model: model that the caller gave, or None.
        objects: rows that the caller gave as objects.
        compare: the requested comparison, or None.

    Raises:
        ConfigError: model or rows are objects in memory, or a comparison is requested.
    """
    tail = "or leave devices out."
    if model is not None and not isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"devices starts other processes, which cannot see a {type(model).__name__} of this one. Save it and "
            f"name its directory, {tail}"
        )
    if objects:
        given = ", ".join(f"{name} (a {type(value).__name__})" for name, value in objects.items())
        raise ConfigError(
            f"devices starts other processes, which cannot see rows in the memory of this one: {given}. Write them to "
            f"a file (.jsonl, .csv, .parquet) and name it, {tail}"
        )
    if compare is not None:
        raise ConfigError(
            f"compare trains many small models one after the other, each on one device: leave it out, {tail}"
        )


def train_on(job: Job, devices: int | str, hooks: Sequence[Any] = ()) -> Finetuned | None:
    """Train a job on several processes and return the result as if it had been trained here.

    Returns:
        The result, with the weights of the best evaluation; None if only one process is needed.
    """
    settings = job.settings
    run = on_devices("finetune", settings, devices, hooks=hooks, quiet=job.quiet)
    if run is None:
        return None
    return read_back(job, run)


def read_back(job: Job, run: Run, *, write: bool = True) -> Finetuned:
    """Return the result of a job whose run is on disk, as if it had been trained here.

    Args:
        job: the job, with the rows of the run.
        run: its run.
        write: see ``Job.finish``.
    """
    silent, data, settings = replace(job, quiet=True), job.data, job.settings
    notes = list(data.notes)
    task = silent.build(seed=settings.train.seed)
    share = settings.data.max_cut
    held_out = encode(task, data.valid, "validation", share, notes) if len(data.valid) else None
    tested = None if data.test is None else encode(task, data.test, "test", share, notes)
    for part in (held_out, tested):
        if part is not None:
            task.prepare_reference(part)
    return silent.finish(task, run, held_out, tested, notes, write=write)
