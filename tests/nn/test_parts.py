"""Norms, activations and rotary positions against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pretrain.errors import ConfigError
from pretrain.nn.attention import AttentionMask
from pretrain.nn.block import Block, BlockConfig
from pretrain.nn.mlp import ACTIVATIONS, MLP
from pretrain.nn.norm import LayerNorm, RMSNorm, build_norm
from pretrain.nn.positions import RotaryTable, check_rope, document_positions, rotate


def test_rms_norm_and_its_gradient():
    norm = RMSNorm(12, 1e-6).double()
    x = torch.randn(3, 5, 12, dtype=torch.double, requires_grad=True)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-6))
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(norm, {"weight": w}, (x,)), (norm.weight,)
    )
    with torch.no_grad():
        torch.testing.assert_close(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-6))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_work_in_fp32_inside(kind: str):
    norm = build_norm(kind, 64, 1e-6)
    x = (torch.randn(4, 64) * 1e3).bfloat16()
    exact = norm(x.float())
    low = norm.bfloat16()(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=2**-7, atol=1e-2)
    low = build_norm(kind, 64, 1e-6).bfloat16()
    low(x.requires_grad_()).sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_norm_without_bias_and_unknown_norm():
    assert LayerNorm(4, 1e-5, bias=False).bias is None
    with pytest.raises(ValueError, match="layernorm"):
        build_norm("batchnorm", 4, 1e-5)


def test_activations():
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(ACTIVATIONS["relu2"](x), x.clamp_min(0) ** 2)
    assert ACTIVATIONS["gelu_new"] is ACTIVATIONS["gelu_pytorch_tanh"]
    assert not torch.equal(ACTIVATIONS["gelu"](x), ACTIVATIONS["gelu_tanh"](x))
    torch.testing.assert_close(ACTIVATIONS["quick_gelu"](x), x / (1 + torch.exp(-1.702 * x)))
    mlp = MLP(4, 8, "silu", gated=True, bias=False)
    y = torch.randn(2, 3, 4)
    torch.testing.assert_close(mlp(y), mlp.down(F.silu(mlp.gate(y)) * mlp.up(y)))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    table = RotaryTable(8, check_rope({}), 64)
    x = torch.randn(1, 10, 2, 8)
    turned = rotate(x, table.at(0, 10, x.device))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    q, k = x[:, :1].expand(1, 10, 2, 8), x[:, 1:2].expand(1, 10, 2, 8)
    near = (rotate(q, table.at(0, 10, x.device)) * rotate(k, table.at(3, 13, x.device))).sum(-1)
    torch.testing.assert_close(near, near[:, :1].expand_as(near), rtol=1e-4, atol=1e-5)


def test_tables_are_fp32_and_remembered():
    table = RotaryTable(8, check_rope({"rope_theta": 500}), 64)
    rope = table.at(2, 6, torch.device("cpu"))
    assert table.at(2, 6, torch.device("cpu")) is rope
    assert rope.to(torch.bfloat16)[0].dtype == torch.bfloat16
    assert rope.to(torch.float32)[0].shape == (1, 4, 1, 8)
    positions = torch.tensor([[2, 3, 4, 5]])
    assert torch.equal(table.of(positions).to(torch.float32)[0], rope.to(torch.float32)[0])


def test_document_positions_restart():
    ids = torch.tensor([[1, 1, 2, 2, 2, 0], [3, 1, 1, 1, 0, 0]])
    assert document_positions(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 0, 1]]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "magic"}, "'magic' is not supported"),
        ({"rope_type": "linear"}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": 0}, "positive"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, "beta_fast"),
        ({"rope_theta": float("nan")}, "positive"),
    ],
)
def test_bad_rotary_parameters(rope: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_rope(rope)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_kept_columns_are_those_of_the_whole_block(causal: bool, pre_norm: bool):
    torch.manual_seed(0)
    block = Block(BlockConfig(16, 2, 32, pre_norm=pre_norm)).double()
    mask = AttentionMask(causal=causal)
    columns = torch.tensor([[4, 0], [2, 6], [1, 1]])
    weight = torch.randn(3, 2, 16, dtype=torch.double)
    found = []
    for keep in (None, columns):
        x = torch.linspace(-1, 1, 3 * 7 * 16, dtype=torch.double).sin().view(3, 7, 16)
        x.requires_grad_()
        out = block(x, mask=mask, keep=keep)
        out = torch.stack([out[i, columns[i]] for i in range(3)]) if keep is None else out
        grads = torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])
        found.append([out, *grads])
    for whole, kept in zip(*found, strict=True):
        torch.testing.assert_close(kept, whole)


def test_a_mask_restricts_the_attention_of_kept_columns():
    """Only what nothing masks has fewer queries; the second row here has padding."""
    block = Block(BlockConfig(16, 2, 32))
    x, columns = torch.randn(2, 5, 16), torch.tensor([[0], [1]])
    for mask in (AttentionMask(documents=torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])),
                 AttentionMask(window=1), AttentionMask(bias=torch.randn(1, 2, 5, 5))):  # fmt: skip
        whole = block(x, mask=mask)
        kept = block(x, mask=mask, keep=columns)
        torch.testing.assert_close(kept[:, 0], whole[torch.arange(2), columns[:, 0]])
        assert not mask.empty
