"""The contract of a fine-tuning task: an objective that also knows its columns, labels, encoding and answers.

One task is one file beside this one. A task names the columns it reads (``roles``), finds out what must be known
before there is a model (``learn``: the labels), turns rows into examples of unequal length (``encode``), and turns
outputs into plain answers (``outputs``, ``decode``). Examples are packed when they are batched: several stand behind
each other in one row, told apart by ``document_ids``, so that no padding enters the model (Krell et al., 2021,
arXiv 2107.02027).

Letters: B rows of a batch, T tokens, N examples, C classes, D hidden.
"""

from __future__ import annotations

import heapq
import inspect
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from pretrain.data.labelled import Role
from pretrain.data.task_rows import TaskEncoder, TaskRows
from pretrain.errors import DataError, ModelError
from pretrain.nn.device import tokens_at_once
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import Batch, Example, Objective

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["Learned", "Task", "pack_examples", "sequence_labels"]

_WIDTH_STEP = 32
_PACKED_TOKENS = 1024  # wider rows gain nothing, and a dense mask over them costs more
_PREDICT_ROWS = 64


@dataclass
class Learned:
    """What the training rows say before there is a model.

    Attributes:
        labels: names of the classes, or None where the task has none.
        strata: class of each row for a stratified split, or None.
        options: arguments of the task that follow from the rows (``problem="multi_label"``).
        notes: lines worth printing.
    """

    labels: tuple[str, ...] | None = None
    strata: Sequence[Hashable] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _is_finite(value: Any, *, infinite: bool = False) -> bool:
    """Whether all floats in arrays, lists and mappings are numbers; infinite ones are allowed where scores mask."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            return True
        return not bool((np.isnan(value) if infinite else ~np.isfinite(value)).any())
    if isinstance(value, Mapping):
        return all(_is_finite(item, infinite=infinite) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(item, infinite=infinite) for item in value)
    if isinstance(value, float | np.floating):
        return not math.isnan(value) if infinite else math.isfinite(value)
    return True


def balanced(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Spread items over as few rows as ``capacity`` asks for, longest first onto the emptiest row (Graham 1969).

    Rows end up about equally full, so that little of the rectangle they are put into is padding.
    """
    count = max(1, -(-sum(lengths) // max(capacity, max(lengths, default=1))))
    heap = [(0, i) for i in range(count)]
    rows: list[list[int]] = [[] for _ in range(count)]
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, row = heapq.heappop(heap)
        rows[row].append(item)
        heapq.heappush(heap, (load + lengths[item], row))
    return [sorted(row) for row in rows if row]


def pack_examples(
    examples: Sequence[Example],
    *,
    token_keys: Mapping[str, int] | None = None,
    pad_id: int = 0,
    pack: bool = True,
) -> Batch:
    """Put examples of unequal length into one batch.

    Args:
        examples: each with ``input_ids`` (n,) and perhaps ``token_type_ids`` (n,).
        token_keys: further keys with one value per token, and what stands where there is none.
        pad_id: what fills the ends of rows; masked, so that any id will do.
        pack: several examples in a row; False gives each its own row.

    Returns:
        ``input_ids``, ``document_ids`` (0 is padding), ``position_ids`` and the token keys, all (B, T); and
        ``first_index``, ``last_index`` (N,), the places of each example's ends in the flattened batch, in the order
        of ``examples``.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    rows = balanced(lengths, _PACKED_TOKENS) if pack else [[i] for i in range(len(lengths))]
    width = max(sum(lengths[i] for i in row) for row in rows)
    # Kernels are prepared, and kept, for every new shape: a few widths cost less than a few places of padding.
    width = -(-width // _WIDTH_STEP) * _WIDTH_STEP if pack else width
    fills = {"input_ids": pad_id, "document_ids": 0, "position_ids": 0, **(token_keys or {})}
    if any("token_type_ids" in example for example in examples):
        fills["token_type_ids"] = 0
    arrays = {key: np.full((len(rows), width), fill, np.int64) for key, fill in fills.items()}
    first, last = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, i in enumerate(row, start=1):
            end = at + lengths[i]
            for key in fills:
                if key == "document_ids":
                    arrays[key][r, at:end] = number
                elif key == "position_ids":
                    arrays[key][r, at:end] = np.arange(lengths[i])
                elif key in examples[i]:
                    arrays[key][r, at:end] = examples[i][key]
            first[i], last[i] = r * width + at, r * width + end - 1
            at = end
    batch = {key: torch.from_numpy(value) for key, value in arrays.items()}
    return batch | {"first_index": torch.from_numpy(first), "last_index": torch.from_numpy(last)}


def sequence_labels(examples: Sequence[Example], dtype: torch.dtype) -> torch.Tensor:
    """The answers of examples that have one each: (N,) or (N, C)."""
    return torch.from_numpy(np.stack([example["labels"] for example in examples])).to(dtype)


class Task(Objective):
    """What a model is fine-tuned for.

    A subclass sets the class variables and writes ``learn``, ``encode``, ``collate``, ``forward``, ``summarize``,
    ``outputs`` and ``decode``.

    Class attributes:
        name: what users type.
        roles: the columns it reads, with the names by which they are recognised.
        metric: the figure that the best evaluation is chosen by; an instance may set another.
        trivial_name: what the baseline of ``trivial`` is called.
        head_kind: the head that the model gets; None keeps the one it has.
        row_options: options that only `learn` and `tidy` read, with their types.

    Args:
        model: with the head of the task.
        max_length: tokens of an example at most; the model's positions when None.
        pack: several examples in a row of a batch; the answers are the same without, only slower.

    Attributes:
        beyond: what becomes of rows that exceed ``max_length``: ``cut``.
        beyond_chosen: the user asked for that, so that it is no error.
        unanswered: reason -> inputs that got no answer for it in ``predict``.

    Raises:
        ModelError: the model has another head, or no tokenizer.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]
    metric: str = "loss"
    trivial_name: ClassVar[str] = "majority baseline"
    row_options: ClassVar[Mapping[str, Any]] = {"labels": list | dict}

    def __init__(self, model: Model, *, max_length: int | None = None, pack: bool = True) -> None:
        super().__init__(model)
        if self.head_kind is not None and model.head_kind != self.head_kind:
            raise ModelError(
                f"The task {self.name} needs a model with the head {self.head_kind!r}, and this one has "
                f"{model.head_kind!r}. Open it with pretrain.load(PATH, head={self.head_kind!r})."
            )
        if model.tokenizer is None:
            raise ModelError(
                f"The task {self.name} reads text, and the model has no tokenizer. Put tokenizer.json into its "
                "directory, or set model.tokenizer."
            )
        room = int(model.backbone.max_length)
        if max_length is not None and not 3 <= max_length <= room:
            raise DataError(
                f"max_length is {max_length}; this model has {room} positions and a text needs at least 3."
            )
        self.max_length, self.pack = max_length or room, pack
        self.beyond, self.beyond_chosen = "cut", False
        self.unanswered: Counter[str] = Counter()

    @property
    def shorten(self) -> str:
        """What to do about rows that are too long, besides a larger ``max_length``."""
        return "split the texts"

    @cached_property
    def encoder(self) -> TaskEncoder:
        """Encodes texts for this model."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        several = getattr(self.model.backbone.config, "type_vocab_size", 1) > 1
        segments = several and tokenizer.segments
        return TaskEncoder(tokenizer, self.max_length, segments=segments)

    @property
    def pad_id(self) -> int:
        """What fills the ends of rows."""
        pad = self.model.backbone.config.pad_id
        return 0 if pad is None else int(pad)

    @classmethod
    def recorded_options(cls, model: Model) -> set[str]:
        """Names of the arguments that a task around this model takes back from what ``describe`` recorded."""
        return set(inspect.signature(cls.__init__).parameters) - {"self", "model", "name"}

    # ------------------------------------------------------------------ what a task writes

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        """Read what must be known of the training rows before there is a model.

        Args:
            table: the training rows, columns named by role.
            options: arguments of the task that the caller gave, those of ``row_options`` among them; ``labels`` is
                the order of the classes, ``checkpoint_labels`` that of a checkpoint with the head of this task.

        Raises:
            DataError: the targets cannot be what this task trains on; names rows.
        """
        return Learned()

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """Rows with their targets in the one form in which the task trains, whatever form the source has.

        Args:
            table: training or held-out rows, columns named by role.
            learned: what `learn` found in the training rows.
            options: as `learn` got them.

        Raises:
            DataError: a target that training did not have; names the row.
        """
        return table

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        """Turn rows into examples.

        Args:
            table: columns named by role.
            targets: also read the targets; False for prediction.

        Raises:
            DataError: a row that cannot be used; names the row.
        """
        raise NotImplementedError

    def outputs(self, batch: Batch) -> list[Any]:
        """Run the model on a batch of ``collate`` and return what it says about each example, as small arrays."""
        raise NotImplementedError

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Turn the outputs for all examples of one row into its answer, in plain values."""
        raise NotImplementedError

    def truth(self, table: Table) -> list[Any] | None:
        """The right answers of all rows, in the form in which ``decode`` gives them; None where there is no such."""
        return None

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """What knowing nothing but the training rows' targets reaches on the held-out rows."""
        return {}

    def prepare_reference(self, rows: TaskRows) -> None:
        """Add to the examples what the model says of them before it is trained; called once, before step 0."""

    def show(self, example: Example) -> list[tuple[str, bool]]:
        """The tokens of an example as text, and whether each is trained on, for people to look at."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        ids = [int(i) for i in example["input_ids"]]
        labels = example.get("labels")
        marks = [False] * len(ids)
        if labels is not None and np.ndim(labels) == 1 and len(labels) == len(ids):
            marks = [bool(label != IGNORE) for label in labels]
        pieces = [tokenizer.decode([i], skip_special=False) for i in ids]
        if (
            tokenizer.kind == "wordpiece"
        ):  # its pieces say where a word goes on, not where one begins
            pieces = [p[2:] if p.startswith("##") else f" {p}" for p in pieces]
        return list(zip(pieces, marks, strict=True))

    # ------------------------------------------------------------------ shared

    def pack_batch(
        self,
        examples: Sequence[Example],
        token_keys: Mapping[str, int] | None = None,
        *,
        pooled: bool = False,
    ) -> Batch:
        """``pack_examples`` as this task wants it.

        Args:
            examples: of unequal length.
            token_keys: see ``pack_examples``.
            pooled: only the head reads the result; where it takes one token of each example, ``keep_index`` (N,) says
                which, and the last block works for no other.
        """
        batch = pack_examples(examples, token_keys=token_keys, pad_id=self.pad_id, pack=self.pack)
        pool = getattr(self.model.head, "pool", "")
        if pooled and pool in ("first", "last"):
            batch["keep_index"] = batch[f"{pool}_index"]
        return batch

    def predict(
        self, table: Table, batch_rows: int = _PREDICT_ROWS, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Answer every row of a table, in order; one chunk of rows is in memory at a time.

        Args:
            table: columns named by role.
            batch_rows: rows in one forward pass.
            **options: keyword arguments of the task's ``decode``.

        Returns:
            The answers; a row that gives no example (an empty text) has an empty one.

        Raises:
            TypeError: an option that ``decode`` does not have.
        """
        known = inspect.signature(self.decode).parameters
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"{unknown[0]!r}")
        return self._predictions(table, batch_rows, options)

    def _predictions(
        self, table: Table, batch_rows: int, options: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        device = self.model.device
        was_training = self.training
        self.eval()
        try:
            for start in range(0, len(table), batch_rows):
                part = table.take(range(start, min(start + batch_rows, len(table))))
                rows = self.encode(part, targets=False)
                with torch.inference_mode():
                    found = self._answers(rows, batch_rows, device)
                for row in range(len(part)):
                    if (of_row := found.get(row)) is None:
                        yield {}
                        continue
                    answer = self.decode(*of_row, **options)
                    if not (_is_finite(of_row[0], infinite=True) and _is_finite(answer)):
                        raise ModelError(
                            f"{part.where(row)}: the answer is not a number (NaN or infinite). The weights of the "
                            "model hold NaN, or its values overflow: check the run that made it, or take an earlier "
                            "checkpoint."
                        )
                    yield answer
                self.count_unanswered(rows)
        finally:
            self.train(was_training)

    def count_unanswered(self, rows: TaskRows) -> None:
        """Add to ``unanswered`` why rows of an input gave no example."""
        answered = set(rows.owners)
        for reason, places in rows.dropped.items():
            self.unanswered[reason] += len(set(places) - answered)

    def _answers(
        self, rows: TaskRows, batch_rows: int, device: torch.device
    ) -> dict[int, tuple[list[Any], list[Any]]]:
        found: dict[int, tuple[list[Any], list[Any]]] = {}
        said: list[Any] = [None] * len(rows)
        for chosen in rows.batches(batch_rows, tokens_at_once(device)):
            rngs = [np.random.default_rng(0)] * len(chosen)
            batch = self.collate([rows[i] for i in chosen], rngs, evaluation=True)
            batch = {key: value.to(device) for key, value in batch.items()}
            for i, output in zip(chosen, self.outputs(batch), strict=True):
                said[i] = output
        for i, owner in enumerate(rows.owners):
            outputs, infos = found.setdefault(owner, ([], []))
            outputs.append(said[i])
            infos.append(rows.info[i])
        return found
