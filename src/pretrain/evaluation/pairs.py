"""Minimal pairs: how often a language model finds the better of two texts likelier, as in BLiMP.

Warstadt et al., 2020 (arXiv 1912.00582); masked models by Salazar et al., 2020 (1910.14659).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.labelled import Role
from pretrain.evaluation.embeddings import rows_with_texts
from pretrain.inference.likelihood import check_scores_texts, log_likelihood

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["minimal_pairs"]

# Log-likelihoods in fp32 that differ by less, in nats, differ by their rounding.
_EQUAL = 1e-4
_ROLES = (
    Role("good", ("sentence_good", "good"), help="the text that should be likelier"),
    Role("bad", ("sentence_bad", "bad"), help="the other one"),
    Role("group", ("UID", "group"), False, "what the pair tests; each group gets its own figure"),
)


def minimal_pairs(
    model: Model, data: Any, columns: Mapping[str, str], batch_rows: int, limit: int
) -> dict[str, float]:
    """Return how often the good text of a pair is likelier than the bad one.

    Args:
        model: a causal model, which scores a text by its log-likelihood, or a masked one, by its pseudo-log-likelihood:
            one row for every token of a text, so a sentence of 10 tokens costs ten times as much.
        data: rows with ``good``, ``bad`` and perhaps ``group``. Rows without one of the texts are left out and counted
            in a printed line.
        columns: role -> column.
        batch_rows: rows in one forward pass.
        limit: maximum number of pairs, spread evenly; 0 takes all.

    Returns:
        ``accuracy``, in which a tie counts one half (a model that says the same of all texts has 0.5), ``ties``, their
        share, ``targets``, the number of pairs, and ``accuracy/GROUP`` for each group. Log-likelihoods are sums, not
        means over tokens: in pairs of unequal length the shorter text has an advantage, as in BLiMP.
    """
    check_scores_texts(model)
    table = rows_with_texts(data, _ROLES, columns, ("good", "bad"), limit)
    good, bad = table.columns["good"], table.columns["bad"]
    texts = list(dict.fromkeys([*good, *bad]))  # each text is scored once
    scores = dict(
        zip(texts, log_likelihood(model, texts, batch_rows=batch_rows).tolist(), strict=True)
    )
    gaps = np.array([scores[a] - scores[b] for a, b in zip(good, bad, strict=True)])
    ties = np.abs(gaps) < _EQUAL
    right = np.where(ties, 0.5, gaps > 0)
    figures = {
        "accuracy": float(right.mean()),
        "ties": float(ties.mean()),
        "targets": float(len(right)),
    }
    groups: dict[str, list[float]] = {}
    for name, value in zip(table.columns.get("group", []), right.tolist(), strict=False):
        groups.setdefault(str(name), []).append(value)
    return figures | {f"accuracy/{name}": float(np.mean(v)) for name, v in groups.items()}
