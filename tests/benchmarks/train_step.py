"""A training step of ours against transformers with the same shapes, number type, data and optimizer.

    python tests/benchmarks/train_step.py                       # decoder on the CPU, one thread
    python tests/benchmarks/train_step.py --workload encoder
    python tests/benchmarks/train_step.py --device cuda --size base --length 1024 --rows 32 --vocab 50304

Contenders alternate A B B A in one process; an A/A control comes first. Printed are medians, the ratio of paired
rounds and, for ours, FLOP utilisation. On a CPU time is that of the process, so other programs disturb it little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from pretrain.config import OptimConfig
from pretrain.data.loader import row_rngs
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.objectives import build_objective
from pretrain.training.optim import build_optimizers
from pretrain.training.precision import choose_precision, peak_flops

SIZES = {"bench": (6, 256, 4), "base": (12, 768, 12), "tiny": (2, 64, 2)}


class _Tokenizer:
    """As many tokens as the vocabulary, of which the first five are special."""

    mask_id, special_ids = 4, frozenset(range(5))

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def rows_of(count: int, length: int, vocab: int, filled: float) -> list[dict[str, np.ndarray]]:
    """Rows of documents whose lengths are lognormal; ``filled`` 1 gives rows without padding."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        real = (
            length
            if filled >= 1
            else int(np.clip(rng.lognormal(np.log(length * filled), 0.6), 8, length))
        )
        ids = np.zeros(length, np.int64)
        ids[:real] = rng.integers(5, vocab, real)
        documents = (np.arange(length) < real).astype(np.int64)
        rows.append(
            {"input_ids": ids, "document_ids": documents, "position_ids": np.arange(length)}
        )
    return rows


def contenders(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], float], Callable[[], float], Any]:
    """Ours and the peer's training step; each returns its loss per target."""
    layers, hidden, heads = SIZES[args.size]
    encoder = args.workload == "encoder"
    precision = choose_precision(args.precision, device)
    model = build(
        "bert" if encoder else "gpt2",
        None,
        vocab_size=args.vocab,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        max_positions=args.length,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model.tokenizer = _Tokenizer(args.vocab)  # type: ignore[assignment]
    objective = build_objective("MaskedLM" if encoder else "NextToken", {}, model).to(device)
    config = transformers.AutoConfig.for_model(**model.hf_config())
    auto = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
    peer = auto.from_config(config, attn_implementation="sdpa")
    peer.load_state_dict(model.disk_state(), strict=False)
    peer.to(device).train()
    rows = rows_of(args.rows, args.length, args.vocab, args.filled)
    batch = objective.collate(rows, row_rngs(0, "collate", 0, args.rows))
    batch = {key: value.to(device) for key, value in batch.items()}
    # Our batches leave out ids that say nothing; the peer gets the mask its documentation asks for.
    seen = batch.get("document_ids", torch.ones_like(batch["input_ids"])) != 0
    peer_batch = {
        "input_ids": batch["input_ids"],
        "attention_mask": seen.long(),
        "labels": batch["labels"],
    }
    if not encoder:
        # transformers shifts labels itself.
        peer_batch["labels"] = torch.where(seen, batch["input_ids"], -100)
    settings = OptimConfig()
    mine = build_optimizers(objective, settings, model.backbone.blocks(), device)
    theirs = torch.optim.AdamW(peer.parameters(), lr=settings.lr, betas=settings.betas, fused=True)
    count = float(objective.count(batch))

    def ours() -> float:
        with precision.autocast():
            loss = objective(batch)
        (loss.total / count).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        mine.step()
        mine.zero_grad()
        return float(loss.total.detach()) / count

    def other() -> float:
        with precision.autocast():
            loss = peer(**peer_batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad()
        return float(loss.detach())

    real = int(seen.sum())
    flops = objective.flops(real, int(count), args.length)
    return ours, other, (precision, real, flops, model)


def measure(step: Callable[[], float], repeat: int, device: torch.device) -> float:
    """Seconds of one call: process time on a CPU, wall time between two synchronisations on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeat):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeat
    start = time.process_time()
    for _ in range(repeat):
        step()
    return (time.process_time() - start) / repeat


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=("decoder", "encoder"), default="decoder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--size", choices=tuple(SIZES), default="bench")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument(
        "--filled", type=float, default=1.0, help="median share of a row that is not padding"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    ours, other, (precision, real, flops, model) = contenders(args, device)
    first, reference = ours(), other()
    print(f"first loss: ours {first:.6f}, transformers {reference:.6f}")
    for step in (ours, other):
        for _ in range(3):
            step()
    control = [
        measure(ours, args.repeat, device) / measure(ours, args.repeat, device)
        for _ in range(args.rounds)
    ]
    mine, theirs = [], []
    for round_ in range(args.rounds):
        order = (ours, other) if round_ % 2 == 0 else (other, ours)
        taken = {step: measure(step, args.repeat, device) for step in order}
        mine.append(taken[ours])
        theirs.append(taken[other])
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    seconds = statistics.median(mine)
    peak = peak_flops(precision)
    assert isinstance(model, Model)
    print(
        json.dumps(
            {
                "workload": args.workload,
                "shape": [*SIZES[args.size], args.length, args.rows, args.vocab],
                "filled": real / (args.rows * args.length),
                "precision": precision.name,
                "ours_ms": round(1e3 * seconds, 2),
                "transformers_ms": round(1e3 * statistics.median(theirs), 2),
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "control_median": round(statistics.median(control), 3),
                "real_tokens_per_second": round(real / seconds),
                "flop_utilisation": round(flops / seconds / peak, 3),
                "parameters": model.num_parameters(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
