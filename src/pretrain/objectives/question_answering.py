"""Extractive question answering: the answer is a span of the context (Devlin et al., 2019, §4.2 and §4.3).

A long context is read in overlapping windows. Each window is an example with a start and an end token as targets; if
the answer is not in the window, its first token is the target of both, as in SQuAD 2.0 (Rajpurkar et al., 2018).

Letters: B rows of a batch, T tokens, N examples, S tokens of the longest example, W tokens of an answer, K candidates.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import metrics as figures_of
from pretrain.data.columns import find_answers
from pretrain.data.labelled import Role
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Batch, Example, ExampleList, Loss, Rngs
from pretrain.objectives.tasks import Learned, Task, count_examples, read_texts, sequence_labels
from pretrain.utils.run_log import NATS

if TYPE_CHECKING:
    from pretrain.data.columns import Answers
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["QuestionAnswering", "best_spans"]

_OVERLAP = 4  # windows overlap by 1 / _OVERLAP of max_length
_BAD = ("error", "drop")


class QuestionAnswering(Task):
    """Find the answer to a question in its context.

    Args:
        model: a model with a question-answering head.
        stride: tokens by which the windows over a long context overlap; a quarter of ``max_length`` when None.
        max_answer_tokens: maximum tokens of an answer.
        n_best: number of candidate spans for the answer of a row, over which ``score`` is normalised.
        allow_no_answer: whether the model may predict that the context has no answer; set from the training rows.
        null_threshold: it does so if the score of no answer exceeds that of the best span by more than this (in nats).
        bad_answers: ``"drop"`` drops rows whose answers are not in their context; ``"error"`` raises an error.
        max_length, pack: see ``Task``.

    Raises:
        ConfigError: an option is out of range.
    """

    name: ClassVar[str] = "question-answering"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("question", ("question", "query"), help="the question"),
        Role("context", ("context", "passage", "paragraph", "document"), help="the text to read"),
        Role(
            "answers",
            ("answers", "answer", "answer_text", "answers.text"),
            help="texts copied from the context",
            target=True,
        ),
        Role(
            "answer_start",
            ("answer_start", "answers.answer_start"),
            False,
            "where each answer begins",
            target=True,
        ),
        Role("id", ("id",), required=False, help="the name of the row", target=True),
    )
    loss_unit: str = NATS
    metric: str = "f1"
    trivial_name: ClassVar[str] = "always the most frequent answer"
    head_kind: ClassVar[str | None] = "question-answering"
    answer_key: ClassVar[str] = "answer"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "exact_match", "f1")
    recorded: ClassVar[tuple[str, ...]] = (
        "stride", "max_answer_tokens", "n_best", "allow_no_answer", "null_threshold", "bad_answers",
    )  # fmt: skip

    def __init__(
        self,
        model: Model,
        *,
        stride: int | None = None,
        max_answer_tokens: int = 30,
        n_best: int = 20,
        allow_no_answer: bool = False,
        null_threshold: float = 0.0,
        bad_answers: str = "error",
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, max_length=max_length, pack=pack)
        special = self.encoder.tokenizer.frame_size(pair=True)
        self.stride = self.max_length // _OVERLAP if stride is None else stride
        # A window must extend beyond the tokens that it shares with the previous one.
        self.question_room = min(self.max_length // 2, self.max_length - special - self.stride - 1)
        if self.stride < 0 or self.question_room < 1:
            raise ConfigError(
                f"stride {self.stride} and max_length {self.max_length}: with {special} special tokens no room is left "
                "for question and context. Windows must be longer than their overlap; use a smaller stride."
            )
        for key, value in (("max_answer_tokens", max_answer_tokens), ("n_best", n_best)):
            if value < 1:
                raise ConfigError(f"{key} is {value}; it must be at least 1.")
        if bad_answers not in _BAD:
            raise ConfigError(
                f"bad_answers is {bad_answers!r}; it must be one of {', '.join(_BAD)}."
            )
        if not math.isfinite(null_threshold):
            raise ConfigError(f"null_threshold is {null_threshold}; it must be a finite number.")
        self.max_answer_tokens, self.n_best = max_answer_tokens, n_best
        self.allow_no_answer, self.null_threshold = allow_no_answer, null_threshold
        self.bad_answers = bad_answers

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        found = find_answers(table)
        drop = options.get("bad_answers") == "drop"
        if not drop:
            found.check(table)
        answerable = [bool(texts) for texts in found.texts]
        if not any(span is not None for span in found.spans):
            raise DataError(
                f"No row of {table.name} has an answer to train on. Check that the right column is named."
            )
        learned = Learned(options={"allow_no_answer": not all(answerable)})
        learned.strata = None if all(answerable) else answerable
        if found.repaired:
            learned.notes.append(
                f"{found.repaired:,} answers were not where answer_start says and occur once in their context; that "
                "place is taken"
            )
        if found.first:
            learned.notes.append(
                f"{found.first:,} answers without answer_start occur several times in their context; the first place "
                "is taken"
            )
        if drop and found.bad:
            learned.notes.append(
                f"{len(found.bad):,} of {len(table):,} rows are dropped: their answers are not in their context"
            )
        return learned

    # ------------------------------------------------------------------ rows to examples

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows = TaskRows()
        kept = read_texts(table, ("question", "context"), rows)
        answers = find_answers(table) if targets else None
        if answers is not None and answers.bad:
            if self.bad_answers == "error":
                answers.check(table)
            bad = set(answers.bad)
            for i in set(kept) & bad:
                rows.drop(i, "answer not in its context")
            kept = [i for i in kept if i not in bad]
        contexts = [table.columns["context"][i] for i in kept]
        questions = self._questions(rows, kept, table)
        encodings = self.encoder.texts(questions, contexts, stride=self.stride) if kept else []
        for i, context, encoding in zip(kept, contexts, encodings, strict=True):
            self._add(rows, i, context, [encoding, *encoding.overflowing], answers)
        return rows

    def _questions(self, rows: TaskRows, kept: Sequence[int], table: Table) -> list[str]:
        """The questions, truncated if they would leave too little room for the context."""
        texts = [table.columns["question"][i] for i in kept]
        found = self.encoder.texts(texts, framed=False) if kept else []
        for k, encoding in enumerate(found):
            room = self.question_room
            if len(encoding.ids) > room:
                rows.cut.append(kept[k])
            while len(encoding.ids) > self.question_room:
                # The last word may be encoded as more tokens without the text that followed it.
                texts[k] = texts[k][: encoding.offsets[room - 1][1]]
                room -= 1
                encoding = self.encoder.texts(texts[k : k + 1], framed=False)[0]
        return texts

    def _add(
        self, rows: TaskRows, i: int, context: str, windows: Sequence[Any], answers: Answers | None
    ) -> None:
        """Add the windows over one context as examples."""
        places = [_offsets(encoding, context) for encoding in windows]
        span = None if answers is None else answers.spans[i]
        if span is not None and (span := _seen(span, places)) is None:
            rows.drop(i, "answer of characters that the tokenizer drops")
            return
        inside = False
        for encoding, (starts, ends) in zip(windows, places, strict=True):
            example = self.encoder.example(encoding) | {"starts": starts, "ends": ends}
            if answers is not None:
                labels = _tokens_of(span, starts, ends)
                inside |= bool(labels.any())
                example |= {"labels": labels, "row": np.asarray(i)}
                example["reference"] = _reference(context, starts, ends, answers.texts[i])
            rows.add(i, example, (context, starts, ends))
        if span is not None and not inside and i not in rows.cut:
            rows.cut.append(i)  # the answer is in no window

    def truth(self, table: Table) -> list[Any]:
        """All correct answers of every row, perhaps none; None for a row whose answers are not in its context."""
        found = find_answers(table)
        bad = set(found.bad)
        return [None if i in bad else list(dict.fromkeys(t)) for i, t in enumerate(found.texts)]

    def mistake(self, truth: Any, answer: Mapping[str, Any]) -> float | None:
        """The score of an answer that is no exact match of any correct one."""
        return None if figures_of.exact_match(answer["answer"], truth) else float(answer["score"])

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Majority baseline: scores of the most frequent answer of the training rows, which may be no answer.

        If a third of the questions has no answer, a third of the score is reached without reading the context.
        """
        if not len(held_out):
            return {}
        known = Counter(texts[0] if texts else "" for texts in find_answers(train).texts)
        predicted = known.most_common(1)[0][0]
        wanted = find_answers(held_out)
        bad = set(wanted.bad)
        rows = [texts for i, texts in enumerate(wanted.texts) if i not in bad]
        if not rows:
            return {}
        return {
            "exact_match": float(
                np.mean([figures_of.exact_match(predicted, texts) for texts in rows])
            ),
            "f1": float(np.mean([figures_of.token_f1(predicted, texts) for texts in rows])),
        }

    def show(self, example: Example) -> list[tuple[str, bool]]:
        """The tokens of a window as text, and whether each belongs to the answer that is trained on."""
        pieces = super().show(example)
        first, last = map(int, example["labels"]) if "labels" in example else (0, -1)
        return [(text, first <= k <= last) for k, (text, _) in enumerate(pieces)]

    # ------------------------------------------------------------------ batches and loss

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        batch = self.pack_batch(examples, {"starts": 0, "ends": 0} if evaluation else None)
        first, last = batch["first_index"], batch["last_index"]
        places = first[:, None] + torch.arange(int((last - first).max()) + 1)
        batch["window_index"] = torch.where(places <= last[:, None], places, -1)  # (N, S)
        if "labels" in examples[0]:
            batch["labels"] = sequence_labels(examples, torch.int64)
            if evaluation:
                # Texts are passed as bytes, because a batch holds tensors only and the task stores no rows.
                texts = [np.frombuffer(e["reference"].item(), np.uint8) for e in examples]
                batch["rows"] = torch.tensor([int(example["row"]) for example in examples])
                batch["reference"] = torch.from_numpy(np.concatenate(texts))
                batch["reference_sizes"] = torch.tensor([len(text) for text in texts])
        return batch

    def count(self, batch: Batch) -> Tensor:
        return count_examples(batch)

    def _scores(self, batch: Batch) -> Tensor:
        """Start and end scores of the tokens of each example, (N, S, 2); -inf after its end."""
        flat: Tensor = self.model(batch).float().reshape(-1, 2)
        places = batch["window_index"]
        return flat[places.clamp(min=0)].masked_fill((places < 0)[..., None], -math.inf)

    def _best(self, scores: Tensor, batch: Batch, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the best spans, (N, K), and their first and last characters (exclusive)."""
        places = batch["window_index"].clamp(min=0)
        starts, ends = batch["starts"].flatten()[places], batch["ends"].flatten()[places]
        allowed = (ends > starts) & (batch["window_index"] >= 0)
        values, first, last = best_spans(scores, allowed, self.max_answer_tokens, count)
        return values, starts.gather(1, first), ends.gather(1, last)

    def forward(self, batch: Batch) -> Loss:
        scores, labels = self._scores(batch), batch["labels"]  # (N, S, 2), (N, 2)
        total = (
            F.cross_entropy(scores.transpose(1, 2).flatten(0, 1), labels.flatten(), reduction="sum")
            / 2
        )
        if self.training or "reference" not in batch:
            return Loss(total, self.count(batch))
        values, begins, ends = (found[:, 0].tolist() for found in self._best(scores, batch, 1))
        nulls, rows = scores[:, 0].sum(-1).tolist(), batch["rows"].tolist()
        borders = batch["reference_sizes"].cpu().numpy().cumsum()[:-1]
        texts = np.split(batch["reference"].cpu().numpy(), borders)
        windows = []
        for k, text in enumerate(texts):
            base, context, answers = json.loads(text.tobytes())
            predicted = context[begins[k] - base : ends[k] - base] if values[k] > -math.inf else ""
            windows.append((rows[k], values[k], predicted, nulls[k], answers))
        return Loss(total, self.count(batch), {"windows": windows})

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Exact match and word F1 of the answers by the rules of SQuAD, averaged over questions."""
        found: dict[int, tuple[float, str, float, list[str]]] = {}
        for row, value, predicted, null, answers in metrics["windows"]:
            if row in found:
                other = found[row]
                value, predicted = max(
                    (other[0], other[1]), (value, predicted), key=lambda pair: pair[0]
                )
                null = min(null, other[2])
            found[row] = (value, predicted, null, answers)
        exact, f1 = [], []
        for value, predicted, null, answers in found.values():
            answer = "" if self._declines(value, null) else predicted
            exact.append(figures_of.exact_match(answer, answers))
            f1.append(figures_of.token_f1(answer, answers))
        return {
            "loss": total / count if count else math.nan,
            "exact_match": float(np.mean(exact)) if exact else math.nan,
            "f1": float(np.mean(f1)) if f1 else math.nan,
        }

    def _declines(self, best: float, null: float) -> bool:
        """Whether no answer is predicted instead of the best span."""
        return self.allow_no_answer and null - best > self.null_threshold

    # ------------------------------------------------------------------ answers

    def outputs(self, batch: Batch) -> list[Any]:
        """For each window its best spans (K, 3), as score, first and last character, and the score of no answer."""
        scores = self._scores(batch)
        found = torch.stack([t.float() for t in self._best(scores, batch, self.n_best)], dim=-1)
        nulls = scores[:, 0].sum(-1).tolist()
        return list(zip(found.detach().cpu().numpy(), nulls, strict=True))

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return the best span over all windows, with its ``start`` and ``end`` (characters of the context).

        Windows are compared by the sum of start and end score before any softmax, and a question has no answer only
        if all windows agree (the minimum of their no-answer scores), as is usual for SQuAD. ``score`` and
        ``no_answer_score`` are probabilities in a softmax over the best ``n_best`` spans and no answer. Without an
        answer, ``answer`` is empty and ``start`` and ``end`` are None.
        """
        best: dict[tuple[int, int], float] = {}
        for found, _ in outputs:
            for value, begin, end in found:
                if value > -math.inf:
                    place = (int(begin), int(end))
                    best[place] = max(best.get(place, -math.inf), float(value))
        null = min(null for _, null in outputs)
        places = sorted(best, key=lambda place: (-best[place], place))[: self.n_best]
        sums = np.array([null, *(best[place] for place in places)])
        chances = np.exp(sums - sums.max())
        chances /= chances.sum()
        none = {"answer": "", "start": None, "end": None, "score": float(chances[0])}
        if places and not self._declines(best[places[0]], null):
            begin, end = places[0]
            none = {"answer": infos[0][0][begin:end], "start": begin, "end": end}
            none["score"] = float(chances[1])
        return none | {"no_answer_score": float(chances[0])}


def best_spans(
    scores: Tensor, allowed: Tensor, longest: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the spans with the highest sum of start and end score by exhaustive search.

    Args:
        scores: (N, S, 2), start and end.
        allowed: (N, S), tokens at which a span may begin or end.
        longest: maximum tokens of a span.
        count: spans to find for each example.

    Returns:
        Sums (N, K), highest first, -inf where there are no more; first and last token of each, (N, K).
    """
    scores = scores.masked_fill(~allowed[..., None], -math.inf)
    width = min(longest, scores.shape[1])
    ends = F.pad(scores[..., 1], (0, width - 1), value=-math.inf).unfold(1, width, 1)
    sums = (scores[..., 0, None] + ends).flatten(1)  # (N, S * W)
    values, places = sums.topk(min(count, sums.shape[1]), dim=1)
    first = places // width
    return values, first, (first + places % width).clamp(max=scores.shape[1] - 1)


def _offsets(encoding: Any, context: str) -> tuple[np.ndarray, np.ndarray]:
    """First and last character (exclusive) of each context token, without blanks; 0 and 0 for other tokens.

    A token ends after the marks and joiners that follow it and belong to no token: uncased WordPiece drops them, and a
    composed character has the offsets of its first one.
    """
    texts, offsets = encoding.sequence_ids, encoding.offsets
    starts, ends = np.zeros((2, len(offsets)), dtype=np.int32)
    after = len(context)
    for k in range(len(offsets) - 1, -1, -1):
        if texts[k] == 1:
            begin, end = offsets[k]
            while begin < end and context[begin].isspace():
                begin += 1
            while begin < end and context[end - 1].isspace():
                end -= 1
            while begin < end < after and _continues(context[end]):
                end += 1
            starts[k], ends[k], after = begin, end, offsets[k][0]
    return starts, ends


def _continues(char: str) -> bool:
    """Whether a character is written onto the one before: a mark, or one of the two joiners."""
    return unicodedata.category(char)[0] == "M" or char in "\u200c\u200d"


def _seen(
    span: tuple[int, int], places: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[int, int] | None:
    """The span without characters at its ends that belong to no token of any window; None if no character does."""
    starts, ends = (np.concatenate(arrays) for arrays in zip(*places, strict=True))
    found = (ends > starts) & (starts < span[1]) & (ends > span[0])
    if not found.any():
        return None
    return max(span[0], int(starts[found].min())), min(span[1], int(ends[found].max()))


def _tokens_of(span: tuple[int, int] | None, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """First and last token of a span of characters, (2,); 0 and 0 if the tokens do not cover all of it."""
    real = np.flatnonzero(ends > starts)
    if span is None or not len(real) or starts[real[0]] > span[0] or ends[real[-1]] < span[1]:
        return np.zeros(2, dtype=np.int64)
    begin = real[np.flatnonzero(ends[real] > span[0])[0]]
    end = real[np.flatnonzero(starts[real] < span[1])[-1]]
    return np.array([begin, end] if begin <= end else [0, 0], dtype=np.int64)


def _reference(
    context: str, starts: np.ndarray, ends: np.ndarray, answers: Sequence[str]
) -> np.ndarray:
    """Serialise what evaluation needs of a window: the offset of its first character, its text, the correct answers."""
    real = ends > starts
    base, end = (int(starts[real].min()), int(ends[real].max())) if real.any() else (0, 0)
    text = json.dumps([base, context[base:end], list(answers)])
    return np.asarray(text.encode())
