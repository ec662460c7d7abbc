"""Row 12: from one process to two on two cores, ours beside accelerate and Lightning with the same model.

The global batch, the micro-batch, the rows, the model and the optimizer (fused AdamW, clipping at 1) are the same for
all. Every measurement is a launch of its own. Cost is wall time, which other programs only make longer: the machine
should be idle.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .harness import Case, Contender, Settings, Work

VOCAB, LENGTH, ROWS, MICRO = 4096, 256, 64, 32
SHAPE = {"num_layers": 4, "hidden_size": 192, "num_heads": 3, "max_positions": LENGTH}
PEERS = {  # name -> (contender, kind, package)
    "pretrain, DDP": ("ours-ddp", "ours", "torch"),
    "accelerate": ("accelerate-ddp", "default", "accelerate"),
    "lightning, DDP": ("lightning-ddp", "default", "lightning"),
}
LONG = {
    "pretrain, FSDP": ("ours-fsdp", "variant", "torch"),
    "pretrain, DDP, reproducible": ("ours-reproducible", "variant", "torch"),
    "pretrain, DDP, Muon": ("ours-muon", "variant", "torch"),
}
WARM = 2


class Rows(list[dict[str, np.ndarray]]):
    """Random rows; every contender sees the same."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        super().__init__({"input_ids": rng.integers(5, VOCAB, LENGTH)} for _ in range(count))
        self.num_tokens = count * LENGTH


def objective() -> Any:
    from pretrain.models import build
    from pretrain.objectives import build_objective

    return build_objective("NextToken", {}, build("gpt2", None, vocab_size=VOCAB, **SHAPE))


def ours(strategy: str, precision: str, steps: int) -> list[float]:
    """Seconds of the steps of our trainer, with everything that belongs to a step of a real run."""
    from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
    from pretrain.training.trainer import Trainer

    times = [time.perf_counter()]
    exact, muon = strategy == "reproducible", strategy == "muon"
    parallel = {"strategy": "auto" if exact or muon else strategy, "reproducible": exact}
    with tempfile.TemporaryDirectory() as folder:
        told = os.environ.get("BENCH_OUT", folder)
        trainer = Trainer(
            objective(),
            Rows(256),
            optim=OptimConfig(lr=1e-3, name="muon" if muon else "adamw"),
            train=TrainConfig(
                out=told,
                limit=f"{steps + WARM} steps",
                batch_rows=ROWS,
                micro_rows=MICRO,
                precision=precision,  # type: ignore[arg-type]
                save_every="0 steps",
                eval_every="0 steps",
            ),
            parallel=ParallelConfig(device="cpu", threads=1, **parallel),  # type: ignore[arg-type]
            hooks=[lambda record: times.append(time.perf_counter())],
            quiet=True,
        )
        trainer.fit()
    return list(np.diff(times))[WARM:]


def batches(rank: int, world: int, steps: int) -> Any:
    """Micro-batches of one process: (B, T) ids and labels, as our objective collates them."""
    task, rows = objective(), Rows(256)
    share = ROWS // world
    for step in range(steps):
        first = step * ROWS + rank * share
        part = [rows[i % len(rows)] for i in range(first, first + share)]
        yield [task.collate(part[i : i + MICRO], [None] * MICRO) for i in range(0, share, MICRO)]


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def accelerate(precision: str, steps: int) -> list[float]:
    import accelerate as library

    mixed = "bf16" if precision == "bf16" else "no"
    accelerator = library.Accelerator(
        cpu=True, mixed_precision=mixed, gradient_accumulation_steps=1
    )
    task = objective()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3, fused=True)
    task, optimizer = accelerator.prepare(task, optimizer)
    world, times = accelerator.num_processes, []
    for micro in batches(accelerator.process_index, world, steps + WARM):
        began = time.perf_counter()
        for i, batch in enumerate(micro):
            count = ROWS * (LENGTH - 1) / world
            if i < len(micro) - 1:
                with accelerator.no_sync(task), accelerator.autocast():
                    accelerator.backward(task(batch).total / count)
            else:
                with accelerator.autocast():
                    loss = task(batch).total / count
                accelerator.backward(loss)
        accelerator.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return times[WARM:]


def lightning(precision: str, steps: int) -> list[float]:
    import logging
    import warnings

    import lightning as library

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    times = [time.perf_counter()]

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.task = objective()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.task(batch).total / (MICRO * (LENGTH - 1))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step + 1 > len(times):
                times.append(time.perf_counter())

    flat = [batch for micro in batches(rank, world, steps + WARM) for batch in micro]
    trainer = library.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=steps + WARM,
        accumulate_grad_batches=ROWS // MICRO // world,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = torch.utils.data.DataLoader(flat, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Module(), loader)
    return list(np.diff(times))[WARM:]


def worker(peer: str, precision: str, steps: str) -> None:
    """One process of a launch; rank zero prints the seconds of its steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, _, strategy = peer.partition("-")
    if kind == "ours":
        world = int(os.environ.get("WORLD_SIZE", "1"))
        alone = world == 1 and strategy in ("ddp", "fsdp")
        found = ours("auto" if alone else strategy, precision, int(steps))
    else:
        found = {"accelerate": accelerate, "lightning": lightning}[kind](precision, int(steps))
    if os.environ.get("RANK", "0") == "0":
        print("TIMES " + json.dumps(found), flush=True)


def measure(peer: str, processes: int, steps: int) -> float:
    """Median seconds of a step."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.benchmarks", "child", "processes:worker", peer, "fp32", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "BENCH_OUT": folder}
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=False
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TIMES ")]
    if not lines:
        raise RuntimeError(f"{peer} in {processes} processes: {done.stderr[-1500:]}")
    return statistics.median(json.loads(lines[0].removeprefix("TIMES ")))


def processes(settings: Settings) -> list[Callable[[], Case]]:
    """Row 12: a step in two processes; the floor of ours is half of its step in one."""
    steps = 1 if settings.tiny else 8

    def make(peer: str, count: int) -> tuple[Callable[[], float], Work]:
        share = 1 if count == 2 else 2
        return lambda: measure(peer, count, steps) / share, Work(ROWS * LENGTH)

    def case() -> Case:
        table = PEERS | (LONG if settings.long else {})
        contenders = [
            Contender(name, kind, functools.partial(make, peer, 2), needs)
            for name, (peer, kind, needs) in (
                list(table.items())[:1] if settings.tiny else table.items()
            )
        ]
        alone = Contender(
            "half of pretrain in one process", "floor", functools.partial(make, "ours-ddp", 1)
        )
        return Case(
            f"GPT-2 L4 d192, {ROWS * LENGTH:,} tokens a step in two processes, fp32", "seconds a step",
            [*contenders, alone], {"floor": 0.9, "default": 1.0}, controlled=False, rounds=(2, 3),
        )  # fmt: skip

    return [case]
