"""Dropout by words of random bits, and attention by products beside the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pretrain.nn import kernels
from pretrain.nn.block import Block, BlockConfig
from pretrain.nn.kernels import dot_product_attention, dropout


@pytest.fixture
def products(monkeypatch):
    """Products on every CPU, fast or not; counts the calls."""
    calls = []
    real = kernels._products

    def counted(*args):
        calls.append(args[0].shape)
        return real(*args)

    monkeypatch.setattr(kernels, "_FAST_BF16", True)
    monkeypatch.setattr(kernels, "_products", counted)
    return calls


def parts(heads: int, shared: int, queries: int, keys: int) -> list[torch.Tensor]:
    """q, k, v in bf16 as the blocks make them: (B, T, H, d) with T and H exchanged."""
    generator = torch.Generator().manual_seed(queries)
    sizes = ((heads, queries), (shared, keys), (shared, keys))
    made = [torch.randn(2, n, h, 16, generator=generator) for h, n in sizes]
    return [x.bfloat16().transpose(1, 2).requires_grad_() for x in made]


def exact(q, k, v, added, causal, scale, factors=None):
    """The definition."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.mT
    if added is not None:
        scores = scores + added
    if causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    weights = scores.softmax(-1)
    return (weights if factors is None else weights * factors.view(weights.shape)) @ v


def compared(q, k, v, added, causal, drop=0.0):
    torch.manual_seed(5)
    found = dot_product_attention(q, k, v, added, causal, 0.3, drop)
    factors = None
    if drop:
        torch.manual_seed(5)
        rows = q.shape[1] * q.shape[2] // k.shape[1]
        factors = kernels._factors((2 * k.shape[1], rows, k.shape[2]), drop, torch.float64)
    given = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = exact(*given, None if added is None else added.detach().double(), causal, 0.3, factors)
    out = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        (found, *torch.autograd.grad(found, (q, k, v), out.to(found.dtype))),
        (wanted, *torch.autograd.grad(wanted, given, out.double())),
        strict=True,
    )
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_products_are_attention(products, heads: int, shared: int, drop: float):
    kinds = {
        "nothing": (5, 9, None, False),
        "causal": (9, 9, None, True),
        "padding": (9, 9, torch.zeros(2, 1, 1, 9).masked_fill_(torch.arange(9) > 6, -torch.inf), False),
        "of heads": (5, 9, torch.randn(1, heads, 5, 9, generator=torch.Generator().manual_seed(2)), False),
    }  # fmt: skip
    for name, (queries, keys, added, causal) in kinds.items():
        errors = compared(*parts(heads, shared, queries, keys), added, causal, drop)
        assert max(errors) < 0.01, (name, errors)  # bf16 has 8 bits
    assert len(products) == len(kinds)


def test_scores_are_not_rounded(products):
    """Scores of about 100 in bf16 would be wrong by up to 0.25, and the weights by a quarter."""
    q, k, v = parts(2, 2, 8, 8)
    errors = compared((q * 20).detach().requires_grad_(), k, v, None, False)
    assert max(errors) < 0.01


def test_a_learned_bias_gets_its_gradient(products):
    q, k, v = parts(2, 2, 4, 4)
    bias = torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    dot_product_attention(q, k, v, bias, False, 0.3, 0.0).square().sum().backward()
    assert float(bias.grad.abs().sum()) > 0
    assert not products


def test_other_cases_are_those_of_torch(products):
    q, k, v = (x.detach() for x in parts(2, 2, 4, 4))
    dot_product_attention(q.float(), k.float(), v.float(), None, False, 0.3, 0.0)
    dot_product_attention(q[:, :, :1], k, v, None, False, 0.3, 0.0)  # a token of a generation
    long = [x.repeat(1, 1, 200, 1) for x in (q, k, v)]
    dot_product_attention(*long, None, True, 0.3, 0.0)
    assert not products


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_checkpointed_blocks_have_the_same_gradients(products, mode: str, drop: float):
    torch.manual_seed(0)
    block = Block(BlockConfig(32, 2, 64, dropout=drop)).bfloat16()
    x = torch.randn(2, 6, 32).bfloat16()

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        block(x, mask=None).float().square().sum().backward()
        found = [p.grad.clone() for p in block.parameters()]
        block.zero_grad()
        return found

    plain, calls = gradients(), len(products)
    block.activation_checkpointing = mode
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert (
        len(products) == calls + 2
    )  # the second time in the backward pass, where "selective" finds the result


def test_the_operation_is_one_that_torch_can_compile():
    q, k, v = parts(4, 2, 5, 5)
    factors = kernels._factors((4, 10, 5), 0.1, torch.bfloat16)
    for args in ((q, k, v, None, None, True, 0.3), (q, k, v, None, factors, False, 0.3)):
        torch.library.opcheck(kernels._products, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share(dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 333, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.1)
    kept = float((y != 0).float().mean())
    assert abs(kept - 0.9) < 0.002
    assert abs(float(y.detach().float().mean()) - 1) < 0.005
    assert len(y.unique()) == 2
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    # Each value is dropped for itself, whichever part of a word decides.
    dropped = (y == 0).float().flatten()
    for step in (1, 2, 3, 4):
        together = float((dropped[step:] * dropped[:-step]).mean())
        assert abs(together - 0.01) < 0.001
        assert abs(float(dropped[step - 1 :: 4].mean()) - 0.1) < 0.004


def test_dropout_depends_on_the_seed_alone():
    x = torch.ones(7, 3)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(dropout(x, 0.5))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_dropout_of_nothing_and_of_all():
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 1.0), F.dropout(x, 1.0))
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
