"""Minimal pairs against scores by hand; constant models get one half."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from typing import Any

import pytest
import torch

import pretrain
import tiny
from pretrain.cli.main import main
from pretrain.errors import ModelError
from pretrain.evaluation import pairs as module
from pretrain.evaluation.pairs import minimal_pairs
from pretrain.models import build
from pretrain.models.base import Model

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "initializer_range": 0.4,
}
TURNED = [{"good": text, "bad": " ".join(reversed(text.split()))} for text in tiny.TEXTS[::3]]
PAIRS = [
    {"good": good, "bad": bad, "group": good.split()[1]}
    for good, bad in zip(tiny.TEXTS, tiny.TEXTS[5:], strict=False)
]


def made(family: str, **options: Any) -> Model:
    tokenizer = tiny.tokenizer()
    return build(family, None, tokenizer=tokenizer, seed=4, max_positions=96, **SIZES, **options)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_accuracy_by_group(family):
    """Log-likelihoods for a causal model, pseudo-log-likelihoods for a masked one."""
    model = made(family)
    found = minimal_pairs(model, PAIRS, {}, 16, 0)
    good, bad = (model.log_likelihood([row[k] for row in PAIRS]) for k in ("good", "bad"))
    right = (good > bad).tolist()
    assert found["accuracy"] == pytest.approx(sum(right) / len(right)) and found["ties"] == 0
    assert found["targets"] == len(PAIRS) and 0 < found["accuracy"] < 1
    for name in {row["group"] for row in PAIRS}:
        of = [r for r, row in zip(right, PAIRS, strict=True) if row["group"] == name]
        assert found[f"accuracy/{name}"] == pytest.approx(sum(of) / len(of))
    turned = [{"good": row["bad"], "bad": row["good"]} for row in PAIRS]
    assert minimal_pairs(model, turned, {}, 16, 0)["accuracy"] == pytest.approx(
        1 - found["accuracy"]
    )


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_constant_model_has_one_half(family, monkeypatch):
    """A model without weights gives each token 1 / V, so texts of the same number of tokens are as likely."""
    model = made(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = minimal_pairs(model, TURNED, {}, 16, 0)
    assert found["accuracy"] == 0.5 and found["ties"] == 1.0
    uneven = [{"good": "the cat", "bad": text} for text in tiny.TEXTS[:5]]
    assert minimal_pairs(model, uneven, {}, 16, 0)["accuracy"] == 1.0  # the sum favours the shorter
    monkeypatch.setattr(
        module, "log_likelihood", lambda m, texts, **_: torch.full((len(texts),), -3.0)
    )
    assert minimal_pairs(model, uneven, {}, 16, 0)["accuracy"] == 0.5
    same = [{"good": text, "bad": text} for text in tiny.TEXTS[:5]]
    assert minimal_pairs(made(family), same, {}, 16, 0)["accuracy"] == 0.5


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="gives texts no likelihood"):
        minimal_pairs(made("bert", head=None), PAIRS, {}, 16, 0)


def test_blimp(tmp_path, data_sets, capsys):
    """The columns of the benchmark are known; the file goes through the command."""
    made("gpt2").save(tmp_path / "model")
    with gzip.open(data_sets / "blimp" / "blimp.jsonl.gz", "rt") as stream:
        rows = [json.loads(line) for line in islice(stream, 0, 67000, 900)]
    file = tmp_path / "blimp.jsonl"
    keys = ("sentence_good", "sentence_bad", "UID", "field")
    file.write_text("".join(json.dumps({k: row[k] for k in keys}) + "\n" for row in rows))
    words = ["evaluate", str(tmp_path / "model"), "--task", "minimal-pairs", "--data", str(file)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["targets"] == len(rows) and f"accuracy/{rows[0]['UID']}" in found
    assert found == pretrain.evaluate(tmp_path / "model", file, task="minimal-pairs")
