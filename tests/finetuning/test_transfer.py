"""The transfer report: the gain as scipy computes it, verdicts on both sides, and what is printed."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import DataError
from pretrain.finetuning.compare import Comparison, Notes

SCRATCH = [0.50, 0.52, 0.48, 0.51, 0.49]
GAINS = {
    "helps": [0.08, 0.09, 0.07, 0.08, 0.085],
    "one seed against": [0.08, 0.09, -0.001, 0.08, 0.085],
    "two seeds against": [0.08, 0.09, -0.001, -0.001, 0.085],
    "none": [0.01, -0.01, 0.02, -0.02, 0.005],
    "hurts": [-0.03, -0.02, -0.04, -0.03, -0.025],
}


def compared(gains, *, tfidf=None, lsa=None, metric="accuracy", notes=None, count=100):
    arms = {
        "pretrained": {count: [s + g for s, g in zip(SCRATCH, gains, strict=False)]},
        "scratch": {count: SCRATCH[: len(gains)]},
    }
    for name, mean in (("tfidf", tfidf), ("lsa", lsa)):
        if mean is not None:
            arms[name] = {count: [mean] * len(gains)}
    seeds = list(range(len(gains)))
    return Comparison(metric, [count], arms, seeds, 1000, notes or Notes())


# Statistics


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-0.4, 0.4).map(lambda g: round(g, 4)), min_size=2, max_size=5))
def test_gain_as_a_paired_t_test(gains):
    stats = pytest.importorskip("scipy.stats")
    comparison = compared(gains)
    gain = comparison.gain(100)
    points = 100 * np.array(gains)
    assert gain.mean == pytest.approx(points.mean(), abs=1e-9)
    assert gain.positive == sum(g > 0 for g in gains) or any(abs(g) < 1e-9 for g in gains)
    if points.std() < 1e-9:
        return
    truth = stats.ttest_rel(
        comparison.arms["pretrained"][100], comparison.arms["scratch"][100]
    ).confidence_interval(0.95)
    assert (gain.low, gain.high) == pytest.approx(
        (100 * truth.low, 100 * truth.high), rel=1e-6, abs=1e-6
    )
    # A verdict is significance and agreement of the seeds, and the other side of it is its mirror image.
    agree = 5 * gain.positive >= 4 * len(gains)
    assert (comparison.outcome(100) == "helps") == (gain.low > 0 and agree)
    mirror = compared([-g for g in gains]).outcome(100)
    names = {"helps": "hurts", "hurts": "helps"}
    assert mirror == names.get(comparison.outcome(100), "no difference")


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("helps", "helps"),
        ("one seed against", "helps"),  # four of five, and a wide interval that still ends above 0
        ("two seeds against", "no difference"),
        ("none", "no difference"),
        ("hurts", "hurts"),
    ],
)
def test_outcomes(name, outcome):
    assert compared(GAINS[name]).outcome(100) == outcome


def test_four_of_five_seeds_are_enough_and_three_are_not():
    assert compared(GAINS["one seed against"]).gain(100).positive == 4
    assert compared(GAINS["two seeds against"]).gain(100).positive == 3
    # A narrow interval above 0 with a seed at exactly 0: 4 of 5 pass.
    steady = compared([0.05, 0.05, 0.05, 0.05, 0.0])
    assert steady.gain(100).low > 0 and steady.outcome(100) == "helps"
    # Many seeds can have an interval above 0 while too few of them agree.
    seeds = list(range(15))
    gains = [0.1] * 11 + [-0.001] * 4
    arms = {"pretrained": {10: [0.5 + g for g in gains]}, "scratch": {10: [0.5] * 15}}
    many = Comparison("accuracy", [10], arms, seeds, 100)
    assert many.gain(10).low > 0 and many.gain(10).positive == 11
    assert many.outcome(10) == "no difference"
    arms["pretrained"], arms["scratch"] = arms["scratch"], arms["pretrained"]
    turned = Comparison("accuracy", [10], arms, seeds, 100)
    assert turned.gain(10).high < 0 and turned.outcome(10) == "no difference"


def test_pairing_matters():
    """Seeds differ far more than the arms: unpaired, the gain would be lost in them."""
    scratch = [0.3, 0.4, 0.5, 0.6, 0.7]
    arms = {
        "pretrained": {50: [s + 0.02 + 0.001 * i for i, s in enumerate(scratch)]},
        "scratch": {50: scratch},
    }
    assert Comparison("accuracy", [50], arms, list(range(5)), 10).outcome(50) == "helps"


def test_losses_are_better_when_lower():
    better = compared([-0.2, -0.21, -0.19, -0.2, -0.2], metric="mse", tfidf=0.4)
    assert better.outcome(100) == "helps" and better.gain(100).mean == pytest.approx(0.2)
    assert better.verdict(100).startswith("pre-training helps by 0.2 ± ")
    assert "(mse)" in better.verdict(100) and "points" not in better.verdict(100)
    assert better.best_baseline(100) == ("tfidf", pytest.approx(-0.1))
    assert compared(GAINS["helps"], metric="rmse").outcome(100) == "hurts"


# Words


def test_help_is_said_with_its_size():
    assert compared(GAINS["helps"]).verdict(100) == "pre-training helps by 8.1 ± 0.9 points"
    text = compared(GAINS["helps"], tfidf=0.55, lsa=0.56).verdict(100)
    assert text == "pre-training helps by 8.1 ± 0.9 points, 2.1 above LSA + logistic regression"


def test_a_better_baseline_is_always_said():
    text = compared(GAINS["helps"], tfidf=0.626, lsa=0.55).verdict(100)
    assert text == (
        "pre-training helps against scratch by 8.1 ± 0.9 points, but TF-IDF + logistic regression is better by 4.5 "
        "points"
    )
    for name in ("none", "hurts"):
        text = compared(GAINS[name], lsa=0.9).verdict(100)
        assert "and LSA + logistic regression is better by " in text
    text = compared(GAINS["helps"], tfidf=0.9, metric="pearson").verdict(100)
    assert "TF-IDF + ridge regression is better" in text


def test_no_difference_and_harm_are_said_with_figures_and_advice():
    text = compared(GAINS["none"]).verdict(100)
    assert (
        text == "no difference seen (+0.1 points, 95 % interval -1.9 to +2.1, 3 of 5 seeds better)"
    )
    text = compared(GAINS["hurts"]).verdict(100)
    assert text.startswith("pre-training hurts here by 2.9 ± 0.9 points; try a lower learning rate")
    for hint in ("layer_decay", "l2_sp", 'task="language-modelling"', "tokenizer"):
        assert hint in text
    of_images = compared(GAINS["hurts"])
    of_images.notes.unit, of_images.notes.tokens = "patches", 1000
    assert of_images.verdict(100).endswith("or optim.l2_sp")
    assert "1,000 patches of pre-training" in of_images.table()


def test_without_an_interval_there_is_no_verdict():
    assert compared([0.1]).verdict(100).startswith("no verdict: one seed has no interval")
    failed = compared([0.1, math.nan, 0.1])
    assert failed.outcome(100) == "unknown"
    assert failed.verdict(100) == "no verdict: a score is missing"
    assert "–" in failed.table() and failed.svg().startswith("<svg")


# Shown


def full(data: str = "ag_news") -> Comparison:
    counts = [1000, 100, 200]  # any order
    rng = np.random.default_rng(0)
    base = {100: 0.54, 200: 0.62, 1000: 0.78}
    plus = {"scratch": 0.0, "pretrained": 0.08, "tfidf": 0.09, "lsa": 0.17}
    arms = {
        name: {n: (base[n] + more + rng.normal(0, 0.005, 5)).tolist() for n in counts}
        for name, more in plus.items()
    }
    notes = Notes(
        data=data,
        dropped=12,
        valid_rows=200,
        settings={"pretrained": {"lr": 3e-4}, "scratch": {"lr": 1e-3}, "tfidf": {"C": [10.0] * 5}},
        seconds={"pre-training": 300.0, "pretrained": 12.0, "scratch": 12.5},
        tokens=3_830_000,
    )
    return Comparison("accuracy", counts, arms, list(range(5)), 1000, notes)


def test_table_holds_what_the_protocol_asks_for():
    comparison = full()
    text = comparison.table()
    assert str(comparison) == text
    lines = text.splitlines()
    assert lines[0] == (
        "ag_news: accuracy in %, stratified subsets, 5 paired seeds, 1,000 test rows touched once, tuned on 200 "
        "validation rows; dropped 12 training rows that recur in the test rows"
    )
    head = [cell.strip() for cell in lines[2].split("|")]
    assert head[:4] == ["labels", "from scratch", "pre-trained", "gain [95 %]"]
    assert head[4:] == ["seeds better", "TF-IDF + linear", "LSA + linear"]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[3:6]]
    assert [row[0] for row in rows] == ["100", "200", "1,000"]
    scores = 100 * np.array(comparison.arms["pretrained"][100])
    assert rows[0][2] == f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}"
    assert rows[0][4] == "5/5"
    each = [line for line in lines if line.startswith("gain per seed at 100 labels: ")]
    assert len(each[0].split(": ")[1].split()) == 5
    for words in (
        "chosen on validation: pre-trained lr 0.0003 | from scratch lr 0.001 | TF-IDF C 10",
        "cost: pre-training 300 s | pre-trained 12 s | from scratch 12 s | 3,830,000 tokens of pre-training",
    ):
        assert words in lines
    for count in (100, 200, 1000):
        assert f"{count:,} labels: {comparison.verdict(count)}" in lines


def test_a_baseline_may_lack_a_count():
    comparison = full()
    del comparison.arms["lsa"][1000]
    again = Comparison.from_json(comparison.to_json())
    assert "LSA" in again.verdict(100) and "LSA" not in again.verdict(1000)
    last = again.table().splitlines()[5].split("|")
    assert last[-1].strip() == "–"


def test_picture_has_every_arm_and_no_script():
    hostile = '<script>alert("x")</script>&'
    comparison = full(hostile)
    root = ElementTree.fromstring(comparison.svg())  # well formed
    tags = [element.tag.split("}")[1] for element in root.iter()]
    assert "script" not in tags and tags.count("polyline") == 4
    bars = [e for e in root.iter() if "whisker" in (e.get("class") or "")]
    assert len(bars) == 4 * 3
    texts = [element.text for element in root.iter() if element.text]
    assert {"pre-trained", "from scratch", "TF-IDF", "LSA", "100", "200", "1000"} <= set(texts)
    # A logarithmic axis: 100 -> 200 is a smaller step than 200 -> 1000, in the ratio of their logarithms.
    dots = [e for e in root.iter() if e.get("class") == "dot f0"]
    at = [float(dot.get("cx")) for dot in dots]
    assert (at[1] - at[0]) / (at[2] - at[0]) == pytest.approx(math.log10(2), abs=0.01)


def test_notebook_view_escapes_what_comes_from_data():
    html = full('<script>alert("x")</script>')._repr_html_()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    ElementTree.fromstring(html)
    named = full()
    named.arms["<b>nearest</b>"] = {n: [0.99] * 5 for n in named.counts}
    assert "<b>nearest" not in named._repr_html_() + named.svg()
    assert "but <b>nearest</b> is better" in named.verdict(100)  # plain text needs no escape
    for count in (100, 200, 1000):
        assert full().verdict(count).replace("'", "&#x27;") in full()._repr_html_()


# ScoreFile


def test_json_brings_everything_back():
    comparison = full()
    text = comparison.to_json()
    again = Comparison.from_json(text)
    assert again == comparison and again.table() == comparison.table()
    assert json.loads(text)["arms"]["scratch"]["100"] == comparison.arms["scratch"][100]
    broken = compared([0.1, math.nan])
    again = Comparison.from_json(broken.to_json())
    assert "NaN" not in broken.to_json() and "Infinity" not in broken.to_json()
    assert math.isnan(again.arms["pretrained"][100][1])
    raw = json.loads(text)
    raw["notes"] |= {"steps": None, "stratified": True}  # as earlier versions wrote it
    assert Comparison.from_json(json.dumps(raw)) == comparison


@pytest.mark.parametrize("key", ["metric", "counts", "arms", "seeds", "test_rows", "notes"])
@pytest.mark.parametrize("value", [None, 3.5, "x", [[]], {"a": 1}, ...])
def test_json_that_is_something_else(key, value):
    raw = json.loads(full().to_json())
    if value is ...:
        del raw[key]
    else:
        raw[key] = value
    if (key, value) in [("metric", "x"), ("test_rows", 3.5)]:
        assert Comparison.from_json(json.dumps(raw)).table()
        return
    with pytest.raises(DataError, match="not a saved comparison"):
        Comparison.from_json(json.dumps(raw))


def test_json_that_is_none():
    for text in ("", "[]", "null", "{", '{"metric": NaN}'):
        with pytest.raises(DataError, match="not a saved comparison"):
            Comparison.from_json(text)


def test_comparisons_that_cannot_be():
    arms = {"pretrained": {10: [0.5, 0.6]}, "scratch": {10: [0.5, 0.6]}}
    with pytest.raises(DataError, match="needs the arms 'pretrained' and 'scratch'"):
        Comparison("accuracy", [10], {"pretrained": arms["pretrained"]}, [0, 1], 5)
    with pytest.raises(
        DataError, match="'pretrained' has 2 scores at 10 labels but there are 3 seeds"
    ):
        Comparison("accuracy", [10], arms, [0, 1, 2], 5)
    with pytest.raises(DataError, match="'pretrained' has 0 scores at 20 labels"):
        Comparison("accuracy", [10, 20], arms, [0, 1], 5)
    with pytest.raises(DataError, match="at least one number of labels"):
        Comparison("accuracy", [], arms, [0, 1], 5)
    with pytest.raises(DataError, match="no scores at 30 labels, only at"):
        Comparison("accuracy", [10], arms, [0, 1], 5).gain(30)


def test_few_seeds_cannot_tell():
    """Two seeds with large gains are no evidence of no difference; the words say how many would do."""
    text = compared([0.089, 0.138]).verdict(100)
    assert text.startswith(
        "2 seeds cannot tell (+11.3 points, 95 % interval -19.8 to +42.5, 2 of 2 "
    )
    assert text.endswith("about 3 seeds would show it")
    assert compared([0.01, -0.01]).verdict(100).endswith("run at least 5")
    assert "cannot tell" in compared([0.06, 0.02, 0.09]).verdict(100)
    assert "no difference seen" in compared([0.01, -0.012, 0.004, -0.003, 0.002]).verdict(100)


@pytest.mark.parametrize(
    ("rows", "gains", "words"),
    [
        (4, [0.25, 0.25], "2 seeds cannot tell (+25.0 points"),
        (4, [-0.25, -0.25], "2 seeds cannot tell (-25.0 points"),
        (8, [0.125] * 3, "3 seeds cannot tell (+12.5 points"),
        (4, [0.0] * 3, "no difference seen (0.0 points, 95 % interval -25.4 to +25.4"),
        (20, [0.4] * 3, "pre-training helps by 40.0 ± 5.1 points"),
        (2000, [0.2, 0.2], "pre-training helps by 20.0 ± 0.2 points"),
    ],
)
def test_gains_that_are_equal_by_chance_have_no_interval_of_width_zero(rows, gains, words):
    """Accuracies on few rows have few values, so that two or three seeds often gain the same."""
    arms = {"pretrained": {50: [0.5 + g for g in gains]}, "scratch": {50: [0.5] * len(gains)}}
    compared = Comparison("accuracy", [50], arms, list(range(len(gains))), rows)
    assert compared.verdict(50).startswith(words)
    needed = compared.seeds_needed(50)
    assert needed is None or needed > len(gains) or words.startswith("pre-training helps")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-0.3, 0.3).map(lambda g: round(g, 3)), min_size=2, max_size=5))
def test_the_seeds_needed_would_do(gains):
    """With the same mean and spread over so many seeds the interval leaves 0."""
    stats = pytest.importorskip("scipy.stats")
    points = 100 * np.array(gains)
    needed, spread = compared(gains).seeds_needed(100), points.std(ddof=1)
    if needed is None:
        return

    def leaves(n):
        return abs(points.mean()) > stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) - 1e-9

    assert leaves(needed)
