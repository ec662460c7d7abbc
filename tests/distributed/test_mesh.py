"""Sizes of the mesh: every choice multiplies out and shares the batch alike, and what cannot be says what can."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ParallelConfig
from pretrain.distributed import mesh as module
from pretrain.distributed.estimates import (
    MeshShape,
    Needs,
    activation_bytes,
    memory,
)
from pretrain.distributed.mesh import ParallelPlan, choose_mesh, possible_worlds
from pretrain.errors import ConfigError
from pretrain.models import build
from pretrain.nn.kernels import multiplies_rows

GIB = float(1 << 30)
LLAMA = Needs(
    parameters=8_030_261_248,
    trainable=8_030_261_248,
    hidden=4096,
    layers=32,
    intermediate=14336,
    vocabulary=128_256,
    row_length=8192,
    key_value=1024,
    gated=True,
    tied=False,
    checkpointing="selective",
)
SMALL = Needs(
    parameters=10_000_000,
    trainable=10_000_000,
    hidden=256,
    layers=6,
    intermediate=1024,
    vocabulary=8192,
    row_length=256,
)


def choose(world: int, needs: Needs = SMALL, **options: Any) -> ParallelPlan:
    given = {"batch_rows": 64, "micro_rows": 0, "device_memory": 80 * GIB, "local": 8}
    keys = {key: options.pop(key, value) for key, value in given.items()}
    ways = {"possible_tp": options.pop("possible_tp", (1, 2, 4, 8))}
    ways |= {key: options.pop(key) for key in ("coupled", "host_share") if key in options}
    return choose_mesh(ParallelConfig(**options), world, needs=needs, **keys, **ways)


def refused(world: int, needs: Needs = SMALL, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        choose(world, needs, **options)
    text = str(caught.value)
    assert text.endswith("."), text
    return text


# ------------------------------------------------------------------------------------------------ properties


@settings(max_examples=300, deadline=None)
@given(
    world=st.integers(1, 96),
    local=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1, 300),
    micro=st.integers(0, 8),
    tp=st.sampled_from([1, 2, 3, 4]),
    replicate=st.integers(0, 8),
    shard=st.integers(0, 8),
    strategy=st.sampled_from(["auto", "ddp", "fsdp"]),
    reproducible=st.booleans(),
    room=st.sampled_from([None, 0.05, 0.5, 100.0]),
)
def test_whatever_is_chosen_multiplies_out_and_shares_the_batch(
    world: int,
    local: int,
    batch: int,
    micro: int,
    tp: int,
    replicate: int,
    shard: int,
    strategy: Any,
    reproducible: bool,
    room: float | None,
) -> None:
    config = ParallelConfig(
        strategy=strategy, dp_replicate=replicate, dp_shard=shard, tp=tp, reproducible=reproducible
    )
    said = ""
    try:
        choice = choose_mesh(
            config,
            world,
            batch_rows=batch,
            micro_rows=micro,
            needs=SMALL,
            possible_tp=(1, 2, 4),
            device_memory=None if room is None else room * GIB,
            local=local,
        )
    except ConfigError as error:
        said = str(error)
    if said:
        assert said.endswith(".") and re.search(r"may be|leave", said)
        return
    found = choice.sizes
    assert found.world == world and found.tp == tp and min(vars(found).values()) >= 1
    assert batch % found.dp == 0
    assert not micro or batch // found.dp % micro == 0
    assert choice.strategy != "single" or found.dp == 1
    assert choice.strategy == "fsdp" or found.dp_shard == 1
    assert "\n" not in choice.reason and len(choice.reason) < 250
    if replicate:
        assert found.dp_replicate == replicate
    if shard:
        assert found.dp_shard == shard
    if reproducible:
        assert choice.strategy in ("ddp", "single") and found.dp & (found.dp - 1) == 0
    if strategy != "auto" and found.dp > 1:
        assert choice.strategy == strategy


@settings(max_examples=200, deadline=None)
@given(batch=st.integers(1, 400), micro=st.integers(0, 8), world=st.integers(1, 64))
def test_the_numbers_that_an_error_lists_work(batch: int, micro: int, world: int) -> None:
    """What the message offers is accepted: other numbers of processes, and batches near this one."""
    try:
        choose(world, batch_rows=batch, micro_rows=micro)
    except ConfigError as error:
        text = str(error)
        worlds = re.search(r"numbers of processes are ([\d, .]*?);", text)
        near = re.search(r"train.batch_rows may be ([\d, ]+)\.", text)
        if worlds:
            for number in re.findall(r"\d+", worlds[1].replace(",", " ")):
                choose(int(number), batch_rows=batch, micro_rows=micro)
        assert near
        for number in near[1].split(", "):
            choose(world, batch_rows=int(number.replace(",", "")), micro_rows=micro)


def test_possible_worlds() -> None:
    assert possible_worlds(12, 0) == [1, 2, 3, 4, 6, 12]
    assert possible_worlds(12, 2) == [1, 2, 3, 6]
    assert possible_worlds(12, 5) == []


# -------------------------------------------------------------------------------------------------- choices


def test_one_process_is_alone() -> None:
    choice = choose(1)
    assert (choice.strategy, choice.sizes) == ("single", MeshShape(1, 1, 1))
    assert choose(1, strategy="ddp").strategy == "single"
    assert choose(1, strategy="fsdp").strategy == "fsdp"  # to measure the wrapping, or to offload


def test_a_small_model_is_copied_and_the_arithmetic_is_said() -> None:
    choice = choose(8)
    assert (choice.strategy, choice.sizes) == ("ddp", MeshShape(8, 1, 1))
    assert re.fullmatch(
        r"ddp: \d+\.\d+ of 80\.0 GiB needed per process; fsdp would save \d+\.\d+", choice.reason
    )


def test_what_does_not_fit_is_cut_inside_a_host_first() -> None:
    choice = choose(64, LLAMA, batch_rows=512)
    assert choice.strategy == "fsdp" and choice.sizes == MeshShape(8, 8, 1)
    assert "fsdp over 8" in choice.reason and "8 copies" in choice.reason
    roomy = choose(64, LLAMA, batch_rows=512, device_memory=300 * GIB)
    assert roomy.strategy == "ddp"
    tight = choose(64, LLAMA, batch_rows=512, device_memory=61 * GIB)
    assert tight.sizes == MeshShape(1, 64, 1), "over all hosts when one host is too small"


def test_the_fewest_parts_that_fit() -> None:
    needs = replace(LLAMA, row_length=1024)
    parts = [
        choose(8, needs, batch_rows=64, device_memory=room * GIB).sizes.dp_shard
        for room in (220, 115, 70, 45)
    ]
    assert parts == sorted(parts) and parts[0] == 1 and parts[-1] == 8 and len(set(parts)) > 2


def test_what_fits_nowhere_gets_advice() -> None:
    needs = replace(LLAMA, checkpointing="off")
    text = choose(8, needs, device_memory=50 * GIB).reason
    assert "may not fit" in text and "activation_checkpointing=full" in text
    many: dict[str, Any] = {"batch_rows": 1 << 16, "device_memory": 2 * GIB}
    text = choose(8, micro_rows=1 << 13, **many).reason
    assert "train.micro_rows=1" in text
    assert "micro_rows" not in choose(8, coupled=True, **many).reason
    text = choose(8, micro_rows=1 << 13, reproducible=True, **many).reason
    assert "try" in text and "fsdp" not in text
    text = choose(1, LLAMA, device_memory=20 * GIB).reason
    assert "more processes" in text and "cpu_offload" in text
    assert "cpu_offload" not in choose(1, replace(LLAMA, device="cpu"), device_memory=GIB).reason
    assert "parallel.strategy=fsdp" in choose(8, LLAMA, strategy="ddp").reason


@settings(max_examples=200, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 8]),
    each=st.integers(1, 120),
    usual=st.integers(1, 64),
    room=st.floats(0.05, 2.0),
    strategy=st.sampled_from(["auto", "ddp", "fsdp"]),
)
def test_free_rows_are_as_many_as_fit(
    world: int, each: int, usual: int, room: float, strategy: Any
) -> None:
    """The most of the usual number that divide a share and fit; one where not even that does."""
    needs = replace(SMALL, micro_tokens=usual * SMALL.row_length)
    options = {"batch_rows": world * each, "device_memory": room * GIB, "strategy": strategy}
    choice = choose(world, needs, **options)
    possible = [d for d in range(1, each + 1) if each % d == 0 and d <= usual]
    assert choice.micro_rows in possible and choice.memory is not None
    fitting = [
        d
        for d in possible
        if memory(needs, choice.sizes, choice.strategy, d * 256, whole=choice.whole).total
        <= module.USABLE * room * GIB
    ]
    assert choice.micro_rows == max(fitting, default=1)
    assert (choice.advice == "") == bool(fitting) and choice.reason.endswith(choice.advice)
    if strategy == "auto" and world > 1:
        one = memory(needs, MeshShape(world, 1, 1), "ddp", 256).total
        assert (choice.strategy == "ddp") == (one <= module.USABLE * room * GIB)


def test_many_rows_alone_do_not_cut_a_model() -> None:
    """What 65,536 tokens need decides nothing: the rows of a micro-batch are free."""
    needs = replace(SMALL, micro_tokens=65536)
    choice = choose(8, needs, batch_rows=2048, device_memory=1 * GIB)
    assert choice.strategy == "ddp" and 1 < choice.micro_rows < 256 and not choice.advice
    assert choose(8, needs, batch_rows=2048).micro_rows == 256
    held = choose(8, needs, batch_rows=2048, micro_rows=256, device_memory=1 * GIB)
    assert held.micro_rows == 256 and held.strategy == "fsdp" and held.advice
    coupled = choose(8, needs, batch_rows=2048, coupled=True, device_memory=1 * GIB)
    assert coupled.micro_rows == 256 and coupled.advice


def test_sizes_that_are_set_are_kept() -> None:
    assert (
        choose(8, dp_shard=4).sizes == MeshShape(2, 4, 1)
        and choose(8, dp_shard=4).strategy == "fsdp"
    )
    assert choose(8, dp_replicate=8).strategy == "ddp"
    assert choose(8, dp_replicate=2).sizes == MeshShape(2, 4, 1)
    assert choose(8, tp=2).sizes == MeshShape(4, 1, 2)
    assert choose(8, tp=2, strategy="fsdp", device_memory=None).sizes == MeshShape(1, 4, 2)
    assert choose(2, tp=2).strategy == "single"


def test_what_cannot_be_lists_what_can() -> None:
    text = refused(8, dp_shard=3)
    assert "dp_shard 3" in text and "(1, 8)" in text and "(8, 1)" in text
    assert "8 processes" in refused(8, dp_replicate=2, dp_shard=2)
    assert "8 processes" in refused(8, dp_replicate=2, strategy="ddp")
    assert "dp_shard is 4" in refused(8, dp_shard=4, strategy="ddp")
    assert "1, 2, 4, 8" in refused(12, tp=3)
    text = refused(9, tp=2, batch_rows=9)
    assert "9 processes" in text and "may be 1." in text
    text = refused(6, batch_rows=64)
    assert "1, 2, 4, 8, 16, 32, 64" in text and "60, 66" in text
    text = refused(8, batch_rows=64, micro_rows=16)
    assert "micro-batches of 16" in text and "1, 2, 4" in text and "128" in text
    assert "set train.micro_rows to 0" in text


def test_reproducible_is_ddp_on_powers_of_two() -> None:
    choice = choose(4, reproducible=True, device_memory=0.1 * GIB)
    assert choice.strategy == "ddp" and "reproducible" in choice.reason
    text = refused(3, reproducible=True, batch_rows=24, micro_rows=2)
    assert "power of two" in text and "12 micro-batches" in text and "1, 2, 4" in text
    assert "ddp" in refused(4, reproducible=True, strategy="fsdp")
    assert "tp 2" in refused(4, reproducible=True, tp=2)


def test_offloading_needs_fsdp_and_a_gpu() -> None:
    choice = choose(1, LLAMA, cpu_offload=True)
    assert choice.strategy == "fsdp" and choice.memory is not None and choice.memory.weights == 0
    assert not choice.advice
    small = choose(1, LLAMA, cpu_offload=True, host_share=100 * GIB)
    assert "needs 119.7 of 100.0 GiB" in small.advice and small.reason.endswith(small.advice)
    assert not choose(1, LLAMA, cpu_offload=True, host_share=200 * GIB).advice
    assert "cpu" in refused(2, replace(SMALL, device="cpu"), cpu_offload=True)
    assert "ddp" in refused(2, cpu_offload=True, strategy="ddp")


# ----------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    ("family", "groups", "inner", "gated"),
    [("llama", 4, 512, True), ("llama", 1, 1024, True), ("gpt2", 4, 512, False)],
)
def test_kept_activations_are_those_that_autograd_keeps(
    family: str, groups: int, inner: int, gated: bool, low: bool
) -> None:
    """Saved tensors of two blocks more, counted on real models: the estimate is within five percent."""
    kept = {}
    rows, length = 3, 56  # no weight has this shape
    for layers in (1, 3):
        options: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "intermediate_size": inner}
        if family == "llama":
            options["num_kv_heads"] = groups
        model = build(
            family, "tiny", head=None, seed=0, vocab_size=64, num_layers=layers, **options
        )
        weights = {tuple(p.shape) for p in model.parameters()}
        weights |= {shape[::-1] for shape in weights}
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.randint(4, 60, (rows, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=low),
        ):
            hidden = model.backbone(batch)
        kept[layers] = sum(
            t.untyped_storage().nbytes() for t in seen.values() if tuple(t.shape) not in weights
        )
        del hidden
    needs = Needs(
        parameters=1,
        trainable=1,
        hidden=128,
        layers=2,
        intermediate=inner,
        heads=4,
        row_length=length,
        key_value=32 * groups,
        gated=gated,
        compute_bytes=2 if low else 4,
        keeps_weights=low and multiplies_rows(torch.device("cpu"), torch.bfloat16, length),
    )
    assert activation_bytes(needs, rows * length) == pytest.approx(kept[3] - kept[1], rel=0.05)


def test_memory_by_part() -> None:
    count = LLAMA.parameters
    alone = memory(LLAMA, MeshShape(), "single", 8192)
    assert alone.weights == alone.gradients == 4 * count and alone.moments == 8 * count
    assert alone.casts == 2 * count and alone.gathered == 0
    cut = memory(LLAMA, MeshShape(1, 8, 1), "fsdp", 8192)
    assert cut.weights + cut.gradients + cut.moments == 2 * count
    assert 0 < cut.gathered < alone.total and cut.activations == alone.activations
    split = memory(LLAMA, MeshShape(1, 1, 2), "single", 8192)
    assert split.weights == 2 * count and split.activations < alone.activations
    more = replace(LLAMA, muon=count // 2, ema=True, anchors=True)
    changed = memory(more, MeshShape(), "single", 8192)
    assert changed.moments == 6 * count and changed.copies == 8 * count
    # What Muon needs for its matrices comes when the activations have gone, and counts where it is more.
    assert changed.step == 0
    few = replace(more, muon=1000, vocabulary=0)
    assert memory(few, MeshShape(), "single", 0).step == 16 * 1000
    assert memory(few, MeshShape(1, 2, 1), "fsdp", 0).step == 20 * 1000
    assert memory(replace(few, device="cpu"), MeshShape(), "single", 0).step == 24 * 1000
    frozen = memory(replace(LLAMA, trainable=0), MeshShape(), "single", 8192)
    assert frozen.gradients == frozen.moments == 0
    held = memory(LLAMA, MeshShape(1, 8, 1), "fsdp", 8192, whole=True)
    assert held.gathered > cut.gathered
    order = [
        memory(replace(LLAMA, checkpointing=mode), MeshShape(), "single", 8192).activations
        for mode in ("full", "selective", "off")
    ]
    assert order == sorted(order) and order[0] < order[2] / 5
    assert choose(8, strategy="fsdp").whole
    assert not choose(8, LLAMA, strategy="fsdp").whole


@settings(max_examples=200, deadline=None)
@given(
    trainable=st.integers(0, 10_000_000),
    muon=st.integers(0, 10_000_000),
    sizes=st.sampled_from(
        [MeshShape(), MeshShape(1, 4, 1), MeshShape(1, 1, 2), MeshShape(2, 2, 2)]
    ),
    strategy=st.sampled_from(["ddp", "fsdp"]),
)
def test_nothing_takes_less_than_no_memory(
    trainable: int, muon: int, sizes: MeshShape, strategy: str
) -> None:
    """Muon has no moments of matrices that are frozen."""
    needs = replace(SMALL, trainable=trainable, muon=muon)
    found = memory(needs, sizes, strategy, 256)
    assert min(vars(found).values()) >= 0


def test_what_comes_in_fp32_is_cast_in_every_block() -> None:
    """Under fsdp in half precision: gathered so, autograd keeps nothing of a block that was given back."""
    half = memory(LLAMA, MeshShape(1, 8, 1), "fsdp", 8192)
    full = memory(replace(LLAMA, gather_bytes=4), MeshShape(1, 8, 1), "fsdp", 8192)
    inside = LLAMA.layers * LLAMA.block
    assert half.casts == 0 and full.casts == 2 * inside
    assert full.gathered - half.gathered == 2 * 2 * LLAMA.block
    cut = memory(replace(LLAMA, gather_bytes=4), MeshShape(1, 4, 2), "fsdp", 8192)
    assert cut.casts == inside
    plain = replace(LLAMA, compute_bytes=4)
    assert memory(plain, MeshShape(1, 8, 1), "fsdp", 8192).casts == 0
    assert memory(LLAMA, MeshShape(), "ddp", 8192) == memory(
        replace(LLAMA, gather_bytes=4), MeshShape(), "ddp", 8192
    )
