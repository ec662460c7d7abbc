"""Linear baselines without fine-tuning, trained on the same labels and tuned on the same rows as the model.

Two use no transformer. TF-IDF of unigrams and bigrams under a linear model (Joachims, 1998; Wang and Manning, 2012)
uses the labelled rows only, like a model trained from scratch. Latent semantic analysis (Deerwester et al., 1990) first
reads unlabelled text, as pre-training does, so it is the fair baseline for a model that was pre-trained on the text of
the task. The third is a linear probe (Alain and Bengio, 2016): the same linear model on the frozen embeddings of the
checkpoint. Strength of the penalty and stop words are chosen on the validation rows; the test rows are used once, after
the choice. For images, the pixels under the same linear model take the place of all three, for the segmentation of
images the colours of single pixels and of their surroundings, and for audio the mean log-mel energies of eight parts of
a recording. All need scikit-learn, the extra ``eval``.

Each baseline takes six columns: texts and labels of the training rows, of the validation rows, and of the test rows.
Texts are strings or pairs of strings; the features of a pair are those of both sides, their element-wise products and
absolute differences, and the cosine. Labels are classes of any hashable kind, or numbers if the metric is a
correlation. The result has ``score_valid`` and ``score_test`` (as the metric counts, not in percent), the chosen ``C``
and ``settings``. Common options and errors:

- ``grid``: values of C, the inverse strength of the penalty (ridge: 1 / alpha), to choose from.
- ``metric``: one of ``METRICS``; a correlation makes it a regression.
- ``seed``: seed of the solver.
- ``ConfigError``: scikit-learn is not installed, or an option is unknown.
- ``DataError``: texts and labels do not match, or there is nothing to learn from.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pretrain import metrics
from pretrain.errors import ConfigError, DataError
from pretrain.utils.imports import sklearn_module

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "METRICS",
    "VECTORS",
    "Lsa",
    "embeddings",
    "linear_model",
    "lsa_baseline",
    "of_pairs",
    "probe_baseline",
    "tfidf_baseline",
    "vector_baseline",
]

Text = str | tuple[str, str]
Vectors = Callable[[Sequence[str]], Any]
# Settings that are reported, and a function from texts to features.
Variant = tuple[dict[str, Any], Vectors]

GRID = (0.1, 1.0, 10.0, 100.0)
STOP_WORDS = (None, "english")
PROBE_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # embeddings of variance 1 need a stronger penalty


class Features(NamedTuple):
    """Vectors that are no embeddings of texts.

    Attributes:
        grid: values of C to choose from.
        quick: a part of them, for a fit within seconds.
        scaled: whether the vectors are scaled to variance 1.
        rows: what is read of the rows, for messages.
    """

    grid: tuple[float, ...]
    quick: tuple[float, ...]
    scaled: bool
    rows: str = "the same rows"


# Pixels lie between 0 and 1; colours are those of pixels and of their surroundings; log-mel are mean energies of parts
# of a recording.
VECTORS = {
    "pixels": Features((0.01, 0.1, 1.0), (0.01, 0.1), False),
    "colours": Features(GRID, (1.0,), True, "a sample of pixels"),
    "log-mel": Features((0.01, 0.1, 1.0), (0.01, 0.1), True),
}

# Metrics for tuning and scoring of baselines; higher is better for all of them.
_OF_CLASSES: dict[str, Callable[[Any], float]] = {
    "accuracy": metrics.accuracy,
    "macro_f1": metrics.macro_f1,
    "matthews": metrics.matthews,
    "miou": metrics.mean_iou,
}
_OF_NUMBERS: dict[str, Callable[[Any, Any], float]] = {
    "pearson": metrics.pearson,
    "spearman": metrics.spearman,
}
METRICS = (*_OF_CLASSES, *_OF_NUMBERS)


def tfidf_baseline(
    *columns: Sequence[Any],
    grid: Sequence[float] = GRID,
    stop_words: Sequence[str | None] = STOP_WORDS,
    metric: str = "accuracy",
    seed: int = 0,
) -> dict[str, Any]:
    """TF-IDF of unigrams and bigrams under logistic regression, or ridge regression for a correlation.

    ``stop_words`` are the lists of stop words to choose from: None, or ``"english"`` (scikit-learn's).
    """
    text = sklearn_module("feature_extraction.text")

    def variants(train: Sequence[str]) -> Iterable[Variant]:
        for words in stop_words:
            vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), stop_words=words)
            if _fitted(vectorizer, train):
                settings = {"features": "TF-IDF of words and pairs of words", "stop_words": words}
                yield settings, vectorizer.transform

    return _tuned(variants, columns, grid, metric, seed, stop_words)


class Lsa:
    """Latent semantic features, learnt once from unlabelled text and used for any number of labelled subsets.

    TF-IDF of words (sublinear; words in at least two texts, or in one if that leaves none), a truncated singular value
    decomposition, rows of unit length.

    Args:
        corpus_texts: texts or pairs of texts without labels; equal texts count once. Do not include test texts.
        dimensions: dimensions of the features; fewer if the corpus is smaller.
        stop_words: lists of stop words, each of which gives a separate space to choose from.
        seed: seed of the randomised decomposition.

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: the corpus has fewer than two texts or words.
    """

    def __init__(
        self,
        corpus_texts: Sequence[Text],
        *,
        dimensions: int = 100,
        stop_words: Sequence[str | None] = STOP_WORDS,
        seed: int = 0,
    ) -> None:
        self.dimensions = dimensions
        self.spaces: list[tuple[str | None, Vectors]] = []
        corpus = list(dict.fromkeys(_flat(corpus_texts)))
        for words in stop_words:
            space = self._space(corpus, words, seed)
            if space is not None:
                self.spaces.append((words, space))
        if not self.spaces:
            raise DataError(
                f"Latent semantic analysis finds no features in a corpus of {len(corpus):,} different texts: it needs "
                f"at least two texts with two different words. Give it the text that pre-training read."
            )

    def _space(self, corpus: list[str], words: str | None, seed: int) -> Vectors | None:
        text, decomposition = (
            sklearn_module("feature_extraction.text"),
            sklearn_module("decomposition"),
        )
        pipeline, preprocessing = sklearn_module("pipeline"), sklearn_module("preprocessing")
        for least in (2, 1):
            vectorizer = text.TfidfVectorizer(sublinear_tf=True, min_df=least, stop_words=words)
            if not _fitted(vectorizer, corpus):
                continue
            counts = vectorizer.transform(corpus)
            size = min(self.dimensions, min(counts.shape) - 1)
            if size >= 1:
                svd = decomposition.TruncatedSVD(size, random_state=seed).fit(counts)
                # A text without a known word keeps the zero vector.
                steps = pipeline.make_pipeline(vectorizer, svd, preprocessing.Normalizer())
                transform: Vectors = steps.transform
                return transform
        return None


def lsa_baseline(
    corpus: Lsa | Sequence[Text],
    *columns: Sequence[Any],
    grid: Sequence[float] = GRID,
    metric: str = "accuracy",
    seed: int = 0,
) -> dict[str, Any]:
    """Latent semantic features of unlabelled text under a linear model.

    ``corpus`` is the text of pre-training, or an ``Lsa`` fitted on it, which many subsets can share.
    """
    lsa = corpus if isinstance(corpus, Lsa) else Lsa(corpus, seed=seed)
    name = f"LSA of at most {lsa.dimensions} dimensions"
    variants = [({"features": name, "stop_words": words}, space) for words, space in lsa.spaces]
    return _tuned(lambda train: variants, columns, grid, metric, seed)


def embeddings(model: Model, **options: Any) -> Vectors:
    """Return a function from texts to their vectors, see ``embed``."""
    return lambda texts: model.embed(texts, **options).numpy()


def probe_baseline(
    embed: Vectors,
    *columns: Sequence[Any],
    grid: Sequence[float] = PROBE_GRID,
    metric: str = "accuracy",
    seed: int = 0,
) -> dict[str, Any]:
    """Linear probe: embeddings of a frozen model, scaled to variance 1, under a linear model.

    ``embed`` returns a vector for each text, such as ``embeddings(model)``.
    """
    settings = {"features": "embeddings of the checkpoint", "stop_words": None}
    return _tuned(lambda train: [(settings, embed)], columns, grid, metric, seed, scaled=True)


def vector_baseline(
    features: str,
    *columns: Any,
    grid: Sequence[float] | None = None,
    metric: str = "accuracy",
    seed: int = 0,
) -> dict[str, Any]:
    """Vectors that are no embeddings of texts, such as pixels, under a linear model.

    ``features`` says what they are, a key of ``VECTORS``, which has their grid. The columns hold the vectors in the
    place of texts, and labels or classes of pixels.
    """
    kind = VECTORS[features]
    settings = {"features": features, "stop_words": None}
    variants, grid = [(settings, np.asarray)], grid or kind.grid
    return _tuned(lambda train: variants, columns, grid, metric, seed, scaled=kind.scaled)


def _tuned(
    variants: Callable[[Sequence[str]], Iterable[Variant]],
    columns: Sequence[Sequence[Any]],
    grid: Sequence[float],
    metric: str,
    seed: int,
    stop_words: Sequence[str | None] = STOP_WORDS,
    scaled: bool = False,
) -> dict[str, Any]:
    """Fit every variant at every C, keep the first that is best on the validation rows, and test only that one."""
    if metric not in METRICS:
        raise ConfigError(f"A baseline has no metric {metric!r}. Known: {', '.join(METRICS)}.")
    if not grid or min(grid) <= 0 or not stop_words:
        raise ConfigError(
            f"grid={grid!r} and stop_words={stop_words!r}: a baseline is chosen from at least one C above 0 and one "
            f"entry of stop words (None for no list)."
        )
    texts, labels = columns[::2], columns[1::2]
    pairs = _are_pairs(texts, labels)
    train, valid, test = _targets(labels, metric)
    best: tuple[float, float, dict[str, Any], Any, Any, Any] | None = None
    for settings, transform in variants(_flat(texts[0])):
        features = of_pairs(transform) if pairs else transform
        x_train, x_valid = features(texts[0]), features(texts[1])
        scaler = sklearn_module("preprocessing").StandardScaler() if scaled else None
        if scaler is not None:
            x_train, x_valid = scaler.fit_transform(x_train), scaler.transform(x_valid)
        for strength in sorted(grid):
            model = _fit(x_train, train, strength, metric, seed)
            score = _score(metric, valid, model.predict(x_valid))
            # The correlation of a constant prediction is nan, and any number is better.
            if best is None or score > best[0] or (math.isnan(best[0]) and not math.isnan(score)):
                best = (score, strength, settings, features, scaler, model)
    if best is None:
        raise DataError(
            "The training texts hold no word for the baseline to count (words have at least two letters or digits, "
            "and stop words are left out): check that the text column is the right one."
        )
    score, strength, settings, features, scaler, model = best
    x_test = features(texts[2]) if scaler is None else scaler.transform(features(texts[2]))
    return {
        "score_valid": score,
        "score_test": _score(metric, test, model.predict(x_test)),
        "C": float(strength),
        "settings": {**settings, "metric": metric, "seed": seed},
    }


def linear_model(metric: str) -> str:
    """Return the name of the linear model that is fitted for a metric."""
    return f"{'ridge' if metric in _OF_NUMBERS else 'logistic'} regression"


def _fit(x: Any, y: Any, strength: float, metric: str, seed: int) -> Any:
    linear, errors = sklearn_module("linear_model"), sklearn_module("exceptions")
    if metric in _OF_NUMBERS:
        return linear.Ridge(alpha=1.0 / strength, random_state=seed).fit(x, y)
    with warnings.catch_warnings():
        # With a very weak penalty the predictions converge before the last digits of the weights do.
        warnings.simplefilter("ignore", errors.ConvergenceWarning)
        return linear.LogisticRegression(C=strength, max_iter=1000, random_state=seed).fit(x, y)


def _score(metric: str, true: Any, predicted: Any) -> float:
    if metric in _OF_NUMBERS:
        return _OF_NUMBERS[metric](true, predicted)
    size = int(max(true.max(), predicted.max())) + 1
    return _OF_CLASSES[metric](metrics.confusion_matrix(true, predicted, size))


def _targets(columns: Sequence[Sequence[Any]], metric: str) -> list[Any]:
    """Labels as arrays: class ids by first appearance, or numbers."""
    if metric in _OF_NUMBERS:
        try:
            numbers = [np.asarray(column, np.float64) for column in columns]
        except (TypeError, ValueError):
            numbers = []
        if not numbers or not all(np.isfinite(column).all() for column in numbers):
            raise DataError(
                f"The metric {metric!r} needs labels that are finite numbers. For classes use 'accuracy' or 'macro_f1'."
            )
        return numbers
    ids: dict[Hashable, int] = {}
    try:
        class_ids = [[ids.setdefault(label, len(ids)) for label in column] for column in columns]
    except TypeError:
        raise DataError(
            "A label is a list, but a classical baseline supports only one class per row."
        ) from None
    if len(set(class_ids[0])) < 2:
        raise DataError(
            f"All {len(class_ids[0]):,} training rows have the same label, so there is nothing to tell apart: draw the "
            f"subset stratified by class, or take more rows."
        )
    return [np.asarray(column, np.int64) for column in class_ids]


def _are_pairs(texts: Sequence[Sequence[Text]], labels: Sequence[Sequence[Any]]) -> bool:
    """Check the columns; return whether the rows are pairs of texts."""
    for name, some, theirs in zip(("training", "validation", "test"), texts, labels, strict=True):
        if len(some) != len(theirs) or not len(some):
            raise DataError(
                f"The {name} rows have {len(some):,} texts and {len(theirs):,} labels; there must be as many of one "
                f"as of the other, and at least one."
            )
    kinds = {isinstance(text, tuple | list) for column in texts for text in column}
    if len(kinds) > 1:
        raise DataError("Some rows are single texts and some are pairs; all must be of one kind.")
    return kinds.pop()


def _flat(texts: Iterable[Text]) -> list[str]:
    """Single texts as they are, pairs as two texts."""
    return [one for text in texts for one in (text if isinstance(text, tuple | list) else (text,))]


def of_pairs(transform: Vectors) -> Callable[[Sequence[Any]], Any]:
    """Return a function for the features of pairs, given one for the features of texts."""

    def both(texts: Sequence[tuple[str, str]]) -> Any:
        # Products and differences are added, because a linear model cannot compute them from the two sides.
        left, right = (transform([text[side] for text in texts]) for side in (0, 1))
        if isinstance(left, np.ndarray):
            shared = left * right
            return np.hstack([left, right, shared, abs(left - right), shared.sum(1, keepdims=True)])
        sparse = importlib.import_module("scipy.sparse")
        shared = left.multiply(right)
        cosine = sparse.csr_matrix(shared.sum(axis=1))
        return sparse.hstack([left, right, shared, abs(left - right), cosine]).tocsr()

    return both


def _fitted(vectorizer: Any, texts: Sequence[str]) -> bool:
    """Fit the vocabulary; return False if no word is left or none is frequent enough."""
    try:
        vectorizer.fit(texts)
    except ValueError as error:
        empty = ("empty vocabulary", "no terms remain", "max_df corresponds to < documents")
        if any(words in str(error) for words in empty):
            return False
        raise
    return True
