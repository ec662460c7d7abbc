"""Masks, windows, caches, and the per-document kernel against the dense one."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.nn import packed
from pretrain.nn.attention import Attention, AttentionMask, KVCache, attend
from pretrain.nn.block import Block, BlockConfig
from pretrain.nn.packed import plan, sequence_offsets


def rule(documents, causal: bool, window: int | None, queries: int) -> np.ndarray:
    """The definition of the mask, one pair at a time."""
    ids = np.asarray(documents)
    rows, keys = ids.shape
    seen = np.zeros((rows, 1, queries, keys), dtype=bool)
    for b in range(rows):
        for i in range(queries):
            at = keys - queries + i
            for j in range(keys):
                seen[b, 0, i, j] = (
                    ids[b, at] == ids[b, j]
                    and (not causal or j <= at)
                    and (window is None or abs(at - j) <= window)
                )
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 2, 100])
@pytest.mark.parametrize("queries", [6, 3, 1])
def test_dense_mask_is_the_definition(causal: bool, window: int | None, queries: int):
    documents = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    mask = AttentionMask(causal, documents, window)
    dense = mask.dense(queries, 6, torch.device("cpu"))
    wanted = rule(documents, causal, window, queries)
    assert np.array_equal(dense.expand(wanted.shape).numpy(), wanted)
    assert mask.dense(queries, 6, torch.device("cpu")) is dense


def test_ids_without_effect_are_dropped():
    ids = torch.zeros(2, 4, dtype=torch.long)

    def documents(values, causal):
        batch = {"input_ids": ids, "attention_mask": torch.tensor(values)}
        return AttentionMask.from_batch(batch, causal=causal).documents

    right, left = [[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert documents([[1] * 4] * 2, False) is None
    assert documents(right, True) is None
    assert documents(right, False) is not None
    assert documents(left, True) is not None
    assert documents([[1, 1, 2, 2]] * 2, True) is not None
    assert documents([[1, 0, 1, 1]] * 2, True) is not None


def test_a_fully_padded_row_gives_no_nan():
    q = torch.randn(2, 2, 4, 8)
    for causal in (True, False):
        mask = AttentionMask(causal, torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]]), 1)
        assert torch.isfinite(attend(q, q, q, mask, 1.0, 0.0)).all()


def packed_documents(seed: int, rows: int, length: int, mean: float, padding: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int64)
    for row in ids:
        at, number = 0, 0
        while at < length - padding:
            size = int(min(length - padding - at, 1 + rng.exponential(mean)))
            number += 1
            row[at : at + size] = number
            at += size
    return torch.from_numpy(ids)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_per_document_kernel_equals_dense(
    causal: bool, window: int | None, padding: int, kv_heads: int
):
    documents = packed_documents(0, 3, 192, 24, padding)
    real = documents != 0
    results = []
    for dense in (True, False):
        torch.manual_seed(0)
        q = torch.randn(3, 192, 4, 8).transpose(1, 2).requires_grad_()
        k, v = (torch.randn(3, 192, kv_heads, 8).transpose(1, 2).requires_grad_() for _ in range(2))
        mask = AttentionMask(causal, documents).windowed(window)
        mask._shared["buckets"] = None if dense else plan(documents)
        out = attend(q, k, v, mask, 0.3, 0.0)[real[:, None].expand(3, 4, 192)]
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_per_document_kernel_keeps_the_type():
    documents = packed_documents(0, 2, 64, 9, 0)
    mask = AttentionMask(True, documents)
    mask._shared["buckets"] = plan(documents)
    q = torch.randn(2, 2, 64, 8, dtype=torch.bfloat16, requires_grad=True)
    out = attend(q, q, q, mask, 0.3, 0.0)
    out.sum().backward()
    assert out.dtype == q.grad.dtype == torch.bfloat16
    exact = attend(q.float(), q.float(), q.float(), mask, 0.3, 0.0)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(8, 80),
    st.floats(1, 30),
    st.integers(0, 7),
)
def test_plan_is_a_bijection(seed: int, rows: int, length: int, mean: float, padding: int):
    documents = packed_documents(seed, rows, length, mean, padding)
    buckets = plan(documents)
    if buckets is None:
        assert not documents.any()
        return
    flat = documents.reshape(-1)
    tokens = torch.arange(flat.numel()) if buckets.tokens is None else buckets.tokens
    assert torch.equal(tokens.sort().values, (flat != 0).nonzero().squeeze(1))
    assert buckets.slots.unique().numel() == tokens.numel() <= buckets.total
    assert int(buckets.slots.max()) < buckets.total == sum(n * size for n, size in buckets.shapes)
    where = torch.full((buckets.total,), -1)
    where[buckets.slots] = tokens
    start = 0
    for (n, size), lengths in zip(buckets.shapes, buckets.lengths, strict=True):
        for document in range(n):
            places = where[start : start + size]
            held = places[: int(lengths[document])]
            assert (places[int(lengths[document]) :] == -1).all()
            assert torch.equal(held, torch.arange(int(held[0]), int(held[0]) + held.numel()))
            assert flat[held].unique().numel() == 1
            start += size


@pytest.mark.parametrize("products", [False, True])
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_the_buckets_are_those_that_cost_least(products: bool, sizes: list[int]):
    ids = [i for i, size in enumerate(sizes, start=1) for _ in range(size)]
    with mock.patch.object(packed, "multiplies_rows", return_value=products):
        buckets = plan(torch.tensor([ids]))
        cost = sum(packed._cost(count, width, torch.float32) for count, width in buckets.shapes)

        ordered, step = sorted(sizes), 16 if products else 1
        # Documents whose sizes are the same in steps of eight are in one bucket.
        cuts = [i for i in range(1, len(sizes)) if -(-ordered[i] // 8) != -(-ordered[i - 1] // 8)]
        for chosen in itertools.chain.from_iterable(
            itertools.combinations(cuts, count) for count in range(len(cuts) + 1)
        ):
            ends = [*chosen, len(sizes)]
            others = [
                packed._cost(end - begin, -(-ordered[end - 1] // step) * step, torch.float32)
                for begin, end in zip([0, *chosen], ends, strict=True)
            ]
            assert cost <= sum(others)
    assert all(width % step == 0 for _, width in buckets.shapes)


def test_the_kernel_follows_the_documents():
    assert plan(torch.tensor([[1, 2, 1, 2] * 32])) is None
    assert plan(torch.zeros(2, 64, dtype=torch.long)) is None
    assert AttentionMask(True, torch.ones(2, 512, dtype=torch.long)).buckets(torch.float32) is None
    short = AttentionMask(True, packed_documents(0, 8, 512, 40, 0))
    assert short.buckets(torch.float32) is not None
    assert short.windowed(7).buckets(torch.float32) is short.buckets(torch.float32), (
        "planned once for all layers"
    )


def test_one_document_does_not_move_another_under_the_per_document_kernel():
    documents = packed_documents(3, 2, 256, 20, 0)
    mask = AttentionMask(True, documents)
    mask._shared["buckets"] = plan(documents)
    x = torch.randn(2, 256, 2, 8).transpose(1, 2)
    changed = x.clone()
    changed[0, :, : int((documents[0] == 1).sum())] += 1.0
    out, other = (attend(value, value, value, mask, 1.0, 0.0) for value in (x, changed))
    same = documents != 1
    same[1] = True
    keep = same[:, None].expand(2, 2, 256)
    assert torch.equal(out[keep], other[keep])


def test_cache_in_steps_equals_the_whole():
    torch.manual_seed(0)
    attention = Attention(32, 4, 2, 8, bias=True)
    x = torch.randn(2, 7, 32)
    whole = attention(x, mask=AttentionMask(True, None, 3))
    cache, parts = KVCache(7), []
    for a, b in ((0, 4), (4, 6), (6, 7)):
        parts.append(attention(x[:, a:b], mask=AttentionMask(True, None, 3), cache=cache))
        cache.advance(b - a)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    cache.select(torch.tensor([1]))
    assert cache.append(0, torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8))[0].shape == (
        1,
        2,
        7,
        8,
    )


def test_bias_is_added_and_trained():
    bias = torch.randn(1, 2, 5, 5, requires_grad=True)
    q = torch.randn(1, 2, 5, 8)
    out = attend(q, q, q, AttentionMask(True, None, None, bias), 0.5, 0.0)
    scores = 0.5 * q @ q.transpose(-1, -2) + bias
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
    torch.testing.assert_close(out, scores.softmax(-1) @ q)
    out.sum().backward()
    assert bias.grad is not None


def test_cross_attention_reads_its_context():
    block = Block(BlockConfig(16, 2, 32, cross_attention=True))
    x, context = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    out = block(x, mask=None, context=context)
    assert out.shape == x.shape
    assert not torch.equal(out, block(x, mask=None, context=context + 1))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_dropout_only_while_training(pre_norm: bool):
    block = Block(BlockConfig(16, 2, 32, pre_norm=pre_norm, dropout=0.5))
    x = torch.randn(1, 4, 16)
    assert not torch.equal(block(x, mask=None), block(x, mask=None))
    block.eval()
    assert torch.equal(block(x, mask=None), block(x, mask=None))


# ---------------------------------------------------------------------------- FlashAttention, of which a CPU has none


def sequences_one_by_one(
    *args: Any, scale: float, window_size_left: int, window_size_right: int
) -> tuple[torch.Tensor]:
    """What ``aten._flash_attention_forward`` is documented to compute, for (tokens, heads, size) and offsets."""
    q, k, v, begins, _, longest, _, dropout, causal, _ = args
    assert dropout == 0.0 and begins.dtype is torch.int32
    parts = []
    for first, last in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        assert 0 <= last - first <= longest
        if first == last:
            continue
        away = torch.arange(last - first)[None, :] - torch.arange(last - first)[:, None]
        seen = away <= 0 if causal else torch.ones_like(away, dtype=torch.bool)
        seen &= away >= -window_size_left if window_size_left >= 0 else True
        seen &= away <= window_size_right if window_size_right >= 0 else True
        one = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=seen, scale=scale)
        parts.append(mixed[0].transpose(0, 1))
    return (torch.cat(parts),)


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    length=st.integers(1, 40),
    causal=st.booleans(),
    window=st.sampled_from([None, 0, 3, 100]),
)
@settings(max_examples=40, deadline=None)
def test_attention_by_sequences_equals_dense(
    seed: int, rows: int, length: int, causal: bool, window: int | None
):
    rng = np.random.default_rng(seed)
    documents = np.sort(rng.integers(1, 5, (rows, length)), axis=1)
    for row in documents:
        row[length - rng.integers(0, length) :] = 0
    q, k, v = (torch.randn(rows, h, length, 8) for h in (4, 2, 2))
    dense = AttentionMask(causal, torch.from_numpy(documents), window)
    dense._shared["buckets"] = None
    expected = attend(q, k, v, dense, 0.3, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.nn.attention.has_sequence_kernel", lambda *_: True)
        patch.setattr(torch.ops.aten, "_flash_attention_forward", sequences_one_by_one)
        found = attend(q, k, v, AttentionMask(causal, torch.from_numpy(documents), window), 0.3, 0)
    real = torch.from_numpy(documents != 0)[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[real], expected[real])
    assert found.isfinite().all()


def test_offsets_of_documents():
    documents = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    offsets = sequence_offsets(documents)
    assert offsets is not None and len(offsets) == 64
    assert offsets.tolist() == [0, 2, 5, 6, *[12] * 60]
    # A hundred documents: the length is a power of two that leaves room for the end.
    assert len(sequence_offsets(torch.arange(1, 101)[None])) == 128
    assert len(sequence_offsets(torch.arange(1, 65)[None])) == 128
    assert sequence_offsets(torch.tensor([[1, 2, 1]])) is None
    assert sequence_offsets(torch.tensor([[0, 1, 0, 0]])) is not None
