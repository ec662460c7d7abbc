"""A run of fine-tuning from end to end: what it gives back, how it goes on, and that its settings reach the trainer."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import pretrain
from finetuning.conftest import ANIMALS, QUICK, model_of, rows_of
from pretrain.cli.main import main
from pretrain.config.spelling import Interface, using
from pretrain.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError
from pretrain.finetuning import job as running
from pretrain.finetuning.run import follow_up, report
from pretrain.objectives.classification import Classification
from pretrain.training.resuming import check_free


def tune(
    model: Any, out: Path, rows: Any = None, task: str = "classification", **given: Any
) -> Any:
    return pretrain.finetune(
        model, rows_of() if rows is None else rows, task, **({**QUICK, "out": out} | given)
    )


def weights(result: Any) -> bytes:
    return (result.run.best / "model.safetensors").read_bytes()


class Stop(Exception):
    """Ends a run in the middle."""


def stop_after(step: int) -> Any:
    def hook(record: Any) -> None:
        if record["step"] == step:
            raise Stop

    return hook


def test_a_task_is_learned_and_saved(tmp_path: Path) -> None:
    rows = rows_of(160)
    result = tune(
        model_of("modernbert", initializer_range=0.1, classifier_pooling="mean"), tmp_path / "run", rows,
        limit="90 steps", lr=2e-2, test=rows_of(30, 9),
    )  # fmt: skip
    assert result.metrics["accuracy"] >= 0.9 and result.test_metrics["accuracy"] >= 0.9
    assert result.labels == ANIMALS and result.counts == {"train": 120, "valid": 40, "test": 30}
    assert abs(result.trivial["accuracy"] - 1 / 3) < 0.1
    assert result.predict("the old dog sat")["label"] == "dog"
    assert result.confusion().matrix.sum() == 30
    again = pretrain.load(result.save(tmp_path / "saved"), quiet=True)
    assert again.labels == ANIMALS
    assert result.evaluate(rows_of(30, 9))["accuracy"] == result.test_metrics["accuracy"]


def test_the_best_evaluation_is_given_back(checkpoint: str, tmp_path: Path) -> None:
    """A learning rate that destroys what was learned late makes the last evaluation a bad one."""
    result = tune(
        checkpoint, tmp_path / "run", lr=0.3, limit="20 steps", eval_every="2 steps",
        schedule="constant", warmup=0, monitor="loss",
    )  # fmt: skip
    evals = {r["step"]: r["eval"]["loss"] for r in result.run.history if "eval" in r}
    best = min(evals, key=lambda step: evals[step])
    assert best != max(evals), "the test needs a run that gets worse"
    assert result.run.best.name == f"checkpoint-{best}"
    assert result.metrics["loss"] == pytest.approx(evals[best], rel=1e-4)
    model = pretrain.load(result.run.best, quiet=True)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_interrupted_and_run_again_is_the_same_run(checkpoint: str, tmp_path: Path) -> None:
    whole = tune(checkpoint, tmp_path / "whole")
    with pytest.raises(Stop):
        tune(checkpoint, tmp_path / "cut", hooks=[stop_after(4)])
    cut = tune(checkpoint, tmp_path / "cut")
    assert weights(cut) == weights(whole) and cut.metrics == whole.metrics
    steps: list[int] = []
    before = weights(cut)
    again = tune(checkpoint, tmp_path / "cut", hooks=[lambda record: steps.append(record["step"])])
    assert steps == [] and again.metrics == whole.metrics and weights(again) == before


def test_the_same_call_finds_its_directory(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, again = (tune(checkpoint, None, limit="2 steps") for _ in range(2))
    other = tune(checkpoint, None, limit="2 steps", seed=1)
    assert first.path == again.path != other.path and first.path.parent.name == "runs"


def test_models_in_memory_have_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [tune(model_of(seed=seed), None, limit="2 steps") for seed in (1, 2, 1)]
    assert found[0].path == found[2].path != found[1].path
    assert weights(found[0]) != weights(found[1])
    with pytest.raises(TrainingError, match="base weights"):
        tune(model_of(seed=2), found[0].path, limit="2 steps")


@pytest.mark.parametrize("listed", [True, False])
def test_a_base_with_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """Whether a manifest has the hashes of its files or not; a run that recorded none goes on."""
    base, old = tmp_path / "base", tmp_path / "old"

    def save(seed: int) -> None:
        shutil.rmtree(base, ignore_errors=True)
        model_of(seed=seed).save(base)
        if not listed:
            (base / "manifest.json").unlink()

    save(1)
    first = weights(tune(str(base), tmp_path / "run", limit="2 steps"))
    with monkeypatch.context() as before:
        before.setattr(running, "hash_weights", lambda model, *, opened: None)
        tune(str(base), old, limit="2 steps")
    save(2)
    with pytest.raises(TrainingError, match="base weights .* so it was changed since"):
        tune(str(base), tmp_path / "run", limit="2 steps")
    assert weights(tune(str(base), old, limit="2 steps")) == first
    save(1)
    assert weights(tune(str(base), tmp_path / "run", limit="2 steps")) == first


def test_a_base_whose_tokenizer_is_read_otherwise_is_refused_with_the_cure(tmp_path: Path) -> None:
    """Earlier versions took tokens for special that special_tokens_map.json alone lists."""
    base = tmp_path / "base"
    model = model_of()
    model.save(base)
    (base / "manifest.json").unlink()
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text())
    listed = [max(model.tokenizer.vocab, key=model.tokenizer.vocab.__getitem__)]
    places = {listed[0]: model.tokenizer.vocab_size - 1}
    (base / "added_tokens.json").write_text(json.dumps(places))
    marked = config | {"additional_special_tokens": listed, "extra_special_tokens": listed}
    file.write_text(json.dumps(marked))
    tune(str(base), tmp_path / "run", limit="2 steps")
    file.write_text(json.dumps(config))
    (base / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": listed}))
    with pytest.raises(TrainingError, match="tokenizer .*If nobody .*as strings, in additional_sp"):
        tune(str(base), tmp_path / "run", limit="2 steps")
    file.write_text(json.dumps(config | {"additional_special_tokens": listed}))
    tune(str(base), tmp_path / "run", limit="2 steps")


def test_a_base_with_another_chat_template_is_refused(tmp_path: Path) -> None:
    """Also where it writes the rows by which a resumed run verifies its weights as before."""
    base = model_of("llama")
    base.tokenizer = copy.copy(base.tokenizer)  # other tests share it
    base.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    base.save(tmp_path / "base")
    (tmp_path / "base" / "manifest.json").unlink()
    rows = [
        {"messages": [{"role": "user", "content": row["text"]},
                      {"role": "assistant", "content": row["label"]}]}
        for row in rows_of()
    ]  # fmt: skip
    given = {**QUICK, "out": tmp_path / "run"}
    pretrain.finetune(tmp_path / "base", rows, "chat", **given)
    pretrain.finetune(tmp_path / "base", rows, "chat", **given)  # the run goes on
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if tools %}{{ tools }}{% endif %}")
    with pytest.raises(TrainingError, match="chat templates .* so it was changed since"):
        pretrain.finetune(tmp_path / "base", rows, "chat", **given)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"lr": 2e-2}, "optim.lr"), ({"label_smoothing": 0.1}, "label_smoothing"), ({"seed": 5}, "train.seed")],
)  # fmt: skip
def test_another_setting_in_the_same_directory_is_refused(
    checkpoint: str, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    before = weights(tune(checkpoint, tmp_path, limit="2 steps"))
    with pytest.raises(ConfigError, match=name):
        tune(checkpoint, tmp_path, limit="2 steps", **change)
    assert weights(tune(checkpoint, tmp_path, limit="2 steps")) == before


def test_other_rows_in_the_same_directory_are_refused(checkpoint: str, tmp_path: Path) -> None:
    tune(checkpoint, tmp_path, limit="2 steps")
    with pytest.raises(pretrain.PretrainError, match="data|rows"):
        tune(checkpoint, tmp_path, rows_of(48, 3), limit="4 steps")


def test_patience(checkpoint: str, tmp_path: Path) -> None:
    result = tune(
        checkpoint, tmp_path, limit="60 steps", eval_every="2 steps", patience=2, lr=1e-9,
    )  # fmt: skip
    assert result.run.stopped == "patience" and result.run.step < 60


@pytest.mark.parametrize("freeze", ["backbone", "embeddings", 1])
def test_what_is_frozen_stays(checkpoint: str, tmp_path: Path, freeze: Any) -> None:
    start = pretrain.load(checkpoint, quiet=True)
    result = tune(checkpoint, tmp_path, freeze=freeze, limit="3 steps")
    before, after = (
        dict(start.backbone.named_parameters()),
        dict(result.model.backbone.named_parameters()),
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = list(start.backbone.blocks())
    lowest = {id(p) for p in blocks[0].parameters()}
    tables = {id(p) for m in start.backbone.embeddings() for p in m.parameters()}
    fixed = {"backbone": set(before), "embeddings": set(), 1: set()}[freeze]
    fixed |= {n for n, p in before.items() if id(p) in tables}
    fixed |= {n for n, p in before.items() if freeze == 1 and id(p) in lowest}
    assert not moved & fixed
    assert (moved == set()) == (freeze == "backbone")


@pytest.mark.parametrize("freeze", ["everything", 9, -1])
def test_freezing_what_is_not_there(checkpoint: str, tmp_path: Path, freeze: Any) -> None:
    with pytest.raises(ConfigError, match="freeze"):
        tune(checkpoint, tmp_path, freeze=freeze)


def test_settings_reach_the_trainer(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Spy(running.Trainer):
        def fit(self, *steps: Any, **more: Any) -> Any:
            seen.update(optim=self.optim, train=self.train, parallel=self.parallel)
            return super().fit(*steps, **more)

    monkeypatch.setattr(running, "Trainer", Spy)
    tune(
        checkpoint, tmp_path, layer_decay=0.8, unfreeze=0.5, l2_sp=0.1, weight_decay=0.02, warmup=2,
        monitor="macro_f1", patience=3, micro_rows=4, optim={"clip": 0.5}, limit="2 steps",
    )  # fmt: skip
    optim, train = seen["optim"], seen["train"]
    assert (optim.layer_decay, optim.unfreeze, optim.l2_sp) == (0.8, 0.5, 0.1)
    assert (optim.weight_decay, optim.warmup, optim.clip, optim.lr) == (0.02, 2, 0.5, 1e-2)
    assert (train.monitor, train.patience, train.micro_rows) == ("macro_f1", 3, 4)


def test_sweep_takes_the_best_and_prints_a_table(
    checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "lr": "sweep",
        "lrs": [1e-7, 3e-2],
        "limit": "4 steps",
        "quiet": False,
    }
    result = tune(checkpoint, tmp_path, rows_of(96), **options)
    said = "".join(capfd.readouterr())
    table = [
        line.split() for line in said.splitlines() if line.strip().startswith(("1e-07", "0.03"))
    ]
    assert len(table) == 2 and sum("chosen" in line for line in table) == 1
    best = max(table, key=lambda line: float(line[1]))
    assert "chosen" in best
    peak = max(r["lr"] for r in result.run.history if "lr" in r)
    assert peak == pytest.approx(float(best[0]), rel=0.5)
    # Called again it does not search again.
    tune(checkpoint, tmp_path, rows_of(96), **options)
    assert "each, by" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("linked", [False, True])
def test_trials_leave_directories_of_others_alone(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """A directory at OUT.trial was deleted."""
    out, notes = tmp_path / "run", tmp_path / "run.trial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    place = tmp_path / "place" if linked else out
    left = place / ".pretrain-new-4194305-0123abcd-trial"  # of a sweep that was killed
    left.mkdir(parents=True)
    if linked:
        out.symlink_to(place)
    places: list[Path] = []
    fit = running.Trainer.fit

    def seen(self: Any, *given: Any, **more: Any) -> Any:
        places.append(self.out)
        return fit(self, *given, **more)

    monkeypatch.setattr(running.Trainer, "fit", seen)
    tune(checkpoint, out, lr="sweep", lrs=[1e-3, 1e-2], limit="1 steps")
    assert notes.read_text() == "mine" and not left.exists()
    assert len({path.name for path in places}) == 3 and places[-1].samefile(out)
    assert all(path.parent.samefile(out) and not path.exists() for path in places[:-1])


def test_a_sweep_that_was_interrupted_goes_on(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lost all its trials."""
    tried: list[float] = []
    score = running.Job.score

    def one(job: Any, *parts: Any, rates: Any, **given: Any) -> list[float]:
        tried.append(rates["lr"])
        if len(tried) == 2:
            raise Interrupted(143)
        return score(job, *parts, rates=rates, **given)

    given: dict[str, Any] = {"lr": "sweep", "lrs": [1e-3, 1e-2], "limit": "1 steps"}
    whole = tune(checkpoint, tmp_path / "whole", **given)
    monkeypatch.setattr(running.Job, "score", one)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"trials\.json keeps the scores of .* \(1\); the same"):
        tune(checkpoint, out, **given)
    assert [path.name for path in out.iterdir()] == ["trials.json"]
    result = tune(checkpoint, out, **given)
    assert tried == [1e-3, 1e-2, 1e-2] and result.rates == whole.rates
    assert weights(result) == weights(whole)
    (out / "trials.json").write_text("{}")  # a run that has begun has its rate
    assert tune(checkpoint, out, **given).rates == whole.rates and len(tried) == 3
    shutil.copyfile(tmp_path / "whole" / "trials.json", tmp_path / "trials.json")
    tried[1:] = []
    with pytest.raises(Interrupted, match="No trial was finished"):  # other rows: none is kept
        tune(checkpoint, tmp_path, rows_of(30), **given)


def test_an_interruption_after_a_sweep_says_what_is_kept(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that there is nothing to save."""
    given: dict[str, Any] = {"lr": "sweep", "lrs": [1e-3, 1e-2], "limit": "1 steps"}
    out, begun = tmp_path / "run", running.keep_settings

    def struck(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return begun(*arguments)

    monkeypatch.setattr(running, "keep_settings", struck)
    with pytest.raises(
        Interrupted, match=r"^No step was made .* starts again.*are kept in .*/run/trials\.json"
    ):
        tune(checkpoint, out, **given)
    monkeypatch.undo()
    monkeypatch.setattr(running.Job, "score", lambda *a, **k: pytest.fail("a trial is made again"))
    assert tune(checkpoint, out, **given).rates["lr"] in given["lrs"]


@pytest.mark.parametrize(("monitor", "said"), [("pearson", "-0.2500"), ("mse", "0.2500")])
def test_the_table_of_a_sweep_has_the_sign_of_the_figure(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    monitor: str,
    said: str,
) -> None:
    monkeypatch.setattr(running.Job, "score", lambda *_, **given: [-0.25])
    rows = [{"text": row["text"], "label": i / 48} for i, row in enumerate(rows_of())]
    options = {"lr": "sweep", "lrs": [1e-3], "limit": "1 steps", "quiet": False}
    tune(checkpoint, tmp_path, rows, "regression", monitor=monitor, **options)
    assert f"0.001    {said}  <- chosen" in "".join(capfd.readouterr())


def test_automatic_learning_rate_is_said(
    checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = tune(checkpoint, tmp_path, lr="auto", limit="2 steps", quiet=False)
    lr = running.automatic_lr(result.model)
    assert f"{lr:g}" in "".join(capfd.readouterr())


def test_quiet_prints_nothing(
    checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also with a column that is not used, a row that recurs and an empty text."""
    rows = [{**row, "unused": i} for i, row in enumerate(rows_of(40))]
    rows.append({"text": " ", "label": "cat", "unused": 0})
    tune(checkpoint, tmp_path, rows, valid=rows[:8], limit="2 steps")
    assert "".join(capfd.readouterr()) == ""


def test_a_model_that_was_given_stays_as_it_was(tmp_path: Path) -> None:
    for number, head in enumerate((None, "sequence-classification")):
        more = {"head": head, "labels": ANIMALS} if head else {}
        model = model_of(**more)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        kind, extra = model.head_kind, dict(model.extra_config)
        result = tune(model, tmp_path / str(number), limit="3 steps", freeze="embeddings")
        assert model.head_kind == kind and model.extra_config == extra and result.model is not model
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
        assert model.tokenizer is not None and model.labels == (ANIMALS if head else None)


def test_regression(checkpoint: str, tmp_path: Path) -> None:
    rows = [{"text": r["text"], "label": 1000.0 + 50 * len(r["text"].split())} for r in rows_of(96)]
    result = tune(checkpoint, tmp_path, rows, "regression", limit="80 steps", eval_every="20 steps")
    assert result.metrics["pearson"] > 0.7
    values = [found["score"] for found in result.predict([r["text"] for r in rows[:5]])]
    assert all(800 < value < 2200 for value in values)


def test_several_labels(checkpoint: str, tmp_path: Path) -> None:
    rows = [
        {
            "text": r["text"],
            "label": [a for a in (r["label"], *r["text"].split()) if a in ("cat", "red")],
        }
        for r in rows_of(60)
    ]
    rows = [{**r, "label": sorted(set(r["label"]))} for r in rows]
    result = tune(checkpoint, tmp_path, rows, limit="3 steps")
    assert result.labels == ("cat", "red") and "micro_f1" in result.metrics
    assert set(result.predict("the red cat")) >= {"label", "score"}


def test_a_keyword_that_nothing_knows(checkpoint: str, tmp_path: Path) -> None:
    for wrong, right in (
        ("epoch", "epochs"),
        ("label_smoothin", "label_smoothing"),
        ("textt", "text"),
    ):
        with pytest.raises(ConfigError, match=right):
            tune(checkpoint, tmp_path, **{wrong: 1})
    with pytest.raises(ConfigError, match="scratch"):
        tune(checkpoint, tmp_path, compare="scartch")


def test_fewer_rows_than_a_batch(checkpoint: str, tmp_path: Path) -> None:
    result = tune(checkpoint, tmp_path, rows_of(9), batch_rows=32, limit="2 steps")
    assert result.run.step == 2


def test_without_held_out_rows(checkpoint: str, tmp_path: Path) -> None:
    result = tune(checkpoint, tmp_path, valid=0, limit="2 steps")
    assert result.counts["valid"] == 0 and result.run.step == 2
    assert result.predict("a cat")["label"] in ANIMALS
    with pytest.raises(DataError, match="valid"):
        tune(checkpoint, tmp_path / "sweep", valid=0, lr="sweep")


def test_measured_like_one_by_one(checkpoint: str, tmp_path: Path) -> None:
    result = tune(checkpoint, tmp_path, limit="3 steps")
    table = result.data.valid
    task = Classification(result.model, pack=False)
    alone = [next(task.predict(table.take([i])))["label"] for i in range(len(table))]
    right = np.mean([a == b for a, b in zip(alone, table.columns["label"], strict=True)])
    assert result.metrics["accuracy"] == pytest.approx(float(right))


def test_the_length_of_a_run_that_nobody_has_set() -> None:
    steps = [running.automatic_steps(epoch) for epoch in range(1, 2000)]
    assert all(3 * e <= s for e, s in enumerate(steps, start=1)), "fewer than three epochs"
    assert steps == sorted(steps) and steps[0] == 100
    for epoch, count in enumerate(steps, start=1):
        assert count <= max(20 * epoch, 100) and count >= min(500, 20 * epoch)


def test_epochs_are_passes_over_the_rows(checkpoint: str, tmp_path: Path) -> None:
    """Of 33 rows in batches of 32: two steps for one pass, and four for three, not six."""
    options = {"limit": "", "batch_rows": 32, "valid": rows_of(8, 3), "eval_every": "1 epochs"}
    once = tune(checkpoint, tmp_path / "1", rows_of(33), epochs=1, **options)
    assert (once.run.step, [r["step"] for r in once.run.history if "eval" in r]) == (2, [2])
    thrice = tune(checkpoint, tmp_path / "3", rows_of(33), epochs=3, **options)
    assert (thrice.run.step, [r["step"] for r in thrice.run.history if "eval" in r]) == (4, [2, 4])
    part = tune(
        checkpoint, tmp_path / "part", rows_of(20), **options | {"epochs": 1.1, "batch_rows": 2}
    )
    assert part.run.step == 11  # 1.1 * 20 / 2 is above 11 in binary


def test_a_run_that_an_earlier_version_began_goes_on_to_the_length_that_it_had(
    checkpoint: str, tmp_path: Path
) -> None:
    options = {"limit": "", "batch_rows": 32, "valid": rows_of(8, 3)}
    with (
        patch.object(running.Job, "steps", lambda *_: ("6 steps", 2)),
        pytest.raises(Stop),
    ):
        tune(checkpoint, tmp_path, rows_of(33), epochs=3, hooks=[stop_after(5)], **options)
    assert tune(checkpoint, tmp_path, rows_of(33), epochs=3, **options).run.step == 6
    assert tune(checkpoint, tmp_path, rows_of(33), epochs=9, **options).run.step == 10


def test_a_run_goes_on_with_the_rate_and_length_it_began_with(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the rules have changed since, and when it was begun before they were written down."""
    rows = rows_of(16)
    result = tune(checkpoint, tmp_path, rows, lr="auto", limit="")
    assert result.run.step == 100
    peak = max(r["lr"] for r in result.run.history if "lr" in r)
    monkeypatch.setattr(running, "automatic_steps", lambda epoch: 120)
    monkeypatch.setattr(running, "automatic_lr", lambda model, adapter: peak / 10)
    again = tune(checkpoint, tmp_path, rows, lr="auto", limit="")
    assert again.run.step == 100, "a finished run was gone on with"
    job = running.Job.open(checkpoint, again.settings, {"train": rows, "valid": 0.25}, quiet=True)
    task = job.build(seed=0)
    assert job.choose_lr_and_limit(task, 12, tmp_path / "new") == (peak / 10, "120 steps")
    monkeypatch.setattr(running, "rates_of_run", lambda out: {})  # as in states of an older version
    lr, limit = job.choose_lr_and_limit(task, 12, Path(again.path))
    assert limit == "100 steps" and lr == pytest.approx(3e-5 * 48**1.5, rel=0.05)


@pytest.mark.parametrize(
    "search",
    [
        {"lr": "sweep"},
        pytest.param({"compare": "scratch", "lr": "auto", "seeds": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_of_muon_keeps_the_rates_that_it_began_with(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: dict[str, Any]
) -> None:
    """Earlier versions left the rate of Muon as it is set, and wrote one rate only."""
    monkeypatch.setattr("pretrain.finetuning.compare._baselines", lambda *_: {})
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of(24)))
    options = {"name": "muon", "lrs": [3e-2], "muon_lr": 0.004, **search}
    with patch.object(running.Job, "rates", lambda self, task, lr, out=None: {"lr": lr}):
        tune(checkpoint, out, str(rows), limit="2 steps", **options)
    assert list(json.loads((out / "sweep.json").read_text("utf-8"))) == ["digest", "lr"]
    rates = {"lr": 3e-2, "muon_lr": 0.004}
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert "Muon lr 0.004, chosen" in (out / "report.html").read_text("utf-8")
    for limit in ("2 steps", "3 steps"):
        assert tune(checkpoint, out, str(rows), limit=limit, **options).rates == rates
    assert rates.items() <= json.loads((out / "sweep.json").read_text("utf-8")).items()


def test_a_model_of_the_hub_is_recorded_with_its_commit_and_resumed_without_a_network(
    hub: Any, checkpoint: str, tmp_path: Path
) -> None:
    commit = hub.add("org/bert", Path(checkpoint))
    named = f"hub:org/bert@{commit}"
    with pytest.raises(Stop):
        tune("org/bert", tmp_path / "run", hooks=[stop_after(4)])
    assert f"checkpoint: {named}" in (tmp_path / "run" / "run.yaml").read_text()
    hub.add("org/bert", model_of(seed=5).save(tmp_path / "newer"))  # the run keeps its start
    hub.requests.clear()
    result = tune("org/bert", tmp_path / "run")
    assert not hub.requests
    assert result.model.extra_config["pretrain"]["parent"] == named
    assert "base_model: org/bert\n" in result.model.card


@pytest.mark.slow
def test_a_run_without_out_is_found_by_the_name_of_its_model_after_the_branch_has_gone_on(
    hub: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/bert", Path(checkpoint))
    monkeypatch.chdir(tmp_path)
    first = tune("org/bert", "", limit="1 steps")
    hub.add("org/bert", model_of(seed=5).save(tmp_path / "newer"))
    again = tune("org/bert", "", limit="1 steps")
    assert again.path == first.path
    assert again.settings.model.checkpoint == f"hub:org/bert@{commit}"


def test_a_missing_model_of_the_hub_is_said_before_the_rows_are_read(
    hub: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="hub:org/none does not exist"):
        tune("org/none", tmp_path / "run", rows=str(tmp_path / "no-such-rows.csv"))


def test_the_lines_on_what_to_do_next_differ() -> None:
    model, data = SimpleNamespace(head_kind="embedding", adapter=None), None
    task = SimpleNamespace(name="embedding")
    result: Any = SimpleNamespace(path=Path("runs/x"), task=task, model=model, data=data)
    with patch("pretrain.finetuning.run.example_call", return_value="embed(TEXTS)"):
        in_python = follow_up(result)
        with using(Interface(command=True)):
            on_the_command_line = follow_up(result)
            task.name = "chat"
            lines = [line.strip() for line in follow_up(result)]
    assert "embed(TEXTS)" in in_python[1]
    assert on_the_command_line[1].strip() == "pretrain embed runs/x FILE --out vectors.npy"
    assert on_the_command_line[2].split()[:3] == ["pretrain", "evaluate", "runs/x"]
    assert lines[1:3] == ["pretrain chat runs/x", 'pretrain generate runs/x "Hello" --chat']


def test_what_an_adapter_of_a_model_in_memory_needs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines that are printed work as they stand, and the command line names its own option."""
    base = model_of()
    result = tune(base, tmp_path / "run", rows_of(24), limit="1 steps", lora=2)
    lines = [line.strip() for line in follow_up(result)]
    names = {"model": base, "pretrain": pretrain, "DIR": tmp_path / "base", "ROWS": rows_of(9)}
    for line in lines[1:]:
        exec(line, names)
    assert len(lines) == 4
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 2
    assert "--base DIR --out NEW_DIR" in " ".join(capsys.readouterr().err.split())
    base_option = ["--base", str(tmp_path / "base")]
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "m"), *base_option]) == 0


def test_the_section_train_beside_the_rows_is_read(checkpoint: str, tmp_path: Path) -> None:
    """Rows and section have one name; pretrain.train takes train={...} too."""
    result = tune(
        checkpoint, tmp_path / "run", rows_of(24), train={"seed": 2, "num_train_epochs": 2}
    )
    assert result.settings.train.seed == 2 and result.settings.train.epochs == 2
    for train in ("rows.csv", rows_of(24), {"text": ["a"], "label": ["b"]}):
        with pytest.raises(ConfigError, match="rows are given twice"):
            tune(checkpoint, tmp_path / "other", rows_of(24), train=train)
    with pytest.raises(ConfigError, match="seed is given twice"):
        tune(checkpoint, tmp_path / "other", rows_of(24), seed=1, train={"seed": 2})
    with pytest.raises(ConfigError, match="epoch is no column, option or setting.*epochs"):
        tune(checkpoint, tmp_path / "other", rows_of(24), train={"epoch": 2})
    for name, value in (("out", str(tmp_path / "else")), ("valid", 0.5)):
        with pytest.raises(ConfigError, match=f"{name} is given twice"):
            tune(checkpoint, tmp_path / "other", rows_of(24), valid=0.25, train={name: value})
    section = {"out": tmp_path / "named", "patience": None}
    assert tune(checkpoint, None, rows_of(24), train=section).path == tmp_path / "named"  # type: ignore[arg-type]


def test_a_run_in_the_directory_of_a_model_is_refused(checkpoint: str, tmp_path: Path) -> None:
    """Opening it would give the model, and never the run."""
    place = shutil.copytree(checkpoint, tmp_path / "model")
    before = sorted(os.listdir(place))
    with pytest.raises(ConfigError, match="holds a model"):
        tune(place, place, rows_of(24))
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_result_whose_checkpoints_are_gone_is_not_overwritten(tmp_path: Path, name: str) -> None:
    """The result of an adapter is a directory of PEFT, whose configuration has another name."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / name).write_text("{}")
    with pytest.raises(ConfigError, match="checkpoints are gone"):
        check_free(tmp_path / "run")
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"holds an? (model|adapter) .{name}"):
        check_free(tmp_path / "run")


def test_an_adapter_of_a_run_that_trained_on_finds_the_checkpoint_it_belongs_to(
    tmp_path: Path,
) -> None:
    """Resumed, opened and reported; without that checkpoint the error names it, and putting it back helps."""
    base, out, rows = tmp_path / "base", tmp_path / "adapter", tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of(24)))
    better: dict[str, Any] = {"monitor": "loss", "lr": 1e-3, "schedule": "constant"}
    tune(model_of(), base, limit="2 steps", **better)
    tune(base, out, str(rows), limit="1 steps", lora=2)
    shutil.copytree(base / "checkpoint-2", tmp_path / "kept")
    run = tune(model_of(), base, limit="6 steps", **better).run
    assert run.best.name == "checkpoint-6" and not (base / "checkpoint-2").exists()
    (out / "report.html").unlink()
    for call in (lambda: tune(base, out, str(rows), limit="3 steps", lora=2), lambda: report(out)):
        with pytest.raises(CheckpointError, match=r"\(step 2\) are no longer there.*Put a copy"):
            call()
    with pytest.raises(CheckpointError, match="trained on step 2 of its base"):
        pretrain.load(out)
    kept = shutil.move(tmp_path / "kept", base / "checkpoint-2")
    assert pretrain.load(out, quiet=True).source == str(kept)
    assert main(["report", str(out)]) == 0
    assert tune(base, out, str(rows), limit="3 steps", lora=2).run.step == 3


def test_an_adapter_of_a_checkpoint_that_was_removed_is_opened_on_the_result(
    tmp_path: Path,
) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    tune(model_of(), base, limit="1 steps")
    rows = rows_of(24)
    tune(base / "checkpoint-1", out, rows, limit="1 steps", lora=2)
    shutil.rmtree(base / "checkpoint-1")
    assert pretrain.load(out, quiet=True).source == str(base / "model")
    resumed = tune(base / "checkpoint-1", out, rows, limit="2 steps", lora=2)
    assert resumed.run.step == 2


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_keeps_its_random_state(tmp_path: Path, off: Any) -> None:
    wanted = tune(model_of(), tmp_path / "plain", limit="2 steps", lora=2).metrics
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with off():
        assert tune(model_of(), tmp_path / "off", limit="2 steps", lora=2).metrics == wanted
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("damaged", [b"[]", b'{"checkpoint": 5}', None])
def test_a_damaged_choice_of_the_best_checkpoint_is_named_when_a_run_goes_on(
    checkpoint: str, tmp_path: Path, damaged: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is written again; without one nothing is said, as the state of training has it."""
    options = {"limit": "1 steps", "quiet": False}
    result = tune(checkpoint, tmp_path / "run", rows_of(24), **options)
    file = result.run.path / "best.json"
    whole = file.read_bytes()
    capfd.readouterr()
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    tune(checkpoint, tmp_path / "run", rows_of(24), **options)
    said = " ".join(capfd.readouterr().err.split())
    assert ("best.json is damaged" in said) == (damaged is not None)
    assert file.read_bytes() == whole


def test_files_of_the_user_in_the_directory_of_a_run_are_kept(
    checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run may be told to write into a project, or beside the run.yaml that it was started from."""
    own = {
        "README.md": "# My project",
        "report.html": "<html><body>mine</body></html>",
        "run.yaml": "optim: {lr: 1}  # mine",
        "log.jsonl": '{"epoch": 1}\n',
    }
    given = {**QUICK, "out": tmp_path, "quiet": False}
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    for again in range(2):  # what the run has written itself is replaced
        pretrain.finetune(checkpoint, rows_of(), "classification", **given).report()
        assert {name: (tmp_path / f"{name}.other").read_text() for name in own} == own
        assert not list(tmp_path.glob("*.other1"))
        said = capfd.readouterr().err
        assert said.count("was not written by a run") == (0 if again else 4)
    assert "Made with `pretrain`" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("notes on this experiment")
    pretrain.finetune(checkpoint, rows_of(), "classification", **given).report()
    assert (tmp_path / "README.md.other1").read_text() == "notes on this experiment"
