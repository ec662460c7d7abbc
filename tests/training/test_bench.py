"""``pretrain.bench``: the same run as ``train`` makes, measured, and nothing kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pretrain
from pretrain.cli.main import main
from pretrain.config import RunConfig
from pretrain.distributed.world import current_world
from pretrain.training.bench import _limits


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.chdir(tmp_path)
    texts = [f"The ship {n} sailed at dawn and came home in {n * n}." for n in range(80)]
    Path("book.txt").write_text("\n\n".join(texts))
    return {
        "data": {"train": "book.txt", "vocab_size": 300, "row_length": 16, "separator": "\n\n"},
        "model": {"family": "gpt2", "size": "tiny"},
        "train": {"out": "runs/real", "batch_rows": 4},
    }


def test_it_measures_and_keeps_nothing(sections: dict) -> None:
    found = pretrain.bench(steps=4, **sections)
    assert found.steps == 4 and found.rows == 4 and found.unit == "tokens"
    assert found.seconds > 0 and found.memory > 0
    assert found.units == pytest.approx(4 * 16 / found.seconds, rel=0.9)
    assert set(found.shares) == {"data", "forward", "backward", "update"}
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert not Path("runs").exists() and current_world().on_mark is None
    assert "tokens/s" in str(found)


def test_on_the_command_line(sections: dict, capsys: pytest.CaptureFixture) -> None:
    words = ["bench", "--steps", "3", "--json", "--model.family", "gpt2", "--model.size", "tiny"]
    data = ["--data.train", "book.txt", "--data.vocab_size", "300", "--data.row_length", "16"]
    data += ["--data.separator", "\n\n", "--train.batch_rows", "4"]
    assert main([*words, *data]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    assert main(["bench", "--steps", "2", *data]) == 2
    assert "--steps is 2" in capsys.readouterr().err
    assert main(["bench", "--train.batch_row", "4"]) == 2
    assert "train.batch_rows" in capsys.readouterr().err


def test_limits_name_the_setting() -> None:
    even = {"data": 0.25, "forward": 0.25, "backward": 0.25, "update": 0.25}
    device = torch.device("cpu")
    assert "pretrain prepare" in _limits(RunConfig(), device, "bf16", even, 1e9)[0]
    [only] = _limits(RunConfig(), device, "bf16", even | {"data": 0.0}, 1e9)
    assert "arithmetic of the cpu is the limit: it takes 100% of the time" in only
