"""Remarks on a run, one sentence each, that need only its log and a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.report.history import History, number, on_as_many

__all__ = ["compare_with_unigram", "curve_of", "overfitted", "resumed_with"]

# A run is reported as overfitted if its held-out loss ends at this multiple of its lowest value.
_OVERFIT = 1.15
# A held-out loss less than this part below the unigram baseline shows little more than the frequencies of tokens.
_NEAR_FREQUENCIES = 0.1


def compare_with_unigram(loss: float, unigram: float) -> str:
    """Return a phrase that compares a held-out loss with the unigram baseline, both in nats per token."""
    below = 1.0 - loss / unigram
    if below <= 0:
        return f"no better than word frequencies alone, {unigram:.4g}: nothing is learned from the context"
    text = f"{below:.0%} below the {unigram:.4g} of word frequencies alone"
    near = below < _NEAR_FREQUENCIES
    return f"{text}: the model has learned little more than these" if near else text


def overfitted(history: History) -> str | None:
    """Remark if the held-out loss ended well above its lowest value while the training loss fell."""
    evals = history.evals
    held_out = curve_of(on_as_many(evals, evals[0]), "loss") if evals else []
    training = [point for point in history.points("loss") if math.isfinite(point[1])]
    if len(held_out) < 2 or len(training) < 2:
        return None
    (low_step, low), (last_step, last) = min(held_out, key=lambda p: p[1]), held_out[-1]
    then = min(training, key=lambda point: abs(point[0] - low_step))[1]
    now = training[-1][1]
    if last < _OVERFIT * low or not now < then:
        return None
    return (
        f"the run overfitted: the held-out loss rose from {low:.4g} (step {low_step:,}) to {last:.4g} (step "
        f"{last_step:,}) while the training loss fell from {then:.4g} to {now:.4g}. More rows, fewer epochs or a "
        f"lower learning rate may help"
    )


def resumed_with(history: History) -> str | None:
    """Remark if the length of the run was changed on resuming, because its command repeats a run of one length."""
    found = [
        f"up to step {record.get('step')} it was planned with {record['planned']} steps"
        for record in history.events
        if record.get("event") == "resumed" and isinstance(record.get("planned"), int)
    ]
    if not found:
        return None
    return (
        f"the length of the run was changed on resuming ({'; '.join(found)}): a new run of the present length would "
        "have another learning rate in those steps, and other figures"
    )


def curve_of(evals: Sequence[Mapping[str, Any]], figure: str) -> list[tuple[int, float]]:
    """Return (step, value) of every evaluation in which the metric is finite."""
    points = [(int(number(r["step"])), number(r["eval"].get(figure))) for r in evals]
    return [(step, value) for step, value in points if math.isfinite(value)]
