"""Continued pre-training on the texts of a table (domain-adaptive pre-training, arXiv 2004.10964).

The loss is that of pre-training: next-token prediction or masked language modelling, depending on the model's head.
Texts are framed like documents in pre-training and packed into rows; a long text is split into pieces, and no token is
dropped.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from pretrain.data.labelled import Role
from pretrain.data.packing import pack
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ModelError
from pretrain.objectives.base import Batch, ExampleList, Loss, Objective, Rngs
from pretrain.objectives.likelihood import target_log_probs
from pretrain.objectives.masked_lm import MaskedLM
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.tasks import Task, pack_examples, read_texts
from pretrain.utils.run_log import NATS

if TYPE_CHECKING:
    from pretrain.data.loader import Examples
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["LanguageModelling"]


class LanguageModelling(Task):
    """Model new text with the pre-training objective.

    Args:
        model: a model with a language-model head, causal or masked.
        max_length, pack: see ``Task``. With ``pack=False`` every text, or piece of one, has a row of its own.
        options: arguments of the pre-training objective (``rate``, ``whole_word``, ... of ``MaskedLM``).

    Raises:
        ModelError: the model has no language-model head.
    """

    name: ClassVar[str] = "language-modelling"
    roles: ClassVar[tuple[Role, ...]] = (
        Role(
            "text", ("text", "content", "document", "sentence", "body", "article"), help="the text"
        ),
    )
    loss_unit: str = NATS
    metric: str = "loss"
    head_kind: ClassVar[str | None] = None
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "perplexity", "bits_per_byte")

    def __init__(
        self, model: Model, *, max_length: int | None = None, pack: bool = True, **options: Any
    ) -> None:
        super().__init__(model, max_length=max_length, pack=pack)
        if model.head_kind not in ("causal-lm", "masked-lm"):
            raise ModelError(
                f"Language modelling needs a model with a language-model head, and this one has {model.head_kind!r}. "
                'Open it with pretrain.load(PATH, head="causal-lm"), or "masked-lm" for an encoder.'
            )
        self._options = options
        _ = self.inner  # refuses options that the pre-training objective does not have

    @classmethod
    def recorded_options(cls, model: Model) -> set[str]:
        """Include the arguments of the pre-training objective."""
        inner = set(inspect.signature(_objective_of(model).__init__).parameters) - {"self", "model"}
        return (super().recorded_options(model) - {"options"}) | inner

    @cached_property
    def _inner(self) -> Objective:
        # A cached property is no submodule: every parameter has one owner and one name.
        kind = _objective_of(self.model)
        try:
            return kind(self.model, **self._options)
        except TypeError as error:
            raise ModelError(f"{kind.__name__} takes no such option: {error}.") from error

    @property
    def inner(self) -> Objective:
        """The pre-training objective, around the same model."""
        if self._inner.model is not self.model:  # the model has been wrapped since
            self._inner.model = self.model
        self._inner.progress = self.progress
        return self._inner

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        """Frame the texts as documents and pack them into rows of one length.

        For prediction (``targets=False``) the pieces of each text are examples of their own, so that each text gets
        its own loss.
        """
        rows = TaskRows()
        cure = "; the task chat writes them" if self.model.head_kind == "causal-lm" else ""
        kept = read_texts(table, ("text",), rows, self.tokenizer, cure)
        # Special tokens that are typed into a text are encoded as plain text, as in data preparation.
        texts = [table.columns["text"][i] for i in kept]
        encoded = self.tokenizer.encode_batch(texts, special=False)
        documents = [self.tokenizer.frame_document(ids) for ids in encoded]
        if targets and self.pack and documents:
            self._pack(rows, kept, documents)
            return rows
        for owner, ids in zip(kept, documents, strict=True):
            for start in range(0, len(ids), self.max_length):
                piece = np.asarray(ids[start : start + self.max_length], dtype=np.int64)
                rows.add(owner, {"input_ids": piece})
        return rows

    def _pack(self, rows: TaskRows, kept: Sequence[int], documents: Sequence[list[int]]) -> None:
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])]).astype(np.int64)
        stream = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in documents])
        width = min(self.max_length, len(stream))
        plan = pack(offsets, width)
        owners = np.searchsorted(offsets, plan.segments[:, 0], side="right") - 1
        for r in range(len(plan.rows) - 1):
            mine = range(int(plan.rows[r]), int(plan.rows[r + 1]))
            pieces = [stream[first : first + length] for first, length in plan.segments[mine]]
            lengths = [len(piece) for piece in pieces]
            behind = (0, width - sum(lengths))  # padding
            ids, places = np.concatenate(pieces), np.concatenate([np.arange(n) for n in lengths])
            arrays = {
                "input_ids": np.pad(ids, behind, constant_values=self.pad_id),
                "document_ids": np.pad(np.repeat(np.arange(1, len(mine) + 1), lengths), behind),
                "position_ids": np.pad(places, behind),
            }
            # A packed row belongs to the table row that it begins with; its info lists all of its table rows.
            texts = [int(kept[int(owners[s])]) for s in mine]
            rows.add(texts[0], arrays, texts)

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Collate packed rows with the pre-training objective; single pieces are put into rows first."""
        if "document_ids" in examples[0]:
            return self.inner.collate(examples, rngs, evaluation=evaluation)
        # A piece that is alone in its row gets the same masks whatever the rest of the batch.
        pieces = [{key: value for key, value in e.items() if key == "input_ids"} for e in examples]
        batch = pack_examples(pieces, pad_id=self.pad_id, pack=False)
        keys = ("input_ids", "document_ids", "position_ids")
        singles = [{key: batch[key][r].numpy() for key in keys} for r in range(len(examples))]
        made = self.inner.collate(singles, rngs, evaluation=evaluation)
        ends = {key: batch[key] for key in ("first_index", "last_index")}
        return made | ends if evaluation else made

    def count(self, batch: Batch) -> Tensor:
        return self.inner.count(batch)

    def forward(self, batch: Batch) -> Loss:
        loss: Loss = self.inner(batch)
        return loss

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        return self.inner.summarize(total, count, metrics, stats)

    def survey(self, rows: Examples) -> list[str]:
        return self.inner.survey(rows)

    def expected_first_loss(self) -> float | None:
        """None, because the model is already trained."""
        return None

    def head_weights(self) -> int:
        return self.inner.head_weights()

    def preview(self, examples: ExampleList, prompt: str, seed: int) -> list[str]:
        return self.inner.preview(examples, prompt, seed)

    def outputs(self, batch: Batch) -> list[Any]:
        """Summed loss and number of targets of each piece, in nats."""
        bare = {k: v for k, v in batch.items() if k not in ("first_index", "last_index")}
        log_probs = target_log_probs(self.model, bare).double()
        row = batch["target_index"] // batch["labels"].shape[1]
        count = len(batch["first_index"])
        sums = log_probs.new_zeros(count).index_add_(0, row, -log_probs)
        numbers = log_probs.new_zeros(count).index_add_(0, row, log_probs.new_ones(len(row)))
        return list(zip(sums.tolist(), numbers.tolist(), strict=True))

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``loss`` in nats per target, ``perplexity``, and ``tokens``, the number of targets.

        For a masked language model the loss is that at the fixed masks of evaluation.
        """
        total, count = (float(sum(values)) for values in zip(*outputs, strict=True))
        loss = total / count if count else math.nan
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(count)}

    def describe(self) -> dict[str, Any]:
        return self.inner.describe() | {"task": self.name, "max_length": self.max_length}


def _objective_of(model: Model) -> type[Objective]:
    """The objective that the model's head was pre-trained with."""
    return NextToken if model.head_kind == "causal-lm" else MaskedLM
