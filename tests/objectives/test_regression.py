"""Regression: units of the targets, the start at their mean, figures against scipy, and targets that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import pretrain
from contract import check_objective
from finetuning.conftest import ANIMALS, QUICK, model_of, rows_of
from pretrain.data.loader import row_rngs
from pretrain.data.tables import Table, read_table
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.models.heads import SequenceHead
from pretrain.objectives.classification import Classification
from pretrain.objectives.regression import Regression
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_precision

CPU = torch.device("cpu")


def table_of(count: int = 24) -> Table:
    rows = rows_of(count)
    return read_table(
        [{"text": r["text"], "label": 100 + 7 * len(r["text"].split())} for r in rows]
    )


def task_of(family: str = "bert", seed: int = 0, std: float = 0.02, **options: Any) -> Regression:
    model = model_of(
        family, head="sequence-classification", labels=["LABEL_0"], seed=seed, initializer_range=std
    )
    model.fresh = frozenset(n for n, _ in model.named_parameters() if n.startswith("head."))
    return Regression(model, **options)


def test_contract(tmp_path: Path) -> None:
    options = Regression.learn(table_of(), {}).options
    task = task_of(**options)
    groups: dict[int, list[Any]] = {}
    for example in task.encode(table_of(90)):
        groups.setdefault(len(example["input_ids"]), []).append(example)
    rows = (max(groups.values(), key=len) * 16)[:16]  # of one length, which have one target here
    for i, row in enumerate(rows := [dict(row) for row in rows]):
        row["labels"] = np.float32(options["center"] + (i % 4) * options["scale"])
    check_objective(
        lambda: Placeless(task_of(**options).model, pack=False, **options), rows, tmp_path
    )


class Placeless(Regression):
    """Without the places in the flattened batch, which say where a row is and so differ by row."""

    def collate(self, examples: Any, rngs: Any, *, evaluation: bool = False) -> Any:
        batch = super().collate(examples, rngs, evaluation=evaluation)
        return {
            k: v for k, v in batch.items() if k not in ("first_index", "last_index", "document_ids")
        }


def test_it_starts_at_the_mean_with_a_loss_near_one() -> None:
    table = table_of(60)
    found = Regression.learn(table, {})
    values = np.asarray(table.columns["label"], dtype=float)
    assert found.options == pytest.approx({"center": values.mean(), "scale": values.std()})
    task = task_of(**found.options).eval()
    said = [answer["score"] for answer in task.predict(table)]
    assert np.abs(np.asarray(said) - values.mean()).max() < 0.5 * values.std()
    figures = evaluate_rows(task, task.encode(table), choose_precision("fp32", CPU), batch_rows=8)
    assert 0.9 < figures["loss"] < 1.1


def test_a_trained_bias_is_not_moved() -> None:
    model = model_of(head="sequence-classification", labels=["LABEL_0"])
    with torch.no_grad():
        model.head.classifier.bias.fill_(7.0)
    model.fresh = frozenset()
    assert float(Regression(model, center=100.0).model.head.classifier.bias) == 7.0


def test_loss_and_figures_are_those_of_the_predictions() -> None:
    table = table_of(41)
    task = task_of(seed=2, std=0.3, center=150.0, scale=20.0).eval()
    rows = task.encode(table)
    figures = evaluate_rows(task, rows, choose_precision("fp32", CPU), batch_rows=8)
    said = np.array([answer["score"] for answer in task.predict(table)])
    truth = np.array(task.truth(table))
    assert figures["pearson"] == pytest.approx(stats.pearsonr(truth, said).statistic, abs=1e-5)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(truth, said).statistic, abs=1e-6)
    assert figures["mse"] == pytest.approx(((truth - said) ** 2).mean(), rel=1e-4)
    assert figures["loss"] == pytest.approx(figures["mse"] / 400, rel=1e-4)
    batch = task.collate(rows[:], row_rngs(0, "collate", 0, len(rows)))
    loss = task(batch)
    assert float(loss.total.detach() / loss.count) == pytest.approx(figures["loss"], rel=1e-4)
    assert task.model.hf_config()["problem_type"] == "regression"


def test_units_do_not_matter() -> None:
    """Prices in thousands start with the loss and the gradient of scores from 0 to 1."""
    found = []
    for factor in (1.0, 1e4):
        rows = [{"text": r["text"], "label": factor * len(r["text"])} for r in rows_of(24)]
        options = Regression.learn(read_table(rows), {}).options
        assert options["center"] == pytest.approx(factor * np.mean([len(r["text"]) for r in rows]))
        task = task_of(**options).eval()
        loss = evaluate_rows(
            task, task.encode(read_table(rows)), choose_precision("fp32", CPU), batch_rows=8
        )
        found.append(loss["loss"])
    assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "many", True, "", [1.0]])
def test_targets_that_are_no_numbers(value: Any) -> None:
    rows = [{"text": f"the {i}", "label": i} for i in range(3)] + [
        {"text": "a cat", "label": value}
    ]
    with pytest.raises(DataError, match=r"row 4.*classification"):
        Regression.learn(read_table(rows), {})


@pytest.mark.parametrize("value", [1e300, -1e38, "1e39", 10**400])
def test_targets_that_single_precision_cannot_hold(value: Any) -> None:
    rows = [{"text": f"the {i}", "label": i} for i in range(3)] + [{"text": "a", "label": value}]
    with pytest.raises(DataError, match=r"1 targets are (larger than single|no finite).*row 4"):
        Regression.learn(read_table(rows), {})


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["3,5", "-1,25", "4", "1.234,5"], [3.5, -1.25, 4, 1234.5]),
        (["1,234.5", "2.5", "12,345,678"], [1234.5, 2.5, 12345678]),
        (["0,5", "1,5e3"], [0.5, 1500]),
        ([1, "2,5"], [1, 2.5]),
        (["1 234,5", "2,5", "\u22127"], [1234.5, 2.5, -7]),
        (["1\u202f234\u202f567,5", "1\u00a0000"], [1234567.5, 1000]),
        (["1'234.5", "\u22122.5", "12\u2019345"], [1234.5, -2.5, 12345]),
    ],
)
def test_decimal_commas(texts: list[Any], numbers: list[float]) -> None:
    table = read_table([{"text": f"a {i}", "label": text} for i, text in enumerate(texts)])
    found = Regression.learn(table, {})
    assert found.options["center"] == pytest.approx(np.mean(numbers))
    assert Regression.tidy(table, found, {}).columns["label"] == numbers
    for wrong in (["1,234", "2,345"], ["3,5", "1.234"], ["3,5", "x"], ["3,5", "1 2345"]):
        table = read_table([{"text": f"a {i}", "label": text} for i, text in enumerate(wrong)])
        with pytest.raises(DataError, match="decimal comma|no finite numbers"):
            Regression.learn(table, {})


def test_an_answer_that_is_no_number_names_its_row() -> None:
    task = task_of()
    with torch.no_grad():
        task.model.head.classifier.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"row 1 of a list.*not a number"):
        list(task.predict(read_table(rows_of(3))))
    table = read_table([{"text": "the cat"}])
    several = Classification(
        model_of(head="sequence-classification", labels=ANIMALS), problem="multi_label"
    )
    with torch.no_grad():
        several.model.head.classifier.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="row 1"):
        list(several.predict(table))


def test_targets_that_are_all_alike() -> None:
    rows = [{"text": f"the {i}", "label": 3} for i in range(3)]
    with pytest.raises(DataError, match="nothing to learn"):
        Regression.learn(read_table(rows), {})


def test_options_that_cannot_be() -> None:
    for options in ({"scale": 0.0}, {"scale": float("nan")}, {"center": float("inf")}):
        with pytest.raises(ConfigError, match="finite"):
            task_of(**options)
    with pytest.raises(ConfigError, match="one output"):
        Regression(model_of(head="sequence-classification", labels=ANIMALS))


@pytest.mark.parametrize(
    "size",
    [pytest.param(1e-3, marks=pytest.mark.slow), 1e3, pytest.param(1e5, marks=pytest.mark.slow)],
)
def test_targets_of_any_size_are_learned_alike(size: float, tmp_path: Path) -> None:
    """Powers of two change no bit; thousands and thousandths change as little as the nearest power allows."""
    rows = [{"text": r["text"], "label": float(len(r["text"].split()))} for r in rows_of(48)]
    source = model_of()
    options: dict[str, Any] = {**QUICK, "limit": "60 steps", "eval_every": "60 steps"}

    def ended(unit: float) -> float:
        scaled = [{**row, "label": row["label"] * unit} for row in rows]
        out = tmp_path / f"{unit:g}"
        return float(
            pretrain.finetune(source, scaled, "regression", out=out, **options).metrics["loss"]
        )

    plain = ended(1.0)
    assert ended(2.0**17) == pytest.approx(plain, rel=1e-6) and plain < 0.7
    assert ended(size) < 1.3 * plain + 0.05


def test_weights_in_the_file_are_in_the_unit_of_the_targets(tmp_path: Path) -> None:
    task = task_of(center=2e5, scale=7e4)
    assert task.model.head.unit == 2.0**16
    batch = task.collate(task.encode(table_of()), row_rngs(0, "collate", 0, 24), evaluation=True)
    there = task.model.eval()(batch)
    assert float(there.mean()) == pytest.approx(2e5, rel=0.05)
    task.model.save(tmp_path / "model")
    loaded = pretrain.load(tmp_path / "model", quiet=True)
    assert loaded.head.unit == 1.0 and torch.equal(loaded(batch), there)
    assert float(loaded.head.classifier.bias) == float(task.model.head.classifier.bias) * 2.0**16
    # Fine-tuned again, and only used: the answers stay the same bits.
    again = Regression(loaded, center=2e5, scale=7e4)
    assert loaded.head.unit == 2.0**16 and torch.equal(again.model(batch), there)
    assert torch.equal(
        loaded.disk_state()["classifier.weight"], task.model.disk_state()["classifier.weight"]
    )


def test_a_number_is_not_rounded_to_half_precision() -> None:
    task = task_of(std=0.5, center=2000.0, scale=4.0)
    batch = task.collate(task.encode(table_of()), row_rngs(0, "collate", 0, 24), evaluation=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = task.model.eval()(batch)
    assert scores.dtype == torch.float32 and len(scores.unique()) > 12


def test_a_model_of_numbers_becomes_one_of_classes(tmp_path: Path) -> None:
    """And answers in memory as it does from its file."""
    rows = [{"text": r["text"], "label": 1000.0 * len(r["text"].split())} for r in rows_of(32)]
    numbers = pretrain.finetune(model_of(), rows, "regression", out=tmp_path / "a", **QUICK)
    assert numbers.model.head.unit > 1
    text = "the old cat"
    assert numbers.model.predict(text) == numbers.predict(text)  # a new task on the same model
    classes = pretrain.finetune(
        numbers.model, rows_of(32), "classification", out=tmp_path / "b", **QUICK
    )
    assert classes.model.head.unit == 1.0
    there = classes.predict(text, top_k=None)
    again = pretrain.load(tmp_path / "b", quiet=True).predict(text, top_k=None)
    assert there["label"] == again["label"] and there["score"] == pytest.approx(again["score"])
    assert 0.1 < there["score"][0] < 0.9


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_a_run_goes_on_in_the_unit_that_it_began_in(ema: float, tmp_path: Path) -> None:
    """Also one of an earlier version, which had none: weights, average and moments are in that unit."""
    rows = [{"text": r["text"], "label": 1000.0 * len(r["text"].split())} for r in rows_of(32)]
    source = model_of()

    def tune(place: str, limit: str) -> Any:
        options = {**QUICK, "limit": limit, "eval_every": limit, "ema": ema, "lr": 3e-3}
        options |= {"schedule": "constant", "warmup": 0.0}
        result = pretrain.finetune(source, rows, "regression", out=tmp_path / place, **options)
        return result.run.history[-1]["eval"]

    whole = tune("whole", "8 steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceHead, "set_unit", lambda self, size, rescale: None)  # as before
        before = tune("before", "8 steps")
        tune("old", "4 steps")
    assert tune("halves", "4 steps") != whole
    assert tune("halves", "8 steps") == whole
    for state in (tmp_path / "old").glob("checkpoint-*/training/state.json"):
        assert json.loads(state.read_text())["unit"] == 1.0
    assert tune("old", "8 steps") == before


def test_a_model_in_half_precision_answers() -> None:
    task = task_of(center=10.0, scale=2.0)
    model = task.model.eval().to(torch.bfloat16)
    batch = task.collate(task.encode(table_of()), row_rngs(0, "collate", 0, 24), evaluation=True)
    assert torch.isfinite(model(batch)).all() and model(batch).dtype == torch.float32


def test_figures_are_those_of_targets_that_single_precision_rounds() -> None:
    """Such as seconds since 1970, which it holds in steps of 128."""
    rows = [{"text": r["text"], "label": 1_700_000_000 + 97 * i} for i, r in enumerate(rows_of(30))]
    found = Regression.learn(table := read_table(rows), {})
    assert "steps of 128 only, so the model learns (target - 1700001406" in found.notes[0]
    task = task_of(std=0.3, **found.options).eval()
    figures = evaluate_rows(task, task.encode(table), choose_precision("fp32", CPU), batch_rows=8)
    said = np.array([answer["score"] for answer in task.predict(table)])
    truth = np.array(table.columns["label"], dtype=np.float64)
    assert figures["pearson"] == pytest.approx(stats.pearsonr(truth, said).statistic, abs=1e-9)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(truth, said).statistic, abs=1e-9)
    assert figures["mse"] == pytest.approx(((truth - said) ** 2).mean(), rel=1e-6)
    assert not Regression.learn(table_of(), {}).notes


@pytest.mark.parametrize(("middle", "size"), [(1.7e12, 1000.0), (0.0, 1e-300)])
def test_targets_that_single_precision_does_not_tell_apart_are_learned(
    middle: float, size: float, tmp_path: Path
) -> None:
    rows = [
        {"text": r["text"], "label": middle + size * len(r["text"].split())} for r in rows_of(48)
    ]
    spread = size * np.std([len(r["text"].split()) for r in rows])
    result = pretrain.finetune(
        model_of(), rows, "regression", out=tmp_path / "run",
        **{**QUICK, "limit": "60 steps", "eval_every": "60 steps"},
    )  # fmt: skip
    assert result.metrics["loss"] < 0.5 and result.metrics["pearson"] > 0.7
    loaded = pretrain.load(tmp_path / "run", quiet=True)
    said = np.array([answer["score"] for answer in loaded.predict([r["text"] for r in rows])])
    truth = np.array([r["label"] for r in rows])
    assert np.mean(np.abs(said - truth)) < 0.7 * spread


def test_a_trained_head_goes_on_in_its_own_unit(tmp_path: Path) -> None:
    """Whether its answers are standardised is a matter of its targets, not of those that follow."""
    near = [{"text": r["text"], "label": float(len(r["text"]))} for r in rows_of(40)]
    far = [{**r, "label": 1.7e9 + 300 * r["label"]} for r in near]
    for first, then in ((near, far), (far, near)):
        base = tmp_path / f"base-{first is far}"
        pretrain.finetune(model_of(), first, "regression", out=base, **QUICK)
        told = pretrain.load(base, quiet=True).predict("a cat")["score"]
        result = pretrain.finetune(
            base, then, "regression", out=tmp_path / f"next-{first is far}",
            **{**QUICK, "limit": "1 steps", "lr": 1e-12},
        )  # fmt: skip
        assert result.task.standard == (first is far)
        answer = result.predict("a cat")["score"]
        assert answer == pytest.approx(told, rel=1e-6)


def test_a_class_of_the_caller_need_not_know_what_its_base_learns_now() -> None:
    class Own(Regression):
        def __init__(self, model: Any, *, center: float = 0.0, scale: float = 1.0) -> None:
            super().__init__(model, center=center, scale=scale)

    rows = read_table([{"text": "a", "label": 1.7e9}, {"text": "b", "label": 1.7e9 + 300}])
    assert "standard" not in Own.learn(rows, {}).options
    assert Regression.learn(rows, {}).options["standard"]
    # Nor does a run that began without it.
    assert "standard" not in Regression.learn(rows, {"begun_objective": {}}).options


def test_a_tiny_difference_is_no_constant() -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1e-300}]
    found = Regression.learn(read_table(rows), {}).options
    assert found == pytest.approx({"center": 5e-301, "scale": 5e-301, "standard": True}, rel=1e-9)
