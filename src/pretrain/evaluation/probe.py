"""What the frozen features of a checkpoint tell: linear probe, nearest neighbours and nearest class means.

The model is not trained. A linear probe (Alain and Bengio, 2016, arXiv 1610.01644) is logistic regression on its
features, nearest neighbours vote by cosine (Wu et al., 2018, arXiv 1805.01978), and nearest class means serve few
labels (Snell et al., 2017, arXiv 1703.05175). All need scikit-learn, the extra ``eval``.

Letters: N rows, D size of a feature vector.
"""

from __future__ import annotations

import inspect
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain import metrics
from pretrain.checkpoint import load
from pretrain.config.spelling import PROBE, either, option, smaller_batch, using
from pretrain.data.images.rows import decoded
from pretrain.data.labelled import drop_duplicates, label_strata, split
from pretrain.errors import (
    ConfigError,
    DataError,
    ModelError,
    did_you_mean,
    naming_memory,
    suggestion,
)
from pretrain.finetuning.baseline import embeddings, of_pairs, probe_baseline
from pretrain.finetuning.keywords import from_keywords
from pretrain.finetuning.measure import reported_precision
from pretrain.finetuning.rows import open_data
from pretrain.inference.images import image_vectors
from pretrain.models.base import Model
from pretrain.models.clip import TwoTowers
from pretrain.models.image_backbone import ImageBackbone
from pretrain.objectives import task_class
from pretrain.objectives.row_pixels import reads_audio
from pretrain.objectives.tasks import Learned, Task
from pretrain.utils.files import note
from pretrain.utils.imports import sklearn_module

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pretrain.data.tables import Table

__all__ = ["METHODS", "image_vectors", "probe"]

METHODS = ("linear", "knn", "means")
# Options of `pretrain.finetune` that say how rows are read.
_READING = (
    *("group", "labels", "label_form", "label_separator", "problem"),
    *("format", "names", "delimiter", "quoting", "encoding"),
)
_FINETUNE = "pretrain.finetune(model, data, task='audio-classification')"
_TEST = 0.2  # share of the rows that is held out if no test rows are given


@using(PROBE)
def probe(
    checkpoint: str | os.PathLike[str] | Model,
    data: Any,
    *,
    test: Any = None,
    valid: Any = None,
    method: str = "linear",
    shots: int | None = None,
    ways: int | None = None,
    draws: int = 5,
    k: int = 5,
    columns: Mapping[str, Any] | None = None,
    pooling: str | None = None,
    batch_rows: int = 64,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    **keywords: Any,
) -> dict[str, float]:
    """Classify held-out rows by the frozen features of a model and the labels of some rows.

    Args:
        checkpoint: a run, a checkpoint, any Hugging Face directory of a known family, or a ``Model``.
        data: labelled rows, images or texts, as for ``pretrain.finetune``; its parts ``val`` and ``test`` are used.
        test: held-out rows: a source, or a share of the rows, stratified by class; by default a fifth.
        valid: rows on which the linear probe chooses C, the inverse strength of the penalty: a source or a share; not
            given, a tenth. With ``shots`` C is 1, so that no other labels are read.
        method: ``linear``, logistic regression on features of mean 0 and variance 1; ``knn``, the most frequent class
            of the ``k`` rows with the largest cosines; ``means``, the class whose mean is nearest by the cosine.
        shots: labelled rows of each class, drawn ``draws`` times; by default all of them.
        ways: classes of a draw; by default all of them. The test rows of a draw are those of its classes.
        draws: number of draws of ``shots`` or ``ways``.
        k: neighbours that vote.
        columns: role -> column, ``image`` or ``text``, and ``label``; by default recognised by name.
        **keywords: the same by role, as for ``pretrain.finetune``: ``text="review"``; and its options that say how rows
            are read: ``labels``, ``label_separator`` and ``label_form``, those of the format of a file, and ``group``,
            which holds for ``valid`` as a share: test rows of other groups are to be given. ``columns`` takes them too.
        pooling: of images ``mean`` over the patches, or ``first``, the class token; by default what the classifier of
            the model reads, of dinov2 the class token alone. Of texts see ``embed``.
        batch_rows: rows in one forward pass.
        seed: of the shares that are held out, and of the draws.
        precision: compute type, see ``evaluate``.
        device: where a checkpoint is loaded to: auto, cpu, cuda or mps. A ``Model`` stays where it is.

    Returns:
        ``accuracy``, ``majority`` (the accuracy of the class that is most frequent in the test rows), ``rows`` with
        labels and ``targets``, the number of test rows; of a linear probe ``C`` and, unless ``shots`` are given,
        ``valid``, its accuracy on the rows it was chosen on. Over several draws ``accuracy`` is the mean, ``std`` the
        standard deviation, ``low`` and ``high`` the limits of Student's 95 % interval, and the other figures are means.

    Raises:
        ConfigError: an unknown option (the nearest is suggested) or one out of range, or scikit-learn is not installed.
        DataError: the rows have no labels, or several each; or a class has fewer rows than ``shots``.
        ModelError: the model reads neither images nor texts, or does not pool as ``pooling`` says.
    """
    _check(method, shots=shots, ways=ways, draws=draws, k=k, batch_rows=batch_rows)
    sklearn_module("linear_model")  # says how to install it before anything is computed
    model = checkpoint if isinstance(checkpoint, Model) else load(os.fspath(checkpoint), quiet=True)
    tables = _tables(model, data, valid, test, {**(columns or {}), **keywords}, seed)
    chosen = reported_precision(None, precision, device)
    with naming_memory("the probe", lambda: smaller_batch(batch_rows)), chosen.autocast():
        if not isinstance(checkpoint, Model):
            model.to(chosen.device)
        train, choose, score = _features(model, tables, pooling, batch_rows)
    rng = np.random.default_rng(seed)
    several = shots is not None or ways is not None
    found = []
    for _ in range(draws if several else 1):
        classes = _classes(train[1], ways, rng)
        parts = [_of(part, classes) for part in (train, choose, score)]
        if shots is not None:
            parts[0] = _drawn(parts[0], shots, rng)
        found.append(_scores(method, parts, k, seed, choose_c=shots is None))
    figures = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
    if len(found) > 1:
        scores = [one["accuracy"] for one in found]
        _, low, high = metrics.mean_interval(scores)
        figures |= {"std": statistics.stdev(scores), "low": low, "high": high}
        figures["draws"] = float(draws)
    return figures


def _check(method: str, **counts: Any) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"method is {method!r}; it must be {', '.join(METHODS)}.{suggestion(method, METHODS)}"
        )
    for name, value in counts.items():
        least = 2 if name == "ways" else 1
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number from {least} on.")


# ------------------------------------------------------------------------------------------------ rows and features

_Part = tuple["NDArray[np.float32]", list[Any]]  # features (N, D) and the class of each row


def _reads_images(model: Model) -> bool:
    return isinstance(model.backbone, ImageBackbone | TwoTowers)


def _tables(
    model: Model, data: Any, valid: Any, test: Any, columns: Mapping[str, Any], seed: int
) -> list[Table]:
    """Return the rows with labels, those to choose on and the test rows, without rows that recur in a later part."""
    if reads_audio(model):
        raise ModelError(
            f"A probe reads images or texts, and this {model.backbone.model_type} model reads recordings. Fine-tune "
            f"it: {either('pretrain finetune --task audio-classification', _FINETUNE)}."
        )
    if not _reads_images(model) and model.tokenizer is None:
        raise ModelError(
            f"This {model.backbone.model_type} model has no tokenizer and reads no images, so no features of rows can "
            "be computed. Put tokenizer.json into its directory."
        )
    name = "image-classification" if _reads_images(model) else "classification"
    task = task_class(name)
    roles = {role.name for role in task.roles}
    if wrong := next((key for key in columns if key not in {*roles, *_READING}), None):
        known = [
            *roles,
            *_READING,
            *(key for key in inspect.signature(probe).parameters if key != "keywords"),
        ]
        raise ConfigError(
            f"{wrong} is no column that a probe of this model reads, and no option.{did_you_mean(wrong, known)}"
        )
    share = float(test) if isinstance(test, int | float) else _TEST
    given = {"train": data, "valid": valid, "test": None if isinstance(test, int | float) else test}
    settings, objects = from_keywords(None, model, name, {**given, "seed": seed, **columns})
    found = open_data(settings, objects, task)
    train, choose = (_named(table, task, found.learned) for table in (found.train, found.valid))
    if found.test is not None:
        return [train, choose, _named(found.test, task, found.learned)]
    if settings.data.group:
        note(
            "the test rows are a share of all rows, without regard to groups; give those of other groups as test"
        )
    train, score = split(train, label_strata(train.columns["label"]), share, seed)
    role = task.roles[0].name
    train, _ = drop_duplicates(train, score, [role], "test")
    choose, _ = drop_duplicates(choose, score, [role], "test")
    return [train, choose, score]


def _named(table: Table, task: type[Task], learned: Learned) -> Table:
    """Return a table with the name of the class of each row; see ``Task.named``.

    Raises:
        DataError: rows may have several classes each.
    """
    if task.classes(table, learned) is None:
        raise DataError(
            f"{table.where(0)}: the label is {str(table.columns['label'][0])[:40]}, several at once, and a probe tells "
            "single classes apart. Give each row one class."
        )
    return task.named(table, learned)


def _features(
    model: Model, tables: Sequence[Table], pooling: str | None, batch_rows: int
) -> list[_Part]:
    """Return features and labels of each table."""
    read = _of_images if _reads_images(model) else _of_texts
    none: _Part = (np.empty((0, 0), np.float32), [])  # of a table without rows, which valid=0 gives
    return [read(model, table, pooling, batch_rows) if len(table) else none for table in tables]


def _of_texts(model: Model, table: Table, pooling: str | None, batch_rows: int) -> _Part:
    transform = embeddings(model, pooling=pooling, batch_size=batch_rows)
    rows, labels = task_class("classification").baseline_columns(table)
    of_rows = of_pairs(transform) if "pair" in table.names else transform
    return np.asarray(of_rows(rows)), list(labels)


def _of_images(model: Model, table: Table, pooling: str | None, batch_rows: int) -> _Part:
    """Rows without a readable image are counted in a line and left out."""
    kept, images, reasons = list[int](), list[Any](), Counter[str]()
    for i, image, text in decoded(table, required=True):
        if image is None:
            reasons[text or "no image"] += 1
        else:
            kept.append(i)
            images.append(image)
    for reason, count in reasons.items():
        note(f"{count:,} of {len(table):,} rows are left out: {reason}")
    if not images:
        raise DataError(f"None of the images of {table.name} can be read.")
    vectors = image_vectors(model, images, pooling=pooling, batch_rows=batch_rows)
    return vectors.numpy(), [table.columns["label"][i] for i in kept]


# ------------------------------------------------------------------------------------------------ draws and scores


def _classes(labels: Sequence[Any], ways: int | None, rng: np.random.Generator) -> set[Any]:
    known = list(dict.fromkeys(labels))
    if ways is None:
        return set(known)
    if ways > len(known):
        raise ConfigError(f"ways is {ways}, and the rows have {len(known)} classes.")
    return {known[i] for i in rng.choice(len(known), ways, replace=False)}


def _of(part: _Part, classes: set[Any]) -> _Part:
    """Return the rows of some classes."""
    rows = [i for i, label in enumerate(part[1]) if label in classes]
    return part[0][rows], [part[1][i] for i in rows]


def _drawn(part: _Part, shots: int, rng: np.random.Generator) -> _Part:
    """Return ``shots`` rows of each class.

    Raises:
        DataError: a class has fewer.
    """
    members: dict[Any, list[int]] = {}
    for i, label in enumerate(part[1]):
        members.setdefault(label, []).append(i)
    fewest = min(members, key=lambda label: len(members[label]))
    if len(members[fewest]) < shots:
        raise DataError(
            f"The class {fewest!r} has {len(members[fewest])} rows with labels, fewer than {option('shots', shots)}. "
            f"Draw fewer, or hold fewer rows out ({option('valid')}, {option('test')})."
        )
    rows = [int(i) for own in members.values() for i in rng.choice(own, shots, replace=False)]
    return part[0][rows], [part[1][i] for i in rows]


def _scores(
    method: str, parts: Sequence[_Part], k: int, seed: int, *, choose_c: bool
) -> dict[str, float]:
    (x_train, train), (x_valid, valid), (x_test, test) = parts
    if not len(x_train) or not len(x_test):
        raise DataError(
            "There are no rows with labels, or no test rows, of the classes of a draw. Hold more rows out "
            f"({option('test')}), or draw more classes ({option('ways')})."
        )
    figures = {
        "accuracy": math.nan,
        "majority": max(Counter(test).values()) / len(test),
        "rows": float(len(train)),
        "targets": float(len(test)),
    }
    if method == "linear" and not choose_c:
        columns = (list(x_train), train, list(x_train), train, list(x_test), test)
        found = probe_baseline(np.stack, *columns, grid=(1.0,), seed=seed)
        return figures | {"accuracy": found["score_test"], "C": found["C"]}
    if method == "linear":
        if not len(x_valid):
            raise DataError(
                "There are no rows of the classes of a draw on which the linear probe can choose C. Hold more rows out "
                f"for that ({option('valid')}), draw more classes ({option('ways')}), or name {option('shots')} or "
                f"another {option('method')}."
            )
        columns = (list(x_train), train, list(x_valid), valid, list(x_test), test)
        found = probe_baseline(np.stack, *columns, seed=seed)
        return figures | {
            "accuracy": found["score_test"],
            "valid": found["score_valid"],
            "C": found["C"],
        }
    ids = {label: i for i, label in enumerate(dict.fromkeys(train))}
    own = np.array([ids[label] for label in train])
    units, others = _units(x_train), _units(x_test)
    if method == "knn":
        if k > len(train):
            raise ConfigError(f"k is {k}, more than the {len(train)} rows with labels.")
        neighbours = sklearn_module("neighbors").KNeighborsClassifier(k, metric="cosine")
        answers = neighbours.fit(units, own).predict(others)
    else:
        means = np.stack([units[own == i].mean(0) for i in range(len(ids))])
        answers = (others @ _units(means).T).argmax(1)
    right = [ids.get(label) == int(answer) for label, answer in zip(test, answers, strict=True)]
    return figures | {"accuracy": sum(right) / len(right)}


def _units(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale rows to length one; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)
