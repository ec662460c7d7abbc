"""Classification: what is encoded, the loss and figures against torch and scikit-learn, and what cannot be learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch.nn import functional as F

import pretrain
from contract import check_objective
from finetuning.conftest import ANIMALS, model_of, rows_of
from pretrain.data.labelled import roles_table
from pretrain.data.loader import row_rngs
from pretrain.data.tables import Table, read_table
from pretrain.errors import ConfigError, DataError, TrainingError
from pretrain.inference import predict
from pretrain.objectives.classification import Classification
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_precision
from pretrain.training.restore import check_objective as check_recorded

CPU = torch.device("cpu")


def task_of(
    family: str = "bert", labels: Any = ANIMALS, seed: int = 0, **options: Any
) -> Classification:
    model = model_of(
        family, head="sequence-classification", labels=labels, seed=seed, initializer_range=0.3
    )
    return Classification(model, **options)


def batch_of(task: Classification, rows: Any, **options: Any) -> Any:
    return task.collate(list(rows), row_rngs(0, "collate", 0, len(rows)), **options)


def logits_of(task: Classification, rows: Any) -> torch.Tensor:
    with torch.no_grad():
        return task.model(batch_of(task, rows)).float()


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_contract(family: str, tmp_path: Path) -> None:
    rows = alike(task_of(family).encode(read_table(rows_of(90))))
    check_objective(lambda: Placeless(task_of(family).model, pack=False), rows, tmp_path)


def alike(rows: Any) -> list[Any]:
    """Sixteen examples of one length, of all classes: one row each, so that rows can be compared."""
    groups: dict[int, list[Any]] = {}
    for example in rows:
        groups.setdefault(len(example["input_ids"]), []).append(example)
    found = max(groups.values(), key=len)
    assert len(found) >= 4
    return (found * 4)[:16]


class Placeless(Classification):
    """Without the places in the flattened batch, which say where a row is and so differ by row."""

    def collate(self, examples: Any, rngs: Any, *, evaluation: bool = False) -> Any:
        batch = super().collate(examples, rngs, evaluation=evaluation)
        return {
            k: v for k, v in batch.items() if k not in ("first_index", "last_index", "document_ids")
        }


WEIGHTS = {"balanced": None, "list": [1.0, 2.0, 0.25], "mapping": {"fox": 3.0}}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weighted_loss_is_torchs_and_does_not_depend_on_the_cut(kind: str) -> None:
    table = read_table(rows_of(30)[:24] + [r for r in rows_of(60, 5) if r["label"] == "cat"])
    task = task_of(class_weights="balanced" if kind == "balanced" else WEIGHTS[kind]).eval()
    rows = task.encode(table)
    codes = [ANIMALS.index(label) for label in table.columns["label"]]
    counts = np.bincount(codes)
    wanted = {
        "balanced": len(codes) / (3 * counts), "list": [1.0, 2.0, 0.25], "mapping": [1.0, 1.0, 3.0],
    }[kind]  # fmt: skip
    reference = F.cross_entropy(
        logits_of(task, rows), torch.tensor(codes), torch.tensor(np.array(wanted), dtype=torch.float32)
    )  # fmt: skip
    for size in (len(rows), 7):
        total = count = 0.0
        for start in range(0, len(rows), size):
            loss = task(batch_of(task, rows[start : start + size]))
            total, count = total + float(loss.total.detach()), count + float(loss.count)
        assert total / count == pytest.approx(float(reference), rel=1e-5)
    if kind == "balanced":
        sk_weights = len(codes) / (3 * np.bincount(codes))
        assert wanted == pytest.approx(sk_weights)
    # Held-out figures are of the rows as they are.
    plain = F.cross_entropy(logits_of(task, rows), torch.tensor(codes))
    figures = evaluate_rows(task, rows, choose_precision("fp32", CPU), batch_rows=5)
    assert figures["loss"] == pytest.approx(float(plain), rel=1e-5)


def test_weights_are_given_by_the_names_of_classes() -> None:
    def weights(given: Any, labels: tuple[str, ...]) -> list[float]:
        return task_of(labels=labels, class_weights=given)._weights.tolist()

    assert weights({2: 3.0, 1.0: 0.5}, ("1", "2")) == [0.5, 3.0]
    assert weights({2: 3.0}, ("1.0", "2.0")) == [1.0, 3.0]
    assert weights({"Fox": 3.0}, ANIMALS) == weights({"fox": 3.0}, ANIMALS)
    with pytest.raises(ConfigError, match="names 0, which is not a label"):
        weights({0: 3.0}, ANIMALS)
    shared = ("tench", "crane", "crane")  # as in checkpoints of ImageNet
    assert weights({"tench": 3.0}, shared) == [3.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match="names 'crane', and several classes .* list of 3 num"):
        weights({"crane": 3.0}, shared)


def test_smoothing_is_of_training_alone() -> None:
    task = task_of(label_smoothing=0.2)
    task.model.eval()
    rows = task.encode(read_table(rows_of(12)))
    codes = torch.tensor([ANIMALS.index(r["label"]) for r in rows_of(12)])
    logits = logits_of(task, rows)
    task.training = True
    loss = task(batch_of(task, rows))
    smooth = F.cross_entropy(logits, codes, label_smoothing=0.2)
    assert float(loss.total.detach() / loss.count) == pytest.approx(float(smooth), rel=1e-5)
    task.eval()
    loss = task(batch_of(task, rows))
    assert float(loss.total.detach() / loss.count) == pytest.approx(
        float(F.cross_entropy(logits, codes)), rel=1e-5
    )


def test_figures_against_scikit_learn() -> None:
    task = task_of(seed=3).eval()
    table = read_table(rows_of(61))
    figures = evaluate_rows(task, task.encode(table), choose_precision("fp32", CPU), batch_rows=8)
    said = [found["label"] for found in task.predict(table)]
    truth = task.truth(table)
    assert truth == table.columns["label"] and len(set(said)) > 1
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(truth, said))
    assert figures["macro_f1"] == pytest.approx(
        sk.f1_score(truth, said, average="macro", zero_division=0)
    )
    assert figures["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, said))


def several(count: int) -> Table:
    rows = rows_of(count)
    return read_table(
        [{"text": r["text"], "label": [a for a in ANIMALS if a[0] in r["text"]]} for r in rows]
    )


def test_several_labels_against_torch_and_scikit_learn() -> None:
    table = several(50)
    found = Classification.learn(table, {})
    assert found.labels == ANIMALS and found.options["problem"] == "multi_label"
    task = task_of(problem="multi_label", threshold=0.4, seed=1).eval()
    rows = task.encode(table)
    wanted = np.array([[a in label for a in ANIMALS] for label in table.columns["label"]])
    logits = logits_of(task, rows)
    reference = F.binary_cross_entropy_with_logits(
        logits, torch.tensor(wanted, dtype=torch.float32)
    )
    figures = evaluate_rows(task, rows, choose_precision("fp32", CPU), batch_rows=7)
    assert figures["loss"] == pytest.approx(float(reference), rel=1e-5)
    said = np.array([[a in found["label"] for a in ANIMALS] for found in task.predict(table)])
    assert (said == (logits.sigmoid() > 0.4).numpy()).all()
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(wanted, said))
    for average in ("micro", "macro"):
        f1 = sk.f1_score(wanted, said, average=average, zero_division=0)
        assert figures[f"{average}_f1"] == pytest.approx(f1)
    assert task.truth(table) == table.columns["label"]
    assert task.model.hf_config()["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize(
    "option",
    [{"class_weights": [1, 2, 3]}, {"class_weights": "balanced"}, {"label_smoothing": 0.1}],
)
def test_options_of_one_class_are_not_ignored_with_several(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        task_of(problem="multi_label", **option)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"problem": "ranking"}, "single_label"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"class_weights": [1.0, 2.0]}, "3 positive"),
        ({"class_weights": [1.0, 2.0, 0.0]}, "positive"),
        ({"class_weights": [1.0, 2.0, float("nan")]}, "positive"),
        ({"class_weights": {"cow": 2}}, "cow"),
        ({"class_weights": "even"}, "balanced"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task_of(**options)


@pytest.mark.parametrize("separator", [" / ", "/"])
def test_a_separator_holds_for_further_rows(separator: str, tmp_path: Path) -> None:
    task = task_of(problem="multi_label", label_separator=separator)
    task.model.extra_config["pretrain"] = {"objective": task.describe()}
    task.model.save(tmp_path / "model")
    reopened = predict.task_of(pretrain.load(tmp_path / "model", quiet=True))
    for one in (task, reopened):
        assert one.truth(bad(["cat / dog", "fox"])) == [["cat", "dog"], ["fox"]]
    assert "label_separator" not in task_of().describe()


@pytest.mark.parametrize("kind", ["frame", "dict", "dict of series", "parquet"])
def test_the_order_of_categories_is_kept(kind: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    labels = pandas.Categorical(["neg", "pos"] * 4, categories=["pos", "neg", "neu"])
    frame = pandas.DataFrame({"text": [f"t {i}" for i in range(8)], "category": labels})
    source: Any = {"text": list(frame["text"]), "category": labels}
    if kind == "frame":
        source = frame
    elif kind == "dict of series":
        source = {"text": frame["text"], "category": frame["category"]}
    elif kind == "parquet":
        source = tmp_path / "rows.parquet"
        frame.to_parquet(source)
    read = read_table(source)
    table = roles_table(read, {"text": "text", "label": "category"})
    assert table.fingerprint == replace(table, orders={}).fingerprint
    found = Classification.learn(table, {})
    assert found.labels == ("pos", "neg", "neu") and found.strata == [1, 0] * 4
    assert found.notes == ["label: classes without a row, as the column declares: 'neu'"]
    assert Classification.learn(table, {"labels": ["neg", "pos"]}).labels == ("neg", "pos")
    # A run that an earlier version began goes on with its classes.
    assert Classification.learn(table, {"begun_labels": ("neg", "pos")}).labels == ("neg", "pos")
    begun = {"begun_labels": found.labels}
    assert Classification.learn(table, begun).labels == found.labels


@pytest.mark.parametrize(("others", "kept"), [(12, True), (13, False), (5000, False)])
def test_many_categories_without_a_row_are_no_classes(others: int, kept: bool) -> None:
    pandas = pytest.importorskip("pandas")
    declared = ["z", *(f"c{i}" for i in range(others)), "", " ", "a"]
    labels = pandas.Categorical(["a", "z"] * 4, categories=declared)
    table = read_table({"text": ["t"] * 8, "label": labels})
    unused = declared[1 : others + 1] if kept else []
    assert Classification.learn(table, {}).labels == ("z", *unused, "a")


def test_what_is_stored_as_a_dictionary_has_no_order(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = arrow.array(["b", "a", "b"]).dictionary_encode()
    parquet.write_table(
        arrow.table({"text": ["x", "y", "z"], "label": column}), tmp_path / "a.parquet"
    )
    table = read_table(tmp_path / "a.parquet")
    assert table.orders == {} and Classification.learn(table, {}).labels == ("a", "b")


def test_the_form_of_lists_is_kept_with_the_model(tmp_path: Path) -> None:
    assert "label_form" not in task_of(problem="multi_label").describe()
    task = task_of(labels=("a", "b"), problem="multi_label", label_form="numbers")
    task.model.extra_config["pretrain"] = {"objective": task.describe()}
    task.model.save(tmp_path / "model")
    reopened = predict.task_of(pretrain.load(tmp_path / "model", quiet=True))
    assert reopened.truth(bad([[0, 1], [1, 0]])) == [["a", "b"]] * 2
    # A run of an earlier version, which did not record it, goes on.
    earlier = task_of(labels=("a", "b"), problem="multi_label")
    assert earlier.truth(bad([[0, 1], [1, 0]])) == [["b"], ["a"]]
    for told in (earlier, task):
        config = {"pretrain": {"objective": told.record()}, "id2label": {"0": "a", "1": "b"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for form in (None, "vectors", "numbers"):
            now = task_of(labels=("a", "b"), problem="multi_label", label_form=form)
            check_recorded(now, tmp_path)
    with pytest.raises(ConfigError, match="'vectors' or 'numbers'"):
        task_of(label_form="lists")


def test_what_is_learned_of_the_rows() -> None:
    table = read_table(rows_of(12))
    found = Classification.learn(table, {})
    assert found.labels == ANIMALS and found.options["problem"] == "single_label"
    assert list(found.strata or ()) == [ANIMALS.index(r["label"]) for r in rows_of(12)]
    given = Classification.learn(table, {"labels": ["fox", "dog", "cat", "owl"]})
    assert given.labels == ("fox", "dog", "cat", "owl")


def bad(labels: list[Any]) -> Table:
    return read_table([{"text": f"the {i}", "label": label} for i, label in enumerate(labels)])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", "b", None], "row 3"),
        (["a", "b", float("nan")], "row 3"),
        (["a", "a", "a"], "two classes"),
        ([0.5, 1.5, 2.0], "regression"),
        ([["a"], ["b"], "c"], "row 3"),
        ([["a"], ["b"], None], "row 3"),
        ([["a"], ["a"], []], "two classes"),
    ],
)
def test_targets_that_cannot_be(labels: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Classification.learn(bad(labels), {})


@pytest.mark.parametrize("label", ["cow", None, "cat", 3.5])
def test_held_out_targets_of_several_that_cannot_be(label: Any) -> None:
    task = task_of(problem="multi_label")
    with pytest.raises(DataError, match="row 2"):
        task.encode(bad([["cat"], label]))


def test_a_label_that_training_did_not_have() -> None:
    with pytest.raises(DataError, match=r"row 2.*'cow'"):
        task_of().encode(bad(["cat", "cow"]))
    with pytest.raises(DataError, match=r"row 2.*'cow'"):
        task_of(problem="multi_label").encode(bad([["cat"], ["cow"]]))


def test_the_mark_of_rows_without_a_label_in_snli_is_remarked_on() -> None:
    def notes(*labels: str, **options: Any) -> list[str]:
        rows = [{"text": f"t {i}", "label": label} for i, label in enumerate(labels)]
        return Classification.learn(read_table(rows), options).notes

    assert "'-' is a class, of 1 of 4 rows" in notes("neutral", "entailment", "-", "neutral")[0]
    assert "'nan' is a class" in notes("neutral", "nan", "neutral")[0]
    assert "'None', 'nan' are classes" in notes("None", "yes", "nan")[0]
    assert (
        notes("None", "nan")
        == notes("none", "some")
        == notes("NA", "DE", labels=["DE", "NA"])
        == []
    )
    assert notes("+", "-", "+") == notes("a", "-", "a", labels=["a", "-"]) == notes("a", "b") == []


def test_texts_are_framed_and_cut() -> None:
    task = task_of(max_length=8)
    table = read_table([
        {"text": "the cat sat", "pair": "a dog", "label": "cat"},
        {"text": "the cat " * 20, "pair": "a dog", "label": "dog"},
        {"text": " ", "pair": "a dog", "label": "dog"},
        {"text": "a fox", "pair": "", "label": "fox"},
    ])  # fmt: skip
    rows = task.encode(table)
    assert rows.owners == [0, 1] and rows.cut[-1] == 1 and rows.dropped == {"empty text": [2, 3]}
    assert rows[1]["input_ids"].shape == (8,)
    tokenizer = task.model.tokenizer
    assert (
        tokenizer.decode([int(i) for i in rows[0]["input_ids"]], skip_special=False).count("[SEP]")
        == 2
    )
    assert set(rows[0]["token_type_ids"].tolist()) == {0, 1}
    answers = list(task.predict(table))
    assert answers[0]["label"] in ANIMALS and answers[2] == answers[3] == {}
    with pytest.raises(DataError, match=r"row 1.*int"):
        task.encode(read_table([{"text": 5, "label": "cat"}]))


def test_the_trivial_figure_is_that_of_the_commonest_class() -> None:
    task = task_of()
    train, held = bad(["dog", "dog", "cat", "fox"]), bad(["cat", "dog", "dog", "fox"])
    assert task.trivial(train, held) == {"accuracy": 0.5}


def test_a_threshold_is_a_probability_of_several_classes() -> None:
    model = model_of(head="sequence-classification", labels=ANIMALS)
    for wrong in (0.0, 1.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            Classification(model, problem="multi_label", threshold=wrong)
    assert Classification(model, threshold=0.7).single  # recorded by earlier versions


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        ({"0": 0, "1": 1, "bad": 0}, {"0": 0, "1": 1, "neg": 0, "pos": 1}, True),
        ({"bad": 0, "BAD": 0, "good": 1}, None, True),
        (None, {"bad": 0, "good": 1, "neg": 0}, True),
        ({"0": 0, "1": 1}, {"1": 0, "0": 1}, False),
        (None, {"0": 0, "bad": 1, "good": 0}, False),
    ],
)
def test_a_run_goes_on_with_codes_that_mean_the_same(
    tmp_path: Path, then: Any, now: Any, same: bool
) -> None:
    """Versions differ in the spellings that they record."""
    labels = ("bad", "good")
    block = {"objective": task_of(labels=labels, codes=then).record()}
    config = {"id2label": dict(enumerate(labels)), "pretrain": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    task = task_of(labels=labels, codes=now)
    if same:
        check_recorded(task, tmp_path)
    else:
        with pytest.raises(TrainingError, match="with codes "):
            check_recorded(task, tmp_path)


def test_names_that_were_numbers_in_an_earlier_version_are_refused(tmp_path: Path) -> None:
    labels = ("1", "2", "3")
    block = {"objective": task_of(labels=labels, codes={"0": 0, "1": 1, "2": 2}).record()}
    config = {"id2label": dict(enumerate(labels)), "pretrain": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match="with codes "):
        check_recorded(task_of(labels=labels), tmp_path)


def test_names_that_change_places_are_recorded() -> None:
    """Spellings that are the labels say nothing only where each is its own label."""
    assert "codes" not in task_of(labels=("x", "y"), codes={"y": 1, "x": 0}).describe()
    exchanged = {"x": 1, "y": 0}
    assert task_of(labels=("x", "y"), codes=exchanged).describe()["codes"] == exchanged


def test_the_trivial_baseline_of_several_labels_is_the_most_frequent_set() -> None:
    learnt = [ANIMALS[:2], ANIMALS[:2], ANIMALS[:1], [], ANIMALS[2:]]
    held_out = [ANIMALS[:2], ANIMALS[:1], ANIMALS[1:], ANIMALS[:2], []]
    train, valid = (
        read_table([{"text": "x", "label": one} for one in rows]) for rows in (learnt, held_out)
    )
    found = task_of(problem="multi_label").trivial(train, valid)
    truth = np.array([[name in row for name in ANIMALS] for row in held_out])
    guess = np.array([[True, True, False]] * 5)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    for average in ("micro", "macro"):
        score = sk.f1_score(truth, guess, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(score)
