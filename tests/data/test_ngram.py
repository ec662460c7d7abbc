"""The Kneser-Ney baseline against a count by hand, a plain implementation, and the laws of probability."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.ngram import KneserNey
from pretrain.errors import DataError

Documents = list[list[int]]
START = -1


def rows(documents: Documents, length: int = 12) -> dict[str, np.ndarray]:
    """Documents one after the other in rows, cut at the end of a row as packing does."""
    ids, numbers, row = [[]], [[]], 0
    for document in documents:
        rest = list(document)
        while rest:
            room = length - len(ids[-1])
            if room == 0:
                ids.append([])
                numbers.append([])
                row, room = row + 1, length
            number = (numbers[-1][-1] if numbers[-1] else 0) + 1
            part, rest = rest[:room], rest[room:]
            ids[-1] += part
            numbers[-1] += [number] * len(part)
    pad = length - len(ids[-1])
    ids[-1] += [0] * pad
    numbers[-1] += [0] * pad
    return {"input_ids": np.array(ids), "document_ids": np.array(numbers)}


def pieces(batch: dict[str, np.ndarray]) -> Documents:
    """The documents of rows, as a model sees them."""
    found = []
    for ids, numbers in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for number in range(1, numbers.max() + 1):
            found.append([int(i) for i in ids[numbers == number]])
    return found


class Plain:
    """The textbook's formulas with dictionaries, one n-gram at a time."""

    def __init__(self, documents: Documents, vocab: int) -> None:
        self.vocab = vocab
        trigrams = Counter(gram for one in documents for gram in self.grams(one))
        before2: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for u, v, w in trigrams:
            before2[v, w].add(u)
        before1: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for v, w in before2:
            before1[(w,)].add(v)
        self.counts: list[dict[tuple[int, ...], int]] = [
            {key: len(value) for key, value in before1.items()},
            {key: len(value) for key, value in before2.items()},
            dict(trigrams),
        ]

    @staticmethod
    def grams(document: list[int]) -> list[tuple[int, int, int]]:
        whole = [START, *document]
        return [(whole[i], whole[i + 1], whole[i + 2]) for i in range(len(whole) - 2)]

    def discount(self, n: int, count: int) -> float:
        of = Counter(self.counts[n].values())
        y = of[1] / max(1, of[1] + 2 * of[2])
        found = 0.0
        for k in range(1, min(count, 3) + 1):
            if of[k]:
                found = k - (k + 1) * y * of[k + 1] / of[k]
            found = min(max(found, 0.1), k)
        return found

    def probability(self, gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / self.vocab
        n = len(gram) - 1
        lower = self.probability(gram[1:])
        same = {key: c for key, c in self.counts[n].items() if key[:-1] == gram[:-1]}
        if not same:
            return lower
        total = sum(same.values())
        left = sum(self.discount(n, c) for c in same.values())
        own = same.get(gram, 0)
        return (own - self.discount(n, own) if own else 0.0) / total + left / total * lower

    def loss(self, documents: Documents) -> float:
        values = [-math.log(self.probability(g)) for one in documents for g in self.grams(one)]
        return sum(values) / len(values)


def test_probabilities_by_hand() -> None:
    """One document ``0 1 0 1 2`` of a vocabulary of 4: every probability of the token after 0 1.

    Trigrams (^ begins it): ^01, 010, 101, 012, once each; so y = 1, all discounts of order 3 are 1 - 2*0 = 1, and after
    0 1 everything is left to order 2. Pairs and how many tokens precede them: 01: 2 (^ and 1), 10: 1, 12: 1;
    y = 2 / (2 + 2*1) = 1/2, so the discount of 1 is 1 - 2 * 1/2 * 1/2 = 1/2. After 1: 0 and 2 keep 1/4 each, 1/2 is
    left. Tokens and how many precede them: 1, 0 and 2 once each (after 0, 1, 1): discount 1, all is left to 1/4.
    """
    model = KneserNey([rows([[0, 1, 0, 1, 2]], 5)], 4)
    after = np.array([model._probabilities(np.array([(0 * 5 + 1) * 5 + w]))[0] for w in range(4)])
    assert after == pytest.approx([1 / 4 + 1 / 8, 1 / 8, 1 / 4 + 1 / 8, 1 / 8], abs=1e-12)
    # After ^ 0 the pair 01 has the discount 2 - 3 * 1/2 * 0 = 2, so nothing is kept there either: uniform.
    assert model.loss([rows([[0, 1]], 5)]) == pytest.approx(math.log(4))


texts = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(texts, texts)
def test_model_equals_a_plain_implementation_and_sums_to_one(
    train: Documents, valid: Documents
) -> None:
    batch, held_out = rows(train), rows(valid)
    if not any(len(piece) > 1 for piece in pieces(batch)):
        with pytest.raises(DataError, match="no token to count"):
            KneserNey([batch], 6)
        return
    model, plain = KneserNey([batch], 6), Plain(pieces(batch), 6)
    contexts = np.array([u * 7 + v for u, v in itertools.product(range(7), range(6))])
    table = np.stack([model._probabilities(contexts * 7 + w) for w in range(6)], axis=1)
    assert np.allclose(table.sum(axis=1), 1, atol=1e-12) and (table > 0).all()
    loss = model.loss([held_out])
    if any(len(piece) > 1 for piece in pieces(held_out)):
        assert loss == pytest.approx(plain.loss(pieces(held_out)), rel=1e-12)
    else:
        assert math.isnan(loss)


def test_batches_do_not_matter() -> None:
    ids = np.random.default_rng(0).integers(0, 50, size=(40, 16))
    whole = {"input_ids": ids, "document_ids": np.ones_like(ids)}
    parts = [{key: value[i : i + 7] for key, value in whole.items()} for i in range(0, 40, 7)]
    assert KneserNey([whole], 50).loss([whole]) == pytest.approx(KneserNey(parts, 50).loss(parts))


def test_counting_a_million_tokens_takes_seconds() -> None:
    # Zipf-like text of 200,000 tokens; the bound is ten times what it takes on an idle core.
    ids = np.minimum(np.random.default_rng(0).zipf(1.2, size=(800, 250)), 4095)
    batch = {"input_ids": ids, "document_ids": np.ones_like(ids)}
    began = time.process_time()
    KneserNey([batch], 4096).loss([batch])
    assert time.process_time() - began < 2.0
