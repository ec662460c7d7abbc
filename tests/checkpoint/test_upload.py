"""Models written to the Hub: what ``save`` writes, in one commit, readable by us and by transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

import pretrain
import tiny
from fake_hub import TOKEN
from finetuning.conftest import QUICK, rows_of
from pretrain.checkpoint import load, save_model
from pretrain.cli.main import main
from pretrain.errors import CheckpointError
from pretrain.lora import LoraConfig, apply_lora

SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 64}
OURS = {".gitattributes"}  # written by the Hub itself


def model_of(family="bert", seed=0):
    return pretrain.build(family, tokenizer=tiny.tokenizer(), seed=seed, **SIZES)


def files_of(hub, name):
    repository = hub.repositories[name]
    found = repository.commits[repository.refs["main"]]
    return {path: data for path, data in found.items() if path not in OURS}


def test_what_save_writes_is_pushed_in_one_commit_and_loaded_again(hub, tmp_path, capfd):
    model = model_of()
    save_model(model, tmp_path / "saved", repository="org/bert")
    address = model.push_to_hub("org/bert", private=True)
    assert files_of(hub, "org/bert") == {
        p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()
    }
    repository = hub.repositories["org/bert"]
    assert repository.private and len(repository.commits) == 2  # that of the Hub, and ours
    assert address == f"{hub.url}/org/bert/commit/{repository.refs['main']}"
    assert "hub:org/bert: 6 files, " in capfd.readouterr().err
    again = load("org/bert")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_new_model_replaces_the_files_of_the_old_one_and_no_others(hub, tmp_path):
    save_model(model_of(), tmp_path / "parts", max_shard_bytes=8000)
    first = hub.add("org/bert", tmp_path / "parts")
    repository = hub.repositories["org/bert"]
    repository.commit({**repository.commits[first], "picture.png": b"png"})
    model_of(seed=1).push_to_hub("hub:org/bert", message="Train again")
    names = set(files_of(hub, "org/bert"))
    assert "model.safetensors" in names and "picture.png" in names
    assert not [name for name in names if "-of-" in name or name.endswith("index.json")]
    assert len(repository.commits) == 3
    load("org/bert")
    load(f"org/bert@{first}")


def test_an_adapter_is_pushed_if_its_base_is_on_the_hub(hub, tmp_path):
    base = model_of()
    base.save(tmp_path / "base")
    local = apply_lora(load(tmp_path / "base", quiet=True), LoraConfig(r=2))
    with pytest.raises(
        CheckpointError, match=r"its base, .*/base, is not on the Hub\. Merge it first"
    ):
        local.push_to_hub("org/adapter")
    assert "org/adapter" not in hub.repositories
    base.push_to_hub("org/base")
    apply_lora(load("org/base"), LoraConfig(r=2)).push_to_hub("org/adapter")
    shutil.rmtree(tmp_path / "cache")
    found = load("org/adapter")
    assert found.adapter is not None and found.adapter.base.startswith("hub:org/base@")


def test_what_cannot_be_pushed_is_one_sentence(hub, monkeypatch):
    for name in ("bert base", "org/name@main", "../x", "bert", "hub:bert"):
        with pytest.raises(
            CheckpointError, match=r"is no name of a repository.*or your own account"
        ):
            model_of().push_to_hub(name)
    assert (
        not hub.repositories and not hub.requests
    )  # an account without a name in it is found by the Hub too late
    hub.status = 503
    with pytest.raises(
        CheckpointError, match=r"^hub:org/bert is not written.*Run the same command"
    ):
        model_of().push_to_hub("org/bert")
    hub.status = 0
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1])
    with pytest.raises(
        CheckpointError, match=r"^hub:org/bert: the Hub denies access \(401\).*hf auth login"
    ):
        model_of().push_to_hub("org/bert")


def test_a_run_is_pushed_with_its_card_and_without_what_resuming_needs(hub, tmp_path, capfd):
    start = model_of().save(tmp_path / "start")
    result = pretrain.finetune(
        str(start), rows_of(), "classification", **QUICK, out=tmp_path / "run"
    )
    result.report()
    assert main(["push", str(tmp_path / "run"), "org/animals"]) == 0
    assert capfd.readouterr().out.startswith(f"{hub.url}/org/animals/commit/")
    files = files_of(hub, "org/animals")
    assert not [name for name in files if name.startswith("training")]
    card = files["README.md"].decode()
    assert 'pretrain.load("org/animals")' in card and "## Figures" in card
    assert "path/to/this/directory" in result.model.card  # that of the run stays
    text = "the old dog sat"
    assert load("org/animals").predict(text) == result.predict(text)
    result.push_to_hub("org/other")
    assert files_of(hub, "org/other")["model.safetensors"] == files["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_transformers_opens_what_was_pushed(hub, tmp_path, family):
    model = model_of(family)
    model.push_to_hub("org/model")
    ids = torch.arange(5, 15)[None]
    auto = "AutoModelForCausalLM" if family == "gpt2" else "AutoModelForMaskedLM"
    code = f"""
import torch, transformers
model, info = transformers.{auto}.from_pretrained("org/model", output_loading_info=True)
tokenizer = transformers.AutoTokenizer.from_pretrained("org/model")
assert not info["missing_keys"] and len(tokenizer) == {len(tiny.tokenizer())}
torch.save(model.eval()(torch.arange(5, 15)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    mine = model.eval()({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(mine.view_as(theirs), theirs, atol=1e-4, rtol=1e-4)
