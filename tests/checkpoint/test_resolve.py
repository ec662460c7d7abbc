"""Which directory is opened, of runs, their checkpoints and results, and directories of other software."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import TrainingState, inspect, load, read_training, save_checkpoint
from pretrain.checkpoint.best import BEST
from pretrain.checkpoint.meta_loading import open_on_meta
from pretrain.checkpoint.peers import SINGLE_PROCESS
from pretrain.checkpoint.resolve import (
    enclosing_run,
    model_candidates,
    models_of_run,
    resolve_model_directory,
    run_by_name,
    run_with_settings,
    training_state_directory,
)
from pretrain.checkpoint.result import write_result
from pretrain.errors import PretrainError


def test_training_of_a_result_that_loading_skips_and_of_another_directory_called_model(
    run: Path, tmp_path: Path
) -> None:
    write_result(run, run / "checkpoint-5")
    (run / "model" / "manifest.json").write_bytes(b"{")
    assert training_state_directory(run) == run / "checkpoint-5"
    plain = tmp_path / "plain" / "model"
    load(run / "checkpoint-5", quiet=True).save(plain)
    (plain / "manifest.json").unlink(missing_ok=True)
    assert training_state_directory(plain) == plain


def test_opening_a_run_opens_its_result(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """For both kinds of runs; training goes on from the newest checkpoint nevertheless."""
    (run / BEST).unlink()  # which pre-training does not write
    write_result(run, run / "checkpoint-5")
    assert load(run, quiet=True).source == str(run / "model")
    assert training_state_directory(run) == run / "checkpoint-5"
    assert read_training(run, quiet=True).state["step"] == 9
    found = inspect(run)
    assert (found["checkpoint"], found["step"], found["resumable"]) == ("model", 5, True)
    shutil.rmtree(run / "checkpoint-5")
    assert models_of_run(run)[0].name == "model" and capfd.readouterr().err == ""
    (run / "checkpoint-9" / "model.safetensors").write_bytes(b"")
    assert "checkpoint-9" in inspect(run)["manifest"] and load(run, quiet=True)
    (run / "model" / "manifest.json").write_bytes(b"")
    assert models_of_run(run)[0].name == "model", "a damaged result must be reported"


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
    assert enclosing_run(plain) is None and models_of_run(plain.parent) == []
    (run / BEST).write_text("{")
    for path in (run, run / "checkpoint-5", run / "checkpoint-7", run / "model"):
        assert enclosing_run(path) == run
    assert capfd.readouterr().err == ""


def test_a_run_that_goes_on_may_have_a_better_checkpoint(run: Path) -> None:
    (run / BEST).unlink()
    write_result(run, run / "checkpoint-5")
    model = load(run / "checkpoint-9", quiet=True)
    state = TrainingState({}, {"run": {"best_step": 12}})
    save_checkpoint(run, model, step=12, tokens=1, pretrain_block={}, training=state, keep=9)
    assert [path.name for path in models_of_run(run)][::3] == ["checkpoint-12", "model"]
    write_result(run, run / "checkpoint-12")
    assert models_of_run(run)[0].name == "model"


def test_a_directory_with_a_configuration_is_opened_itself_whatever_lies_in_it(
    run: Path,
) -> None:
    """As a Trainer of transformers leaves it, with its checkpoints inside; also where each rank reads its shards."""
    assert resolve_model_directory(run) == model_candidates(run)[0] == run / "checkpoint-5"
    for name in ("adapter_config.json", "config.json"):
        (run / name).write_text("{}")
        assert resolve_model_directory(run) == run and model_candidates(run) == []
        with pytest.raises(PretrainError):
            open_on_meta(run, SINGLE_PROCESS)
        (run / name).unlink()
    assert open_on_meta(run, SINGLE_PROCESS)[1] == run / "checkpoint-5"


def test_the_run_around_a_path_by_its_name_its_checkpoints_and_its_settings(run: Path) -> None:
    inside = [run, run / "checkpoint-7", run / "model"]  # whether they exist or not
    assert {run_by_name(path) for path in inside} == {run}
    assert run_by_name(run / "copy") == run / "copy" and enclosing_run(run / "copy") is None
    assert run_with_settings(run) is None
    (run / "run.yaml").write_text("")
    assert {run_with_settings(path) for path in (*inside, run / "copy")} == {run}
    assert run_with_settings(run.parent) is None
