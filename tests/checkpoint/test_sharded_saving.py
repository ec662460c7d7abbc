"""Several processes write and read one directory: it never shows how many there were, and none fails alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.threads import (
    Room,
    at,
    attempt_all,
    cut_model,
    cut_tensors,
    layout_of,
    moments,
    on_all,
)
from contract import TEXT_FAMILIES
from pretrain.checkpoint import (
    TrainingState,
    latest,
    load,
    read_training,
    save_checkpoint,
    save_model,
    verify,
)
from pretrain.checkpoint.draft import Draft, FilePlan, draft_of, split_evenly
from pretrain.checkpoint.meta_loading import open_on_meta
from pretrain.checkpoint.peers import SINGLE_PROCESS, TensorSharding
from pretrain.checkpoint.saving import gathered
from pretrain.checkpoint.sharded_loading import (
    StoredTensors,
    hash_by_ranks,
    latest_on_all_ranks,
    load_slices,
    read_training_slices,
)
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.models import build
from pretrain.models.names import DiskMapping
from pretrain.nn.layout import ShardLayout, ShardSlice
from pretrain.utils import directories, files
from pretrain.utils.tensors import read_header, read_tensors, write_tensors

SIZES = {"num_layers": 2, "hidden_size": 12, "num_heads": 2, "max_positions": 10}
# (dp_replicate, dp_shard, tp): rows, columns, both, uneven (12 rows over 5), more processes than some have rows.
MESHES = [(1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (1, 5, 1), (4, 1, 1), (2, 1, 2)]
# Meshes that every family is tried on, and the families that are tried on every mesh: fused and separate projections.
UNLIKE, BOTH = [(1, 5, 1), (2, 1, 2)], ("gpt2", "modernbert")


@pytest.fixture(scope="module")
def tokenizer():
    return train_from_texts(["the quick brown fox"], "char")


def tiny(family="gpt2", **options):
    model = build(family, **({"vocab_size": 33} | SIZES | options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():  # also where a fresh model has ones and zeros
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def training(model):
    tensors = {"optimizer": moments(model), "weights": {}}
    tensors["weights"] = {name: p.detach() + 1 for name, p in model.named_parameters()}
    tensors["objective"] = {"teacher.weight": torch.arange(6.0).reshape(2, 3)}
    return TrainingState(tensors, {"step": 3, "scale": float("inf")})


def part_of(state, layout, rank):
    return TrainingState(
        {stem: cut_tensors(group, layout, rank) for stem, group in state.tensors.items()},
        state.state,
    )


def save_cut(run, model, layout, *, step=3, state=None, room=None, keep=2, **options):
    """Save a model that is cut over ``layout.world`` threads."""
    state = state or training(model)

    def work(peers):
        return save_checkpoint(
            run,
            cut_model(model, layout, peers.rank),
            step=step,
            tokens=9,
            pretrain_block={"objective": "X"},
            training=part_of(state, layout, peers.rank),
            layout=at(layout, peers.rank),
            peers=peers,
            keep=keep,
            **options,
        )

    return on_all(layout.world, work, room)[0]


def save_whole(run, model, step=3, **options):
    return save_checkpoint(
        run,
        model,
        step=step,
        tokens=9,
        pretrain_block={"objective": "X"},
        training=training(model),
        **options,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.rglob("*.safetensors")):
        stem = path.parent.name if path.parent != directory else "weights"
        group = path.name.split("-0")[0].removesuffix(".safetensors")
        for name, tensor in read_tensors(path, slashes=True).items():
            assert (stem, group, name) not in found
            found[stem, group, name] = tensor
    return {"/".join(key): tensor for key, tensor in found.items()}


def same_tensors(one, two):
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


# ------------------------------------------------------------------------------------------------ one format


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        pytest.param(
            family, mesh, marks=() if family in BOTH or mesh in UNLIKE else pytest.mark.slow
        )
        for family in TEXT_FAMILIES
        for mesh in MESHES
    ],
    ids=str,
)
def test_the_bytes_are_those_that_one_process_writes(family, mesh, tmp_path):
    model = tiny(family)
    whole = save_whole(tmp_path / "one", model)
    cut = save_cut(tmp_path / "many", model, layout_of(model, *mesh))
    assert contents(cut) == contents(whole)
    assert os.listdir(tmp_path / "many") == ["checkpoint-3"]


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 2, 2), (4, 1, 1), (1, 5, 1)], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "modernbert", "llama"])
def test_large_weights_are_divided_among_the_processes(
    family, mesh, tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setattr("pretrain.checkpoint.draft.SMALLEST_SHARE", 1000)
    model = tiny(family).eval()
    layout = layout_of(model, *mesh)
    whole = save_whole(tmp_path / "one", model)
    room = Room(layout.world)
    cut = save_cut(tmp_path / "many", model, layout, room=room)
    verify(cut)
    shards = sorted(cut.glob("model-*.safetensors"))
    assert 1 < len(shards) <= layout.world
    assert len(list((cut / "training").glob("optimizer-*.safetensors"))) > 1
    same_tensors(tensors_of(cut), tensors_of(whole))
    if mesh == (4, 1, 1):
        assert sum(room.sent_bytes) == 0, "who has all of a tensor asks nobody for it"
    sizes = [shard.stat().st_size for shard in shards]
    largest = max(
        info.stop - info.start for info in read_header(whole / "model.safetensors").values()
    )
    assert max(sizes) <= sum(sizes) / len(sizes) + largest + 2000
    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "masked-lm": transformers.AutoModelForMaskedLM,
    }[model.head_kind]
    theirs, info = auto.from_pretrained(cut, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        assert torch.allclose(model({"input_ids": ids}), expected, rtol=1e-4, atol=1e-4)
    for name, value in load(cut, quiet=True).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    read = read_training(cut)
    wanted = training(model)
    assert read.state == wanted.state
    for stem, group in wanted.tensors.items():
        same_tensors(read.tensors[stem], group)


@pytest.mark.parametrize("reader", [(1, 1, 1), (1, 2, 2), (1, 5, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("writer", [(1, 1, 1), (1, 2, 2), (1, 3, 1), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("family", [BOTH[0], pytest.param(BOTH[1], marks=pytest.mark.slow)])
def test_any_mesh_reads_what_any_mesh_wrote(family, writer, reader, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.checkpoint.draft.SMALLEST_SHARE", 1000)
    model = tiny(family)
    path = save_cut(tmp_path, model, layout_of(model, *writer))
    layout = layout_of(model, *reader)
    wanted = training(model)

    def work(peers):
        part = cut_model(tiny(family, seed=8), layout, peers.rank)
        with torch.no_grad():
            for p in part.parameters():
                p.fill_(float("nan"))
        mine = at(layout, peers.rank)
        assert latest_on_all_ranks(tmp_path, peers) == path
        report = load_slices(part, path, mine, peers)
        return part, report, read_training_slices(path, mine, peers, quiet=True)

    for rank, (part, report, state) in enumerate(on_all(layout.world, work)):
        expected = cut_model(model, layout, rank)
        same_tensors(dict(part.named_parameters()), dict(expected.named_parameters()))
        assert not report.missing and not report.unexpected
        assert state.state == wanted.state
        for stem, group in wanted.tensors.items():
            same_tensors(state.tensors[stem], cut_tensors(group, layout, rank))


def test_an_adapter_is_cut_too(tmp_path):
    from pretrain.lora import LoraConfig, apply_lora

    base = save_model(tiny(), tmp_path / "base")
    model = apply_lora(load(base, quiet=True), LoraConfig(r=2, dora=True), seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.add_(0.5)
    whole = save_whole(tmp_path / "one", model)
    layout = layout_of(model, 1, 3, 1)
    cut = save_cut(tmp_path / "many", model, layout)
    assert contents(cut) == contents(whole)

    def work(peers):
        part = cut_model(model, layout, peers.rank)
        with torch.no_grad():
            for name, p in part.named_parameters():
                if "lora" in name:
                    p.zero_()
        load_slices(part, cut, at(layout, peers.rank), peers)
        return part

    for rank, part in enumerate(on_all(3, work)):
        expected = cut_model(model, layout, rank)
        same_tensors(dict(part.named_parameters()), dict(expected.named_parameters()))


# ------------------------------------------------------------------------------------------------ foreign files


def filled(path, mesh, head=None):
    """Open a directory without weights, cut it, fill it; the parameters put together again."""
    reference = load(path, quiet=True, head=head)

    def work(peers):
        model, directory = open_on_meta(path, peers, head=head)
        assert all(p.is_meta for p in model.parameters())
        layout = at(layout_of(model, *mesh), peers.rank)
        model.to_empty(device="cpu")
        part = cut_model(model, layout, peers.rank)
        report = load_slices(part, directory, layout, peers, quiet=False)
        return part, report, model

    found = on_all(mesh[0] * mesh[1] * mesh[2], work)
    for rank, (part, _, model) in enumerate(found):
        layout = layout_of(model, *mesh)
        expected = cut_model(reference, layout, rank)
        same_tensors(dict(part.named_parameters()), dict(expected.named_parameters()))
        assert set(part.state_dict()) == set(expected.state_dict())
        for name, buffer in expected.named_buffers():
            assert torch.equal(buffer, dict(part.named_buffers())[name])
        assert part.fresh == reference.fresh and model.source == reference.source
    return found[0][1], reference


@pytest.mark.parametrize("family", ["gpt2", "bert", "modernbert", "qwen3"])
def test_what_transformers_wrote_is_read_in_parts(family, tmp_path, capfd):
    model = tiny(family).eval()
    save_model(model, tmp_path / "ours")
    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "masked-lm": transformers.AutoModelForMaskedLM,
    }[model.head_kind]
    theirs = auto.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("shards", "bf16"):
        capfd.readouterr()
        load(tmp_path / name)
        line = capfd.readouterr().err
        report, _ = filled(tmp_path / name, (1, 2, 2))
        assert not report.missing
        assert line in capfd.readouterr().err, "one line, as load says it"


def test_a_fresh_head_is_the_one_that_a_single_process_draws(tmp_path):
    save_model(tiny("bert"), tmp_path / "m")
    report, reference = filled(tmp_path / "m", (1, 2, 2), head="sequence-classification")
    assert report.missing and reference.fresh


def test_a_head_that_the_file_keeps_apart(tmp_path, capfd):
    path = save_model(tiny("llama", tie_embeddings=False), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (path / "manifest.json").unlink()
    filled(path, (1, 2, 1))
    assert "head untied, because its weights differ from the embedding" in capfd.readouterr().err
    tied = layout_of(tiny("llama", tie_embeddings=True), 1, 2, 1)

    def work(peers):
        part = cut_model(tiny("llama", tie_embeddings=True), tied, peers.rank)
        load_slices(part, path, at(tied, peers.rank), peers)

    with pytest.raises(CheckpointError, match="differs from the embedding"):
        on_all(2, work)


def test_shapes_that_do_not_fit_give_the_error_of_a_single_process(tmp_path):
    path = save_whole(tmp_path, tiny())
    other = tiny(vocab_size=40)
    layout = layout_of(other, 1, 2, 1)

    def weights(peers):
        load_slices(cut_model(other, layout, peers.rank), path, at(layout, peers.rank), peers)

    def state(peers):
        read_training_slices(path, at(layout, peers.rank), peers)

    with pytest.raises(CheckpointError, match=r"'transformer.wte.weight' has the shape \(33, 12\)"):
        on_all(2, weights)
    with pytest.raises(CheckpointError, match=r"with shape \(33, 12\), but the parameter has \(40"):
        on_all(2, state)
    foreign = tiny("llama")
    layout = layout_of(foreign, 1, 2, 1)
    with pytest.raises(CheckpointError, match="The weights lack"):
        on_all(
            2,
            lambda peers: load_slices(
                cut_model(foreign, layout, peers.rank), path, at(layout, peers.rank), peers
            ),
        )


# ------------------------------------------------------------------------------------------------ any cut


@st.composite
def cuts(draw):
    """Shapes, a mesh, and which dimension tensor parallelism cuts."""
    shapes, dims = {}, {}
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=3)))
        shapes[f"p{index}"] = shape
        if shape and draw(st.booleans()):
            dims[f"p{index}"] = draw(st.integers(0, len(shape) - 1))
    mesh = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 3), (1, 2, 2), (2, 2, 1)]))
    return ShardLayout(shapes, *mesh, dims if mesh[2] > 1 else {}), draw(st.integers(1, 3))


@given(cuts())
@settings(max_examples=40, deadline=None)
def test_every_cut_is_put_together_again(tmp_path_factory, case):
    layout, count = case
    tmp_path = tmp_path_factory.mktemp("cut")
    torch.manual_seed(0)
    full = {
        f"exp_avg/{name}": torch.randn(shape).to(dtype)
        for (name, shape), dtype in zip(
            layout.shapes.items(),
            [torch.float32, torch.bfloat16, torch.int64, torch.uint8],
            strict=False,
        )
    } | {"loose/other": torch.arange(5), "step/p0": torch.tensor(3.0)}
    groups = split_evenly({key: full[key] for key in sorted(full)}, min(count, layout.world))

    def work(peers):
        sharding = TensorSharding(at(layout, peers.rank), peers)
        parts = cut_tensors(full, layout, peers.rank)
        meta = sharding.full(parts)
        alike = DiskMapping({key: (key,) for key in full}, lambda key, sources, _: sources[key])
        plans = tuple(
            FilePlan(f"{i}.safetensors", i, group, alike, training=True)
            for i, group in enumerate(groups)
        )
        draft = gathered(Draft(1, {}, plans, parts, meta, None, {}, sharding), peers)
        for plan in plans:
            if plan.owner == peers.rank:
                wholes = {key: draft.parts[key] for key in plan.layout}
                write_tensors(tmp_path / plan.name, wholes, slashes=True)

    on_all(layout.world, work)
    for i, group in enumerate(groups):
        write_tensors(tmp_path / f"plain-{i}", group, slashes=True)
        assert (tmp_path / f"plain-{i}").read_bytes() == (
            tmp_path / f"{i}.safetensors"
        ).read_bytes()
    paths = {path.name: path for path in tmp_path.glob("*.safetensors")}
    with StoredTensors(paths, slashes=True) as stored:
        for rank in range(layout.world):
            for name, shape in layout.shapes.items():
                region = layout.region(name, rank)
                key = f"exp_avg/{name}"
                assert stored.info(key).shape == shape
                assert torch.equal(stored.read_region(key, region), full[key][region.slices()])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_is_read_right(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    path = tmp_path_factory.mktemp("box") / "t.safetensors"
    write_tensors(path, {"a": tensor, "b": tensor + 1})
    with StoredTensors({"t": path}) as stored:
        for _ in range(4):
            start = tuple(data.draw(st.integers(0, n)) for n in shape)
            size = tuple(
                data.draw(st.integers(0, n - a)) for n, a in zip(shape, start, strict=True)
            )
            region = ShardSlice(start, size)
            name = data.draw(st.sampled_from("ab"))
            expected = (tensor + (name == "b"))[region.slices()]
            assert torch.equal(stored.read_region(name, region), expected)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_tensors_are_divided_evenly_and_in_their_order(sizes, count):
    layout = {f"t{i:03d}": torch.empty(n, device="meta") for i, n in enumerate(sizes)}
    groups = split_evenly(layout, count)
    assert [name for group in groups for name in group] == list(layout)
    assert 1 <= len(groups) <= count
    assert all(groups) or not sizes
    weights = [sum(t.nbytes for t in group.values()) for group in groups]
    assert max(weights) <= sum(weights) / count + max([4 * n for n in sizes], default=0)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("mesh", [(1, 3, 1), (2, 1, 2)], ids=str)
def test_a_process_gathers_its_share_one_tensor_at_a_time(mesh, monkeypatch):
    monkeypatch.setattr("pretrain.checkpoint.draft.SMALLEST_SHARE", 1000)
    model = tiny("gpt2", num_layers=4)
    layout, state = layout_of(model, *mesh), training(model)
    largest = max(t.nbytes for t in model.disk_view().layout.values())

    def work(peers):
        sent = []
        gather = peers.gather

        def watched(shards, *others):
            sent.append(sum(shard.nbytes for shard in shards))
            return gather(shards, *others)

        peers.gather = watched
        draft = draft_of(
            cut_model(model, layout, peers.rank),
            step=1,
            training=part_of(state, layout, peers.rank),
            max_shard_bytes=10**9,
            layout=at(layout, peers.rank),
            peers=peers,
        )
        draft = gathered(draft, peers)
        assert max(sent) <= largest, "the shards of one tensor for each of the owners"
        return sum(t.nbytes for t in draft.parts.values())

    held = on_all(layout.world, work)
    assert max(held) <= sum(held) / layout.world + len(state.tensors) * largest + largest


# ------------------------------------------------------------------------------------------------ damage and failure


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training/optimizer.safetensors", "config.json"]
)
def test_a_flipped_bit_is_an_error_on_all(name, tmp_path, capfd):
    model = tiny()
    layout = layout_of(model, 1, 3, 1)
    for step in (1, 2):
        path = save_whole(tmp_path, model, step=step)
    flip(path / name, (path / name).stat().st_size - 3)

    def work(peers):
        part, mine = cut_model(model, layout, peers.rank), at(layout, peers.rank)
        if name.startswith("training"):
            read_training_slices(path, mine, peers)
        else:
            load_slices(part, path, mine, peers)

    results = attempt_all(3, work)
    assert all(isinstance(result, CheckpointCorrupt) for result in results)
    assert {result.file for result in results} == {str(path / name)}
    assert len({str(result) for result in results}) == 1
    assert "(process " in str(results[0])
    found = on_all(3, lambda peers: latest_on_all_ranks(tmp_path, peers))
    assert found == [tmp_path / "checkpoint-1"] * 3
    assert capfd.readouterr().err.count("checkpoint-2 is broken or incomplete and is skipped") == 1
    if not name.startswith("training"):
        empty, directory = on_all(3, lambda peers: open_on_meta(tmp_path, peers))[0]
        assert directory == tmp_path / "checkpoint-1" and empty.source.endswith("checkpoint-1")


def test_every_file_is_hashed_once(tmp_path, monkeypatch):
    model = tiny()
    path = save_whole(tmp_path, model)
    hashed = []
    original = files.hash_file
    monkeypatch.setattr(
        "pretrain.checkpoint.manifest.hash_file",
        lambda file: (hashed.append(file.name), original(file))[1],
    )
    from pretrain.checkpoint.manifest import read_manifest

    records = read_manifest(path).files
    on_all(3, lambda peers: hash_by_ranks(path, records, peers))
    assert sorted(hashed) == sorted(Path(name).name for name in records)


def test_a_file_that_changes_between_hashing_and_reading(tmp_path, monkeypatch):
    model = tiny()
    path = save_whole(tmp_path, model)
    import pretrain.checkpoint.sharded_loading as partial

    original = partial.hash_by_ranks

    def then_changed(*arguments):
        original(*arguments)
        other = path / "other"
        other.write_bytes((path / "model.safetensors").read_bytes())
        os.replace(other, path / "model.safetensors")

    monkeypatch.setattr(partial, "hash_by_ranks", then_changed)
    with pytest.raises(CheckpointCorrupt, match="another process changed"):
        load_slices(tiny(), path, None, SINGLE_PROCESS)


def test_a_missing_shard_of_the_training_state(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.checkpoint.draft.SMALLEST_SHARE", 1000)
    model = tiny()
    path = save_cut(tmp_path, model, layout_of(model, 1, 2, 1))
    (path / "training" / "optimizer-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match="optimizer-00001-of-00002"):
        read_training(path)
    with pytest.raises(CheckpointCorrupt, match="no such file"):
        verify(path)


class Failing(files.FileIO):
    """Refuses to write to one file."""

    def __init__(self, name: str, code: int) -> None:
        self.name, self.code, self.descriptor = name, code, -1

    def open(self, path, flags, mode=0o666):
        descriptor = super().open(path, flags, mode)
        if Path(path).name == self.name:
            self.descriptor = descriptor
        elif descriptor == self.descriptor:  # the number is used again
            self.descriptor = -1
        return descriptor

    def write(self, descriptor, data):
        if descriptor == self.descriptor:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(descriptor, data)


@pytest.mark.parametrize("owner", [0, 1, 2])
@pytest.mark.parametrize("group", ["model", "optimizer"])
def test_one_process_cannot_write(group, owner, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.checkpoint.draft.SMALLEST_SHARE", 1000)
    model = tiny()
    layout = layout_of(model, 1, 3, 1)
    earlier = save_cut(tmp_path, model, layout, step=1)
    before = contents(earlier)
    state = training(model)
    name = f"{group}-{owner + 1:05d}-of-00003.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(files, "IO", Failing(name, errno.ENOSPC))
        results = attempt_all(
            3,
            lambda peers: save_checkpoint(
                tmp_path,
                cut_model(model, layout, peers.rank),
                step=2,
                tokens=0,
                pretrain_block={},
                training=part_of(state, layout, peers.rank),
                layout=at(layout, peers.rank),
                peers=peers,
            ),
        )
    assert all(isinstance(result, CheckpointError) for result in results)
    assert len({str(result) for result in results}) == 1
    assert "disk is full" in str(results[0]) and f"(process {owner} of 3)" in str(results[0])
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert contents(earlier) == before
    save_cut(tmp_path, model, layout, step=2)
    assert latest(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize("owner", [0, 2])
def test_one_process_holds_a_bad_number(owner, tmp_path):
    model = tiny()
    layout = layout_of(model, 1, 3, 1)

    def work(peers):
        part = cut_model(model, layout, peers.rank)
        if peers.rank == owner:
            with torch.no_grad():
                part.backbone.layers[0].mlp.up.weight[0, 0] = float("nan")
        save_model(part, tmp_path / "m", layout=at(layout, peers.rank), peers=peers)

    results = attempt_all(3, work)
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "mlp.up.weight' holds NaN or infinity" in str(result)
        assert "(process 0 of 3)" in str(result), "it writes the file"
    assert os.listdir(tmp_path) == []


def test_processes_that_do_not_agree(tmp_path):
    model = tiny()
    layout = layout_of(model, 1, 2, 1)

    def work(peers, wrong_layout=False, other=False, elsewhere=False):
        part = cut_model(model, layout, peers.rank)
        state = part_of(training(model), layout, peers.rank)
        if other and peers.rank == 1:
            state.tensors["optimizer"].popitem()
        run = tmp_path / "b" if elsewhere and peers.rank == 1 else tmp_path / "a"
        run.mkdir(exist_ok=True)
        save_checkpoint(
            run,
            part,
            step=1,
            tokens=0,
            pretrain_block={},
            training=state,
            layout=at(layout, 1 - peers.rank if wrong_layout else peers.rank),
            peers=peers,
        )

    with pytest.raises(CheckpointError, match=r"do not agree on what to save: 'optimizer/"):
        on_all(2, lambda peers: work(peers, other=True))
    with pytest.raises(CheckpointError, match="file system that all hosts share"):
        on_all(2, lambda peers: work(peers, elsewhere=True))
    assert os.listdir(tmp_path / "a") == []
    odd = tiny(vocab_size=34)
    layout = layout_of(odd, 1, 2, 1)
    with pytest.raises(CheckpointError, match="it was not sharded as in the layout"):
        on_all(2, work)
    with pytest.raises(CheckpointError, match="layout is for 2 processes, but 1"):
        save_model(tiny(), tmp_path / "m", layout=layout)


def test_the_temporary_directory_of_a_killed_save_is_swept(tmp_path):
    model = tiny()
    layout = layout_of(model, 1, 2, 1)
    litter = directories.temporary_name(tmp_path / "checkpoint-1", "new")
    litter = litter.with_name(litter.name.replace(str(os.getpid()), "999999999"))
    (litter / "training").mkdir(parents=True)
    save_cut(tmp_path, model, layout, step=1)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_the_record_is_that_of_the_file(tmp_path):
    path = save_whole(tmp_path, tiny())
    listed = json.loads((path / "manifest.json").read_text())["files"]
    for name, entry in listed.items():
        data = (path / name).read_bytes()
        assert entry["size"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
