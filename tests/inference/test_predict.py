"""Prediction: every form of input, foreign directories, files that are streamed, and answers equal to transformers'."""

from __future__ import annotations

import collections
import csv
import json
import signal
import tracemalloc
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pretrain
import tiny
from pretrain.cli import main as cli
from pretrain.data.row_writer import RowWriter
from pretrain.data.tables import read_table, stream_chunks
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.inference.predict import predict, predict_file, predict_with, task_of
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.objectives.classification import Classification
from pretrain.utils import files

HEADS: dict[str, dict[str, Any]] = {
    "classification": {"head": "sequence-classification", "labels": ["cat", "dog", "fox"]},
    "multi_label": {"head": "sequence-classification", "labels": ["cat", "dog", "fox"]},
    "regression": {"head": "sequence-classification", "labels": ["LABEL_0"]},
    "tokens": {"head": "token-classification", "labels": ["O", "B-A", "I-A"]},
    "questions": {"head": "question-answering"},
    "fill": {"head": "masked-lm"},
    "body": {"head": None},
}


def small(kind: str = "classification", family: str = "bert", seed: int = 0) -> Model:
    """A tiny model whose random answers differ from text to text."""
    model = build(
        family, None, seed=seed, tokenizer=tiny.tokenizer(), num_layers=1, hidden_size=16, num_heads=2,
        intermediate_size=32, max_positions=48, initializer_range=0.5, dropout=0.0, attention_dropout=0.0,
        **HEADS[kind],
    )  # fmt: skip
    if kind == "multi_label":
        model.extra_config["problem_type"] = "multi_label_classification"
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Model:
    return small()


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("models") / "cats")


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found["label"] == wanted["label"] and found["score"] == pytest.approx(
        wanted["score"], abs=1e-5
    )


# ----------------------------------------------------------------------------------------------- the task


def test_the_task_of_a_head() -> None:
    for kind, name in (
        ("classification", "classification"), ("regression", "regression"), ("tokens", "token-classification"),
        ("questions", "question-answering"),
    ):  # fmt: skip
        assert task_of(small(kind)).name == name
    assert task_of(small("classification")).problem == "single_label"  # type: ignore[attr-defined]
    assert task_of(small("multi_label")).problem == "multi_label"  # type: ignore[attr-defined]


def test_the_task_that_a_checkpoint_records_is_taken_with_its_options() -> None:
    model = small("multi_label")
    block = {
        "name": "Classification",
        "task": "classification",
        "problem": "multi_label",
        "threshold": 0.25,
    }
    model.extra_config["pretrain"] = {"objective": {**block, "max_length": 20, "newer_option": 1}}
    task = task_of(model)
    assert (task.threshold, task.max_length, task.problem) == (0.25, 20, "multi_label")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "recorded",
    [
        "NextToken",
        {"name": "MaskedLM", "rate": 0.3},
        {"task": ["classification"]},
        {"task": "token-classification"},  # of another head: the file was opened with a new one
        {"task": "question-answering", "name": "x"},
    ],
)
def test_what_a_stranger_records_is_not_imported(recorded: Any) -> None:
    model = small()
    model.extra_config["pretrain"] = {"objective": recorded}
    assert task_of(model).name == "classification"
    model.extra_config["pretrain"] = recorded
    assert task_of(model).name == "classification"


@pytest.mark.parametrize(
    "name", ["os.system", "os:system", "capitals", "pretrain.objectives.regression.Regression"]
)
def test_a_task_that_nobody_named_is_refused_and_not_imported(name: str) -> None:
    model = small()
    model.extra_config["pretrain"] = {"objective": {"task": name}}
    with pytest.raises(pretrain.PretrainError, match="There is no task .* name its class"):
        task_of(model)


@pytest.mark.parametrize(
    "options",
    [{"max_length": "many"}, {"threshold": "half"}, {"problem": 3}, {"max_length": 10**9}],
)
def test_recorded_options_of_a_wrong_kind_are_said(options: dict[str, Any]) -> None:
    model = small()
    model.extra_config["pretrain"] = {"objective": {"task": "classification", **options}}
    with pytest.raises(pretrain.PretrainError, match=r"max_length|threshold|problem|config\.json"):
        task_of(model)


def test_models_without_answers_name_what_to_call() -> None:
    with pytest.raises(ModelError, match="fill_mask"):
        small("fill").predict("the cat")
    with pytest.raises(ModelError, match="embed"):
        small("body").predict("the cat")
    causal = build(
        "gpt2", None, tokenizer=tiny.tokenizer(), num_layers=1, hidden_size=16, num_heads=2, max_positions=32
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"generate.*chat"):
        causal.predict("the cat")


def test_a_head_that_came_from_no_file_is_told(saved: Path, capsys: Any) -> None:
    pretrain.load(saved, quiet=True).predict("the cat")
    assert "random" not in capsys.readouterr().err
    pretrain.load(saved, quiet=True, head="question-answering").predict(("the", "cat"))
    assert "random weights" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ inputs


def test_one_input_gives_one_answer_and_several_a_list(model: Model) -> None:
    one = predict(model, "the red cat sat")
    assert set(one) == {"label", "score"} and one["label"] in ("cat", "dog", "fox")
    assert 1 / 3 <= one["score"] <= 1
    many = model.predict(["the red cat sat", "the old dog"])
    assert len(many) == 2 and same(many[0], one)
    assert model.predict([]) == [] and same(model.predict(iter(["the old dog"]))[0], many[1])


def test_forms_of_input_agree(model: Model, tmp_path: Path) -> None:
    import datasets
    import pandas

    texts = tiny.TEXTS[:5]
    wanted = [predict(model, text) for text in texts]
    rows = [{"review": text, "stars": 3} for text in texts]
    path = tmp_path / "rows.csv"
    path.write_text("review,stars\n" + "".join(f"{text},3\n" for text in texts))
    forms: list[Any] = [
        texts, tuple(texts), np.array(texts), pandas.Series(texts), rows, {"text": texts}, pandas.DataFrame(rows),
        datasets.Dataset.from_list(rows), path, [*pandas.DataFrame(rows)[["stars", "review"]].itertuples()],
    ]  # fmt: skip
    for form in forms:
        found = predict(model, form, batch_rows=2)
        found = found.to_dict("records") if isinstance(form, pandas.DataFrame) else found
        assert len(found) == 5 and all(map(same, found, wanted)), type(form)
    assert same(predict(model, rows[0]), wanted[0])
    odd = [{"verdict": "x", "said": text} for text in texts]
    assert same(predict(model, odd, columns={"text": "said"})[4], wanted[4])
    with pytest.raises(DataError, match=r"'said'.*columns=\{'text'"):
        predict(model, odd)


def test_pairs(model: Model) -> None:
    pair = ("the red cat", "the old dog")
    one = predict(model, pair)
    assert same(predict(model, {"text": pair[0], "pair": pair[1]}), one)
    assert same(predict(model, {"premise": pair[0], "hypothesis": pair[1]}), one)
    assert same(predict(model, [list(pair), pair])[0], one)
    named = collections.namedtuple("named", "hypothesis premise")(pair[1], pair[0])
    assert same(predict(model, named), one) and same(predict(model, [named])[0], one)
    unknown = collections.namedtuple("unknown", "first second")(*pair)
    assert same(predict(model, unknown), one) and same(predict(model, [unknown])[0], one)
    assert not np.isclose(one["score"], predict(model, pair[0])["score"], atol=1e-4)
    with pytest.raises(DataError, match="Input 2 is no pair"):
        predict(model, [pair, "the fox"])


def test_words_and_questions() -> None:
    tagger = small("tokens")
    one = tagger.predict("the red cat sat")
    assert len(one["tags"]) == 4 and set(one["tags"]) <= {"O", "B-A", "I-A"}
    words = ("the", "red", "cat", "sat")
    assert (
        tagger.predict(words)
        == tagger.predict(collections.namedtuple("said", "a b c d")(*words))
        == one
    )
    assert tagger.predict({"tokens": ["the", "red", "cat", "sat"]}) == one
    assert tagger.predict([["the", "red", "cat", "sat"], "the dog"])[0]["tags"] == one["tags"]
    assert len(tagger.predict({"tokens": [["the"], ["red", "cat"]]})) == 2
    reader = small("questions")
    asked = reader.predict({"question": "the cat", "context": "the red cat sat on the mat"})
    assert isinstance(asked, dict) and asked == reader.predict(
        ("the cat", "the red cat sat on the mat")
    )
    with pytest.raises(DataError, match="question and context"):
        reader.predict("the cat")


def test_empty_texts_are_answered_by_nothing_and_counted(model: Model, capsys: Any) -> None:
    found = predict(model, ["the cat", "", None, "  ", "the dog"])
    assert [bool(answer) for answer in found] == [True, False, False, False, True]
    assert "3 of 5 inputs get no answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ([3], "int"),
        (3, "int"),
        ([["a", "b", "c"]], "list"),
        ({"stars": 3}, "'stars'"),
        (b"text", "bytes"),
    ],
)
def test_what_is_no_text_is_said(model: Model, inputs: Any, part: str) -> None:
    with pytest.raises(DataError, match=part):
        predict(model, inputs)


def test_a_text_is_never_opened_as_a_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text\nthe cat\nthe dog\n")
    assert isinstance(predict(model, "rows.csv"), dict)
    assert "pathlib.Path('rows.csv')" in capsys.readouterr().err
    assert len(predict(model, Path("rows.csv"))) == 2


def test_settings_are_checked(model: Model) -> None:
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="batch_rows"):
            predict(model, "a", batch_rows=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature"):
        predict(model, "a", temperature=3)
    with pytest.raises(DataError, match="'txt'"):
        predict(model, [{"text": "a"}], columns={"txt": "text"})


def test_another_task_than_that_of_the_model_is_refused(
    model: Model, saved: Path, tmp_path: Path
) -> None:
    (rows := tmp_path / "rows.csv").write_text("text\na\n", encoding="utf-8")
    assert predict(model, "a", task="classification") == predict(model, "a")
    for call in (
        lambda: predict(model, "a", task="regression"),
        lambda: predict_file(saved, rows, tmp_path / "out.csv", task="regression"),
    ):
        with pytest.raises(
            ConfigError, match=r"task, classification, and cannot by regression.*task=\.\.\."
        ):
            call()
    assert not (tmp_path / "out.csv").exists()


class Unnamed(Classification):
    """A task that keeps the name of its base."""

    def decode(self, outputs: Any, infos: Any, **options: Any) -> dict[str, Any]:
        """Say who answers."""
        return super().decode(outputs, infos, **options) | {"by": "own"}


def test_a_class_that_keeps_the_name_of_its_base_answers_where_it_is_named(
    model: Model, saved: Path, tmp_path: Path
) -> None:
    plain = predict(model, "a")
    assert predict(model, "a", task=Unnamed) == plain | {"by": "own"}
    assert predict(model, "a", task="classification") == predict(model, "a") == plain
    (rows := tmp_path / "rows.csv").write_text("text\na\n", encoding="utf-8")
    found = predict_file(saved, rows, tmp_path / "out.jsonl", task=Unnamed)
    assert json.loads(found.read_text())["by"] == "own"
    with pytest.raises(ConfigError, match="cannot by classification"):
        predict(small("regression"), "a", task=Unnamed)


def test_prediction_leaves_the_model_as_it_was(model: Model) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    predict_with(task_of(model), ["the cat"])
    assert model.training
    model.eval()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from([*tiny.TEXTS, "", "cat"]), max_size=12), st.integers(1, 5))
def test_order_and_batches_do_not_matter(model: Model, texts: list[str], batch: int) -> None:
    found = predict(model, texts, batch_rows=batch)
    assert len(found) == len(texts)
    for text, answer in zip(texts, found, strict=True):
        assert (answer == {}) if not text else same(answer, predict(model, text))


# ----------------------------------------------------------------------------------- equal to transformers


def test_a_foreign_directory_answers_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kinds = {
        "classification": transformers.AutoModelForSequenceClassification,
        "multi_label": transformers.AutoModelForSequenceClassification,
        "regression": transformers.AutoModelForSequenceClassification,
    }
    texts, pairs = tiny.TEXTS[:4], tiny.TEXTS[4:8]
    for kind, opener in kinds.items():
        folder = small(kind, "modernbert").save(tmp_path / f"ours-{kind}")
        theirs = opener.from_pretrained(folder).eval()
        theirs.save_pretrained(tmp_path / kind)  # now written by transformers alone
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(tmp_path / kind)
        ours = pretrain.load(tmp_path / kind, quiet=True)
        for second in (None, pairs):
            with torch.no_grad():
                batch = tokenizer(texts, second, padding=True, return_tensors="pt")
                logits = theirs(**batch).logits
            inputs = texts if second is None else list(zip(texts, second, strict=True))
            for answer, row in zip(ours.predict(inputs), logits, strict=True):
                if kind == "regression":
                    assert answer["score"] == pytest.approx(row.item(), abs=1e-5)
                elif kind == "classification":
                    best = int(row.argmax())
                    assert answer["label"] == theirs.config.id2label[best]
                    assert answer["score"] == pytest.approx(row.softmax(-1)[best].item(), abs=1e-5)
                else:
                    on = [theirs.config.id2label[i] for i in range(3) if row[i] > 0]
                    assert answer["label"] == on


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_words_are_read_with_the_blanks_that_another_library_gives_them(
    recorded: bool,
    listed: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An old directory of ours, which records its task alone, has the tokenizer that it was trained with."""
    transformers = pytest.importorskip("transformers")
    made = build(
        "roberta", None, tokenizer=train_from_texts(tiny.TEXTS, "bpe", vocab_size=300), num_layers=1, hidden_size=16,
        num_heads=2, intermediate_size=32, max_positions=48, initializer_range=0.5, **HEADS["tokens"],
    )  # fmt: skip
    folder = made.save(tmp_path)
    if recorded:
        config = json.loads((folder / "config.json").read_text())
        config["pretrain"] = {"objective": {"task": "token-classification"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "manifest.json").unlink()
    ours = pretrain.load(folder, quiet=True)
    before, words = ours.tokenizer, ["the", "old", "dog", "sat", "there"]
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    backend = transformers.AutoTokenizer.from_pretrained(folder)
    plain = recorded or listed
    text: Any = words if plain else " " + " ".join(words)
    encoded = backend(text, is_split_into_words=plain, return_tensors="pt")
    with torch.no_grad():
        chances = theirs(**encoded).logits[0].softmax(-1)
    firsts = [encoded.word_ids().index(word) for word in range(len(words))]
    wanted = pytest.approx(chances[firsts].amax(-1).tolist(), abs=1e-5)
    given = {"tokens": words} if listed else {"tokens": " ".join(words)}
    monkeypatch.setattr(files, "_PRINTED", set())
    assert ours.predict(given)["scores"] == wanted
    assert ours.tokenizer is before
    assert ("are read without the blanks" in capsys.readouterr().err) == (listed and not recorded)


# ------------------------------------------------------------------------------------------------- files


def read_csv(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


ROWS = [
    {"id": "1", "text": 'the "red" cat, sat', "label": "cat"},
    {"id": "2", "text": "", "label": "dog"},
    {"id": "3", "text": "the old\ndog", "label": "dog"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(
            stream, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_files_without_a_header_are_read_as_in_training(tmp_path: Path, capsys: Any) -> None:
    sms, out = tmp_path / "sms.tsv", tmp_path / "out.csv"
    rows = [("ham", f"All done? All {k} handed in?") for k in range(10)]
    rows += [("spam", f"Win {k} prizes now!") for k in range(10)]
    sms.write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    model = small("body")
    options: dict[str, Any] = {"task": "classification", "device": "cpu", "quiet": True}
    tuned = pretrain.finetune(model, sms, limit="2 steps", names=["label", "text"], **options)
    target = predict_file(tuned.model, sms, out)
    assert (
        "the first line is a row, and the columns are named as in training"
        in capsys.readouterr().err
    )
    found = read_csv(target)
    assert [(row["label"], row["text"]) for row in found] == rows
    assert predict(tuned.model, sms)[0]["label"] == found[0]["predicted_label"]
    # A file with a header is read by it, and of a model that knows no names the first line is said to be taken for one.
    headed = write_rows(tmp_path / "headed.csv", [{"text": "a cat", "label": "ham"}])
    assert [row["text"] for row in read_csv(predict_file(tuned.model, headed, out))] == ["a cat"]
    for name, columns in (("review", None), ("TEXT", None), ("remark", {"text": "remark"})):
        headed = write_rows(tmp_path / "headed.csv", [{name: "a cat", "id": "1"}])
        found = read_csv(predict_file(tuned.model, headed, out, columns=columns))
        assert [(row[name], row["id"]) for row in found] == [("a cat", "1")]
        assert len(predict(tuned.model, headed, columns=columns)) == 1
    asked = tmp_path / "asked.tsv"  # in which a class is called like a column
    asked.write_text("question\twho is there\nquestion\twhy\nham\tall done\n")
    found = read_csv(predict_file(tuned.model, asked, out))
    assert [row["text"] for row in found] == ["who is there", "why", "all done"]
    with pytest.raises(DataError, match="was taken for the header.*put a line with the names"):
        predict_file(small(), sms, tmp_path / "none.csv")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("out", [".csv", ".tsv", ".jsonl"])
def test_files_keep_order_and_columns(
    saved: Path, model: Model, tmp_path: Path, ending: str, out: str, capsys: Any
) -> None:
    source = write_rows(tmp_path / f"rows{ending}", ROWS)
    target = predict_file(saved, source, tmp_path / f"answers{out}", progress=False)
    assert "1 of 3 inputs get no answer" in capsys.readouterr().err
    if out == ".jsonl":
        found = [json.loads(line) for line in target.read_text().splitlines()]
        assert found[1]["predicted_label"] is None and found[1]["score"] is None
    else:
        found = read_csv(target, "," if out == ".csv" else "\t")
        assert found[1]["predicted_label"] == found[1]["score"] == ""
    assert [{key: row[key] for key in ROWS[0]} for row in found] == ROWS
    assert list(found[0]) == ["id", "text", "label", "predicted_label", "score"]
    for row in (found[0], found[2]):
        wanted = predict(model, row["text"])
        assert row["predicted_label"] == wanted["label"]
        assert float(row["score"]) == pytest.approx(wanted["score"], abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, target.name])


@pytest.mark.parametrize("out", [".parquet", ".csv.gz", ".jsonl.gz"])
def test_files_of_packed_answers(model: Model, tmp_path: Path, out: str) -> None:
    pandas = pytest.importorskip("pandas")
    source = tmp_path / "rows.parquet"
    pandas.DataFrame(ROWS).to_parquet(source)
    plain = predict_file(model, source, tmp_path / "answers.jsonl", top_k=None, progress=False)
    target = predict_file(model, source, tmp_path / f"answers{out}", top_k=None, progress=False)
    found, wanted = read_table(target), read_table(plain)
    assert found.names == wanted.names
    if ".csv" not in out:
        assert found.columns == wanted.columns
    with pytest.raises(ConfigError, match=r"must end in .*\.parquet, \.jsonl\.gz"):
        predict_file(model, source, tmp_path / "answers.xlsx.gz", progress=False)


def test_other_formats_and_default_places(saved: Path, model: Model, tmp_path: Path) -> None:
    import gzip

    source = tmp_path / "rows.json"
    source.write_text(json.dumps(ROWS))
    assert predict_file(saved, source, progress=False) == tmp_path / "rows.predicted.jsonl"
    packed = tmp_path / "reviews.csv.gz"
    packed.write_bytes(gzip.compress(b"review,extra\nthe cat,1\nthe dog,2\n"))
    target = predict_file(model, str(packed), progress=False)  # a model at hand
    assert target == tmp_path / "reviews.predicted.csv"
    assert [row["extra"] for row in read_csv(target)] == ["1", "2"]
    plain = write_rows(tmp_path / "odd.csv", [{"said": "the cat", "score": "x"}])
    target = predict_file(model, plain, columns={"text": "said"}, progress=False)
    assert list(read_csv(target)[0]) == ["said", "score", "predicted_label", "predicted_score"]


def test_several_labels_and_lists_in_a_table(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "r.csv", [{"text": "the cat"}, {"text": "the old dog"}])
    target = predict_file(small("multi_label"), source, progress=False)
    for row in read_csv(target):
        named, scores = json.loads(row["predicted_label"]), json.loads(row["score"])
        assert len(named) == len(scores) and set(named) <= {"cat", "dog", "fox"}


def test_rows_of_json_that_differ(model: Model, tmp_path: Path) -> None:
    source = tmp_path / "r.jsonl"
    lines = [{"text": "the cat"}, {"other": 1}, {"text": "the dog", "extra": [1, {"a": None}]}]
    write_rows(source, lines)
    target = predict_file(model, source, progress=False)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert found[1] == {"other": 1, "predicted_label": None, "score": None}
    assert found[2]["extra"] == [1, {"a": None}] and found[2]["predicted_label"]
    many = [{"text": "the cat"}] * 1030 + [{"text": "the dog", "late": 1}]
    write_rows(source, many)
    with pytest.raises(DataError, match="'late'"):
        predict_file(model, source, tmp_path / "x.csv", progress=False)
    assert not list(tmp_path.glob("*x.csv*"))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("r.csv", "text\n", "no rows"),
        ("r.jsonl", "", "no rows"),
        ("r.csv", "text,a\nthe cat\n", ":2"),
        ("r.jsonl", '{"text": "a"}\n[1]\n', ":2"),
        ("r.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n', ":2"),
        ("r.csv", "said,b\nthe cat,1\n", "'said'"),
        ("r.csv", "text,predicted_label\nthe cat,1\n", "predictions"),
        ("r.jsonl", '{"text": 3}\n', "line 1"),
        ("r.xyz", "x", "xyz"),
    ],
)
def test_broken_files_are_named_and_leave_nothing(
    model: Model, tmp_path: Path, name: str, content: str, part: str
) -> None:
    source = tmp_path / name
    source.write_text(content)
    old = tmp_path / "out.csv"
    old.write_text("old")
    with pytest.raises(DataError, match=part):
        predict_file(model, source, old, progress=False)
    assert old.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_the_model_says_what_a_folder_holds(model: Model, tmp_path: Path) -> None:
    """Not the files in it: a stray recording, or classes that are called like the folders of masks."""
    image = pytest.importorskip("PIL.Image")
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "image_size": 8, "patch_size": 4}
    vit = build("vit", head="image-classification", labels=["x", "y"], **sizes).eval()
    for file in ("images/0.png", "images/1.png", "labels/0.png", "labels/9.png", "more/2.png"):
        (tmp_path / "rows" / file).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (8, 8), int(file[-5]) * 20).save(tmp_path / "rows" / file)
    (tmp_path / "rows" / "a.wav").write_bytes(b"RIFF")
    target = predict_file(vit, tmp_path / "rows", tmp_path / "o.csv", progress=False)
    found = read_csv(target)
    assert [row["label"] for row in found] == ["images"] * 2 + ["labels"] * 2 + ["more"]
    assert all(row["predicted_label"] in "xy" for row in found)
    for place in ("nowhere.png", "nowhere-*.tar", "nowhere.npz", "nowhere.wav"):
        with pytest.raises(DataError, match="nowhere"):  # before a model is looked for
            predict_file("no-model", tmp_path / place, tmp_path / "o.csv", progress=False)
    with pytest.raises(DataError, match="delimiter is for files of rows"):
        predict_file(vit, tmp_path / "rows", tmp_path / "o.csv", progress=False, delimiter=",")
    with pytest.raises(DataError, match="is a folder, not a file of rows"):
        predict_file(model, tmp_path / "rows", tmp_path / "o.csv", progress=False)


@pytest.mark.parametrize("form", ["csv", "jsonl", "folder", "metadata", "masks", "coco", "audio"])
@pytest.mark.parametrize("absolute", [False, True])
def test_paths_in_what_is_written_are_read_from_there(
    form: str, absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    rows, names = tmp_path / "in" / "rows", ["a.png", "b.png"]
    for place in (rows / "images", rows / "masks", tmp_path / "out" / "deep"):
        place.mkdir(parents=True)
    for file in (folder / name for folder in (rows / "images", rows / "masks") for name in names):
        image.new("L", (8, 8), int("b" in file.name)).save(file)
    monkeypatch.chdir(tmp_path)
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "image_size": 8, "patch_size": 4}
    family, head, source, column = "vit", "image-classification", f"in/rows/t.{form}", "image"
    given = str(rows / "images" / "a.png") if absolute else "images/a.png"
    table = [{"photo": given, "kind": "images/a.png"}, {"photo": "images/b.png", "kind": "b"}]
    if form in ("csv", "jsonl"):
        write_rows(rows / f"t.{form}", table)
        column = "photo"
    elif form in ("folder", "metadata"):
        source = "in/rows/images"
        if form == "metadata":
            write_rows(rows / "images/metadata.csv", [{"file_name": name} for name in names])
    elif form == "masks":
        head, source = "segmentation", "in/rows"
    elif form == "coco":
        head, source = "object-detection", "in/rows"
        files = [{"id": i, "file_name": n, "width": 8, "height": 8} for i, n in enumerate(names)]
        box = {"image_id": 0, "category_id": 0, "bbox": [1, 1, 4, 4]}
        content = {"images": files, "annotations": [box], "categories": [{"id": 0, "name": "x"}]}
        (rows / "t.json").write_text(json.dumps(content))
    else:
        family, head, column = "audio-spectrogram-transformer", "audio-classification", "audio"
        sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_length": 16}
        with wave.open(str(rows / "a.wav"), "wb") as sound:
            sound.setparams((1, 2, 16_000, 1600, "NONE", ""))
            sound.writeframes(bytes(3200))
        source, names = "in/rows/a.wav", ["a.wav"]
    model = build(family, head=head, labels=["x", "y"], **sizes).eval()
    start = tmp_path / source if absolute and form not in ("csv", "jsonl") else Path(source)
    target = predict_file(model, start, "out/deep/o.jsonl", progress=False)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    monkeypatch.chdir("/")
    paths = [
        row[key] for row in written for key in (column, "mask", "predicted_mask") if key in row
    ]
    assert {Path(path).name for path in paths} >= set(names)
    assert all((tmp_path / "out" / "deep" / path).is_file() for path in paths)
    if form in ("csv", "jsonl"):
        assert written[0]["photo"] == (given if absolute else "../../in/rows/images/a.png")
        assert written[0]["kind"] == "images/a.png"  # no column of images
    assert len(predict_with(task_of(model), tmp_path / target)) == len(names)


def test_places_that_cannot_be_written(model: Model, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "r.csv", ROWS)
    with pytest.raises(DataError, match="is the input"):
        predict_file(model, source, source, progress=False)
    with pytest.raises(ConfigError, match=r"\.jsonl"):
        predict_file(model, source, tmp_path / "out.txt", progress=False)
    with pytest.raises(DataError, match="does not exist"):
        predict_file(model, source, tmp_path / "no" / "out.csv", progress=False)
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        predict_file(model, source, tmp_path / "d.csv", progress=False)
    with pytest.raises(DataError, match=r"nothing\.csv"):
        predict_file(model, tmp_path / "nothing.csv", progress=False)


def test_the_form_of_the_file_can_be_given(model: Model, tmp_path: Path) -> None:
    """A form that is given is taken where the header shows none, and where it shows another."""
    source = tmp_path / "r.csv"
    source.write_bytes('text|id\n"the cat|7\nthe caf\xe9|8\n'.encode("cp1252"))
    given = {"delimiter": "|", "quoting": False, "encoding": "cp1252"}
    target = predict_file(model, source, tmp_path / "o.jsonl", progress=False, **given)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [(row["text"], row["id"]) for row in rows] == [('"the cat', "7"), ("the caf\xe9", "8")]
    with pytest.raises(DataError, match="delimiter='::': it must be one character"):
        predict_file(model, source, tmp_path / "o.jsonl", progress=False, delimiter="::")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Reading and writing, with answers that cost nothing: ten times the rows, the same memory."""
    peaks = []
    for count in (2_000, 20_000):
        source = tmp_path / f"{count}.csv"
        with open(source, "w", encoding="utf-8") as stream:
            stream.write("id,text\n")
            stream.writelines(f'{i},"{"the red cat sat, " * 12}"\n' for i in range(count))
        tracemalloc.start()
        rows = 0
        with RowWriter(tmp_path / "out.jsonl", ["id", "text"]) as writer:
            for chunk in stream_chunks(source, 500):
                for row in chunk.rows:
                    writer.write(row, {"label": "cat", "score": 0.5})
                    rows += 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows == count
    assert peaks[1] < 1.2 * peaks[0] < 4_000_000


@pytest.mark.slow
def test_memory_of_predictions_does_not_grow(model: Model, tmp_path: Path) -> None:
    peaks = []
    for count in (3_000, 9_000):
        source = write_rows(tmp_path / "r.csv", [{"text": f"the cat {i}"} for i in range(count)])
        predict_file(model, source, tmp_path / "o.jsonl", progress=False)
        tracemalloc.start()
        target = predict_file(model, source, tmp_path / "o.jsonl", progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with open(target, encoding="utf-8") as stream:
            assert sum(1 for _ in stream) == count
    assert peaks[1] < 1.3 * peaks[0]


def test_the_best_checkpoint_of_a_run_is_taken(tmp_path: Path) -> None:
    """Opening a run gives the best so far, also before it has come to its end."""
    from pretrain.checkpoint import TrainingState, load, save_checkpoint

    run = tmp_path / "run"
    for step, best in ((5, 5), (9, 5)):
        save_checkpoint(
            run, small(seed=step), step=step, tokens=1, pretrain_block={}, keep=2,
            training=TrainingState({}, {"run": {"best_step": best}}),
        )  # fmt: skip
    assert load(run, quiet=True).source == str(run / "checkpoint-5")
    source = write_rows(tmp_path / "r.csv", [{"text": "the red cat"}])
    found = read_csv(predict_file(run, source, progress=False))[0]
    assert float(found["score"]) == pytest.approx(
        small(seed=5).predict("the red cat")["score"], abs=1e-5
    )


@pytest.mark.parametrize("kind", ["classification", "multi_label"])
def test_all_probabilities_and_the_likeliest(kind: str, tmp_path: Path, capsys: Any) -> None:
    """In memory, as a frame with its index, and in files; asked for nothing, the answer is as ever."""
    import pandas

    model = small(kind)
    texts = tiny.TEXTS[:4]
    usual, every = model.predict(texts), model.predict(texts, top_k=None)
    for one, answer in zip(usual, every, strict=True):
        assert sorted(answer["label"]) == ["cat", "dog", "fox"]
        assert answer["score"] == sorted(answer["score"], reverse=True)
        chances = dict(zip(answer["label"], answer["score"], strict=True))
        if kind == "classification":
            assert sum(answer["score"]) == pytest.approx(1, abs=1e-5)
            assert one["label"] == answer["label"][0]
        else:
            assert set(one["label"]) == {k for k, v in chances.items() if v > 0.5}
    two = model.predict(texts, top_k=2)
    assert [a["label"] for a in two] == [a["label"][:2] for a in every]
    frame = pandas.DataFrame({"text": [*texts[:3], ""]}, index=["w", "x", "y", "z"])
    found = model.predict(frame, top_k=2)
    assert list(found.index) == list(frame.index) and list(found.columns) == ["label", "score"]
    assert (
        found["label"].tolist()[:3] == [a["label"] for a in two][:3] and found["label"]["z"] is None
    )
    saved = model.save(tmp_path / "model")
    frame.to_parquet(tmp_path / "rows.parquet")
    for source in (
        tmp_path / "rows.parquet",
        write_rows(tmp_path / "r.csv", [{"text": t} for t in texts]),
    ):
        out = tmp_path / "out.jsonl"
        assert (
            cli.main(
                ["predict", str(saved), str(source), "--out", str(out), "--quiet", "--top_k", "all"]
            )
            == 0
        )
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["predicted_label"] for row in rows][:3] == [a["label"] for a in every][:3]
    command = ["predict", str(saved), str(source), "--out", str(out), "--quiet", "--top_k"]
    assert cli.main([*command, "none"]) == 0 and len(out.read_text().splitlines()) == len(texts)
    assert cli.main([*command, "0"]) == 2
    assert "--top_k is 0; it must be a whole number of at least 1, or all for all classes" in (
        capsys.readouterr().err
    )
    for wrong in (0, -1, "all", 1.5, True):
        with pytest.raises(ConfigError, match="top_k"):
            model.predict(texts, top_k=wrong)
    with pytest.raises(ConfigError, match="top_k"):
        small("regression").predict(texts, top_k=2)


def test_what_goes_wrong_leaves_no_file_and_is_one_sentence(
    saved: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ctrl-C, a signal, too little memory, and an error that shows only when all rows are written."""
    source = write_rows(tmp_path / "r.csv", [{"text": "the cat"}] * 3)
    words = ["predict", str(saved), str(source), "--quiet", "--batch_rows", "8"]
    stops: list[tuple[Any, int, str]] = [
        (KeyboardInterrupt(), 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted"),
        (signal.SIGHUP, 129, "interrupted"),
        (MemoryError(), 2, "--batch_rows 2"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch_rows 2"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "--batch_rows 2"),
    ]  # fmt: skip
    for stop, code, said in stops:

        def decode(self: Any, *args: Any, stop: Any = stop) -> Any:
            if isinstance(stop, signal.Signals):
                signal.raise_signal(stop)
            raise stop

        monkeypatch.setattr("pretrain.objectives.classification.Classification.decode", decode)
        assert cli.main(words) == code
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]
    monkeypatch.undo()
    empty = write_rows(tmp_path / "r.csv", [{"text": "", "predicted_label": "cat"}] * 3)
    with pytest.raises(DataError), RowWriter(tmp_path / "out.csv", ["text"]) as writer:
        monkeypatch.setattr(writer, "_begin", _disk_full)
    assert [p.name for p in tmp_path.iterdir()] == [empty.name]


def _disk_full(answer: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_model_of_single_texts_reads_no_second_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns that it was not trained with are not read, even if they have a known name; foreign models read them."""
    pandas = pytest.importorskip("pandas")
    rows = [
        {"text": f"the {'cat' if k % 2 else 'dog'} sat on {k}", "label": k % 2} for k in range(24)
    ]
    options: dict[str, Any] = {"valid": 0.25, "limit": "2 steps", "device": "cpu", "quiet": True}
    tuned = pretrain.finetune(
        small("fill"), rows, "classification", out=tmp_path / "run", **options
    )
    plain = tuned.predict("the cat")
    with_more = {"text": ["the cat"], "sentence2": ["the old dog"]}
    capsys.readouterr()
    for inputs in (
        pandas.DataFrame(with_more),
        [{"text": "the cat", "sentence2": "the old dog"}],
        with_more,
    ):
        answers = tuned.predict(inputs)
        answers = answers.to_dict("records") if hasattr(answers, "to_dict") else answers
        assert answers == [plain]
        assert "'sentence2' is not read" in capsys.readouterr().err
    several = tuned.predict(("the cat", "the dog"))
    assert [a["label"] for a in several] == [plain["label"], tuned.predict("the dog")["label"]]
    assert tuned.evaluate([{**rows[0], "hypothesis": "the old dog"}]) == tuned.evaluate([rows[0]])
    foreign = small()
    assert predict(foreign, with_more) == [predict(foreign, ("the cat", "the old dog"))]


@pytest.mark.parametrize(
    ("first", "second"), [("question", "sentence"), ("question1", "question2")]
)
def test_published_pairs_are_read_alike_by_all(first: str, second: str, tmp_path: Path) -> None:
    pairs = [(f"the cat {k}", f"the dog {k} sat on") for k in range(16)]
    rows = [{second: b, first: a, "label": k % 2} for k, (a, b) in enumerate(pairs)]
    options: dict[str, Any] = {"valid": 0.25, "limit": "1 steps", "device": "cpu", "quiet": True}
    tuned = pretrain.finetune(small("fill"), rows, "classification", out=tmp_path / "a", **options)
    plain = [{"text": row[first], "pair": row[second], "label": row["label"]} for row in rows]
    answers = tuned.predict(pairs)
    assert tuned.predict(rows) == tuned.predict(plain) == answers
    assert tuned.predict([(b, a) for a, b in pairs]) != answers
    assert tuned.evaluate(rows) == tuned.evaluate(plain)
    foreign = small()
    assert predict(foreign, rows) == predict(foreign, pairs)


def test_held_out_rows_have_the_columns_of_the_training_rows(tmp_path: Path) -> None:
    rows = [{"text": f"the cat {k}", "label": k % 2} for k in range(16)]
    more = [{"text": f"a dog {k}", "sentence2": "on a mat", "label": k % 2} for k in range(8)]
    options: dict[str, Any] = {"limit": "1 steps", "device": "cpu", "quiet": True}
    tuned = pretrain.finetune(
        small("fill"), rows, "classification", valid=more, out=tmp_path / "a", **options
    )
    assert "pair" not in tuned.data.valid.names
    pairs = [{**row, "sentence2": "on a mat"} for row in rows]
    with pytest.raises(DataError, match="pair"):
        pretrain.finetune(
            small("fill"), pairs, "classification", valid=rows[:8], out=tmp_path / "b", **options
        )


def test_a_model_of_pairs_refuses_rows_without_the_second_text(tmp_path: Path) -> None:
    """They were answered and measured on the first text alone, also where a column had another name."""
    rows = [{"text": f"the cat {k}", "pair": f"the dog {k}", "label": k % 2} for k in range(16)]
    options: dict[str, Any] = {"valid": 0.25, "limit": "1 steps", "device": "cpu", "quiet": True}
    tuned = pretrain.finetune(small("fill"), rows, "classification", out=tmp_path / "a", **options)
    renamed = [{"text": row["text"], "other": row["pair"], "label": row["label"]} for row in rows]
    for ask in (tuned.predict, tuned.evaluate):
        for lacking in (renamed, [{k: row[k] for k in ("text", "label")} for row in rows]):
            with pytest.raises(DataError, match="no column for pair"):
                ask(lacking)
    assert tuned.predict(renamed, columns={"pair": "other"}) == tuned.predict(rows)
    with pytest.raises(DataError, match="reads text and pair"):
        tuned.predict(["the cat 1", "the dog 1"])


def test_inputs_that_are_read_in_part_are_counted(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "the cat sat on the mat " * 40
    for inputs, told in (
        (long, "1 of 1 inputs exceed"),
        ([long, "a dog"], "1 of 2"),
        (["a dog"], ""),
    ):
        predict(model, inputs)
        printed = capsys.readouterr().err
        assert told in printed and (told or "exceed" not in printed)
    path = model.save(tmp_path / "model")
    (tmp_path / "rows.csv").write_text(f"text\n{long}\na dog\n")
    predict_file(path, tmp_path / "rows.csv", tmp_path / "out.csv", device="cpu")
    assert "1 of 2 inputs exceed" in capsys.readouterr().err
