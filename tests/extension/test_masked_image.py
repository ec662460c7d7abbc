"""A vision transformer of the user's own with masked patches works with every command; nothing is said of tokens."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain
import pretrain.models
from pretrain.cli.main import main
from pretrain.errors import ConfigError, DataError

HERE = Path(__file__).parent
NAMES = [
    *("--model.family", "own_vit:ViT", "--objective.class_path", "own_vit:MaskedPatches"),
    *(
        "--data.source",
        "own_vit:squares",
        "--data.source_args.count",
        "36",
        "--parallel.device",
        "cpu",
    ),
]
SIZES = [
    *("--model.overrides.hidden_size", "16", "--model.overrides.num_layers", "2"),
    *("--model.overrides.num_heads", "2", "--train.batch_rows", "8", "--optim.lr", "1e-2"),
    *("--optim.schedule", "constant", "--optim.warmup", "2"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has named the family yet in this process, and its module can be imported."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    forget()


def forget() -> None:
    pretrain.models._OWN.clear()
    sys.modules.pop("own_vit", None)


def train(steps: int, out: str = "run") -> int:
    return main(["train", *NAMES, *SIZES, "--train.out", out, "--train.limit", f"{steps} steps"])


def test_every_command(here: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(20) == 0
    said = capsys.readouterr().err
    assert "28 rows of 4 patches, about 112 in all" in said and "tokens" not in said
    forget()
    assert train(40) == 0
    assert "resuming checkpoint-20" in capsys.readouterr().err
    forget()
    assert train(40, "whole") == 0
    lines = [Path(run, "log.jsonl").read_text().splitlines() for run in ("run", "whole")]
    losses = [[row["loss"] for row in map(json.loads, part) if "loss" in row] for part in lines]
    assert losses[0][-1] == losses[1][-1] < 0.6 * losses[1][0]
    saved = Path("run/checkpoint-40")
    assert json.loads((saved / "preprocessor_config.json").read_text())["image_mean"] == 128.0
    named = ["--family", "own_vit:ViT", "--objective", "own_vit:MaskedPatches"]
    forget()
    assert main(["evaluate", "run", *named]) == 2  # a run directory never names code
    assert "--data own_vit:squares" in capsys.readouterr().err
    assert main(["evaluate", "run", "--data", "own_vit:squares", *named]) == 0
    for words in (["inspect", "run"], ["report", "run"]):
        assert main(words) == 0
        assert "vocabulary" not in capsys.readouterr().out
    for file in ("run/report.html", "run/checkpoint-40/README.md"):
        text = Path(file).read_text()
        assert "patches seen" in text
        assert not re.findall("tokens/s.*|tokens per.*", text)


def test_from_python(here: None) -> None:
    import own_vit

    rows = own_vit.squares(24)
    sections = {
        "model": {
            "family": "own_vit:ViT",
            "overrides": {"hidden_size": 16, "num_heads": 2, "num_layers": 1},
        },
        "objective": {"class_path": "own_vit:MaskedPatches", "init_args": {"rate": 0.25}},
        "train": {"out": "run", "limit": "3 steps", "batch_rows": 4, "eval_every": "0 steps"},
    }
    run = pretrain.train(rows=rows, **sections)
    model = pretrain.load("run", family=own_vit.ViT)
    assert isinstance(model.processor, own_vit.Scaler) and model.tokenizer is None
    assert model({"pixel_values": torch.zeros(2, 3, 8, 8)}).shape == (2, 4, 16)
    assert "vocabulary" not in model.summary()
    assert pretrain.evaluate("run", rows, objective="own_vit:MaskedPatches")[
        "loss"
    ] == pytest.approx(run.metrics["loss"], rel=1e-6)
    with pytest.raises(DataError, match="no held-out rows"):
        pretrain.evaluate("run", pretrain.RowSource(rows.train), objective="own_vit:MaskedPatches")
    changed = own_vit.squares(24)
    changed.train[5]["pixel_values"] = np.zeros((3, 8, 8), np.float32)
    sections["train"]["limit"] = "6 steps"
    with pytest.raises(pretrain.PretrainError, match="trained with data"):
        pretrain.train(rows=changed, **sections)
    with pytest.raises(ConfigError, match="combined with data.source"):
        pretrain.train(rows=rows, data={"source": "own_vit:squares"}, **sections)


def test_a_source_that_does_not_exist_or_returns_something_else(here: None) -> None:
    with pytest.raises(ConfigError, match=r"data\.source.*cannot be imported"):
        pretrain.train(data={"source": "own_vit:circles"})
    with pytest.raises(DataError, match=r"returned .*Scaler.* pretrain\.RowSource"):
        pretrain.train(data={"source": "own_vit:Scaler"})
