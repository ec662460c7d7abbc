"""Figures of saved models: for the same rows those of the run, and those that other libraries count on the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

import pretrain
import tiny
from finetuning.conftest import ANIMALS, QUICK, model_of, rows_of, texts
from pretrain import metrics as own
from pretrain.cli.main import main
from pretrain.config import RunConfig
from pretrain.config.check import with_digest
from pretrain.data.prepare import prepare
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.finetuning.settings import TuneConfig
from pretrain.objectives import build_objective
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_device, choose_precision

Rows = list[dict[str, Any]]


def classes(count: int, seed: int) -> Rows:
    """Columns of unusual names, so that the run must say which is which."""
    return [{"Said": r["text"], "note": "x", "Beast": r["label"]} for r in rows_of(count, seed)]


def numbered(count: int, seed: int) -> Rows:
    """Classes named by the caller and spelled as numbers in the rows."""
    return [{"text": r["text"], "label": ANIMALS.index(r["label"])} for r in rows_of(count, seed)]


def several(count: int, seed: int) -> Rows:
    return [
        {"text": text, "label": [w for w in ("cat", "red", "mat") if w in text.split()]}
        for text, _ in texts(count, seed)
    ]


def numbers(count: int, seed: int) -> Rows:
    return [{"text": text, "label": len(text) / 7} for text, _ in texts(count, seed)]


def tags(count: int, seed: int) -> Rows:
    return [
        {
            "tokens": text.split(),
            "ner_tags": ["B-PET" if w in ANIMALS else "O" for w in text.split()],
        }
        for text, _ in texts(count, seed)
    ]


def questions(count: int, seed: int) -> Rows:
    rows = [
        {
            "question": "which animal ?",
            "context": text,
            "answers": {"text": [animal], "answer_start": [text.index(animal)]},
        }
        for text, animal in texts(count, seed)
    ]  # fmt: skip
    for row in rows[::3]:
        row["question"], row["answers"] = "which city ?", {"text": [], "answer_start": []}
    return rows


def pairs(count: int, seed: int) -> Rows:
    return [{"anchor": text, "positive": f"{animal} {text}"} for text, animal in texts(count, seed)]


def preferences(count: int, seed: int) -> Rows:
    return [
        {"prompt": text, "chosen": animal, "rejected": f"no {animal}"}
        for text, animal in texts(count, seed)
    ]


def chats(count: int, seed: int) -> Rows:
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": animal}]}
        for text, animal in texts(count, seed)
    ]


def plain(count: int, seed: int) -> Rows:
    return [{"text": text} for text, _ in texts(count, seed)]


# name -> task, rows, family, options of the run
CASES: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "classes": ("classification", classes, "bert", {"text": "Said", "label": "Beast"}),
    "numbered": ("classification", numbered, "modernbert", {"labels": list(ANIMALS)}),
    "several": ("classification", several, "gpt2", {"threshold": 0.4}),
    "numbers": ("regression", numbers, "bert", {}),
    "tags": ("token-classification", tags, "bert", {}),
    "questions": ("question-answering", questions, "bert", {}),
    "pairs": ("embedding", pairs, "bert", {}),
    "preferences": ("preference", preferences, "llama", {"beta": 0.5}),
    "preferences-lora": ("preference", preferences, "llama", {"beta": 0.5, "lora": 2}),
    "chat": ("chat", chats, "llama", {}),
    "text": ("language-modelling", plain, "bert", {"config": {"task": {"options": {"rate": 0.3}}}}),
    "text-causal": ("language-modelling", plain, "gpt2", {}),
}


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, result, test rows, their file) of a small run over files."""
    name = str(request.param)
    task, rows, family, options = CASES[name]
    place = tmp_path_factory.mktemp(name)
    model = str(model_of(family, initializer_range=0.2).save(place / "start"))
    test = rows(25, 8)
    files = {
        "data": str(write(place / "train.jsonl", rows(40, 0))),
        "test": str(write(place / "test.jsonl", test)),
    }
    result = pretrain.finetune(
        model, task=task, **(QUICK | files | options | {"out": place / "run"})
    )
    return name, result, test, place / "test.jsonl"


def same(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("run", list(CASES), indirect=True)
def test_figures_are_those_of_the_summary(run: Any, tmp_path: Path) -> None:
    name, result, test, file = run
    same(pretrain.evaluate(result.path), result.metrics)  # the held-out rows of the run
    same(pretrain.evaluate(result.run.best, file), result.test_metrics)
    same(pretrain.evaluate(result.path, test), result.test_metrics)
    same(result.evaluate(file), result.test_metrics)
    saved = result.save(tmp_path / "saved")
    if name == "preferences":  # what was likelier before training is in no saved directory
        with pytest.raises(ModelError, match="base="):
            pretrain.evaluate(saved, file)
        base = result.settings.model.checkpoint
        same(pretrain.evaluate(saved, file, base=base), result.test_metrics)
        return
    same(pretrain.evaluate(saved, file), result.test_metrics)
    with pytest.raises(DataError, match="not in a run directory"):
        pretrain.evaluate(saved)


def counted(name: str, rows: Rows, answers: Rows) -> dict[str, float]:
    """What other libraries count on the answers, by our names of the figures."""
    if name in ("classes", "numbered"):
        key = "Beast" if name == "classes" else "label"
        true = [row[key] if name == "classes" else ANIMALS[row[key]] for row in rows]
        said = [answer["label"] for answer in answers]
        return {
            "accuracy": sk.accuracy_score(true, said),
            "macro_f1": sk.f1_score(true, said, average="macro", labels=ANIMALS, zero_division=0),
            "mcc": sk.matthews_corrcoef(true, said),
        }
    if name == "several":
        true, said = (
            np.array([[label in row["label"] for label in ("cat", "mat", "red")] for row in part])
            for part in (rows, answers)
        )
        return {
            "accuracy": sk.accuracy_score(true, said),
            "micro_f1": sk.f1_score(true, said, average="micro", zero_division=0),
            "macro_f1": sk.f1_score(true, said, average="macro", zero_division=0),
        }
    if name == "numbers":
        true, said = [row["label"] for row in rows], [answer["score"] for answer in answers]
        return {
            "mse": sk.mean_squared_error(true, said),
            "pearson": float(np.corrcoef(true, said)[0, 1]),
        }
    if name == "tags":
        seqeval = pytest.importorskip("seqeval.metrics")
        true, said = [row["ner_tags"] for row in rows], [answer["tags"] for answer in answers]
        return {
            "f1": seqeval.f1_score(true, said, zero_division=0),
            "accuracy": seqeval.accuracy_score(true, said),
        }
    if name == "questions":
        marks = [
            (answer["answer"], row["answers"]["text"] or [""])
            for row, answer in zip(rows, answers, strict=True)
        ]
        return {"exact_match": float(np.mean([own.exact_match(*mark) for mark in marks]))}
    raise AssertionError(name)


@pytest.mark.parametrize(
    "run", ["classes", "numbered", "several", "numbers", "tags", "questions"], indirect=True
)
def test_figures_are_those_of_the_answers(run: Any) -> None:
    name, result, test, file = run
    for answers in (result.predict(test), pretrain.load(result.path, quiet=True).predict(file)):
        for key, value in counted(name, test, answers).items():
            assert result.test_metrics[key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.parametrize("run", ["classes"], indirect=True)
def test_the_command(run: Any, capsys: Any) -> None:
    _, result, _, file = run
    assert main(["evaluate", str(result.path), "--json"]) == 0
    same(json.loads(capsys.readouterr().out), result.metrics)
    renamed = [{"a": row["Said"], "b": row["Beast"]} for row in classes(25, 8)]
    other = write(file.with_name("renamed.jsonl"), renamed)
    words = ["evaluate", str(result.path), "--data", str(other), "--batch_rows", "7", "--json"]
    assert main([*words, "--columns.text", "a", "--columns.label", "b"]) == 0
    same(json.loads(capsys.readouterr().out), result.test_metrics)
    assert main(words) == 2
    assert "renamed.jsonl has no column" in capsys.readouterr().err
    wide = file.with_name("wide.jsonl")
    wide.write_bytes(file.read_text().encode("utf-16-le"))
    words = ["evaluate", str(result.path), "--data", str(wide), "--json"]
    assert main([*words, "--encoding", "utf-16-le"]) == 0
    same(json.loads(capsys.readouterr().out), result.test_metrics)
    assert main([*words, "--separator", "#"]) == 2
    assert "--separator '#' is for the text of a language model" in capsys.readouterr().err
    assert main([*words, "--task", "sts", "--encoding", "cp1252"]) == 2
    assert "--encoding cp1252" in capsys.readouterr().err
    assert main(["evaluate", str(result.path), "--columns.label", "b"]) == 2
    message = capsys.readouterr().err
    assert "--columns.label b names a column" in message and "--data ..." in message


@pytest.mark.parametrize("lora", [0, 2])
def test_a_saved_model_is_measured_in_the_precision_of_its_run(tmp_path: Path, lora: int) -> None:
    start = str(model_of().save(tmp_path / "start"))
    rows, options = numbers(24, 3), {"limit": "1 steps", "precision": "bf16", "lora": lora or None}
    result = pretrain.finetune(
        start, numbers(24, 1), "regression",
        **QUICK | options | {"eval_precision": "train", "valid": rows, "out": tmp_path / "run"},
    )  # fmt: skip
    saved = result.save(tmp_path / "saved")
    assert pretrain.evaluate(saved, rows) == result.metrics == result.evaluate(rows)
    exact = pretrain.evaluate(saved, rows, precision="fp32")
    assert exact != result.metrics
    for name in {"config.json", "pretrain.json"} & {file.name for file in saved.iterdir()}:
        text = (saved / name).read_text("utf-8")
        assert '"eval_precision": "bf16"' in text
        text = text.replace('"eval_precision": "bf16"', '"eval_precision": [1]')  # not ours
        (saved / name).write_text(text, "utf-8")
    (saved / "manifest.json").unlink(missing_ok=True)
    assert pretrain.evaluate(saved, rows) == exact


def test_rows_that_are_not_there_any_more(tmp_path: Path, capsys: Any) -> None:
    model = str(model_of().save(tmp_path / "start"))
    file = write(tmp_path / "train.jsonl", rows_of(30))
    quick = QUICK | {"limit": "2 steps"}
    of_file = pretrain.finetune(model, str(file), "classification", out=tmp_path / "file", **quick)
    file.write_text(file.read_text().replace("cat", "dog"))
    with pytest.raises(DataError, match=r"changed since.*data="):
        pretrain.evaluate(of_file.path)
    memory = pretrain.finetune(
        model, rows_of(30), "classification", out=tmp_path / "memory", **quick
    )
    with pytest.raises(DataError, match="in memory"):
        pretrain.evaluate(memory.path)
    assert main(["evaluate", str(memory.path)]) == 2
    assert "--data" in capsys.readouterr().err
    nothing = pretrain.finetune(
        model, str(file), "classification", out=tmp_path / "none", **(quick | {"valid": 0})
    )
    with pytest.raises(DataError, match="has no held-out rows"):
        pretrain.evaluate(nothing.path)


def test_paths_of_a_run_lead_from_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "train.jsonl", rows_of(30))
    Path("text.txt").write_text("\n\n".join(tiny.TEXTS * 4))
    model_of().save(tmp_path / "start")
    quick = QUICK | {"limit": "2 steps"}
    pretrain.finetune("start", "train.jsonl", "classification", out="tuned", **quick)
    data = {"train": ["*.txt"], "valid": 0.2, "row_length": 24, "tokenizer": "char"}
    overrides = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 64}
    pretrain.train(
        data=data, model={"family": "gpt2", "overrides": overrides}, parallel={"device": "cpu"},
        train={"out": "text", "limit": "2 steps", "batch_rows": 4},
    )  # fmt: skip
    here = {name: pretrain.evaluate(name) for name in ("tuned", "text")}
    (tmp_path / "tuned" / "report.html").unlink()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    Path("trains.jsonl").touch()  # is not meant
    for name, figures in here.items():
        assert pretrain.evaluate(f"../{name}") == figures
    assert main(["report", "../tuned"]) == 0 and (tmp_path / "tuned" / "report.html").is_file()
    for name in here:  # as runs of earlier versions, which recorded no directory
        file = tmp_path / name / "run.yaml"
        settings = (RunConfig if name == "text" else TuneConfig).load(file)
        file.write_text(with_digest(settings.to_yaml()))
        capsys.readouterr()
        words = [["evaluate", f"../{name}"]] + [["report", "../tuned"]] * (name == "tuned")
        for command in words:
            assert main(command) == 2
            told = capsys.readouterr().err
            assert f"../{name}/run.yaml names" in told and "was started" in told
            assert "Did you mean" not in told and str(tmp_path / "sub") in told


def test_text_is_measured_in_rows_of_the_length_of_the_run(tmp_path: Path, capsys: Any) -> None:
    """Also by a copy of the checkpoint, which lies in no run; nothing is said of data to train on."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny.TEXTS * 8))
    settings: dict[str, Any] = {
        "data": {"train": str(text), "valid": 0.2, "row_length": 24, "tokenizer": "char"},
        "model": {
            "family": "gpt2",
            "overrides": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 64},
        },
        "train": {
            "out": str(tmp_path / "run"),
            "limit": "2 steps",
            "batch_rows": 4,
            "precision": "fp32",
        },
        "parallel": {"device": "cpu"},
    }
    run = pretrain.train(settings)
    model = pretrain.load(tmp_path / "run", quiet=True)
    capsys.readouterr()
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(tiny.TEXTS[:9]))
    found = pretrain.evaluate(tmp_path / "run", other, precision="fp32")
    said = capsys.readouterr()
    assert "cannot measure" not in said.out + said.err
    assert model.extra_config["pretrain"]["row_length"] == 24
    made = prepare(other, tokenizer=str(run.checkpoint), row_length=24, valid=0.0, quiet=True)
    rows = evaluate_rows(
        build_objective("NextToken", {}, model),
        made.train,
        choose_precision("fp32", choose_device("cpu")),
        batch_rows=16,
    )
    assert found["loss"] == pytest.approx(rows["loss"], abs=1e-6)
    copy = model.save(tmp_path / "copy")
    assert pretrain.evaluate(copy, other, precision="fp32")["loss"] == pytest.approx(found["loss"])
    for data in (None, made.path):
        with pytest.raises(ConfigError, match=r"'text': 'body'.* names a column"):
            pretrain.evaluate(tmp_path / "run", data, columns={"text": "body"})


def test_a_class_that_the_model_does_not_know_is_no_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a training run can be told the classes."""
    run = pretrain.finetune(
        model_of(), rows_of(24), "classification", out=tmp_path / "run", **QUICK
    )
    wrong = [{"text": "the old yak", "label": "yak"}]
    for call in (lambda: pretrain.evaluate(tmp_path / "run", wrong), lambda: run.evaluate(wrong)):
        with pytest.raises(DataError, match="'yak' is not among") as caught:
            call()
        assert "labels=" not in str(caught.value) and "leave it out" in str(caught.value)
    (tmp_path / "rows.csv").write_text("text,label\nthe old yak,yak\n")
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "rows.csv")]) == 2
    assert "--labels" not in capsys.readouterr().err
    with pytest.raises(DataError, match="list every label, in order: labels="):
        pretrain.finetune(
            model_of(),
            [*rows_of(24), *wrong],
            "classification",
            labels=ANIMALS,
            out=tmp_path / "b",
            **QUICK,
        )


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was given a Model"):
        pretrain.evaluate(model_of(), rows_of(4))
    with pytest.raises(ConfigError, match="The task is a dict"):
        pretrain.finetune(
            model_of(), rows_of(8), {"name": "classification"}, out=tmp_path / "run", **QUICK
        )


def test_the_task_of_another_model_is_refused(tmp_path: Path) -> None:
    run = pretrain.finetune(
        model_of(), rows_of(24), "classification", out=tmp_path / "run", **QUICK
    )
    numbers = [{"text": row["text"], "label": float(k)} for k, row in enumerate(rows_of(4))]
    with pytest.raises(ConfigError, match="fine-tuned for the task classification"):
        pretrain.evaluate(run.path, numbers, task="regression")
    assert pretrain.evaluate(run.path, rows_of(4), task="classification")["targets"] == 4
    language = model_of().save(tmp_path / "language")
    with pytest.raises(ConfigError, match="is a language model, and was not fine-tuned"):
        pretrain.evaluate(language, rows_of(4), task="classification")


def test_a_finished_run_with_an_idle_setting_is_still_read(tmp_path: Path) -> None:
    """Settings that are refused in a new run may stand in one that an earlier version made."""
    run = pretrain.finetune(
        model_of(), rows_of(24), "classification", out=tmp_path / "run", **QUICK
    )
    settings = (run.path / "run.yaml").read_text()
    (run.path / "run.yaml").write_text(settings.replace("alpha: null", "alpha: 16.0"))
    assert pretrain.evaluate(run.path, rows_of(4))["targets"] == 4
    with pytest.raises(ConfigError, match="alpha is a setting of an adapter"):
        pretrain.finetune(
            model_of(), rows_of(24), "classification", out=tmp_path / "new", alpha=16.0, **QUICK
        )


@pytest.mark.parametrize("encoding", ["cp1252", "iso-2022-jp"])
def test_rows_are_read_in_the_encoding_of_training_unless_they_are_utf8(
    encoding: str, tmp_path: Path
) -> None:
    """Of one of Windows nearly all bytes are characters, so that no error tells; ISO-2022-JP is ASCII, as is UTF-8."""
    odd = "é" if encoding == "cp1252" else "犬"
    lines = "text,label\n" + "".join(
        f"the {odd if i % 2 else 'cat'} {i},{odd if i % 2 else 'a'}\n" for i in range(20)
    )
    for name in (encoding, "utf-8"):
        (tmp_path / f"{name}.csv").write_bytes(lines.encode(name))
    first, other = tmp_path / f"{encoding}.csv", tmp_path / "utf-8.csv"
    result = pretrain.finetune(
        model_of(), first, "classification", encoding=encoding, **QUICK | {"out": tmp_path / "run"}
    )
    assert set(result.task.labels) == {"a", odd}
    for evaluate in (result.evaluate, lambda rows: pretrain.evaluate(tmp_path / "run", rows)):
        wanted = evaluate(first)
        if encoding == "cp1252":
            same(evaluate(other), wanted)
        else:  # no byte of the file tells, so it is read as the rows of training and refused
            with pytest.raises(DataError):
                evaluate(other)


@pytest.mark.parametrize("head", ["sequence-classification", "causal-lm"])
def test_figures_of_answers_that_are_no_numbers_are_an_error(head: str, tmp_path: Path) -> None:
    """An accuracy of them would look like any other; weights that are finite can lead there by overflow."""
    family = "llama" if head == "causal-lm" else "bert"
    labels = {} if head == "causal-lm" else {"labels": ["a", "b"]}
    model = model_of(family, head=head, **labels)
    with torch.no_grad():
        next(p for n, p in model.backbone.named_parameters() if "norm" in n).fill_(3e38)
    model.save(tmp_path / "model")
    rows: Any = write(tmp_path / "rows.jsonl", [{"text": t, "label": "a"} for t in tiny.TEXTS[:4]])
    with pytest.raises(ModelError, match="the loss is not a number"):
        pretrain.evaluate(tmp_path / "model", rows)


def test_of_several_splits_that_of_the_test_is_measured(tmp_path: Path, capsys: Any) -> None:
    """Or else that of validation, never the training rows, in a dict of splits, a JSON file and a folder of shards."""
    datasets = pytest.importorskip("datasets")
    model = model_of("bert", head="sequence-classification", labels=list(ANIMALS))
    folder = model.save(tmp_path / "model")
    parts = {"train": rows_of(20), "dev": rows_of(9), "test": rows_of(6)}
    (tmp_path / "shards").mkdir()
    for name in ("train", "test"):
        made = datasets.Dataset.from_list(parts[name])
        made.to_parquet(tmp_path / "shards" / f"{name}-00000-of-00001.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(parts))
    data = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    for source in (parts, data, tmp_path / "rows.json", str(tmp_path / "shards")):
        assert pretrain.evaluate(folder, source)["targets"] == 6
        assert "the figures are those of the test split" in capsys.readouterr().err
    held_back: list[Any] = [
        [row | {"label": -1} for row in parts["test"]],
        [row | {"label": None} for row in parts["test"]],
        [{"text": row["text"]} for row in parts["test"]],
    ]
    for rows in held_back:  # as public data sets have them
        (tmp_path / "rows.json").write_text(json.dumps(parts | {"test": rows}))
        for source in (parts | {"test": rows}, tmp_path / "rows.json"):
            assert pretrain.evaluate(folder, source)["targets"] == 9
            said = capsys.readouterr().err
            assert "the test split is not used" in said and "those of the validation split" in said
    with pytest.raises(DataError, match="label"):
        pretrain.evaluate(folder, {"train": parts["train"], "test": held_back[2]})
    del parts["test"]
    (tmp_path / "rows.json").write_text(json.dumps(parts))
    for source in (parts, tmp_path / "rows.json"):
        assert pretrain.evaluate(folder, source)["targets"] == 9
        assert "those of the validation split" in capsys.readouterr().err
    for source in (parts["dev"], {"train": parts["dev"]}):
        assert pretrain.evaluate(folder, source)["targets"] == 9
        assert "split" not in capsys.readouterr().err
