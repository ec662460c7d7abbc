"""Text embeddings by contrastive learning with in-batch negatives.

The same network encodes both texts of a pair (Sentence-BERT, arXiv 1908.10084); the second texts of all other pairs of
the batch are negatives (multiple negatives ranking, arXiv 1705.00652, §4.4; InfoNCE, arXiv 1807.03748).

Letters: n pairs on this rank, N in the whole batch, C candidates, D hidden.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import metrics as figures_of
from pretrain.config.spelling import column as column_option
from pretrain.data.labelled import Role, is_missing, text_id
from pretrain.data.labels import finite_numbers, listed
from pretrain.data.tables import shown
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.models.heads import pool_documents
from pretrain.models.sentences import SentenceSettings, pooling_named
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.tasks import Learned, Task, read_texts

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["Embedding"]

_PARTS = ("anchor", "positive", "negative")
_ANCHORS = 512  # anchors that are compared with all candidates at once
_LIKE = 0.8  # share of the highest score from which two texts count as a pair

# Columns of published pairs that say whether two texts match, and values that say that they do not.
_VERDICTS = ("label", "labels", "gold_label", "entailment_judgment", "is_duplicate")
_RELEVANCE = ("relevance", "relevant", "is_relevant", "is_selected")  # grades, of which 0 is none
_OPPOSITES = {"contradiction", "neutral", "not_entailment"}
_BINARY = {"0", "1", "0.0", "1.0", "true", "false"}
_NONE = {"0", "0.0", "false"}
# Columns that usually hold negatives, but in some data sets their ids or scores.
_NEGATIVES = ("neg", "negatives", "hard_neg", "hard_negatives")


class Embedding(Task):
    """Train vectors whose cosine similarity is high for texts of the same meaning.

    The head of the model, if any, is neither used nor trained. More rows in a batch mean more negatives.

    Args:
        model: any model with a tokenizer.
        pooling: as in ``model.embed``; by default that of the model's directory, else ``mean``.
        normalize: whether the vectors that the model returns have unit length (those in the loss always do); not
            given, as in the model's directory, else False. Saved with the pooling for sentence-transformers.
        scale: factor on cosine similarities before the softmax; the inverse of a temperature.
        symmetric: also train to find the anchor of every positive.
        min_score: if rows have similarity scores, rows below this one are not pairs, and their texts are only
            negatives of others. Set by ``learn``.
        printed_lists: read a column of which every cell is a printed list, as in a CSV file, as lists. Set by
            ``learn``; a run that an earlier version began reads texts.
        max_length, pack: see ``Task``.

    Raises:
        ConfigError: an option is out of range.
    """

    name: ClassVar[str] = "embedding"
    roles: ClassVar[tuple[Role, ...]] = (
        Role(
            "anchor", ("anchor", "sentence1", "query", "question", "text1", "premise", "sentence_a", "text"),
            help="a text",
        ),
        Role(
            "positive",
            (
                "positive", "sentence2", "answer", "hypothesis", "text2", "sentence_b", "document", "doc", "passage",
                "pos", "positives",
            ),
            help="a text that matches the anchor, or a list of such", target=True,
        ),
        Role(
            "negative", ("negative", "hard_negative", *_NEGATIVES), False,
            "a text that does not match it, or a list of such", target=True, doubtful=_NEGATIVES,
        ),
        Role(
            "label", ("score", "similarity", "relatedness_score"), False, "the similarity, a number", target=True,
        ),
    )  # fmt: skip
    metric: str = "accuracy"
    head_kind: ClassVar[str | None] = None
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "mrr", "spearman")
    couples_examples: ClassVar[bool] = True
    recorded: ClassVar[tuple[str, ...]] = ("scale", "symmetric", "min_score")

    def __init__(
        self,
        model: Model,
        *,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        scale: float = 20.0,
        symmetric: bool = False,
        min_score: float | None = None,
        printed_lists: bool = False,
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        stored = model.sentences or SentenceSettings()
        if stored.max_length is not None and stored.max_length <= model.backbone.max_length:
            max_length = max_length or stored.max_length
        super().__init__(model, max_length=max_length, pack=pack)
        if pooling is None and stored.missing:
            raise ConfigError(
                f"The directory of this model asks for {' and '.join(stored.missing)}, which is not implemented. Set "
                "pooling, for example to 'mean'."
            )
        modes = stored.pooling if pooling is None else pooling_named(pooling)
        if modes != stored.pooling and "cls" in modes and model.backbone.causal:
            raise ConfigError(
                "In a causal model the first token attends to no other, so its vector does not depend on the "
                "rest of the text; use pooling='mean' or 'last'."
            )
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"scale is {scale}; it must be a positive number.")
        # The model is trained without a prompt, so its directory must not name a default one.
        self.sentences = model.sentences = replace(
            stored,
            pooling=modes,
            normalize=stored.normalize if normalize is None else normalize,
            max_length=self.max_length,
            config={**stored.config, "default_prompt_name": None} if stored.config else {},
            missing=(),
        )
        self.scale, self.symmetric = scale, symmetric
        self.min_score, self.printed_lists = min_score, printed_lists
        if model.head is not None:
            for parameter in model.head.parameters():
                parameter.requires_grad_(False)

    @classmethod
    def check_unread(cls, table: Table, columns: Mapping[str, Any]) -> None:
        """Refuse pairs of which a column says that some do not match: they would be trained as if all did."""
        for name in (*_VERDICTS, *_RELEVANCE):
            if name in table.columns and name not in columns.values() and "label" not in columns:
                values = {str(value).strip().lower() for value in table.columns[name]}
                graded = name in _RELEVANCE and bool(values & _NONE)
                if values & _OPPOSITES or graded or (len(values) == 2 and values <= _BINARY):
                    raise DataError(
                        f"{table.name}: the column {name!r} says which texts match ({shown(sorted(values), 4)}), and "
                        "without it all pairs would count as such. Keep the rows that match; or, if it is a "
                        f"number that is larger the more they do, name it: {column_option('label', name)}."
                    )

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        """Find printed lists, and, if rows have scores, the score from which two texts count as a pair."""
        learned: dict[str, Any] = {}
        # Only a run that has begun knows its columns; another one may begin with the checkpoint of an earlier version.
        begun = (
            options.get("begun_objective", {})
            if "begun_columns" in options
            else {"printed_lists": True}
        )
        if begun.get("printed_lists") and cls.takes("printed_lists") and _prints_lists(table):
            learned["printed_lists"] = True
        if "label" not in table.names:
            return Learned(options=learned)
        top = max(_scores(table), default=0.0)
        least = options.get("min_score")
        least = _LIKE * top if least is None else float(least)
        pairs = sum(score >= least for score in _scores(table))
        if not pairs:
            raise DataError(
                f"None of the {len(table)} rows has a score of {least:g} or more; none is a pair. "
                "Set a lower min_score."
            )
        note = f"{pairs:,} of {len(table):,} rows have a score of {least:g} or more and are pairs"
        return Learned(options={"min_score": least, **learned}, notes=[note])

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows = TaskRows()
        parts = [p for p in _PARTS if p in table.names] if targets else ["anchor"]
        table, owners = _one_text_each(table, parts, printed=self.printed_lists)
        kept = read_texts(table, parts, rows, self.tokenizer)
        texts = {p: [self.sentences.cased(table.columns[p][i]) for i in kept] for p in parts}
        encoded = {part: self.encoder.texts(texts[part]) if kept else [] for part in parts}
        scores = _scores(table) if targets and "label" in table.names else None
        for n, i in enumerate(kept):
            pieces = [encoded[part][n] for part in parts]
            if any(piece.overflowing for piece in pieces):
                rows.cut.append(i)
            arrays = [self.encoder.example(piece) for piece in pieces]
            example = {key: np.concatenate([a[key] for a in arrays]) for key in arrays[0]}
            example["lengths"] = np.asarray([len(a["input_ids"]) for a in arrays], dtype=np.int64)
            example["texts"] = np.asarray([text_id(texts[p][n]) for p in parts], dtype=np.int64)
            if scores is not None:
                example["score"] = np.asarray(scores[i], dtype=np.float32)
            rows.add(i, example)
        return rows if owners is None else _by_owner(rows, owners)

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Pack all texts as documents: first the anchors, then the positives, then the negatives."""
        pieces: list[dict[str, Any]] = []
        parts = len(examples[0]["lengths"])
        ends = [np.cumsum(example["lengths"]) for example in examples]
        for part in range(parts):
            for example, end in zip(examples, ends, strict=True):
                place = slice(end[part] - example["lengths"][part], end[part])
                keys = [k for k in ("input_ids", "token_type_ids") if k in example]
                pieces.append({key: example[key][place] for key in keys})
        batch = self.pack_batch(pieces)
        batch["texts"] = torch.from_numpy(np.stack([example["texts"] for example in examples]))
        if "score" in examples[0]:
            batch["score"] = torch.from_numpy(np.stack([e["score"] for e in examples]))
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Number of anchors with a positive; doubled if both directions are trained."""
        return self._pairs(batch).sum() * (2 if self.symmetric else 1)

    def _pairs(self, batch: Batch) -> Tensor:
        """Mask of the rows that are pairs, (n,)."""
        if "score" not in batch or self.min_score is None:
            return torch.ones(len(batch["texts"]), dtype=torch.bool, device=batch["texts"].device)
        return batch["score"] >= self.min_score - 1e-6

    def vectors(self, batch: Batch) -> Tensor:
        """One vector per text, not normalised, (texts, D) in fp32; (texts, k·D) for k pooling modes."""
        keys = ("input_ids", "document_ids", "position_ids", "token_type_ids")
        hidden = self.model.backbone({key: batch[key] for key in keys if key in batch})
        names = {"cls": "first", "lasttoken": "last"}
        vectors = [
            pool_documents(hidden.float(), batch, names.get(mode, mode))
            for mode in self.sentences.pooling
        ]
        return torch.cat(vectors, dim=-1)

    def forward(self, batch: Batch) -> Loss:
        texts, pairs = batch["texts"], self._pairs(batch)  # (n, parts), (n,)
        count, parts = texts.shape
        units = F.normalize(self.vectors(batch), dim=-1).view(parts, count, -1)
        # The anchors of this rank are compared with the texts of the whole batch.
        every, first = self.whole_batch(units.transpose(0, 1))  # (N, parts, D)
        known, _ = self.whole_batch(texts)
        mine = slice(first, first + count)
        cosines = units[0] @ every[:, 1:].transpose(0, 1).flatten(0, 1).T  # (n, C)
        scores = (self.scale * cosines).masked_fill(_alike(known, mine), -math.inf)
        wanted = torch.arange(first, first + count, device=scores.device)
        total = (F.cross_entropy(scores, wanted, reduction="none") * pairs).sum()
        if self.symmetric:
            back = self.scale * (units[1] @ every[:, 0].T)  # (n, N)
            back = back.masked_fill(_alike(known, places=mine).T, -math.inf)
            total = total + (F.cross_entropy(back, wanted, reduction="none") * pairs).sum()
        metrics: dict[str, Any] = {}
        if not self.training:
            metrics["units"] = list(units.transpose(0, 1))
            metrics["texts"], metrics["pairs"] = texts.tolist(), pairs.tolist()
            if "score" in batch:
                alike = cosines[:, :count].diagonal()
                metrics["scored"] = torch.stack((alike, batch["score"]), dim=-1).cpu().tolist()
        return Loss(total, self.count(batch), metrics)

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Ranking metrics over the texts of all held-out rows, and Spearman's correlation if rows have scores.

        ``accuracy`` is how often the positive is the nearest text to its anchor, ``mrr`` the mean of 1 / its rank.
        Only the loss is computed within batches, so it depends on the batch size: smaller batches have a lower loss.
        """
        figures = {"loss": total / count if count else math.nan}
        if not metrics.get("units"):
            return figures
        kept = torch.tensor(metrics["pairs"], dtype=torch.bool)
        rank = _ranks(torch.stack(metrics["units"]).float(), torch.tensor(metrics["texts"]))[kept]
        figures["accuracy"] = float((rank == 1).double().mean())
        figures["mrr"] = float((1 / rank.double()).mean())
        if metrics.get("scored"):
            alike, wanted = np.asarray(metrics["scored"], dtype=np.float64).T
            figures["spearman"] = figures_of.spearman(wanted, alike)
        return figures

    def head_weights(self) -> int:
        """0, because the head is not used."""
        return 0

    def outputs(self, batch: Batch) -> list[Any]:
        return list(self.sentences.finish(self.vectors(batch)).cpu())

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``embedding``, D numbers, as ``model.embed`` returns them."""
        return {"embedding": [float(value) for value in outputs[0]]}

    def describe(self) -> dict[str, Any]:
        modes = self.sentences.pooling
        return super().describe() | {
            "pooling": modes[0] if len(modes) == 1 else list(modes),
            "normalize": self.sentences.normalize,
            **({"printed_lists": True} if self.printed_lists else {}),
        }


def _one_text_each(
    table: Table, parts: Sequence[str], *, printed: bool
) -> tuple[Table, list[int] | None]:
    """Return a table with one text in each cell, and the row that each of its rows is of; None if they are the same.

    A row with lists of texts stands once for each text of the longest of them, and the shorter ones begin again, as
    triplets of sentence-transformers do. A blank text in a list is left out. Where every cell of a column, as in a CSV
    file, is a printed list, it is read as that if ``printed``.
    """
    columns = {p: _unprinted(table.columns[p]) if printed else table.columns[p] for p in parts[1:]}
    lists = {p: cells for p, cells in columns.items() if any(isinstance(c, list) for c in cells)}
    if not lists:
        return table, None
    texts = {
        p: [
            [text for text in cell if not is_missing(text)] or [""]
            if isinstance(cell, list)
            else [cell]
            for cell in cells
        ]
        for p, cells in lists.items()
    }
    times = [max(map(len, cells)) for cells in zip(*texts.values(), strict=True)]
    places = [(i, k) for i, count in enumerate(times) for k in range(count)]
    owners = [i for i, _ in places]
    single = {p: [cells[i][k % len(cells[i])] for i, k in places] for p, cells in texts.items()}
    every = table.take(owners)
    return every.with_columns({**every.columns, **single}, every.label_names), owners


def _prints_lists(table: Table) -> bool:
    columns = [table.columns[part] for part in _PARTS[1:] if part in table.names]
    pairs = (pair for cells in columns for pair in zip(cells, _unprinted(cells), strict=True))
    return any(isinstance(cell, str) and isinstance(read, list) for cell, read in pairs)


def _unprinted(cells: Sequence[Any]) -> Sequence[Any]:
    """Return the lists that the cells of a column print, or the cells if one of them is a text."""
    lists = [cell if is_missing(cell) else [] if cell == "[]" else listed(cell) for cell in cells]
    return cells if any(isinstance(c, str) and c.strip() for c in lists) else lists


def _by_owner(rows: TaskRows, owners: Sequence[int]) -> TaskRows:
    """Return examples of the rows that `_one_text_each` made as those of the rows they are of."""

    def of(places: Sequence[int]) -> list[int]:
        return list(dict.fromkeys(owners[i] for i in places))

    found = replace(rows, owners=[owners[i] for i in rows.owners], cut=of(rows.cut))
    found.dropped = {reason: of(places) for reason, places in rows.dropped.items()}
    found.remarks = {text: of(places) for text, places in rows.remarks.items()}
    for i in (i for i, count in Counter(found.owners).items() if count > 1):
        found.remark(i, "a list of texts makes an example of each text of the longest list")
    return found


def _alike(texts: Tensor, rows: slice = slice(None), places: slice | None = None) -> Tensor:
    """Mask (anchors, candidates) of false negatives: candidates that are, or whose anchors are, the same text.

    Args:
        texts: (N, 2 or 3) ids of the texts of each row: anchor, positive, negative.
        rows: rows of the anchors.
        places: rows whose positives are the candidates; None takes the positives and then the negatives of all.
    """
    kept = slice(None) if places is None else places
    anchor, positive = texts[kept, 0], texts[kept, 1]
    mine, wanted = texts[rows, :1], texts[rows, 1:2]
    same = (wanted == positive) | (mine == anchor) | (mine == positive)
    numbers = torch.arange(len(texts), device=texts.device)
    same &= numbers[rows, None] != numbers[kept]
    if texts.shape[1] == 2 or places is not None:
        return same
    return torch.cat((same, wanted == texts[:, 2]), dim=1)


def _ranks(units: Tensor, texts: Tensor) -> Tensor:
    """Rank of the positive of each anchor among all candidates, (N,), counted from 1.

    Ties count against the positive, so that collapsed vectors, which are all equal, score badly.

    Args:
        units: (N, 2 or 3, D) unit vectors of anchor, positive, negative.
        texts: (N, 2 or 3) their ids.
    """
    count, found = len(units), []
    others = units[:, 1:].transpose(0, 1).reshape(-1, units.shape[-1])  # (C, D)
    for start in range(0, count, _ANCHORS):
        rows = slice(start, min(start + _ANCHORS, count))
        scores = units[rows, 0] @ others.T
        own = scores.gather(1, torch.arange(count)[rows, None])
        found.append(((scores >= own) & ~_alike(texts, rows)).sum(1))
    return torch.cat(found)


def _scores(table: Table) -> list[float]:
    """The column of scores as finite numbers.

    Raises:
        DataError: a score is not a finite number; the message names the first such rows.
    """
    cure = (
        "A score must be the similarity of two texts as a number. Correct or remove these rows, or rename the column "
        "if it holds something else."
    )
    return finite_numbers(table.columns["label"], table.where, what="scores", cure=cure, bools=True)
