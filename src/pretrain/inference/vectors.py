"""Similarity of texts, and exact search among them, by the cosines of their vectors.

Letters: N texts, Q queries, D hidden, K hits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.config.check import check_count
from pretrain.errors import DataError, ModelError
from pretrain.inference.fill import cut_texts, embed_counting
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["Hit", "search", "similarity"]

_TEXTS = 4096  # texts that are embedded and compared at once
_QUERIES = 1024  # queries that are compared with them at once


@dataclass(frozen=True)
class Hit:
    """One text that a search found.

    Attributes:
        index: its place among the texts, from 0.
        score: cosine of its vector and the query's.
        text: the text, or None if vectors were searched.
    """

    index: int
    score: float
    text: str | None


def similarity(model: Model, a: Any, b: Any = None, **options: Any) -> Tensor:
    """Return the cosine of every text in ``a`` and every text in ``b``.

    Args:
        model: any model with a tokenizer.
        a: a text, texts, or their vectors as a tensor or an array (N, D) or (D,).
        b: the same; None compares ``a`` with itself.
        **options: see ``embed``: ``pooling``, ``batch_size``, ``prompt``, ``prompt_name``.

    Returns:
        A tensor (len(a), len(b)) in fp32 on the CPU; a single text or vector counts as one. A vector of length zero has
        the cosine 0 with every other.

    Raises:
        ModelError, ConfigError: as ``embed`` does.
        DataError: vectors of another shape, or not finite.
    """
    rows = _said(model, *_units(model, a, options))
    columns = rows if b is None else _said(model, *_units(model, b, options))
    _check_widths(rows, columns)
    return (rows @ columns.T).clamp(-1, 1)  # rounding may exceed the bounds of a cosine


def search(
    model: Model,
    queries: Any,
    texts: Any,
    top_k: int = 10,
    *,
    text_prompt: str | None = None,
    **options: Any,
) -> Any:
    """Return the texts whose vectors have the largest cosines with a query's, by comparing it with all of them.

    Texts are embedded and compared 4,096 at a time, so that memory does not grow with their number. To search the same
    texts again, embed them once and give their vectors.

    Args:
        model: any model with a tokenizer.
        queries: a text, texts, or their vectors, (Q, D) for several or (D,) for one.
        texts: the texts to search, in any iterable, or their vectors (N, D): a tensor, or an array, which may be
            mapped from a file (``numpy.load("vectors.npy", mmap_mode="r")``).
        top_k: number of hits for each query; fewer if there are fewer texts.
        text_prompt: prefix of every text; None is the default prompt of the model's directory, if it has one.
        **options: see ``embed``. ``prompt`` and ``prompt_name`` are those of the queries.

    Returns:
        The hits of one query, best first, those of equal score in their order among the texts; for several queries a
        list with the hits of each.

    Raises:
        ModelError, ConfigError: as ``embed`` does, or ``top_k`` below 1.
        DataError: there are no texts, or vectors of another shape, or not finite.
    """
    check_count("top_k", top_k)
    wanted = _said(model, *_units(model, queries, options))
    others = {key: value for key, value in options.items() if key not in ("prompt", "prompt_name")}
    others["prompt"] = text_prompt
    scores = torch.empty(len(wanted), 0)
    indices = torch.empty(len(wanted), 0, dtype=torch.long)
    kept: dict[int, str] = {}
    count = cut = 0
    for part in _parts(texts):
        units, cut_here = _units(model, part, others)
        _check_widths(wanted, units)
        scores, indices = _best(wanted, units, count, scores, indices, top_k)
        if isinstance(part, list):
            kept |= {count + i: text for i, text in enumerate(part)}
            kept = {i: kept[i] for i in set(indices.flatten().tolist())}
        count, cut = count + len(units), cut + cut_here
    if not count:
        raise DataError("There are no texts to search. Give at least one.")
    if cut:
        note(cut_texts(model, cut, count))
    hits = [
        [Hit(i, score, kept.get(i)) for i, score in zip(places, values, strict=True)]
        for places, values in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
    single = isinstance(queries, str) or (_are_vectors(queries) and queries.ndim == 1)
    return hits[0] if single else hits


def _best(
    queries: Tensor, units: Tensor, first: int, scores: Tensor, indices: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Merge the best hits so far, (Q, K), with further texts, the first of which has the index ``first``."""
    merged = []
    for start in range(0, len(queries), _QUERIES):
        rows = slice(start, start + _QUERIES)
        new = (queries[rows] @ units.T).clamp(-1, 1)
        # Only the best of the new texts are sorted with the earlier ones. All that tie with the last of them are
        # among these, so that the lowest index of equal scores wins.
        most = min(top_k, new.shape[1])
        last = new.topk(most).values[:, -1:]
        width = int((new >= last).sum(1).max())
        places = new.topk(width).indices.sort(1).values
        both = torch.cat((scores[rows], new.gather(1, places)), 1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        known = torch.cat((indices[rows], places + first), 1)
        merged.append((both.gather(1, order), known.gather(1, order)))
    return torch.cat([best for best, _ in merged]), torch.cat([known for _, known in merged])


def _parts(texts: Any) -> Iterator[Any]:
    """Yield texts, or their vectors, a number of them at a time."""
    if _are_vectors(texts):
        rows = _vectors_in(texts)
        yield from (rows[start : start + _TEXTS] for start in range(0, len(rows), _TEXTS))
        return
    if not isinstance(texts, Iterable) or isinstance(texts, str):
        raise ModelError("The texts to search must be several: a list of texts, or their vectors.")
    rest = iter(texts)
    while part := list(islice(rest, _TEXTS)):
        yield part


def _are_vectors(given: Any) -> bool:
    """Whether something is a tensor or an array of numbers, and not texts, which a frame or an array may hold too."""
    return isinstance(given, Tensor) or (
        isinstance(given, np.ndarray) and given.dtype.kind in "fiu"
    )


def _vectors_in(given: Any) -> Any:
    """Return a tensor or an array of vectors with two axes."""
    if given.ndim not in (1, 2) or not given.shape[-1]:
        raise DataError(f"Vectors must have the shape (N, D) or (D,), not {tuple(given.shape)}.")
    return given[None] if given.ndim == 1 else given


def _units(model: Model, given: Any, options: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Return vectors of length one, (N, D) in fp32 on the CPU, and how many of the texts were cut."""
    if not _are_vectors(given):
        vectors, cut = embed_counting(model, given, **options)
        return normalize(vectors, dim=-1), cut
    rows = _vectors_in(given)
    if not isinstance(rows, Tensor):
        rows = torch.from_numpy(np.array(rows, dtype=np.float32))
    rows = rows.detach().float().cpu()
    if not bool(rows.isfinite().all()):
        raise DataError("A vector has values that are not finite. Remove it, or compute it again.")
    return normalize(rows, dim=-1), 0


def _said(model: Model, vectors: Tensor, cut: int) -> Tensor:
    if cut:
        note(cut_texts(model, cut, len(vectors)))
    return vectors


def _check_widths(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise DataError(
            f"Vectors of {a.shape[1]} and {b.shape[1]} values cannot be compared; they come from different models."
        )
