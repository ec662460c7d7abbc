"""The classical baselines: they learn what can be learnt, choose on validation rows only, and refuse the rest."""

from __future__ import annotations

import csv
import importlib
import math

import numpy as np
import pytest

from pretrain.errors import ConfigError, DataError
from pretrain.finetuning import baseline
from pretrain.finetuning.baseline import Lsa, lsa_baseline, probe_baseline, tfidf_baseline

pytest.importorskip("sklearn")

TOPICS = {
    "sea": ["wave", "boat", "sail", "harbour", "tide", "anchor", "gull", "salt"],
    "farm": ["cow", "barn", "tractor", "wheat", "plough", "hen", "hay", "gate"],
    "city": ["tram", "street", "office", "tower", "traffic", "square", "bank", "shop"],
}
FILLER = ["the", "a", "of", "and", "in", "on", "was", "with", "very", "slowly", "today", "again"]


def made(rows: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts of three topics: two topic words among filler."""
    rng = np.random.default_rng(seed)
    labels = [list(TOPICS)[i % 3] for i in range(rows)]
    texts = [" ".join([*rng.choice(TOPICS[kind], 2), *rng.choice(FILLER, 5)]) for kind in labels]
    return texts, labels


def rows(train: int = 30) -> list[list[str]]:
    return [*made(train, 0), *made(60, 1), *made(90, 2)]


def test_tfidf_learns_topics_and_says_what_it_chose():
    result = tfidf_baseline(*rows(90))
    assert result["score_test"] > 0.9 and result["score_valid"] > 0.9
    assert result["C"] in baseline.GRID
    assert result["settings"]["stop_words"] in (None, "english")
    assert result["settings"]["metric"] == "accuracy"
    assert tfidf_baseline(*rows(90)) == result


def test_lsa_gains_from_text_without_labels():
    corpus, _ = made(600, 7)
    few = rows(9)
    small = Lsa(
        corpus, dimensions=5
    )  # fewer than the words, so that words of one topic come together
    plain, informed = tfidf_baseline(*few), lsa_baseline(small, *few)
    assert informed["score_test"] > plain["score_test"] + 0.1
    assert informed["settings"]["features"] == "LSA of at most 5 dimensions"
    assert lsa_baseline(Lsa(corpus), *few) == lsa_baseline(corpus, *few)
    assert lsa_baseline(small, *few, metric="macro_f1")["score_test"] > 0.8


def test_test_rows_have_no_say():
    """Other test labels change the test score and nothing else."""
    train, labels, valid, valid_labels, test, test_labels = rows()
    turned = [{"sea": "farm", "farm": "city", "city": "sea"}[label] for label in test_labels]
    for run in (tfidf_baseline, lambda *data: lsa_baseline(train + valid, *data)):
        right = run(train, labels, valid, valid_labels, test, test_labels)
        wrong = run(train, labels, valid, valid_labels, test, turned)
        assert wrong["score_test"] < right["score_test"]
        for key in ("score_valid", "C", "settings"):
            assert wrong[key] == right[key]


def test_the_best_of_the_grid_is_chosen():
    train = rows()
    each = {c: tfidf_baseline(*train, grid=(c,)) for c in (1e-6, 0.1, 10.0)}
    chosen = tfidf_baseline(*train, grid=tuple(each))
    best = max(one["score_valid"] for one in each.values())
    assert chosen["score_valid"] == best == each[chosen["C"]]["score_valid"]
    assert chosen["score_test"] == each[chosen["C"]]["score_test"]
    first = min(c for c, one in each.items() if one["score_valid"] == best)
    assert chosen["C"] == first  # of equals the stronger penalty


def test_macro_f1_counts_the_rare_class():
    texts, labels = made(60, 3)
    lopsided = ["common" if label != "sea" else "rare" for label in labels[:-3]] + ["common"] * 3
    data = (texts, lopsided) * 3
    weak = {"grid": (1e-6,)}
    assert tfidf_baseline(*data, **weak)["score_test"] == pytest.approx(
        lopsided.count("common") / 60
    )
    assert tfidf_baseline(*data, **weak, metric="macro_f1")["score_test"] < 0.5
    assert tfidf_baseline(*data, metric="macro_f1")["score_test"] > 0.9


def paired(count: int, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs about one topic or two: the sides alone say nothing about the label."""
    rng = np.random.default_rng(seed)
    pairs, labels = [], []
    for i in range(count):
        left = rng.choice(["sea", "farm", "city"])
        right = left if i % 2 else rng.choice([k for k in TOPICS if k != left])
        sides = [" ".join(rng.choice(TOPICS[k], 6)) for k in (left, right)]
        pairs.append((sides[0], sides[1]))
        labels.append("same" if i % 2 else "different")
    return pairs, labels


def test_pairs_are_compared_not_only_read():
    data = [*paired(150, 0), *paired(60, 1), *paired(100, 2)]
    assert tfidf_baseline(*data)["score_test"] > 0.85
    corpus = made(300, 5)[0]
    assert lsa_baseline(corpus, *data)["score_test"] > 0.85
    joined = [[" ".join(p) for p in part] if i % 2 == 0 else part for i, part in enumerate(data)]
    assert tfidf_baseline(*joined)["score_test"] < 0.8  # what plain joining would have reached


def test_numbers_are_regressed():
    def graded(count, seed):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 6, count)
        words = [["sea"] * int(s) + ["farm"] * int(5 - s) for s in scores]
        return [" ".join([*w, *rng.choice(FILLER, 4)]) for w in words], [float(s) for s in scores]

    data = [*graded(80, 0), *graded(40, 1), *graded(40, 2)]
    assert tfidf_baseline(*data, metric="pearson")["score_test"] > 0.9
    assert lsa_baseline(data[0], *data, metric="spearman")["score_test"] > 0.9
    constant = tfidf_baseline(data[0], [2.0] * 80, *data[2:], metric="pearson")
    assert math.isnan(constant["score_test"])  # no correlation, and no warning either


def test_classes_may_be_of_any_kind_and_new_in_the_test():
    texts, labels = made(60, 0)
    numbers = [list(TOPICS).index(label) for label in labels]
    assert tfidf_baseline(texts, numbers, texts, numbers, texts, numbers)["score_test"] == 1.0
    unseen = ["desert", *labels[1:]]
    result = tfidf_baseline(texts, labels, texts, labels, texts, unseen)
    assert result["score_test"] == pytest.approx(59 / 60)


def test_small_and_strange_text():
    texts, labels = ["the of and", "in on with", "to be or"], ["x", "y", "x"]
    result = tfidf_baseline(texts, labels, texts, labels, texts, labels)
    assert (
        result["settings"]["stop_words"] is None
    )  # the list leaves nothing, so it is out of the choice
    with pytest.raises(DataError, match="no word for the baseline to count"):
        tfidf_baseline(["", "!"], ["x", "y"], ["a b"], ["x"], ["c d"], ["y"])
    assert len(Lsa(["red boat", "red cow", "blue hen"]).spaces) == 2
    with pytest.raises(DataError, match="corpus of 1 different texts"):
        Lsa(["same text", "same text"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"metric": "bleu"}, ConfigError, "no metric 'bleu'"),
        ({"grid": ()}, ConfigError, "at least one C"),
        ({"grid": (0.0, 1.0)}, ConfigError, "C above 0"),
        ({"stop_words": ()}, ConfigError, "entry of stop words"),
        ({"metric": "pearson"}, DataError, "labels that are finite numbers"),
    ],
)
def test_options_that_cannot_be(change, error, words):
    with pytest.raises(error, match=words):
        tfidf_baseline(*rows(), **change)


def test_rows_that_cannot_be():
    train, labels, *rest = rows()
    with pytest.raises(DataError, match="training rows have 30 texts and 29 labels"):
        tfidf_baseline(train, labels[:-1], *rest)
    with pytest.raises(DataError, match="All 30 training rows have the same label"):
        tfidf_baseline(train, ["sea"] * 30, *rest)
    with pytest.raises(DataError, match="one class per row"):
        tfidf_baseline(train, [["sea", "farm"]] * 30, *rest)
    with pytest.raises(DataError, match="single texts and some are pairs"):
        tfidf_baseline([("a b", "c d"), *train[1:]], labels, *rest)
    with pytest.raises(DataError, match="test rows have 0 texts"):
        tfidf_baseline(*rows()[:4], [], [])


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    real = importlib.import_module

    def missing(name, *more):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'")
        return real(name, *more)

    monkeypatch.setattr(baseline.importlib, "import_module", missing)
    for call in (lambda: tfidf_baseline(*rows()), lambda: Lsa(["a b", "c d"])):
        with pytest.raises(ConfigError, match="pip install scikit-learn"):
            call()


def test_the_probe_is_the_linear_model_of_sklearn_on_scaled_embeddings() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    vectors = {f"t{i}": rng.normal(size=6) * [1, 5, 1, 1, 1, 1] + 3 for i in range(90)}
    texts, labels = list(vectors), [int(v[0] > 3) for v in vectors.values()]

    def embed(some):
        return np.stack([vectors[text] for text in some])

    parts = [slice(0, 40), slice(40, 60), slice(60, 90)]
    args = [column for part in parts for column in (texts[part], labels[part])]
    found = probe_baseline(embed, *args, grid=(1.0,))
    x = embed(texts)
    x = (x - x[:40].mean(0)) / (x[:40].std(0) + 1e-6)
    model = LogisticRegression(C=1.0, max_iter=1000).fit(x[:40], labels[:40])
    assert found["score_test"] == pytest.approx(model.score(x[60:], labels[60:]))
    assert found["score_valid"] == pytest.approx(model.score(x[40:60], labels[40:60]))


@pytest.mark.slow
def test_published_figures_on_ag_news(data_sets):
    """200 stratified labels, fixed settings, against figures that were measured by a separate script."""
    parts = {}
    for name in ("train", "test"):
        with (data_sets / "ag_news" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            parts[name] = [(row[0], f"{row[1]} {row[2]}") for row in csv.reader(file)]
    labels = np.array([label for label, _ in parts["train"]])
    texts = [text for _, text in parts["train"]]
    test = [text for _, text in parts["test"]], [label for label, _ in parts["test"]]
    bare, english = Lsa(texts, stop_words=(None,)), Lsa(texts, stop_words=("english",))
    scores: dict[str, list[float]] = {"tfidf": [], "lsa": [], "lsa without stop words": []}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        groups = [rng.permutation(np.flatnonzero(labels == one)) for one in np.unique(labels)]
        some = np.concatenate([group[:50] for group in groups])
        other = np.concatenate([group[-50:] for group in groups])
        data = [
            part for at in (some, other) for part in ([texts[i] for i in at], labels[at].tolist())
        ]
        run = (*data, *test)
        fixed = tfidf_baseline(*run, grid=(10,), stop_words=(None,))
        scores["tfidf"].append(fixed["score_test"])
        scores["lsa"].append(lsa_baseline(bare, *run, grid=(10,))["score_test"])
        scores["lsa without stop words"].append(
            lsa_baseline(english, *run, grid=(1,))["score_test"]
        )
    means = {name: 100 * float(np.mean(column)) for name, column in scores.items()}
    assert means == pytest.approx(
        {"tfidf": 71.2, "lsa": 76.9, "lsa without stop words": 80.0}, abs=0.6
    )
