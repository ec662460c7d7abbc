"""Confusion matrix and worst mistakes for terminals and notebooks; all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import DataError
from pretrain.metrics import per_class
from pretrain.printing import aligned, printable
from pretrain.utils.html import Html, notebook_view, show, table

__all__ = ["Confusion", "Errors"]

_MATRIX = 12  # labels up to which the whole matrix is shown
_PAIRS = 15
_WIDE = 18  # characters of a label in a terminal
_TEXT = 300  # characters of a text in a notebook


class Confusion:
    """Confusion matrix: how often each class was predicted for each class.

    Args:
        labels: the C classes.
        matrix: (C, C) counts; row: the right class, column: the predicted one.

    Raises:
        DataError: the matrix has another shape, or holds negative counts.
    """

    def __init__(self, labels: Sequence[str], matrix: Any) -> None:
        self.labels = tuple(map(str, labels))
        self.matrix: NDArray[np.int64] = np.asarray(matrix, dtype=np.int64)
        if self.matrix.shape != (len(self.labels),) * 2 or (self.matrix < 0).any():
            raise DataError(
                f"A confusion matrix of {len(self.labels)} labels has that many rows and columns of counts; found the "
                f"shape {self.matrix.shape}{', with negative counts' if (self.matrix < 0).any() else ''}."
            )

    def pairs(self, count: int = _PAIRS) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: (right class, predicted class, how often), most frequent first."""
        wrong = self.matrix * (1 - np.eye(len(self.labels), dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        places = [divmod(int(i), len(self.labels)) for i in order]
        return [
            (self.labels[i], self.labels[k], int(wrong[i, k])) for i, k in places if wrong[i, k]
        ]

    def per_class(self) -> list[dict[str, Any]]:
        """``label, precision, recall, f1, support`` of every class; a class never predicted has precision 0."""
        columns = (self.labels, *(column.tolist() for column in per_class(self.matrix)))
        names = ("label", "precision", "recall", "f1", "support")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        return [row | {"support": int(row["support"])} for row in rows]

    @property
    def small(self) -> bool:
        """Whether the whole matrix is shown."""
        return len(self.labels) <= _MATRIX

    def __repr__(self) -> str:
        right, total = int(self.matrix.trace()), int(self.matrix.sum())
        top = f"Confusion of {len(self.labels)} classes, {right:,} of {total:,} right"
        if self.small:
            rows = [
                (label, *(f"{n:,}" for n in row))
                for label, row in zip(self.labels, self.matrix, strict=True)
            ]
            rows, left = [("right \\ predicted", *self.labels), *rows], 1
        else:
            rows = [(label, said, f"{n:,}") for label, said, n in self.pairs()]
            rows, left, top = [("right", "predicted", "times"), *rows], 2, f"{top}; most confused:"
        return "\n".join([top, *aligned([[_line(c, _WIDE) for c in row] for row in rows], left)])

    def html(self) -> str:
        """The matrix, or the most frequent mistakes if it is large, as HTML without a style of its own."""
        if not self.small:
            return table(["right", "predicted", "times"], self.pairs(), left=2)
        classes = range(len(self.labels))
        rows = [[self.labels[i], *(self._cell(i, k) for k in classes)] for i in classes]
        return table(["right \\ predicted", *self.labels], rows)

    def _repr_html_(self) -> str:
        return notebook_view("confusion", self.html())

    def _cell(self, i: int, k: int) -> Html:
        """A count on a background as strong as its share of the row: blue if correct, orange if wrong."""
        share = self.matrix[i, k] / max(1, self.matrix[i].sum())
        colour = "42,111,214" if i == k else "217,72,15"
        words = f"{self.labels[i]} taken for {self.labels[k]}: {share:.1%} of its rows"
        return Html(
            f'<span class="heat" style="background:rgba({colour},{share * 0.6:.2f})" title="{escape(words)}">'
            f"{int(self.matrix[i, k]):,}</span>"
        )


@dataclass(repr=False)
class Errors(Sequence[Mapping[str, Any]]):
    """Mistakes, the worst first.

    Args:
        rows: each ``where`` (place in the source), ``text``, ``label`` (the right answer), ``predicted`` and
            ``score`` (how sure the model was, or how far off).
    """

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return Errors(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __repr__(self) -> str:
        if not self.rows:
            return "no mistakes"
        return "\n".join(
            f"{_line(row.get('where'), 80)}: {_line(row.get('label'), 80)} taken for "
            f"{_line(row.get('predicted'), 80)} ({_short(row.get('score'))})\n"
            f"    {_line(row.get('text'), 110)}"
            for row in self.rows
        )

    def html(self, text: int = _TEXT) -> str:
        """A table as HTML without a style of its own; texts are truncated to ``text`` characters."""
        rows = [
            [
                _line(row.get("text"), text), _line(row.get("label"), 120), _line(row.get("predicted"), 120),
                row.get("score"), _line(row.get("where"), 200),
            ]
            for row in self.rows
        ]  # fmt: skip
        return table(["text", "right", "predicted", "score", "where"], rows, left=5)

    def _repr_html_(self) -> str:
        return notebook_view("errors", self.html() if self.rows else "<p>no mistakes</p>")


def _line(value: Any, limit: int) -> str:
    """A value on one line without terminal control characters, truncated to ``limit``."""
    text = printable(show(value)).strip() if value not in ([], ()) else "none"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, int | float) else _line(value, 40)
