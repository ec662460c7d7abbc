"""``pretrain.data(...)``: preview of labelled rows as fine-tuning reads them.

It shows class balance, lengths in tokens, and the tokens that the loss is computed on, as text or in a notebook.
"""

from __future__ import annotations

import itertools
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from pretrain.config.spelling import FINETUNE, using
from pretrain.data.chat import ROLE_KEYS
from pretrain.finetuning.job import Job
from pretrain.finetuning.keywords import from_keywords
from pretrain.finetuning.rows import open_data
from pretrain.finetuning.start import classes_of
from pretrain.objectives import check_options, task_class
from pretrain.printing import coloured, printable
from pretrain.utils.curves import histogram_svg
from pretrain.utils.html import Html, bullets, notebook_view, section, table

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.data.task_rows import TaskRows
    from pretrain.objectives.tasks import Learned, Task

__all__ = ["Overview", "look"]

Pieces = list[tuple[str, bool]]

_EXAMPLES = 3
_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_TEXT_CLASSES, _HTML_CLASSES = 12, 24
_HEAD, _TAIL = 60, 30  # tokens shown at the start and the end of a longer run of the same kind


@using(FINETUNE)
def look(
    data: Any,
    task: str = "classification",
    model: Any = None,
    *,
    tokenizer: Any = None,
    valid: Any = None,
    test: Any = None,
    **keywords: Any,
) -> Overview:
    """Show class balance, lengths, rows that will be truncated, and three examples as the model reads them.

    Args:
        data: rows, as for ``pretrain.finetune``.
        task: name of the task.
        model: the checkpoint that will be fine-tuned; its tokenizer and positions measure the rows. Without one
            lengths are in words.
        tokenizer: another name for ``model``.
        valid: held-out rows, or the fraction that is held out.
        test: test rows.
        **keywords: columns by role (``text="review"``), options of the task, ``max_length``.

    Returns:
        An overview that can be printed in a terminal and is rendered in a notebook.

    Raises:
        PretrainError: the rows cannot be used; the message says what to do.
    """
    model = tokenizer if model is None else model
    arguments = {"train": data, "valid": valid, "test": test, **keywords}
    settings, objects = from_keywords(None, "none" if model is None else model, task, arguments)
    cls = task_class(settings.task.name)
    check_options(cls, settings.task.options, settings.spell)
    settings.task.options = cls.settled(settings.task.options)
    read = open_data(settings, objects, cls, classes_of(model, cls))
    notes = list(read.notes)
    classes = {name: _classes(cls, getattr(read, name), read.learned) for name in read.counts}
    if not any(classes.values()):  # of parts of a row: words, pixels, objects
        notes += read.learned.classes
    common: dict[str, Any] = {
        "name": read.names["train"],
        "task": task,
        "rows": read.counts,
        "classes": {name: counts for name, counts in classes.items() if counts},
        "notes": notes,
    }
    if model is None and {"image", "audio"} & set(read.train.names):
        return Overview(**common)
    if model is None:
        # What only says what is right is not read by the model; the answers of a chat are.
        targets = {r.name for r in cls.roles if r.target and cls.head_kind != "causal-lm"}
        words = [
            _words([v for name, v in row.items() if name not in targets])
            for row in read.train.rows()
        ]
        notes.append("lengths are in words: name a model to count its tokens and see its examples")
        return Overview(**common, lengths=words)
    task_of_model = Job(model, settings, read, cls, quiet=True).build(seed=0)
    rows = task_of_model.encode(read.train)
    for reason, places in rows.dropped.items():
        notes.append(f"{len(places):,} rows are left out: {reason} ({read.train.where(places[0])})")
    for remark, places in rows.remarks.items():
        notes.append(f"{len(set(places)):,} rows: {remark} ({read.train.where(places[0])})")
    if rows.size:  # images and audio, which have no tokens to show
        notes.append(task_of_model.sizes(rows))
        return Overview(**common)
    return Overview(
        **common,
        beyond=task_of_model.beyond,
        tokenizer=os.path.basename(str(model)) if isinstance(model, str | os.PathLike) else "model",
        lengths=rows.lengths,
        max_length=task_of_model.max_length,
        cut=len(rows.cut),
        examples=_examples(task_of_model, read.train, rows),
    )


def _examples(task: Task, table: Table, rows: TaskRows) -> list[list[tuple[str, bool]]]:
    """A few examples as the model reads them; an answer for the whole text is appended to it."""
    chosen = _evenly_spaced(len(rows))
    truth = task.truth(table.take([rows.owners[i] for i in chosen])) if chosen else None
    shown = []
    for k, i in enumerate(chosen):
        pieces = task.show(rows[i])
        if truth is not None and not any(trained for _, trained in pieces):
            pieces.append((f" → {truth[k]}", True))
        shown.append(pieces)
    return shown


def _classes(cls: type[Task], table: Table, learned: Learned) -> dict[str, int]:
    """Number of rows of each class, in the order of the labels; empty if rows do not have one class each."""
    numbers = cls.classes(table, learned)
    if numbers is None:
        return {}
    counts = Counter(numbers)
    return {label: counts[k] for k, label in enumerate(learned.labels or ())}


def _words(value: Any) -> int:
    """Number of words in a text, or in all texts of a conversation or another nesting of them."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, Mapping):
        return sum(_words(item) for key, item in value.items() if key not in ROLE_KEYS)
    listed = value.tolist() if hasattr(value, "tolist") else value
    return sum(map(_words, listed)) if isinstance(listed, list | tuple) else 0


def _evenly_spaced(count: int) -> Sequence[int]:
    """A few indices, spread evenly over the whole range."""
    return sorted({i * count // _EXAMPLES for i in range(_EXAMPLES)} if count else ())


@dataclass(repr=False)
class Overview:
    """A summary of the data of a fine-tuning run, as text in a terminal or as HTML in a notebook.

    Args:
        name: the source: ``reviews.csv``.
        task: name of the task.
        tokenizer: origin of the tokenizer; "" if lengths are in words.
        rows: number of rows by split, training first.
        classes: number of rows by class, by split; empty for tasks without classes.
        lengths: tokens of each row, special tokens included, before truncation.
        max_length: the maximum row length of the model, in tokens.
        cut: number of rows that exceed it.
        beyond: how these rows are treated: ``cut``, ``dropped``, ``split into windows``.
        notes: further remarks for the user, one sentence each.
        examples: rows as pieces of text, one per token, with whether the loss is computed on the token; the pieces of a
            row concatenate to its text.
    """

    name: str
    task: str = ""
    tokenizer: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    max_length: int | None = None
    cut: int = 0
    beyond: str = "cut"
    notes: list[str] = field(default_factory=list)
    examples: list[Pieces] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Number of rows by split."""
        counts = [f"{count:,} {split}" for split, count in self.rows.items()]
        return f"{', '.join(counts)} rows" if counts else ""

    @property
    def subtitle(self) -> str:
        """Task and tokenizer."""
        parts = [
            self.task and f"task {self.task}",
            self.tokenizer and f"tokens of {self.tokenizer}",
        ]
        return " · ".join(part for part in parts if part)

    @property
    def length_line(self) -> str:
        """Median, 95th percentile and maximum of the lengths."""
        order, unit = sorted(self.lengths), "tokens" if self.tokenizer else "words"
        middle, most = order[(len(order) - 1) // 2], order[(len(order) - 1) * 95 // 100]
        return f"median {middle:,} {unit}, 95 % of rows up to {most:,}, longest {order[-1]:,}"

    @property
    def cut_line(self) -> str:
        """Number of rows that exceed the maximum length, and how they are treated."""
        limit, total = self.max_length, len(self.lengths)
        if limit is None:
            return ""
        if not self.cut:
            return f"no row exceeds {limit:,} tokens"
        verb = "exceeds" if self.cut == 1 else "exceed"
        share = _percent(self.cut, total)
        return f"{self.cut:,} of {total:,} rows ({share}) {verb} {limit:,} tokens: {self.beyond}"

    def _ranked(self, most: int) -> tuple[list[str], str]:
        """Return the ``most`` largest classes, by falling count, and a line about those that are not shown."""
        total: Counter[str] = Counter()
        for counts in self.classes.values():
            total.update(counts)
        labels = [label for label, _ in total.most_common()]
        if len(labels) <= most:
            return labels, ""
        rest = [total[label] for label in labels[most:]]
        span = f"{min(rest):,}" if min(rest) == max(rest) else f"{min(rest):,} to {max(rest):,}"
        return labels[:most], f"and {len(rest):,} more classes of {span} rows each"

    def __repr__(self) -> str:
        """Return the overview as text; tokens in the loss are coloured on a terminal, and otherwise set in «»."""
        marks = ("\x1b[1;32m", "\x1b[0m") if coloured(sys.stdout) else ("«", "»")
        blocks = [[self.name, self.title, self.subtitle]]
        if self.classes:
            blocks.append(["classes", *self._text_bars()])
        if self.lengths:
            chart = _text_histogram(self.lengths)
            blocks.append([f"lengths: {self.length_line}", *chart, self.cut_line])
        blocks.append([f"- {text}" for text in self.notes])
        lines = "\n\n".join(
            "\n".join(_one_line(line) for line in block if line) for block in blocks if any(block)
        )
        if not self.examples:
            return lines
        how = "in «»" if marks[0] == "«" else "coloured"
        shown = [f"  {k}  {_text_example(row, *marks)}" for k, row in enumerate(self.examples, 1)]
        return "\n".join([lines, "", f"examples (what the loss is computed on is {how})", *shown])

    def _text_bars(self) -> list[str]:
        labels, more = self._ranked(_TEXT_CLASSES)
        shown = {label: _fitted(_one_line(label), 28) for label in labels}
        width = max(map(_cells, shown.values()))
        first = next(iter(self.classes.values()))
        highest = max(1, *(first.get(label, 0) for label in labels))
        lines = []
        for label, text in shown.items():
            numbers = [
                f"{count.get(label, 0):>7,} {split} ({_percent(count.get(label, 0), sum(count.values()))})"
                for split, count in self.classes.items()
            ]
            pad, bar = " " * (width - _cells(text)), _bar(first.get(label, 0) / highest, 30)
            lines.append(f"  {text}{pad}  {bar}  {'  '.join(numbers)}")
        return [*lines, f"  {more}"] if more else lines

    def _repr_html_(self) -> str:
        """Return the overview as self-contained HTML that follows the light or dark mode of the reader's system."""
        parts = [f"<h2>{escape(self.name)}</h2>"]
        parts += [_soft(line) for line in (self.title, self.subtitle) if line]
        if self.classes:
            parts.append(section("Classes", self._html_bars()))
        if self.lengths:
            width, counts = _histogram(self.lengths, 60, self.max_length)
            longer = max(self.lengths) >= width * len(counts)
            unit = "tokens of a row" if self.tokenizer else "words of a row"
            chart = histogram_svg(counts, width, unit, open_end=longer, limit=self.max_length)
            lengths = _soft(self.length_line), chart, _soft(self.cut_line)
            parts.append(section("Lengths", *lengths))
        parts.append(section("Notes", bullets(self.notes)))
        if self.examples:
            title = "Examples (the loss is computed on the marked tokens)"
            parts.append(section(title, *map(_html_example, self.examples)))
        return notebook_view("overview", *parts)

    def _html_bars(self) -> str:
        labels, more = self._ranked(_HTML_CLASSES)
        totals = {split: max(1, sum(counts.values())) for split, counts in self.classes.items()}
        highest = max(
            counts.get(label, 0) / totals[split]
            for split, counts in self.classes.items()
            for label in labels
        )
        rows = []
        for label in labels:
            numbers = {split: counts.get(label, 0) for split, counts in self.classes.items()}
            bars = "".join(
                f'<div class="bar f{k % 3}" style="width:{100 * n / totals[split] / (highest or 1):.1f}%"></div>'
                for k, (split, n) in enumerate(numbers.items())
            )
            shares = (f"{n:,} ({_percent(n, totals[split])})" for split, n in numbers.items())
            rows.append([label, Html(f'<div class="bars">{bars}</div>'), *shares])
        return table(["", "", *self.classes], rows, left=2) + (_soft(more) if more else "")


def _soft(line: str) -> str:
    return f'<div class="soft">{escape(line)}</div>'


def _percent(count: int, total: int) -> str:
    share = 100 * count / total if total else 0.0
    if 0 < share < 0.01:
        return "<0.01 %"
    digits = 0 if share >= 10 or share == 0 else 1 if share >= 1 else 2
    return f"{share:.{digits}f} %"


def _one_line(text: str) -> str:
    return printable(text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " "))


def _cells(text: str) -> int:
    """Return the terminal columns of a text: wide characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _fitted(text: str, width: int) -> str:
    if _cells(text) <= width:
        return text
    while _cells(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    whole, rest = divmod(eighths, 8)
    return (_EIGHTHS[-1] * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _histogram(
    lengths: Sequence[int], bins: int, limit: int | None = None
) -> tuple[int, list[int]]:
    """Return (bin width, counts): bin k counts lengths from k x width up; the last bin includes all longer ones.

    A few very long rows should not squeeze all others into one bin, so the scale ends at the 99.5th percentile, or a
    little above the limit if rows exceed it.
    """
    order = sorted(lengths)
    top = order[(len(order) - 1) * 995 // 1000]
    if limit is not None and order[-1] > limit:
        top = max(top, min(order[-1], limit + max(1, limit // 8)))
    width = max(1, -(-(top + 1) // bins))
    counts = [0] * (top // width + 1)
    for length in order:
        counts[min(length // width, len(counts) - 1)] += 1
    return width, counts


def _text_histogram(lengths: Sequence[int]) -> list[str]:
    width, counts = _histogram(lengths, 60)
    highest = max(counts)
    bars = "".join(_BLOCKS[-(-count * 8 // highest)] for count in counts)
    last = width * (len(counts) - 1)
    tail = f"{last:,} or more" if max(lengths) >= last + width else f"{width * len(counts) - 1:,}"
    return [f"  {bars}", f"  0{tail:>{max(len(counts) - 1, len(tail) + 1)}}"]


def _runs(row: Pieces) -> Iterator[tuple[list[str], int, list[str], bool]]:
    """Group consecutive tokens of the same kind: (first tokens, number omitted, last tokens, whether in the loss)."""
    for trained, group in itertools.groupby(row, key=lambda piece: piece[1]):
        texts = [text for text, _ in group]
        hidden = len(texts) - _HEAD - _TAIL
        yield (
            (texts[:_HEAD], hidden, texts[-_TAIL:], trained)
            if hidden > 0
            else (texts, 0, [], trained)
        )


def _text_example(row: Pieces, before: str, after: str) -> str:
    parts = []
    for head, hidden, tail, trained in _runs(row):
        more = f" … {hidden:,} more tokens … " if hidden else ""
        text = f"{_one_line(''.join(head))}{more}{_one_line(''.join(tail))}"
        parts.append(f"{before}{text}{after}" if trained else text)
    return "".join(parts)


def _html_example(row: Pieces) -> str:
    parts = []
    for head, hidden, tail, trained in _runs(row):
        kind = "token on" if trained else "token"
        shown = [
            [f'<span class="{kind}">{_visible(text)}</span>' for text in t] for t in (head, tail)
        ]
        more = f'<i class="soft"> … {hidden:,} more tokens … </i>' if hidden else ""
        parts += [*shown[0], more, *shown[1]]
    return f'<pre dir="auto">{"".join(parts)}</pre>'


def _visible(text: str) -> str:
    shown = text.replace("\r\n", "\n").replace("\n", "⏎\n")
    return escape("".join(c if c.isprintable() or c in "\n\t" else "�" for c in shown))
