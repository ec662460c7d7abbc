"""Captions of images, and answers to questions about them, by a decoder that reads the image as a prefix (GIT).

A row is ``<start> question text <end>`` behind its image; the text and the end are the targets (arXiv 2205.14100,
sections 3 and 4). Greedy decoding writes exactly the reference if every token of it is the likeliest after those
before it, so the share of exact texts is measured without writing any. Texts that the tokenizer cannot spell, or that
are longer than an answer, are not exact.

Letters: B rows, T tokens, N targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from pretrain.data.images.augment import Augmentation
from pretrain.data.images.pairs import PairProcessor
from pretrain.data.images.rows import pictures
from pretrain.data.images.source import IMAGE
from pretrain.data.labelled import Role
from pretrain.data.labels import listed
from pretrain.data.tables import Table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, ModelError
from pretrain.models.git import Git
from pretrain.nn.attention import KVCache
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import (
    Batch,
    ExampleList,
    Loss,
    Rngs,
    TokenObjective,
    at_targets,
    target_places,
)
from pretrain.objectives.image_task import ImageTask
from pretrain.objectives.row_pixels import check_processor, pixel_values
from pretrain.objectives.tasks import Learned, Task, empty_texts
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.images.decode import Stored
    from pretrain.models.base import Model

__all__ = ["Captioning"]

_NEW_TOKENS = 64
_LOGITS_ROWS = 1024  # targets whose logits are in memory at a time in an evaluation


class Captioning(ImageTask, TokenObjective):
    """Describe an image, or answer a question about it.

    Args:
        model: a model of the family git, with a tokenizer and an image processor.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops.
        flip: mirror half of the training images; not if texts tell left from right.
        randaugment: strength, 1 to 30, of two random operations on every training image; 0 for none.
        jitter: how far the brightness, contrast and colour of a training image change, as a share; 0 for not at all.
        word_dropout: share of the tokens of a text that training hides from the tokens behind them (arXiv 1511.06349),
            so that they are read from the image, not guessed from the words before them. The targets stay.
        max_new_tokens: maximum tokens of an answer.
        max_length: of question and text together; see ``Task``.

    Raises:
        ModelError: the model reads no image before a text, or its tokenizer does not frame texts.
    """

    name: ClassVar[str] = "captioning"
    roles: ClassVar[tuple[Role, ...]] = (
        IMAGE,
        Role(
            "question",
            ("question", "prompt"),
            False,
            "what is asked about the image",
            constant=True,
        ),
        Role("text", ("text", "caption", "answer"), help="the text to write", target=True),
    )
    metric: str = "exact_match"
    trivial_name: ClassVar[str] = "always the most frequent text"
    head_kind: ClassVar[str | None] = "causal-lm"
    answer_key: ClassVar[str] = "answer"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "perplexity", "exact_match")
    recorded: ClassVar[tuple[str, ...]] = ("max_new_tokens",)

    def __init__(
        self,
        model: Model,
        *,
        crop: float = 1.0,
        flip: bool = False,
        randaugment: int = 0,
        jitter: float = 0.0,
        word_dropout: float = 0.0,
        max_new_tokens: int = _NEW_TOKENS,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(model.backbone, Git):
            raise ModelError(
                f"The task {self.name} needs a decoder that reads an image before a text; this one is a "
                f"{model.backbone.model_type} model. Build or load the family git."
            )
        super().__init__(model, max_length=max_length, pack=False)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if not 0 <= word_dropout < 1:
            raise ConfigError(f"word_dropout is {word_dropout}; it must lie in [0, 1).")
        self.augmentation, self.word_dropout = (
            Augmentation(crop, flip, randaugment, jitter),
            word_dropout,
        )
        self.max_new_tokens = max_new_tokens
        self.start, self.end = self._frame()

    def check_processor(self) -> None:
        """Check that the model has a tokenizer and an image processor; without one, that of its sizes is taken."""
        Task.check_processor(self)
        model = self.model
        if getattr(model.processor, "images", None) is None:
            usual = model.backbone.default_processor(model.backbone.config)
            model.processor = PairProcessor(model.tokenizer, getattr(usual, "images", None))
        check_processor(self.model, f"The task {self.name}")

    def _frame(self) -> tuple[int, int]:
        """Return the first and the last token of every text."""
        tokenizer = self.tokenizer
        framed, bare = (tokenizer.frame_texts(["a"], framed=f)[0].ids for f in (True, False))
        if framed[1:-1] == bare and len(framed) == len(bare) + 2:
            return framed[0], framed[-1]
        start, end = tokenizer.bos_id, tokenizer.eos_id
        if start is None or end is None:
            raise ModelError(
                f"The task {self.name} needs tokens at the start and the end of a text, and the tokenizer of this "
                "model has none. Take one with bos_token and eos_token, such as the wordpiece ones of this package."
            )
        return start, end

    @property
    def limits(self) -> list[str]:
        fancy = (
            "It writes what is likely after its training rows, also about what is not in the image."
        )
        return [self.reading, fancy]

    # ------------------------------------------------------------------ rows

    @classmethod
    def gathered(cls, table: Table, columns: Mapping[str, Any]) -> Table:
        """Make a row of each text, where files beside images have one in each line."""
        known = next(role.known for role in cls.roles if role.name == "text")
        name = columns.get("text") or next((n for n in known if n in table.columns), None)
        cells = [listed(cell) for cell in table.columns.get(name, ())] if name is not None else []
        if name is None or not any(isinstance(cell, list) for cell in cells):
            return table
        texts = [[c for c in cell if c] if isinstance(cell, list) else [cell] for cell in cells]
        places = [i for i, some in enumerate(texts) for _ in some or [None]]
        if (several := sum(len(some) > 1 for some in texts)) and len(places) > len(table):
            note(
                f"{several:,} of {len(table):,} images have several texts; each is a row of its own"
            )
        expanded = table.take(places)
        held = [text for some in texts for text in some or [None]]
        return expanded.with_columns({**expanded.columns, name: held}, table.label_names)

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """Make every image a ``Picture``, whose content tells duplicates and fingerprints."""
        return table.with_columns({**table.columns, "image": pictures(table)}, table.label_names)

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        names = [name for name in ("question", "text") if name in table.names]
        names = names if targets else [name for name in names if name != "text"]

        def target(rows: TaskRows, i: int, image: Stored) -> Any:
            if empty := empty_texts(table, names, i):
                return f"empty {' and '.join(empty)}"
            ids = dict(
                zip(names, self._ids([table.columns[name][i] for name in names]), strict=True)
            )
            question, answer = ids.get("question", []), ids.get("text", [])
            room = self.max_length - len(question) - 1
            if room < 1:
                return f"the question leaves no room for a text in {self.max_length} tokens"
            if len(answer) > room:
                rows.cut.append(i)
            if not targets:
                return {"input_ids": np.asarray([self.start, *question], np.int64)}
            tokens = [self.start, *question, *answer, self.end][: self.max_length + 1]
            labels = np.asarray(tokens[1:], np.int64)
            labels[: len(question)] = IGNORE
            why = ""  # why no answer of the model can be this text; empty if one can
            if self.tokenizer.decode(answer).strip() != table.columns["text"][i]:
                why = "the tokens of the text spell another one"
            elif len(answer) > self.max_new_tokens:
                why = f"the text has more than max_new_tokens={self.max_new_tokens} tokens"
            if why:
                rows.remark(i, f"{why}, so the text never counts as exact")
            return {
                "input_ids": np.asarray(tokens[:-1], np.int64),
                "labels": labels,
                "writable": np.asarray(not why and len(answer) <= room),
            }

        rows, _ = self.encode_inputs(table, targets=targets, target=target)
        rows.size += max((len(example["input_ids"]) for example in rows.examples), default=0)
        return rows

    def _patches(self) -> int:
        return int(self.model.backbone.config.num_patches)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Encode texts without their frame."""
        return [e.ids for e in self.tokenizer.frame_texts(texts, special=False, framed=False)]

    def truth(self, table: Table) -> list[Any]:
        return list(table.columns["text"])

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Exact texts of always writing the most frequent one of the training rows."""
        if not len(train) or not len(held_out):
            return {}
        (most, _), *_ = Counter(train.columns["text"]).most_common(1)
        hits = [text == most for text in held_out.columns["text"]]
        return {"exact_match": sum(hits) / len(hits)}

    def sizes(self, rows: TaskRows) -> str:
        size = self.processor.size or (0, 0)
        longest = max(len(example["input_ids"]) for example in rows)
        return (
            f"images are read as {self.processor.channels} x {size[0]} x {size[1]} values; the longest text with its "
            f"question has {longest} tokens"
        )

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Read the images, and pad the texts on the right; ``labels[:, t]`` is the target at position t."""
        pixels = pixel_values(self, examples, rngs, evaluation=evaluation)
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        ids, labels = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        for row, example in enumerate(examples):
            ids[row, : lengths[row]] = example["input_ids"]
            if "labels" in example:
                labels[row, : lengths[row]] = example["labels"]
        if self.word_dropout and not evaluation:
            # An input is of the text if it was the target before. The embedding of padding is zero.
            for row, rng in enumerate(rngs):
                hidden = (labels[row, :-1] != IGNORE) & (
                    rng.random(shape[1] - 1) < self.word_dropout
                )
                ids[row, 1:][hidden] = self.pad_id
        batch = {"pixel_values": pixels, "input_ids": torch.from_numpy(ids)}
        batch["lengths"] = torch.tensor(lengths)
        if "labels" not in examples[0]:
            return batch
        batch["labels"] = torch.from_numpy(labels)
        batch["writable"] = torch.from_numpy(np.stack([e["writable"] for e in examples]))
        batch["target_index"] = target_places(batch["labels"])
        return batch

    def units(self, batch: Batch) -> int:
        """Return the patches of the images and the tokens of the texts; the model counts padding as well."""
        padding = batch["input_ids"].numel() - int(batch["lengths"].sum())
        return super().units(batch) - padding

    # ------------------------------------------------------------------ loss and figures

    def forward(self, batch: Batch) -> Loss:
        """Compute the loss; in evaluation also the number of texts that can be written, and whose tokens are right."""
        hidden, targets, index = at_targets(self.model, batch)
        loss = self.loss_at(hidden, targets)
        if self.training:
            return loss
        head: Any = self.model.head
        parts = [head(part).argmax(-1) for part in torch.split(hidden, _LOGITS_ROWS)]
        wrong = (torch.cat(parts) != targets).nonzero().squeeze(1)
        count, columns = batch["labels"].shape
        exact = batch["writable"].clone()
        exact[index[wrong] // columns] = False
        loss.metrics |= {"exact": exact.float().sum(), "rows": torch.tensor(float(count))}
        return loss

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Add the share of texts that greedy decoding writes exactly."""
        known = {key: value for key, value in metrics.items() if key not in ("exact", "rows")}
        figures = super().summarize(total, count, known, stats)
        rows = float(metrics["rows"])
        return figures | {"exact_match": float(metrics["exact"]) / rows if rows else 0.0}

    # ------------------------------------------------------------------ answers

    def outputs(self, batch: Batch) -> list[Any]:
        """Write texts greedily, for rows with questions of one length together."""
        lengths = batch["lengths"]
        found: list[Any] = [None] * len(lengths)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero().squeeze(1)
            part = {
                "pixel_values": batch["pixel_values"][rows],
                "input_ids": batch["input_ids"][rows, :length],
            }
            for row, text in zip(rows.tolist(), self._write(part), strict=True):
                found[row] = text
        return found

    def _write(self, batch: Batch) -> list[str]:
        """Return the texts behind images and questions of one length."""
        model, head = self.model, cast(Any, self.model.head)
        count, length = batch["input_ids"].shape
        most = min(self.max_new_tokens, self.max_length + 1 - length)
        cache = KVCache(model.backbone.config.num_patches + 1 + length + most)
        written: list[Tensor] = []
        ended = torch.zeros(count, dtype=torch.bool, device=batch["input_ids"].device)
        step = batch
        for place in range(length, length + most):
            hidden = model.backbone(step, cache=cache)[:, -1]
            chosen = head(hidden).argmax(-1)
            written.append(torch.where(ended, self.end, chosen))
            ended = ended | (chosen == self.end)
            if bool(ended.all()) or place + 1 > self.max_length:
                break
            step = {
                "input_ids": chosen[:, None],
                "position_ids": torch.tensor([[place]], device=chosen.device),
            }
        texts = []
        for row in torch.stack(written, 1).tolist():
            end = row.index(self.end) if self.end in row else len(row)
            texts.append(self.tokenizer.decode(row[:end]).strip())
        return texts

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``answer``, the text."""
        return {"answer": outputs[0]}
