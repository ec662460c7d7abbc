"""The story of the first command, on a small corpus and library; the README's own command is run by .ci/run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pretrain
from pretrain.cli import quickstart as story
from pretrain.data.sources import PythonSource
from pretrain.errors import ConfigError
from pretrain.printing import discard

ROOT = Path(__file__).resolve().parents[2]


PLACE = "runs/with blank"
REAL_CONFIG = story.config
WORDS = {"http": "request header status socket", "xml": "node tree element attribute"}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The whole story, told once: its folder, what was said, what came of it.

    The corpus is a few files instead of the standard library, the labelled rows are of two small packages, and all of
    it takes a few steps.
    """
    folder = tmp_path_factory.mktemp("quickstart")
    source = folder / "corpus"
    source.mkdir()
    for path in sorted((ROOT / "src" / "pretrain").glob("*.py"))[:12]:
        (source / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8"))
    (source / "held-out.txt").write_text("def held_out(self):\n    return None\n" * 40)
    library = PythonSource()
    library.root = folder / "library"
    for package, words in WORDS.items():
        (library.root / package).mkdir(parents=True)
        for k in range(8):
            lines = (f"{word}_{k} = {n} # {words}" for n in range(6) for word in words.split())
            (library.root / package / f"m{k}.py").write_text("\n".join(lines))
    settings, how = story.config, story.task

    def smaller(kind, data, out, minutes, seed=0):
        plain = settings(kind, data, out, minutes, seed)
        plain["train"] |= {"batch_rows": 2, "eval_rows": 2, "limit": "4 steps"}
        width = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_layers": 2}
        width |= {"num_kv_heads": 1} if kind == "gpt" else {}
        plain["model"]["overrides"] = plain["model"].get("overrides", {}) | width
        return plain

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {
            "_VOCAB_SIZE": 300, "_ROW_LENGTH": 32, "_RESERVE_SECONDS": 0.0, "_COUNTS": (8, 2, 6), "_LABELS": (8,),
            "_SEEDS": 2, "_LRS": (1e-3,), "_FEWEST_STEPS": 2, "_MOST_STEPS": 2, "config": smaller,
            "_library": lambda: library, "_corpus": lambda rows: str(source),
            "task": lambda steps, counts, seed=0: how(steps, counts, seed) | {"max_length": 24},
        }.items():  # fmt: skip
            patch.setattr(story, name, value)
        patch.setenv("PRETRAIN_CACHE", str(folder / "cache"))
        said: list[str] = []
        result = story.quickstart(out=PLACE, minutes=0.05, say=said.append)
        yield SimpleNamespace(folder=folder, said=said, result=result)


def test_the_whole_story(told):
    text, result = "\n".join(told.said), told.result
    assert result["exit_code"] == 0
    assert result["run"] == PLACE
    for name in ("checkpoint", "encoder"):
        assert Path(result[name], "manifest.json").is_file()
    for path in (result["report"], Path(result["finetuned"], "report.html")):
        assert Path(path).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert set(result["samples"]) == set(story.PROMPTS)
    assert result["metrics"]["loss"] > 0 and result["seconds"] > 0
    assert {"pretrained", "scratch"} <= set(result["comparison"].arms)
    assert result["comparison"].verdict(8) in text, "the verdict is said as it is"
    for words in (
        "1. Data",
        "2. A GPT-like",
        "3. A BERT-like",
        "4. Fine-tuning",
        "What to type next",
    ):
        assert words in text, words
    for path in (result["checkpoint"], result["report"], result["finetuned"]):
        assert path in text
    assert len(text.splitlines()) <= 40


def test_labelled_rows_are_written_for_the_user(told):
    parts = {}
    for name, count in (("train", 16), ("valid", 4), ("test", 12)):
        lines = Path(told.result["rows"], f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts[name] = [json.loads(line) for line in lines]
        assert len(parts[name]) == count
        assert {row["label"] for row in parts[name]} == set(WORDS)
    seen = {row["file"] for row in parts["train"]}
    assert not seen & {row["file"] for row in parts["valid"] + parts["test"]}


def test_the_fine_tuned_model_answers_the_rows(told):
    rows = [{"text": "node_1 = 1 # node tree element attribute"}]
    (found,) = pretrain.load(told.result["finetuned"]).predict(rows)
    assert found["label"] in WORDS


def test_the_same_command_again_finds_what_is_there(told):
    again = story.quickstart(out=PLACE, minutes=0.05, say=lambda line: None)
    for name in ("checkpoint", "encoder", "finetuned", "samples"):
        assert again[name] == told.result[name], name
    for arm in ("pretrained", "scratch"):
        assert again["comparison"].arms[arm] == told.result["comparison"].arms[arm]


def test_what_it_tells_to_type_is_understood(told, monkeypatch):
    """Every command line of the ending is one that the command line takes."""
    import dataclasses
    import shlex

    from pretrain.cli import main as cli

    lines = [line.strip() for line in told.said[-1].split("What to type next:")[1].splitlines()]
    lines = [line for line in lines if line.startswith("pretrain ")]
    assert [line.split()[1] for line in lines] == ["generate", "predict", "train", "finetune"]
    for line in lines:
        words = shlex.split(line)[1:]
        command = dataclasses.replace(cli.COMMANDS[words[0]], run=lambda arguments: None)
        monkeypatch.setitem(cli.COMMANDS, words[0], command)
        assert cli.main(words) == 0, line


def _finished(told, **changes):
    """What `pretrain.train` returns for a run that is there already."""
    plain = {
        "path": Path(PLACE), "checkpoint": Path(told.result["checkpoint"]).resolve(), "stopped": "limit",
        "exit_code": 0, "metrics": {}, "history": [], "step": 4,
    }  # fmt: skip
    return SimpleNamespace(**plain | changes)


def test_interrupted_training_is_reported_and_ends_with_the_code_of_the_signal(told, monkeypatch):
    run = _finished(told, stopped="SIGINT", exit_code=128 + signal.SIGINT)
    monkeypatch.setattr(pretrain, "train", lambda *args, **options: run, raising=False)
    said: list[str] = []
    result = story.quickstart(out=PLACE, minutes=0.05, say=said.append)
    assert result["exit_code"] == 130 and result["comparison"] is None
    assert "Stopped by SIGINT" in said[-1] and "goes on from there" in said[-1]
    assert result["checkpoint"] in said[-1]


@pytest.mark.parametrize("how", ["stopped by SIGTERM", "interrupted"])
def test_interrupted_fine_tuning_names_what_is_kept(told, how, monkeypatch):
    def finetune(*args, out, **options):
        if how == "interrupted":
            (Path(out) / "checkpoint-1").mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        return SimpleNamespace(run=_finished(told, stopped="SIGTERM", exit_code=143))

    run = _finished(told, step=99 if how == "interrupted" else 98)
    monkeypatch.setattr(pretrain, "train", lambda *args, **options: run, raising=False)
    monkeypatch.setattr(pretrain, "finetune", finetune, raising=False)
    said: list[str] = []
    result = story.quickstart(out=PLACE, minutes=0.05, say=said.append)
    assert result["exit_code"] == (130 if how == "interrupted" else 143)
    kept = "packages-from-99" if how == "interrupted" else result["encoder"]
    assert kept in said[-1] and "goes on from there" in said[-1]


@pytest.mark.parametrize("value", ["", "soon", "nan", "-1", "0", "1e9"])
def test_a_budget_that_is_none_is_a_sentence(value, monkeypatch):
    monkeypatch.setenv("PRETRAIN_QUICKSTART_MINUTES", value)
    with pytest.raises(ConfigError, match="PRETRAIN_QUICKSTART_MINUTES"):
        story.quickstart()
    with pytest.raises(ConfigError, match="minutes"):
        story.quickstart(minutes=float("nan"))


def test_budget_comes_from_argument_environment_default(monkeypatch):
    monkeypatch.delenv("PRETRAIN_QUICKSTART_MINUTES", raising=False)
    assert story._budget(None) == story.MINUTES
    monkeypatch.setenv("PRETRAIN_QUICKSTART_MINUTES", "0.5")
    assert story._budget(None) == 0.5
    assert story._budget(2.0) == 2.0


def test_settings_are_valid_as_they_stand():
    """The real settings, not the small ones above, are accepted by the strict configuration."""
    for kind, objective in (("gpt", "NextToken"), ("bert", "MaskedLM")):
        settings = pretrain.RunConfig.load(REAL_CONFIG(kind, "data/x", "runs/x", 3.2, seed=1))
        assert settings.data.train == "data/x" and settings.train.seed == 1
        assert settings.train.limit == "3.2000 minutes"
        assert settings.objective.class_path == objective


@pytest.mark.parametrize(("pace", "steps"), [(0.0, 8), (1.0, 8), (10_000.0, 24), (1e9, 80)])
def test_steps_of_fine_tuning_follow_the_pace_and_stay_in_bounds(pace, steps, monkeypatch):
    for name, value in {
        "_LRS": (1e-3, 3e-3), "_LABELS": (128, 512), "_SEEDS": 3, "_BATCH": 16, "_MAX_LENGTH": 160,
        "_FEWEST_STEPS": 8, "_MOST_STEPS": 80, "_RESERVE_SECONDS": 20.0,
    }.items():  # fmt: skip
        monkeypatch.setattr(story, name, value)
    part = story._Quickstart("runs/x", 5.0, 0, lambda line: None)
    # Of 300 s, 20 are kept back; 100 s of what is left were spent before this phase.
    part.began -= 160.0
    run = SimpleNamespace(history=[{"tokens": int(pace * 10), "seconds": 10.0}])
    rows = SimpleNamespace(valid=[0] * 120, test=[0] * 320)
    assert part.steps(run, rows, 2) == pytest.approx(steps, abs=1)
    assert part.steps(SimpleNamespace(history=[]), rows, 2) == 8


def test_figure_script_draws_the_run(told):
    for extra in (
        [],
        ["--x", "tokens", "--reference", "unigram=5.1"],
        [PLACE, "--metric", "accuracy"],
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "docs" / "figures.py", PLACE, *extra, "--out", "new/curve.svg"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert Path("new/curve.svg").read_text(encoding="utf-8").startswith("<svg")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "figures.py", "no-such-run", "--out", "x.svg"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "no log.jsonl" in done.stderr


def test_the_story_goes_on_without_its_reader(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        say = story._printer()
        say("one")
        say("two")
        discard(full)
