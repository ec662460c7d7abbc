"""Row 8: how long training stands still for a checkpoint, when it is durable, and how long it takes to be read again.

Everybody writes the same weights and moments. torch.save flushes nothing to the disk, and neither it nor torch's
distributed checkpoints check a byte; so that times compare, their files are flushed before the clock stops. Contenders
pickle; pretrain itself never does. Times are those of the wall: the disk takes part.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import Saver, TrainingState, load
from pretrain.config import OptimConfig
from pretrain.models import build
from pretrain.training.optim import build_optimizers

from .harness import Case, Contender, Settings, Work

Made = tuple[Callable[[], float], Work]


class Saved:
    """A model with its moments, and the ways to write and read them.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        large = settings.long or settings.device.type == "cuda"
        layers, width = (1, 64) if settings.tiny else (12, 768) if large else (6, 512)
        self.device = settings.device
        self.shape = {"num_layers": layers, "hidden_size": width, "num_heads": width // 64}
        vocab = 96 if settings.tiny else 50257 if large else 16384
        self.model = build("gpt2", vocab_size=vocab, max_positions=128, **self.shape).to(
            self.device
        )
        self.optim = build_optimizers(
            self.model, OptimConfig(lr=1e-3), self.model.backbone.blocks(), self.device
        )
        self.ids = torch.randint(vocab, (1, 16), device=self.device)
        self.room = tempfile.TemporaryDirectory(prefix="benchmark-saving-")
        self.out = Path(self.room.name)
        self.step()
        self.bytes = sum(t.nbytes for part in self.state().values() for t in part.values())
        self.savers = {now: Saver(self.out / str(now), background=not now) for now in (True, False)}

    def step(self) -> None:
        hidden = self.model.backbone({"input_ids": self.ids})
        hidden.float().square().mean().backward()
        self.optim.step()
        self.optim.zero_grad()

    def state(self) -> dict[str, Any]:
        """What all contenders write."""
        return {"model": dict(self.model.state_dict()), "optimizer": self.optim.state()}

    def measure(self, save: Callable[[], Callable[[], None]], *, durable: bool) -> float:
        """Seconds for which the call holds training up, or until the checkpoint is on the disk."""
        began = time.perf_counter()
        finish = save()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        stall = time.perf_counter() - began
        finish()
        seconds = time.perf_counter() - began
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return seconds if durable else stall

    # Each returns at once where it saves in the background, and then a function that waits for the disk.

    def ours(self, *, at_once: bool) -> Callable[[], None]:
        saver = self.savers[at_once]
        training = TrainingState({"optimizer": self.optim.state()}, {})
        saver.save(self.model, step=1, tokens=0, pretrain_block={}, training=training)
        return saver.wait

    def torch_save(self) -> Callable[[], None]:
        path = self.out / "checkpoint.pt"
        torch.save(self.state(), path)
        return lambda: flush(path)

    def dcp_save(self) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp

        warnings.filterwarnings("ignore")
        dcp.save(self.state(), checkpoint_id=self.out / "dcp", no_dist=True)
        return lambda: [flush(path) for path in (self.out / "dcp").iterdir()] and None

    def dcp_async(self) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp

        warnings.filterwarnings("ignore")
        future: Any = dcp.async_save(self.state(), checkpoint_id=self.out / "dcp", no_dist=True)

        def wait() -> None:
            future.result()
            for path in (self.out / "dcp").iterdir():
                flush(path)

        return wait

    def copy(self) -> Callable[[], None]:
        """The same bytes from memory to memory."""
        kept = [
            t.detach().to("cpu", copy=True) for part in self.state().values() for t in part.values()
        ]
        return kept.clear

    def contender(
        self, name: str, kind: str, save: Callable[[], Callable[[], None]], *, durable: bool
    ) -> Contender:
        def make() -> Made:
            run = functools.partial(self.measure, save, durable=durable)
            run()
            return run, Work(0, others={"bytes": self.bytes})

        return Contender(name, kind, make)


def flush(path: Path) -> None:
    """fsync a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save(settings: Settings) -> list[Callable[[], Case]]:
    """Row 8: stall in the background, time at once, and reading."""

    def case(durable: bool) -> Case:
        s = Saved(settings)
        title = f"{s.bytes / 1e9:.2g} GB of weights and moments: "
        ours = functools.partial(s.ours, at_once=durable)
        if durable:
            return Case(
                title + "until the checkpoint is durable", "seconds",
                [
                    s.contender("pretrain, at once", "ours", ours, durable=True),
                    s.contender("torch.save and fsync", "default", s.torch_save, durable=True),
                    s.contender("torch DCP save and fsync", "default", s.dcp_save, durable=True),
                ],
                {"torch.save and fsync": 1 / 1.5}, controlled=False, rounds=(2, 4),
                extra=lambda: (s.room.cleanup(), {})[1],
            )  # fmt: skip
        return Case(
            title + "stall of training", "seconds",
            [
                s.contender("pretrain, in the background", "ours", ours, durable=False),
                s.contender("one copy in memory", "floor", s.copy, durable=False),
                s.contender("torch.save", "default", s.torch_save, durable=False),
                s.contender("torch DCP async_save", "best", s.dcp_async, durable=False),
            ],
            {"floor": 1 / 1.3, "default": 3.0, "best": 1.0}, controlled=False, rounds=(2, 4),
            extra=lambda: (s.room.cleanup(), {})[1],
        )  # fmt: skip

    return [
        functools.partial(case, False),
        functools.partial(case, True),
        functools.partial(reading, settings),
    ]


def reading(settings: Settings) -> Case:
    """Opening the weights again, verified, beside reading the file and beside torch.load."""
    s = Saved(settings)
    path = s.model.save(s.out / "model")
    torch.save(dict(s.model.state_dict()), s.out / "weights.pt")
    file = max(path.glob("*.safetensors"), key=lambda p: p.stat().st_size)

    def clocked(work: Callable[[], Any]) -> Made:
        def run() -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        run()
        return run, Work(0)

    def fresh(tensors: Any) -> None:
        build(
            "gpt2", vocab_size=s.model.backbone.vocab_size, max_positions=128, **s.shape
        ).load_state_dict(tensors)

    return Case(
        f"{file.stat().st_size / 1e9:.2g} GB of weights: until they are in a model", "seconds",
        [
            Contender("pretrain.load, every byte checked", "ours", lambda: clocked(lambda: load(path, quiet=True))),
            Contender("reading the file", "floor", lambda: clocked(file.read_bytes)),
            Contender(
                "torch.load into a fresh model", "default",
                lambda: clocked(lambda: fresh(torch.load(s.out / "weights.pt", weights_only=True))),
            ),
        ],
        {"floor": 1 / 1.2}, controlled=False, rounds=(2, 4), extra=lambda: (s.room.cleanup(), {})[1],
    )  # fmt: skip
