"""What a run says about itself: each remark where it applies, and none where it does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pretrain
from finetuning.conftest import ANIMALS, QUICK, model_of, rows_of
from pretrain import finetune
from pretrain.finetuning.remarks import held_out_unlike_test, overfitted, remarks, still_improving
from pretrain.report.history import History, sort_records


def history(evals: list[float], figure: str, training: list[float] | None = None) -> History:
    """Evaluations after 10, 20, ... steps, and the training losses logged beside them."""
    records: list[Any] = [
        {"step": 10 * (i + 1), "eval": {figure: value}} for i, value in enumerate(evals)
    ]
    records += [
        {"step": 10 * (i + 1), "loss": loss, "lr": 1.0} for i, loss in enumerate(training or [])
    ]
    return sort_records(records)


@pytest.mark.parametrize(
    ("figure", "values", "said"),
    [
        ("accuracy", [0.3, 0.4, 0.5, 0.6, 0.7], True),
        ("accuracy", [0.3, 0.4, 0.7, 0.7, 0.7], False),
        ("accuracy", [0.3, 0.4, 0.5, 0.8, 0.7], False),
        ("accuracy", [0.700, 0.701, 0.701, 0.702], False),
        ("accuracy", [0.3, 0.9], False),
        ("loss", [3.0, 2.5, 2.2, 2.0], True),
        ("loss", [3.0, 2.5, 2.2, 2.3], False),
        ("pearson", [math.nan, 0.1, 0.2, 0.3], True),
        ("mse", [9.0, 8.0, 7.0, 6.0], True),
    ],
)
def test_a_run_that_ended_while_it_still_improved(
    figure: str, values: list[float], said: bool
) -> None:
    line = still_improving(history(values, figure), figure)
    assert (line is not None) == said
    assert line is None or figure in line


@given(st.lists(st.floats(0, 1), min_size=3, max_size=30))
def test_only_a_best_last_evaluation_still_improves(values: list[float]) -> None:
    """For a figure that rises and its mirror image that falls."""
    best_is_last = values[-1] >= max(values)
    for figure, curve in (("accuracy", values), ("loss", [2 - v for v in values])):
        if still_improving(history(curve, figure), figure):
            assert best_is_last


@pytest.mark.parametrize(
    ("evals", "training", "said"),
    [
        ([1.2, 1.0, 1.5], [1.1, 0.8, 0.2], True),
        ([1.2, 1.0, 1.05], [1.1, 0.8, 0.2], False),  # hardly rose
        ([1.2, 1.0, 1.5], [1.1, 0.8, 1.3], False),  # the training loss rose as well: it diverged
        ([1.5, 1.2, 1.0], [1.1, 0.8, 0.2], False),
        ([1.0], [1.0], False),
    ],
)
def test_a_run_that_overfitted(evals: list[float], training: list[float], said: bool) -> None:
    line = overfitted(history(evals, "loss", training))
    assert (line is not None) == said


def test_one_answer_to_everything_is_said_in_summary_page_and_card(
    checkpoint: str, tmp_path: Path
) -> None:
    """A step of nearly nothing leaves a model that names one class; its labels are drawn by lot besides."""
    rows = [{**row, "label": "cat" if i % 4 else "dog"} for i, row in enumerate(rows_of(48))]
    given = {**QUICK, "lr": 1e-9, "limit": "1 steps"}
    result = finetune(checkpoint, rows, task="classification", out=tmp_path / "run", **given)
    answers = {answer["label"] for answer in result.predict([row["text"] for row in rows])}
    said = [line for line in result.remarks if "same answer" in line]
    assert bool(said) == (len(answers) == 1)
    page = result.report().read_text("utf-8")
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    for line in result.remarks:
        assert line in repr(result) and line[:40] in page and line[:40] in card


def test_a_better_classical_baseline_is_said(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    given = {**QUICK, "lr": 1e-9, "limit": "1 steps"}
    result = finetune(checkpoint, rows_of(96), task="classification", out=tmp_path / "run", **given)
    assert any("TF-IDF" in line for line in result.remarks)
    for ours, said in ((math.nan, True), (result.classical, False), (1.0, False)):
        assert result.classical is not None
        result.metrics["accuracy"] = (
            ours  # as the correlation of one answer to everything is no number
        )
        assert any("TF-IDF" in line for line in remarks(result)) == said
    result.__dict__["classical"] = math.nan
    assert not any("TF-IDF" in line for line in remarks(result))


def test_classes_are_alike_for_the_baseline_in_every_spelling(
    checkpoint: str, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "label": ANIMALS.index(row["label"])} for row in rows_of(120)]
    parts = rows[:60], rows[60:90], rows[90:]
    given = {**QUICK, "limit": "1 steps"}

    def classical(name: str, train: Any, valid: Any, test: Any) -> float | None:
        options = {**given, "valid": valid, "test": test, "out": tmp_path / name}
        return finetune(checkpoint, train, "classification", **options).classical

    def named(part: Any, order: list[int]) -> Any:
        names = [ANIMALS[k] for k in order]
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        cells = [{**row, "label": order.index(row["label"])} for row in part]
        return datasets.Dataset.from_list(cells, features=datasets.Features(kinds))

    wanted = classical("numbers", *parts)
    assert wanted is not None and wanted > 0.5
    texts = [[{**row, "label": str(row["label"])} for row in part] for part in parts]
    assert classical("texts", texts[0], parts[1], texts[2]) == wanted
    held = named(parts[1], [2, 0, 1]), named(parts[2], [1, 2, 0])
    assert classical("names", named(parts[0], [0, 1, 2]), *held) == wanted


def test_remarks_go_by_the_figures_of_the_end(checkpoint: str, tmp_path: Path) -> None:
    """The card is written when the model is opened, before the test rows are measured."""
    rows = rows_of(120)
    held = [
        [{**row, "label": label} for row in rows[a : a + 30]]
        for a, label in ((60, "cat"), (90, "dog"))
    ]
    given = {**QUICK, "lr": 1e-9, "limit": "1 steps"} | {"valid": held[0], "test": held[1]}
    result = finetune(checkpoint, rows[:60], "classification", out=tmp_path / "run", **given)
    assert result.remarks == remarks(result)
    # Whatever the model answers, it is right on one kind of rows at the expense of the other.
    share = [result.metrics["accuracy"], (result.test_metrics or {})["accuracy"]]
    line = held_out_unlike_test(result.metrics, result.test_metrics or {}, result.counts)
    assert (line is not None) == (abs(share[0] - share[1]) > 0.34)
    assert line is None or line in repr(result)


@pytest.mark.parametrize(
    ("name", "valid", "test", "rows", "said"),
    [
        ("accuracy", 0.913, 0.718, (150, 600), True),
        ("accuracy", 0.718, 0.913, (150, 600), True),
        ("accuracy", 0.80, 0.75, (150, 600), False),
        ("accuracy", 1.0, 0.5, (10, 600), False),
        ("accuracy", 1.0, 1.0, (100, 100), False),
        ("exact_match", 60.0 / 100, 30.0 / 100, (100, 100), True),
        ("pearson", 0.9, 0.7, (200, 200), True),
        ("pearson", 0.9, 0.87, (200, 200), False),
        ("pearson", math.nan, 0.87, (200, 200), False),
        ("loss", 0.1, 0.9, (200, 200), False),
    ],
)
def test_held_out_and_test_rows_of_different_kinds(
    name: str, valid: float, test: float, rows: tuple[int, int], said: bool
) -> None:
    line = held_out_unlike_test({name: valid}, {name: test}, {"valid": rows[0], "test": rows[1]})
    assert (line is not None) == said
    assert line is None or "group" in line


@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.integers(20, 400), st.integers(20, 400))
def test_chance_is_that_of_two_proportions(seed: int, p: float, first: int, second: int) -> None:
    """The line stands where scipy's normal distribution puts the difference beyond one in a hundred."""
    from scipy import stats

    rng = np.random.default_rng(seed)
    a, b = rng.binomial(first, p), rng.binomial(second, p)
    line = held_out_unlike_test(
        {"accuracy": a / first}, {"accuracy": b / second}, {"valid": first, "test": second}
    )
    common = (a + b) / (first + second)
    error = (common * (1 - common) * (1 / first + 1 / second)) ** 0.5
    value = 1.0 if error == 0 else 2 * stats.norm.sf(abs(a / first - b / second) / error)
    assert (line is not None) == (value < 0.01) or abs(value - 0.01) < 1e-4


@pytest.mark.parametrize("part", ["training", "held-out"])
@pytest.mark.parametrize("empty", [None, "", " "])
def test_rows_without_a_text_count_in_no_baseline(
    part: str, empty: str | None, tmp_path: Path
) -> None:
    """They are left out for the model, so a baseline on them would be one of other rows."""
    rows, held_out = rows_of(48), rows_of(60)[48:]
    (rows if part == "training" else held_out).extend([{"text": empty, "label": "cat"}] * 30)
    options = {**QUICK, "valid": held_out, "out": tmp_path / "run"}
    result = pretrain.finetune(model_of(), rows, "classification", **options)
    assert result.metrics["targets"] == 12 and result.trivial["accuracy"] == pytest.approx(1 / 3)
    plain = pretrain.finetune(
        model_of(),
        rows_of(48),
        "classification",
        **{**options, "valid": rows_of(60)[48:], "out": tmp_path / "plain"},
    )
    assert result.classical == plain.classical is not None
    assert "Traceback" not in "".join(result.remarks)


@pytest.mark.parametrize("case", ["diverged", "equal held-out targets", "equal test targets"])
def test_a_figure_that_is_no_number_is_reported(case: str, tmp_path: Path) -> None:
    rows = rows_of(24)
    options: dict[str, Any] = {**QUICK, "out": tmp_path / "run"}
    if case == "diverged":
        options |= {"lr": 1e6, "limit": "2 steps"}
        result = pretrain.finetune(model_of(), rows, "classification", **options)
        assert not math.isfinite(result.metrics["loss"]) or result.metrics["loss"] > 10
    else:
        rows = [{"text": row["text"], "label": float(k)} for k, row in enumerate(rows)]
        part = "valid" if case == "equal held-out targets" else "test"
        options[part] = [{"text": f"the other {k}", "label": -1.0} for k in range(2)]
        result = pretrain.finetune(model_of(), rows, "regression", **options)
        figures = result.metrics if part == "valid" else result.test_metrics
        assert figures is not None and math.isnan(figures["pearson"])
        again = pretrain.finetune(model_of(), rows, "regression", **options)  # the run goes on
        assert again.run.exit_code == 0 and pretrain.load(tmp_path / "run").labels == ("LABEL_0",)
    assert result.run.exit_code == 0 and (tmp_path / "run" / "report.html").exists()
    assert isinstance(result.remarks, list)
    records = [
        {"step": 1, "eval": {"loss": "nan"}, "loss": "inf"},
        {"step": 2, "eval": {"loss": 1.0}, "loss": 2.0},
    ]
    records.append({"step": 3, "eval": {"loss": 1.0}, "loss": 1.0})
    assert overfitted(sort_records(records)) is None


def test_one_tag_for_every_word_is_said_and_different_tags_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"tokens": ["the", "cat", str(k)], "ner_tags": ["O", "B-CAT", "O"]} for k in range(24)]
    options = {**QUICK, "limit": "1 steps", "out": tmp_path / "run"}
    result = pretrain.finetune(model_of(), rows, "token-classification", **options)
    result.metrics["f1"] = 0.0
    for tags, said in ((["O", "O"], "('O')"), (["O", "B-CAT"], None)):
        answers = [{"tags": tags, "scores": [0.5, 0.5]}, {"tags": tags[:1], "scores": [0.5]}]
        monkeypatch.setattr(result.task, "predict", lambda *_, found=answers, **__: iter(found))
        lines = [line for line in remarks(result) if "same answer" in line]
        assert bool(lines) == (said is not None) and all(said in line for line in lines)


def test_several_labels_that_are_the_same_for_all_rows_are_said(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "label": ["animal", row["label"]]} for row in rows_of(60)]
    given = {**QUICK, "lr": 1e-9, "limit": "1 steps"}
    result = finetune(checkpoint, rows, task="classification", out=tmp_path / "run", **given)
    assert result.trivial["micro_f1"] > 0 and result.trivial_test is not None
    asked: list[int] = []
    for answers in ([["animal"]] * 3, [["animal"], ["animal", "cat"], ["cat"]]):

        def predict(table: Any, batch_rows: int, answers: list[list[str]] = answers) -> Any:
            for k, label in enumerate(answers):
                asked.append(k)
                yield {"label": label}

        monkeypatch.setattr(result.task, "predict", predict)
        said = any("same answer to all 3" in line for line in remarks(result))
        assert said == (answers == [["animal"]] * 3)
    assert asked == [0, 1, 2, 0, 1]  # no rows are predicted after the second answer


@pytest.mark.parametrize(
    ("labels", "said"), [(["cat"], False), (["cat"] * 4, False), (["cat", "cat", "dog"], True)]
)
def test_rows_of_one_class_do_not_tell_whether_a_model_tells_classes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[str], said: bool
) -> None:
    held = [{"text": f"held out {k}", "label": label} for k, label in enumerate(labels)]
    options = {**QUICK, "valid": held, "lr": 1e-9, "limit": "1 steps", "out": tmp_path / "run"}
    result = pretrain.finetune(model_of(), rows_of(48), "classification", **options)
    result.metrics["mcc"] = 0.0
    monkeypatch.setattr(
        result.task, "predict", lambda *_, **__: iter([{"label": "cat"}] * len(held))
    )
    assert any("same answer" in line for line in remarks(result)) == said
    # A baseline that is right for all rows cannot be beaten.
    for ours, beyond in ((1.0, False), (0.9, True)):
        result.metrics["accuracy"], result.trivial["accuracy"] = ours, 1.0
        assert any("nothing beyond" in line for line in remarks(result)) == beyond
