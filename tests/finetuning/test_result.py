"""What fine-tuning gives back: figures, mistakes, a page, and a directory that opens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import confusion_matrix

import pretrain
from finetuning.conftest import ANIMALS, QUICK, rows_of
from pretrain.errors import DataError
from pretrain.objectives.regression import Regression
from pretrain.objectives.tasks import Task


@pytest.fixture(scope="module")
def result(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("result") / "run"
    return pretrain.finetune(
        checkpoint, rows_of(48), "classification", test=rows_of(25, 8), **(QUICK | {"out": out})
    )


def test_it_says_where_and_how_well(result: Any) -> None:
    text = repr(result)
    assert "classification with bert" in text
    assert f"best {result.run.best.name}, {result.run.path / 'model'}\n" in text
    for part in ("validation", "test", "majority baseline"):
        assert part in text
    assert f"{result.test_metrics['accuracy']:.4f}" in text
    page = result._repr_html_()
    assert '<table class="t">' in page and "accuracy" in page and "<script" not in page


def test_mistakes_are_those_of_the_test_rows(result: Any) -> None:
    rows = rows_of(25, 8)
    said = [found["label"] for found in result.predict([{"text": r["text"]} for r in rows])]
    wanted = confusion_matrix([r["label"] for r in rows], said, labels=list(ANIMALS))
    assert (result.confusion().matrix == wanted).all()
    wrong = {r["text"] for r, label in zip(rows, said, strict=True) if r["label"] != label}
    found = list(result.errors(100))
    assert {row["text"] for row in found} == wrong
    assert len(list(result.errors(2))) == min(2, len(wrong))
    assert result.test_metrics["accuracy"] == pytest.approx(1 - len(wrong) / 25)


def test_further_rows(result: Any, tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows_of(25, 8)))
    assert result.evaluate(path) == result.test_metrics
    with pytest.raises(DataError, match="owl"):
        result.evaluate([{"text": "an owl", "label": "owl"}])


def test_saved_and_opened_it_answers_the_same(result: Any, tmp_path: Path) -> None:
    texts = [r["text"] for r in rows_of(9, 2)]
    model = pretrain.load(result.save(tmp_path / "saved"), quiet=True)
    from pretrain.inference.predict import predict

    assert predict(model, texts) == result.predict(texts)
    figure = f"{result.test_metrics['accuracy']:.4g}"
    cards = [
        (saved / "README.md").read_text()
        for saved in (tmp_path / "saved", result.model.save(tmp_path / "model"))
    ]
    assert cards[0] == cards[1] and "split: test" in cards[0] and f" {figure} |" in cards[0]
    copy = model.save(tmp_path / "copy")  # the card is the run's, its test figures go along
    assert f"test accuracy: {figure}" in (copy / "README.md").read_text()
    assert predict(pretrain.load(result.run.best, quiet=True), texts) == result.predict(texts)


def test_the_page_is_written(result: Any, tmp_path: Path) -> None:
    page = result.report(tmp_path / "page")
    assert page.is_file() and "accuracy" in page.read_text()


def test_numbers_have_no_confusion(checkpoint: str, tmp_path: Path) -> None:
    rows = [{"text": r["text"], "label": len(r["text"])} for r in rows_of(30)]
    found = pretrain.finetune(
        checkpoint, rows, "regression", **(QUICK | {"out": tmp_path, "limit": "2 steps"})
    )
    with pytest.raises(DataError, match="confusion"):
        found.confusion()
    weights = [abs(row["label"] - row["predicted"]) for row in found.errors(4)]
    assert weights == sorted(weights, reverse=True)


def test_a_task_whose_answers_have_another_key(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are not compared with the truth, unless it says how; then they are shown whole."""
    rows = [{"text": r["text"], "label": len(r["text"]) / 20} for r in rows_of(48)]
    monkeypatch.setattr(Regression, "answer_key", "label")
    own = Regression.mistake
    monkeypatch.setattr(Regression, "mistake", Task.mistake)
    found = pretrain.finetune(checkpoint, rows, "regression", **(QUICK | {"out": tmp_path}))
    assert found.answers and not list(found.errors())
    monkeypatch.setattr(Regression, "mistake", own)
    assert all(list(row["predicted"]) == ["score"] for row in found.errors())


def test_mistakes_in_answers_are_those_that_the_figures_count(
    checkpoint: str, tmp_path: Path
) -> None:
    """An answer is right if it matches any accepted one as SQuAD compares; rows that are not measured are none."""
    rows = [
        {"question": "who", "context": f"the {w} sat on the mat {i}", "answers": [f"the {w}", w]}
        for i, w in enumerate(ANIMALS * 8)
    ]
    options = QUICK | {"out": tmp_path, "lr": 5e-2, "limit": "60 steps", "bad_answers": "drop"}
    held_out = [*rows[:9], {**rows[0], "answers": ["a cow"]}]
    options["valid"] = [{**row, "context": row["context"] + "!"} for row in held_out]
    found = pretrain.finetune(checkpoint, rows, "question-answering", **options)
    errors = list(found.errors(100))
    assert found.metrics["exact_match"] == pytest.approx(1 - len(errors) / 9)
    assert len(errors) < 9, "the model has not learnt enough for the test"
    assert all(
        isinstance(row["predicted"], str) and row["label"][0][4:] in ANIMALS for row in errors
    )


def test_rows_whose_classes_the_labels_of_the_run_renamed(checkpoint: str, tmp_path: Path) -> None:
    """Earlier versions recorded no names of the source beside numbers and labels; the settings tell who named them."""
    datasets = pytest.importorskip("datasets")

    def named(names: Any, count: int, seed: int) -> Any:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
        )
        rows = [r | {"label": ANIMALS.index(r["label"])} for r in rows_of(count, seed)]
        return datasets.Dataset.from_list(rows, features=features)

    labels, options = [*ANIMALS[::-1]], QUICK | {"limit": "1 steps"}
    found = {}
    for name, more in (("given", {"labels": labels}), ("plain", {})):
        out, rows = tmp_path / name, named(ANIMALS, 24, 0)
        found[name] = pretrain.finetune(
            checkpoint, rows, "classification", out=out, **more, **options
        )
    further = named(["Katze", "Hund", "Fuchs"], 15, 3)
    wanted = found["given"].evaluate(named(ANIMALS, 15, 3))
    assert found["given"].evaluate(further) == wanted
    assert pretrain.evaluate(tmp_path / "given", further)["accuracy"] == wanted["accuracy"]
    for evaluate in (
        found["plain"].evaluate,
        lambda rows: pretrain.evaluate(tmp_path / "plain", rows),
    ):
        with pytest.raises(DataError, match="classes Katze, Hund, Fuchs, which are recognised by"):
            evaluate(further)
