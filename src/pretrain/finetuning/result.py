"""Result of ``pretrain.finetune``: the trained model, its metrics, its mistakes and its files; all text is escaped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pretrain import inference
from pretrain.checkpoint.draft import finite_json
from pretrain.checkpoint.result import write_result
from pretrain.config.spelling import PROBE, using
from pretrain.errors import DataError
from pretrain.finetuning.card import measured_parts, model_card
from pretrain.finetuning.measure import encoded, labelled, measure_as_in_run
from pretrain.finetuning.page import write_report
from pretrain.finetuning.remarks import classical_baseline, remarks
from pretrain.metrics import confusion_matrix, per_class
from pretrain.printing import aligned, printable
from pretrain.report.history import loss_svg, plot_history, sort_records
from pretrain.utils.curves import Plot, matrix_svg
from pretrain.utils.html import Html, bullets, figure, notebook_view, show, table
from pretrain.utils.strict_json import to_json

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.data.task_rows import TaskRows
    from pretrain.finetuning.compare import Comparison
    from pretrain.finetuning.rows import Data
    from pretrain.finetuning.settings import TuneConfig
    from pretrain.models.base import Model
    from pretrain.objectives.tasks import Task
    from pretrain.training.state import Run

__all__ = ["Confusion", "Errors", "Finetuned"]

_MATRIX = 12  # labels up to which the whole matrix is shown
_PAIRS = 15
_WIDE = 18  # characters of a label in a terminal
_TEXT = 300  # characters of a text in a notebook


class Finetuned:
    """A fine-tuned model with its run, rows and metrics.

    Attributes:
        run: directory, checkpoints and history.
        settings: settings of the run.
        data: the rows by role.
        counts: number of rows of each part.
        sources: source of the rows of each part.
        fingerprint: SHA-256 over the content of all rows.
        notes: notes on rows that were truncated, dropped or found twice.
        metrics: metrics of the best evaluation, on the held-out rows.
        test_metrics: metrics on the test rows, or None.
        trivial: metrics of the task's trivial baseline, fitted to the training rows, on the held-out rows.
        trivial_test: the same on the test rows; empty without any.
        comparison: comparison with other arms, if it was requested.
        rates: settings of the learning rates that were chosen on the held-out rows; empty if the settings give them.
    """

    def __init__(
        self,
        opened: Callable[[], Task],
        run: Run,
        settings: TuneConfig,
        data: Data,
        notes: list[str],
        base: Callable[..., Task],
    ) -> None:
        self._opened, self._base = opened, base
        self._task: Task | None = None
        self.settings, self.data, self.notes = settings, data, notes
        self.counts, self.sources, self.fingerprint = data.counts, data.names, data.fingerprint
        self.run = run
        self.metrics: dict[str, float] = dict(run.metrics)
        self.test_metrics: dict[str, float] | None = None
        self.trivial: dict[str, float] = {}
        self.trivial_test: dict[str, float] = {}
        self.comparison: Comparison | None = None
        self.rates: dict[str, float] = {}

    @property
    def task(self) -> Task:
        """The objective, which also predicts.

        If it was sharded in training, it is read from disk on first access.
        """
        if self._task is None:
            self._task = self._opened()
            self.describe()
        return self._task

    def describe(self) -> None:
        """Attach model card and test metrics to the model, so that they are saved with it."""
        if self._task is None:
            return
        # Metrics may have changed since an earlier call, so cached remarks are discarded.
        vars(self).pop("remarks", None)
        model = self._task.model
        block = model.extra_config.get("pretrain")
        if self.test_metrics is not None and isinstance(block, dict):
            model.extra_config["pretrain"] = {**block, "test_metrics": self.test_metrics}
        model.card = model_card(self)

    @property
    def model(self) -> Model:
        """The model, with the weights of the best evaluation."""
        return self.task.model

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes."""
        return self.model.labels

    @property
    def monitor(self) -> str:
        """The metric by which the best evaluation was chosen."""
        return self.settings.train.monitor or self.task.metric

    @cached_property
    def remarks(self) -> list[str]:
        """Remarks on the run, such as that it ended too early, overfitted, learnt nothing, or is below a baseline."""
        return remarks(self)

    @cached_property
    def classical(self) -> float | None:
        """The metric of a classical baseline on the same rows, or None; it is fitted once, at the first remark."""
        return classical_baseline(self)

    @property
    def path(self) -> Path:
        """Directory of the run."""
        return self.run.path

    def measure(self, rows: TaskRows) -> dict[str, float]:
        """Evaluate the task on encoded rows."""
        return measure_as_in_run(self.task, rows, self.settings)

    @using(PROBE)
    def evaluate(self, data: Any) -> dict[str, float]:
        """Evaluate the task on further labelled rows: a file, a list, a frame or a data set."""
        table = labelled(data, self.task, {}, self.settings.data)
        rows = encoded(self.task, table, lambda: self._base(seed=self.settings.train.seed))
        return self.measure(rows)

    def predict(self, inputs: Any, **options: Any) -> Any:
        """Answer one input with a dict, or several with a list of dicts; see ``pretrain.inference.predict.predict``."""
        return inference.predict_with(self.task, inputs, **options)

    @property
    def judged(self) -> Table:
        """The rows whose mistakes are shown: the test rows, else the held-out ones."""
        return self.data.test if self.data.test is not None else self.data.valid

    @cached_property
    def answers(self) -> list[tuple[Any, dict[str, Any]]]:
        """(truth, prediction) of every judged row; empty where the task has no single truth."""
        judged = self.judged
        truth = self.task.truth(judged) if len(judged) else None
        if truth is None:
            return []
        return list(zip(truth, self.task.predict(judged), strict=True))

    def confusion(self) -> Confusion:
        """Confusion matrix of the judged rows.

        Raises:
            DataError: the task has no single class per row, or nothing was held out.
        """
        labels = self.labels or ()
        both = [(truth, answer.get("label")) for truth, answer in self.answers]
        pairs = [(a, b) for a, b in both if isinstance(a, str) and isinstance(b, str)]
        if not pairs or not labels:
            raise DataError(
                "A confusion matrix needs held-out rows with one class each, and there are none."
            )
        ids = {label: k for k, label in enumerate(labels)}
        truth, predicted = ([ids[label] for label in column] for column in zip(*pairs, strict=True))
        return Confusion(labels, confusion_matrix(truth, predicted, len(labels)))

    def errors(self, count: int = 10) -> Errors:
        """The worst mistakes on the judged rows: highest score first, for numbers largest error first.

        Raises:
            DataError: the task has no single correct answer per row.
        """
        if not self.answers:
            raise DataError(
                f"The task {self.task.name} has no single correct answer per row, so there are no mistakes to list."
            )
        wrong = []
        for i, (truth, found) in enumerate(self.answers):
            weight = self.task.mistake(truth, found) if found and truth is not None else None
            if weight is not None:
                wrong.append((weight, i, truth, found.get(self.task.answer_key, found)))
        wrong.sort(key=lambda item: (-item[0], item[1]))
        judged, mistakes, scored = self.judged, [], any(weight for weight, *_ in wrong)
        attended = self.task.attended(judged.take([i for _, i, _, _ in wrong[:count]]))
        for (weight, i, truth, answer), seen in zip(wrong[:count], attended, strict=True):
            row = judged.row(i)
            inputs = [row[r.name] for r in self.task.roles if r.name in row and not r.target]
            picture = next(map(_thumbnail, (x for x in inputs if hasattr(x, "thumbnail"))), None)
            beside = " | ".join(x for x in inputs if isinstance(x, str))
            mistakes.append({
                "where": judged.where(i), "text": " | ".join(map(str, inputs)), "label": truth, "predicted": answer,
                "score": weight if scored else None,
                **({} if picture is None else {"picture": picture}),
                **({} if seen is None else {"attention": seen}),
                **({"beside": beside} if picture is not None and beside else {}),
            })  # fmt: skip
        return Errors(mistakes)

    def pictures(self, count: int = 12) -> list[dict[str, Any]]:
        """Targets and answers of judged rows as pictures, from the worst to the best; see ``Task.pictures``."""
        return self.task.pictures(self.judged, count) if len(self.judged) else []

    def keep(self) -> None:
        """Write the result of the run again, with all that is known by now: the model card and the test metrics."""
        chosen = self.run.best or self.run.checkpoint
        if chosen is None:
            return
        self.describe()
        config = json.loads((chosen / "config.json").read_text(encoding="utf-8"))
        config["pretrain"] = {**config["pretrain"], **self.model.extra_config["pretrain"]}
        card = (self.model.card or "").encode("utf-8", "replace")
        texts = {"config.json": to_json(finite_json(config)), "README.md": card}
        self.run.result = write_result(self.run.path, chosen, texts)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the model as a Hugging Face directory (an adapter as a PEFT directory)."""
        model = self.model
        self.describe()  # with all metrics that are known by now
        return model.save(Path(directory))

    def plot(self, figure: str = "loss") -> Plot:
        """Draw the training and the held-out loss, or a held-out metric beside that of guessing, over the steps.

        Raises:
            DataError: there is no such metric.
        """
        guess = self.trivial.get(figure)
        references = {} if guess is None else {self.task.trivial_name: float(guess)}
        return plot_history(sort_records(self.run.history), figure, references=references)

    def frame(self) -> Any:
        """Return the history as a pandas frame, as that of a run: one row per step, held-out figures as ``valid_...``.

        Raises:
            DataError: pandas is not installed.
        """
        return self.run.frame()

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Write the model with its card to the Hugging Face Hub; see ``pretrain.checkpoint.upload.push_to_hub``."""
        model = self.model
        self.describe()
        return model.push_to_hub(name, **options)

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Write the model card and a page with curves, mistakes and how to repeat it, which a notebook shows."""
        return write_report(self, out)

    def __repr__(self) -> str:
        run = self.run
        best = f"best {run.best.name}, " if run.best else ""
        lines = [
            f"{self.task.name} with {self.model.backbone.model_type}, step {run.step:,}, {best}"
            f"{run.result or run.checkpoint}"
        ]
        for name, figures in measured_parts(self):
            shown = [f"{k} {v:.4f}" for k, v in figures.items() if k != "targets"]
            lines.append(f"  {name}: {', '.join(shown)}")
        lines += [f"  note: {line}" for line in self.remarks]
        return printable("\n".join(lines), lines=True)

    def _repr_html_(self) -> str:
        parts = measured_parts(self)
        names = list(dict.fromkeys(k for _, f in parts for k in f if k != "targets"))
        rows = [
            [part, *(f"{figures[name]:.4f}" if name in figures else "" for name in names)]
            for part, figures in parts
        ]
        return notebook_view(
            "result",
            f"<p>{escape(repr(self).splitlines()[0])}</p>",
            table(["", *names], rows),
            bullets(self.remarks),
            loss_svg(sort_records(self.run.history)),
        )


def _thumbnail(image: Any) -> str | None:
    """Return a small copy of an image; None if its file has been moved since."""
    try:
        return str(image.thumbnail())
    except DataError:
        return None


class Confusion:
    """Confusion matrix: how often each class was predicted for each class.

    Args:
        labels: the C classes.
        matrix: (C, C) counts; row: the right class, column: the predicted one.

    Raises:
        DataError: the matrix has another shape, or holds negative counts.
    """

    def __init__(self, labels: Sequence[str], matrix: Any) -> None:
        self.labels = tuple(map(str, labels))
        self.matrix: NDArray[np.int64] = np.asarray(matrix, dtype=np.int64)
        if self.matrix.shape != (len(self.labels),) * 2 or (self.matrix < 0).any():
            raise DataError(
                f"A confusion matrix of {len(self.labels)} labels must have as many rows and columns of counts; its "
                f"shape is {self.matrix.shape}{', with negative counts' if (self.matrix < 0).any() else ''}."
            )

    def pairs(self, count: int = _PAIRS) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: (right class, predicted class, how often), most frequent first."""
        wrong = self.matrix * (1 - np.eye(len(self.labels), dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        places = [divmod(int(i), len(self.labels)) for i in order]
        return [
            (self.labels[i], self.labels[k], int(wrong[i, k])) for i, k in places if wrong[i, k]
        ]

    def per_class(self) -> list[dict[str, Any]]:
        """``label, precision, recall, f1, support`` of every class; a class never predicted has precision 0."""
        columns = (self.labels, *(column.tolist() for column in per_class(self.matrix)))
        names = ("label", "precision", "recall", "f1", "support")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        return [row | {"support": int(row["support"])} for row in rows]

    @property
    def small(self) -> bool:
        """Whether the whole matrix is shown."""
        return len(self.labels) <= _MATRIX

    def __repr__(self) -> str:
        right, total = int(self.matrix.trace()), int(self.matrix.sum())
        top = f"Confusion of {len(self.labels)} classes, {right:,} of {total:,} right"
        if self.small:
            rows = [
                (label, *(f"{n:,}" for n in row))
                for label, row in zip(self.labels, self.matrix, strict=True)
            ]
            rows, left = [("right \\ predicted", *self.labels), *rows], 1
        else:
            rows = [(label, predicted, f"{n:,}") for label, predicted, n in self.pairs()]
            rows, left, top = [("right", "predicted", "times"), *rows], 2, f"{top}; most confused:"
        return "\n".join([top, *aligned([[_line(c, _WIDE) for c in row] for row in rows], left)])

    def plot(self) -> Plot:
        """Draw the whole matrix: right classes in rows, predicted ones in columns."""
        right, total = int(self.matrix.trace()), int(self.matrix.sum())
        title = f"{right:,} of {total:,} right"
        counts = self.matrix.tolist()
        return Plot(matrix_svg(self.labels, counts, title=title, across="predicted", down="right"))

    def html(self) -> str:
        """The matrix, or the most frequent mistakes if it is large, as HTML without a style of its own."""
        if not self.small:
            return table(["right", "predicted", "times"], self.pairs(), left=2)
        classes = range(len(self.labels))
        rows = [[self.labels[i], *(self._cell(i, k) for k in classes)] for i in classes]
        return table(["right \\ predicted", *self.labels], rows)

    def _repr_html_(self) -> str:
        return notebook_view("confusion", self.html())

    def _cell(self, i: int, k: int) -> Html:
        """A count on a background as strong as its share of the row: blue if correct, orange if wrong."""
        share = self.matrix[i, k] / max(1, self.matrix[i].sum())
        colour = "42,111,214" if i == k else "217,72,15"
        words = f"{self.labels[i]} taken for {self.labels[k]}: {share:.1%} of its rows"
        return Html(
            f'<span class="heat" style="background:rgba({colour},{share * 0.6:.2f})" title="{escape(words)}">'
            f"{int(self.matrix[i, k]):,}</span>"
        )


@dataclass(repr=False)
class Errors(Sequence[Mapping[str, Any]]):
    """Mistakes, the worst first.

    Args:
        rows: each ``where`` (place in the source), ``text``, ``label`` (the right answer), ``predicted`` and
            ``score`` (how sure the model was, or how far off; None of a task that tells neither); of an image also
            ``picture``, its thumbnail, ``attention``, the same dark where a classifier attends little, and ``beside``,
            the texts that belong to it, such as a question, if any.
    """

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return Errors(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __repr__(self) -> str:
        if not self.rows:
            return "no mistakes"
        return "\n".join(
            f"{_line(row.get('where'), 80)}: {_line(row.get('label'), 80)} taken for "
            f"{_line(row.get('predicted'), 80)}{_in_brackets(row.get('score'))}\n"
            f"    {_line(row.get('text'), 110)}"
            for row in self.rows
        )

    def html(self, text: int = _TEXT) -> str:
        """A table as HTML without a style of its own; texts are truncated to ``text`` characters."""
        columns: dict[str, list[Any]] = {
            "right": [_line(row.get("label"), 120) for row in self.rows],
            "predicted": [_line(row.get("predicted"), 120) for row in self.rows],
        }
        if any(row.get("score") is not None for row in self.rows):
            columns["score"] = [_score(row.get("score")) for row in self.rows]
        if images := any("picture" in row for row in self.rows):
            columns["image"] = [_picture(row) or _line(row.get("text"), text) for row in self.rows]
        if any("attention" in row for row in self.rows):
            columns["attention"] = [_picture(row, "attention") or "" for row in self.rows]
        key = "beside" if images else "text"
        if not images or any(row.get(key) for row in self.rows):
            columns["text"] = [_line(row.get(key), text) for row in self.rows]
        columns["where"] = [_line(row.get("where"), 200) for row in self.rows]
        rows = [list(cells) for cells in zip(*columns.values(), strict=True)]
        return table(list(columns), rows, left=len(columns))

    def _repr_html_(self) -> str:
        return notebook_view("errors", self.html() if self.rows else "<p>no mistakes</p>")


def _picture(row: Mapping[str, Any], key: str = "picture") -> Html | None:
    """The thumbnail of an image as HTML, 64 pixels high; None for a row without one."""
    if key not in row:
        return None
    name = escape(str(row.get("text")), quote=True)
    return Html(f'<img src="{row[key]}" height="64" alt="{name}">')


def _line(value: Any, limit: int) -> str:
    """A value on one line without terminal control characters, truncated to ``limit``."""
    text = printable(show(value)).strip() if value not in ([], ()) else "none"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _in_brackets(score: Any) -> str:
    return "" if score is None else f" ({_short(score)})"


def _score(value: Any) -> str:
    return figure(value) if isinstance(value, float) else _short(value)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, int | float) else _line(value, 40)
