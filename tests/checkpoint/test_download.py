"""Models of the Hub by name: what is fetched, from which commit, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants

import pretrain
import tiny
from pretrain.checkpoint import download, inspect, load
from pretrain.checkpoint.download import fetch_model, pinned
from pretrain.errors import CheckpointCorrupt, CheckpointError, ConfigError
from pretrain.lora import LoraConfig, apply_lora

SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 64}


def model_of(family="bert", seed=0, **options):
    return pretrain.build(family, tokenizer=tiny.tokenizer(), seed=seed, **SIZES, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return model_of().save(tmp_path_factory.mktemp("saved") / "bert")


def same_weights(one, two):
    mine, theirs = one.state_dict(), two.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


def asked(hub, part):
    return [request for request in hub.requests if part in request]


# ------------------------------------------------------------------------------------------------ reading


def test_a_model_is_loaded_by_its_name_and_only_what_it_needs_is_fetched(
    hub, saved, tmp_path, capfd
):
    source = tmp_path / "source"
    shutil.copytree(saved, source)
    for name in ("pytorch_model.bin", "modeling_own.py", "training_args.bin", "onnx.safetensors"):
        (source / name).write_bytes(b"\0" * 100)
    commit = hub.add("org/bert", source, licence="mit")
    model = load("org/bert")
    assert same_weights(model, load(saved)) and model.tokenizer is not None
    assert model.source == f"hub:org/bert@{commit}"
    assert sorted(os.listdir(fetch_model("org/bert")[0])) == sorted(
        [
            ".gitattributes",
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    said = capfd.readouterr().err
    size = sum(path.stat().st_size for path in fetch_model("org/bert")[0].iterdir())
    cache = f"{constants.HF_HUB_CACHE}/models--org--bert"
    assert (
        f"hub:org/bert@{commit}: 6 files, {size / 1e6:,.1f} MB, licence: mit, kept in {cache}"
        in said
    )
    assert "is used, which is in" in said  # the second time, from the cache


def test_a_commit_in_the_cache_asks_nobody(hub, saved):
    commit = hub.add("org/bert", saved)
    load("hub:org/bert")
    hub.requests.clear()
    load(f"hub:org/bert@{commit}")
    assert not hub.requests


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, saved, tmp_path):
    first = hub.add("org/bert", saved)
    newer = model_of(seed=1)
    second = hub.add("org/bert", newer.save(tmp_path / "newer"))
    hub.repositories["org/bert"].refs["v1"] = first
    assert same_weights(load("org/bert@v1"), load(saved))
    assert same_weights(load("org/bert"), newer)
    assert load(f"org/bert@{first}").source == f"hub:org/bert@{first}"
    assert pinned("org/bert") == f"hub:org/bert@{second}"
    # A run that is resumed keeps its commit, unless another revision is named.
    then = f"hub:org/bert@{first}"
    hub.requests.clear()
    assert pinned("org/bert", then) == pinned("org/bert@v1", then) == then
    assert not hub.requests
    assert pinned(f"org/bert@{second}", then) == f"hub:org/bert@{second}"
    assert pinned("org/bert", "hub:org/other@0") == f"hub:org/bert@{second}"


def test_a_directory_of_that_name_wins(hub, saved, tmp_path):
    hub.add("org/bert", model_of(seed=1).save(tmp_path / "other"))
    shutil.copytree(saved, "org/bert")
    assert same_weights(load("org/bert"), load(saved))
    assert not hub.requests
    with pytest.raises(CheckpointError, match=r"org/gpt: no such directory\. .* hub:org/gpt"):
        load("org/gpt")
    assert not hub.requests


def test_shards_sentences_and_the_store_that_repositories_share(hub, saved, tmp_path):
    from pretrain.checkpoint import save_model
    from pretrain.models.sentences import SentenceSettings

    model = model_of()
    model.sentences = SentenceSettings(pooling=("cls",), normalize=True)
    save_model(model, tmp_path / "parts", max_shard_bytes=8000)
    hub.add("org/parts", tmp_path / "parts")
    found = load("org/parts")
    assert same_weights(found, model) and found.sentences.pooling == ("cls",)
    # As files of Xet lie in the cache: the blob of the repository is a link into a store of all repositories.
    place, _ = fetch_model("org/parts")
    blob = os.path.realpath(next(place.glob("model-00001-of-*")))
    shared = place.parents[2] / "blobs" / "ab" / "ab12"
    shared.parent.mkdir(parents=True)
    os.rename(blob, shared)
    os.symlink(shared, blob)
    assert same_weights(load("org/parts"), model)


def test_inspect_and_evaluate_take_names(hub, saved, tmp_path):
    hub.add("org/bert", saved)
    found = inspect("org/bert")
    assert found["path"] == "org/bert" and found["family"] == "bert" and found["parameters"] > 0
    assert (
        found["files"] == 6 and found["bytes"] > 4 * found["parameters"]
    )  # links into the cache count
    (tmp_path / "text.txt").write_text("\n".join(tiny.TEXTS))
    metrics = pretrain.evaluate("org/bert", data=str(tmp_path / "text.txt"))
    assert metrics["targets"] > 0


def test_an_adapter_names_its_base_and_the_commit(hub, saved, tmp_path):
    commit = hub.add("org/bert", saved)
    model = apply_lora(load("org/bert"), LoraConfig(r=2))
    model.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/bert", commit)
    hub.add(
        "org/bert", model_of(seed=1).save(tmp_path / "newer")
    )  # the base goes on, the adapter stays
    assert load(tmp_path / "adapter").adapter.base == f"hub:org/bert@{commit}"
    # Also where nothing is in the cache, and from a repository of its own.
    hub.add("org/adapter", tmp_path / "adapter")
    shutil.rmtree(constants.HF_HUB_CACHE)
    found = load("org/adapter")
    assert found.adapter.base == f"hub:org/bert@{commit}"
    assert same_weights(found, load(tmp_path / "adapter"))


# ------------------------------------------------------------------------------------------------ refusals


def refused(name, *words, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        load(name)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


def test_only_pickles_are_refused_before_anything_large(hub, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    hub.add("org/old", tmp_path / "old")
    refused("org/old", "hub:org/old@", "only pytorch_model.bin", "never fetches")
    assert not asked(hub, ".bin")


def test_the_model_is_checked_before_its_weights_are_fetched(hub, saved, tmp_path):
    def changed(name, **keys):
        shutil.copytree(saved, tmp_path / name)
        config = json.loads((saved / "config.json").read_text()) | keys
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        hub.add(f"org/{name}", tmp_path / name)

    changed("alien", model_type="alien")
    refused("org/alien", "hub:org/alien@", "weights are not fetched", "alien", kind=ConfigError)
    changed("odd", num_attention_heads=3)
    refused("org/odd", "weights are not fetched", kind=ConfigError)
    shutil.copytree(saved, tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").unlink()
    table = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (tmp_path / "part" / "model.safetensors.index.json").write_text(json.dumps(table))
    hub.add("org/part", tmp_path / "part")
    refused("org/part", "lacks model-00001-of-00001.safetensors")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "weights.gguf").write_bytes(b"GGUF")
    hub.add("org/bare", tmp_path / "bare")
    refused("org/bare", "has no model.safetensors", "weights.gguf")
    assert not [request for request in hub.requests if request.endswith("/model.safetensors")]


def test_what_the_hub_refuses_is_one_sentence_each(hub, saved, tmp_path, monkeypatch):
    commit = hub.add("org/bert", saved)
    refused("org/none", "hub:org/none does not exist, or is private", "no directory org/none")
    refused("org/bert@v9", "no revision 'v9'")
    hub.add("org/secret", saved, private=True)
    monkeypatch.delenv("HF_TOKEN")
    refused("hub:org/secret", "does not exist, or is private", "hf auth login")
    hub.add("org/gated", saved, gated=True)
    refused("hub:org/gated", "is gated", f"{hub.url}/org/gated", "hf auth login")
    hub.status = 503
    text = refused("org/bert", "cannot be reached", "503", "hf download org/bert --local-dir DIR")
    assert "There is no directory org/bert either." in text
    hub.status = 0
    monkeypatch.setattr(download, "free_bytes", lambda path: 100)
    refused(
        "org/bert", "disk is too full", f"hub:org/bert@{commit}", "100 bytes are free", "HF_HOME"
    )


def test_without_a_network_the_cache_serves_or_the_way_to_the_files_is_named(
    hub, saved, monkeypatch
):
    commit = hub.add("org/bert", saved)
    load("org/bert")
    hub.add("org/else", saved)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("org/bert").source == f"hub:org/bert@{commit}"
    refused(
        "org/else@v2",
        "HF_HUB_OFFLINE is set",
        "`hf download org/else --revision v2 --local-dir DIR`",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert load("org/bert").source == f"hub:org/bert@{commit}"
    refused("hub:org/else", "cannot be reached (Connect", "hf download org/else")


def test_a_cut_download_ends_with_a_sentence_and_goes_on_where_it_stopped(hub, saved, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("org/bert", saved)
    hub.cut.add("model.safetensors")
    refused("org/bert", "cannot be reached")
    hub.cut.clear()
    hub.requests.clear()
    assert same_weights(load("org/bert"), load(saved))
    assert not asked(hub, "/tokenizer.json")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_is_refused_and_fetched_anew(hub, saved, name):
    hub.add("org/bert", saved)
    hub.damaged.add(name)
    refused("org/bert", f"{name} is damaged", "has been removed", kind=CheckpointCorrupt)
    hub.damaged.clear()
    assert same_weights(load("org/bert"), load(saved))


@pytest.mark.slow
def test_pre_training_goes_on_from_a_model_of_the_hub_with_its_tokenizer(hub, tmp_path):
    commit = hub.add("org/gpt", model_of("gpt2").save(tmp_path / "gpt"))
    (tmp_path / "text.txt").write_text("\n".join(tiny.TEXTS))
    run = pretrain.train(
        data={"train": str(tmp_path / "text.txt"), "row_length": 16, "valid": 0.0},
        model={"checkpoint": "org/gpt"},
        train={"out": str(tmp_path / "run"), "limit": "2 steps", "batch_rows": 2},
    )
    assert f"checkpoint: hub:org/gpt@{commit}" in (run.path / "run.yaml").read_text()
    found = load(run.path)
    assert found.tokenizer.fingerprint == tiny.tokenizer().fingerprint
    assert found.extra_config["pretrain"]["parent"] == f"hub:org/gpt@{commit}"
