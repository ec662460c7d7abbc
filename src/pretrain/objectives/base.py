"""Interface between objectives and the trainer.

An objective owns a model, collates examples into batches (including masking, corruption and pairing) and returns
sums instead of means: the trainer divides once, by the number of targets in the global batch.

Letters: B rows, T tokens, D hidden, V vocabulary, N targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.data.loader import Example, Examples
from pretrain.errors import ConfigError, DataError
from pretrain.nn.loss import IGNORE, chunked_cross_entropy
from pretrain.nn.tensor_parallel import Group, gather_from_tensor_parallel
from pretrain.utils.run_log import NATS
from pretrain.utils.strict_json import as_json

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "Batch", "Example", "ExampleList", "Loss", "Objective", "Rngs", "TokenObjective", "at_targets",
    "checked_smoothing", "drop_plain_documents", "stack", "target_places",
]  # fmt: skip

Batch = dict[str, Tensor]
ExampleList = Sequence[Example]  # the rows of a batch
Rngs = Sequence[
    "np.random.Generator"
]  # one generator per row; in quotes, because numpy loads it late


@dataclass
class Loss:
    """Sums over the targets of one batch.

    Attributes:
        total: summed loss, in nats for likelihoods; scalar with a gradient.
        count: number of targets; scalar.
        metrics: further quantities that an evaluation accumulates. Tensors of a fixed shape are summed over the
            batches (the number of correct answers, a confusion matrix); lists are concatenated (a score and an
            answer per row, for a correlation).
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor | list[Any]] = field(default_factory=dict)


def stack(examples: ExampleList, keys: Sequence[str]) -> Batch:
    """Stack the named arrays of equally shaped examples into tensors with a leading row dimension.

    Integers become int64, the index type of embeddings. The first key is required.

    Raises:
        DataError: rows of different lengths, or a key that some rows lack.
    """
    batch = {}
    for key in keys:
        if key != keys[0] and not any(key in example for example in examples):
            continue
        try:
            values = np.stack([example[key] for example in examples])
        except (KeyError, ValueError) as error:
            shapes = [np.shape(example[key]) if key in example else "none" for example in examples]
            raise DataError(
                f"The rows of a batch need {key} of one shape, and have {shapes[:8]}. Their keys are "
                f"{', '.join(examples[0])}. Pad or pack the rows to one length."
            ) from error
        whole = np.issubdtype(values.dtype, np.integer)
        batch[key] = torch.from_numpy(values.astype(np.int64) if whole else values)
    return batch


def drop_plain_documents(batch: Batch) -> Batch:
    """Remove ``document_ids`` if every row is one document without padding, which needs no mask.

    The check runs here, on the CPU, because on an accelerator it would synchronise every step.
    """
    documents = batch.get("document_ids")
    if documents is not None and bool((documents == 1).all()):
        del batch["document_ids"]
    return batch


def target_places(labels: Tensor) -> Tensor:
    """Return the places of the targets in the flattened labels, (N,), for ``target_index`` of a batch.

    A batch has them from the CPU, because on an accelerator finding them would synchronise every step.
    """
    return (labels.reshape(-1) != IGNORE).nonzero().squeeze(1)


def at_targets(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (N, D) and labels (N,) of the targets, and their places in the flattened batch (N,)."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "target_index")}
    hidden = model.backbone(inputs)  # (B, T, D)
    labels = batch["labels"]
    index = batch["target_index"] if "target_index" in batch else target_places(labels)
    return hidden.reshape(-1, hidden.shape[-1])[index], labels.reshape(-1)[index], index


def checked_smoothing(label_smoothing: float) -> float:
    """Return the share of a target that is spread over all classes.

    Raises:
        ConfigError: it is out of range.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1).")
    return label_smoothing


class Objective(nn.Module):
    """A model with its loss: the module that is trained, sharded and compiled.

    A subclass implements ``collate`` and ``forward``. Other modules that it needs are child modules: those that are
    trained (a generator, a decoder) are saved beside the model, those that ``frozen`` names (a teacher) are not.

    Attributes:
        couples_examples: the loss compares the rows of a batch, so it is not additive over micro-batches.
        copies_model: it holds a copy of the model, of which tensor parallelism would not cut the same parts.
        head_kind: the head that a fresh model for this objective gets.
        figures: names of what an evaluation may report, beside the number of targets: what ``train.monitor`` can be;
            None if they are known only when it has run.
        loss_unit: unit of the loss of one target, for charts, such as ``NATS``; "" for none.
        frozen: names of child modules that are never trained: kept in evaluation mode and written to no file. A
            checkpoint records the path that they came from and a hash of their weights, and a resumed run refuses
            others.
        batch_group: process group over whose ranks each training batch is split, into equally many consecutive rows;
            None if the loss does not couple examples or this rank has the whole batch. Set for training.
        compared: whether ``whole_batch`` has been called.
        progress: share of the run before the global batch that ``collate`` is called for, the same on all ranks and in
            a resumed run; None outside a run, and in one that is limited by time, whose length nobody knows. Set for
            training; evaluation must not depend on it.
        train_rows: the training rows, from which ``collate`` may draw others for a row, by its generator; None outside
            a run. Set for training.
        fixed_statistics: normalisations use their running statistics in training too, and leave them as they are. Set
            for training.
        init_args: arguments by name, beside the model, that ``build_objective`` gave it, as JSON keeps them; None if
            they are unknown, or ``describe`` tells them.
    """

    couples_examples: ClassVar[bool] = False
    copies_model: ClassVar[bool] = False
    head_kind: ClassVar[str | None] = None
    figures: ClassVar[tuple[str, ...] | None] = None
    loss_unit: str = ""
    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.batch_group: Group | None = None
        self.compared = False
        self.progress: float | None = None
        self.train_rows: Examples | None = None
        self.fixed_statistics = False
        self.init_args: Mapping[str, Any] | None = None

    def train(self, mode: bool = True) -> Objective:
        """Set the training mode of all modules but those that are to stay in evaluation mode: the frozen ones, and
        normalisations whose statistics are fixed.
        """
        super().train(mode)
        for module in self.modules() if self.fixed_statistics else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False).eval()
        return self

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Collate examples into a batch. Also called in the loader's thread, so it must not modify the objective.

        Args:
            examples: one mapping of arrays per row.
            rngs: one generator per row, keyed by the row's position in the run, so that its random draws depend
                neither on its neighbours nor on the world size.
            evaluation: whether the batch is for evaluation, where the draws of a row are always the same.
        """
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        """Number of targets in the batch, as a scalar tensor."""
        return (batch["labels"] != IGNORE).sum()

    def units(self, batch: Batch) -> int:
        """Return what the batch costs, in ``unit_name``: by it limits, speed and FLOPs are counted."""
        return self.model.backbone.units(batch)

    @property
    def unit_name(self) -> str:
        """What ``units`` counts, in the plural, for messages."""
        return self.model.backbone.unit_name

    def forward(self, batch: Batch) -> Loss:
        raise NotImplementedError

    def after_step(self) -> None:
        """Change weights after an optimizer step, without gradients, such as to keep one within bounds.

        The trainer calls it after every step that is not skipped, before weights are averaged.
        """

    def whole_batch(self, rows: Tensor) -> tuple[Tensor, int]:
        """All-gather the rows of a training batch, for losses that couple examples.

        Each rank computes the loss of its own rows against the rows of all ranks, and gradients with respect to
        gathered rows flow back to the rank that owns them.

        Args:
            rows: (n, ...), the rows of this rank.

        Returns:
            (N, ...) in the order of the batch, and the index of this rank's first row. In evaluation each batch lies
            on one rank, so the rows are returned unchanged.
        """
        self.compared = True
        group = self.batch_group
        if group is None or not self.training:
            return rows, 0
        return gather_from_tensor_parallel(rows, group, 0, alike=False), len(rows) * group.rank

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Turn the sums over an evaluation into reported metrics.

        By default summed scalars are divided by ``count``; a subclass must reduce tensors and lists itself.

        Args:
            total: summed loss.
            count: number of targets.
            metrics: ``Loss.metrics`` accumulated over all batches: a float for a 0-d tensor, a float64 tensor on the
                CPU for one with dimensions, a list for a list.
            stats: statistics of the data, such as ``targets_per_byte``.
        """
        mean = total / count if count else math.nan
        sums = {key: value for key, value in metrics.items() if isinstance(value, float | int)}
        return {"loss": mean} | {key: value / count for key, value in sums.items() if count}

    def survey(self, rows: Examples) -> list[str]:
        """Check the training rows before the first step; return notes for the user, one line each."""
        return []

    def expected_first_loss(self) -> float | None:
        """Loss of an untrained model, for a sanity check of the first step; None if unknown."""
        return None

    def flops(self, units: int, targets: int, row_length: int) -> float:
        """Floating-point operations of one forward and backward pass.

        Those of the blocks per unit (``Backbone.flops_per_unit``), and 6 per weight of the head and *target*, such as
        6·D·V for a vocabulary. The count is for the whole model, not for the shard of this rank.
        """
        backbone = self.model.backbone
        body = self._numel(
            p for block in backbone.blocks() for p in block.parameters() if p.ndim >= 2
        )
        return (
            backbone.flops_per_unit(body, row_length) * units + 6.0 * self.head_weights() * targets
        )

    def head_weights(self) -> int:
        """Number of head weights that each target is multiplied with."""
        return 0 if self.model.head is None else self._numel(self.model.head.parameters())

    def _numel(self, parameters: Iterable[Tensor]) -> int:
        """Number of elements of model parameters, counted unsharded."""
        layout = self.model.layout
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        shapes = (p.shape if layout is None else layout.shapes[names[p]] for p in parameters)
        return sum(math.prod(shape) for shape in shapes)

    def preview(self, examples: ExampleList, prompt: str, seed: int) -> list[str]:
        """Return a few lines for the log that show what the model can do now; none by default."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return the name of the class and its arguments, for ``config.json``: evaluation builds it from them.

        A class without an own method needs none where a configuration builds it; see ``record``.
        """
        return {"name": type(self).__name__}

    def continue_from(self, record: Mapping[str, Any]) -> None:
        """Take over what no argument says from the ``record`` of a checkpoint with which training goes on."""

    def figures_changed(self, rows: Examples) -> bool:
        """Whether the version of the ``record`` of ``continue_from`` had other figures of held-out rows."""
        return False

    def same_argument(self, key: str, then: Any, now: Any, labels: Sequence[str]) -> bool:
        """Whether an argument that ``record`` gave for a checkpoint means what it gives now.

        Args:
            key: name of the argument.
            then: its value in the checkpoint.
            now: its value in this run.
            labels: the class names of the checkpoint.
        """
        return bool(then == now)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON keeps it: ``describe``, and ``init_args`` if there are any known."""
        known = {} if self.init_args is None else {"init_args": self.init_args}
        record: dict[str, Any] = as_json(self.describe() | known)
        return record


class TokenObjective(Objective):
    """Cross entropy at chosen positions of a token sequence, through the model's vocabulary head."""

    loss_unit: str = NATS

    def forward(self, batch: Batch) -> Loss:
        """Gather the target positions before the projection, so that logits exist only for targets."""
        hidden, targets, _ = at_targets(self.model, batch)
        return self.loss_at(hidden, targets)

    def loss_at(self, hidden: Tensor, targets: Tensor) -> Loss:
        """Return the loss of hidden states (N, D) against labels (N,)."""
        head: Any = self.model.head
        features = head.features(hidden)  # (N, D)
        total, correct = chunked_cross_entropy(
            features,
            head.weight(),
            targets,
            bias=head.bias(),
            softcap=head.softcap,
            vocab=head.vocab,
        )
        count = (targets != IGNORE).sum()
        return Loss(total, count, {"accuracy": correct})

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Add perplexity, which is the exponential of a loss in nats."""
        figures = super().summarize(total, count, metrics, stats)
        if self.loss_unit == NATS:
            figures["perplexity"] = math.exp(min(figures["loss"], 700.0))
        return figures

    def head_weights(self) -> int:
        """The vocabulary projection, counted even if it is tied to the embedding."""
        head: Any = self.model.head
        return self._numel([head.weight()])

    def expected_first_loss(self) -> float | None:
        """The log of the vocabulary size: an untrained model predicts a uniform distribution."""
        return math.log(self.model.backbone.vocab_size)
