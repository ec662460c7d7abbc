"""Evaluation metrics as pure numpy functions, from accumulated sums or from whole columns of numbers.

Classification and regression follow the conventions of scikit-learn (Pedregosa et al., 2011) and scipy, entity
scores those of CoNLL-2000 (Tjong Kim Sang and Buchholz) in the lenient reading that seqeval made common, answers the
rules of SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018), intervals Student (1908). An undefined metric (no rows, a
constant column) is nan, without a warning; scores are in [0, 1], not in percent.

Letters in shapes: C classes, L labels, N rows.
"""

from __future__ import annotations

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.errors import ConfigError, DataError

__all__ = [
    "accuracy",
    "box_iou",
    "confusion_matrix",
    "detection_precision",
    "entities",
    "entity_counts",
    "entity_f1",
    "exact_match",
    "iou",
    "is_bio",
    "macro_f1",
    "mae",
    "matthews",
    "mean_interval",
    "mean_iou",
    "mse",
    "multilabel_counts",
    "multilabel_scores",
    "normalize_answer",
    "pearson",
    "per_class",
    "r2",
    "ranking",
    "rmse",
    "roc_auc",
    "sensitivity",
    "spearman",
    "student_t",
    "token_f1",
    "weighted_f1",
    "without_overlap",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Span = tuple[str, int, int]


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, num_classes: int) -> Ints:
    """Count (true, predicted) pairs of class ids: (N,), (N,) -> (C, C), rows are the truth.

    Raises:
        DataError: the columns differ in length, or an id lies outside [0, C).
    """
    rows, columns = np.asarray(true, np.int64).ravel(), np.asarray(predicted, np.int64).ravel()
    _same_length(rows, columns)
    for name, ids in (("true", rows), ("predicted", columns)):
        wrong = np.flatnonzero((ids < 0) | (ids >= num_classes))
        if wrong.size:
            raise DataError(
                f"The {name} class id of row {wrong[0]} is {ids[wrong[0]]}, outside the {num_classes} classes. Ids "
                f"count from 0; leave rows without a label (-100) out."
            )
    flat = np.bincount(rows * num_classes + columns, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def accuracy(matrix: ArrayLike) -> float:
    """Share of the rows on the diagonal of a confusion matrix (C, C); nan for no rows."""
    counts = _square(matrix)
    return _ratio(float(np.trace(counts)), float(counts.sum()))


def per_class(matrix: ArrayLike) -> tuple[Floats, Floats, Floats, Floats]:
    """Precision, recall, F1 and support of every class, each (C,), from a confusion matrix (C, C).

    A quotient 0 / 0 counts as 0: a class that is never predicted has precision 0, as in scikit-learn with
    ``zero_division=0``.
    """
    counts = _square(matrix)
    hits, predicted, support = np.diagonal(counts), counts.sum(0), counts.sum(1)
    return (
        _ratios(hits, predicted),
        _ratios(hits, support),
        _ratios(2 * hits, predicted + support),
        support,
    )


def macro_f1(matrix: ArrayLike, *, present_only: bool = True) -> float:
    """Unweighted mean of the F1 of the classes of a confusion matrix (C, C); nan for no rows.

    Args:
        matrix: counts, rows are the truth.
        present_only: leave out classes that occur neither in the truth nor in the predictions, as scikit-learn does
            unless it is given a list of labels; else they count as 0.
    """
    counts = _square(matrix)
    if not counts.sum():
        return math.nan
    f1 = per_class(counts)[2]
    present = (counts.sum(0) + counts.sum(1)) > 0
    return float(np.mean(f1[present] if present_only else f1))


def weighted_f1(matrix: ArrayLike) -> float:
    """Mean of the F1 of the classes weighted by their support, from a confusion matrix (C, C); nan for no rows."""
    _, _, f1, support = per_class(matrix)
    return _ratio(float(f1 @ support), float(support.sum()))


def matthews(matrix: ArrayLike) -> float:
    """Matthews correlation of a confusion matrix (C, C), for any number of classes (Gorodkin, 2004).

    0 where truth or predictions hold one class only, as in scikit-learn; nan for no rows.
    """
    counts = _square(matrix)
    rows = counts.sum()
    if not rows:
        return math.nan
    truth, predicted = counts.sum(1) / rows, counts.sum(0) / rows
    # Shares instead of counts: the fourth power of a large count would lose its low digits.
    both = np.trace(counts) / rows - truth @ predicted
    spread = (1.0 - truth @ truth) * (1.0 - predicted @ predicted)
    one_class = np.count_nonzero(truth) < 2 or np.count_nonzero(predicted) < 2
    return 0.0 if one_class else float(np.clip(both / math.sqrt(spread), -1.0, 1.0))


def iou(matrix: ArrayLike) -> Floats:
    """Intersection over union (Jaccard index) of every class of a confusion matrix (C, C), (C,).

    A class that occurs neither in the truth nor in the predictions has none: nan.
    """
    counts = _square(matrix)
    hits = np.diagonal(counts)
    union = counts.sum(0) + counts.sum(1) - hits
    return np.where(union > 0, _ratios(hits, union), np.nan)


def mean_iou(matrix: ArrayLike) -> float:
    """Mean intersection over union of the classes that occur in truth or predictions; nan for no pixels."""
    found = iou(matrix)
    known = found[np.isfinite(found)]
    return float(known.mean()) if known.size else math.nan


def box_iou(boxes: ArrayLike, others: ArrayLike) -> Floats:
    """Intersection over union of boxes of left, top, right, bottom, (N, 4), (M, 4) -> (N, M); 0 of empty boxes."""
    one = np.asarray(boxes, np.float64).reshape(-1, 1, 4)
    two = np.asarray(others, np.float64).reshape(1, -1, 4)
    sides = np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])
    shared = np.clip(sides, 0, None).prod(-1)
    areas = [np.clip(b[..., 2:] - b[..., :2], 0, None).prod(-1) for b in (one, two)]
    return _ratios(shared, areas[0] + areas[1] - shared)


def without_overlap(found: NDArray[Any], most: float = 0.5) -> NDArray[Any]:
    """Leave out boxes that overlap a better one of their class by more than ``most`` (non-maximum suppression).

    Args:
        found: boxes of left, top, right, bottom with their score and class, (N, 6), best first.
        most: intersection over union.
    """
    overlap = box_iou(found[:, :4], found[:, :4])
    overlap *= found[:, None, 5] == found[None, :, 5]
    kept: list[int] = []
    for i in range(len(found)):
        if not kept or overlap[i, kept].max() <= most:
            kept.append(i)
    return found[kept]


def detection_precision(
    images: Sequence[tuple[ArrayLike, ArrayLike]], num_classes: int, thresholds: Sequence[float]
) -> Floats:
    """Average precision of every class at thresholds of overlap, (thresholds, C), as COCO computes it.

    In the order of their scores, boxes are matched with the true box of their class and image that overlaps them most
    and has no better match. Precision, made monotone, is averaged over 101 values of recall. A class without true boxes
    has no average precision: nan.

    Args:
        images: for each image its true boxes (N, 5), left, top, right, bottom and class, and the predicted ones (M, 6),
            the same with a score before the class.
        num_classes: C.
        thresholds: smallest intersection over union of a match.
    """
    sums = np.zeros(num_classes, np.int64)
    scores: list[list[Floats]] = [[] for _ in range(num_classes)]
    hits: list[list[NDArray[np.bool_]]] = [[] for _ in range(num_classes)]
    for truth, found in images:
        true, guessed = np.asarray(truth).reshape(-1, 5), np.asarray(found).reshape(-1, 6)
        for k in np.union1d(true[:, 4], guessed[:, 5]).astype(int):
            own = true[true[:, 4] == k, :4]
            boxes = guessed[guessed[:, 5] == k]
            boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
            sums[k] += len(own)
            scores[k].append(boxes[:, 4])
            hits[k].append(_matches(box_iou(boxes[:, :4], own), thresholds))
    result = np.full((len(thresholds), num_classes), np.nan)
    for k in np.flatnonzero(sums):
        order = np.argsort(-np.concatenate(scores[k]), kind="stable")
        right = np.concatenate(hits[k], axis=1)[:, order].cumsum(1)  # (thresholds, boxes)
        recall, precision = right / sums[k], right / np.arange(1, len(order) + 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for t in range(len(thresholds)):
            places = np.searchsorted(recall[t], np.linspace(0, 1, 101), side="left")
            inside = places < len(order)
            result[t, k] = precision[t, places[inside]].sum() / 101
    return result


def _matches(overlap: Floats, thresholds: Sequence[float]) -> NDArray[np.bool_]:
    """Return which boxes, best score first, match a true box: (N, M) -> (thresholds, N)."""
    matched = np.zeros((len(thresholds), len(overlap)), dtype=bool)
    for t, least in enumerate(thresholds):
        free = np.ones(overlap.shape[1], dtype=bool)
        for i, row in enumerate(overlap):
            best = int(np.argmax(np.where(free, row, -1.0))) if free.any() else 0
            if free.any() and row[best] >= least - 1e-10:
                free[best], matched[t, i] = False, True
    return matched


def multilabel_counts(true: ArrayLike, predicted: ArrayLike) -> tuple[Ints, Ints, Ints, int]:
    """Count tp, fp and fn per label, each (L,), and rows correct in every label, from two (N, L) tables of 0 and 1."""
    truth, guess = np.asarray(true, dtype=bool), np.asarray(predicted, dtype=bool)
    if truth.shape != guess.shape or truth.ndim != 2:
        raise DataError(
            f"Multi-label truth has the shape {truth.shape} and the predictions {guess.shape}; both must be "
            f"(rows, labels)."
        )
    exact = int((truth == guess).all(axis=1).sum())
    return (truth & guess).sum(0), (~truth & guess).sum(0), (truth & ~guess).sum(0), exact


def multilabel_scores(
    tp: ArrayLike, fp: ArrayLike, fn: ArrayLike, exact: float, rows: float
) -> dict[str, float]:
    """Scores of a multi-label task from sums over its rows.

    Args:
        tp: true positives per label, (L,).
        fp: false positives per label, (L,).
        fn: false negatives per label, (L,).
        exact: number of rows that are correct in every label.
        rows: number of all rows.

    Returns:
        ``micro_f1`` over all decisions, ``macro_f1`` the mean over all labels (0 / 0 counts as 0, as in
        scikit-learn with ``zero_division=0``), ``exact_match`` the share of rows correct in every label.
    """
    hits, extra, missed = (np.asarray(one, np.float64) for one in (tp, fp, fn))
    f1 = _ratios(2 * hits, 2 * hits + extra + missed)
    total, wrong = float(hits.sum()), float(extra.sum() + missed.sum())
    none = not rows
    return {
        "micro_f1": math.nan if none else 2 * total / (2 * total + wrong) if total else 0.0,
        "macro_f1": math.nan if none or not f1.size else float(f1.mean()),
        "exact_match": _ratio(exact, rows),
    }


def pearson(true: ArrayLike, predicted: ArrayLike) -> float:
    """Pearson's correlation of two columns (N,); nan for fewer than two rows or a constant column."""
    return _correlation(*_columns(true, predicted))


def spearman(true: ArrayLike, predicted: ArrayLike) -> float:
    """Spearman's correlation of two columns (N,): Pearson's of the ranks, ties share their average rank."""
    x, y = _columns(true, predicted)
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    return _correlation(_ranks(x), _ranks(y))


def roc_auc(true: ArrayLike, scores: ArrayLike) -> float:
    """Area under the receiver operating characteristic: the chance that of two rows the positive one scores higher.

    Args:
        true: (N,) of 0 and 1.
        scores: (N,), higher for 1; ties count half.
    """
    x, y = _columns(true, scores)
    positive = x > 0.5
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others or not np.isfinite(y).all():
        return math.nan
    return float((_ranks(y)[positive].sum() - count * (count + 1) / 2) / (count * others))


def sensitivity(true: ArrayLike, scores: ArrayLike, specificity: float = 0.95) -> float:
    """Largest share of the positive rows that are found with at least that share of the negative rows left out.

    Args:
        true: (N,) of 0 and 1.
        scores: (N,), higher for 1; a row is found if its score is at or above a threshold.
        specificity: smallest share of the rows of 0 below the threshold.
    """
    x, y = _columns(true, scores)
    positive, negative = y[x > 0.5], np.sort(y[x <= 0.5])
    if not positive.size or not negative.size or not np.isfinite(y).all():
        return math.nan
    allowed = math.floor((1 - specificity) * negative.size + 1e-9)
    # Every score above that of the first negative row that may not be found is a threshold.
    bound = negative[negative.size - allowed - 1] if allowed < negative.size else -math.inf
    return float((positive > bound).mean())


def mse(true: ArrayLike, predicted: ArrayLike) -> float:
    """Mean squared error of two columns (N,), in squared units of the target; nan for no rows."""
    x, y = _columns(true, predicted)
    with np.errstate(all="ignore"):
        return float(np.mean((x - y) ** 2)) if x.size else math.nan


def rmse(true: ArrayLike, predicted: ArrayLike) -> float:
    """Root of the mean squared error, in units of the target; nan for no rows."""
    return math.sqrt(mse(true, predicted))


def mae(true: ArrayLike, predicted: ArrayLike) -> float:
    """Mean absolute error, in units of the target; nan for no rows."""
    x, y = _columns(true, predicted)
    with np.errstate(all="ignore"):
        return float(np.mean(np.abs(x - y))) if x.size else math.nan


def r2(true: ArrayLike, predicted: ArrayLike) -> float:
    """Coefficient of determination 1 - SSE / SST of two columns (N,); nan for a constant target or one row."""
    x, y = _columns(true, predicted)
    if x.size < 2 or np.ptp(x) == 0:
        return math.nan
    with np.errstate(all="ignore"):
        return float(1.0 - np.sum((x - y) ** 2) / np.sum((x - x.mean()) ** 2))


def ranking(
    found: Sequence[str], relevance: Mapping[str, float], at: int = 10, deep: int = 100
) -> dict[str, float]:
    """Scores of one ranked list of documents, as trec_eval has them.

    Args:
        found: names of the documents, best first, at least ``deep`` of them unless there are fewer.
        relevance: name -> relevance of the relevant documents, above 0; others have 0. At least one is relevant.
        at: rank up to which ``ndcg``, ``mrr`` and the first ``recall`` read the list.
        deep: that of the second ``recall``.

    Returns:
        ``ndcg@at``: the sum of relevance / log2(rank + 1), divided by that of the ideal list (Järvelin and Kekäläinen,
        2002); ``mrr@at``: 1 / rank of the first relevant document, 0 if there is none; ``recall@at`` and
        ``recall@deep``: the share of the relevant documents that are in the list.
    """
    gains = [max(0.0, relevance.get(name, 0.0)) for name in found]
    ideal = sorted((value for value in relevance.values() if value > 0), reverse=True)
    first = next((rank for rank, gain in enumerate(gains[:at], 1) if gain), None)
    recalls = {n: sum(gain > 0 for gain in gains[:n]) / len(ideal) for n in (at, deep)}
    return {
        f"ndcg@{at}": _discounted(gains[:at]) / _discounted(ideal[:at]),
        f"mrr@{at}": 1 / first if first else 0.0,
        **{f"recall@{n}": value for n, value in recalls.items()},
    }


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def is_bio(labels: Iterable[str]) -> bool:
    """Whether the labels are span tags: O, and B- or I- (also E- or S-) with a type, with at least one span tag.

    L- and U-, M- and W- are accepted as other letters for the same positions of a span as E- and S-, I- and S-.
    """
    found = set(labels)
    return len(found - {"O"}) > 0 and all(
        tag == "O" or (tag[:1] in "BIESLUMW" and tag[1:2] == "-" and len(tag) > 2) for tag in found
    )


# The last and the only word of a span in BILOU; the middle word in BMES and BMEW, and the only word in BMEW.
_OTHER_LETTERS = {"L": "E", "U": "S", "M": "I", "W": "S"}


def entities(tags: Sequence[str]) -> list[Span]:
    """Extract the spans of one sequence of tags: (type, first, last) with ``last`` included, in order.

    A span begins at B (or S), and at any other tag that does not continue a span of its type: an I without a B begins
    one (IOB1, and the invalid sequences that models predict). It ends before O, before the next beginning, and after E
    or S. A tag without a type has the type ``_``.

    Raises:
        DataError: a tag is neither O nor one of B, I, E, S with a type.
    """
    spans: list[Span] = []
    kind, first = "", -1  # first < 0: no span is open
    for place, tag in enumerate(tags):
        prefix, own = _OTHER_LETTERS.get(tag[:1], tag[:1]), tag[1:].split("-", 1)[-1] or "_"
        if prefix not in ("O", "B", "I", "E", "S") or tag[1:2] not in ("", "-"):
            raise DataError(
                f"Tag {tag!r} at place {place} is not a tag of a span: expected O, B-TYPE or I-TYPE. For tags of "
                f"single words (parts of speech) use accuracy or macro F1."
            )
        begins = prefix in ("B", "S") or (prefix != "O" and (first < 0 or own != kind))
        if first >= 0 and (begins or prefix == "O"):
            spans.append((kind, first, place - 1))
            first = -1
        if begins:
            kind, first = own, place
        if first >= 0 and prefix in ("E", "S"):
            spans.append((kind, first, place))
            first = -1
    if first >= 0:
        spans.append((kind, first, len(tags) - 1))
    return spans


def entity_counts(
    true_tags: Sequence[Sequence[str]], predicted_tags: Sequence[Sequence[str]]
) -> dict[str, tuple[int, int, int]]:
    """Count true positives, false positives and false negatives per type over sequences of tags.

    A predicted span is correct if type, first and last position are those of a true one. Counts of several batches
    may be added.

    Raises:
        DataError: the number of sequences or the length of one differs.
    """
    if len(true_tags) != len(predicted_tags):
        raise DataError(
            f"There are {len(true_tags)} true sequences of tags but {len(predicted_tags)} predicted ones."
        )
    found: dict[str, list[int]] = {}
    for row, (truth, guess) in enumerate(zip(true_tags, predicted_tags, strict=True)):
        if len(truth) != len(guess):
            raise DataError(
                f"Sequence {row} has {len(truth)} true tags but {len(guess)} predicted."
            )
        right, guessed = set(entities(truth)), set(entities(guess))
        for which, group in enumerate((right & guessed, guessed - right, right - guessed)):
            for kind, _, _ in group:
                found.setdefault(kind, [0, 0, 0])[which] += 1
    return {kind: (n[0], n[1], n[2]) for kind, n in sorted(found.items())}


def entity_f1(counts: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Precision, recall and F1 of spans from what ``entity_counts`` returns.

    Returns:
        ``precision``, ``recall``, ``f1`` over all spans (micro), ``macro``: the means over the types, ``types``: the
        same three and ``support`` per type. 0 / 0 counts as 0, so no span at all scores 0, as in seqeval.
    """
    types = {kind: _prf(*map(int, n)) | {"support": int(n[0] + n[2])} for kind, n in counts.items()}
    sums = [sum(int(n[i]) for n in counts.values()) for i in range(3)]
    names = ("precision", "recall", "f1")
    mean = {n: sum(t[n] for t in types.values()) / len(types) if types else 0.0 for n in names}
    return {**_prf(*sums), "macro": mean, "types": types}


# ------------------------------------------------------------------------------------------------------- answers

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Normalise an answer as SQuAD does: lower case, no ASCII punctuation, no English articles, single blanks."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers after ``normalize_answer``, else 0.0.

    An empty list, or answers that are all empty after normalisation, mean that the question cannot be answered: then
    only a prediction that is empty after normalisation is correct.
    """
    return float(normalize_answer(prediction) in _gold(answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the bags of words of prediction and answer after ``normalize_answer``; the best over all answers.

    Where one side is empty the score is 1.0 if both are and 0.0 otherwise, as SQuAD 2.0 scores questions that cannot
    be answered.
    """
    guessed = normalize_answer(prediction).split()
    best = 0.0
    for answer in _gold(answers):
        gold = answer.split()
        if not guessed or not gold:
            best = max(best, float(guessed == gold))
            continue
        shared = (Counter(guessed) & Counter(gold)).total()
        best = max(best, 2.0 * shared / (len(guessed) + len(gold)))
    return best


def _gold(answers: Sequence[str]) -> list[str]:
    return [text for text in map(normalize_answer, answers) if text] or [""]


def _square(matrix: ArrayLike) -> Floats:
    counts = np.asarray(matrix, np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise DataError(f"A confusion matrix is square, (classes, classes), not {counts.shape}.")
    return counts


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _ratios(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros(np.shape(whole), np.float64), where=whole > 0)


def _prf(tp: int, fp: int, fn: int) -> dict[str, float]:
    return {
        "precision": tp / (tp + fp) if tp else 0.0,
        "recall": tp / (tp + fn) if tp else 0.0,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
    }


def _same_length(x: NDArray[Any], y: NDArray[Any]) -> None:
    if x.shape != y.shape:
        raise DataError(f"There are {x.size:,} true values but {y.size:,} predicted ones.")


def _columns(true: ArrayLike, predicted: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(true, np.float64).ravel(), np.asarray(predicted, np.float64).ravel()
    _same_length(x, y)
    return x, y


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the average of the ranks they fill."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return np.asarray((last - (sizes - 1) / 2.0)[group], np.float64)


def _correlation(x: Floats, y: Floats) -> float:
    finite = x.size > 1 and bool(np.isfinite(x).all() and np.isfinite(y).all())
    if not finite or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    with np.errstate(all="ignore"):
        # Divided by the largest entry first, so that squares of huge or tiny numbers stay finite.
        x, y = (v / np.abs(v).max() if np.abs(v).max() else v for v in (x - x.mean(), y - y.mean()))
        return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))


# ----------------------------------------------------------------------------------------------------- intervals


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and the limits of Student's t confidence interval, (N,) -> (mean, low, high).

    A single value has a mean but no interval: its limits are nan. No values are ignored: if any is not finite, all
    three results are nan.

    Raises:
        DataError: there are no values.
        ConfigError: ``level`` is not between 0 and 1.
    """
    column = [float(value) for value in values]
    if not 0.0 < level < 1.0:
        raise ConfigError(
            f"The confidence level is {level}; it must be between 0 and 1, for example 0.95."
        )
    if not column:
        raise DataError(
            "There are no values to compute an interval from: at least one run must have a score."
        )
    if not all(map(math.isfinite, column)):
        return math.nan, math.nan, math.nan
    mean = statistics.fmean(column)
    if len(column) < 2:
        return mean, math.nan, math.nan
    half = student_t((1 + level) / 2, len(column) - 1) * statistics.stdev(column)
    half /= math.sqrt(len(column))
    return mean, mean - half, mean + half


def student_t(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution, by bisection of its distribution function.

    That function is a finite sum in sin and cos of theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun, 26.7.3
    and 26.7.4), whose terms are all positive.

    Args:
        probability: strictly between 0 and 1.
        degrees: degrees of freedom, at least 1.

    Raises:
        ConfigError: an argument is out of range.
    """
    if not 0.0 < probability < 1.0 or degrees < 1:
        raise ConfigError(
            f"Student's t has no quantile at {probability} with {degrees} degrees of freedom: the probability must "
            f"be between 0 and 1, and at least 1 degree of freedom, so two values, is needed."
        )
    if probability < 0.5:
        return -student_t(1.0 - probability, degrees)
    wanted, low, high = 2.0 * probability - 1.0, 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < wanted else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central(theta: float, degrees: int) -> float:
    """Return the probability that abs(t) is at most sqrt(degrees) * tan(theta)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return (theta + sine * total) * 2 / math.pi if odd else sine * total
