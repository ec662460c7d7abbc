"""Distillation (arXiv 1503.02531): a next-token model that follows the distribution of a frozen teacher."""

from __future__ import annotations

import pretrain
from pretrain.errors import DataError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import Loss
from pretrain.objectives.next_token import NextToken


class Distillation(NextToken):
    """Cross entropy with the teacher's distribution at a temperature.

    Args:
        model: the student.
        teacher: a run or checkpoint with the same tokenizer.
        temperature: of both distributions.
    """

    frozen = ("teacher",)
    loss_unit = ""  # at a temperature the loss is no likelihood of the text

    def __init__(self, model, teacher: str, temperature: float = 2.0):
        super().__init__(model)
        self.teacher = pretrain.load(teacher, quiet=True)
        self.path, self.temperature = teacher, temperature
        if self.teacher.tokenizer.fingerprint != model.tokenizer.fingerprint:
            raise DataError(f"The teacher {teacher} has another tokenizer than the student.")

    def forward(self, batch):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "target_index")}
        student, teacher = (
            (m(inputs) / self.temperature).log_softmax(-1) for m in (self.model, self.teacher)
        )
        use = batch["labels"] != IGNORE
        loss = -(teacher.exp() * student).sum(-1)[use]
        return Loss(loss.sum(), use.sum())

    def describe(self):
        return {"name": "Distillation", "teacher": self.path, "temperature": self.temperature}
