"""Benchmark of a configuration: the speed of a few steps and what limits it; nothing is kept."""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median_high
from typing import Any

import torch

from pretrain.config import RunConfig
from pretrain.config.check import check_count
from pretrain.config.spelling import TRAIN, either, using
from pretrain.data.row_source import RowSource
from pretrain.distributed.world import current_world
from pretrain.errors import ConfigError
from pretrain.nn.device import multiplies_bf16_fast
from pretrain.training.precision import choose_device, choose_precision
from pretrain.training.run import train
from pretrain.training.trainer import Hook
from pretrain.utils.memory_info import free_memory, peak_memory
from pretrain.utils.run_log import read_log

__all__ = ["Speed", "bench"]

# Steps before the measured ones: caches, and on a GPU compilation and the choice of kernels.
_WARM = {"cuda": 10}
_PHASES = ("data", "forward", "backward", "update")


@dataclass(frozen=True)
class Speed:
    """Speed of a training step.

    Attributes:
        device, precision: where it ran and in which type.
        threads: threads of the CPU.
        steps: measured steps.
        seconds: median seconds of a step.
        rows: rows of a step (``train.batch_rows``).
        units: units per second; what a unit is, says ``unit`` (tokens, patches, ...).
        unit: name of the units.
        utilisation: share of the device's peak FLOP/s that was used: that of the data sheet for known GPUs, else that
            of a large matrix product here.
        memory: peak memory of the process, on a GPU that of the GPU, in bytes.
        shares: share of the time in ``data`` (waiting for rows), ``forward``, ``backward`` and ``update``. A GPU works
            behind the host, so there ``update`` is where the host waits for it.
        limits: what limits the speed and which setting changes it, one sentence each.
    """

    device: str
    precision: str
    threads: int
    steps: int
    seconds: float
    rows: int
    units: float
    unit: str
    utilisation: float
    memory: float
    shares: Mapping[str, float]
    limits: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self) | {"limits": list(self.limits)}

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        lines = [
            f"device   {self.device}, {self.precision}{threads}",
            f"speed    {self.units:,.0f} {self.unit}/s; {self.seconds:.3g} s for a step of {self.rows:,} rows "
            f"(median of {self.steps})",
            f"used     {self.utilisation:.0%} of the peak of the device",
            f"memory   {self.memory / 1e9:.2f} GB at most",
            "time     " + ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items()),
        ]
        return "\n".join([*lines, *(f"         {sentence}" for sentence in self.limits)])


# Settings of a run that does nothing but its steps.
_STEPS_ALONE: dict[str, Any] = {
    "eval_every": "0 steps", "save_every": "0 steps", "patience": 0, "log_every": 1, "loggers": [],
}  # fmt: skip


class _MeasuringDone(Exception):  # ends the run of a benchmark
    """All steps have been measured."""


@using(TRAIN)
def bench(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None = None,
    *,
    steps: int = 20,
    rows: RowSource | None = None,
    **sections: Any,
) -> Speed:
    """Measure a few steps of the run that ``train`` would make with the same arguments; its directory is not touched.

    Args:
        config: as for `pretrain.train`.
        steps: steps to measure, after some that are not.
        rows: as for `pretrain.train`.
        **sections: as for `pretrain.train`.

    Raises:
        ConfigError: fewer than three steps, or one of several processes.
        PretrainError: as `pretrain.train`.
    """
    settings, world = RunConfig.load(config, sections or None), current_world()
    check_count(either("--steps", "steps"), steps, None)
    if steps < 3:
        raise ConfigError(f"{either('--steps', 'steps')} is {steps}; a median needs at least 3.")
    if world.size > 1:
        raise ConfigError(
            "The speed is measured in one process. For several, train a few steps and look at the log."
        )
    device = choose_device(settings.parallel.device)
    warm = _WARM.get(device.type, 3)
    times, clock = list[float](), _Clock()

    def after(record: Mapping[str, Any]) -> None:  # of the run that is going on
        times.append(time.perf_counter())
        clock.end_step()
        if len(times) == warm + steps:
            raise _MeasuringDone

    with tempfile.TemporaryDirectory(prefix="pretrain-bench-") as folder:
        # Whether blocks are compiled and micro-batches measured depends on the length of the run. One that is too short
        # to be measured is made longer.
        for limit in (settings.train.limit, f"{warm + steps + 1} steps"):
            times, clock, out = [], _Clock(), Path(folder) / f"run-{len(os.listdir(folder))}"
            settings.train = replace(settings.train, out=str(out), limit=limit, **_STEPS_ALONE)
            world.on_mark = clock.mark
            try:
                train(settings, hooks=[Hook(after)], rows=rows)
            except _MeasuringDone:
                break
            finally:
                world.on_mark = None
        settings.train.batch_rows = RunConfig.load(out / "run.yaml").train.batch_rows
        records = [r for r in read_log(out / "log.jsonl") if "tokens_per_second" in r][-steps:]
    seconds = median_high([b - a for a, b in zip(times[warm - 1 :], times[warm:], strict=False)])
    whole = {name: sum(clock.spent[name][-steps:]) for name in _PHASES}
    total = sum(whole.values())
    shares = {name: value / total for name, value in whole.items()}
    precision = choose_precision(settings.train.precision, device, training=True).name
    memory, mfu = peak_memory(device), median_high([float(r["mfu"]) for r in records])
    return Speed(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=precision,
        threads=torch.get_num_threads(),
        steps=steps,
        seconds=seconds,
        rows=settings.train.batch_rows,
        units=median_high([float(r["tokens_per_second"]) for r in records]),
        unit=str(records[-1].get("unit", "tokens")),
        utilisation=mfu,
        memory=memory,
        shares=shares,
        limits=tuple(_limits(settings, device, precision, shares, memory)),
    )


class _Clock:
    """Seconds of each phase of each step, from the marks that the trainer sets for the watchdog.

    Attributes:
        spent: phase -> its seconds in each step.
    """

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {name: [] for name in _PHASES}
        self._phase, self._since = "start", time.perf_counter()
        self._step: dict[str, float] = defaultdict(float)

    def mark(self, phase: str, step: int) -> None:
        """Note that a phase begins."""
        now = time.perf_counter()
        self._step[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def end_step(self) -> None:
        """Note that the step is complete."""
        self.mark("between", 0)
        for name, seconds in self.spent.items():
            seconds.append(self._step[name])
        self._step.clear()


def _limits(
    settings: RunConfig,
    device: torch.device,
    precision: str,
    shares: Mapping[str, float],
    memory: float,
) -> list[str]:
    """Name what limits the speed and the setting that changes it."""
    limits = []
    if shares["data"] > 0.1:
        limits.append(
            f"{shares['data']:.0%} of the time is spent waiting for rows: the machine is busy, or making a row costs "
            "more than learning from it. Prepare the data first (pretrain prepare)."
        )
    if precision == "fp32" and multiplies_bf16_fast(device):
        limits.append("This device is faster in half precision: train.precision=bf16.")
    if device.type == "cuda":
        limits += _limits_of_a_gpu(settings, device, shares, memory)
    if not limits:
        limits.append(
            f"The arithmetic of the {device.type} is the limit: it takes {1 - shares['data']:.0%} of the time. A "
            "smaller model or shorter rows (model.size, data.row_length) make a step shorter."
        )
    return limits


def _limits_of_a_gpu(
    settings: RunConfig, device: torch.device, shares: Mapping[str, float], memory: float
) -> list[str]:
    limits = []
    if settings.parallel.compile is False:
        limits.append("Compiled blocks are faster in longer runs: parallel.compile=true.")
    if shares["update"] < 0.1:
        limits.append(
            "The GPU is done before the host has started the next operation: the host is the limit. More rows at a "
            "time (train.micro_rows=0 chooses as many as fit) give it more to do for each of them."
        )
    free = free_memory(device)
    several = settings.train.micro_rows and settings.train.micro_rows < settings.train.batch_rows
    if several and free > memory:
        limits.append(
            "Half of the memory is free: larger micro-batches fit (train.micro_rows=0 chooses them)."
        )
    return limits
