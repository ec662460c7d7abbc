"""The task "preference": DPO by hand, the reference once, packed as unpacked, training widens the margin."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pretrain
import tiny
from contract import check_objective_learns, check_objective_resumes, check_sums
from pretrain.data.tables import read_table
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, DataError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.likelihood import target_log_probs
from pretrain.objectives.preference import Preference
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_precision

WORDS = ["red cat", "old dog", "big fox", "sly hen", "wet pig", "fat cow", "shy owl", "odd elk"]
ROWS = [
    {"prompt": f"who is the {w}?", "chosen": f"it is a {w} and no other", "rejected": "no"}
    for w in WORDS
]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_from_texts([*tiny.TEXTS, "User: Assistant: ", *WORDS], "bpe", vocab_size=330)


def model(family: str = "gpt2", seed: int = 0, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
    }
    if family == "gpt2":
        sizes |= {"dropout": 0.0, "attention_dropout": 0.0}
    tok = copy.copy(tokenizer())
    return pretrain.build(
        family, None, tokenizer=tok, seed=seed, max_positions=96, **(sizes | options)
    )


def batch_of(task: Preference, rows: Any) -> Any:
    return task.collate([rows[i] for i in range(len(rows))], [np.random.default_rng(0)] * len(rows))


def by_hand(made: Any, template: Any, row: Any, side: str) -> float:
    """Summed log-probability of the answer, from the whole and the prompt rendered apart."""
    tok = made.tokenizer
    asked = [{"role": "user", "content": row["prompt"]}]
    start = tok.encode(template.render(asked, add_generation_prompt=True))
    ids = tok.encode(template.render([*asked, {"role": "assistant", "content": row[side]}]))
    assert ids[: len(start)] == start and ids[-1] == tok.eos_id
    with torch.no_grad():
        logits = made({"input_ids": torch.tensor([ids])})[0]
    log_probs = logits.log_softmax(-1)
    return float(sum(log_probs[t - 1, ids[t]] for t in range(len(start), len(ids))))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_by_hand(family: str, smoothing: float) -> None:
    made, other = model(family).eval(), model(family, seed=1).eval()
    before = Preference(other)
    rows = before.encode(read_table(ROWS))
    before.prepare_reference(rows, batch_rows=3)
    task = Preference(made, beta=0.3, label_smoothing=smoothing).eval()
    total, wins, margins = 0.0, 0, 0.0
    for row, example in zip(ROWS, rows, strict=True):
        log = {}
        for side in ("chosen", "rejected"):
            reference = by_hand(other, task.template, row, side)
            assert float(example[f"ref_{side}"]) == pytest.approx(reference, rel=1e-5, abs=1e-4)
            log[side] = by_hand(made, task.template, row, side) - reference
        margin = 0.3 * (log["chosen"] - log["rejected"])
        total -= (1 - smoothing) * math.log(1 / (1 + math.exp(-margin)))
        total -= smoothing * math.log(1 / (1 + math.exp(margin)))
        wins += margin > 0
        margins += margin
    figures = evaluate_rows(task, rows, choose_precision("fp32", torch.device("cpu")), batch_rows=3)
    assert figures["loss"] == pytest.approx(total / 8, rel=1e-4)
    assert figures["accuracy"] == wins / 8
    assert figures["margin"] == pytest.approx(margins / 8, rel=1e-3, abs=1e-4)
    assert figures["targets"] == 8


def test_targets_are_the_answers_only() -> None:
    task = Preference(model())
    rows = task.encode(read_table(ROWS))
    tok = tokenizer()
    for example, row in zip(rows, ROWS, strict=True):
        middle = int(example["lengths"][0])
        for side, part in (("chosen", slice(0, middle)), ("rejected", slice(middle, None))):
            labels = example["labels"][part]
            assert labels[labels != IGNORE].tolist() == [*tok.encode(" " + row[side]), tok.eos_id]
            assert example["input_ids"][part][0] == tok.bos_id


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_equals_unpacked(family: str) -> None:
    made = model(family).eval()
    found = []
    for pack in (True, False):
        task = Preference(made, pack=pack).eval()
        with torch.no_grad():
            found.append(task.log_probs(batch_of(task, task.encode(read_table(ROWS)))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-4)
    answers = list(Preference(made).predict(read_table(ROWS), batch_rows=3))
    assert [a["margin"] for a in answers] == pytest.approx(
        (found[0][:, 0] - found[0][:, 1]).tolist(), rel=1e-4, abs=1e-4
    )


def test_log_probs_of_targets_and_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.objectives import likelihood

    monkeypatch.setattr(likelihood, "_LOGITS", 1)  # pieces of 32 targets
    made = model()
    ids = torch.randint(4, 200, (3, 40), generator=torch.Generator().manual_seed(0))
    labels = torch.where(ids % 5 == 0, IGNORE, ids.roll(-1, 1))
    found = target_log_probs(made, {"input_ids": ids, "labels": labels})
    weights = torch.linspace(-1, 1, len(found))
    (found * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    kept = labels != IGNORE
    whole = -F.cross_entropy(made({"input_ids": ids})[kept], labels[kept], reduction="none")
    torch.testing.assert_close(found, whole)
    (whole * weights).sum().backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_starts_at_ln_2_and_learns(tmp_path: Path) -> None:
    made = model()
    task = Preference(made)
    rows = task.encode(read_table(ROWS))
    task.prepare_reference(rows)
    precision = choose_precision("fp32", torch.device("cpu"))
    first = evaluate_rows(task, rows, precision, batch_rows=4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) == task.expected_first_loss()
    tiny.trainer(tmp_path / "run", task, rows, limit="20 steps", optim={"lr": 1e-3}).fit()
    last = evaluate_rows(task, rows, precision, batch_rows=4)
    assert last["margin"] > 0.5 and last["accuracy"] == 1.0 and last["loss"] < 0.5


def test_reference_is_the_same_again_and_changes_nothing() -> None:
    made = model().train()
    task = Preference(made).train()
    first, second = (task.encode(read_table(ROWS)) for _ in range(2))
    task.prepare_reference(first)
    task.prepare_reference(second)
    assert all(
        a[k] == b[k]
        for a, b in zip(first, second, strict=True)
        for k in ("ref_chosen", "ref_rejected")
    )
    assert task.training and made.training
    assert all(p.grad is None for p in made.parameters())


def test_contract(tmp_path: Path) -> None:
    def build() -> Preference:
        return Preference(model(), beta=1.0)

    rows = build().encode(read_table(ROWS))
    build().prepare_reference(rows)
    check_sums(build(), rows)
    check_objective_learns(build, rows, tmp_path / "learns")
    check_objective_resumes(build, rows, tmp_path)


def test_conversations_of_any_form() -> None:
    task = Preference(model())
    asked = [{"role": "user", "content": "q"}]
    good, bad = ([{"role": "assistant", "content": c}] for c in "ab")
    given_both = {"chosen": good, "rejected": bad}
    parts = [{"type": "text", "text": "q"}]
    forms = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"prompt": asked, "chosen": asked + good, "rejected": asked + bad},
        {"prompt": "q", "chosen": asked + good, "rejected": asked + bad},
        {"chosen": asked + good, "rejected": asked + bad},
        {"prompt": " q\n", "chosen": asked + good, "rejected": asked + bad},
        {"prompt": "q", **{k: [asked[0] | {"content": parts}, *v] for k, v in given_both.items()}},
        {"prompt": "", "chosen": asked + good, "rejected": asked + bad},
        {"prompt": "q", **{k: [asked[0] | {"id": "1"}, *v] for k, v in given_both.items()}},
    ]
    examples = [task.encode(read_table([form]))[0] for form in forms]
    for example in examples[1:]:
        assert all((example[key] == examples[0][key]).all() for key in example)


def test_a_prompt_within_a_conversation_is_not_given_twice() -> None:
    """It may follow other turns; turns of the assistant first, and a prompt that asks nothing, go on."""
    task = Preference(model())

    def turns(text: str) -> list[dict[str, str]]:
        names = {"s": "system", "u": "user", "a": "assistant"}
        return [{"role": names[word[0]], "content": word[1:]} for word in text.split()]

    def rows(prompt: Any, before: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "chosen": turns(f"{before} aa"),
            "rejected": turns(f"{before} ab"),
        }

    for prompt, before, whole in (
        ("q", "sbrief uq", "sbrief uq"),
        ("q", "ux ay uq", "ux ay uq"),
        (turns("ux ay uq"), "ux ay uq", "ux ay uq"),
        (turns("sbrief"), "uq", "sbrief uq"),
        ("q", "ay ux", "uq ay ux"),
        (turns("uq ay"), "ux", "uq ay ux"),
    ):
        given, wanted = (rows(p, b) for p, b in ((prompt, before), (None, whole)))
        found, right = (task.encode(read_table([row]))[0]["input_ids"] for row in (given, wanted))
        assert found.tolist() == right.tolist()
    for prompt in ("another", turns("sbrief uq")):
        with pytest.raises(DataError, match=r"row 1 .*chosen is a conversation of its own"):
            task.encode(read_table([rows(prompt, "uq")]))


def test_what_is_refused() -> None:
    task = Preference(model())
    eos = tokenizer().roles["eos"]
    rows = task.encode(
        read_table(
            [
                {"prompt": "q", "chosen": "a", "rejected": "a"},
                {"prompt": f"q{eos}", "chosen": "a", "rejected": "b"},
                {"prompt": "q", "chosen": "a " * 200, "rejected": "b"},
                ROWS[0],
            ]
        )
    )
    assert rows.dropped == {
        "both answers are the same": [0],
        "special tokens are typed into the text": [1],
        "an answer does not fit": [2],
    }
    assert rows.cut == [2] and rows.owners == [3]
    with pytest.raises(DataError, match="prepare_reference"):
        task(batch_of(task, rows))
    with pytest.raises(DataError, match=r"row 1 .*does not end in an answer"):
        task.encode(read_table([{"chosen": "a", "rejected": "b"}]))
    with pytest.raises(ConfigError, match="beta"):
        Preference(model(), beta=0.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        Preference(model(), label_smoothing=0.5)
