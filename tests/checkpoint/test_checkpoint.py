"""The checkpoint directory: transformers opens ours, we open theirs, resuming is exact, old ones rotate."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import yaml

import pretrain.models.state
from contract import TEXT_FAMILIES
from pretrain.checkpoint import (
    RunLock,
    TrainingState,
    estimated_size,
    inspect,
    latest,
    load,
    read_training,
    rotate,
    save_checkpoint,
    save_model,
    verify,
)
from pretrain.config.spelling import Interface, using
from pretrain.data.prepare import prepare
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.models import build

SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 16}
TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
IDS = torch.tensor([[7, 8, 9, 10, 11, 12]])


@pytest.fixture(scope="module")
def tokenizer():
    return train_from_texts(TEXTS, "char")


def tiny(family="gpt2", tokenizer=None, **options):
    options = {"vocab_size": 32} | options if tokenizer is None else options
    return build(family, tokenizer=tokenizer, **SIZES, **options)


def equal_weights(one, two):
    mine, theirs = one.state_dict(), two.state_dict()
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def auto_class(model):
    causal = model.head_kind == "causal-lm"
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM


def checkpoint(run, step, model=None, **options):
    options = {"tokens": 100 * step, "pretrain_block": {}} | options
    return save_checkpoint(run, model or tiny(), step=step, **options)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_transformers_opens_what_we_save(family, shards, tmp_path, tokenizer):
    model = tiny(family, tokenizer).eval()
    limit = 10**9 if shards == 1 else estimated_size(model) - (16 << 20)
    limit = limit if shards == 1 else limit // 3 // shards
    path = save_checkpoint(
        tmp_path, model, step=1, tokens=5, pretrain_block={}, max_shard_bytes=limit
    )
    assert (path / "model.safetensors.index.json").exists() == (shards > 1)
    theirs, info = auto_class(model).from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # transformers 5 forces Qwen's own text splitting on the type "qwen2"; the model card says so
    automatic = (
        transformers.AutoTokenizer if family != "qwen2" else transformers.PreTrainedTokenizerFast
    )
    text = automatic.from_pretrained(path)
    assert ("PreTrainedTokenizerFast" in (path / "README.md").read_text()) == (family == "qwen2")
    assert text("lazy fox", add_special_tokens=False)["input_ids"] == tokenizer.encode("lazy fox")
    with torch.no_grad():
        expected = theirs.eval()(IDS).logits
        assert torch.allclose(model({"input_ids": IDS}), expected, rtol=1e-5, atol=1e-5)
        ours = load(path, quiet=True)
        assert torch.equal(ours({"input_ids": IDS}), model({"input_ids": IDS}))
    equal_weights(ours, model)
    assert ours.tokenizer.encode("lazy fox") == tokenizer.encode("lazy fox")
    for name in os.listdir(path):
        if name.endswith(".safetensors"):
            with safetensors.safe_open(path / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_we_open_what_transformers_saves(family, tmp_path, capfd):
    """Single file, shards, the body alone (no prefix), bfloat16; none with a tokenizer beside it."""
    model = tiny(family).eval()
    save_model(model, tmp_path / "ours")
    theirs = auto_class(model).from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "single")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    with torch.no_grad():
        expected = theirs(IDS).logits
        for name in ("single", "sharded"):
            capfd.readouterr()
            found = load(tmp_path / name)
            assert found.tokenizer is None
            said = capfd.readouterr().err
            assert re.fullmatch(
                rf"{family}: \d+ tensors, 0 missing, 0 unexpected(, head tied)?\n", said
            )
            assert torch.allclose(found({"input_ids": IDS}), expected, rtol=1e-5, atol=1e-5)
        body = getattr(theirs, theirs.base_model_prefix)
        body.save_pretrained(tmp_path / "body")
        found = load(tmp_path / "body", quiet=True)
        assert found.head is None
        assert torch.allclose(found({"input_ids": IDS}), body(IDS)[0], rtol=1e-5, atol=1e-5)
        theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
        found = load(tmp_path / "bf16", quiet=True)
        assert {p.dtype for p in found.parameters()} == {torch.float32}
        assert torch.equal(
            found.disk_state()[(some := sorted(found.disk_state())[0])],
            theirs.state_dict()[some].float(),
        )


def test_a_body_gets_a_fresh_head_which_is_named(tmp_path, capfd):
    save_model(tiny("bert"), tmp_path / "m")
    found = load(tmp_path / "m", head="sequence-classification")
    said = capfd.readouterr().err
    assert (
        "missing (newly initialised: bert.pooler.dense" in said
        or "missing (newly initialised: classifier" in said
    )
    assert "unexpected (not used: cls.predictions" in said
    assert len(said.splitlines()) == 1
    assert found({"input_ids": IDS}).shape == (1, 2)


def test_an_untied_head_stays_apart(tmp_path, capfd):
    model = tiny("llama", tie_embeddings=False)
    save_model(model, tmp_path / "m")
    equal_weights(load(tmp_path / "m"), model)
    assert "tied" not in capfd.readouterr().err
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["tie_word_embeddings"] = True  # the file decides, and says so
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    equal_weights(load(tmp_path / "m", verify=False), model)
    assert "head untied, because its weights differ from the embedding" in capfd.readouterr().err


def test_a_download_cache_of_the_hub_is_followed_and_no_other_link(tmp_path):
    save_model(tiny(), tmp_path / "m")
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "m" / name).rename(repo / "blobs" / f"hash-{name}")
        os.symlink(f"../../blobs/hash-{name}", snapshot / name)
    equal_weights(load(snapshot, quiet=True), tiny())
    outside = tmp_path / "outside.json"
    (repo / "blobs" / "hash-config.json").rename(outside)
    (snapshot / "config.json").unlink()
    os.symlink(outside, snapshot / "config.json")
    with pytest.raises(CheckpointCorrupt, match="regular file"):
        load(snapshot)


# ------------------------------------------------------------------------------------------------ what is written


def test_config_card_and_generation_config(tmp_path, tokenizer):
    block = {
        "objective": {"name": "NextToken"},
        "metrics": {"loss": 2.5, "perplexity": math.inf, "targets": 10491.0},
        "sources": [
            {"name": "/home/me/books/*.txt", "license": "cc0-1.0", "tokens": 1234},
            {"name": "a | b", "tokens": 5},
        ],
    }
    path = checkpoint(tmp_path / "run", 7, tiny("gpt2", tokenizer), pretrain_block=block)
    config = json.loads((path / "config.json").read_text())
    assert config["pretrain"]["step"] == 7
    assert config["pretrain"]["tokens_seen"] == 700
    assert config["pretrain"]["sources"][0]["name"] == "*.txt"
    assert config["pretrain"]["metrics"] == {"loss": 2.5, "perplexity": "inf", "targets": 10491.0}
    assert set(config["pretrain"]["versions"]) == {"pretrain", "torch"}
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id
    _, head, body = (path / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["pretrain", "gpt2"]
    assert "license" not in head, "one source does not state any"
    for fact in (
        "objective: NextToken",
        "tokens seen: 700",
        "held-out loss: 2.5",
        "held-out targets: 10,491",
        "cc0-1.0",
        "1,234",
        "a \\| b",
    ):
        assert fact in body
    assert load(path, quiet=True).generation_config == generation

    encoder = checkpoint(
        tmp_path / "bert", 7, tiny("bert"), pretrain_block={"sources": block["sources"][:1]}
    )
    assert not (encoder / "generation_config.json").exists()
    head = yaml.safe_load((encoder / "README.md").read_text().split("---\n")[1])
    assert head["pipeline_tag"] == "fill-mask"
    assert head["license"] == "cc0-1.0"


def test_the_card_of_another_model_stays(tmp_path, tokenizer):
    """Without a block of ours nothing is known of its training, and nothing is claimed."""
    model = tiny("gpt2", tokenizer)
    model.save(tmp_path / "theirs")
    made = (tmp_path / "theirs" / "README.md").read_text()
    assert "Trained with" not in made and "Opens in `transformers`" in made
    (tmp_path / "theirs" / "manifest.json").unlink()
    card = "---\nlicense: cc-by-nc-4.0\nlanguage: de\nbase_model: org/base\n---\n# Theirs\n"
    (tmp_path / "theirs" / "README.md").write_text(card)
    opened = load(tmp_path / "theirs", quiet=True)
    opened.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == card
    verify(tmp_path / "copy")
    assert load(tmp_path / "copy", quiet=True).card == card
    other = load(tmp_path / "theirs", head="sequence-classification", quiet=True)
    other.save(tmp_path / "other")
    unlike = (tmp_path / "other" / "README.md").read_text()
    assert "# Theirs" not in unlike and "license: cc-by-nc-4.0\nlanguage: de\n" in unlike
    # Once it is trained here, the card is ours, with their terms.
    block = {"objective": "NextToken", "step": 1}
    trained = checkpoint(tmp_path / "run", 1, opened, pretrain_block=block)
    ours = (trained / "README.md").read_text()
    assert "# Theirs" not in ours and "Trained with `pretrain`" in ours
    assert "license: cc-by-nc-4.0\nlanguage: de\n" in ours
    assert load(trained, quiet=True).card is None


def test_nothing_of_this_machine_is_in_any_file(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-token-4711")
    monkeypatch.chdir(tmp_path)
    tokenizer.config["name_or_path"] = str(tmp_path / "somewhere" / "tok")
    model = tiny("gpt2", tokenizer)
    model.extra_config["base"] = str(tmp_path / "canary-folder")
    block = {"sources": [{"name": str(tmp_path / "books")}], "parent": str(tmp_path / "old-run")}
    path = checkpoint(
        tmp_path / "run", 1, model, pretrain_block=block, training=TrainingState({}, {"a": 1})
    )
    tokenizer.config.pop("name_or_path")
    words = [str(tmp_path), "canary-token-4711", os.path.expanduser("~/"), os.uname().nodename]
    for file in path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not [word for word in words if word.encode() in data], file.name
    assert json.loads((path / "config.json").read_text())["pretrain"]["parent"] == "old-run"


def test_the_same_save_gives_the_same_bytes(tmp_path, tokenizer):
    saves = [
        checkpoint(tmp_path / run, 3, tiny("gpt2", tokenizer), training=state())
        for run in ("a", "b")
    ]
    one, two = ({p.name: p.read_bytes() for p in path.rglob("*") if p.is_file()} for path in saves)
    assert one == two


def test_the_pretrain_block_lives_on_in_a_copy(tmp_path):
    path = checkpoint(tmp_path / "run", 7, pretrain_block={"objective": "NextToken"})
    model = load(path, quiet=True)
    save_model(model, tmp_path / "copy")
    assert inspect(tmp_path / "copy")["objective"] == "NextToken"
    equal_weights(load(tmp_path / "copy", quiet=True), model)


def test_a_model_with_a_bad_number_is_not_saved(tmp_path):
    checkpoint(tmp_path, 1)
    for value in (math.nan, math.inf, -math.inf):
        model = tiny()
        with torch.no_grad():
            next(model.parameters())[1, 2] = value
        with pytest.raises(CheckpointError, match=r"weight '.+' holds NaN or infinity"):
            checkpoint(tmp_path, 2, model)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_save_model_replaces_a_model_and_nothing_else(tmp_path):
    target = tmp_path / "m"
    for seed in (0, 1):
        save_model(tiny(seed=seed), target)
        equal_weights(load(target, quiet=True), tiny(seed=seed))
    transformers.AutoModelForCausalLM.from_pretrained(target).save_pretrained(tmp_path / "theirs")
    save_model(tiny(), tmp_path / "theirs")
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds 'thesis\.tex'"):
        save_model(tiny(), target)
    assert (target / "thesis.tex").exists()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    os.symlink("m", tmp_path / "link")
    for name in ("file", "fifo", "link"):
        with pytest.raises(CheckpointError, match="not a directory"):
            save_model(tiny(), tmp_path / name)
    with pytest.raises(CheckpointError):
        save_model(tiny(), tmp_path / "file" / "below")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "link", "m", "theirs"]
    (tmp_path / "empty").mkdir()
    equal_weights(load(save_model(tiny(), tmp_path / "empty"), quiet=True), tiny())


def test_saving_over_a_checkpoint_never_drops_what_resuming_needs(tmp_path):
    path = checkpoint(tmp_path, 1, training=state())
    with pytest.raises(CheckpointError, match="holds 'training', which .* would be lost"):
        load(path, quiet=True).save(path)
    assert read_training(path).state["lr"] == 6e-4
    checkpoint(tmp_path, 1, training=state())  # the run itself replaces its own step


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_saving_makes_one_tensor_at_a_time(family, tmp_path, monkeypatch):
    """No second copy of the weights: what is not a view of a parameter is gone before the next is made."""
    model = tiny(family)
    expected = model.disk_state()
    largest = max(tensor.nbytes for tensor in expected.values())
    shared = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copies, made, peak, original = [], [], [0], pretrain.models.state.to_disk

    def watched(entry, parameters, device="cpu"):
        tensor = original(entry, parameters, device)
        if not tensor.is_meta:
            made.append(entry.disk)
            if tensor.untyped_storage().data_ptr() not in shared:
                copies.append(weakref.ref(tensor))
            peak[0] = max(peak[0], sum(t.nbytes for ref in copies if (t := ref()) is not None))
        return tensor

    monkeypatch.setattr(pretrain.models.state, "to_disk", watched)
    for limit in (10**9, largest):
        made.clear()
        path = save_model(model, tmp_path / str(limit), max_shard_bytes=limit)
        assert sorted(made) == sorted(expected)  # each tensor once
    assert peak[0] <= largest
    equal_weights(load(path, quiet=True), model)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoint(tmp_path, 3)
    path = checkpoint(tmp_path, 3, tiny(seed=1))
    equal_weights(load(path, quiet=True), tiny(seed=1))
    assert os.listdir(tmp_path) == ["checkpoint-3"]
    os.symlink("checkpoint-3", tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match="is a link"):
        checkpoint(tmp_path, 4)


# ------------------------------------------------------------------------------------------------ resuming


def state():
    torch.manual_seed(1)
    tensors = {
        "exp_avg/backbone.embedding.weight": torch.randn(3, 4),
        "exp_avg.head.bias": torch.randn(4).to(torch.bfloat16),
        "step/head.bias": torch.tensor(12.0),
        "count": torch.tensor([2**62, -1]),
    }
    floats = [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308, math.pi, 2.0, math.inf, -math.inf]
    return TrainingState(
        {"optimizer": tensors, "weights": {"w": torch.randn(2)}},
        {
            "floats": floats,
            "lr": 6e-4,
            "rows": 2**53 + 1,
            "text": "a\u2028\U0001f600",
            "none": None,
            "deep": {"x": [True, {}]},
        },
    )


def test_training_state_comes_back_bit_for_bit(tmp_path):
    saved, path = state(), checkpoint(tmp_path, 5, training=state())
    for place in (path, tmp_path):
        found = read_training(place)
        assert found.state == saved.state
        assert [struct.pack("<d", x) for x in found.state["floats"]] == [
            struct.pack("<d", x) for x in saved.state["floats"]
        ]
        assert set(found.tensors) == {"optimizer", "weights"}
        for stem, group in saved.tensors.items():
            assert set(found.tensors[stem]) == set(group)
            for name, tensor in group.items():
                assert found.tensors[stem][name].dtype == tensor.dtype
                assert torch.equal(found.tensors[stem][name], tensor)
    nan = checkpoint(tmp_path / "nan", 1, training=TrainingState({}, {"x": math.nan}))
    assert math.isnan(read_training(nan).state["x"])


def test_state_that_json_would_change_is_refused(tmp_path):
    for wrong in ({"a": {1: 2}}, {"a": torch.zeros(1)}, {"a": {3}}, {"a": b"x"}):
        with pytest.raises(CheckpointError, match=r"state\.a"):
            checkpoint(tmp_path, 1, training=TrainingState({}, wrong))
    with pytest.raises(CheckpointError, match="letters, digits"):
        checkpoint(tmp_path, 1, training=TrainingState({"../x": {}}, {}))
    assert os.listdir(tmp_path) == []


def test_a_deleted_training_folder_loads_but_does_not_resume(tmp_path):
    path = checkpoint(tmp_path, 5, training=state())
    for file in (path / "training").iterdir():
        file.unlink()
    (path / "training").rmdir()
    verify(path)
    assert latest(tmp_path) == path
    load(path, quiet=True)
    assert inspect(path)["resumable"] is False
    assert inspect(path)["manifest"] == "holds"
    with pytest.raises(
        CheckpointError, match=r"no training/ folder.*cannot be resumed.*start a new run"
    ):
        read_training(path)
    with pytest.raises(CheckpointError, match="no training/ folder"):
        read_training(save_model(tiny(), tmp_path / "alone"))


def test_other_settings_are_named_on_resume(tmp_path, capfd):
    path = checkpoint(tmp_path, 5, training=state())
    read_training(path)
    assert capfd.readouterr().err == ""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        read_training(path)
        assert f"threads {before} -> {before + 1}" in capfd.readouterr().err
        read_training(path, quiet=True)
        assert capfd.readouterr().err == ""
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ rotation


def steps(run):
    return sorted(int(name.removeprefix("checkpoint-")) for name in os.listdir(run))


def test_rotation_goes_by_step_and_spares_the_best(tmp_path):
    for step in (9, 10, 11, 100):
        path = checkpoint(tmp_path, step, keep=2, protect={9})
        os.utime(path, (10**9 - step, 10**9 - step))  # the newest by step is the oldest by time
        assert latest(tmp_path) == path
    assert steps(tmp_path) == [9, 11, 100]
    checkpoint(tmp_path, 101, keep=1, protect=[100])
    assert steps(tmp_path) == [100, 101]
    assert [path.name for path in rotate(tmp_path, keep=1)] == ["checkpoint-100"]
    with pytest.raises(CheckpointError, match="keep is 0"):
        checkpoint(tmp_path, 102, keep=0)
    assert steps(tmp_path) == [101]


def test_rotation_never_counts_a_broken_checkpoint(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step, keep=9)
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    os.truncate(tmp_path / "checkpoint-3" / "model.safetensors", 10)
    checkpoint(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [1, 2, 3, 4], "1 is the second complete one"
    checkpoint(tmp_path, 5, keep=2)
    assert steps(tmp_path) == [2, 4, 5], "what has no manifest may be of another program"


def test_rotation_leaves_higher_steps_and_other_names_alone(tmp_path):
    for step in (5, 50):
        checkpoint(tmp_path, step, keep=9)
    os.truncate(tmp_path / "checkpoint-50" / "config.json", 3)
    for name in ("checkpoint-best", "checkpoint-007", "notes", "checkpoint-1.bak"):
        (tmp_path / name).mkdir()
    checkpoint(tmp_path, 6, keep=1)
    left = {
        "checkpoint-6",
        "checkpoint-50",
        "checkpoint-best",
        "checkpoint-007",
        "notes",
        "checkpoint-1.bak",
    }
    assert set(os.listdir(tmp_path)) == left


def test_latest_of_nothing(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    (tmp_path / "file").write_text("x")
    assert latest(tmp_path / "file") is None


def test_saving_under_the_lock_sweeps(tmp_path):
    with RunLock(tmp_path):
        checkpoint(tmp_path, 1)
        assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "run.lock"]


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_says_what_lies_there(tmp_path, tokenizer, monkeypatch):
    model = tiny("qwen3", tokenizer)
    path = checkpoint(
        tmp_path, 12, model, pretrain_block={"objective": "NextToken"}, training=state()
    )
    monkeypatch.setattr(
        "pretrain.checkpoint.model_directory.checked_tensors", None
    )  # weights are not loaded
    found = inspect(tmp_path)
    expected = {
        "family": "qwen3",
        "architecture": "Qwen3ForCausalLM",
        "parameters": model.num_parameters(),
        "objective": "NextToken",
        "tokens_seen": 1200,
        "step": 12,
        "vocabulary": len(tokenizer),
        "manifest": "holds",
        "resumable": True,
        "checkpoint": "checkpoint-12",
    }
    assert {key: found[key] for key in expected} == expected
    assert found["files"] == sum(file.is_file() for file in path.rglob("*"))
    assert found["bytes"] == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    json.dumps(found, allow_nan=False)
    os.truncate(path / "README.md", 3)
    assert inspect(path)["manifest"].startswith("broken: ")
    assert "README.md" in inspect(path)["manifest"]
    (path / "manifest.json").unlink()
    assert "manifest.json" in inspect(path)["manifest"]
    os.truncate(path / "model.safetensors", 3)
    assert "model.safetensors" in inspect(path)["problem"]
    with pytest.raises(CheckpointError, match="no such directory"):
        inspect(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["text", "images"])
def test_prepared_data_are_named_where_a_model_is_expected(tmp_path, kind):
    folder = tmp_path / "my data"
    if kind == "text":
        (tmp_path / "a.txt").write_text("\n".join(TEXTS))
        prepare(tmp_path / "a.txt", folder, tokenizer="char", row_length=8, workers=1, quiet=True)
    else:
        np.savez(tmp_path / "a.npz", images=np.zeros((4, 2, 2), np.uint8), labels=np.arange(4) % 2)
        prepare(tmp_path / "a.npz", folder, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command = {
        "text": f"pretrain train --data '{folder}'",
        "images": f"pretrain train --data.source images --data.source_args.train '{folder}'",
    }
    for use in (load, inspect, verify, read_training):
        with pytest.raises(CheckpointError, match=f"holds prepared {kind} and no model") as error:
            use(folder)
        assert "pretrain.train(data=" in str(error.value) and "damaged" not in str(error.value)
        with using(Interface(command=True)), pytest.raises(CheckpointError) as error:
            use(folder)
        assert f"{command[kind]}, or" in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointCorrupt, match="manifest.json is damaged"):
        load(folder)


def test_nothing_that_names_code_is_written_back(tmp_path):
    path = save_model(tiny(), tmp_path / "m")
    (path / "manifest.json").unlink()
    foreign = {
        "auto_map": {"x": "evil--m.C"},
        "vocab_file": "evil",
        "custom_pipelines": {"a": "evil"},
    }
    foreign |= {"_commit_hash": "evil", "mine": {"deep": [{"merges_file": "evil", "kept": 5}]}}
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | foreign))
    model = load(path, quiet=True)
    model.extra_config["spm_file"] = model.generation_config["_evil"] = (
        "evil"  # however it got there
    )
    again = save_model(model, tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        text = (again / name).read_text()
        assert "evil" not in text and "_file" not in text and "auto_map" not in text
        assert json.loads(text)["mine"] == {"deep": [{"kept": 5}]}


def test_inspect_what_transformers_saved(tmp_path):
    save_model(tiny("bert"), tmp_path / "m")
    transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "m").save_pretrained(
        tmp_path / "theirs"
    )
    found = inspect(tmp_path / "theirs")
    assert found["manifest"] == "absent"
    assert found["objective"] is None
    assert found["parameters"] == tiny("bert").num_parameters()


def test_a_directory_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.yaml").touch()
    for use in (load, inspect):
        with pytest.raises(CheckpointError, match="holds no model but runs: one"):
            use(tmp_path / "runs")
        with pytest.raises(CheckpointError, match="is a run without a checkpoint"):
            use(tmp_path / "runs" / "one")


def test_an_edited_file_says_how_to_keep_the_change(tmp_path: Path) -> None:
    """Whether or not the length changed."""
    model = build(
        "gpt2", num_layers=1, hidden_size=64, num_heads=2, vocab_size=64, max_positions=16
    )
    for k, change in enumerate(
        (lambda text: text + "\n", lambda text: text.replace("64", "65", 1))
    ):
        path = model.save(tmp_path / f"{k}")
        file = path / "config.json"
        file.write_text(change(file.read_text()))
        with pytest.raises(CheckpointCorrupt, match="If you changed it on purpose"):
            load(path)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["adapter_config.json", "adapter_model.bin", "training_args.bin"], "load_peft_weights"),
        (
            ["config.json", "model-00001-of-00002.safetensors", "optimizer.pt"],
            "no model.safetensors.index.json",
        ),
        (["config.json", "model.fp16.safetensors"], "rename it model.safetensors"),
        (["snapshots/0/config.json"], "hub:org/name, or a folder in"),
        (
            ["training_args.bin", "french/adapter_config.json", "german/adapter_config.json"],
            "french, german",
        ),
        (["config.json", "pytorch_model.bin"], "only pytorch_model.bin"),
        (["config.json", "pytorch_model.bin", "vectors.safetensors"], "only pytorch_model.bin"),
        (["consolidated.safetensors", "model-00001-of-00002.safetensors"], "holds model-00001-of"),
        (["run.yaml", "model/adapter_config.json"], "a run without a checkpoint"),
        (["one/run.yaml", "two/adapter_config.json"], "no model but runs: one"),
    ],
)
def test_where_the_weights_are_is_said(tmp_path, files, advice):
    """Their files are there under other names, in folders, or without the one that lists them."""
    folder = tmp_path / "models--org--name"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert advice in str(caught.value)
