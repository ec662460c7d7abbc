"""Base class of fine-tuning tasks: objectives that also define columns, labels, encoding and answers.

Each task is one file in this folder. A task names the columns it reads (``roles``), derives from the rows what must
be known before the model is built (``learn``: the labels), encodes rows as examples of unequal length (``encode``),
and turns outputs into plain answers (``outputs``, ``decode``). Examples are packed when they are batched: several are
concatenated in one row, separated by ``document_ids``, so that little padding enters the model (Krell et al., 2021,
arXiv 2107.02027).

Letters: B rows of a batch, T tokens, N examples, C classes, D hidden.
"""

from __future__ import annotations

import heapq
import inspect
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from pretrain.data.labelled import Role, is_missing
from pretrain.data.labels import LabelMap, spelled
from pretrain.data.tables import parts_of_file, read_table
from pretrain.data.task_rows import TaskEncoder, TaskRows, batches_by_length
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.nn.device import tokens_at_once
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import Batch, Example, ExampleList, Objective, checked_smoothing
from pretrain.utils.run_log import NATS

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.base import Model

__all__ = [
    "ClassTask",
    "Learned",
    "Task",
    "class_codes",
    "empty_texts",
    "pack_examples",
    "read_texts",
    "sequence_labels",
]

_WIDTH_STEP = 32
_PACKED_TOKENS = 1024  # wider rows gain nothing, and a dense mask over them costs more
_PREDICT_ROWS = 64


@dataclass
class Learned:
    """What is derived from the training rows before the model is built.

    Attributes:
        labels: names of the classes, or None where the task has none.
        strata: class of each row for a stratified split, or None.
        options: arguments of the task that follow from the rows (``problem="multi_label"``).
        notes: lines to print.
    """

    labels: tuple[str, ...] | None = None
    strata: Sequence[Hashable] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """A line that names the classes, if there are several or one that is found or not; else none."""
        names = self.labels if self.strata is not None and self.labels else ()
        kind = "label" if len(names) == 1 else "labels"
        return [f"{len(names)} {kind}: {', '.join(names[:12])}"] if names else []


def _is_finite(value: Any, *, infinite: bool = False) -> bool:
    """Whether all floats in arrays, lists and mappings are finite; ``infinite`` allows -inf and inf (masked scores)."""
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
    """Distribute items over as few rows as ``capacity`` asks for, longest first to the emptiest row (Graham 1969).

    Rows end up about equally long, so that the batch needs little padding.
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
    examples: ExampleList,
    *,
    token_keys: Mapping[str, int] | None = None,
    pad_id: int = 0,
    pack: bool = True,
) -> Batch:
    """Pack examples of unequal length into one batch.

    Args:
        examples: each with ``input_ids`` (n,) and optionally ``token_type_ids`` (n,).
        token_keys: further keys with one value per token, and their fill values.
        pad_id: id that pads the rows; it is masked, so any id will do.
        pack: whether to put several examples into a row; if False, each has its own row.

    Returns:
        ``input_ids``, ``document_ids`` (0 is padding), ``position_ids`` and the token keys, all (B, T); and
        ``first_index``, ``last_index`` (N,), the positions of each example's first and last token in the flattened
        batch, in the order of ``examples``.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    rows = balanced(lengths, _PACKED_TOKENS) if pack else [[i] for i in range(len(lengths))]
    width = max(sum(lengths[i] for i in row) for row in rows)
    # Kernels are prepared and cached for every new shape, which costs more than padding to a few widths.
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
            places: dict[str, Any] = {"document_ids": number, "position_ids": np.arange(lengths[i])}
            for key, value in {**examples[i], **places}.items():
                if key in fills:
                    arrays[key][r, at:end] = value
            first[i], last[i] = r * width + at, r * width + end - 1
            at = end
    batch = {key: torch.from_numpy(value) for key, value in arrays.items()}
    return batch | {"first_index": torch.from_numpy(first), "last_index": torch.from_numpy(last)}


def _last_of_text(examples: ExampleList, pad_id: int) -> torch.Tensor:
    """Return the place in each example, (N,), of its last token that is no padding; 0 if there is none."""
    real = [np.flatnonzero(np.asarray(example["input_ids"]) != pad_id) for example in examples]
    return torch.tensor([int(places[-1]) if len(places) else 0 for places in real])


def empty_texts(table: Table, columns: Sequence[str], i: int) -> list[str]:
    """Return those of ``columns`` in which row ``i`` has no text, or only white space.

    Raises:
        DataError: a value is no string; the message names the row.
    """
    for name in columns:
        value = table.columns[name][i]
        if value is not None and not isinstance(value, str):
            cure = "Name the column that holds it, or turn its values into strings."
            alone = len(columns) == 1 and "image" not in table.names
            if isinstance(value, list | tuple) and alone:
                cure = "This model reads one text for each row: join them, or train one on pairs."
            raise DataError(
                f"{table.where(i)}: the {name} is {type(value).__name__} {str(value)[:40]!r}, not a text. {cure}"
            )
    return [name for name in columns if not (table.columns[name][i] or "").strip()]


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds one of many names, grouped by how they begin: few of them are tried at each place."""
    ends: dict[str, list[str]] = {}
    for name in names:
        ends.setdefault(name[:3], []).append(re.escape(name[3:]))
    return re.compile("|".join(f"{re.escape(b)}(?:{'|'.join(e)})" for b, e in ends.items()))


def read_texts(
    table: Table,
    columns: Sequence[str],
    rows: TaskRows,
    tokenizer: Tokenizer | None = None,
    cure: str = "",
) -> list[int]:
    """Return the indices of the rows that have a text in all ``columns``; the others are recorded in ``rows``.

    Args:
        table: columns named by role.
        columns: roles of the texts.
        rows: receives the rows that are left out and the remarks.
        tokenizer: rows that have its special tokens typed into a text, which reads them as letters, are remarked on.
        cure: what to do about that.

    Raises:
        DataError: a value is no string; the message names the row.
    """
    kept = []
    for i in range(len(table)):
        if empty_texts(table, columns, i):
            rows.drop(i, "empty text")
        else:
            kept.append(i)
    if tokenizer is not None and tokenizer.typed_names:
        typed = _any_of(tokenizer.typed_names)
        matches = {i: typed.search(" ".join(table.columns[c][i] for c in columns)) for i in kept}
        marked = {i: match[0] for i, match in matches.items() if match is not None}
        example = next(iter(marked.values()), "")
        remark = f"special tokens ({example!r}) are typed into the text and read as letters{cure}"
        for i in marked:
            rows.remark(i, remark)
    return kept


def sequence_labels(examples: ExampleList, dtype: torch.dtype) -> torch.Tensor:
    """Stack the labels of examples that have one label, or one row of labels, each: (N,) or (N, C)."""
    return torch.from_numpy(np.stack([example["labels"] for example in examples])).to(dtype)


def count_examples(batch: Batch) -> torch.Tensor:
    """Return the number of examples of a batch of ``sequence_labels``, as a scalar tensor."""
    return torch.tensor(len(batch["labels"]), device=batch["labels"].device)


class Task(Objective):
    """Base class of fine-tuning tasks.

    A subclass sets the class variables and implements ``learn``, ``encode``, ``collate``, ``forward``,
    ``summarize``, ``outputs`` and ``decode``.

    Class attributes:
        name: name of the task in settings.
        roles: the columns it reads, with the names by which they are recognised.
        metric: metric by which the best evaluation is chosen; an instance may set another.
        trivial_name: name of the baseline that ``trivial`` computes.
        baseline: what a classical baseline reads of the rows: ``TF-IDF``, a key of ``VECTORS`` in
            ``pretrain.finetuning.baseline``, or what `baseline_outputs` reads; None if there is no such baseline.
        head_kind: the head that the model gets; None keeps the one it has.
        row_options: options that only `learn` and `tidy` read of the training rows, with their types; those by which
            further rows are read too are arguments, and recorded.
        drawn: a sentence on what of the answers ``pictures`` draws, if it is not all.
        reads_files: whether a text that is given to ``predict`` is the path of a file, and no input.
        recorded: attributes that ``describe`` records in config.json, as arguments of a later task.
        answer_key: the key of what ``decode`` returns that holds the answer, which ``truth`` is compared with.

    Args:
        model: a model with the head of the task.
        max_length: maximum tokens of an example; the model's positions when None.
        pack: whether to pack several examples into a row of a batch; answers are the same without, only slower.

    Attributes:
        beyond: what happens to rows that exceed ``max_length``, as messages say it: ``cut``.
        beyond_chosen: whether the user chose this, so that it is not an error.
        unanswered: reason -> number of inputs of ``predict`` that got no answer because of it.
        shortened: number of inputs of ``predict`` of which the beginning alone was read.
        labels_given: whether the settings of the run are known to list the labels.

    Raises:
        ModelError: the model has another head, or no tokenizer.
        DataError: ``max_length`` is out of range.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]
    metric: str = "loss"
    trivial_name: ClassVar[str] = "majority baseline"
    baseline: ClassVar[str | None] = None
    row_options: ClassVar[Mapping[str, Any]] = {"labels": list | dict}
    recorded: ClassVar[tuple[str, ...]] = ()
    answer_key: ClassVar[str] = "label"
    _map: LabelMap
    reads_files: ClassVar[bool] = False
    drawn: ClassVar[str] = ""

    def __init__(self, model: Model, *, max_length: int | None = None, pack: bool = True) -> None:
        super().__init__(model)
        if self.head_kind is not None and model.head_kind != self.head_kind:
            raise ModelError(
                f"The task {self.name} needs a model with the head {self.head_kind!r}, and this one has "
                f"{model.head_kind!r}. Open it with pretrain.load(PATH, head={self.head_kind!r})."
            )
        self.check_processor()
        room = int(model.backbone.max_length)
        if max_length is not None and not 3 <= max_length <= room:
            raise DataError(
                f"max_length is {max_length}; this model has {room} positions and a text needs at least 3."
            )
        self.max_length, self.pack = max_length or room, pack
        self.beyond, self.beyond_chosen = "cut", False
        self.unanswered: Counter[str] = Counter()
        self.shortened = 0
        self.labels_given = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model, which ``check_processor`` has found."""
        found = self.model.tokenizer
        assert found is not None
        return found

    @property
    def label_map(self) -> LabelMap:
        """The classes of a task that has them, as ``_map``, and whether the caller is known to have named them."""
        return replace(self._map, chosen=self.labels_given)

    def check_processor(self) -> None:
        """Check that the model has what turns the inputs of this task into batches: a tokenizer.

        Raises:
            ModelError: it has not.
        """
        if self.model.tokenizer is None:
            raise ModelError(
                f"The task {self.name} reads text, and the model has no tokenizer. Put tokenizer.json into its "
                "directory, or set model.tokenizer."
            )

    @property
    def limits(self) -> list[str]:
        """Sentences for the model card on what the model does not read or know."""
        known = ["It knows no other labels, and names one of them for any text."]
        cut = f"A text is cut after {self.max_length:,} tokens."
        return [cut, *known * (len(self.model.labels or ()) > 1)]

    def sizes(self, rows: TaskRows) -> str:
        """Return a line on the sizes of the training examples."""
        lengths = sorted(rows.lengths)
        return (
            f"tokens of an example: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, at most "
            f"{self.max_length} are read"
        )

    @property
    def shorten(self) -> str:
        """Advice on rows that are too long, besides a larger ``max_length``."""
        return "split the texts"

    @cached_property
    def encoder(self) -> TaskEncoder:
        """The text encoder for this model."""
        several = getattr(self.model.backbone.config, "type_vocab_size", 1) > 1
        segments = several and self.tokenizer.segments
        return TaskEncoder(self.tokenizer, self.max_length, segments=segments)

    @property
    def pad_id(self) -> int:
        """The id that pads rows; 0 if the model defines none."""
        pad = self.model.backbone.config.pad_id
        return 0 if pad is None else int(pad)

    @classmethod
    def recorded_options(cls, model: Model) -> set[str]:
        """Names of the arguments that are restored from the record of ``describe``, for a task around this model."""
        return set(inspect.signature(cls.__init__).parameters) - {"self", "model", "name"}

    def describe(self) -> dict[str, Any]:
        """Return the name of the task, and those of its options that its model depends on."""
        names = (*["max_length"] * bool(self.max_length), *self.recorded)
        options = {name: getattr(self, name) for name in names}
        head: Any = self.model.head
        if getattr(head, "pool", "") == "last" and not head.reads_padding:
            options["skips_padding"] = True
        return super().describe() | {"task": self.name} | options

    def continue_from(self, record: Mapping[str, Any]) -> None:
        """Read the token of each text that the run has trained on so far; see ``SequenceHead.reads_padding``."""
        super().continue_from(record)
        head: Any = self.model.head
        if getattr(head, "pool", "") == "last":
            head.reads_padding = "skips_padding" not in record

    def same_argument(self, key: str, then: Any, now: Any, labels: Sequence[str]) -> bool:
        """Compare ``codes``, the class of every spelling of a label, in the spellings that both have.

        Versions differ in the spellings that they record, and the labels alone stand for codes that are left out.
        """
        if key != "codes":
            return super().same_argument(key, then, now, labels)
        before, after = _class_ids(then, labels), _class_ids(now, self.model.labels or ())
        return all(before[text] == after[text] for text in before.keys() & after.keys())

    # ------------------------------------------------------------------ what a task implements

    @classmethod
    def read(cls, source: Any, *, name: str = "data", **options: Any) -> Table:
        """Read labelled rows; see ``pretrain.data.tables.read_table``.

        Args:
            source: a file or an object.
            name: what the rows are for: ``train``, ``validation``, ``test`` or ``data``.
            **options: see ``read_table``.
        """
        return read_table(source, name=name, **options)

    @classmethod
    def gathered(cls, table: Table, columns: Mapping[str, Any]) -> Table:
        """Return rows as the task reads them, if a source has several rows for one example.

        Args:
            table: what `read` returned.
            columns: role -> column, as the caller named them.
        """
        return table

    def written(self, table: Table) -> Table:
        """Return rows of `gathered` as a table of predictions holds them, so that they can be read again."""
        return table

    @classmethod
    def check_unread(cls, table: Table, columns: Mapping[str, Any]) -> None:
        """Refuse training rows with a column that is not read, and without which they would mean something else.

        Args:
            table: the rows as they were read.
            columns: role -> the column that is read.

        Raises:
            DataError: there is such a column.
        """

    @classmethod
    def parts(cls, source: Any) -> Sequence[str]:
        """Return which of ``train``, ``valid`` and ``test`` a file or folder has beside each other; none of most."""
        return parts_of_file(source)

    def inputs(self, inputs: Any) -> tuple[Table, bool] | None:
        """Return inputs of ``predict`` that only this task knows as a table by role, and whether they are one input.

        None leaves them to the common forms: texts, rows, frames, data sets.
        """
        return None

    def is_one(self, value: Any) -> bool:
        """Whether a list or an array in a row of ``predict`` is one input, and not a column of several."""
        return False

    @classmethod
    def takes(cls, option: str) -> bool:
        """Whether the class has an argument; a class of the caller need not have those that its base got later."""
        known = inspect.signature(cls.__init__).parameters
        return option in known or any(p.kind is p.VAR_KEYWORD for p in known.values())

    @classmethod
    def settled(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options that a run keeps: those that name a file hold its content instead."""
        return options

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        """Derive from the training rows what must be known before the model is built.

        Args:
            table: the training rows, columns named by role.
            options: task arguments that the caller gave, including those of ``row_options``; ``labels`` is the class
                order, ``checkpoint_labels`` that of a checkpoint with the head of this task, ``begun_labels`` that of
                the run if it has begun, and ``begun_objective`` the record of its objective.

        Raises:
            DataError: the targets are not valid for this task; the message names rows.
        """
        return Learned()

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """Convert the targets to the one form that the task trains on, whatever their form in the source.

        Args:
            table: training or held-out rows, columns named by role.
            learned: result of `learn` for the training rows.
            options: the options that `learn` got.

        Raises:
            DataError: a target that is not among the training rows; the message names the row.
        """
        return table

    @classmethod
    def classes(cls, table: Table, learned: Learned) -> list[int] | None:
        """The class number of every row of a table that `tidy` returned; None if rows do not have one class each."""
        return None

    @classmethod
    def named(cls, table: Table, learned: Learned) -> Table:
        """Return a table that `tidy` returned with the name of the class of each row, whatever its source calls it.

        A table is returned as it is if its rows do not have one class each.
        """
        classes = cls.classes(table, learned)
        if classes is None:
            return table
        names = [(learned.labels or ())[k] for k in classes]
        return table.with_columns({**table.columns, "label": names}, {})

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        """Encode rows as examples.

        Args:
            table: columns named by role.
            targets: whether to read the targets too; False for prediction.

        Raises:
            DataError: a row cannot be used; the message names it.
        """
        raise NotImplementedError

    def outputs(self, batch: Batch) -> list[Any]:
        """Run the model on a batch from ``collate`` and return its output for each example, as small arrays."""
        raise NotImplementedError

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Combine the outputs of all examples of one row into its answer, in plain values."""
        raise NotImplementedError

    def truth(self, table: Table) -> list[Any] | None:
        """The correct answers of all rows, in the form that ``decode`` returns; None if the task has none.

        A row whose answer is None is not compared.
        """
        return None

    def mistake(self, truth: Any, answer: Mapping[str, Any]) -> float | None:
        """How wrong an answer is, to sort mistakes by: its highest score; None if it is right or has no `answer_key`.

        Args:
            truth: the correct answer, as `truth` returns it.
            answer: what `decode` returned.
        """
        if self.answer_key not in answer or answer[self.answer_key] == truth:
            return None
        return float(np.max(answer.get("score", 0.0), initial=0.0))

    def choices(self, answer: Mapping[str, Any]) -> list[Any]:
        """What the model chose for one row: its answer, or one item for each part of it that is chosen by itself."""
        return [answer[self.answer_key]] if self.answer_key in answer else []

    @classmethod
    def baseline_columns(cls, *tables: Table) -> list[Any]:
        """Return the columns of a classical baseline: for each table its texts, pairs or vectors, and the labels.

        The tables are those that `named` returned, so that a class is called alike in all. The texts are those of all
        roles that hold text and are no target; more than two are read as one.

        Raises:
            DataError: a table has no such column, or no labels.
        """
        columns: list[Any] = []
        inputs = [role.name for role in cls.roles if not role.target]
        for table in tables:
            held = [table.columns[name] for name in inputs if name in table.columns]
            texts = [column for column in held if all(map(_is_text, column))]
            if not texts or "label" not in table.columns:
                raise DataError(
                    f"{table.name} has no column of text among those that the task {cls.name} reads, or none called "
                    "label, and a classical baseline reads both. A task with other columns has a baseline_columns of "
                    "its own, or baseline = None."
                )
            # Rows without a text are not read by the model either.
            cells = list(zip(*texts, strict=True))
            used = [i for i, row in enumerate(cells) if all(map(_has_text, row))]
            columns += [
                [cells[i] if len(texts) == 2 else "\n".join(cells[i]) for i in used],
                [table.columns["label"][i] for i in used],
            ]
        return columns

    @classmethod
    def baseline_outputs(cls, train: Table, held: Table, labels: Sequence[str]) -> Any:
        """Return what another classical baseline finds in held-out rows, as `summarize` reads it; None without one."""
        return None

    @property
    def colours(self) -> dict[str, str]:
        """Class -> its colour in `pictures`."""
        return {}

    def pictures(self, table: Table, count: int) -> list[dict[str, Any]]:
        """Rows with their targets and answers as pictures, worst first, for the report; none of most tasks.

        Args:
            table: rows with targets, columns named by role.
            count: number of rows to choose, spread from the worst to the best.

        Returns:
            For each ``right`` and ``predicted``, addresses of images in a page, ``score``, which is higher for a better
            answer, and ``where``.
        """
        return []

    def attended(self, table: Table) -> list[str | None]:
        """Return pictures of what the model attends to in each row, as addresses of images; None for most tasks."""
        return [None] * len(table)

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Metrics on the held-out rows of a trivial baseline that is fitted to the training rows."""
        return {}

    def prepare_reference(self, rows: TaskRows) -> None:
        """Add the outputs of the model before training to the examples; called once, before step 0."""

    def show(self, example: Example) -> list[tuple[str, bool]]:
        """The tokens of an example as text, each with whether it is trained on, for display."""
        ids = [int(i) for i in example["input_ids"]]
        labels = example.get("labels")
        marks = [False] * len(ids)
        if labels is not None and np.ndim(labels) == 1 and len(labels) == len(ids):
            marks = [bool(label != IGNORE) for label in labels]
        pieces = [self.tokenizer.decode([i], skip_special=False) for i in ids]
        # The tokens of WordPiece mark the continuation of a word, not its beginning.
        if self.tokenizer.kind == "wordpiece":
            pieces = [p[2:] if p.startswith("##") else f" {p}" for p in pieces]
        return list(zip(pieces, marks, strict=True))

    # ------------------------------------------------------------------ shared

    def pack_batch(
        self,
        examples: ExampleList,
        token_keys: Mapping[str, int] | None = None,
        *,
        pooled: bool = False,
    ) -> Batch:
        """Call ``pack_examples`` with the padding and packing of this task.

        Args:
            examples: examples of unequal length.
            token_keys: see ``pack_examples``.
            pooled: whether only the head reads the result; if it pools one token of each example, ``keep_index`` (N,)
                holds its position, and the last block computes no others.
        """
        batch = pack_examples(examples, token_keys=token_keys, pad_id=self.pad_id, pack=self.pack)
        head: Any = self.model.head
        pool = getattr(head, "pool", "")
        if pool == "last" and not head.reads_padding and head.pad_id is not None:
            batch["last_index"] = batch["first_index"] + _last_of_text(examples, head.pad_id)
        if pooled and pool in ("first", "last"):
            batch["keep_index"] = batch[f"{pool}_index"]
        return batch

    def predict(
        self, table: Table, batch_rows: int = _PREDICT_ROWS, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Predict the rows of a table, in order, with one chunk of rows in memory at a time.

        Args:
            table: columns named by role.
            batch_rows: rows in one forward pass.
            **options: keyword arguments of the task's ``decode``.

        Returns:
            An iterator over the answers; a row without an example (an empty text) has an empty dict.

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
        was_training = self.training
        self.eval()
        try:
            for start in range(0, len(table), batch_rows):
                part = table.take(range(start, min(start + batch_rows, len(table))))
                rows = self.encode(part, targets=False)
                with torch.inference_mode():
                    found = self._answers(rows, batch_rows)
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
                self.shortened += len(set(rows.cut))
        finally:
            self.train(was_training)

    def reset_counts(self) -> None:
        """Forget what earlier calls of ``predict`` counted."""
        self.unanswered.clear()
        self.shortened = 0

    def count_unanswered(self, rows: TaskRows) -> None:
        """Count in ``unanswered``, by reason, the rows that gave no example."""
        answered = set(rows.owners)
        for reason, places in rows.dropped.items():
            self.unanswered[reason] += len(set(places) - answered)

    def _answers(self, rows: TaskRows, batch_rows: int) -> dict[int, tuple[list[Any], list[Any]]]:
        """Return row -> the outputs and the infos of its examples, in their order."""
        outputs: list[Any] = [None] * len(rows)
        for chosen, batch in self.batches(rows, batch_rows):
            for i, output in zip(chosen, self.outputs(batch), strict=True):
                outputs[i] = output
        answers: dict[int, tuple[list[Any], list[Any]]] = {}
        for owner, output, info in zip(rows.owners, outputs, rows.info, strict=True):
            of_row = answers.setdefault(owner, ([], []))
            of_row[0].append(output)
            of_row[1].append(info)
        return answers

    def batches(self, rows: TaskRows, batch_rows: int) -> Iterator[tuple[list[int], Batch]]:
        """Yield the indices of examples of similar length, and their batch for evaluation on the model's device."""
        device = self.model.device
        for chosen in batches_by_length(rows.lengths, batch_rows, tokens_at_once(device)):
            # Each example has its own generator, so that its masks do not depend on the batching.
            rngs = [np.random.default_rng(0) for _ in chosen]
            batch = self.collate([rows[i] for i in chosen], rngs, evaluation=True)
            yield chosen, {key: value.to(device) for key, value in batch.items()}


def _class_ids(codes: Mapping[str, Any] | None, labels: Sequence[str]) -> dict[str, int]:
    """Return spelling -> class number of recorded codes, which are numbers or labels; None counts the labels."""
    places = {label.strip(): k for k, label in enumerate(labels)}
    if codes is None:
        return places
    return {
        text: places.get(k.strip(), -1) if isinstance(k, str) else k for text, k in codes.items()
    }


def class_codes(codes: Mapping[str, Any] | None, labels: Sequence[str]) -> dict[str, int]:
    """Return the class number of every spelling of a label, as codes say, which may come from a file; see `_class_ids`.

    Raises:
        ConfigError: a code is neither a label nor a class number.
    """
    found = _class_ids(codes, labels)
    for text, k in found.items():
        if type(k) is not int or not 0 <= k < len(labels):
            raise ConfigError(
                f"codes maps {text!r} to {(codes or {})[text]!r}, which is neither a label nor a class from 0 to "
                f"{len(labels) - 1}. The labels are: {', '.join(labels[:20])}."
            )
    return found


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str) or is_missing(cell)


def _has_text(cell: Any) -> bool:
    return isinstance(cell, str) and bool(cell.strip())


class ClassTask(Task):
    """Base class of tasks that choose among the ``labels`` of the model, with weights of the classes in the loss.

    Args:
        model: a model with ``labels``.
        class_weights: weight of each class in the loss: ``"balanced"`` (targets / (C * targets of the class), counted
            on the training rows), a list in the order of the labels, or a mapping from label to weight.
        label_smoothing: share of a target that is spread over all classes; in training only.
        max_length, pack: see ``Task``.

    Raises:
        ConfigError: an option is out of range.
    """

    loss_unit: str = NATS

    def __init__(
        self, model: Model, class_weights: Any, label_smoothing: float, max_length: int | None, pack: bool
    ) -> None:  # fmt: skip
        super().__init__(model, max_length=max_length, pack=pack)
        self.labels: tuple[str, ...] = tuple(model.labels or ())
        self.label_smoothing = checked_smoothing(label_smoothing)
        self._balanced = class_weights == "balanced"
        self._weights = None if self._balanced else _given_weights(class_weights, self.labels)

    @property
    def unbalanced(self) -> bool:
        """Whether balanced weights are asked for, and the training rows have not been counted yet."""
        return self._balanced and self._weights is None

    def balance(self, classes: Sequence[int] | np.ndarray) -> None:
        """Compute balanced weights from the targets of the training rows, which are encoded first."""
        if self.unbalanced:
            found = np.asarray(classes, dtype=np.int64)
            self.balance_counts(np.bincount(found, minlength=len(self.labels)))

    def balance_counts(self, counts: np.ndarray) -> None:
        """Compute balanced weights from the number of targets of each class, (C,)."""
        if self.unbalanced:
            self._weights = counts.sum() / (len(self.labels) * np.maximum(counts, 1.0))

    def weights_of(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the weights of the classes of a training batch as ``weights``, like the labels; none if not weighted.

        What has no class weighs nothing.
        """
        if self._weights is None:
            return {}
        weights = torch.tensor([*self._weights, 0.0], dtype=torch.float32)
        return {"weights": weights[labels.clamp(min=-1)]}

    def count(self, batch: Batch) -> torch.Tensor:
        """Number of targets, or the sum of their weights, which normalises a weighted mean."""
        return batch["weights"].sum() if "weights" in batch else super().count(batch)

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the summed loss of logits (M, C), each multiplied with its weight if given.

        Args:
            logits: (M, C).
            labels: (M,) classes, or (M, C) distributions over them.
            weights: (M,), or None.
        """
        smoothing = self.label_smoothing if self.training else 0.0
        each = torch.nn.functional.cross_entropy(
            logits, labels, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing
        )
        return each.sum() if weights is None else (each * weights).sum()


def _given_weights(weights: Any, labels: Sequence[str]) -> np.ndarray | None:
    """Return the class weights that the caller gave in the order of the labels, (C,), or None."""
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        classes = LabelMap(tuple(labels), {}).named([spelled(key) for key in weights])
        if unknown := [key for key, k in zip(weights, classes, strict=True) if k is None]:
            raise ConfigError(
                f"class_weights names {unknown[0]!r}, which is not a label. The labels are: {', '.join(labels[:20])}."
            )
        own = [label.strip() for label in labels]
        for key, k in zip(weights, classes, strict=True):
            if k is not None and own.count(own[k]) > 1:
                raise ConfigError(
                    f"class_weights names {key!r}, and several classes are called so. Give a list of {len(own)} "
                    "numbers, one for each label."
                )
        given = dict(zip(classes, weights.values(), strict=True))
        weights = [given.get(k, 1.0) for k in range(len(labels))]
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
