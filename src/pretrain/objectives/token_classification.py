"""Classification of words: named entities, parts of speech (Devlin et al., 2019, §5.3).

A word may be several sub-word tokens; its prediction is that of the first. Sentences that do not fit are read in
overlapping windows, and each word is predicted by the window in which it is farthest from an edge.

Letters: B rows of a batch, T tokens, N examples, C classes, M targets, D hidden.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pretrain import metrics as figures_of
from pretrain.config.spelling import option
from pretrain.data.columns import gathered_words, read_tags, read_words
from pretrain.data.labelled import Role, choose_columns, label_strata, make_tag_map
from pretrain.data.labels import LabelMap, flattened
from pretrain.data.task_rows import TaskEncoder, TaskRows, blanks_before_words, word_windows
from pretrain.errors import ConfigError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.tasks import ClassTask, Learned, class_codes
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["TokenClassification"]

_OVERLAP = 4  # windows overlap by 1 / _OVERLAP of their tokens
_OUTSIDE = "O"


class TokenClassification(ClassTask):
    """Predict the class of every word of a sentence.

    If the labels are span tags (``B-PER``, ``I-PER``, ``O``) the metric is the F1 of whole entities, else the accuracy
    over words.

    Args:
        model: a model with a token-classification head and ``labels``.
        all_pieces: train on every sub-word token of a word, not only the first; predictions always use the first.
        empty_tag: prediction for words that encode to no token (a zero-width character); None is ``"O"`` if that is
            a label, else the first label.
        word_blanks: if the tokenizer joins a word with the blank before it (byte-level BPE), encode the words of a
            list as they would be encoded in a text. This changes the model's tokenizer, which is saved with it, so
            that other libraries encode the same ids. Fine-tuning turns it on; off, the tokenizer is unchanged. None is
            for a model that another library trained: its tokenizer is unchanged and decides about lists, as in
            transformers, and the words of a text are encoded as they stand in it.
        codes: value in the column of tags -> label, if the two differ (tags that are numbers).
        class_weights, label_smoothing: see ``ClassTask``.
        max_length, pack: see ``Task``.

    Row options: ``labels``, the names of the tags in order.

    Raises:
        ConfigError: an option is out of range.
    """

    name: ClassVar[str] = "token-classification"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("tokens", ("tokens", "words", "text_tokens", "token", "word"), help="the words, as a list"),
        Role(
            "label", ("ner_tags", "tags", "labels", "pos_tags", "upos", "ner", "label", "tag"),
            help="one tag for each word, as a list", target=True,
        ),
    )  # fmt: skip
    metric: str = "f1"
    trivial_name: ClassVar[str] = "each word's most frequent tag"
    head_kind: ClassVar[str | None] = "token-classification"
    answer_key: ClassVar[str] = "tags"
    figures: ClassVar[tuple[str, ...] | None] = (
        "loss",
        "accuracy",
        "f1",
        "precision",
        "recall",
        "macro_f1",
    )
    # The codes, because rows that are evaluated later may spell the tags as the training rows did.
    recorded: ClassVar[tuple[str, ...]] = ("all_pieces", "empty_tag", "codes")

    def __init__(
        self,
        model: Model,
        *,
        all_pieces: bool = False,
        empty_tag: str | None = None,
        word_blanks: bool | None = False,
        codes: Mapping[str, str] | None = None,
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, class_weights, label_smoothing, max_length, pack)
        self.bio = figures_of.is_bio(self.labels)
        self.metric = "f1" if self.bio else "accuracy"
        if empty_tag is None:
            empty_tag = _OUTSIDE if _OUTSIDE in self.labels else self.labels[0]
        if empty_tag not in self.labels:
            raise ConfigError(
                f"empty_tag is {empty_tag!r}, which is not a label. The labels are: {', '.join(self.labels[:20])}."
            )
        self.all_pieces, self.empty_tag = all_pieces, empty_tag
        self.codes = dict(codes) if codes else None
        self._map = LabelMap(self.labels, class_codes(self.codes, self.labels))
        if word_blanks and model.tokenizer is not None:
            model.tokenizer = blanks_before_words(model.tokenizer)
        self.foreign = word_blanks is None

    @classmethod
    def gathered(cls, table: Table, columns: Mapping[str, Any]) -> Table:
        """Make a row of each sentence, where the source has one word in each."""
        given = {role: name for role, name in columns.items() if str(name) in table.columns}
        roles = [replace(role, required=False) for role in cls.roles]
        chosen = choose_columns(table, roles, given, quiet=True)
        return gathered_words(table, chosen.get("tokens"), chosen.get("label"))

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        words = read_words(table)
        tags = read_tags(table, words)
        known, ids = make_tag_map(
            tags,
            options.get("labels"),
            names=table.label_names.get("label"),
            checkpoint=options.get("checkpoint_labels"),
            where=table.where,
            column="tags",
        )
        named = [[known.labels[k] for k in row] for row in ids]
        counts = Counter(tag for row in named for tag in row)
        outside = _OUTSIDE in known.labels
        learned = Learned(known.labels, strata=label_strata(named))
        learned.options = {
            "empty_tag": _OUTSIDE if outside else max(counts, key=lambda tag: counts[tag]),
            "word_blanks": True,
            "codes": {code: known.labels[k] for code, k in known.codes.items()},
        }
        if len(table) > 1 and all(len(row) == 1 for row in words):
            learned.notes.append(
                "every row has one word, which is read without others; words of one sentence are read together if a "
                "column sentence_id numbers the sentences"
            )
        capital = {label: label[:1].upper() + label[1:] for label in known.labels}
        if not figures_of.is_bio(known.labels) and figures_of.is_bio(capital.values()):
            learned.notes.append(
                "the tags begin with small letters, by which no library finds entities, so accuracy over words is "
                f"measured; {option('labels', capital)} names them as usual"
            )
        elif outside and not figures_of.is_bio(known.labels):
            learned.notes.append(
                "there is a tag O, but the others are not B-, I-, E- or S- (or L-, U-) with a type: accuracy over "
                "words is measured, not entities"
            )
        elif all(label.isdecimal() for label in known.labels):
            learned.notes.append(
                "the tags are numbers without names, so accuracy over words is measured, not entities; "
                f"{option('labels', ['O', 'B-PER', ...])} names them"
            )
        return learned

    # ------------------------------------------------------------------ rows to examples

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        rows = TaskRows()
        sentences = read_words(table)
        tags = self.targets(table) if targets else None
        kept = []
        for i, words in enumerate(sentences):
            if words:
                kept.append(i)
            else:
                rows.drop(i, "no words")
        encoders = [self._encoder_of(cell) for cell in table.columns["tokens"]]
        encodings: dict[int, Any] = {}
        for encoder in dict.fromkeys(encoders):
            some = [i for i in kept if encoders[i] is encoder]
            found = encoder.words([sentences[i] for i in some]) if some else []
            encodings.update(zip(some, found, strict=True))
        if self.encoder_of_texts is not self.encoder and self.encoder in encoders:
            note(
                "the words of a list are read without the blanks before them, as transformers reads them with this "
                "tokenizer. If the model was trained on words with their blanks, set add_prefix_space to true in its "
                "tokenizer_config.json.",
                once=True,
            )
        for i in kept:
            encoding, words = encodings[i], sentences[i]
            if not encoding.ids:
                rows.drop(i, "no words that the tokenizer can see")
                continue
            windows, parts = [(0, len(words))], [encoding]
            if encoding.overflowing:
                windows, cut = _windows(encoding, len(words))
                rows.cut += [i] * cut
                parts = encoders[i].words([words[a:b] for a, b in windows])
            self._add(rows, i, words, None if tags is None else tags[i], windows, parts)
        if tags is not None:
            self.balance(np.concatenate([tags[i] for i in kept]) if kept else ())
        return rows

    @functools.cached_property
    def encoder_of_texts(self) -> TaskEncoder:
        """The encoder of the words of a text, which differs from `encoder` for some models of other libraries."""
        spaced = blanks_before_words(self.encoder.tokenizer) if self.foreign else None
        if spaced is None or spaced is self.encoder.tokenizer:
            return self.encoder
        made = copy.copy(self.encoder)
        made.tokenizer = spaced
        return made

    def _encoder_of(self, cell: Any) -> TaskEncoder:
        """Return the encoder of the words in a cell: a text with blanks between them, or a list, also a printed one."""
        text = isinstance(cell, str) and not cell.lstrip().startswith("[")
        return self.encoder_of_texts if text else self.encoder

    def _add(
        self,
        rows: TaskRows,
        i: int,
        words: Sequence[str],
        tags: np.ndarray | None,
        windows: Sequence[tuple[int, int]],
        encodings: Sequence[Any],
    ) -> None:
        """Add an example for each window over the words, which predicts those that are farthest from its edges."""
        begin = 0
        for k, (encoding, (offset, last)) in enumerate(zip(encodings, windows, strict=True)):
            end = last if k + 1 == len(windows) else (windows[k + 1][0] + last) // 2
            marks = np.full(len(encoding.ids), -1, np.int32)
            labels = np.full(len(encoding.ids), IGNORE, np.int64)
            before = None
            for place, inside in enumerate(encoding.word_ids):
                first, before = inside != before, inside
                if inside is None or not begin <= inside + offset < end:
                    continue
                if first:
                    marks[place] = inside + offset
                if tags is not None and (first or self.all_pieces):
                    labels[place] = tags[inside + offset]
            example: dict[str, Any] = {**self.encoder.example(encoding), "words": marks}
            if tags is not None:
                example |= {"labels": labels, "tags": tags, "row": np.asarray(i)}
            rows.add(i, example, words)
            begin = end

    def targets(self, table: Table) -> list[np.ndarray]:
        """The class numbers of the words of every row, (words,) each.

        Raises:
            DataError: a row has more or fewer tags than words, or a tag that is not among the model's labels.
        """
        tags = read_tags(table, read_words(table))
        flat, inside = flattened(tags, table.where)
        names = table.label_names.get("label")
        ids = iter(self.label_map.ids(flat, names=names, where=inside, column="tags"))
        return [np.asarray([next(ids) for _ in row], dtype=np.int64) for row in tags]

    def truth(self, table: Table) -> list[Any]:
        return [[self.labels[k] for k in row] for row in self.targets(table)]

    def mistake(self, truth: Any, answer: Mapping[str, Any]) -> float | None:
        """The highest score of a wrong tag."""
        rows = zip(truth, answer["tags"], answer["scores"], strict=True)
        return max((score for right, tag, score in rows if tag != right), default=None)

    def choices(self, answer: Mapping[str, Any]) -> list[Any]:
        return list(answer.get("tags", ()))

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Majority baseline per word: its most frequent tag in the training rows; for unseen words that of all."""
        if not len(held_out):
            return {}
        known: dict[str, Counter[int]] = {}
        every: Counter[int] = Counter()
        for words, tags in zip(read_words(train), self.targets(train), strict=True):
            for word, tag in zip(words, tags.tolist(), strict=True):
                known.setdefault(word, Counter())[tag] += 1
                every[tag] += 1
        tag_of = {word: tags.most_common(1)[0][0] for word, tags in known.items()}
        usual = every.most_common(1)[0][0]
        pairs = [
            (tags, np.asarray([tag_of.get(word, usual) for word in words], dtype=np.int64))
            for words, tags in zip(read_words(held_out), self.targets(held_out), strict=True)
            if words
        ]
        return self._scores(pairs) if pairs else {}

    # ------------------------------------------------------------------ batches and loss

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        labelled = "labels" in examples[0]
        keys = ({"labels": IGNORE} if labelled else {}) | ({"words": -1} if evaluation else {})
        batch = self.pack_batch(examples, keys)
        wanted = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        if labelled:
            wanted |= batch["labels"] != IGNORE
        if evaluation:
            wanted |= batch["words"] >= 0
        # Computed here, on the CPU, because on an accelerator it would synchronise every step.
        batch["target_index"] = wanted.flatten().nonzero().squeeze(1)
        if labelled and evaluation:
            batch["rows"] = torch.tensor([int(example["row"]) for example in examples])
            batch["tags"] = torch.from_numpy(np.concatenate([e["tags"] for e in examples]))
            batch["tag_counts"] = torch.tensor([len(example["tags"]) for example in examples])
        elif labelled:
            batch |= self.weights_of(batch["labels"])
        return batch

    def _logits(self, batch: Batch) -> Tensor:
        """Logits at the targets and at the words to predict, (M, C)."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "words")}
        hidden = self.model.backbone(inputs)  # (B, T, D)
        head: Any = self.model.head
        logits: Tensor = head(hidden.reshape(-1, hidden.shape[-1])[batch["target_index"]])
        return logits.float()

    def forward(self, batch: Batch) -> Loss:
        logits, index = self._logits(batch), batch["target_index"]
        weights = batch["weights"].flatten()[index] if "weights" in batch else None
        total = self.cross_entropy(logits, batch["labels"].flatten()[index], weights)
        if self.training or "words" not in batch:
            return Loss(total, self.count(batch))
        answers = _by_example(batch, logits.argmax(-1))
        tags = np.split(
            batch["tags"].cpu().numpy(), batch["tag_counts"].cpu().numpy().cumsum()[:-1]
        )
        rows = batch["rows"].tolist()
        sentences = [(row, *a, t) for row, a, t in zip(rows, answers, tags, strict=True)]
        return Loss(total, self.count(batch), {"sentences": sentences})

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Accuracy over all words, and precision, recall and F1 of entities, or the macro-averaged F1 of classes."""
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for row, words, classes, tags in metrics["sentences"]:
            blank = np.full(len(tags), self.labels.index(self.empty_tag))
            found.setdefault(row, (tags, blank))[1][words] = classes
        return {"loss": total / count if count else math.nan} | self._scores(list(found.values()))

    def _scores(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """Metrics of sentences, each given as the true and the predicted classes of its words."""
        true = np.concatenate([tags for tags, _ in pairs])
        predicted = np.concatenate([classes for _, classes in pairs])
        matrix = figures_of.confusion_matrix(true, predicted, len(self.labels))
        figures = {"accuracy": figures_of.accuracy(matrix)}
        if not self.bio:
            # Micro-averaged over words, F1 equals accuracy.
            return figures | {"f1": figures["accuracy"], "macro_f1": figures_of.macro_f1(matrix)}
        named = [[[self.labels[k] for k in row] for row in pair] for pair in pairs]
        scores = figures_of.entity_f1(
            figures_of.entity_counts([pair[0] for pair in named], [pair[1] for pair in named])
        )
        return figures | {key: float(scores[key]) for key in ("f1", "precision", "recall")}

    def expected_first_loss(self) -> float | None:
        """The log of the number of classes: an untrained head predicts a uniform distribution."""
        return math.log(len(self.labels))

    # ------------------------------------------------------------------ answers

    def outputs(self, batch: Batch) -> list[Any]:
        """For each example the indices of the words that it predicts, (w,), and their class probabilities, (w, C)."""
        return _by_example(batch, self._logits(batch).softmax(-1))

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``tags`` and their ``scores``, one of each per word, and ``entities``, empty without span tags.

        An entity has ``type``, ``start`` and ``end`` (words, the end exclusive), ``text`` and ``score``, the mean of
        those of its words. A word that encodes to no token has the ``empty_tag`` and the score 0.
        """
        words = infos[0]
        tags, scores = [self.empty_tag] * len(words), [0.0] * len(words)
        for places, chances in outputs:
            for word, row in zip(places.tolist(), chances, strict=True):
                best = int(row.argmax())
                tags[word], scores[word] = self.labels[best], float(row[best])
        spans = figures_of.entities(tags) if self.bio else []
        entities = [
            {
                "type": kind,
                "start": first,
                "end": last + 1,
                "text": " ".join(words[first : last + 1]),
                "score": float(np.mean(scores[first : last + 1])),
            }
            for kind, first, last in spans
        ]
        return {"tags": tags, "entities": entities, "scores": scores}


def _windows(encoding: Any, words: int) -> tuple[list[tuple[int, int]], bool]:
    """Return windows over the words of a sentence that is too long, and whether one of the words alone is."""
    room = len(encoding.ids) - sum(encoding.special_tokens_mask)
    sizes = np.zeros(words, np.int64)
    for part in (encoding, *encoding.overflowing):
        for word in part.word_ids:
            if word is not None:
                sizes[word] += 1
    return word_windows(sizes.tolist(), room, room // _OVERLAP), bool(sizes.max() > room)


def _by_example(batch: Batch, values: Tensor) -> list[Any]:
    """Split values computed at ``target_index`` by example: [(words (w,), values (w, ...)), ...]."""
    index = batch["target_index"].cpu().numpy()
    words = batch["words"].flatten().cpu().numpy()[index]
    begins = np.searchsorted(index, batch["first_index"].cpu().numpy())
    ends = np.searchsorted(index, batch["last_index"].cpu().numpy(), side="right")
    array, found = values.detach().cpu().numpy(), []
    for begin, end in zip(begins, ends, strict=True):
        asked = words[begin:end] >= 0
        found.append((words[begin:end][asked], array[begin:end][asked]))
    return found
