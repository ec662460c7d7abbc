"""Whatever a user may give to fine-tuning by mistake: an error that says where and what to do, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
from faults.faulty_io import FaultyIO
from finetuning.conftest import QUICK, model_of, rows_of
from pretrain.checkpoint import RunLock
from pretrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PretrainError,
    RunLocked,
)
from pretrain.utils import files

NAN = float("nan")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(model_of().save(tmp_path_factory.mktemp("start") / "bert"))


def tune(
    model: Any, out: Path, rows: Any = None, task: str = "classification", **given: Any
) -> Any:
    rows = rows_of() if rows is None else rows
    return pretrain.finetune(
        model, rows, task, **({**QUICK, "out": out, "limit": "3 steps"} | given)
    )


def labelled(values: list[Any]) -> list[dict[str, Any]]:
    return [
        {"text": r["text"], "label": v} for r, v in zip(rows_of(len(values)), values, strict=True)
    ]


def several(count: int) -> list[Any]:
    return ["cat", "dog"] * (count // 2)


ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "wrong column": (rows_of(), {"text": "revue"}, "revue.*text"),
    "no such role": ([{"words": "a cat", "label": "cat"}] * 3, {}, "words.*text="),
    "no rows": ([], {}, "no rows"),
    "a row without a target": (labelled([*several(20), None]), {}, "row 21.*remove"),
    "a blank target": (labelled([*several(20), " "]), {}, "row 21.*remove"),
    "a target that is not a number": (labelled([*map(float, range(2)), NAN] * 7), {}, "row 3.*remove"),
    "floats for classes": (labelled([0.5, 1.25, 3.5] * 7), {}, "row 1.*task='regression'"),
    "one class": (labelled(["cat"] * 20), {}, "two classes"),
    "text for classes": ([{"text": r["text"], "label": r["text"]} for r in rows_of(30)], {}, "label="),
    "labels out of range": (labelled([0, 1, 7] * 7), {"labels": ["a", "b"]}, "row 1.*'0'.*0, 1, 7.*labels="),
    "labels that are not given": (labelled(several(20)), {"labels": ["cat", "cow"]}, "row 2.*'dog'"),
    "a label that validation alone has": (
        labelled(several(20)), {"valid": [{"text": "an owl", "label": "owl"}]}, "row 1.*'owl'.*labels=",
    ),
    "a text that is a number": (
        [{"text": i, "label": c} for i, c in enumerate(several(20))], {}, "row 1.*int.*column",
    ),
    "the same rows for validation": (rows_of(20), {"valid": rows_of(20)}, "validation.*twice"),
    "only empty texts": ([{"text": " ", "label": c} for c in several(20)], {"valid": 0}, "empty text"),
    "nothing held out can be": (labelled(several(20)), {"valid": 1.5}, "share"),
    "rows of some other kind": (42, {}, "data.train.*42"),
    "classes of several kinds": (labelled([1, "cat"] * 8), {}, "row 1.*row 2"),
    "a target of a regression that is no number": (
        labelled([1.0, 2.0, "three"]), {"task": "regression"}, "row 3.*classification",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_cannot_be(name: str, start: Path, tmp_path: Path) -> None:
    rows, given, words = ROWS[name]
    with pytest.raises(PretrainError, match=f"(?s){words}") as caught:
        tune(start, tmp_path / "run", rows, **given)
    assert 40 < len(str(caught.value)) < 900
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "empty.csv"),
        ("header.csv", b"text,label\n", "header.csv"),
        ("ragged.csv", b"text,label\na cat,cat\na dog\nthe fox,fox,x,y\n", r"ragged\.csv:3"),
        (
            "cut.jsonl",
            b'{"text": "a", "label": "b"}\n{"text": "a\n{"text": "c", "label": "d"}',
            r"cut\.jsonl:2",
        ),
        ("latin.csv", "text,label\nthe caf\u00e9,cat\na dog,dog\n".encode("latin-1"), "latin.csv"),
        ("nothing.parquet", b"PAR1 no", "nothing.parquet"),
        ("some.docx", b"text", "some.docx"),
    ],
)
def test_files_that_cannot_be(
    name: str, content: bytes, words: str, start: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PretrainError, match=words):
        tune(start, tmp_path / "run", tmp_path / name)
    assert (tmp_path / name).read_bytes() == content


def test_a_file_that_is_not_there(start: Path, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    with pytest.raises(PretrainError, match=r"review\.csv"):
        tune(start, tmp_path / "run", tmp_path / "review.csv")


def test_a_float_label_that_pandas_made_is_a_class(start: Path, tmp_path: Path) -> None:
    """Whole floats are what a gap makes of a column of integers; they are classes, not quantities."""
    result = tune(start, tmp_path, labelled([0.0, 1.0] * 12))
    assert result.labels == ("0", "1")


def test_rows_that_would_be_cut(start: Path, tmp_path: Path) -> None:
    rows = rows_of(50)
    rows[7] = {"text": "the cat " * 60, "label": "cat"}
    with pytest.raises(DataError, match=r"1 of .*rows .*row 8.*max_cut") as caught:
        tune(start, tmp_path / "run", rows, valid=0)
    assert "max_length" not in str(caught.value)  # which is all that the model has
    result = tune(start, tmp_path / "run", rows, valid=0, max_cut=0.03)
    assert any("are cut" in line for line in result.notes)


def test_an_empty_text_is_left_out_and_named(start: Path, tmp_path: Path) -> None:
    rows = rows_of(30)
    rows[4] = {"text": "  ", "label": "cat"}
    result = tune(start, tmp_path, rows, valid=0)
    assert any("row 5" in line and "empty text" in line for line in result.notes)


def test_rows_that_recur_are_left_out_and_counted(start: Path, tmp_path: Path) -> None:
    rows = rows_of(40)
    held = [{"text": f"  {r['text'].upper()}!", "label": r["label"]} for r in rows[:6]]
    result = tune(start, tmp_path, rows, valid=held)
    assert result.counts == {"train": 34, "valid": 6} and result.data.left_out == 6
    assert any("6 training rows recur" in line for line in result.notes)


def test_tasks_and_models_that_are_none(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classification"):
        tune(start, tmp_path, task="clasification")
    with pytest.raises(ConfigError, match="task="):
        tune(start, tmp_path, task=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model='DIRECTORY'"):
        tune(None, tmp_path)
    with pytest.raises(PretrainError, match="nowhere"):
        tune(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(ConfigError, match="int"):
        tune(5, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainError, match="empty"):
        tune(tmp_path / "empty", tmp_path / "run")


def test_checkpoints_that_are_damaged(start: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(start, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tune(cut, tmp_path / "run")
    foreign = shutil.copytree(start, tmp_path / "foreign")
    for name in ("manifest.json", "tokenizer.json", "tokenizer_config.json"):
        (foreign / name).unlink(missing_ok=True)
    with pytest.raises(PretrainError, match=r"tokenizer\.json"):
        tune(foreign, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("model.safetensors"))


def test_a_tokenizer_with_more_ids_than_the_model(start: Path, tmp_path: Path) -> None:
    """Its first text may be harmless; the error must come before the first step, and not from an index."""
    other = shutil.copytree(start, tmp_path / "other")
    (other / "manifest.json").unlink(missing_ok=True)
    path = other / "tokenizer.json"
    plain = json.loads(path.read_text())
    vocab = plain["model"]["vocab"]
    vocab["zebra"] = len(vocab)
    path.write_text(json.dumps(plain))
    rows = [{"text": f"zebra {r['text']}", "label": r["label"]} for r in rows_of(20)]
    with pytest.raises(PretrainError, match="tokenizer"):
        tune(other, tmp_path / "run", rows)


def test_two_runs_in_one_directory(start: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunLocked, match=str(os.getpid())):
        tune(start, tmp_path)
    assert not (tmp_path / "run.yaml").exists()
    assert tune(start, tmp_path).run.step == 3


@pytest.mark.parametrize("more", [{"lr": "sweep"}, {"compare": "scratch", "seeds": 2}])
def test_the_trials_before_a_run_are_alone_in_its_directory(
    more: Any, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two sweeps deleted the files of the first, which blamed a directory that was deleted."""
    out, tried = tmp_path / "run", []

    def trial(*_: Any, **given: Any) -> Any:
        with pytest.raises(RunLocked, match=str(os.getpid())):
            tune(start, out, **more)
        assert (out / "run.lock").exists()
        tried.append(given["rates"]["lr"])
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.finetuning.job.Job.score", trial)
    with pytest.raises(KeyboardInterrupt):
        tune(start, out, **more)
    assert len(tried) == 1 and not out.exists(), "a run that has not begun leaves no directory"


@pytest.mark.parametrize("at", [0, 5, 14])
def test_a_full_disk(at: int, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tune(start, tmp_path / "first")
    kept = (before.run.best / "model.safetensors").read_bytes()
    full = FullDisk(at)
    monkeypatch.setattr(files, "IO", full)
    with pytest.raises(PretrainError, match=r"(?i)space"):
        tune(start, tmp_path / "first", limit="9 steps")
    monkeypatch.undo()
    assert (before.run.best / "model.safetensors").read_bytes() == kept
    again = tune(start, tmp_path / "first", limit="9 steps")
    whole = tune(start, tmp_path / "whole", limit="9 steps")
    assert again.run.step == 9 and torch.isfinite(torch.tensor(again.metrics["loss"]))
    assert whole.run.step == 9


class FullDisk(FaultyIO):
    """From one write on there is no room."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.first, self.writes = at, 0

    def write(self, descriptor: Any, data: Any) -> Any:
        self.writes += 1
        if self.writes > self.first:
            self.at, self.how = len(self.calls), "ENOSPC"
        return super().write(descriptor, data)


def test_an_interrupt_leaves_a_checkpoint_and_the_rest_follows(start: Path, tmp_path: Path) -> None:
    def strike(record: Any) -> None:
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    result = tune(start, tmp_path / "cut", limit="6 steps", hooks=[strike])
    assert result.run.stopped == "SIGINT" and result.run.step == 2
    rest = tune(start, tmp_path / "cut", limit="6 steps")
    whole = tune(start, tmp_path / "whole", limit="6 steps")
    assert rest.metrics == whole.metrics and rest.run.step == 6
    assert rest.predict("the cat") == whole.predict("the cat")
