"""Remarks on the training of a fine-tuned model, derived from its metrics, for the summary and the report.

A run that ended too early or overfitted, a model that gives the same answer to everything or is worse than a linear
model on word counts, and held-out rows of another kind than the test rows raise no error. Each is reported in one line.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pretrain.config.spelling import option
from pretrain.errors import DataError
from pretrain.finetuning.baseline import (
    METRICS,
    VECTORS,
    linear_model,
    tfidf_baseline,
    vector_baseline,
)
from pretrain.report.history import History, sort_records
from pretrain.report.remarks import curve_of, overfitted, resumed_with
from pretrain.training.validation import LOWER_IS_BETTER

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned

__all__ = ["remarks"]

# Smallest improvement at the end that is reported: absolute for a metric between 0 and 1, else relative.
_RISE, _RELATIVE_RISE = 0.005, 0.01
# Part of the distance from the trivial baseline to perfection (to zero for a loss) that counts as hardly better.
_NEAR_GUESSING = 0.05
# The classical baseline is only computed if it takes seconds: rows times classes, and characters. On one core 1,000
# rows of 77 classes take 5 s, 1,600 film reviews of 6 million characters 8 s, 6,000 short phrases of two classes 0.5 s.
_CELLS, _CHARACTERS = 100_000, 8_000_000
# Metrics that are means over rows, and correlations; the number of standard errors that one difference in a hundred
# exceeds by chance, and the fewest rows for this test.
_SHARES, _CORRELATIONS = ("accuracy", "exact_match", "exact"), ("pearson", "spearman")
_ONE_IN_A_HUNDRED, _FEWEST = 2.576, 20


def remarks(result: Finetuned) -> list[str]:
    """Return the remarks that apply, one sentence each."""
    history = sort_records(result.run.history)
    found = [
        hardly_better_than_trivial(result),
        still_improving(history, result.monitor),
        overfitted(history),
        resumed_with(history),
        _constant(result),
        _classical(result),
        held_out_unlike_test(result.metrics, result.test_metrics or {}, result.counts),
    ]
    return [line for line in found if line]


def hardly_better_than_trivial(result: Finetuned) -> str | None:
    """Remark if the model is hardly better than the trivial baseline of its task, on the held-out rows."""
    name = result.monitor
    if name not in result.metrics or name not in result.trivial:
        return None
    ours, guess = float(result.metrics[name]), float(result.trivial[name])
    if not (math.isfinite(ours) and math.isfinite(guess)):
        return None
    sign = -1.0 if name in LOWER_IS_BETTER else 1.0
    # Held-out rows of the most frequent class alone leave nothing to be better at.
    if sign > 0 and ours == guess == 1:
        return None
    ahead = sign * (ours - guess)
    room = abs(guess) if sign < 0 or not 0 <= guess < 1 else 1.0 - guess
    if ahead > _NEAR_GUESSING * room:
        return None
    words = "little more than" if ahead > 0 else "nothing beyond"
    return (
        f"the held-out {name} is {ours:.4g}, against {guess:.4g} ({result.task.trivial_name}): the model has learned "
        f"{words} that baseline"
    )


def still_improving(history: History, monitor: str) -> str | None:
    """Remark if the last evaluation is the best, and clearly better than all but the last fifth of the evaluations."""
    curve = curve_of(history.evals, monitor)
    if len(curve) < 3:
        return None
    sign = -1.0 if monitor in LOWER_IS_BETTER else 1.0
    last_step, last = curve[-1]
    before = curve[: -max(1, len(curve) // 5)]
    step, best = max(before, key=lambda point: sign * point[1])
    rise = sign * (last - best)
    enough = _RISE if 0 <= last <= 1 and sign > 0 else _RELATIVE_RISE * abs(best)
    if rise <= enough or any(sign * value > sign * last for _, value in curve):
        return None
    return (
        f"the held-out {monitor} still {'rose' if sign > 0 else 'fell'} when the run ended ({best:.4g} after step "
        f"{step:,}, {last:.4g} after step {last_step:,}): more epochs may help"
    )


def held_out_unlike_test(
    held_out: Mapping[str, float], test: Mapping[str, float], rows: Mapping[str, int]
) -> str | None:
    """Remark if the held-out and the test metric differ by more than chance, as for rows of one distribution.

    Shares of correct rows are compared by the test of two proportions, correlations by Fisher's transformation; metrics
    over words count as many independent observations as there are rows.
    """
    name = next((n for n in (*_SHARES, *_CORRELATIONS) if n in held_out and n in test), None)
    counts = (rows.get("valid", 0), rows.get("test", 0))
    if name is None or min(counts) < _FEWEST:
        return None
    first, second = held_out[name], test[name]
    if name in _SHARES:
        common = (first * counts[0] + second * counts[1]) / sum(counts)
        error = math.sqrt(common * (1 - common) * (1 / counts[0] + 1 / counts[1]))
        distance = first - second
    else:
        if not (abs(first) < 1 and abs(second) < 1):
            return None
        error = math.sqrt(1 / (counts[0] - 3) + 1 / (counts[1] - 3))
        distance = math.atanh(first) - math.atanh(second)
    if not abs(distance) > _ONE_IN_A_HUNDRED * error:
        return None
    return (
        f"the {name} on the held-out rows ({first:.4g}) and on the test rows ({second:.4g}) differ by more than "
        f"chance: they are rows of different kinds, or the held-out rows resemble training rows (pieces of one "
        f"document, one author or template: {option('group', 'COLUMN')} keeps those together)"
    )


def _constant(result: Finetuned) -> str | None:
    """Remark if all held-out rows get the same answer, although they differ in the right one."""
    figures, task, table = result.metrics, result.task, result.data.valid
    # A correlation above or below 0 proves that answers differ. No other figure does, so rows are predicted again, a
    # few at a time, up to the first other answer.
    if any(name in figures and abs(figures[name]) > 0 for name in ("mcc", "pearson")):
        return None
    right = [{task.answer_key: truth} for truth in task.truth(table) or () if truth is not None]
    if right and len({repr(choice) for answer in right for choice in task.choices(answer)}) == 1:
        return None
    answers: set[str] = set()
    answered = 0
    for answer in task.predict(table, batch_rows=32):
        answered += 1
        answers |= {repr(choice) for choice in task.choices(answer)}
        if len(answers) > 1:
            return None
    if not answers or answered < 2:
        return None
    return (
        f"the model gives the same answer to all {answered:,} held-out rows ({answers.pop()[:60]}): it has learnt "
        f"nothing that tells them apart"
    )


def _classical(result: Finetuned) -> str | None:
    """Remark if TF-IDF, pixels or log-mel under a linear model do better on the same rows, or on pixels of them.

    Any figure is better than none, which the correlation of a model with one answer to everything is.
    """
    metric, data = result.monitor, result.data
    ours = (result.metrics if data.test is None else result.test_metrics or {}).get(metric)
    theirs = None if ours is None else result.classical
    if ours is None or theirs is None or math.isnan(theirs) or theirs <= ours:
        return None
    where = "held-out" if data.test is None else "test"
    read = result.task.baseline
    seen = VECTORS[read].rows if read in VECTORS else "the same rows"
    return (
        f"a classical baseline is better: {read} with {linear_model(metric)} on {seen} has {metric} {theirs:.4f} on "
        f"the {where} rows, this model {ours:.4f}"
    )


def classical_baseline(result: Finetuned) -> float | None:
    """Return the metric of TF-IDF, pixels, regions or log-mel under a linear model, on the test or the held-out rows.

    None if there is no such baseline: another task, several labels per row, scikit-learn is not installed, or there
    are so many rows that it would take more than a few seconds.
    """
    data, metric, task = result.data, result.monitor, result.task
    judged = data.valid if data.test is None else data.test
    if not len(data.valid) or importlib.util.find_spec("sklearn") is None:
        return None
    if (outputs := task.baseline_outputs(data.train, judged, result.labels or ())) is not None:
        return task.summarize(0.0, 0.0, outputs, {}).get(metric)
    if task.baseline is None or metric not in METRICS:
        return None
    classes = len(result.labels or ()) or 2
    if len(data.train) * classes > _CELLS:
        return None
    try:
        tables = [task.named(table, data.learned) for table in (data.train, data.valid, judged)]
        columns = task.baseline_columns(*tables)
        if (kind := VECTORS.get(task.baseline)) is not None:
            baseline = vector_baseline(task.baseline, *columns, grid=kind.quick, metric=metric)
        elif sum(len(str(text)) for texts in columns[::2] for text in texts) <= _CHARACTERS:
            baseline = tfidf_baseline(*columns, grid=(1.0, 10.0), stop_words=(None,), metric=metric)
        else:
            return None
    except DataError:
        return None
    return float(baseline["score_test"])
