"""The n-gram baseline of a run: the run's own tokens, its held-out targets, and where it is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from pretrain.data.ngram import KneserNey
from pretrain.report.run_report import render
from pretrain.training import baseline

WORDS = "sea ship wind salt rope sail deck mast gull tide wave storm captain sailor harbour".split()  # noqa: SIM905


@pytest.fixture
def text(tmp_path: Path) -> str:
    draw = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(draw.choice(WORDS, size=9)) for _ in range(200)))
    return str(path)


def run(tmp_path: Path, text: str, family: str = "gpt2", hooks: Any = (), **train: Any) -> Any:
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32}
    return pretrain.train(
        data={"train": text, "valid": "last:0.2", "vocab_size": 300, "row_length": 32}
        | {"cache": str(tmp_path / "cache")},
        model={"family": family, "size": "tiny", "overrides": shape},
        objective={"class_path": "NextToken" if family == "gpt2" else "MaskedLM"},
        train={"out": str(tmp_path / "run"), "batch_rows": 4, "save_every": "0 steps"}
        | {"eval_every": "0 steps", "best": False}
        | train,
        hooks=hooks,
    )


@pytest.mark.parametrize("limit", ["3 steps", "3 epochs"])
def test_baseline_counts_what_the_run_saw_and_is_recorded(
    tmp_path: Path,
    text: str,
    limit: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(baseline, "LEAST_TOKENS", 1)
    targets: list[float] = []
    found = run(
        tmp_path, text, limit=limit, hooks=[lambda record: targets.append(record["targets"])]
    )
    data = pretrain.Prepared.open(next((tmp_path / "cache" / "prepared").iterdir()))
    block = json.loads((found.checkpoint / "config.json").read_text())["pretrain"]
    chosen = np.arange(len(data.train))
    if limit == "3 steps":  # the rows of the first three steps
        chosen = data.train.order(0).indices(0, 12)
        assert block["kneser_ney_tokens"] == sum(targets)
    model = KneserNey([data.train.gather(chosen)], data.train.vocab_size)
    assert block["kneser_ney_tokens"] == model.num_tokens
    held_out = data.valid.gather(np.arange(len(data.valid)))
    assert block["kneser_ney_nats"] == pytest.approx(model.loss([held_out]))
    assert len(model._trigrams(held_out)) == found.metrics["targets"]
    # Words drawn at random: better than the frequency of tokens, and worse than the frequency of words allows.
    assert block["kneser_ney_nats"] < block["unigram_nats"]
    said = capsys.readouterr().err
    bits_per_nat = data.valid.num_targets / data.valid.num_bytes / np.log(2)
    bits = block["kneser_ney_nats"] * bits_per_nat
    assert f"counted on {model.num_tokens:,} tokens that the run saw, {bits:.3f}; unigram" in said
    assert ("hint: of text that is seen 3.0" in said) == (limit == "3 epochs")
    assert "Kneser-Ney, order 3" in render(found.path)
    assert "baseline (Kneser-Ney, order 3)" in (found.checkpoint / "README.md").read_text()


def test_short_runs_and_masked_runs_have_no_ngram_baseline(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = run(tmp_path / "a", text, limit="2 steps")
    assert "no n-gram baseline" in capsys.readouterr().err
    monkeypatch.setattr(baseline, "LEAST_TOKENS", 1)
    masked = run(tmp_path / "b", text, "bert", limit="2 steps")
    for found in (short, masked):
        block = json.loads((found.checkpoint / "config.json").read_text())["pretrain"]
        assert "unigram_nats" in block and "kneser_ney_nats" not in block
    assert "Kneser-Ney" not in render(masked.path) + capsys.readouterr().err


def test_the_number_of_tokens_is_bounded(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "LEAST_TOKENS", 1)
    monkeypatch.setattr(baseline, "MOST_TOKENS", 200)
    found = run(tmp_path, text, limit="2 epochs")
    block = json.loads((found.checkpoint / "config.json").read_text())["pretrain"]
    assert 150 < block["kneser_ney_tokens"] <= 232  # whole rows of 32
