"""Tokenizers of the Hub by name: what is fetched, which commit is recorded, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import pretrain
import tiny
from fake_hub import FakeHub
from pretrain.cli.main import main
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import CheckpointError, ConfigError, TokenizerError


@pytest.fixture
def commit(hub: FakeHub, tmp_path: Path) -> str:
    """The commit of org/words, which holds a tokenizer beside files that must not be fetched."""
    source = tmp_path / "source"
    tiny.tokenizer().save(source)
    for name in ("model.safetensors", "pytorch_model.bin", "modeling.py", "onnx.json"):
        (source / name).write_bytes(b"0" * 100)
    (tmp_path / "text.txt").write_text("\n".join(tiny.TEXTS))
    return hub.add("org/words", source)


def changed(hub: FakeHub, tmp_path: Path) -> str:
    """Commit another tokenizer to org/words."""
    train_from_texts(tiny.TEXTS, "wordpiece", vocab_size=60).save(tmp_path / "newer")
    return hub.add("org/words", tmp_path / "newer")


def test_only_the_tokenizer_is_fetched(hub: FakeHub, commit: str) -> None:
    found = Tokenizer.open("org/words")
    assert found.fingerprint == tiny.tokenizer().fingerprint
    assert found.source == f"hub:org/words@{commit}"
    fetched = {r.rpartition("/")[2] for r in hub.requests if "/resolve/" in r}
    assert fetched == {".gitattributes", "tokenizer.json", "tokenizer_config.json"}
    hub.requests.clear()
    assert Tokenizer.open(f"org/words@{commit}").source == found.source
    assert not hub.requests, "a commit in the cache asks nobody"


def test_prepare_takes_a_name_and_records_the_commit(
    hub: FakeHub, commit: str, tmp_path: Path
) -> None:
    words = ["prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data")]
    assert main([*words, "--tokenizer", "org/words", "--row_length", "16"]) == 0
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["options"]["tokenizer"] == f"hub:org/words@{commit}"
    data = pretrain.prepare(str(tmp_path / "text.txt"), tokenizer=tiny.tokenizer(), row_length=16)
    assert data.manifest["options"]["tokenizer"] == "wordpiece"
    assert data.manifest["tokenizer"]["fingerprint"] == manifest["tokenizer"]["fingerprint"]


def test_a_run_names_the_commit_and_keeps_it_when_it_is_resumed(
    hub: FakeHub, commit: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(steps: int, tokenizer: str = "org/words") -> pretrain.Run:
        return pretrain.train(
            data={"train": str(tmp_path / "text.txt"), "row_length": 16, "tokenizer": tokenizer},
            model={
                "family": "gpt2",
                "size": "tiny",
                "overrides": {"hidden_size": 16, "num_heads": 2},
            },
            train={"out": str(tmp_path / "run"), "limit": f"{steps} steps", "batch_rows": 2},
            optim={"schedule": "constant"},
        )

    run = train(2)
    name = f"hub:org/words@{commit}"
    assert f"tokenizer: {name}" in (run.path / "run.yaml").read_text()
    config = json.loads((run.result / "config.json").read_text())  # type: ignore[operator]
    assert config["pretrain"]["tokenizer"] == name
    newer = changed(hub, tmp_path)
    hub.requests.clear()
    assert train(4).step == 4
    assert not hub.requests
    with pytest.raises(ConfigError, match=r"cannot change.*data\.tokenizer is 'hub:"):
        train(6, f"org/words@{newer}")


def test_prepared_data_are_not_said_to_differ_from_their_own_tokenizer(
    hub: FakeHub, commit: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from pretrain.config import RunConfig
    from pretrain.training.run import open_data, resolve_tokenizer

    data = pretrain.prepare(
        str(tmp_path / "text.txt"), tmp_path / "data", tokenizer="org/words", row_length=16
    )
    settings = RunConfig.load({"data.train": str(data.path), "data.tokenizer": "org/words"})
    capfd.readouterr()
    settings.data.tokenizer = resolve_tokenizer(settings)
    open_data(settings)
    assert "was prepared with" not in capfd.readouterr().err
    newer = changed(hub, tmp_path)
    settings.data.tokenizer = f"hub:org/words@{newer}"
    open_data(settings)
    said = capfd.readouterr().err
    assert f"'hub:org/words@{commit}' (not 'hub:org/words@{newer}')" in said


def test_without_a_network_the_cache_serves(
    hub: FakeHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokenizer.open("org/words")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert Tokenizer.open("org/words").source == f"hub:org/words@{commit}"
    assert not hub.requests
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*hf download org/none"):
        Tokenizer.open("org/none")


def test_what_cannot_be_opened_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "bert"}')
    hub.add("org/bare", tmp_path / "bare")
    with pytest.raises(TokenizerError, match="bare"):
        Tokenizer.open("org/bare")
    with pytest.raises(CheckpointError, match="hub:org/none does not exist, or is private"):
        Tokenizer.open("org/none")


def test_a_directory_of_that_name_wins(hub: FakeHub, commit: str) -> None:
    tiny.tokenizer().save("org/words")
    assert Tokenizer.open("org/words").source is None
    shutil.rmtree("org/words")
    with pytest.raises(TokenizerError, match=r"hub:org/words"):
        Tokenizer.open("org/words")
    assert not hub.requests
