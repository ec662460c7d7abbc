"""The directory that `prepare` writes: nothing of anybody else is ever replaced, and what is damaged is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pretrain
from pretrain.data.prepare import Prepared
from pretrain.data.tokenizer import train_from_texts
from pretrain.data.workdir import build, foreign, publish, sweep
from pretrain.errors import DataError, PretrainError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {k} says hello to {k * k} others"}) for k in range(20)]
    file.write_text("\n".join(lines) + "\n")
    return file


def prepare(source: Path, out: Path, **options: Any) -> Prepared:
    return pretrain.prepare(
        source, out, **{"tokenizer": "char", "row_length": 64, "quiet": True} | options
    )


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_template_of_a_tokenizer_belongs_to_the_prepared_data(
    source: Path, tmp_path: Path
) -> None:
    tokenizer = train_from_texts(["document says hello"], "bpe", vocab_size=280)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save(tmp_path / "tok")
    first, again = (prepare(source, tmp_path / "out", tokenizer=tmp_path / "tok") for _ in range(2))
    assert (tmp_path / "out" / "tokenizer" / "chat_template.jinja").exists()
    assert first.train.num_tokens == again.train.num_tokens


def test_out_that_is_a_checkpoint_is_never_replaced(source: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    (checkpoint / "training").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"schema": 1, "files": {}}')
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "training" / "state.json").write_text("{}")
    before = listing(checkpoint)
    with pytest.raises(DataError, match=r"not prepared data: 'model\.safetensors'"):
        prepare(source, checkpoint)
    assert listing(checkpoint) == before
    with pytest.raises(DataError, match="belongs to a checkpoint") as told:
        Prepared.open(checkpoint)
    assert "delete" not in str(told.value)


@pytest.mark.parametrize("text", ['{"name": "my app"}', "[1]", "{", '{"format": 7}', ""])
def test_out_with_a_manifest_of_something_else(source: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "site"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    with pytest.raises(DataError) as told:
        prepare(source, out)
    assert "delete" not in str(told.value)
    assert listing(out) == {"manifest.json": text.encode()}


def test_damaged_manifest(source: Path, tmp_path: Path) -> None:
    data = prepare(source, tmp_path / "out")
    (data.path / "manifest.json").write_text('{"format": 1,')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Prepared.open(data.path)
    (data.path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        Prepared.open(data.path)


def test_out_that_is_something_else(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "photos" / "a.jpg"
    precious.parent.mkdir()
    precious.write_bytes(b"x")
    with pytest.raises(DataError, match="is not prepared data"):
        prepare(source, tmp_path / "photos")
    assert precious.exists()
    with pytest.raises(DataError, match="is a file"):
        prepare(source, precious)


def test_out_with_a_stranger_among_our_files(source: Path, tmp_path: Path) -> None:
    data = prepare(source, tmp_path / "out")
    for stranger in ("notes.md", "tokenizer/merges.txt"):
        (data.path / stranger).write_text("precious")
        for row_length in (64, 32):
            with pytest.raises(DataError, match=stranger):
                prepare(source, data.path, row_length=row_length)
        assert (data.path / stranger).read_text() == "precious"
        (data.path / stranger).unlink()
    assert prepare(source, data.path, row_length=32).row_length == 32


def test_publish_refuses_what_came_meanwhile(source: Path, tmp_path: Path) -> None:
    data = prepare(source, tmp_path / "out")
    shutil.copytree(data.path, tmp_path / "work")
    (data.path / "late.txt").write_text("x")
    with pytest.raises(DataError, match=r"late\.txt"):
        publish(tmp_path / "work", data.path)
    assert (data.path / "late.txt").exists()


def test_out_behind_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    prepare(source, tmp_path / "link")
    assert prepare(source, tmp_path / "link", row_length=32).row_length == 32
    assert (tmp_path / "link").is_symlink()
    assert Prepared.open(tmp_path / "real").row_length == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "link", "real"]


def test_out_is_the_current_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here [1]").mkdir()
    monkeypatch.chdir(tmp_path / "here [1]")
    prepare(source, Path("."))
    monkeypatch.chdir(tmp_path)
    assert prepare(source, tmp_path / "here [1]").path.name == "here [1]"


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_kill_between_the_two_renames_is_repaired(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = listing(prepare(source, out).path)
    old = tmp_path / f".out.old-{dead_pid()}"
    out.rename(old)  # killed here: the new data have no name yet
    says: list[str] = []
    sweep(out, says.append)
    assert listing(out) == whole and not old.exists() and "renamed back" in says[0]
    shutil.copytree(out, old)  # killed later: the new data stand, the old ones were not removed
    assert listing(prepare(source, out).path) == whole and not old.exists()


def test_sweep_leaves_what_is_not_ours(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out")
    kept = [
        tmp_path / f".out.old-{os.getppid()}",  # a live process
        tmp_path / ".out.old-copy",
        tmp_path / f".output.old-{dead_pid()}",
        tmp_path / f".out.old-{dead_pid()}",  # holds a stranger
    ]
    for folder in kept:
        folder.mkdir()
        (folder / "a.txt").write_text("x")
    sweep(tmp_path / "out", lambda line: None)
    assert all((folder / "a.txt").exists() for folder in kept)
    assert foreign(kept[0]) == "a.txt"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (["options"], {}), (["splits"], {}), (["splits", "train"], []), (["files"], {"train.rows.bin": 3}),
        (["files"], []), (["options", "row_length"], "64"), (["options", "row_length"], 0),
        (["splits", "valid", "sources"], [1]), (["splits", "train", "padding"], None), (["tokenizer"], {}),
        (["unigram"], {"x": 1}), (["notes"], None),
    ],
)  # fmt: skip
def test_manifest_with_holes(source: Path, tmp_path: Path, where: list[str], value: Any) -> None:
    data = prepare(source, tmp_path / "out")
    manifest, place = changed_manifest(data, where, value)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Prepared.open(data.path)
    del place[where[-1]]
    (data.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json"):
        Prepared.open(data.path)
    assert len(prepare(source, data.path).train) == len(data.train)


@pytest.mark.parametrize("where", [["options", "vocab_size"], ["splits", "train", "unknown"]])
def test_manifest_with_an_empty_optional_entry(
    source: Path, tmp_path: Path, where: list[str]
) -> None:
    data = prepare(source, tmp_path / "out")
    changed_manifest(data, where, None)
    with pytest.raises(DataError, match=f"{where[-1]} holds NoneType"):
        Prepared.open(data.path)


def changed_manifest(data: Prepared, where: list[str], value: Any) -> tuple[dict[str, Any], Any]:
    """Write the manifest with another value at a place, without its digest; return it and the object of that place."""
    manifest = json.loads((data.path / "manifest.json").read_text())
    del manifest["digest"]
    place = manifest
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    (data.path / "manifest.json").write_text(json.dumps(manifest))
    return manifest, place


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "tokenizer/../../secret", "tokenizer/..", "train.bin"]
)
def test_manifest_that_names_files_elsewhere(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("s")
    data = prepare(source, tmp_path / "out")
    manifest = json.loads((data.path / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"] = {name: {"size": 1, "sha256": "0"}, **manifest["files"]}
    (data.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is not a file of prepared data"):
        Prepared.open(data.path)


def test_mutated_manifest_is_one_of_our_errors(source: Path, tmp_path: Path) -> None:
    data = prepare(source, tmp_path / "out")
    file = data.path / "manifest.json"
    whole = json.loads(file.read_text())
    file.write_text(file.read_text().replace('"duplicates": 0', '"duplicates": 1'))
    with pytest.raises(DataError, match="does not agree with its digest"):
        Prepared.open(data.path)
    del whole["digest"]

    def mutate(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            kept = node[key]
            for value in (None, -1, "x", [], {}, 2**70):
                node[key] = value
                file.write_text(json.dumps(whole))
                with suppress(PretrainError):
                    Prepared.open(data.path).table()
            node[key] = kept
            if isinstance(kept, dict | list):
                mutate(kept)

    mutate(whole)


def test_hidden_directories_of_others_are_left_alone(source: Path, tmp_path: Path) -> None:
    """One whose name began like that of unfinished work was deleted."""
    theirs = tmp_path / ".out.preparing-notes" / "notes.txt"
    killed = tmp_path / f".out.preparing-{'0a' * 6}" / "lock"
    for file in (theirs, killed):
        file.parent.mkdir()
        file.write_text("")
    prepare(source, tmp_path / "out")
    assert theirs.exists() and not killed.exists()


def test_what_a_killed_run_had_half_written_does_not_stay(tmp_path: Path) -> None:
    """The name of a file that is being written is a temporary one, which nobody renames after a kill."""

    def begin(work: Path) -> None:
        assert not list(work.glob(".pretrain-*"))
        (work / "manifest.json").write_text("{}")

    work = tmp_path / f".out.preparing-{'0' * 12}"
    work.mkdir()
    (work / ".pretrain-new-4946-88a2138b-journal.json").write_text("")
    build(tmp_path / "out", "0" * 64, print, lambda target: None, begin)
    assert os.listdir(tmp_path / "out") == ["manifest.json"]
