"""A family of the user's own, named by its path, works with every command; a file never names code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import pretrain
import pretrain.models
from pretrain.cli.main import main
from pretrain.errors import ConfigError, ModelError

FAMILY = "own_gpt:OwnGPT"
CODE = '''
from torch import nn

from pretrain.models.gpt2 import GPT2
from pretrain.models.names import Name


class OwnGPT(GPT2):
    """GPT-2 under another name."""

    model_type = "own-gpt"
    architectures = {**GPT2.architectures, None: "OwnGPTModel", "causal-lm": "OwnGPTLMHeadModel"}


class Normed(OwnGPT):
    """With running statistics."""

    def __init__(self, config):
        super().__init__(config)
        self.statistics = nn.BatchNorm1d(config.hidden_size)

    def forward(self, batch, *, cache=None):
        x = super().forward(batch, cache=cache)
        return self.statistics(x.reshape(-1, x.shape[-1])).view_as(x)

    def names(self):
        return [*super().names(), Name("statistics", ("statistics",))]


class Forgotten(Normed):
    """Without a name for them."""

    def names(self):
        return super().names()[:-1]


class Hidden(OwnGPT):
    """With state that is no tensor."""

    def get_extra_state(self):
        return {"seen": 1}


class Early(OwnGPT):
    """With a buffer computed from weights that are not there yet."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("norms", self.token_embedding.weight.detach().norm(dim=1))


class Nameless(GPT2):
    """With the model type of GPT-2."""
'''
TEXTS = [f"the {who} {does} it" for who in ("cat", "dog", "man") for does in ("saw", "fed", "hid")]


@pytest.fixture
def unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has named the family yet in this process, and its module can be imported."""
    (tmp_path / "own_gpt.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 40), encoding="utf-8")
    rows = [json.dumps({"text": text, "label": text.split()[1]}) for text in TEXTS * 2]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_gpt", None)
    forget()


def forget() -> None:
    pretrain.models._OWN.clear()


def test_every_command(unknown: None, capsys: pytest.CaptureFixture[str]) -> None:
    """With running statistics in the family, which every command must carry along."""
    family = "own_gpt:Normed"
    sizes = ["--model.overrides.hidden_size", "16", "--model.overrides.num_layers", "1"]
    sizes += [
        "--model.overrides.num_heads",
        "2",
        "--train.batch_rows",
        "4",
        "--data.row_length",
        "16",
    ]
    train = [
        "train",
        "--data.train",
        "text.txt",
        "--data.tokenizer",
        "char",
        "--model.family",
        family,
    ]
    train += [*sizes, "--train.out", "run", "--parallel.device", "cpu"]
    assert main([*train, "--train.limit", "2 steps"]) == 0
    assert json.loads(Path("run/checkpoint-2/config.json").read_text())["model_type"] == "own-gpt"
    forget()
    assert main([*train, "--train.limit", "4 steps"]) == 0  # resumed
    assert "resuming" in capsys.readouterr().err
    known = ["--family", family]
    tune = ["finetune", "--model", "run", "--data", "rows.jsonl", "--task", "classification"]
    tune += ["--train.out", "tuned", "--train.limit", "2 steps", "--data.valid", "0.3"]
    commands = [
        ["generate", "run", "the cat", "--max_new_tokens", "3"],
        ["evaluate", "run"],
        ["inspect", "run"],
        [*tune, "--model.family", family],
        ["evaluate", "tuned"],
        ["predict", "tuned", "rows.jsonl", "--out", "answers.jsonl"],
    ]
    for words in commands:
        forget()
        if words[0] != "inspect":
            assert main([word for word in words if word not in ("--model.family", family)]) == 2
            assert "--family" in capsys.readouterr().err
        named = words if words[0] == "finetune" else [*words, *known]
        assert main(named) == 0, words
        capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert len(Path("answers.jsonl").read_text().splitlines()) == len(TEXTS * 2)


def test_from_python(unknown: None, tmp_path: Path) -> None:
    tokenizer = pretrain.train_tokenizer("text.txt", "char")
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = pretrain.build(FAMILY, None, tokenizer=tokenizer, max_positions=16, **sizes)
    model.save("saved")
    forget()
    with pytest.raises(
        ConfigError, match="no model family 'own-gpt'.*family=.package.module:Class"
    ):
        pretrain.load("saved")
    opened = pretrain.load("saved", family=FAMILY)
    assert opened.generate("the", max_new_tokens=3) == model.eval().generate(
        "the", max_new_tokens=3
    )
    forget()
    import own_gpt

    again = pretrain.load("saved", family=own_gpt.OwnGPT)
    assert type(again.backbone) is own_gpt.OwnGPT
    # Once it is named, everything in this process knows it.
    assert type(pretrain.load("saved").backbone) is own_gpt.OwnGPT


def test_a_config_never_names_code(unknown: None) -> None:
    tokenizer = pretrain.train_tokenizer("text.txt", "char")
    model = pretrain.build(
        "gpt2", "tiny", tokenizer=tokenizer, hidden_size=16, num_heads=2, num_layers=1
    )
    model.save("saved")
    config = json.loads(Path("saved/config.json").read_text())
    Path("saved/config.json").write_text(json.dumps(config | {"model_type": FAMILY}))
    Path("saved/manifest.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no model family"):
        pretrain.load("saved")
    assert "own_gpt" not in sys.modules


def test_a_family_without_a_name_of_its_own_is_refused(unknown: None) -> None:
    with pytest.raises(ConfigError, match="model_type of its own"):
        pretrain.load("saved", family="own_gpt:Nameless")


def test_an_adapter_on_running_statistics_is_refused(unknown: None) -> None:
    model = pretrain.build("own_gpt:Normed", "tiny", hidden_size=16, num_heads=2, num_layers=1)
    with pytest.raises(ModelError, match=r"without its base.*'backbone\.statistics\.running_mean'"):
        pretrain.lora.apply_lora(model)


def test_a_name_table_without_a_buffer_is_refused(unknown: None) -> None:
    model = pretrain.build("own_gpt:Forgotten", "tiny", hidden_size=16, num_heads=2, num_layers=1)
    with pytest.raises(ModelError, match="no name on disk for backbone.statistics.bias"):
        model.save("saved")


def test_state_that_no_file_would_hold_is_refused(unknown: None) -> None:
    with pytest.raises(ModelError, match=r"extra state 'backbone\._extra_state'"):
        pretrain.build("own_gpt:Hidden", "tiny", hidden_size=16, num_heads=2, num_layers=1)
    with pytest.raises(ModelError, match=r"'backbone\.norms' of Early is computed from parameters"):
        pretrain.build("own_gpt:Early", "tiny", hidden_size=16, num_heads=2, num_layers=1)
