"""The small files of a run that name a choice are believed only where they hold."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import (
    TrainingState,
    inspect,
    load,
    read_training,
    save_checkpoint,
)
from pretrain.checkpoint.best import (
    BEST,
    SWEEP,
    best_first,
    rates_of_run,
    run_around,
    training_checkpoint,
    write_choice,
)
from pretrain.checkpoint.result import write_result
from pretrain.models import build


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("good")
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_positions": 8, "vocab_size": 9}
    model = build("gpt2", **sizes)
    for step in (5, 9):
        state = TrainingState({}, {"run": {"best_step": 5, "lr": 0.01}, "step": step})
        save_checkpoint(run, model, step=step, tokens=1, pretrain_block={}, training=state)
    write_choice(run / BEST, {"checkpoint": "checkpoint-5"})
    write_choice(run / SWEEP, {"lr": 0.01})
    return run


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def chosen(run: Path) -> tuple[str, float | None]:
    return best_first(run)[0].name, rates_of_run(run).get("lr")


def test_what_was_written_is_read_in_silence(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert chosen(run) == ("checkpoint-5", 0.01)
    (run / BEST).write_text('{"checkpoint": "checkpoint-5"}\n')  # as an older version wrote them
    (run / SWEEP).write_text('{"lr": 0.01}')
    assert chosen(run) == ("checkpoint-5", 0.01)
    for name in (BEST, SWEEP):  # as in a run that was killed
        (run / name).unlink()
    assert chosen(run) == ("checkpoint-5", 0.01)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", [BEST, SWEEP])
def test_every_damage_is_named_and_the_state_is_believed(
    run: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rng, whole = random.Random(0), (run / name).read_bytes()
    damaged = [whole[:k] for k in range(0, len(whole), 7)] + [whole + b" ", bytes(len(whole))]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    other = {"checkpoint": "checkpoint-9"} if name == BEST else {"lr": 0.02}
    wrong = {"checkpoint": "checkpoint-7"} if name == BEST else {"lr": 1e308 * 10}
    damaged += [json.dumps(other).encode(), json.dumps(wrong).encode()]
    write_choice(run / name, other)
    for data in [(run / name).read_bytes(), *damaged]:
        (run / name).write_bytes(data)
        assert chosen(run) == ("checkpoint-5", 0.01), data
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and name in said[0], data


def test_without_a_state_a_damaged_choice_is_named(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 9):
        shutil.rmtree(run / f"checkpoint-{step}" / "training")
    assert chosen(run) == ("checkpoint-5", 0.01)
    for name in (BEST, SWEEP):
        (run / name).write_bytes(b"\0")
    assert chosen(run) == ("checkpoint-9", None)
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_training_of_a_result_that_loading_skips_and_of_another_directory_called_model(
    run: Path, tmp_path: Path
) -> None:
    write_result(run, run / "checkpoint-5")
    (run / "model" / "manifest.json").write_bytes(b"{")
    assert training_checkpoint(run) == run / "checkpoint-5"
    plain = tmp_path / "plain" / "model"
    load(run / "checkpoint-5", quiet=True).save(plain)
    (plain / "manifest.json").unlink(missing_ok=True)
    assert training_checkpoint(plain) == plain


def test_opening_a_run_opens_its_result(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """For both kinds of runs; training goes on from the newest checkpoint nevertheless."""
    (run / BEST).unlink()  # which pre-training does not write
    write_result(run, run / "checkpoint-5")
    assert load(run, quiet=True).source == str(run / "model")
    assert training_checkpoint(run) == run / "checkpoint-5"
    assert read_training(run, quiet=True).state["step"] == 9
    found = inspect(run)
    assert (found["checkpoint"], found["step"], found["resumable"]) == ("model", 5, True)
    shutil.rmtree(run / "checkpoint-5")
    assert chosen(run)[0] == "model" and capfd.readouterr().err == ""
    (run / "checkpoint-9" / "model.safetensors").write_bytes(b"")
    assert "checkpoint-9" in inspect(run)["manifest"] and load(run, quiet=True)
    (run / "model" / "manifest.json").write_bytes(b"")
    assert best_first(run)[0].name == "model", "a damaged result must be reported"


def test_a_result_without_a_manifest_is_not_used_and_named(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_result(run, run / "checkpoint-5")
    (run / "model" / "manifest.json").unlink()
    capfd.readouterr()
    assert Path(str(load(run, quiet=True).source)).name == "checkpoint-5"
    assert "model has no manifest.json" in capfd.readouterr().err


def test_only_opening_a_run_speaks_of_its_files(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain" / "model"  # a directory of other software with the name of a result
    load(run / "checkpoint-5", quiet=True).save(plain)
    (plain / "manifest.json").unlink()
    capfd.readouterr()
    assert run_around(plain) is None and best_first(plain.parent) == []
    (run / BEST).write_text("{")
    for path in (run, run / "checkpoint-5", run / "checkpoint-7", run / "model"):
        assert run_around(path) == run
    assert capfd.readouterr().err == ""


def test_a_run_that_goes_on_may_have_a_better_checkpoint(run: Path) -> None:
    (run / BEST).unlink()
    write_result(run, run / "checkpoint-5")
    model = load(run / "checkpoint-9", quiet=True)
    state = TrainingState({}, {"run": {"best_step": 12}})
    save_checkpoint(run, model, step=12, tokens=1, pretrain_block={}, training=state, keep=9)
    assert [path.name for path in best_first(run)][::3] == ["checkpoint-12", "model"]
    write_result(run, run / "checkpoint-12")
    assert chosen(run)[0] == "model"
