"""Tensor parallelism as far as one process can see it: the plan, the slices, the vocabulary, the errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from contract import TEXT_FAMILIES
from pretrain.distributed.tensor_parallel import (
    cuts_of,
    reduce_partial_gradients,
    shard_model,
)
from pretrain.errors import ConfigError, ModelError
from pretrain.lora import LoraConfig, apply_lora
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.nn.block import Block, BlockConfig
from pretrain.nn.tensor_parallel import (
    Group,
    VocabShard,
    copy_to_tensor_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    row_linear,
)

HANDLE: Any = None  # slicing talks to nobody


def made(family: str = "llama", **options: Any) -> Model:
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "max_positions": 40,
        "vocab_size": 91,
    }
    return build(family, None, **(settings | options))


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield Group(dist.group.WORLD, 0, 1)
    dist.destroy_process_group()


def test_a_group_of_one_is_no_group(alone: Group) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = gather_from_tensor_parallel(
        reduce_from_tensor_parallel(copy_to_tensor_parallel(x, alone), alone), alone, -1, [4]
    )
    assert torch.equal(x, y)
    (y * torch.arange(4)).sum().backward()
    assert torch.equal(x.grad, torch.arange(4.0).expand(3, 4))
    layer = nn.Linear(4, 2)
    torch.testing.assert_close(row_linear(layer, x, alone), layer(x))
    model = made()
    before = [p.clone() for p in model.parameters()]
    tp = shard_model(model, alone)
    assert model.tp is None and not tp.cuts and not tp.partial
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("family", sorted(TEXT_FAMILIES))
@pytest.mark.parametrize("meta", [False, True])
def test_slices_put_together_are_the_model(family: str, meta: bool) -> None:
    whole = made(family)
    full = dict(whole.named_parameters())
    cuts, partial = cuts_of(whole)
    parts = []
    for rank in range(2):
        model = copy.deepcopy(whole)
        if meta:
            model = model.to("meta")
        kept = dict(model.named_parameters())
        next(model.parameters()).requires_grad_(False)
        tp = shard_model(model, Group(HANDLE, rank, 2))
        assert model.tp is tp and tp.cuts == cuts and tp.partial == partial
        found = dict(model.named_parameters())
        assert all(found[name] is p and p.is_contiguous() for name, p in kept.items())
        assert [p.requires_grad for p in found.values()] == [False] + [True] * (len(found) - 1)
        assert all(p.is_meta == meta for p in found.values())
        copy.deepcopy(model)
        parts.append({name: p.detach() for name, p in found.items()})
    for name, p in full.items():
        if meta:
            dim = cuts.get(name)
            sizes = [part[name].shape for part in parts]
            assert sizes == [p.shape] * 2 or sum(s[dim] for s in sizes) == p.shape[dim]
        elif name in cuts:
            assert torch.equal(torch.cat([part[name] for part in parts], cuts[name]), p)
        else:
            assert all(torch.equal(part[name], p) for part in parts)


def test_every_part_of_a_block_has_its_place() -> None:
    cuts, partial = cuts_of(made("qwen3", num_kv_heads=2, attention_bias=True))
    block = "backbone.layers.1."
    inside = {n.removeprefix(block): d for n, d in cuts.items() if n.startswith(block)}
    columns = ("attention.query", "attention.key", "attention.value")
    assert inside == {
        **{f"{name}.{leaf}": 0 for name in columns for leaf in ("weight", "bias")},
        "attention.output.weight": 1,
        "mlp.down.weight": 1,
        "mlp.up.weight": 0,
        "mlp.gate.weight": 0,
    }
    assert {n for n in partial if n.startswith(block)} == {
        f"{block}attention.{name}_norm.weight" for name in ("query", "key")
    }
    assert cuts["backbone.token_embedding.weight"] == cuts["head.output_weight"] == 0


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_cut_with_their_layers(dora: bool) -> None:
    model = apply_lora(made("modernbert"), LoraConfig(r=3, dora=dora))
    tp = shard_model(model, Group(HANDLE, 1, 2))
    layer = "backbone.layers.0."
    shapes = {n.removeprefix(layer): tuple(p.shape) for n, p in model.named_parameters()}
    # Queries, keys and values are one matrix on disk and share the A of the first.
    assert shapes["attention.query.lora_A"] == (3, 32) and "attention.key.lora_A" not in shapes
    assert shapes["attention.key.lora_B"] == (16, 3)
    assert shapes["attention.output.lora_A"] == (3, 16)
    assert shapes["attention.output.lora_B"] == (32, 3)
    partial = {n.removeprefix(layer) for n in tp.partial if n.startswith(layer)}
    wanted = {"attention.query.lora_A", "attention.output.lora_B"}
    wanted |= {"mlp.gate.lora_A", "mlp.down.lora_B"}
    if dora:
        assert shapes["mlp.up.lora_magnitude"] == (32,)
        assert shapes["mlp.down.lora_magnitude"] == (32,)
        wanted |= {"attention.output.lora_magnitude", "mlp.down.lora_magnitude"}
    assert partial == wanted
    down: Any = model.get_submodule(layer + "mlp.down")
    assert (down.in_features, down.out_features) == (32, 32) and down.parallel is tp.group
    assert model.get_submodule(layer + "mlp.up").parallel is None


def test_possible_sizes() -> None:
    def sizes(**options: Any) -> list[int]:
        return made(**options).backbone.config.possible_tp()

    assert sizes() == [1, 2, 4]
    assert sizes(num_kv_heads=2) == [1, 2]
    assert sizes(num_kv_heads=1) == [1]
    assert sizes(intermediate_size=66) == [1, 2]
    images = {"image_size": 8, "patch_size": 4}
    assert build("vit", hidden_size=32, num_heads=4, **images).backbone.config.possible_tp() == [
        1,
        2,
        4,
    ]
    assert sizes(family="clip", vision_num_heads=2, eos_id=4, **images) == [1, 2]
    # Nine tokens in pieces of three fill three processes.
    assert sizes(vocab_size=9, pad_id=None, bos_id=None, eos_id=None) == [1, 2]
    assert sizes(vocab_size=8, pad_id=None, bos_id=None, eos_id=None) == [1, 2, 4]


def test_a_sharded_model_is_not_sharded_again() -> None:
    model = made()
    shard_model(model, Group(HANDLE, 0, 2))
    with pytest.raises(ModelError, match="already sharded over 2 processes"):
        shard_model(model, Group(HANDLE, 0, 2))


def test_blocks_that_do_not_fit_the_plan_are_refused() -> None:
    model = made()
    model.backbone.layers[1] = nn.Linear(32, 32)
    with pytest.raises(ConfigError, match="are Linear, which has no table"):
        cuts_of(model)
    model = made()
    block: Any = model.backbone.layers[0]
    block.mlp = nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})
    with pytest.raises(ConfigError, match="mlp of the blocks of Llama is a ModuleDict"):
        cuts_of(model)
    model = made()
    block = model.backbone.layers[0]
    block.attention.sink = nn.Parameter(torch.zeros(4))
    with pytest.raises(ConfigError, match=r"entry for attention\.sink of a block of Llama"):
        cuts_of(model)
    model = made()
    model.backbone.wte = model.backbone.token_embedding
    del model.backbone.token_embedding
    with pytest.raises(ConfigError, match="no nn.Embedding called token_embedding"):
        cuts_of(model)


def test_the_plan_names_layers_that_a_block_can_have() -> None:
    config = BlockConfig(32, 4, 64, gated=True, qk_norm=True, cross_attention=True)
    names = dict(Block(config).named_modules())
    assert set(Block.tensor_parallel) <= set(names)
    linear = {name for name, module in names.items() if isinstance(module, nn.Linear)}
    assert linear <= set(Block.tensor_parallel)


@given(size=st.integers(1, 60), parts=st.integers(1, 6))
def test_every_token_has_one_place(size: int, parts: int) -> None:
    ids = torch.arange(size)
    shards = [VocabShard(Group(HANDLE, rank, parts), size) for rank in range(parts)]
    assert all(s.sizes == shards[0].sizes and s.rows == shards[0].rows for s in shards)
    assert sum(shards[0].sizes) == size and max(shards[0].sizes) == shards[0].rows
    if min(shards[0].sizes) == 0:
        return  # such a size is refused
    places = [shard.place(ids) for shard in shards]
    assert torch.equal(sum(inside.long() for _, inside in places), torch.ones_like(ids))
    for shard, (index, inside) in zip(shards, places, strict=True):
        assert torch.equal(ids[inside], index[inside] + shard.start)
        assert int(index.min()) >= 0 and int(index.max()) < shard.sizes[shard.group.rank]


def test_foreign_ids_fall_to_a_process_that_fails_on_them() -> None:
    for rank, bad in ((0, -1), (2, 10)):
        shard = VocabShard(Group(HANDLE, rank, 3), 10)
        index, inside = shard.place(torch.tensor([bad]))
        assert bool(inside) and not 0 <= int(index) < shard.sizes[rank]


def test_partial_gradients_are_summed_in_place_and_others_left(alone: Group) -> None:
    model = made("qwen3")
    tp = shard_model(copy.deepcopy(model), Group(HANDLE, 0, 2))
    names = sorted(tp.partial)[:2]
    grads = {name: torch.full((2,), 3.0) for name in names} | {"other": torch.ones(1)}
    object.__setattr__(tp, "group", alone)
    reduce_partial_gradients(grads, tp)
    assert all(float(grads[name][0]) == 3.0 for name in names) and float(grads["other"]) == 1.0
    reduce_partial_gradients({}, tp)
