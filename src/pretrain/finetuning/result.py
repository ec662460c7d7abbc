"""Result of ``pretrain.finetune``: the trained model, its metrics, its mistakes and its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.errors import DataError
from pretrain.finetuning.card import measured_parts, model_card
from pretrain.finetuning.measure import encoded, labelled, measure, reported_precision
from pretrain.metrics import confusion_matrix
from pretrain.printing import printable

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.data.task_rows import TaskRows
    from pretrain.finetuning.compare import Comparison
    from pretrain.finetuning.rows import Data
    from pretrain.finetuning.settings import TuneConfig
    from pretrain.finetuning.views import Confusion, Errors
    from pretrain.models.base import Model
    from pretrain.objectives.tasks import Task
    from pretrain.training.state import Run

__all__ = ["Finetuned"]


class Finetuned:
    """A fine-tuned model with its run, rows and metrics.

    Attributes:
        run: directory, checkpoints and history; None for a trial that kept nothing.
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
    """

    def __init__(
        self,
        opened: Callable[[], Task],
        run: Any,
        settings: TuneConfig,
        data: Data,
        notes: list[str],
        base: Callable[..., Task] | None = None,
    ) -> None:
        self._base = base
        self._opened = opened
        self._task: Task | None = None
        self.settings, self.data, self.notes = settings, data, notes
        self.counts, self.sources, self.fingerprint = data.counts, data.names, data.fingerprint
        self.run: Run = run
        self.metrics: dict[str, float] = dict(run.metrics) if run is not None else {}
        self.test_metrics: dict[str, float] | None = None
        self.trivial: dict[str, float] = {}
        self.trivial_test: dict[str, float] = {}
        self.comparison: Comparison | None = None

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
        if self._task is None or self.run is None:
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
        from pretrain.finetuning.remarks import remarks

        return remarks(self)

    @property
    def path(self) -> Path:
        """Directory of the run."""
        return self.run.path

    def measure(self, rows: TaskRows) -> dict[str, float]:
        """Evaluate the task on encoded rows."""
        train = self.settings.train
        precision = reported_precision(train, device=self.settings.parallel.device)
        return measure(self.task, rows, precision, coupled_rows=train.batch_rows)

    def evaluate(self, data: Any) -> dict[str, float]:
        """Evaluate the task on further labelled rows: a file, a list, a frame or a data set."""
        settings, base = self.settings, self._base
        if base is None:
            raise DataError(
                "This is the result of a trial, which is evaluated only once, on its own rows."
            )
        rows = encoded(
            self.task,
            labelled(data, self.task, {}, settings.data),
            lambda: base(seed=settings.train.seed),
        )
        return self.measure(rows)

    def predict(self, inputs: Any, **options: Any) -> Any:
        """Answer one input with a dict, or several with a list of dicts; see ``pretrain.inference.predict.predict``."""
        from pretrain.inference.predict import predict_with

        return predict_with(self.task, inputs, **options)

    @property
    def judged(self) -> Table:
        """The rows whose mistakes are shown: the test rows, else the held-out ones."""
        return self.data.test if self.data.test is not None else self.data.valid

    @cached_property
    def answers(self) -> list[tuple[Any, dict[str, Any]]]:
        """(truth, prediction) of every judged row; empty where the task has no single truth."""
        table = self.judged
        truth = self.task.truth(table) if len(table) else None
        if truth is None:
            return []
        return list(zip(truth, self.task.predict(table), strict=True))

    def confusion(self) -> Confusion:
        """Confusion matrix of the judged rows.

        Raises:
            DataError: the task has no single class per row, or nothing was held out.
        """
        from pretrain.finetuning.views import Confusion

        labels = self.labels or ()
        said = [(truth, found.get("label")) for truth, found in self.answers]
        pairs = [(a, b) for a, b in said if isinstance(a, str) and isinstance(b, str)]
        if not pairs or not labels:
            raise DataError(
                "A confusion matrix needs held-out rows with one class each, and there are none."
            )
        ids = {label: k for k, label in enumerate(labels)}
        truth, answers = ([ids[label] for label in column] for column in zip(*pairs, strict=True))
        return Confusion(labels, confusion_matrix(truth, answers, len(labels)))

    def errors(self, count: int = 10) -> Errors:
        """The worst mistakes on the judged rows: highest score first, for numbers largest error first.

        Raises:
            DataError: the task has no single correct answer per row.
        """
        from pretrain.finetuning.views import Errors

        if not self.answers:
            raise DataError(
                f"The task {self.task.name} has no single correct answer per row, so there are no mistakes to list."
            )
        wrong = []
        for i, (truth, found) in enumerate(self.answers):
            answer = found.get("label", found.get("score", found.get("answer")))
            if answer is None or answer == truth:
                continue
            if isinstance(truth, float):
                weight = abs(float(answer) - truth)
            else:
                score = np.asarray(found.get("score", 0.0), dtype=np.float64)
                weight = float(score.max()) if score.size else 0.0
            wrong.append((weight, i, truth, answer))
        wrong.sort(key=lambda item: (-item[0], item[1]))
        table, mistakes = self.judged, []
        for weight, i, truth, answer in wrong[:count]:
            row = table.row(i)
            inputs = [str(row[r.name]) for r in self.task.roles if r.name in row and not r.target]
            mistakes.append({
                "where": table.where(i), "text": " | ".join(inputs), "label": truth, "predicted": answer,
                "score": weight,
            })  # fmt: skip
        return Errors(mistakes)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the model as a Hugging Face directory (an adapter as a PEFT directory)."""
        model = self.model
        self.describe()  # with all metrics that are known by now
        return model.save(Path(directory))

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Write the model card and an HTML page with curves, mistakes and how to repeat it; returns the page."""
        from pretrain.finetuning.page import write_report

        return write_report(self, out)

    def __repr__(self) -> str:
        lines = [f"{self.task.name} with {self.model.backbone.model_type}, {_where(self.run)}"]
        for name, figures in measured_parts(self):
            shown = [f"{k} {v:.4f}" for k, v in figures.items() if k != "targets"]
            lines.append(f"  {name}: {', '.join(shown)}")
        lines += [f"  note: {line}" for line in self.remarks]
        return printable("\n".join(lines), lines=True)

    def _repr_html_(self) -> str:
        from pretrain.report.history import loss_svg, sort_records
        from pretrain.utils.html import bullets, notebook_view, table

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
            loss_svg(sort_records(self.run.history)) if self.run is not None else "",
        )


def _where(run: Any) -> str:
    if run is None:
        return "kept nowhere"
    best = run.best or run.checkpoint
    return f"step {run.step:,}, best {best}" if run.best else f"step {run.step:,}, {best}"
