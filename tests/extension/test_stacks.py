"""A graph model with a bias of the attention, and an encoder-decoder: several stacks, cross attention, padding."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
import pretrain.models
from pretrain.cli.main import main

HERE = Path(__file__).parent
TEXT = "the cat saw the dog and the dog saw the man\n" * 60


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    pretrain.models._OWN.clear()
    for name in ("own_graph", "own_seq2seq"):
        sys.modules.pop(name, None)


OWN = {
    "graph": ("own_graph:Graph", "own_graph:MaskedNodes", {"source": "own_graph:rings"}, "nodes"),
    "seq2seq": (
        "own_seq2seq:Seq2Seq",
        "own_seq2seq:CutSpan",
        {"train": "text.txt", "tokenizer": "char", "row_length": 16},
        "tokens",
    ),
}


def train(name: str, steps: int, out: str, **more: Any) -> Any:
    family, objective, data, _ = OWN[name]
    sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 2}
    sections: dict[str, Any] = {
        "data": data,
        "model": {"family": family, "overrides": sizes},
        "objective": {"class_path": objective},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0},
        "train": {"out": out, "limit": f"{steps} steps", "batch_rows": 8, "eval_every": "100%"},
        "parallel": {"device": "cpu", **more},
    }
    return pretrain.train(**sections)


def losses(out: str) -> list[float]:
    rows = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("name", OWN)
def test_train_resume_load_evaluate(
    name: str, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    family, objective, data, unit = OWN[name]
    run = train(name, 40, "run")
    assert f" {unit}/s" in capsys.readouterr().err
    assert losses("run")[-1] < 0.7 * losses("run")[0]
    train(name, 3, "part")
    train(name, 6, "part", activation_checkpointing="full")
    train(name, 6, "whole")
    assert losses("part") == losses("whole")
    pretrain.models._OWN.clear()
    model = pretrain.load("run", family=family)
    depth = max(model.depths().values())
    assert depth == len(model.backbone.blocks()) + (
        name == "seq2seq"
    )  # its last norm lies above the blocks
    rows = data.get("source")
    figures = pretrain.evaluate("run", rows, objective=objective, batch_rows=4)
    assert figures["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    assert main(["inspect", "run"]) == 0 and main(["report", "run"]) == 0


def test_padding_of_graphs_changes_nothing(here: None) -> None:
    import own_graph

    goal = own_graph.MaskedNodes(
        pretrain.build("own_graph:Graph", head=None, hidden_size=16, num_heads=2, num_layers=2)
    ).eval()
    rows = own_graph.rings(12).valid
    import numpy as np

    rngs = lambda: [np.random.default_rng(i) for i in range(len(rows))]  # noqa: E731
    with torch.no_grad():
        whole = goal(goal.collate(rows, rngs())).total
        single = sum(
            goal(goal.collate([row], [rng])).total for row, rng in zip(rows, rngs(), strict=True)
        )
    assert torch.allclose(whole, single, rtol=1e-5)
