"""The story of the first command, on a small corpus; the README's own command is run by .ci/run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pretrain
from pretrain import quickstart as story
from pretrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A corpus of a few files instead of the standard library, and little time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, "_VOCAB_SIZE", 300)
    monkeypatch.setattr(story, "_ROW_LENGTH", 32)
    monkeypatch.setattr(story, "_RESERVE_SECONDS", 0.0)
    source = tmp_path / "corpus"
    source.mkdir()
    for path in sorted((ROOT / "src" / "pretrain").glob("*.py"))[:12]:
        (source / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8"))
    (source / "held-out.txt").write_text("def held_out(self):\n    return None\n" * 40)
    monkeypatch.setattr(story, "_SOURCE", str(source))
    settings = story.config

    def smaller(out, minutes, seed=0):
        plain = settings(out, minutes, seed)
        plain["model"]["size"] = "tiny"
        plain["train"] |= {"batch_rows": 2, "eval_rows": 2, "limit": "4 steps"}
        plain["data"]["valid"] = 0.3
        return plain

    monkeypatch.setattr(story, "config", smaller)
    return tmp_path


def test_the_whole_story(small):
    said: list[str] = []
    result = story.quickstart(minutes=0.05, say=said.append)
    text = "\n".join(said)
    assert result["exit_code"] == 0
    assert result["run"] == "runs/quickstart"
    assert Path(result["checkpoint"], "manifest.json").is_file()
    assert Path(result["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert set(result["samples"]) == set(story.PROMPTS)
    assert result["metrics"]["loss"] > 0 and result["seconds"] > 0
    for words in (
        "1. Data",
        "2. Training",
        "3. What it writes",
        "Checkpoint",
        "Report",
        "What to type next",
    ):
        assert words in text, words
    assert result["checkpoint"] in text and result["report"] in text

    # The same command again finds everything done and says the same things.
    again = story.quickstart(minutes=0.05, say=said.append)
    assert again["checkpoint"] == result["checkpoint"] and again["samples"] == result["samples"]


def test_what_it_tells_to_type_is_understood(small, monkeypatch):
    """Every command line of the ending is one that the command line takes."""
    import dataclasses
    import shlex

    from pretrain import cli

    said: list[str] = []
    story.quickstart(out="runs/with blank", minutes=0.05, say=said.append)
    lines = [line.strip() for line in said[-1].split("What to type next:")[1].splitlines()]
    lines = [line for line in lines if line.startswith("pretrain ")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)[1:]
        command = dataclasses.replace(cli.COMMANDS[words[0]], run=lambda arguments: None)
        monkeypatch.setitem(cli.COMMANDS, words[0], command)
        assert cli.main(words) == 0, line


def test_interrupted_training_is_reported_and_ends_with_the_code_of_the_signal(small, monkeypatch):
    story.quickstart(minutes=0.05, say=lambda line: None)
    stopped = SimpleNamespace(
        path=Path("runs/quickstart"),
        checkpoint=Path("runs/quickstart/checkpoint-4").resolve(),
        stopped="SIGINT",
        exit_code=128 + signal.SIGINT,
        metrics={},
    )
    monkeypatch.setattr(pretrain, "train", lambda *args, **options: stopped, raising=False)
    said: list[str] = []
    result = story.quickstart(minutes=0.05, say=said.append)
    assert result["exit_code"] == 130
    assert "Stopped by SIGINT" in said[-1] and "goes on from there" in said[-1]


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
    settings = pretrain.RunConfig.load(story.config("runs/x", 3.2, seed=1))
    assert settings.data.train == "python" and settings.train.seed == 1
    assert settings.train.limit == "3.2000 minutes"


def test_figure_script_draws_the_run(small):
    story.quickstart(minutes=0.05, say=lambda line: None)
    for extra in (
        [],
        ["--x", "tokens", "--reference", "unigram=5.1"],
        ["runs/quickstart", "--metric", "accuracy"],
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "docs" / "figures.py", "runs/quickstart", *extra, "--out", "new/curve.svg"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert Path("new/curve.svg").read_text(encoding="utf-8").startswith("<svg")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "figures.py", "no-such-run", "--out", "x.svg"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "no log.jsonl" in done.stderr
