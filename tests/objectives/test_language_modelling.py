"""The task "language-modelling": the loss of pre-training on the same rows, nothing lost, a figure for each text."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
import tiny
from contract import check_objective
from pretrain.data.tables import read_table
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import DataError, ModelError
from pretrain.objectives.language_modelling import LanguageModelling
from pretrain.objectives.masked_lm import MaskedLM
from pretrain.objectives.next_token import NextToken
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_precision


@functools.cache
def tokenizer() -> Tokenizer:
    return train_from_texts(tiny.TEXTS, "bpe", vocab_size=330)


def model(family: str = "gpt2", positions: int = 32, **options: Any) -> Any:
    tok = tokenizer() if family in ("gpt2", "llama") else tiny.tokenizer()
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
    }
    if family in ("gpt2", "bert"):
        sizes |= {"dropout": 0.0, "attention_dropout": 0.0}
    return pretrain.build(
        family, None, tokenizer=copy.copy(tok), max_positions=positions, **(sizes | options)
    )


TABLE = read_table([{"text": text} for text in tiny.TEXTS])


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", NextToken), ("llama", NextToken), ("bert", MaskedLM)]
)
def test_loss_is_that_of_pretraining(family: str, kind: Any) -> None:
    made = model(family)
    task, known = LanguageModelling(made).eval(), kind(made).eval()
    rows = task.encode(TABLE)
    precision = choose_precision("fp32", torch.device("cpu"))
    mine = evaluate_rows(task, rows, precision, batch_rows=4)
    theirs = evaluate_rows(known, list(rows), precision, batch_rows=4)
    assert mine == theirs and mine["targets"] > 0
    names = [name for name, _ in task.named_parameters()]
    assert names == [name for name, _ in known.named_parameters()]
    assert task.describe()["name"] == kind.__name__


@given(st.lists(st.text("abc def", max_size=120), min_size=1, max_size=8), st.integers(3, 20))
@settings(max_examples=40, deadline=None)
def test_every_token_stands_in_one_row(texts: list[str], length: int) -> None:
    task = LanguageModelling(model(), max_length=length)
    rows = task.encode(read_table([{"text": text} for text in texts]))
    tok = tokenizer()
    real = [t for t in texts if t.strip()]
    assert sum(map(len, rows.dropped.values())) == len(texts) - len(real)
    documents = [tok.frame(tok.encode(t, special=False)) for t in real]
    pieces = sorted(d[i : i + length] for d in documents for i in range(0, len(d), length))
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(rows[0]["input_ids"]) <= length
        for number in range(1, int(row["document_ids"].max()) + 1):
            inside = row["document_ids"] == number
            assert (row["position_ids"][inside] == np.arange(inside.sum())).all()
            found.append(row["input_ids"][inside].tolist())
    assert sorted(found) == pieces


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "bert"])
def test_contract(family: str, tmp_path: Path) -> None:
    rows = LanguageModelling(model(family)).encode(
        read_table([{"text": t} for t in tiny.TEXTS * 2])
    )
    check_objective(lambda: LanguageModelling(model(family)), rows, tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_figure_of_a_text_equals_that_of_transformers(family: str, tmp_path: Path) -> None:
    made = model(family, positions=64)
    task = LanguageModelling(made)
    texts = [*tiny.TEXTS[:5], "", "the <eos> cat"]
    answers = list(task.predict(read_table([{"text": t} for t in texts]), batch_rows=3))
    assert answers[5] == {}
    made.save(tmp_path / "m")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tok = tokenizer()
    for text, answer in zip(texts, answers, strict=True):
        if not text:
            continue
        ids = torch.tensor([tok.frame(tok.encode(text, special=False))])
        with torch.no_grad():
            loss = float(theirs(ids, labels=ids).loss)
        assert answer["loss"] == pytest.approx(loss, rel=1e-5)
        assert answer["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert answer["tokens"] == ids.shape[1] - 1


def test_figure_of_a_masked_text_depends_on_nothing_else() -> None:
    task = LanguageModelling(model("bert"))
    alone = next(iter(task.predict(TABLE.take([7]))))
    together = list(task.predict(TABLE, batch_rows=5))[7]
    assert alone["tokens"] == together["tokens"] > 0
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)


def test_long_text_is_read_in_pieces() -> None:
    task = LanguageModelling(model(), max_length=8)
    text = " ".join(tiny.TEXTS[:3])
    (answer,) = task.predict(read_table([{"text": text}]))
    ids = tokenizer().frame(tokenizer().encode(text))
    assert answer["tokens"] == len(ids) - math.ceil(len(ids) / 8)


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match="language-model head"):
        LanguageModelling(model("bert", head="sequence-classification"))
    with pytest.raises(ModelError, match="no such option"):
        LanguageModelling(model(), rate=0.2)
    assert LanguageModelling(model("bert"), rate=0.2).describe()["rate"] == 0.2
    with pytest.raises(DataError, match=r"row 1 .*not a text"):
        LanguageModelling(model()).encode(read_table([{"text": 3}]))
