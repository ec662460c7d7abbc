"""N-gram baseline of a next-token run: the held-out loss of a count model of the tokens that the run has seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.ngram import ORDER, KneserNey
from pretrain.data.shards import Rows

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["ngram_baseline"]

# Bounds memory (about 35 bytes per token) and time (about a quarter of a second per million tokens).
MOST_TOKENS = 5_000_000
# Fewer tokens take a run of seconds, and say nothing about either model.
LEAST_TOKENS = 100_000
_ROWS_AT_ONCE = 512


def ngram_baseline(trainer: Trainer) -> dict[str, float]:
    """Fit a Kneser-Ney model to the tokens that the run has seen; return and print its held-out loss.

    The n-gram model is evaluated on the tokens of the last evaluation of the run, all targets of the held-out rows.
    Only runs on prepared text whose objective gives bits per byte have such a baseline. Rank zero counts the n-grams.

    Returns:
        What a checkpoint records: ``kneser_ney_nats`` per target and ``kneser_ney_tokens``; empty without a baseline.
    """
    rows, held_out = trainer.train_data, trainer.eval_data
    figures = trainer.metrics
    if not (isinstance(rows, Rows) and isinstance(held_out, Rows) and "bits_per_byte" in figures):
        return {}
    if trainer.state.tokens < LEAST_TOKENS:
        trainer.say(
            f"no n-gram baseline: the run has seen {trainer.state.tokens:,} tokens, and it takes {LEAST_TOKENS:,}"
        )
        return {}
    most = math.ceil(MOST_TOKENS / max(1.0, rows.num_tokens / len(rows)))
    # A mixture of sources may visit a row twice.
    seen = np.unique(
        rows.order(trainer.train.seed).indices(
            0, min(trainer.state.rows, trainer.setup.plan.epoch_rows, most)
        )
    )

    def count() -> tuple[int, float]:
        model = KneserNey(_batches(rows, seen), rows.vocab_size)
        return model.num_tokens, model.loss(_batches(held_out, np.arange(len(held_out))))

    tokens, loss = trainer.world.broadcast_result(count)
    per_nat = figures["bits_per_byte"] / figures["loss"]
    unigram = trainer.about.get("unigram_nats")
    seen_by = "that the run saw" if tokens < MOST_TOKENS else "of those that the run saw"
    trainer.say(
        f"held out, bits per byte: {figures['bits_per_byte']:.3f}; Kneser-Ney model of order {ORDER}, counted on "
        f"{tokens:,} tokens {seen_by}, {loss * per_nat:.3f}"
        + (f"; unigram {unigram * per_nat:.3f}" if unigram else "")
        + ("  <- counting does better than this model" if loss < figures["loss"] else "")
    )
    return {"kneser_ney_nats": loss, "kneser_ney_tokens": tokens}


def _batches(rows: Rows, chosen: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(chosen), _ROWS_AT_ONCE):
        yield rows.gather(chosen[start : start + _ROWS_AT_ONCE])
