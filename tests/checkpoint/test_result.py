"""The result of a run: the best checkpoint under a name that never changes and never vanishes, at no cost."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pretrain
import tiny
from faults.faulty_io import FaultyIO
from faults.test_io_faults import fork, killings
from pretrain.checkpoint import latest, save_checkpoint, verify
from pretrain.checkpoint.manifest import read_manifest, rotate
from pretrain.checkpoint.result import restore_best, write_result
from pretrain.errors import CheckpointError
from pretrain.lora import apply_lora
from pretrain.models import build
from pretrain.utils import files

transformers.logging.set_verbosity_error()
SIZES = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_positions": 16}


def saved(run: Path, step: int, *, model: Any = None) -> Path:
    """A checkpoint of a model whose weights depend on the step."""
    model = model or build("gpt2", seed=step, tokenizer=tiny.tokenizer(), **SIZES)
    return save_checkpoint(run, model, step=step, tokens=step, pretrain_block={}, keep=9)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return pretrain.load(directory, quiet=True).state_dict()


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_ends_with_its_best_checkpoint(tmp_path: Path, capfd: Any) -> None:
    goal, rows = tiny.objective(), tiny.Rows(12)
    options = {"eval_rows": tiny.Rows(4, seed=1), "eval_every": "2 steps", "save_every": "2 steps"}
    run = tiny.trainer(tmp_path, goal, rows, limit="4 steps", **options).fit()
    place = tmp_path / "model"
    assert run.result == place and run.best is not None and same(place, run.best)
    assert capfd.readouterr().err.rstrip().endswith(f"done at step 4: {place}")
    verify(place)
    assert not (place / "training").exists() and (place / "tokenizer.json").is_file()
    longer = tiny.trainer(tmp_path, tiny.objective(), rows, limit="8 steps", keep=1, **options)
    again = longer.fit()  # resumed, although there is another directory with a model; and rotated
    assert again.step == 8 and again.best is not None and same(place, again.best)
    assert read_manifest(place).step == int(again.best.name.rpartition("-")[2])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place)
    ids = torch.tensor([[5, 6, 7]])
    ours = pretrain.load(place, quiet=True)({"input_ids": ids})
    torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5, rtol=1e-5)


def test_it_costs_no_room_and_an_edit_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1)
    place = write_result(tmp_path, checkpoint)
    inodes = [(folder / "model.safetensors").stat().st_ino for folder in (place, checkpoint)]
    assert inodes[0] == inodes[1], "the weights lie on the disk twice"
    assert not (place / "model.safetensors").stat().st_mode & 0o222
    for name in os.listdir(place):
        if not name.endswith(".safetensors"):
            (place / name).write_bytes(b"edited")
    pretrain.load(checkpoint, quiet=True).save(place)  # what this package writes, it writes anew
    verify(checkpoint)
    assert latest(tmp_path) == checkpoint
    shutil.rmtree(checkpoint)
    verify(place)  # also without the checkpoint that it was made from
    assert rotate(tmp_path, keep=1) == [] and pretrain.load(tmp_path, quiet=True).source


def test_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links")

    monkeypatch.setattr(files.IO, "link", refuse)
    monkeypatch.setattr(files.IO, "exchange", lambda first, second: False)
    for step in (1, 2):
        checkpoint = saved(tmp_path, step)
        place = write_result(tmp_path, checkpoint)
        assert same(place, checkpoint)
        assert (place / "model.safetensors").stat().st_nlink == 1
    verify(place)


def test_an_adapter_is_a_directory_of_peft(tmp_path: Path) -> None:
    base = build("gpt2", tokenizer=tiny.tokenizer(), **SIZES)
    adapted = apply_lora(pretrain.load(base.save(tmp_path / "base"), quiet=True))
    place = write_result(tmp_path / "run", saved(tmp_path / "run", 3, model=adapted))
    assert {"adapter_config.json", "adapter_model.safetensors", "pretrain.json"} <= set(
        os.listdir(place)
    )
    assert not (place / "config.json").exists() and pretrain.load(place, quiet=True).adapter
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(place)


def test_it_is_there_at_every_moment(tmp_path: Path) -> None:
    checkpoints = [saved(tmp_path, step) for step in (1, 2)]
    place, stop, gone = write_result(tmp_path, checkpoints[0]), threading.Event(), list[str]()
    if not files.IO.exchange(place, checkpoints[0]):
        pytest.skip("this file system cannot swap two names")
    files.IO.exchange(place, checkpoints[0])

    def watch() -> None:
        while not stop.is_set():
            if not place.is_dir():
                gone.append("the directory was missing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    for k in range(30):
        write_result(tmp_path, checkpoints[k % 2])
    stop.set()
    watcher.join()
    assert not gone and same(place, checkpoints[1])


@pytest.mark.parametrize("code", ["", "ENOSPC"])
def test_killed_or_refused_at_every_call(tmp_path: Path, monkeypatch: Any, code: str) -> None:
    base = tmp_path / "base"
    bare = [build("gpt2", seed=step, vocab_size=9, **SIZES) for step in (1, 2)]
    old, new = (saved(base, step, model=bare[step - 1]) for step in (1, 2))
    wanted = read_manifest(new).required
    write_result(base, old)
    io = FaultyIO()
    shutil.copytree(base, tmp_path / "dry")
    with monkeypatch.context() as patch:
        patch.setattr(files, "IO", io)
        write_result(tmp_path / "dry", tmp_path / "dry" / new.name)
    assert {"link", "exchange"} <= {name for name, _ in io.calls}
    cases = killings(io.calls) if not code else ((n, code) for n in range(len(io.calls)))
    for number, how in list(cases)[:: 1 if not code else 3]:
        run = tmp_path / f"{number}-{how}"
        shutil.copytree(base, run)
        ended = fork(
            lambda run=run: write_result(run, run / new.name),  # type: ignore[misc]
            FaultyIO(number, how),
        )
        assert code or not ended
        verify(run / "model")  # the old one or the new one
        assert read_manifest(run / "model").step in (1, 2)
        place = write_result(run, run / new.name)
        verify(place)
        assert read_manifest(place).required == wanted and read_manifest(place).step == 2
        assert sorted(os.listdir(run)) == ["checkpoint-1", "checkpoint-2", "model"], (number, how)
        shutil.rmtree(run)


def test_what_others_put_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="Move it away"):
        tiny.trainer(tmp_path, tiny.objective(), tiny.Rows(8), limit="2 steps").fit()
    assert not list(tmp_path.glob("checkpoint-*")), "said only after the work was done"
    with pytest.raises(CheckpointError, match="is not replaced"):
        write_result(tmp_path, saved(tmp_path, 1))
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"


def test_a_read_only_directory_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = saved(tmp_path, 1)
    write_result(tmp_path, checkpoint)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(files.IO, "mkdir", refuse)
    assert write_result(tmp_path, checkpoint) == tmp_path / "model"  # there is nothing to do
    with pytest.raises(CheckpointError, match=r"model cannot be written"):
        write_result(tmp_path, saved_elsewhere(tmp_path, monkeypatch))


def saved_elsewhere(run: Path, monkeypatch: Any) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(files, "IO", files.FileIO())
        return saved(run, 2)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_best_checkpoint_that_was_deleted_is_made_again(tmp_path: Path, adapter: bool) -> None:
    model = build("gpt2", seed=3, tokenizer=tiny.tokenizer(), **SIZES)
    if adapter:
        base = model.save(tmp_path / "base")
        model = pretrain.load(base, quiet=True)
        apply_lora(model)
    run = tmp_path / "run"
    best = saved(run, 3, model=model)
    write_result(run, best)
    before, listed = weights(best), set(read_manifest(best).required)
    assert restore_best(run, 3) == "there" and restore_best(run, 4) == "lost"
    shutil.rmtree(best)
    assert restore_best(run, 3) == "restored"
    verify(best)
    assert set(read_manifest(best).required) == listed
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(best).items())
    shutil.rmtree(best)
    (run / "model" / "tokenizer.json").unlink()
    assert restore_best(run, 3) == "lost" and not best.exists()
    shutil.rmtree(run / "model")
    assert restore_best(run, 3) == "lost"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_or_edited_result_does_not_become_the_best(tmp_path: Path, name: str) -> None:
    """Its files may have the sizes that the manifest lists. A file beside them does no harm."""
    run = tmp_path / "run"
    best = saved(run, 3)
    write_result(run, best)
    shutil.rmtree(best)
    file = run / "model" / name
    (run / "model" / "model.onnx").write_bytes(b"exported")
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    assert restore_best(run, 3) == "lost" and not best.exists()
    file.write_bytes(whole)
    assert restore_best(run, 3) == "restored"
    verify(best)


@pytest.mark.parametrize("texts", [None, {"README.md": b"a newer card"}])
def test_what_was_changed_or_added_in_a_result_is_kept_beside_it(
    tmp_path: Path, capfd: Any, texts: Any
) -> None:
    """A card is edited before it is pushed, and a licence or an exported model put beside it."""
    run = tmp_path / "run"
    write_result(run, saved(run, 3))
    result = run / "model"
    for k in range(2):
        capfd.readouterr()
        (result / "README.md").write_text(f"my own words {k}")
        (result / "LICENSE").write_text("mine")
        (result / "onnx").mkdir()
        (result / "onnx" / "model.onnx").write_bytes(b"exported")
        (result / ".DS_Store").write_bytes(b"")
        weight, other = result / "model.safetensors", run / "other"
        other.write_bytes(bytes(weight.stat().st_size))  # as another program saves a model there
        other.replace(weight)
        (result / "link").symlink_to("LICENSE")
        write_result(run, saved(run, 6 + k), texts)
        verify(result)
        aside = run / ("model.other1" if k else "model.other")
        kept = {p.relative_to(aside).as_posix() for p in aside.rglob("*") if p.is_file()}
        assert kept == {"README.md", "LICENSE", "model.safetensors", "onnx/model.onnx"}
        assert (aside / "README.md").read_text() == f"my own words {k}"
        assert (
            f"kept in {aside}: LICENSE, README.md, model.safetensors, onnx/model.onnx."
            in capfd.readouterr().err
        )
    write_result(run, saved(run, 9), texts)
    assert capfd.readouterr().err == "" and not (run / "model.other2").exists()
