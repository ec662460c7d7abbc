"""Confusion matrix and worst mistakes for terminals and notebooks; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import DataError
from pretrain.printing import printable

__all__ = ["Confusion", "Errors"]

_MATRIX = 12  # labels up to which the whole matrix is shown
_PAIRS = 15
_WIDE = 18  # characters of a label in a terminal
_TEXT = 300  # characters of a text
_BORDER = "border:1px solid #8884;padding:4px 9px;"


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
        hits = self.matrix.diagonal().astype(float)
        wanted, said = self.matrix.sum(1), self.matrix.sum(0)
        precision = hits / np.maximum(said, 1)
        recall = hits / np.maximum(wanted, 1)
        f1 = 2 * hits / np.maximum(wanted + said, 1)
        return [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for label, p, r, f, n in zip(self.labels, precision, recall, f1, wanted, strict=True)
        ]  # fmt: skip

    @property
    def small(self) -> bool:
        """Whether the whole matrix is shown."""
        return len(self.labels) <= _MATRIX

    def __repr__(self) -> str:
        right, total = int(self.matrix.trace()), int(self.matrix.sum())
        top = f"Confusion of {len(self.labels)} classes, {right:,} of {total:,} right"
        if not self.small:
            rows = [[label, said, f"{n:,}"] for label, said, n in self.pairs()]
            return f"{top}; most confused:\n" + _aligned(
                [["right", "predicted", "times"], *rows], 2
            )
        head = ["right \\ predicted", *self.labels]
        body = [
            [label, *(f"{n:,}" for n in row)]
            for label, row in zip(self.labels, self.matrix, strict=True)
        ]
        return f"{top}\n" + _aligned([head, *body], 1)

    def _repr_html_(self) -> str:
        if not self.small:
            return _html_table(["right", "predicted", "times"], self.pairs(), left=2)
        head = "".join(f'<th style="{_BORDER}">{escape(label)}</th>' for label in self.labels)
        lines = [f'<tr><th style="{_BORDER}font-weight:400">right \\ predicted</th>{head}</tr>']
        for i, label in enumerate(self.labels):
            cells = "".join(self._cell(i, k) for k in range(len(self.labels)))
            lines.append(
                f'<tr><th style="{_BORDER}text-align:left">{escape(label)}</th>{cells}</tr>'
            )
        return f'<table style="border-collapse:collapse;width:auto">{"".join(lines)}</table>'

    def _cell(self, i: int, k: int) -> str:
        """A count on a background as strong as its share of the row: blue if correct, orange if wrong."""
        share = self.matrix[i, k] / max(1, self.matrix[i].sum())
        red, green, blue = (42, 111, 214) if i == k else (217, 72, 15)
        ground = f"background:rgba({red},{green},{blue},{share * 0.6:.2f});" if share else ""
        words = f"{self.labels[i]} taken for {self.labels[k]}: {share:.1%} of its rows"
        return (
            f'<td style="{_BORDER}{ground}text-align:right;font-variant-numeric:tabular-nums" '
            f'title="{escape(words)}">{int(self.matrix[i, k]):,}</td>'
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
            f"{_line(row.get('predicted'), 80)} ({_short(row.get('score'))})\n    {_line(row.get('text'), 110)}"
            for row in self.rows
        )

    def _repr_html_(self) -> str:
        if not self.rows:
            return "<p>no mistakes</p>"
        return _html_table(
            ["where", "text", "right", "predicted", "score"],
            [
                [
                    _line(row.get("where"), 200), _line(row.get("text"), _TEXT), _line(row.get("label"), 120),
                    _line(row.get("predicted"), 120), _short(row.get("score")),
                ]
                for row in self.rows
            ],
            left=4,
        )  # fmt: skip


def _html_table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int) -> str:
    side = ["left" if i < left else "right" for i in range(len(head))]
    top = "".join(
        f'<th style="{_BORDER}text-align:{s}">{escape(text)}</th>'
        for text, s in zip(head, side, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{_BORDER}text-align:{s};vertical-align:top;overflow-wrap:break-word">{escape(str(value))}</td>'
            for value, s in zip(row, side, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table style="border-collapse:collapse">{f"<tr>{top}</tr>"}{body}</table>'


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Align columns for a terminal: the first ``left`` to the left, numbers to the right."""
    cells = [[_line(cell, _WIDE) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _line(value: Any, limit: int) -> str:
    """A value on one line without terminal control characters, truncated to ``limit``."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        value = ", ".join(value) or "none"
    text = printable(str(value)).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, int | float) else _line(value, 40)
