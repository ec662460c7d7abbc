"""Regression: one number for a text or a pair of texts (as STS-B in Devlin et al., 2019, §4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pretrain import metrics as figures_of
from pretrain.config.spelling import option
from pretrain.data.labelled import Role
from pretrain.data.labels import finite_numbers, in_digits
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.models.heads import SequenceHead
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.classification import PAIR, TEXT, encode_texts
from pretrain.objectives.tasks import Learned, Task, count_examples, sequence_labels

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["Regression"]

_COARSE = 0.01  # steps of single precision, in standard deviations of the targets, that are told


class Regression(Task):
    """Predict a number for a text.

    Args:
        model: a model with a sequence-classification head of one output.
        center: mean of the training targets; the initial bias of a fresh head.
        scale: their standard deviation. The loss is the squared error divided by its square, so that it starts near 1
            and one learning rate suits scores from 0 to 1 and prices in thousands. The model's output is in the
            units of the targets.
        standard: the model's output is (target - center) / scale, computed in double precision, because single
            precision does not tell the targets apart; answers and figures are in the units of the targets all the same.
        max_length, pack: see ``Task``.

    Raises:
        ConfigError: the head has more than one output, or the scale is not positive.
    """

    name: ClassVar[str] = "regression"
    roles: ClassVar[tuple[Role, ...]] = (
        TEXT,
        PAIR,
        Role(
            "label", ("label", "score", "target", "relatedness_score", "similarity", "rating", "value"),
            help="the number to predict", target=True,
        ),
    )  # fmt: skip
    metric: str = "pearson"
    baseline: ClassVar[str | None] = "TF-IDF"
    recorded: ClassVar[tuple[str, ...]] = ("center", "scale")
    answer_key: ClassVar[str] = "score"
    head_kind: ClassVar[str | None] = "sequence-classification"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "pearson", "spearman", "mse")

    def __init__(
        self,
        model: Model,
        *,
        center: float = 0.0,
        scale: float = 1.0,
        standard: bool = False,
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, max_length=max_length, pack=pack)
        outputs = len(model.labels or ())
        if outputs != 1:
            raise ConfigError(
                f"Regression needs a head with one output, and this model's has {outputs}. Open it with "
                'pretrain.load(PATH, head="sequence-classification") and one label.'
            )
        if not (math.isfinite(center) and math.isfinite(scale) and scale > 0):
            raise ConfigError(
                f"center is {center} and scale is {scale}; both must be finite, and scale above 0."
            )
        head = model.head
        new = "head.classifier.weight" in model.fresh and getattr(head, "unit", 1.0) == 1.0
        before = model.provenance.get("objective")
        if not new and isinstance(before, Mapping) and before.get("name") == type(self).__name__:
            # A head that has been trained goes on answering in the unit in which it was.
            standard = bool(before.get("standard"))
            if standard:
                center, scale = before["center"], before["scale"]
        self.center, self.scale, self.standard = center, scale, standard
        # An answer is origin + unit * output, so that the outputs have a mean and a standard deviation.
        self.origin, self.unit = (center, scale) if standard else (0.0, 1.0)
        middle, spread = (center - self.origin) / self.unit, scale / self.unit
        model.extra_config["problem_type"] = "regression"
        if isinstance(head, SequenceHead):
            head.set_unit(spread, rescale=not new)
        bias = dict(model.named_parameters()).get("head.classifier.bias")
        if bias is not None and new and "head.classifier.bias" in model.fresh:
            with torch.no_grad():
                bias.fill_(middle / getattr(head, "unit", 1.0))

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        values = numbers(table)
        extent = float(np.ptp(values))
        if not extent > 0:
            raise DataError(
                f"All {len(values)} values of the label column are {values[0]:g}, so there is nothing to learn. "
                "Check that the right column is named."
            )
        # The squares of tiny numbers are 0.
        spread = float(values.std()) or float((values / extent).std()) * extent
        middle = float(values.mean())
        learned = Learned(("LABEL_0",), options={"center": middle, "scale": spread})
        single = np.float32(np.abs(values).max())
        step = max(float(np.spacing(single)), float(np.finfo(np.float32).tiny))
        begun = options.get("begun_objective")  # an earlier version began without this option
        asked = cls.takes("standard") and (begun is None or bool(begun.get("standard")))
        if step > _COARSE * spread:
            where = (
                f"the targets lie near {middle:.4g} and differ by {spread:.3g} (standard deviation)"
            )
            then = (
                f"but answers there are in single precision, in steps of {step:.3g}: subtract {middle:.10g} from the "
                "targets"
            )
            if asked:
                learned.options["standard"] = True
                then = (
                    f"which single precision tells apart in steps of {step:.3g} only, so the model learns "
                    f"(target - {middle:.10g}) / {spread:.4g}; answers are in the unit of the targets, but other "
                    "programs that open the model get that"
                )
            learned.notes.append(f"{where}, {then}")
        return learned

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """Convert numbers with decimal commas or marks between thousands, as in some text files."""
        tidied, given = numbers(table).tolist(), table.columns["label"]
        texts = [value for value in given if isinstance(value, str)]
        if not any("," in text or in_digits(text) != text for text in texts):
            return table
        return table.with_columns({**table.columns, "label": tidied}, {})

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows, kept = encode_texts(self, table)
        if targets:
            values = numbers(table)
            for example, i in zip(rows.examples, kept, strict=True):
                example["labels"] = np.asarray(values[i], dtype=np.float64)
        return rows

    def truth(self, table: Table) -> list[Any]:
        return [float(value) for value in numbers(table)]

    def mistake(self, truth: Any, answer: Mapping[str, Any]) -> float | None:
        return abs(float(answer["score"]) - truth) or None

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        batch = self.pack_batch(examples, pooled=True)
        if "labels" in examples[0]:
            exact = (sequence_labels(examples, torch.float64) - self.origin) / self.unit
            batch["labels"] = exact.float()
            # Not every device has double precision; the figures add the rest on the CPU.
            batch["labels_rest"] = (exact - batch["labels"].double()).float()
        return batch

    def count(self, batch: Batch) -> Tensor:
        return count_examples(batch)

    def forward(self, batch: Batch) -> Loss:
        values, wanted = self.model(batch).float().squeeze(-1), batch["labels"]  # (N,)
        total = ((values - wanted) / (self.scale / self.unit)).square().sum()
        if self.training:  # copying the values to the CPU would synchronise every step
            return Loss(total, self.count(batch), {})
        said, near, rest = (
            t.detach().cpu().double() for t in (values, wanted, batch["labels_rest"])
        )
        pairs = torch.stack((said, near + rest), dim=-1).tolist()
        return Loss(total, self.count(batch), {"pairs": pairs})

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Pearson's and Spearman's correlation, and the mean squared error in the targets' units."""
        values, wanted = np.asarray(metrics["pairs"], dtype=np.float64).reshape(-1, 2).T
        return {
            "loss": total / count if count else math.nan,
            "pearson": figures_of.pearson(wanted, values),
            "spearman": figures_of.spearman(wanted, values),
            "mse": figures_of.mse(wanted, values) * self.unit**2,
        }

    def outputs(self, batch: Batch) -> list[Any]:
        return list(self.model(batch).float().squeeze(-1).cpu().numpy())

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``score``, in the units of the targets."""
        return {"score": self.origin + self.unit * float(outputs[0])}

    def describe(self) -> dict[str, Any]:
        # The default is left out, as in the descriptions of earlier runs.
        return super().describe() | ({"standard": True} if self.standard else {})


def numbers(table: Table) -> np.ndarray:
    """The column of labels as finite numbers, (rows,).

    Raises:
        DataError: a target is not a finite number; the message names the first such rows.
    """
    named = option("task", "classification")
    cure = f"Remove, correct or rescale these rows; for named classes use {named}."
    values = finite_numbers(table.columns["label"], table.where, what="targets", cure=cure)
    return np.asarray(values, dtype=np.float64)
