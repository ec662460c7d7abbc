"""Classification of texts and of pairs of texts: one class each, or any number of them (Devlin et al., 2019, §4.1).

Letters: N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import metrics as figures_of
from pretrain.data.labelled import Role
from pretrain.data.labels import LabelMap
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Batch, Example, Loss
from pretrain.objectives.tasks import Learned, Task, sequence_labels

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["PAIR", "TEXT", "Classification", "encode_texts", "given_weights"]

TEXT = Role(
    "text",
    (
        *("text", "sentence", "sentence1", "premise", "sentence_a", "text_a", "review", "content"),
        *("body", "document", "message", "query", "question"),
    ),
    help="the text to read",
)
PAIR = Role(
    "pair",
    ("pair", "sentence2", "hypothesis", "sentence_b", "text_b", "text_pair", "question2"),
    required=False,
    help="a second text, read together with the first",
)
_SINGLE, _MULTI = "single_label", "multi_label"


def encode_texts(task: Task, table: Table) -> tuple[TaskRows, list[int]]:
    """Encode ``text`` and, where there is one, ``pair``; returns the rows and the indices that hold an example.

    Raises:
        DataError: a value that is no text.
    """
    rows, kept, texts, pairs = TaskRows(), [], [], []
    paired = "pair" in table.names
    for i, row in enumerate(table.rows()):
        values = [row["text"], row["pair"]] if paired else [row["text"]]
        for value in values:
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{table.where(i)}: the text is {type(value).__name__} {str(value)[:40]!r}, not a text. Name the "
                    "column that holds the text, or turn its values into strings."
                )
        if not all(value and value.strip() for value in values):
            rows.drop(i, "empty text")
            continue
        kept.append(i)
        texts.append(values[0])
        pairs.append(values[-1])
    encodings = task.encoder.texts(texts, pairs if paired else None) if kept else []
    for i, encoding in zip(kept, encodings, strict=True):
        if encoding.overflowing:
            rows.cut.append(i)
        rows.add(i, task.encoder.example(encoding))
    return rows, kept


class Classification(Task):
    """Say which class, or which classes, a text belongs to.

    Args:
        model: with a sequence-classification head and ``labels``.
        problem: ``"single_label"`` or ``"multi_label"``.
        class_weights: weight of each class in the loss: ``"balanced"`` (rows / (C * rows of the class), counted on
            the training rows), a list in the order of the labels, or a mapping from label to weight.
        label_smoothing: share of a target that is spread over all classes; in training only.
        threshold: probability from which a class is named, where there may be several.
        codes: class number of every spelling of a label in the column; by default the labels themselves.
        max_length, pack: see ``Task``.

    Raises:
        ConfigError: an option out of range.
    """

    name: ClassVar[str] = "classification"
    roles: ClassVar[tuple[Role, ...]] = (
        TEXT,
        PAIR,
        Role(
            "label",
            (
                *(
                    "label",
                    "labels",
                    "category",
                    "class",
                    "stars",
                    "rating",
                    "intent",
                    "gold_label",
                ),
                *("entailment_judgment", "target", "topic", "sentiment", "coarse_label"),
            ),
            help="the class, or a list of classes",
            target=True,
        ),
    )
    metric: ClassVar[str] = "accuracy"
    head_kind: ClassVar[str | None] = "sequence-classification"

    def __init__(
        self,
        model: Model,
        *,
        problem: str = _SINGLE,
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        threshold: float = 0.5,
        codes: Mapping[str, int] | None = None,
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, max_length=max_length, pack=pack)
        if problem not in (_SINGLE, _MULTI):
            raise ConfigError(f"problem is {problem!r}; it must be {_SINGLE!r} or {_MULTI!r}.")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1).")
        if problem == _MULTI and (label_smoothing or class_weights is not None):
            option = "label_smoothing" if label_smoothing else "class_weights"
            raise ConfigError(
                f"{option} is for texts with one class each, and here a text may have several. Leave it out."
            )
        self.labels: tuple[str, ...] = tuple(model.labels or ())
        self.problem, self.threshold = problem, threshold
        spelled = {label: k for k, label in enumerate(self.labels)}
        self._map = LabelMap(self.labels, spelled if codes is None else codes)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self._weights = given_weights(class_weights, self.labels)
        model.extra_config["problem_type"] = f"{problem}_classification"

    @property
    def single(self) -> bool:
        """Every text has exactly one class."""
        return self.problem == _SINGLE

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        values, given = table.columns["label"], options.get("labels")
        if any(isinstance(value, list | tuple | set | np.ndarray) for value in values):
            return cls._learn_several(table, values, given)
        names = table.label_names.get("label")
        found = LabelMap.learn(values, given, names=names, where=table.where)
        ids = found.ids(values, where=table.where)
        return Learned(found.labels, ids, {"problem": _SINGLE, "codes": dict(found.codes)})

    @staticmethod
    def _learn_several(table: Table, values: Sequence[Any], given: Any) -> Learned:
        for i, value in enumerate(values):
            if not isinstance(value, list | tuple | set | np.ndarray):
                raise DataError(
                    f"{table.where(i)}: the label is {value!r}, but other rows have lists of labels. Give every row "
                    "a list, [] where no class fits."
                )
        found = {str(one) for value in values for one in value}
        labels = tuple(str(one) for one in given) if given else tuple(sorted(found))
        if unknown := sorted(found - set(labels)):
            raise DataError(
                f"The training rows hold the labels {', '.join(map(repr, unknown[:5]))}, which are not among those "
                f"given: {', '.join(labels[:20])}."
            )
        if len(labels) < 2:
            raise DataError(
                f"The training rows name {len(labels)} classes; nothing can be told apart."
            )
        strata = [tuple(sorted(map(str, value))) for value in values]
        return Learned(labels, strata=strata, options={"problem": _MULTI})

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows, kept = encode_texts(self, table)
        if not targets:
            return rows
        answers = self.targets(table)
        for example, i in zip(rows.examples, kept, strict=True):
            example["labels"] = answers[i]
        if self.class_weights == "balanced" and self._weights is None and self.single:
            counts = np.bincount([int(answers[i]) for i in kept], minlength=len(self.labels))
            self._weights = len(kept) / (len(self.labels) * np.maximum(counts, 1.0))
        return rows

    def targets(self, table: Table) -> list[np.ndarray]:
        """The target of every row: a class number, or (C,) zeros and ones.

        Raises:
            DataError: a label that is not among those of the model.
        """
        if self.single:
            ids = self._map.ids(table.columns["label"], where=table.where)
            return [np.asarray(i, dtype=np.int64) for i in ids]
        places = {label: k for k, label in enumerate(self.labels)}
        found = []
        for i, value in enumerate(table.columns["label"]):
            target = np.zeros(len(places), dtype=np.float32)
            if not isinstance(value, list | tuple | set | np.ndarray):
                raise DataError(
                    f"{table.where(i)}: the label is {value!r}, but the training rows have lists of labels. Give "
                    "every row a list, [] where no class fits."
                )
            for one in value:
                if str(one) not in places:
                    raise DataError(
                        f"{table.where(i)}: the label {one!r} is not among those of the training rows: "
                        f"{', '.join(self.labels[:20])}."
                    )
                target[places[str(one)]] = 1.0
            found.append(target)
        return found

    def truth(self, table: Table) -> list[Any]:
        """The right answers, in the form in which ``decode`` gives them."""
        if self.single:
            return [self.labels[int(i)] for i in self.targets(table)]
        return [
            [label for label, on in zip(self.labels, row, strict=True) if on]
            for row in self.targets(table)
        ]

    def collate(
        self,
        examples: Sequence[Example],
        rngs: Sequence[np.random.Generator],
        *,
        evaluation: bool = False,
    ) -> Batch:
        batch = self.pack_batch(examples, pooled=True)
        if "labels" in examples[0]:
            kind = torch.int64 if self.single else torch.float32
            batch["labels"] = sequence_labels(examples, kind)
            if self._weights is not None and not evaluation and self.single:
                batch["weights"] = torch.tensor(self._weights, dtype=torch.float32)[batch["labels"]]
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Examples, or the sum of their weights: a weighted mean is divided by the weights."""
        if "weights" in batch:
            return batch["weights"].sum()
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def forward(self, batch: Batch) -> Loss:
        logits, labels = self.model(batch).float(), batch["labels"]  # (N, C)
        if not self.single:
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            chosen, wanted = logits > _logit(self.threshold), labels > 0.5
            counts = torch.stack(
                [(chosen & wanted).sum(0), (chosen & ~wanted).sum(0), (~chosen & wanted).sum(0)]
            )
            exact = (chosen == wanted).all(-1).sum()
            return Loss(
                total / logits.shape[-1], self.count(batch), {"counts": counts, "exact": exact}
            )
        smoothing = self.label_smoothing if self.training else 0.0
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        total = (each * batch["weights"]).sum() if "weights" in batch else each.sum()
        classes = logits.shape[-1]
        pairs = labels * classes + logits.argmax(-1)  # (N,) places in the flattened (C, C)
        matrix = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        return Loss(total, self.count(batch), {"confusion": matrix})

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Accuracy, macro-averaged F1 and Matthews' correlation; with several classes micro- and macro-F1."""
        figures = {"loss": total / count if count else math.nan}
        if self.single:
            matrix = np.asarray(metrics["confusion"])
            return figures | {
                "accuracy": figures_of.accuracy(matrix),
                "macro_f1": figures_of.macro_f1(matrix),
                "mcc": figures_of.matthews(matrix),
            }
        hit, extra, missed = np.asarray(metrics["counts"], dtype=float)
        return figures | {
            "accuracy": float(metrics["exact"]) / count if count else math.nan,
            "micro_f1": _f1(hit.sum(), extra.sum(), missed.sum()),
            "macro_f1": float(np.mean([_f1(*c) for c in zip(hit, extra, missed, strict=True)])),
        }

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Accuracy of the most frequent class of the training rows."""
        if not self.single or not len(held_out):
            return {}
        known = [int(i) for i in self.targets(train)]
        most = max(set(known), key=known.count)
        hits = [int(i) == most for i in self.targets(held_out)]
        return {"accuracy": sum(hits) / len(hits)}

    def outputs(self, batch: Batch) -> list[Any]:
        logits = self.model(batch).float()
        chances = logits.softmax(-1) if self.single else logits.sigmoid()
        return list(chances.cpu().numpy())

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """``label`` and ``score``, or ``labels`` and their ``scores``."""
        chances = outputs[0]
        if self.single:
            best = int(chances.argmax())
            return {"label": self.labels[best], "score": float(chances[best])}
        pairs = zip(self.labels, chances, strict=True)
        named = {label: float(chance) for label, chance in pairs if chance > self.threshold}
        return {"label": list(named), "score": list(named.values())}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "task": self.name,
            "problem": self.problem,
            "max_length": self.max_length,
            "threshold": self.threshold,
        }


def _f1(hit: float, extra: float, missed: float) -> float:
    whole = 2 * hit + extra + missed
    return float(2 * hit / whole) if whole else 0.0


def _logit(chance: float) -> float:
    return math.log(chance / (1 - chance))


def given_weights(weights: Any, labels: Sequence[str]) -> np.ndarray | None:
    """Weights that the caller gave, in the order of the labels; None where there are none yet."""
    if weights is None or weights == "balanced":
        return None
    if isinstance(weights, Mapping):
        if unknown := [key for key in weights if str(key) not in labels]:
            raise ConfigError(
                f"class_weights names {unknown[0]!r}, which is no label: {', '.join(labels[:20])}."
            )
        weights = [weights.get(label, 1.0) for label in labels]
    try:
        array = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != (len(labels),) or not np.isfinite(array).all() or (array <= 0).any():
        raise ConfigError(
            f'class_weights must be "balanced", or {len(labels)} positive numbers, one for each label; found '
            f"{weights!r}."
        )
    return array
