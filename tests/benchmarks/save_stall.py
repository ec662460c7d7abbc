"""How long training stands still for a checkpoint, and how long until it is on the disk, against torch's own ways.

    python tests/benchmarks/save_stall.py                        # 124 M parameters with AdamW moments, 1.5 GB
    python tests/benchmarks/save_stall.py --device cuda --rows 8 --length 512
    python tests/benchmarks/save_stall.py --layers 2 --rounds 2   # quick

Contenders take turns in one process, the order turned round in every other round. Each turn measures training steps
without a save, then saves once and goes on training until the checkpoint is durable. Stall is the time for which the
call held training up; slow-down is how much longer the steps took while something was written. torch.save flushes
nothing to the disk, and neither checks a byte; so that times compare, its file is flushed before the clock stops.
What is written is removed after each turn. Contenders pickle; pretrain itself never does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from pretrain.checkpoint import Saver, TrainingState
from pretrain.config import OptimConfig
from pretrain.models import build
from pretrain.training.optim import build_optimizers

warnings.filterwarnings("ignore")
Durable = Callable[[], bool]


class Bench:
    """A model in training, and the ways to save it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        shape = {
            "num_layers": args.layers,
            "hidden_size": args.width,
            "num_heads": args.width // 64,
        }
        self.model = build("gpt2", vocab_size=50257, max_positions=1024, **shape).to(self.device)
        blocks = self.model.backbone.blocks()
        self.optim = build_optimizers(self.model, OptimConfig(), blocks, self.device)
        self.ids = torch.randint(50257, (args.rows, args.length), device=self.device)
        self.out = Path(tempfile.mkdtemp(prefix="save-stall-", dir=args.out))
        self.savers = {now: Saver(self.out, background=not now) for now in (True, False)}
        for _ in range(2):
            self.step()

    def step(self) -> float:
        """One training step; its seconds."""
        began = time.perf_counter()
        hidden = self.model.backbone({"input_ids": self.ids})
        hidden.float().square().mean().backward()
        self.optim.step()
        self.optim.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """What all contenders write."""
        return {"model": dict(self.model.state_dict()), "optimizer": self.optim.state()}

    # Each returns at once where it saves in the background, and says later whether the checkpoint is durable.

    def ours(self, *, at_once: bool) -> Durable:
        saver, training = self.savers[at_once], TrainingState({"optimizer": self.optim.state()}, {})
        saver.save(self.model, step=1, tokens=0, pretrain_block={}, training=training)
        return lambda: not saver.busy

    def torch_save(self) -> Durable:
        path = self.out / "checkpoint.pt"
        torch.save(self.state(), path)

        def flush() -> bool:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            return True

        return flush

    def dcp_save(self) -> Durable:
        dcp.save(self.state(), checkpoint_id=self.out / "dcp", no_dist=True)
        return lambda: True

    def dcp_async(self) -> Durable:
        future = dcp.async_save(self.state(), checkpoint_id=self.out / "dcp", no_dist=True)

        def done() -> bool:
            if future.done():
                future.result()
            return future.done()

        return done

    def contenders(self) -> dict[str, Callable[[], Durable]]:
        """By name, in the order of the table."""
        return {
            "pretrain, at once": lambda: self.ours(at_once=True),
            "pretrain, in the background": lambda: self.ours(at_once=False),
            "torch.save (+ fsync)": self.torch_save,
            "torch DCP save": self.dcp_save,
            "torch DCP async_save": self.dcp_async,
        }

    def turn(self, save: Callable[[], Durable], steps: int) -> dict[str, float]:
        """Figures of one save."""
        plain = statistics.median(self.step() for _ in range(steps))
        began = time.perf_counter()
        durable = save()
        stall = time.perf_counter() - began
        busy = []
        while not durable():
            busy.append(self.step())
        seconds = time.perf_counter() - began
        extra = sum(busy) - plain * len(busy)
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {
            "step": plain,
            "stall": stall,
            "durable": seconds,
            "steps_meanwhile": len(busy),
            "slow_down": statistics.median(busy) / plain if busy else 1.0,
            "lost": stall + max(0.0, extra),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="steps without a save in each turn")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--out", default=None, help="directory on the disk to be measured")
    args = parser.parse_args()
    bench = Bench(args)
    num_bytes = sum(t.nbytes for group in bench.state().values() for t in group.values())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in bench.contenders()}
    try:
        for number in range(args.rounds + 1):
            order = list(bench.contenders().items())
            for name, save in order if number % 2 == 0 else reversed(order):
                found[name].append(bench.turn(save, args.steps))
    finally:
        for saver in bench.savers.values():
            saver.close()
        shutil.rmtree(bench.out)
    middle = {
        name: {key: statistics.median(turn[key] for turn in turns[1:]) for key in turns[0]}
        | {"first_stall": turns[0]["stall"]}
        for name, turns in found.items()
    }
    about = {
        "bytes": num_bytes,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": str(torch.__version__),
        "rounds": args.rounds,
    }
    print(json.dumps({"about": about, "median": middle, "turns": found}))
    print(f"\n{num_bytes / 1e9:.2f} GB, median of {args.rounds} rounds, {about['threads']} threads")
    print(
        "| contender | stall (s) | first (s) | lost in all (s) | step slower by | durable after (s) |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name, row in middle.items():
        print(
            f"| {name} | {row['stall']:.2f} | {row['first_stall']:.2f} | {row['lost']:.2f} "
            f"| {row['slow_down']:.2f} x | {row['durable']:.2f} |"
        )


if __name__ == "__main__":
    main()
