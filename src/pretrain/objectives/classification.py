"""Classification of texts and text pairs, with one class each or any number of classes (Devlin et al., 2019, §4.1).

Letters: N examples, C classes.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import metrics as figures_of
from pretrain.config.spelling import either, option, option_name
from pretrain.data.labelled import Role
from pretrain.data.labels import (
    LABEL_FORMS,
    LabelMap,
    MultiLabelColumn,
    NameList,
    blanks_note,
    flattened,
    make_tag_map,
    read_several,
    unlabelled_note,
)
from pretrain.data.tables import shown
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.tasks import (
    ClassTask,
    Learned,
    Task,
    class_codes,
    count_examples,
    read_texts,
    sequence_labels,
)

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["PAIR", "TEXT", "Classification", "best_classes", "encode_texts"]

TEXT = Role(
    "text",
    (
        *("text", "sentence", "sentence1", "premise", "sentence_a", "text_a", "question1"),
        *("review", "content", "body", "document", "message", "query", "question"),
    ),
    help="the text to read",
)
PAIR = Role(
    "pair", ("pair", "sentence2", "hypothesis", "sentence_b", "text_b", "text_pair", "question2"), False,
    "a second text, read together with the first", constant=True,
    beside=(("sentence", "text", "question"), ("passage", "text", "question")),  # QNLI and BoolQ
)  # fmt: skip
_SINGLE, _MULTI = "single_label", "multi_label"


def encode_texts(task: Task, table: Table) -> tuple[TaskRows, list[int]]:
    """Encode ``text`` and, if present, ``pair``; return the rows and the indices of those that give an example.

    Raises:
        DataError: a value is not a string.
    """
    rows, columns = TaskRows(), ["text", "pair"] if "pair" in table.names else ["text"]
    kept = read_texts(table, columns, rows, task.tokenizer)
    texts = [[table.columns[name][i] for i in kept] for name in columns]
    encodings = task.encoder.texts(*texts) if kept else []
    for i, encoding in zip(kept, encodings, strict=True):
        if encoding.overflowing:
            rows.cut.append(i)
        rows.add(i, task.encoder.example(encoding))
    return rows, kept


class Classification(ClassTask):
    """Predict the class or classes of a text.

    Args:
        model: a model with a sequence-classification head and ``labels``.
        problem: ``"single_label"`` or ``"multi_label"``.
        class_weights, label_smoothing: see ``ClassTask``.
        threshold: probability above which a class is predicted, for multi-label problems.
        codes: class number of every spelling of a label in the column; by default the labels themselves.
        label_separator: separator between several labels in one text cell, "" for none; by default as detected.
        label_form: what zeros and ones in lists are: ``"vectors"`` with a place for each class, or class ``"numbers"``;
            not given, as found in the training rows.
        max_length, pack: see ``Task``.

    Row options: ``labels``, the class names in order.

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
                "label", "labels", "category", "class", "stars", "rating", "intent", "gold_label",
                "entailment_judgment", "is_duplicate", "target", "topic", "sentiment", "coarse_label",
            ),
            help="the class, or a list of classes", target=True, many=True,
        ),
    )  # fmt: skip
    metric: str = "accuracy"
    baseline: ClassVar[str | None] = "TF-IDF"
    recorded: ClassVar[tuple[str, ...]] = ("problem", "threshold")
    head_kind: ClassVar[str | None] = "sequence-classification"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "macro_f1", "micro_f1", "mcc")

    def __init__(
        self,
        model: Model,
        *,
        problem: str = _SINGLE,
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        threshold: float = 0.5,
        codes: Mapping[str, int] | None = None,
        label_separator: str | None = None,
        label_form: str | None = None,
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, class_weights, label_smoothing, max_length, pack)
        if problem not in (_SINGLE, _MULTI):
            raise ConfigError(f"problem is {problem!r}; it must be {_SINGLE!r} or {_MULTI!r}.")
        if problem == _MULTI and (label_smoothing or class_weights is not None):
            option = "label_smoothing" if label_smoothing else "class_weights"
            raise ConfigError(
                f"{option} is for texts with one class each, and here a text may have several. Leave it out."
            )
        if problem == _MULTI and not 0 < threshold < 1:
            raise ConfigError(f"threshold is {threshold}; it must lie between 0 and 1.")
        self.problem, self.threshold = problem, threshold
        if label_form not in (None, *LABEL_FORMS):
            raise ConfigError(
                f"label_form is {label_form!r}; it must be {' or '.join(map(repr, LABEL_FORMS))}."
            )
        self.label_separator, self.label_form = label_separator, label_form
        self._map = LabelMap(self.labels, class_codes(codes, self.labels))
        model.extra_config["problem_type"] = f"{problem}_classification"

    @property
    def single(self) -> bool:
        """Whether every text has exactly one class."""
        return self.problem == _SINGLE

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        values, names = table.columns["label"], table.label_names.get("label")
        given, checkpoint = options.get("labels"), options.get("checkpoint_labels")
        problem, separator = options.get("problem"), options.get("label_separator")
        begun = options.get("begun_labels")
        texts = [value.strip() for value in values if isinstance(value, str)]
        if begun is not None and len(texts) == len(values) and {*texts} <= {*begun}:
            separator = ""  # the run has begun with a class for each text, which an earlier version may have chosen
        if (
            separator is None
            and os.path.isdir(table.origin)
            and not re.search(r"[|;,<{[]", "".join(texts))
        ):
            separator = ""  # a file lies in one folder, so the blanks in the names of folders part no labels
        known_labels = checkpoint if given is None else list(given)
        if known_labels is None and names is not None:
            known_labels = begun
        form = read_several(
            values,
            table.where,
            names=names,
            labels=known_labels,
            separator=separator,
            always=problem == _MULTI,
            single=problem == _SINGLE,
            form=options.get("label_form"),
            strict=options.get("label_form") is not None,
        )
        known: dict[str, Any] = {"names": form.names or names, "checkpoint": checkpoint}
        notes = [*form.notes, *blanks_note(chain(*form.rows) if form.rows else values, "label")]
        if form.rows is None or problem == _SINGLE:
            lone = values if form.rows is None else _only(form.rows, table.where)
            found = LabelMap.learn(
                lone, given, where=table.where, order=table.orders.get("label"), **known
            )
            if begun is not None and tuple(begun) != found.labels:
                # An earlier version may have begun the run without the order that a column of pandas declares.
                found = LabelMap.learn(lone, given, where=table.where, **known)
            strata: Any = found.ids(lone, names=known["names"], where=table.where)
            if given is None:
                notes += unlabelled_note(lone, found.labels, "label")
            unused = [found.labels[k] for k in sorted({*range(len(found.labels))} - {*strata})]
            if unused and "label" in table.orders:
                notes.append(
                    f"label: classes without a row, as the column declares: {shown(unused)}"
                )
        else:
            found, several = make_tag_map(
                form.rows, given, where=table.where, column="label", **known
            )
            problem, sets = _MULTI, [sorted(set(row)) for row in several]
            strata = [tuple(found.labels[k] for k in row) for row in sets]
            if empty := sum(not row for row in sets):
                notes.append(f"label: {empty:,} of {len(sets):,} rows have none of the labels")
            if all(len(row) == 1 for row in sets):
                notes.append(
                    "label: every row has exactly one label; if there can be no more, "
                    f"{option('problem', _SINGLE)} trains a choice between them"
                )
        fixed: dict[str, Any] = {"problem": problem or _SINGLE, "codes": dict(found.codes)}
        if form.form is not None:
            fixed["label_form"] = form.form
        return Learned(found.labels, strata, fixed, notes)

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """Strip blanks around labels, and replace other forms of labels by names or lists of names."""
        if "label" not in table.names:
            return table
        labels = learned.labels or ()
        known = LabelMap(labels, learned.options["codes"])
        values, names = table.columns["label"], table.label_names.get("label")
        single = learned.options["problem"] == _SINGLE
        form = _several(
            table,
            known,
            single,
            options.get("label_separator"),
            learned.options.get("label_form"),
            strict=options.get("label_form") is not None,
        )
        rows = _class_numbers(table, known, form, single=single)
        called = known.spelled()
        if form.rows is None:
            tidied = [value.strip() if isinstance(value, str) else value for value in values]
        elif single:
            tidied, names = [called[row[0]] for row in rows], None
        else:
            tidied, names = [NameList(called[k] for k in row) for row in rows], None
        if single and tidied == values:
            return table
        kept = {} if names is None else {"label": names}
        return table.with_columns({**table.columns, "label": tidied}, kept)

    @classmethod
    def classes(cls, table: Table, learned: Learned) -> list[int] | None:
        if learned.options["problem"] != _SINGLE:
            return None
        known = LabelMap(learned.labels or (), learned.options["codes"])
        form = _several(table, known, True, "", None)  # the rows are tidied
        return [row[0] for row in _class_numbers(table, known, form, single=True)]

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows, kept = self.encode_inputs(table, targets=targets)
        if not targets:
            return rows
        answers = self.targets(table)
        for example, i in zip(rows.examples, kept, strict=True):
            example["labels"] = answers[i]
        if self.single:
            self.balance([int(answers[i]) for i in kept])
        return rows

    def encode_inputs(self, table: Table, *, targets: bool) -> tuple[TaskRows, list[int]]:
        """Encode the inputs; return the rows and the indices of those that give an example."""
        return encode_texts(self, table)

    def targets(self, table: Table) -> list[np.ndarray]:
        """The target of every row: a class number, or (C,) zeros and ones.

        Raises:
            DataError: a label is not among those of the model.
        """
        known = self.label_map
        form = _several(table, known, self.single, self.label_separator, self.label_form)
        rows = _class_numbers(table, known, form, single=self.single)
        if self.single:
            return [np.asarray(row[0], dtype=np.int64) for row in rows]
        targets = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        for target, row in zip(targets, rows, strict=True):
            target[row] = 1.0
        return list(targets)

    def truth(self, table: Table) -> list[Any]:
        if self.single:
            return [self.labels[int(i)] for i in self.targets(table)]
        return [
            [label for label, on in zip(self.labels, row, strict=True) if on]
            for row in self.targets(table)
        ]

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        batch = self.collate_inputs(examples, rngs, evaluation=evaluation)
        if "labels" in examples[0]:
            kind = torch.int64 if self.single else torch.float32
            batch["labels"] = sequence_labels(examples, kind)
            if self.single and not evaluation:
                batch |= self.weights_of(batch["labels"])
        return batch

    def collate_inputs(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool) -> Batch:
        """Collate the inputs of the model."""
        return self.pack_batch(examples, pooled=True)

    def count(self, batch: Batch) -> Tensor:
        """Number of examples, or the sum of their weights; one for all the classes of a multi-label example."""
        return super().count(batch) if self.single else count_examples(batch)

    def forward(self, batch: Batch) -> Loss:
        logits, labels = self.model(batch).float(), batch["labels"]  # (N, C)
        if not self.single:
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            least = math.log(self.threshold / (1 - self.threshold))  # the threshold as a logit
            chosen, wanted = logits > least, labels > 0.5
            counts = torch.stack(
                [(chosen & wanted).sum(0), (chosen & ~wanted).sum(0), (~chosen & wanted).sum(0)]
            )
            exact = (chosen == wanted).all(-1).sum()
            return Loss(
                total / logits.shape[-1], self.count(batch), {"counts": counts, "exact": exact}
            )
        total = self.cross_entropy(logits, batch.get("targets", labels), batch.get("weights"))
        classes = logits.shape[-1]
        pairs = labels * classes + logits.argmax(-1)  # (N,) indices into the flattened (C, C)
        matrix = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        return Loss(total, self.count(batch), {"confusion": matrix})

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Accuracy, macro-F1 and Matthews' correlation; for multi-label problems accuracy, micro- and macro-F1."""
        figures = {"loss": total / count if count else math.nan}
        if self.single:
            matrix = np.asarray(metrics["confusion"])
            return figures | {
                "accuracy": figures_of.accuracy(matrix),
                "macro_f1": figures_of.macro_f1(matrix),
                "mcc": figures_of.matthews(matrix),
            }
        hits, extra, missed = metrics["counts"]
        exact = float(metrics["exact"])
        return figures | self._multilabel_figures(hits, extra, missed, exact, count)

    @staticmethod
    def _multilabel_figures(
        hits: Any, extra: Any, missed: Any, exact: float, rows: float
    ) -> dict[str, float]:
        """Figures of several labels from sums over rows, see `metrics.multilabel_scores`."""
        scores = figures_of.multilabel_scores(hits, extra, missed, exact, rows)
        return {"accuracy": scores.pop("exact_match"), **scores}

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Majority baseline: figures of the most frequent class, or set of classes, of the training rows."""
        if not len(held_out):
            return {}
        if not self.single:
            sets = Counter(tuple(row.tolist()) for row in self.targets(train))
            answer, truth = np.array(sets.most_common(1)[0][0]), np.array(self.targets(held_out))
            return self._multilabel_figures(
                (truth * answer).sum(0),
                ((1 - truth) * answer).sum(0),
                (truth * (1 - answer)).sum(0),
                float((truth == answer).all(-1).sum()),
                len(truth),
            )
        most = int(np.bincount([int(i) for i in self.targets(train)]).argmax())
        hits = [int(i) == most for i in self.targets(held_out)]
        return {"accuracy": sum(hits) / len(hits)}

    def outputs(self, batch: Batch) -> list[Any]:
        logits = self.model(batch).float()
        chances = logits.softmax(-1) if self.single else logits.sigmoid()
        return list(chances.cpu().numpy())

    def decode(
        self, outputs: Sequence[Any], infos: Sequence[Any], *, top_k: int | str | None = "best"
    ) -> dict[str, Any]:
        """Return ``label`` and ``score``, as lists if a text may have several classes.

        Args:
            outputs: probabilities of the classes.
            infos: see ``Task.decode``.
            top_k: ``"best"`` for the most probable class, or the classes above the threshold; a number for lists of
                that many classes and their probabilities, most probable first; None for lists of all classes.

        Raises:
            ConfigError: ``top_k`` is none of these.
        """
        chances = outputs[0]
        if self.single or top_k != "best":
            return best_classes(self.labels, chances, top_k)
        chosen = [k for k, chance in enumerate(chances) if chance > self.threshold]
        return {
            "label": [self.labels[k] for k in chosen],
            "score": [float(chances[k]) for k in chosen],
        }

    def describe(self) -> dict[str, Any]:
        codes = dict(self._map.codes)
        plain = {label: k for k, label in enumerate(self.labels)}
        own: dict[str, Any] = {"codes": codes} if codes != plain else {}
        # The default is left out, as in the descriptions of earlier runs.
        if self.label_separator is not None:
            own["label_separator"] = self.label_separator
        if self.label_form is not None:
            own["label_form"] = self.label_form
        return super().describe() | own

    def same_argument(self, key: str, then: Any, now: Any, labels: Sequence[str]) -> bool:
        """Compare as `Task` does, but for ``label_form``: the rows that it was needed for are compared themselves."""
        return key == "label_form" or super().same_argument(key, then, now, labels)


def best_classes(
    labels: Sequence[str], scores: np.ndarray, top_k: int | str | None
) -> dict[str, Any]:
    """Return ``label`` and ``score`` of the best class; with a number lists of so many, with None of all, best first.

    Raises:
        ConfigError: ``top_k`` is none of these.
    """
    if top_k == "best":
        best = int(scores.argmax())
        return {"label": labels[best], "score": float(scores[best])}
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ConfigError(
            f"{option_name('top_k')} is {top_k!r}; it must be a whole number of at least 1, or {either('all', 'None')} "
            "for all classes."
        )
    order = np.argsort(-scores, kind="stable")[:top_k].tolist()
    return {"label": [labels[k] for k in order], "score": [float(scores[k]) for k in order]}


def _several(
    table: Table,
    known: LabelMap,
    single: bool,
    separator: str | None,
    label_form: str | None,
    *,
    strict: bool = False,
) -> MultiLabelColumn:
    """Read the label column of further rows, see `read_several`; ``rows`` is None if each has one value."""
    return read_several(
        table.columns["label"],
        table.where,
        names=table.label_names.get("label"),
        labels=known.labels,
        spellings=known.codes,
        separator=separator,
        always=not single,
        single=single,
        form=label_form,
        strict=strict,
    )


def _class_numbers(
    table: Table, known: LabelMap, form: MultiLabelColumn, *, single: bool
) -> list[list[int]]:
    """Class numbers of every row of the label column, whatever its form: one per row, or any number.

    Raises:
        DataError: an unknown label, or not exactly one label where one is required; the message names the row.
    """
    names = table.label_names.get("label")
    if form.rows is None:
        values = table.columns["label"]
        return [[k] for k in known.ids(values, names=names, where=table.where)]
    numbered = form.names or names
    if single:
        lone = _only(form.rows, table.where)
        return [[k] for k in known.ids(lone, names=numbered, where=table.where)]
    flat, where = flattened(form.rows, table.where, "label")
    ids = iter(known.ids(flat, names=numbered, where=where))
    return [list(dict.fromkeys(next(ids) for _ in row)) for row in form.rows]


def _only(rows: Sequence[Sequence[Any]], where: Callable[[int], str]) -> list[Any]:
    """The single label of each row.

    Raises:
        DataError: a row has none or several.
    """
    for i, row in enumerate(rows):
        if len(row) != 1:
            raise DataError(
                f"{where(i)} has {len(row)} labels, but every row must have one. "
                f"{option('problem', _MULTI)} allows any number."
            )
    return [row[0] for row in rows]
