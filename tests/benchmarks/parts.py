"""By name: single parts beside what they replace. They say little about a run; the row `decoder` does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch.nn import functional as F

from pretrain.nn import attention
from pretrain.nn.attention import AttentionMask, attend
from pretrain.nn.loss import chunked_cross_entropy
from pretrain.nn.norm import RMSNorm

from .harness import Case, Contender, Settings, Work, timed

Run = Callable[[], None]


def norms() -> tuple[Run, Run]:
    x = torch.randn(8192, 256, requires_grad=True)
    norm = RMSNorm(256, 1e-6)

    def ours() -> None:
        norm(x).sum().backward()

    def stock() -> None:
        F.rms_norm(x, (256,), norm.weight, 1e-6).sum().backward()

    return ours, stock


def packed(length: int) -> tuple[Run, Run]:
    """Rows of documents of about 60 tokens, per document in buckets and under one dense mask."""
    lengths = torch.randint(30, 90, (16, length // 30), generator=torch.Generator().manual_seed(0))
    ends = lengths.cumsum(1)
    documents = torch.stack(
        [torch.searchsorted(row, torch.arange(length), right=True) + 1 for row in ends]
    )
    q, k, v = (torch.randn(16, 4, length, 64, requires_grad=True) for _ in range(3))

    def ours() -> None:
        attend(
            q, k, v, AttentionMask(causal=True, documents=documents), 0.125, 0.0
        ).sum().backward()

    def stock() -> None:
        with mock.patch.object(attention, "is_worthwhile", return_value=False):
            ours()

    return ours, stock


def loss(targets: int, vocab: int) -> tuple[Run, Run]:
    hidden = torch.randn(targets, 256, requires_grad=True)
    weight = (torch.randn(vocab, 256) * 0.02).requires_grad_()
    labels = torch.randint(0, vocab, (targets,))

    def ours() -> None:
        chunked_cross_entropy(hidden, weight, labels)[0].backward()

    def stock() -> None:
        F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum").backward()

    return ours, stock


PARTS: dict[str, Callable[[], tuple[Run, Run]]] = {
    "RMS norm of 8192 x 256, both ways": norms,
    "attention, 16 rows of 512, documents of 60 tokens": functools.partial(packed, 512),
    "attention, 16 rows of 256, documents of 60 tokens": functools.partial(packed, 256),
    "loss of 1024 targets, V 8192": functools.partial(loss, 1024, 8192),
    "loss of 8192 targets, V 65": functools.partial(loss, 8192, 65),
}


def parts(settings: Settings) -> list[Callable[[], Case]]:
    """By name: on the CPU."""

    def case(name: str) -> Case:
        ours, stock = PARTS[name]()
        return Case(
            name, settings.unit,
            [
                Contender("pretrain", "ours", lambda: (timed(ours, settings), Work(0))),
                Contender("stock torch", "default", lambda: (timed(stock, settings), Work(0))),
            ],
        )  # fmt: skip

    return [
        functools.partial(case, name) for name in (list(PARTS)[2:3] if settings.tiny else PARTS)
    ]
