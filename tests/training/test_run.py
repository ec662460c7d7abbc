"""From settings to a run: resuming by the same command, refusing another one, evaluating what came of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

import pretrain
from pretrain.checkpoint import TrainingState
from pretrain.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.data.prepare import Prepared
from pretrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RunLocked,
    TokenizerError,
    TrainingError,
)
from pretrain.evaluation import language
from pretrain.objectives import build_objective
from pretrain.report.history import on_as_many
from pretrain.training import optim
from pretrain.training import run as running
from pretrain.training.preflight import rate_remarks, remarks
from pretrain.training.restore import training_state
from pretrain.training.run import resolve_size, run_name
from pretrain.training.trainer import Trainer
from pretrain.utils.run_log import read_log
from tiny import losses

WORDS = "sea ship wind salt rope sail deck mast gull tide wave storm captain sailor harbour".split()  # noqa: SIM905


@pytest.fixture
def text(tmp_path: Path) -> Path:
    import random

    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=10)) for _ in range(400)))
    return path


def settings(tmp_path: Path, text: Path, **train: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": str(text),
            "valid": "last:0.2",
            "cache": str(tmp_path / "cache"),
            "vocab_size": 300,
            "row_length": 32,
        },
        "model": {
            "family": "gpt2",
            "size": "tiny",
            "overrides": {"hidden_size": 32, "max_positions": 32},
        },
        "train": {
            "out": str(tmp_path / "run"),
            "limit": "6 steps",
            "batch_rows": 8,
            "eval_every": "0 steps",
        }
        | train,
        "parallel": {"device": "cpu"},
    }


def test_the_last_words_say_what_was_reached_and_what_to_do(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = pretrain.train(settings(tmp_path, text, limit="2 steps"))
    said = capfd.readouterr().err
    assert re.search(r"\d:\d\d for [\d,]+ tokens, best validation loss [\d.]+ \(step 2\)", said)
    assert "word frequencies alone" in said and f"report: {run.path / 'report.html'}" in said
    assert "<svg" in (run.path / "report.html").read_text()
    assert f"pretrain.load({str(run.path)!r}).generate(" in said  # in Python's spelling here


def test_same_command_resumes_and_figures_agree(tmp_path: Path, text: Path) -> None:
    first = pretrain.train(settings(tmp_path, text, save_every="2 steps", precision="bf16"))
    for batch in (1, 7):
        figures = pretrain.evaluate(first.path, batch_rows=batch)
        assert figures["loss"] == pytest.approx(first.metrics["loss"], rel=1e-5)
        assert figures["accuracy"] == pytest.approx(first.metrics["accuracy"], rel=1e-6)
    longer = settings(tmp_path, text, limit="8 steps", precision="bf16")
    again = pretrain.train(longer)
    assert again.step == 8 and len(losses(again.path)) == 8
    facts = pretrain.inspect(again.path)
    assert facts["step"] == 8 and facts["manifest"] == "holds" and facts["tokens_seen"] > 0
    assert facts["objective"] == "NextToken"
    assert "<svg" in again._repr_html_()


def test_what_is_chosen_by_the_text_is_said_recorded_and_kept(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path, text)
    del given["model"]["size"], given["train"]["limit"], given["train"]["batch_rows"]
    short = RunConfig.load(given, {"train.limit": "4 steps"})
    pretrain.train(short)
    assert re.search(
        r"in 4 steps, about \d+ (second|minute)s? on this machine", capfd.readouterr().err
    )
    written = RunConfig.load(tmp_path / "run" / "run.yaml")
    assert (written.model.size, written.train.batch_rows) == ("tiny", 8)
    assert written.train.limit == "4 steps"
    # Later rules may choose otherwise; what has begun goes on as it began.
    monkeypatch.setattr(running, "_SIZES", {"base": 1.0})
    run = pretrain.train(given)
    assert run.step == 4 and RunConfig.load(tmp_path / "run" / "run.yaml") == written


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1, "tiny"), (5_000_000, "mini"), (10**8, "small"), (2 * 10**9, "medium"), (10**11, "base"), (0, "small")],
)  # fmt: skip
def test_the_automatic_size_goes_by_the_tokens(tokens: int, size: str) -> None:
    data: Any = object.__new__(Prepared)
    object.__setattr__(data, "train", SimpleNamespace(num_tokens=tokens))
    assert resolve_size(ModelConfig(), data) == size
    assert resolve_size(ModelConfig(size="xl"), data) == "xl"
    rows: Any = SimpleNamespace()  # of no text
    assert resolve_size(ModelConfig(), rows) == "small"


def test_changed_settings_are_named(tmp_path: Path, text: Path) -> None:
    pretrain.train(settings(tmp_path, text))
    other = settings(tmp_path, text) | {"optim": {"lr": 5e-4}}
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.0005, was 'auto'"):
        pretrain.train(other)


def test_the_automatic_rate_is_said_and_trains_as_the_same_number_does(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path, text)
    pretrain.train(chosen, lr="auto")
    assert "adamw lr 0.0027 (auto: for width 32)" in capfd.readouterr().err
    monkeypatch.setattr(optim, "lr_of_width", lambda width: 0.2 / width)  # another rule
    pretrain.train(chosen, lr="auto", limit="8 steps")  # resumes
    assert "adamw lr 0.0027 (auto: as the run began)" in capfd.readouterr().err
    before = losses(tmp_path / "run")
    pretrain.train(
        settings(tmp_path, text, out=str(tmp_path / "number"), limit="6 steps"), lr=0.0027
    )
    assert losses(tmp_path / "number") == before[:6] and len(before) == 8
    # A run that began with a number, as by default in earlier versions, keeps it too.
    pretrain.train(settings(tmp_path, text, out=str(tmp_path / "number"), limit="8 steps"))
    assert losses(tmp_path / "number") == before
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.0027, was 'auto'"):
        pretrain.train(chosen, lr=0.0027)


def test_unknown_size_and_option_are_named(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="tiny"):
        pretrain.train(settings(tmp_path, text), model={"size": "tinny"})
    with pytest.raises(ConfigError, match="hidden_size"):
        pretrain.train(settings(tmp_path, text), model={"overrides": {"hiden_size": 8}})
    assert not (tmp_path / "run").exists()


def test_a_run_names_itself(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = settings(tmp_path, text, out="")
    first = pretrain.train(given)
    said = capsys.readouterr().err
    name = first.path.name
    assert re.fullmatch(r"runs/gpt2-tiny-[0-9a-f]{8}", str(first.path)) and name in said
    assert "6 steps are few" in said and "train.limit" in said
    assert "the vocabulary of 300 is large" in said and "data.vocab_size 256" in said
    again = pretrain.train(given, limit=8)  # what may change in a run does not change its name
    assert again.path == first.path and again.step == 8
    assert "are few" not in capsys.readouterr().err
    names = {
        run_name(RunConfig.load(given, {"lr": lr}), Prepared.open(prepared_in(tmp_path)))
        for lr in ("auto", 1e-3, 2e-3)
    }
    assert len(names) == 3 and str(first.path) in names
    prepared, other = Prepared.open(prepared_in(tmp_path)), RunConfig.load(given, {"micro_rows": 2})
    assert run_name(other, prepared) == str(first.path)
    with patch.object(running, "run_key", lambda kept, _: kept["train.micro_rows"]):
        assert run_name(other, prepared) == "runs/gpt2-tiny-0"  # as in versions in which it counted
    with patch.object(running, "run_key", lambda kept, _: "train.recut" in kept):
        assert run_name(other, prepared) == "runs/gpt2-tiny-False"  # earlier versions had none
        other.train.recut = False
        assert run_name(other, prepared) == "runs/gpt2-tiny-True"
    onward = RunConfig.load(given, {"model": str(first.path)})
    named = run_name(onward, Prepared.open(prepared_in(tmp_path)))
    assert named.startswith(f"runs/{name}-") and len(named) == len(f"runs/{name}-") + 8
    with pytest.raises(ConfigError, match=r"train\.out is empty"):
        Trainer(build_objective("NextToken", {}, pretrain.load(first.path)), [])


def prepared_in(tmp_path: Path) -> Path:
    return next((tmp_path / "cache" / "prepared").glob("*/manifest.json")).parent


def test_remarks_on_what_cannot_be_learnt() -> None:
    def told(steps: int, batch: int = 10, parent: str | None = None, **rows: Any) -> list[str]:
        trainer: Any = SimpleNamespace(
            train=SimpleNamespace(batch_rows=batch),
            train_data=SimpleNamespace(
                num_documents=rows.get("documents", 100), num_tokens=rows.get("tokens", 10**6)
            ),
            eval_data=SimpleNamespace(num_documents=rows.get("held_out", 5)),
            setup=SimpleNamespace(plan=SimpleNamespace(epoch_rows=1000)),
            objective=SimpleNamespace(
                model=SimpleNamespace(backbone=SimpleNamespace(vocab_size=8192))
            ),
            about={"parent": parent},
        )
        return remarks(trainer, steps)

    assert told(100) == []
    assert ["1 steps are few" in line for line in told(1)] == [True]
    (line,) = told(2000)
    assert "read 20 times" in line and "train.limit" in line
    (line,) = told(100, held_out=1)
    assert "single document" in line and "data.valid" in line
    assert told(100, held_out=1, documents=1) == []  # one long text of which the end is held out
    (line,) = told(100, tokens=285_000)  # 1 MB of English
    assert "8,192" in line and "35 times" in line and "data.vocab_size 2048" in line
    assert told(100, tokens=285_000, parent="books") == []


def test_remarks_on_rates_that_train_nothing() -> None:
    assert rate_remarks(OptimConfig(), 10) == rate_remarks(OptimConfig(warmup=10.0), 10) == []
    (line,) = rate_remarks(OptimConfig(warmup=40.0), 10)
    assert "40 steps" in line and "25%" in line and "optim.warmup" in line
    (line,) = rate_remarks(OptimConfig(lr=0.0), 10)
    assert line.startswith("optim.lr is 0")
    assert rate_remarks(OptimConfig(muon_lr=0.0), 10) == []
    (line,) = rate_remarks(OptimConfig(name="muon", muon_lr=0.0), 10)
    assert line.startswith("optim.muon_lr is 0")
    # A rate where a share of the peak is meant, as in nanoGPT.
    (line,) = rate_remarks(OptimConfig(lr=6e-4, min_lr=6e-5), 10)
    assert "ends at 3.6e-08" in line and line.endswith("set optim.min_lr=0.1")
    assert rate_remarks(OptimConfig(lr=6e-4, min_lr=6e-5, schedule="constant"), 10) == []
    assert rate_remarks(OptimConfig(lr=6e-4, min_lr=0.01), 10) == []


def test_going_on_from_a_checkpoint_with_new_text(tmp_path: Path, text: Path) -> None:
    """Domain adaptation is the same call: the checkpoint's tokenizer is used, and its weights are the start."""
    first = pretrain.train(settings(tmp_path, text, limit="30 steps"))
    new = tmp_path / "new.txt"
    new.write_text("\n".join(" ".join(WORDS[i % 7 : i % 7 + 6]) for i in range(300)))
    base = settings(tmp_path, new, out=str(tmp_path / "adapted"), limit="2 steps")
    base["model"] = {"checkpoint": str(first.path)}
    adapted = pretrain.train(base)
    assert losses(adapted.path)[0][1] < 5.2, (
        "the weights did not come along: a fresh model starts near 5.7"
    )
    a, b = pretrain.load(first.path, quiet=True), pretrain.load(adapted.path, quiet=True)
    assert a.tokenizer.fingerprint == b.tokenizer.fingerprint
    pretrain.train(settings(tmp_path, text, limit="32 steps"))
    with pytest.raises(TrainingError, match="base weights"):
        pretrain.train(base)


def test_tokenizer_of_the_data_must_be_the_checkpoints(tmp_path: Path, text: Path) -> None:
    first = pretrain.train(settings(tmp_path, text))
    prepared = pretrain.prepare(
        str(text), tmp_path / "other", vocab_size=280, row_length=32, valid="last:0.2"
    )
    base = settings(tmp_path, prepared.path, out=str(tmp_path / "next"))
    base["model"] = {"checkpoint": str(first.path)}
    with pytest.raises(TokenizerError, match="another tokenizer"):
        pretrain.train(base)
    with pytest.raises(TokenizerError, match="another tokenizer"):
        pretrain.evaluate(first.path, prepared.path)


def test_evaluate_on_a_plain_file(tmp_path: Path, text: Path) -> None:
    run = pretrain.train(settings(tmp_path, text))
    figures = pretrain.evaluate(run.checkpoint, str(text))
    assert 0 < figures["loss"] < 8 and figures["bits_per_byte"] > 0


def test_evaluate_needs_data(tmp_path: Path, text: Path) -> None:
    run = pretrain.train(settings(tmp_path, text))
    pretrain.load(run.path, quiet=True).save(tmp_path / "alone")
    with pytest.raises(DataError, match="--data"):
        pretrain.evaluate(tmp_path / "alone")


def test_wrong_objective_for_a_checkpoint(tmp_path: Path, text: Path) -> None:
    run = pretrain.train(settings(tmp_path, text))
    base = settings(tmp_path, text, out=str(tmp_path / "mlm"))
    base |= {"model": {"checkpoint": str(run.path)}, "objective": {"class_path": "MaskedLM"}}
    with pytest.raises(ConfigError, match="has the head 'causal-lm'"):
        pretrain.train(base)


def test_checkpoint_knows_its_origin_and_no_path(tmp_path: Path, text: Path) -> None:
    import json

    run = pretrain.train(settings(tmp_path, text))
    assert run.checkpoint is not None
    config = json.loads((run.checkpoint / "config.json").read_text())
    block = config["pretrain"]
    assert block["objective"]["name"] == "NextToken" and block["fingerprint"]
    for file in run.checkpoint.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_refused_second_run_leaves_the_first_ones_settings(tmp_path: Path, text: Path) -> None:
    seen: list[str] = []

    def intrude(record: Any) -> None:
        if record["step"] == 1:
            before = (tmp_path / "run" / "run.yaml").read_text()
            with pytest.raises(RunLocked):
                pretrain.train(settings(tmp_path, text) | {"optim": {"lr": 5e-4}})
            assert (tmp_path / "run" / "run.yaml").read_text() == before
            seen.append(before)

    pretrain.train(settings(tmp_path, text, save_every="0 steps"), hooks=[intrude])
    assert len(seen) == 1


def test_training_without_held_out_text(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = settings(tmp_path, text)
    base["data"]["valid"] = 0.0
    run = pretrain.train(base)
    assert run.metrics == {} and run.step == 6
    assert "no held-out rows" in capsys.readouterr().err
    with pytest.raises(DataError, match="no held-out rows"):
        pretrain.evaluate(run.path)


def test_prepared_data_overrule_settings_aloud(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = pretrain.prepare(
        str(text), tmp_path / "data", vocab_size=280, row_length=16, valid="last:0.2"
    )
    base = settings(tmp_path, prepared.path)
    pretrain.train(base)
    err = capsys.readouterr().err
    assert "data.row_length 16 (not 32)" in err and "data.vocab_size 280 (not 300)" in err
    base["data"]["encoding"] = "CP1252"
    running.open_data(RunConfig.load(base))
    assert "data.encoding None (not 'CP1252')" in capsys.readouterr().err
    base["data"]["encoding"] = "utf8"
    running.open_data(RunConfig.load(base))
    assert "data.encoding" not in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_place(tmp_path: Path, text: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="run"):
        pretrain.train(settings(tmp_path, text))


def test_output_inside_a_file(tmp_path: Path, text: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text\.txt"):
        pretrain.train(settings(tmp_path, text, out=str(text / "run")))


def test_overrides_that_are_set_elsewhere(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.overrides.seed"):
        pretrain.train(settings(tmp_path, text), model={"overrides": {"seed": 1}})
    with pytest.raises(ConfigError, match=r"vocab_size is 100, but the tokenizer has 300"):
        pretrain.train(settings(tmp_path, text), model={"overrides": {"vocab_size": 100}})


def test_a_changed_source_is_noticed_when_resuming(tmp_path: Path, text: Path) -> None:
    pretrain.train(settings(tmp_path, text))
    text.write_text(text.read_text() + "\nand one line more")
    with pytest.raises(TrainingError, match="would repeat some rows"):
        pretrain.train(settings(tmp_path, text, limit="8 steps"))


def test_changed_settings_are_kept_when_the_run_goes_on_and_only_then(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(tmp_path, text)
    run = pretrain.train(given)
    written = (run.path / "run.yaml").read_bytes()
    capsys.readouterr()
    before = text.read_text()
    text.write_text(before + " storm")
    given["train"]["limit"] = "8 steps"
    with pytest.raises(TrainingError, match="repeat some rows"):
        pretrain.train(given)
    assert (run.path / "run.yaml").read_bytes() == written
    assert "is resumed with" not in capsys.readouterr().err
    text.write_text(before)
    run = pretrain.train(given)
    assert run.step == 8 and RunConfig.load(run.path / "run.yaml").train.limit == "8 steps"
    assert "is resumed with train.limit '8 steps' (was '6 steps')" in capsys.readouterr().err
    assert pretrain.train(given, train={"micro_rows": 2}).step == 8
    assert "is resumed with train.micro_rows 2 (was 0)" in capsys.readouterr().err
    given["train"]["micro_rows"] = 2
    (event,) = (r for r in read_log(run.path / "log.jsonl") if r.get("event") == "resumed")
    assert event["step"] == 6 and event["planned"] == 6
    said = "was changed on resuming (up to step 6 it was planned with 6 steps)"
    run.report()
    assert said in (run.path / "report.html").read_text()
    given["train"]["limit"] = "8 step"  # the same length in other words
    pretrain.train(given)
    assert len([r for r in read_log(run.path / "log.jsonl") if r.get("event") == "resumed"]) == 1


def test_the_same_data_by_another_path_are_the_same(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path, text)
    cache = given["data"].pop("cache")
    data = {"vocab_size": 300, "row_length": 32, "cache_dir": cache, "quiet": True}
    pretrain.prepare(str(text), tmp_path / "rows", valid="last:0.2", **data)
    pretrain.prepare(str(text), tmp_path / "other", valid="last:0.3", **data)

    def resume(path: str, steps: int) -> int:
        given["data"] = {"train": path}
        given["train"]["limit"] = f"{steps} steps"
        return pretrain.train(given).step

    monkeypatch.chdir(tmp_path)
    assert resume("rows", 3) == 3
    assert resume(str(tmp_path / "rows"), 4) == 4
    assert resume("./rows/", 5) == 5
    with pytest.raises(ConfigError, match=r"data.train is 'other', was '\./rows/'"):
        resume("other", 6)
    (tmp_path / "rows").rename(tmp_path / "moved")
    with pytest.raises(TrainingError, match="was trained with rows"):
        resume("other", 6)
    assert resume("moved", 6) == 6
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(str(tmp_path / "moved"), 7) == 7


@pytest.mark.parametrize("place", ["model", "data", "result without checkpoints"])
def test_a_run_replaces_and_hides_nothing(place: str, tmp_path: Path, text: Path) -> None:
    """Neither in the directory of a model or of data, nor where only the result of a run is left."""
    first = pretrain.train(settings(tmp_path, text))
    out = {"model": first.path / "model", "data": tmp_path / "prepared"}.get(place, first.path)
    if place == "data":
        pretrain.prepare(str(text), out, vocab_size=280, row_length=32, quiet=True)
    elif place.startswith("result"):
        for checkpoint in first.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for changed in ({}, {"limit": "2 steps"}):
        with pytest.raises(ConfigError, match="holds (a model|the result of a run)"):
            pretrain.train(settings(tmp_path, text, out=str(out), **changed))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_what_stands_in_the_place_of_a_checkpoint_is_kept_and_said(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy_a_file_there(record: Any) -> None:
        if record["step"] == 2:
            (tmp_path / "run/checkpoint-4").mkdir()
            (tmp_path / "run/checkpoint-4/mine.txt").write_text("mine")

    run = pretrain.train(settings(tmp_path, text, save_every="4 steps"), hooks=[copy_a_file_there])
    assert (run.path / "checkpoint-4/manifest.json").exists()
    assert (run.path / "checkpoint-4.other/mine.txt").read_text() == "mine"
    assert "It is now" in capsys.readouterr().err.replace("\n", " ")


def test_settings_of_a_new_model_are_not_used_for_a_checkpoint_and_said(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = pretrain.train(settings(tmp_path, text))
    base = settings(tmp_path, text, out=str(tmp_path / "more"), limit="2 steps")
    base["model"] = {"checkpoint": str(first.path), "overrides": {"dropout": 0.5}, "size": "tiny"}
    capfd.readouterr()
    pretrain.train(base)
    said = capfd.readouterr().err
    assert "not used: model.size 'tiny', model.overrides {'dropout': 0.5}" in said
    base["model"] = {"checkpoint": str(first.path), "family": "gpt2"}
    pretrain.train(base | {"train": base["train"] | {"out": str(tmp_path / "plain")}})
    assert "not used" not in capfd.readouterr().err


def test_changed_text_has_no_held_out_rows_of_the_run(tmp_path: Path, text: Path) -> None:
    run = pretrain.train(settings(tmp_path, text))
    whole = pretrain.evaluate(run.path)
    content = text.read_text()
    text.write_text(content[: len(content) // 2])
    with pytest.raises(DataError, match="has changed since the run"):
        pretrain.evaluate(run.path)
    assert pretrain.evaluate(run.path, str(text))["loss"] > 0
    text.write_text(content)
    assert pretrain.evaluate(run.path) == whole


def test_a_table_is_evaluated_by_its_column_and_what_is_left_out_is_said(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = pretrain.train(settings(tmp_path, text))
    rows, broken = tmp_path / "rows.jsonl", tmp_path / "broken.jsonl"
    lines = [json.dumps({"body": line}).encode() for line in text.read_text().split("\n")]
    rows.write_bytes(b"\n".join(lines))
    broken.write_bytes(b"\n".join([*lines, b'{"body": "caf\xe9"}']))
    with pytest.raises(DataError, match=r"columns=\{'text'"):
        pretrain.evaluate(run.path, rows)
    figures = pretrain.evaluate(run.path, rows, columns={"text": "body"})
    capfd.readouterr()
    assert pretrain.evaluate(run.path, broken, columns={"text": "body"}) == figures
    assert "1 documents cannot be decoded" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="one column of text"):
        pretrain.evaluate(run.path, rows, columns={"text": "body", "label": "x"})


def test_a_run_of_a_version_without_a_setting_goes_on_as_it_began(
    tmp_path: Path, text: Path, capsys: Any
) -> None:
    given = settings(tmp_path, text, recut=False)
    first = pretrain.train(given)
    file = first.path / "run.yaml"
    plain = file.read_text().splitlines(keepends=True)
    kept = "".join(line for line in plain if "recut" not in line and not line.startswith("#"))
    file.write_text(kept)
    assert len(plain) > len(kept.splitlines())
    for recut in (True, False):
        given["train"]["recut"] = recut
        again = pretrain.train(given, limit=8 + recut)
        assert RunConfig.load(file).train.recut is False
        state = json.loads((again.checkpoint / "training/state.json").read_text())
        assert state["run"]["recut"] is False
        file.write_text(kept)
    given["train"]["recut"] = True
    file.write_text("".join(plain))
    with pytest.raises(ConfigError, match=r"train\.recut is True, was False"):
        pretrain.train(given, limit=8)


def test_another_objective_than_that_of_the_run_is_named(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = pretrain.train(settings(tmp_path, text))
    model = pretrain.load(run.path, quiet=True)
    model.extra_config["pretrain"]["objective"] = {"name": "TokenAfterNext"}
    capfd.readouterr()
    language.evaluate(run.path, model=model)
    assert "trained with TokenAfterNext, and is measured with NextToken" in capfd.readouterr().err
    language.evaluate(run.path, model=model, objective="NextToken")
    assert "measured with" not in capfd.readouterr().err


def test_all_documents_of_a_text_are_evaluated(tmp_path: Path, text: Path) -> None:
    run = pretrain.train(settings(tmp_path, text))
    one, again = ({"text": " ".join(words)} for words in (WORDS, WORDS[::-1]))
    once = [pretrain.evaluate(run.path, [row]) for row in (one, again)]
    whole = pretrain.evaluate(run.path, [one, again, one, one])
    assert whole["targets"] == 3 * once[0]["targets"] + once[1]["targets"]
    nats = [figures["loss"] * figures["targets"] for figures in once]
    assert whole["loss"] * whole["targets"] == pytest.approx(3 * nats[0] + nats[1], rel=1e-5)


@pytest.mark.parametrize("ready", [False, True])
def test_a_text_is_read_as_that_of_training_was(tmp_path: Path, text: Path, ready: bool) -> None:
    """Whether the settings of the run or its prepared data say how; of a copy it must be said."""
    reading, held = {"separator": "\n", "encoding": "cp1252"}, tmp_path / "held.txt"
    for path, lines in ((held, ["mât tide gull", "café wind"] * 20), (text, WORDS * 9)):
        path.write_bytes("\n".join(f"{word} {i}" for i, word in enumerate(lines)).encode("cp1252"))
    chosen = settings(tmp_path, text)
    data = chosen["data"] | {"valid": str(held)} | reading
    if ready:
        options = {key: value for key, value in data.items() if key not in ("train", "cache")}
        data = {"train": str(pretrain.prepare(text, tmp_path / "made", **options).path)}
    run = pretrain.train(chosen | {"data": data})
    figures = pretrain.evaluate(run.path)
    assert pretrain.evaluate(run.path, held) == figures
    copy = shutil.copytree(run.path / "model", tmp_path / "copy")
    assert pretrain.evaluate(copy, held, **reading) == figures
    for path, options in ((copy, {}), (run.path, {"encoding": "utf-8"})):
        with pytest.raises(DataError, match="is not UTF-8"):
            pretrain.evaluate(path, held, **options)
    other = pretrain.evaluate(run.path, held, separator="\n\n")
    assert other["targets"] != figures["targets"]
    made = pretrain.prepare(held, tokenizer=copy, row_length=32, **reading).path
    for source in (None, made):
        for key, value in reading.items():
            with pytest.raises(ConfigError, match=f"{key}=.*is read|{key}=.*are read"):
                pretrain.evaluate(copy, source, **{key: value})


def test_the_encoding_of_training_is_for_files_that_are_not_utf8(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of UTF-8, or with a mark or declaration, are read in their own encoding, whatever form names them."""
    reading = {"separator": "\n", "encoding": "cp1252"}
    chosen = settings(tmp_path, text)
    run = pretrain.train(chosen | {"data": chosen["data"] | reading})
    rows = [{"text": "mât tide gull"}, {"text": "café wind"}]
    utf8, lines = (
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "mât tide gull\ncafé wind",
    )
    page = "<meta charset=koi8-r><p>\u043c\u043e\u0440\u0435"
    folder = tmp_path / "held"
    folder.mkdir()
    for name, content, encoding in (
        ("a.jsonl", utf8, "utf-8"), ("b.jsonl", utf8, "cp1252"), ("c.txt", lines, "utf-8"), ("d.txt", lines, "cp1252"),
        ("e.txt", lines, "utf-16"), ("f.html", page, "koi8-r"), ("g.txt", "\u043c\u043e\u0440\u0435", "utf-8"),
    ):  # fmt: skip
        (folder / name).write_bytes(content.encode(encoding))
    whole = pretrain.evaluate(run.path, [*rows * 5, *[{"text": "\u043c\u043e\u0440\u0435"}] * 2])
    told = capsys.readouterr().err
    assert "read as that of training" not in told and "no effect" not in told
    for data in (str(folder), str(folder / "*"), sorted(folder.iterdir())):
        figures = pretrain.evaluate(run.path, data)
        assert figures["targets"] == whole["targets"]
        assert figures["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        told = capsys.readouterr().err
        assert "read as that of training was, with separator='\\n', encoding='cp1252'" in told
        assert "do not say their encoding: 2\n" in told
    pretrain.evaluate(run.path, folder / "a.jsonl")
    told = capsys.readouterr().err
    assert "encoding: none" in told and "separator" not in told
    as_told = pretrain.evaluate(run.path, folder / "c.txt", encoding="cp1252")
    assert as_told["targets"] > pretrain.evaluate(run.path, folder / "c.txt")["targets"]
    (run.path / "run.yaml").write_text(
        (run.path / "run.yaml").read_text().replace("cp1252", "iso2022_jp")
    )
    (folder / "h.txt").write_bytes("\u6d77\n\u6ce2".encode("iso2022_jp"))
    japanese = pretrain.evaluate(run.path, folder / "h.txt")
    assert (
        japanese["targets"]
        == pretrain.evaluate(run.path, [{"text": c} for c in "\u6d77\u6ce2"])["targets"]
    )


@pytest.mark.parametrize("fate", ["moved", "damaged"])
def test_another_text_is_measured_without_the_prepared_text_of_the_run(
    tmp_path: Path, text: Path, fate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = pretrain.prepare(
        text, tmp_path / "made", vocab_size=300, row_length=32, separator="\n"
    ).path
    run = pretrain.train(settings(tmp_path, text) | {"data": {"train": str(made)}})
    held = tmp_path / "held.txt"
    held.write_text("\n".join(WORDS))
    figures = pretrain.evaluate(run.path, held)
    if fate == "moved":
        made.rename(tmp_path / "elsewhere")
    else:
        (made / "manifest.json").write_text("{")
    capsys.readouterr()
    other = pretrain.evaluate(run.path, held)
    told = capsys.readouterr().err
    assert str(made) in told and "give the encoding and separator of this text" in told
    assert other["targets"] != figures["targets"]
    assert pretrain.evaluate(run.path, held, separator="\n", encoding="utf-8") == figures
    pretrain.evaluate(run.path, [{"text": "gull tide"}])
    assert "prepared text" not in capsys.readouterr().err


OWN = """
from pretrain.objectives import Loss
from pretrain.objectives.next_token import NextToken

class Scaled(NextToken):
    def __init__(self, model, scale: float):
        super().__init__(model)
        self.scale = scale

    def forward(self, batch):
        loss = super().forward(batch)
        return Loss(self.scale * loss.total, loss.count, loss.metrics)
"""


def test_an_own_objective_is_evaluated_with_the_arguments_of_its_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scaled.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = "own_scaled:Scaled"
    objective = {"class_path": path, "init_args": {"scale": 3.0}}
    run = pretrain.train(settings(tmp_path, text) | {"objective": objective})
    want = pytest.approx(run.metrics["loss"], rel=1e-5)
    assert pretrain.evaluate(run.path, objective=path)["loss"] == want
    copy = shutil.copytree(run.path / "model", tmp_path / "copy")
    model, held = pretrain.load(copy, quiet=True), tmp_path / "held.txt"
    held.write_text(" ".join(WORDS))
    plain = pretrain.evaluate(copy, held, objective="NextToken")["loss"]
    scaled = pretrain.evaluate(copy, held, objective=path)["loss"]
    assert scaled == pytest.approx(3 * plain, rel=1e-5)
    del model.extra_config["pretrain"]["objective"]["init_args"]  # as earlier versions
    assert language.evaluate(run.path, objective=path, model=model)["loss"] == want
    with pytest.raises(ConfigError, match=r"needs scale, and neither config.json.*describe\(\)"):
        language.evaluate(copy, str(held), objective=path, model=model)


FACTS = """
from pretrain.errors import ConfigError
from pretrain.objectives.next_token import NextToken

class Facts(NextToken):
    def __init__(self, model, scale: float = 1.0, shares: dict | None = None):
        super().__init__(model)
        if shares:
            shares["rest"] = 0.0

    def describe(self):
        return {"name": "Facts", "layers": len(self.model.backbone.blocks())}

class Deep(NextToken):
    def __init__(self, model, depth: int = 3):
        raise ConfigError("Deep wants a deeper model.")
"""


@pytest.mark.parametrize("given", [{}, {"scale": 2.0, "shares": {"a": 1.0}}])
def test_an_own_objective_may_describe_facts_that_are_no_arguments(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    (tmp_path / "own_facts.py").write_text(FACTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = "own_facts:Facts"
    objective = {"class_path": path, "init_args": given}
    for steps in (2, 3):
        chosen = settings(tmp_path, text, limit=f"{steps} steps") | {"objective": objective}
        run = pretrain.train(chosen)
        assert run.step == steps
    want = pytest.approx(run.metrics["loss"], rel=1e-5)
    model = pretrain.load(run.path, quiet=True)
    record = model.extra_config["pretrain"]["objective"]
    assert record == {"name": "Facts", "layers": record["layers"], "init_args": given}
    assert language.evaluate(run.path, objective=path, model=model)["loss"] == want
    del record["init_args"]  # as earlier versions
    assert language.evaluate(run.path, objective=path, model=model)["loss"] == want
    with pytest.raises(ConfigError, match=r"^Deep wants a deeper model\.$"):
        language.evaluate(run.path, objective="own_facts:Deep", model=model)


def test_the_loss_on_all_rows_is_not_compared_with_that_of_a_sample(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = pretrain.train(settings(tmp_path, text, eval_every="2 steps", eval_rows=2))
    said = capfd.readouterr().err
    evals = [record for record in run.history if "eval" in record]
    assert evals[-1]["eval"]["targets"] > 3 * evals[0]["eval"]["targets"]
    assert f", validation loss {evals[-1]['eval']['loss']:.4g} (step 6, all rows)" in said
    assert "best held-out loss" not in (run.path / "report.html").read_text()
    assert [r["step"] for r in on_as_many(evals, evals[0])] == [2, 4]
    assert [r["step"] for r in on_as_many(evals, evals[-1])] == [6]


def test_a_trainer_of_ones_own_has_its_own_schedule(tmp_path: Path, text: Path) -> None:
    class Halving(Trainer):
        def lr_factor(self) -> float:
            return 0.5**self.state.step

    data = pretrain.prepare(str(text), tmp_path / "data", vocab_size=280, row_length=32, quiet=True)
    size = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    run = Halving(
        pretrain.NextToken(pretrain.build("gpt2", tokenizer=data.tokenizer, **size)), data.train,
        optim=OptimConfig(lr=1e-2), train=TrainConfig(out=str(tmp_path / "run"), limit="3 steps", batch_rows=4),
        parallel=ParallelConfig(device="cpu"), quiet=True,
    ).fit()  # fmt: skip
    assert [record["lr"] for record in run.history if "lr" in record] == [1e-2, 5e-3, 2.5e-3]


@pytest.mark.parametrize(
    "changed", [{"lr": 0.5}, {"weight_decay": 5.0}, {"name": "muon"}, {"schedule": "constant"}]
)
def test_a_trainer_keeps_the_settings_of_its_optimizer(
    changed: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    data = pretrain.prepare(str(text), tmp_path / "data", vocab_size=280, row_length=32, quiet=True)

    def trainer(limit: str, **options: Any) -> Trainer:
        size = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32}
        model = pretrain.build("gpt2", tokenizer=data.tokenizer, **size)
        train = TrainConfig(out=str(tmp_path / "run"), limit=limit, batch_rows=4)
        return Trainer(
            pretrain.NextToken(model), data.train, optim=OptimConfig(**options), train=train,
            parallel=ParallelConfig(device="cpu"), quiet=True,
        )  # fmt: skip

    trainer("2 steps").fit()
    with pytest.raises(TrainingError, match=next(iter(changed))):
        trainer("4 steps", **changed).fit()
    assert trainer("4 steps").fit().step == 4


def earlier_state(trainer: Trainer) -> TrainingState:
    """State of an earlier version, which kept neither size, with a best loss that is never reached again."""
    found = training_state(trainer)
    del found.state["micro_rows"], found.state["run"]["eval_rows"]
    found.state["run"]["best_score"] = 0.0
    return found


def test_changed_sizes_are_noticed_in_runs_of_earlier_versions(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path, text, eval_every="2 steps", eval_rows=4, micro_rows=8)
    given["parallel"]["reproducible"] = True
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.training.trainer.training_state", earlier_state)
        pretrain.train(given, train={"limit": "2 steps"})
        with pytest.raises(TrainingError, match=r"train\.micro_rows 8 and this run has 4"):
            pretrain.train(given, train={"micro_rows": 4})
        best = pretrain.train(given, train={"limit": "4 steps"}).best
        assert best is not None and best.name == "checkpoint-2"
    best = pretrain.train(given, train={"eval_rows": 6}).best
    assert best is not None and best.name == "checkpoint-6"


def test_an_objective_that_returns_no_loss_is_named(tmp_path: Path, text: Path) -> None:
    class Plain(pretrain.NextToken):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch).total

    data = pretrain.prepare(str(text), tmp_path / "data", vocab_size=280, row_length=32, quiet=True)
    size = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    model = pretrain.build("gpt2", tokenizer=data.tokenizer, **size)
    train = TrainConfig(out=str(tmp_path / "run"), limit="1 steps", batch_rows=4)
    cpu = ParallelConfig(device="cpu")
    with pytest.raises(ModelError, match="Plain returned Tensor"):
        Trainer(Plain(model), data.train, train=train, parallel=cpu, quiet=True).fit()


def test_what_cannot_be_a_run_directory_or_a_text_is_named(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="is a file"):
        pretrain.train(settings(tmp_path, text, out=str(text)))
    prepared = pretrain.prepare(
        str(text), tmp_path / "data", vocab_size=280, row_length=32, quiet=True
    )
    mixed = settings(tmp_path, text)
    mixed["data"]["train"] = {str(prepared.path): 1, str(text): 2}
    with pytest.raises(DataError, match="holds prepared rows"):
        pretrain.train(mixed)
