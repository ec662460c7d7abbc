"""Row 3, by name: CPU seconds of training until a held-out loss, on characters and on the tokens of a small vocabulary.

Ours is Muon on a qwen3; the peer is the 60-line script with AdamW at five rates, each with the same seeds. All
have the same rows in the same order, batch, depth and width, 20 steps of warm-up and then a constant rate; what is
trained with which optimizer is the recipe that is compared. Held-out rows are scored every ten steps off the clock. A
peer that does not get there has the seconds of its limit, so its ratio is a lower bound.
Texts: tiny_shakespeare, and books in 4,096 tokens, of PRETRAIN_TEST_DATA.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from pretrain.config import OptimConfig
from pretrain.models import build
from pretrain.training.optim import build_optimizers

from . import script
from .harness import Case, Contender, Settings, Stepper, Work, adamw
from .pretraining import our_objective

Made = tuple[Callable[[], float], Work]
LAYERS, WIDTH, HEADS = 4, 128, 2
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
WARM, EVERY = 20, 10


def data(*parts: str) -> Path:
    return Path(os.environ.get("PRETRAIN_TEST_DATA", "/nowhere")).joinpath(*parts)


def characters() -> tuple[int, torch.Tensor]:
    """Vocabulary size and ids of tiny_shakespeare, a letter each."""
    text = data("tiny_shakespeare", "input.txt").read_text(encoding="utf-8")
    numbers = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return len(numbers), torch.tensor([numbers[letter] for letter in text])


def tokens() -> tuple[int, torch.Tensor]:
    """Vocabulary size and ids of the chapters of books, under a byte-level BPE of 4,096 entries learnt from them."""
    with gzip.open(data("books", "books.jsonl.gz"), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, show_progress=False)
    return 4096, torch.tensor([i for coded in bpe.encode_batch(texts) for i in coded.ids])


@dataclass(frozen=True)
class Goal:
    """What is raced for.

    Attributes:
        name: in the title of the case.
        read: returns vocabulary size and ids of a text, of which the last tenth is held out.
        length, rows: of a batch.
        target: held-out loss in nats.
        steps, seconds: after which a contender stops.
    """

    name: str
    read: Callable[[], tuple[int, torch.Tensor]]
    length: int
    rows: int
    target: float
    steps: int
    seconds: float = float("inf")


SHAKESPEARE = Goal("characters of Shakespeare", characters, 64, 32, 1.88, 3000)
BOOKS = Goal("books in 4,096 tokens, within 240 seconds", tokens, 128, 16, 5.8, 10**6, 240.0)


class Race:
    """Rows of a text, and a race to a loss on those that are held out.

    Args:
        settings: of the run.
        goal: the text, and the loss.
    """

    def __init__(self, settings: Settings, goal: Goal) -> None:
        self.settings, self.goal = settings, goal
        self.vocab, ids = goal.read()
        cut, length = len(ids) * 9 // 10, goal.length
        rest = ids[cut : cut + (len(ids) - cut) // length * length].view(-1, length)
        self.train = ids[:cut]
        self.held_out = rest[:: max(1, len(rest) // 256)].to(settings.device)

    def batch(self, seed: int, step: int) -> torch.Tensor:
        draw, length = torch.Generator().manual_seed(1_000_003 * seed + step), self.goal.length
        starts = torch.randint(len(self.train) - length, (self.goal.rows,), generator=draw)
        return torch.stack([self.train[s : s + length] for s in starts]).to(self.settings.device)

    def race(
        self, module: nn.Module, loss: Callable[[Any], Any], optimizer: Any, seed: int
    ) -> tuple[float, bool]:
        """Seconds until the target or of all steps, and whether it was reached."""
        peaks = [[group["lr"] for group in one.param_groups] for one in optimizer]
        both = Together(optimizer)
        stepper = Stepper(module, loss, [], torch.float32, self.settings.device, both)
        spent = 0.0
        for step in range(self.goal.steps):
            for one, lrs in zip(optimizer, peaks, strict=True):
                for group, lr in zip(one.param_groups, lrs, strict=True):
                    group["lr"] = lr * min(1.0, (step + 1) / WARM)
            batch, began = self.batch(seed, step), self.settings.clock()
            stepper.step([batch])
            spent += self.settings.clock() - began
            if step % EVERY == EVERY - 1:
                with torch.no_grad():
                    if float(loss(self.held_out)) <= self.goal.target:
                        return spent, True
                if spent >= self.goal.seconds:
                    return self.goal.seconds, False
        return spent, False

    def ours(self, seed: int) -> float:
        torch.manual_seed(seed)
        model = build(
            "qwen3", None, vocab_size=self.vocab, num_layers=LAYERS, hidden_size=WIDTH, num_heads=HEADS,
            max_positions=self.goal.length,
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
            raise RuntimeError(f"Ours does not reach {self.goal.target} nats.")
        return spent

    def theirs(self, lr: float, seed: int) -> float:
        torch.manual_seed(seed)
        length = self.goal.length
        net = script.Script(LAYERS, WIDTH, HEADS, length, self.vocab).to(self.settings.device)
        for p in net.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        positions = torch.arange(length, device=self.settings.device)[None]

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

    def case(goal: Goal) -> Case:
        if settings.tiny:
            goal = replace(goal, target=4.0 if goal is SHAKESPEARE else 8.2, steps=40)
        race = Race(settings, goal)

        def racer(run: Callable[[int], float]) -> Made:
            seeds = itertools.count()
            return lambda: run(next(seeds)), Work(goal.rows * goal.length)

        part = functools.partial
        rates = RATES[1:2] if settings.tiny else RATES
        return Case(
            f"{goal.name} to {goal.target} nats, L{LAYERS} d{WIDTH} T{goal.length} B{goal.rows}",
            f"{settings.unit} of training",
            [
                Contender("pretrain, qwen3 with Muon", "ours", lambda: racer(race.ours)),
                *(
                    Contender(f"60-line script, AdamW {lr:g}", "best", part(racer, part(race.theirs, lr)))
                    for lr in rates
                ),
            ],
            {"best": 1 / 0.4}, controlled=False, rounds=(5, 5),
        )  # fmt: skip

    return [functools.partial(case, goal) for goal in (SHAKESPEARE, BOOKS)]
