"""Single parts against what they replace, on the CPU: RMS norm, packed attention, the chunked loss, a durable save.

    python tests/benchmarks/parts.py

One thread, process time (a save: wall time), medians of paired rounds. Above 1 is faster than the stock way. Small
parts say little about a run; `train_step.py` measures that.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pretrain.checkpoint import save_model
from pretrain.models import build
from pretrain.nn import attention
from pretrain.nn.attention import AttentionMask, attend
from pretrain.nn.loss import chunked_cross_entropy
from pretrain.nn.norm import RMSNorm

Run = Callable[[], None]
ROUNDS = 9


def compare(
    name: str, ours: Run, stock: Run, clock: Callable[[], float] = time.process_time
) -> None:
    """Print both medians and the median ratio of paired rounds."""
    for run in (ours, stock):
        run()
    pairs = []
    for round_ in range(ROUNDS):
        taken = {}
        for run in (ours, stock) if round_ % 2 else (stock, ours):
            start = clock()
            run()
            taken[run] = clock() - start
        pairs.append((taken[ours], taken[stock]))
    mine = 1e3 * statistics.median(a for a, _ in pairs)
    theirs = 1e3 * statistics.median(b for _, b in pairs)
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"| {name} | {mine:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)


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
    torch.manual_seed(0)
    lengths = torch.randint(30, 90, (16, length // 30))
    ends = lengths.cumsum(1)
    documents = torch.stack(
        [torch.searchsorted(row, torch.arange(length), right=True) + 1 for row in ends]
    )
    q, k, v = (torch.randn(16, 4, length, 64, requires_grad=True) for _ in range(3))

    def ours() -> None:
        mask = AttentionMask(causal=True, documents=documents)
        attend(q, k, v, mask, 0.125, 0.0).sum().backward()

    def stock() -> None:
        with mock.patch.object(attention, "pays", return_value=False):
            mask = AttentionMask(causal=True, documents=documents)
            attend(q, k, v, mask, 0.125, 0.0).sum().backward()

    return ours, stock


def loss(targets: int, vocab: int) -> tuple[Run, Run]:
    hidden = torch.randn(targets, 256, requires_grad=True)
    weight = (torch.randn(vocab, 256) * 0.02).requires_grad_()
    labels = torch.randint(0, vocab, (targets,))

    def ours() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, _ = chunked_cross_entropy(hidden, weight, labels)
        total.backward()

    def stock() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
        total.backward()

    return ours, stock


def saving(folder: Path) -> tuple[Run, Run]:
    """Durable, hashed and verified, against a plain write of the same tensors."""
    model = build("gpt2", "small", vocab_size=4096)
    tensors = model.disk_state()
    return (
        lambda: (save_model(model, folder / "ours"), None)[1],
        lambda: save_file(tensors, folder / "stock.safetensors"),
    )


def main() -> None:
    """Measure all parts."""
    torch.set_num_threads(1)
    print("| part | ours, ms | stock, ms | stock / ours |\n|---|---|---|---|")
    compare("RMS norm of 8192 x 256, both ways", *norms())
    compare("attention, 16 rows of 512, documents of 60 tokens", *packed(512))
    compare("attention, 16 rows of 256, documents of 60 tokens", *packed(256))
    compare("loss of 1024 targets, V 8192", *loss(1024, 8192))
    compare("loss of 8192 targets, V 65", *loss(8192, 65))
    with tempfile.TemporaryDirectory() as folder:
        compare("save of 12 M parameters", *saving(Path(folder)), clock=time.perf_counter)


if __name__ == "__main__":
    main()
