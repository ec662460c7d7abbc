"""The figures of merit against scikit-learn, scipy and seqeval, over generated inputs and by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import metrics
from pretrain.errors import ConfigError, DataError

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

FEW = settings(max_examples=60, deadline=None)
CLASSES = 5
pairs_of_ids = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40
)
numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 3))
pairs_of_numbers = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def oracle(function, *args, **options):
    """What the other library says; its warnings are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


# Classification


@FEW
@given(pairs_of_ids)
def test_classification_as_scikit_learn(pairs):
    true, predicted = (list(column) for column in zip(*pairs, strict=True))
    matrix = metrics.confusion_matrix(true, predicted, CLASSES)
    ids = list(range(CLASSES))
    assert matrix.tolist() == sklearn.confusion_matrix(true, predicted, labels=ids).tolist()

    def f1(average, **more):
        return oracle(sklearn.f1_score, true, predicted, average=average, zero_division=0, **more)

    assert metrics.accuracy(matrix) == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert metrics.macro_f1(matrix) == pytest.approx(f1("macro"))
    assert metrics.macro_f1(matrix, present_only=False) == pytest.approx(f1("macro", labels=ids))
    assert metrics.weighted_f1(matrix) == pytest.approx(f1("weighted"))
    expected = oracle(sklearn.matthews_corrcoef, true, predicted)
    assert metrics.matthews(matrix) == pytest.approx(expected, abs=1e-12)
    theirs = oracle(
        sklearn.precision_recall_fscore_support, true, predicted, labels=ids, zero_division=0
    )
    for mine, other in zip(metrics.per_class(matrix), theirs, strict=True):
        assert mine == pytest.approx(other)


def test_classification_by_hand():
    matrix = [[8, 2, 0], [1, 4, 0], [0, 0, 0]]  # the third class never occurs
    assert metrics.accuracy(matrix) == pytest.approx(12 / 15)
    first, second = 16 / 19, 8 / 11
    assert metrics.macro_f1(matrix) == pytest.approx((first + second) / 2)
    assert metrics.macro_f1(matrix, present_only=False) == pytest.approx((first + second) / 3)
    assert metrics.weighted_f1(matrix) == pytest.approx((10 * first + 5 * second) / 15)
    precision, recall, _, support = metrics.per_class(matrix)
    assert precision.tolist() == pytest.approx([8 / 9, 4 / 6, 0])
    assert recall.tolist() == pytest.approx([0.8, 0.8, 0])
    assert support.tolist() == [10, 5, 0]
    # A class that is only predicted counts against the macro mean, as in scikit-learn.
    assert metrics.macro_f1([[3, 0], [0, 0]]) == 1.0
    assert metrics.macro_f1([[3, 1], [0, 0]]) == pytest.approx((6 / 7) / 2)


def test_matthews_keeps_its_digits_for_large_counts():
    n = 10**8
    matrix = np.array([[n, 3], [5, n]])
    expected = (n * n - 15) / math.sqrt((n + 3) * (n + 5) * (n + 3) * (n + 5))
    assert metrics.matthews(matrix) == pytest.approx(expected, abs=1e-12)
    assert metrics.matthews([[3, 4], [0, 0]]) == 0.0
    assert metrics.matthews([[0, 3], [4, 0]]) == pytest.approx(-1.0)


def test_no_rows_have_no_score():
    empty = np.zeros((3, 3))
    for function in (
        metrics.accuracy, metrics.macro_f1, metrics.weighted_f1, metrics.matthews
    ):  # fmt: skip
        assert math.isnan(function(empty)), function.__name__
    assert all(math.isnan(v) for v in metrics.multilabel_scores([0], [0], [0], 0, 0).values())
    assert math.isnan(metrics.mse([], [])) and math.isnan(metrics.rmse([], []))
    assert math.isnan(metrics.mae([], [])) and math.isnan(metrics.r2([], []))


def test_ids_outside_the_classes_are_refused():
    with pytest.raises(DataError, match="predicted class id of row 1 is 3, outside the 3 classes"):
        metrics.confusion_matrix([0, 1], [0, 3], 3)
    with pytest.raises(DataError, match="true class id of row 0 is -100"):
        metrics.confusion_matrix([-100, 1], [0, 2], 3)
    with pytest.raises(DataError, match="2 true values but 1 predicted"):
        metrics.confusion_matrix([0, 1], [0], 3)
    with pytest.raises(DataError, match="square"):
        metrics.accuracy([[1, 2]])


tables = st.integers(1, 4).flatmap(
    lambda labels: st.lists(
        st.tuples(
            st.lists(st.booleans(), min_size=labels, max_size=labels),
            st.lists(st.booleans(), min_size=labels, max_size=labels),
        ),
        min_size=1,
        max_size=20,
    )
)


@FEW
@given(tables)
def test_multilabel_as_scikit_learn(rows):
    true, predicted = (np.array(side, int) for side in zip(*rows, strict=True))
    half = len(rows) // 2
    parts = [metrics.multilabel_counts(true[:half], predicted[:half])] if half else []
    parts.append(metrics.multilabel_counts(true[half:], predicted[half:]))
    tp, fp, fn, exact = (sum(column) for column in zip(*parts, strict=True))
    mine = metrics.multilabel_scores(tp, fp, fn, exact, len(rows))
    if true.shape[1] == 1:  # scikit-learn reads one column as a binary task
        hits, total = (true & predicted).sum(), true.sum() + predicted.sum()
        assert mine["micro_f1"] == mine["macro_f1"]
        assert mine["macro_f1"] == pytest.approx(2 * hits / total if total else 0.0)
    else:
        for average in ("micro", "macro"):
            theirs = oracle(sklearn.f1_score, true, predicted, average=average, zero_division=0)
            assert mine[f"{average}_f1"] == pytest.approx(theirs)
    assert mine["exact_match"] == pytest.approx(np.mean((true == predicted).all(axis=1)))


# Regression


@FEW
@given(pairs_of_numbers)
def test_regression_as_scipy_and_scikit_learn(pairs):
    true, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    assert metrics.mse(true, predicted) == pytest.approx(
        sklearn.mean_squared_error(true, predicted)
    )
    assert metrics.rmse(true, predicted) ** 2 == pytest.approx(metrics.mse(true, predicted))
    assert metrics.mae(true, predicted) == pytest.approx(
        sklearn.mean_absolute_error(true, predicted)
    )
    if np.ptp(true) == 0:
        assert math.isnan(metrics.r2(true, predicted))
    else:
        assert metrics.r2(true, predicted) == pytest.approx(sklearn.r2_score(true, predicted))
    rank = metrics.spearman(true, predicted)
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        assert math.isnan(rank) and math.isnan(metrics.pearson(true, predicted))
        return
    assert rank == pytest.approx(stats.spearmanr(true, predicted).statistic, abs=1e-9)
    theirs = oracle(stats.pearsonr, true, predicted).statistic
    assert metrics.pearson(true, predicted) == pytest.approx(theirs, abs=1e-7)


@FEW
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_spearman_with_many_ties(pairs):
    true, predicted = zip(*pairs, strict=True)
    theirs = oracle(stats.spearmanr, true, predicted).statistic
    mine = metrics.spearman(true, predicted)
    assert (math.isnan(mine) and math.isnan(theirs)) or mine == pytest.approx(theirs, abs=1e-9)


def test_correlations_of_strange_columns():
    constant, rising = [2.0] * 4, [1.0, 2.0, 3.0, 4.0]
    for function in (metrics.pearson, metrics.spearman):
        assert math.isnan(function(constant, rising)) and math.isnan(function(rising, constant))
        assert math.isnan(function([1.0], [2.0])) and math.isnan(function([], []))
        assert math.isnan(function([1.0, math.nan, 3.0], [1.0, 2.0, 3.0]))
        assert function(rising, rising) == pytest.approx(1.0)
        assert function(rising, rising[::-1]) == pytest.approx(-1.0)
    huge = np.array(rising) * 1e200
    assert metrics.pearson(huge, rising) == pytest.approx(1.0)  # squares would overflow
    assert metrics.pearson(np.array(rising) * 1e-200, rising) == pytest.approx(1.0)
    assert metrics.spearman([0.0, 1.0, math.inf], [5.0, 6.0, 7.0]) == pytest.approx(1.0)
    with pytest.raises(DataError, match="3 true values but 2 predicted"):
        metrics.pearson([1, 2, 3], [1, 2])


# Entities

tag = st.one_of(
    st.just("O"),
    st.builds("{}-{}".format, st.sampled_from(["B", "I"]), st.sampled_from(["PER", "LOC", "X-Y"])),
)
tag_pairs = st.lists(st.lists(st.tuples(tag, tag), min_size=1, max_size=12), min_size=1, max_size=6)


@FEW
@given(
    st.lists(st.one_of(tag, st.sampled_from(["E-PER", "S-PER", "E-LOC", "B", "I"])), max_size=14)
)
def test_entities_as_seqeval(tags):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    assert metrics.entities(tags) == oracle(labeling.get_entities, tags)


@settings(max_examples=40, deadline=None)
@given(tag_pairs)
def test_entity_scores_as_seqeval(rows):
    seqeval = pytest.importorskip("seqeval.metrics")
    true = [[a for a, _ in row] for row in rows]
    predicted = [[b for _, b in row] for row in rows]
    mine = metrics.entity_f1(metrics.entity_counts(true, predicted))
    report = oracle(
        seqeval.classification_report, true, predicted, output_dict=True, zero_division=0
    ) if any(t != "O" for row in true + predicted for t in row) else {}  # fmt: skip
    micro, macro = report.pop("micro avg", None), report.pop("macro avg", None)
    report.pop("weighted avg", None)
    if micro is None:
        assert mine["f1"] == mine["macro"]["f1"] == 0.0 and mine["types"] == {}
        return
    for key, other in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert mine[key] == pytest.approx(micro[other])
        assert mine["macro"][key] == pytest.approx(macro[other])
        for kind, scores in report.items():
            assert mine["types"][kind][key] == pytest.approx(scores[other])
    assert set(mine["types"]) == set(report)
    assert {k: v["support"] for k, v in mine["types"].items()} == {
        k: v["support"] for k, v in report.items()
    }


def test_entities_of_broken_sequences():
    assert metrics.entities([]) == []
    assert metrics.entities(["O", "O"]) == []
    assert metrics.entities(["I-PER", "I-PER", "O"]) == [("PER", 0, 1)]
    assert metrics.entities(["B-PER", "I-LOC"]) == [("PER", 0, 0), ("LOC", 1, 1)]
    assert metrics.entities(["B-PER", "B-PER", "I-PER"]) == [("PER", 0, 0), ("PER", 1, 2)]
    assert metrics.entities(["B-corp-or-so", "I-corp-or-so"]) == [("corp-or-so", 0, 1)]


def test_entity_counts_by_hand():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "B-LOC"]]
    counts = metrics.entity_counts(true, said)
    assert counts == {"LOC": (2, 0, 0), "ORG": (0, 1, 0), "PER": (0, 1, 1)}
    scores = metrics.entity_f1(counts)
    assert scores["precision"] == pytest.approx(2 / 4)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(4 / 7)
    assert scores["types"]["LOC"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}
    with pytest.raises(DataError, match="Sequence 1 has 2 true tags but 1"):
        metrics.entity_counts([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(DataError, match="1 true sequences of tags but 2"):
        metrics.entity_counts([["O"]], [["O"], ["O"]])


def test_tags_that_are_no_spans():
    assert metrics.is_bio(["O", "B-PER", "I-PER"]) and metrics.is_bio(["I-PER"])
    assert not metrics.is_bio(["O"]) and not metrics.is_bio([])
    assert not metrics.is_bio(["NOUN", "VERB", "O"]) and not metrics.is_bio(["INTJ", "B-"])
    for bad in ("NOUN", "", "ORG", "X-PER"):
        with pytest.raises(DataError, match=f"Tag {bad!r} at place 1"):
            metrics.entities(["O", bad])


# Answers


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("a-b", "ab"),  # punctuation goes first, so no article is left
        ("it's a\tnew\nday", "its new day"),
        ("$1,000", "1000"),
        ("Das «Ende»", "das «ende»"),  # only ASCII punctuation is stripped
        ("THE", ""),
    ],
)
def test_normalize_answer(text, plain):
    assert metrics.normalize_answer(text) == plain


@given(st.text(max_size=30))
def test_normalize_answer_leaves_what_it_promises(text):
    plain = metrics.normalize_answer(text)
    assert not set(plain) & set(r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")
    assert not {"a", "an", "the"} & set(plain.split())
    assert plain == " ".join(plain.split())
    assert metrics.exact_match(text, [text]) == metrics.token_f1(text, [text]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel Tower"], 1, 1),
        ("Eiffel Tower in Paris", ["Eiffel Tower"], 0, 2 * 2 / (4 + 2)),
        (
            "big big dog",
            ["big dog", "cat"],
            0,
            2 * 2 / (3 + 2),
        ),  # words count as often as they occur
        ("cat", ["big dog", "Cat."], 1, 1),
        ("cat", ["dog"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("cat", [""], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["", "a"], 1, 1),
        ("", ["", "cat"], 0, 0),  # an empty answer beside a real one does not count
    ],
)
def test_answers(prediction, answers, exact, f1):
    assert metrics.exact_match(prediction, answers) == exact
    assert metrics.token_f1(prediction, answers) == pytest.approx(f1)


# Intervals


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 100, 1001])
@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.6, 0.9, 0.975, 0.995, 0.9995])
def test_student_t_as_scipy(degrees, probability):
    mine = metrics.student_t(probability, degrees)
    assert mine == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-12)


@FEW
@given(st.lists(numbers, min_size=2, max_size=12), st.floats(0.5, 0.999))
def test_mean_interval_as_scipy(values, level):
    mean, low, high = metrics.mean_interval(values, level)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    if max(values) - min(values) < 1e-9:
        assert low == mean == high
        return
    theirs = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    assert (low, high) == pytest.approx(theirs, rel=1e-7, abs=1e-6)


def test_mean_interval_of_few_values():
    mean, low, high = metrics.mean_interval([1.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(12.7062047)  # t(.975, 1) times 2 / sqrt(2) / sqrt(2)
    assert mean - low == pytest.approx(high - mean)
    mean, low, high = metrics.mean_interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    assert all(map(math.isnan, metrics.mean_interval([0.5, math.nan, 0.7])))
    with pytest.raises(DataError, match="no values"):
        metrics.mean_interval([])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        metrics.mean_interval([1, 2], level=95)
    with pytest.raises(ConfigError, match="no quantile"):
        metrics.student_t(0.5, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["X", "Y", ""]), st.integers(1, 4)), max_size=8))
def test_all_schemes_of_tags_give_the_same_spans(parts):
    schemes = {"BIO": [], "IOB1": [], "BIOES": [], "BILOU": [], "BMES": []}
    wanted, place, before = [], 0, ""
    for kind, length in parts:
        if not kind:
            for tags in schemes.values():
                tags.extend(["O"] * length)
        else:
            wanted.append((kind, place, place + length - 1))
            middle, rest = length - 2, range(length - 1)
            schemes["BIO"] += [f"B-{kind}", *[f"I-{kind}" for _ in rest]]
            schemes["IOB1"] += [
                f"{'B' if before == kind else 'I'}-{kind}",
                *[f"I-{kind}" for _ in rest],
            ]
            for name, letters in (("BIOES", "BIES"), ("BILOU", "BILU"), ("BMES", "BMES")):
                first, inner, last, only = letters
                whole = [first] + [inner] * middle + [last] if length > 1 else [only]
                schemes[name] += [f"{letter}-{kind}" for letter in whole]
        place, before = place + length, kind
    for name, tags in schemes.items():
        assert metrics.entities(tags) == wanted, name
        assert not tags or set(tags) == {"O"} or metrics.is_bio(tags)


def test_area_under_the_curve_and_sensitivity_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    for rows, steps in ((7, 3), (60, 5), (400, 1000)):
        true = rng.integers(0, 2, rows)
        true[:2] = 0, 1
        scores = np.round((rng.random(rows) + 0.4 * true) * steps) / steps  # with ties
        assert metrics.roc_auc(true, scores) == pytest.approx(sklearn.roc_auc_score(true, scores))
        missed, found, _ = sklearn.roc_curve(true, scores, drop_intermediate=False)
        wanted = found[missed <= 0.05 + 1e-12].max()
        assert metrics.sensitivity(true, scores, 0.95) == pytest.approx(wanted)
    assert math.isnan(metrics.roc_auc([1, 1], [0.1, 0.2])) and math.isnan(
        metrics.sensitivity([0], [0.5])
    )
    assert metrics.sensitivity([1, 0], [0.2, 0.9], specificity=0.0) == 1.0
