"""Row 3, by name: CPU seconds of training until a held-out loss on the characters of Shakespeare.

Ours is Muon on a qwen3; the peer is the 60-line script with AdamW at five rates, each with the same seeds. All
have the same rows in the same order, batch, depth and width, 20 steps of warm-up and then a constant rate; what is
trained with which optimizer is the recipe that is compared. Held-out rows are scored every ten steps off the clock.
Text: tiny_shakespeare of PRETRAIN_TEST_DATA.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig
from pretrain.models import build
from pretrain.training.optim import build_optimizers

from . import script
from .harness import Case, Contender, Settings, Stepper, Work, adamw
from .pretraining import our_objective

Made = tuple[Callable[[], float], Work]
LAYERS, WIDTH, HEADS, LENGTH, ROWS = 4, 128, 2, 64, 32
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
WARM, EVERY = 20, 10


class Shakespeare:
    """Rows of characters, and a race to a loss.

    Args:
        settings: of the run.
        target: held-out loss in nats.
        most: steps after which a contender has failed.
    """

    def __init__(self, settings: Settings, target: float, most: int) -> None:
        self.settings, self.target, self.most = settings, target, most
        folder = Path(os.environ.get("PRETRAIN_TEST_DATA", "/nowhere")) / "tiny_shakespeare"
        text = (folder / "input.txt").read_text(encoding="utf-8")
        letters = sorted(set(text))
        self.vocab = len(letters)
        numbers = {letter: i for i, letter in enumerate(letters)}
        ids = torch.tensor([numbers[letter] for letter in text])
        cut = len(ids) * 9 // 10
        rest = ids[cut : cut + (len(ids) - cut) // LENGTH * LENGTH].view(-1, LENGTH)
        self.train, self.held_out = ids[:cut], rest[:: max(1, len(rest) // 256)].to(settings.device)

    def batch(self, seed: int, step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        starts = torch.randint(len(self.train) - LENGTH, (ROWS,), generator=draw)
        return torch.stack([self.train[s : s + LENGTH] for s in starts]).to(self.settings.device)

    def race(
        self, module: nn.Module, loss: Callable[[Any], Any], optimizer: Any, seed: int
    ) -> tuple[float, bool]:
        """Seconds until the target or of all steps, and whether it was reached."""
        peaks = [[group["lr"] for group in one.param_groups] for one in optimizer]
        both = Together(optimizer)
        stepper = Stepper(module, loss, [], torch.float32, self.settings.device, both)
        spent = 0.0
        for step in range(self.most):
            for one, lrs in zip(optimizer, peaks, strict=True):
                for group, lr in zip(one.param_groups, lrs, strict=True):
                    group["lr"] = lr * min(1.0, (step + 1) / WARM)
            batch, began = self.batch(seed, step), self.settings.clock()
            stepper.step([batch])
            spent += self.settings.clock() - began
            if step % EVERY == EVERY - 1:
                with torch.no_grad():
                    if float(loss(self.held_out)) <= self.target:
                        return spent, True
        return spent, False

    def ours(self, seed: int) -> float:
        torch.manual_seed(seed)
        model = build(
            "qwen3", None, vocab_size=self.vocab, num_layers=LAYERS, hidden_size=WIDTH, num_heads=HEADS,
            max_positions=LENGTH,
        )  # fmt: skip
        objective = our_objective(model, "NextToken", self.settings.device)
        optim = OptimConfig(name="muon", lr=3e-3)
        made = build_optimizers(objective, optim, model.backbone.blocks(), self.settings.device)

        def loss(ids: torch.Tensor) -> torch.Tensor:
            labels = torch.full_like(ids, -100)
            labels[:, :-1] = ids[:, 1:]
            found = objective({"input_ids": ids, "labels": labels})
            return found.total / found.count

        spent, reached = self.race(objective, loss, made.optimizers, seed)
        if not reached:
            raise RuntimeError(f"Ours does not reach {self.target} in {self.most:,} steps.")
        return spent

    def theirs(self, lr: float, seed: int) -> float:
        torch.manual_seed(seed)
        net = script.Script(LAYERS, WIDTH, HEADS, LENGTH, self.vocab).to(self.settings.device)
        for p in net.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        positions = torch.arange(LENGTH, device=self.settings.device)[None]

        def loss(ids: torch.Tensor) -> torch.Tensor:
            labels = torch.full_like(ids, -100)
            labels[:, :-1] = ids[:, 1:]
            return net(ids, labels, positions.expand_as(ids), script.causal)

        return self.race(net, loss, [adamw(net, lr)], seed)[0]  # not reached: it took longer still


class Together:
    """Several optimizers as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def zero_grad(self) -> None:
        for one in self.optimizers:
            one.zero_grad()


def time_to_loss(settings: Settings) -> list[Callable[[], Case]]:
    """Row 3: one round for each seed."""

    def case() -> Case:
        target, most = (4.0, 40) if settings.tiny else (1.88, 3000)
        s = Shakespeare(settings, target, most)

        def racer(run: Callable[[int], float]) -> Made:
            seeds: list[int] = []

            def next_seed() -> float:
                seeds.append(len(seeds))
                return run(seeds[-1])

            return next_seed, Work(ROWS * LENGTH)

        part = functools.partial
        rates = RATES[1:2] if settings.tiny else RATES
        return Case(
            f"characters of Shakespeare to {target} nats, L{LAYERS} d{WIDTH} T{LENGTH} B{ROWS}",
            f"{settings.unit} of training",
            [
                Contender("pretrain, qwen3 with Muon", "ours", lambda: racer(s.ours)),
                *(
                    Contender(f"60-line script, AdamW {lr:g}", "best", part(racer, part(s.theirs, lr)))
                    for lr in rates
                ),
            ],
            {"best": 1 / 0.4}, controlled=False, rounds=(5, 5),
        )  # fmt: skip

    return [case]
