"""No file is written through a link that somebody has put where it will stand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pretrain
from faults import products
from pretrain import report
from pretrain.cli import main as cli
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import PretrainError
from pretrain.utils.files import open_writable, replace_file


def test_everything_is_written_without_following_links(
    made: tuple[Path, dict[str, Path], list[tuple[str, bool]]],
) -> None:
    work, _, opened = made
    inside = [(path, through) for path, through in opened if path.startswith(str(work))]
    own = {str(work / "text.txt"), str(work / "table.jsonl")}  # the test's
    assert {path for path, through in inside if through} == own
    written = {Path(path).name for path, _ in inside}
    assert any("log.jsonl" in name for name in written) and any("best.json" in n for n in written)


def test_links_of_every_name_that_a_run_has_lead_nowhere(
    made: tuple[Path, dict[str, Path], list[tuple[str, bool]]], tmp_path: Path
) -> None:
    """Also of temporary names that an observer has seen."""
    work, _, opened = made
    victims = tmp_path / "victims"
    victims.mkdir()
    count = 0
    for path in {path for path, _ in opened} | {
        str(p) for p in work.rglob("*") if p.is_file() and len(p.relative_to(work).parts) <= 2
    }:
        if not path.startswith(str(work)) or "run.lock" in path:
            continue
        place = tmp_path / "w" / Path(path).relative_to(work)
        names = [place, place.with_name(place.name + ".tmp"), place.with_name(place.name + ".new")]
        for name in names:
            # Of directories that must not exist yet, such as checkpoints, none is made.
            if name.parent.name in ("w", "pretrained", "tuned") and not os.path.lexists(name):
                name.parent.mkdir(parents=True, exist_ok=True)
                victim = victims / f"{count}"
                victim.write_bytes(b"precious")
                name.symlink_to(victim)
                count += 1
    assert count > 20
    for name in ("text.txt", "table.jsonl"):
        (tmp_path / "w" / name).unlink()
        (tmp_path / "w" / name).write_bytes((work / name).read_bytes())
    source = tmp_path / "w"
    products.prepare(source)
    pretrain.train(products.settings(source))
    report.write(source / "pretrained")
    pretrain.finetune(
        str(source / "pretrained"), products.rows(), task="classification", out=source / "tuned",
        limit="4 steps", lr="sweep", lrs=[1e-2], **products.QUICK,
    ).report()  # fmt: skip
    words = ["predict", str(source / "tuned"), str(source / "table.jsonl")]
    assert cli.main([*words, "--out", str(source / "answers.csv")]) == 0
    assert {path.read_bytes() for path in victims.iterdir()} == {b"precious"}
    assert not (source / "answers.csv").is_symlink()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "victim")
    from tiny import Rows, objective, trainer

    with pytest.raises(PretrainError):
        trainer(tmp_path / "run", objective(), Rows(8)).fit()
    assert (tmp_path / "victim").read_text() == "precious"


def test_writers_of_single_files(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    link.symlink_to(victim)
    replace_file(link, b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new"
    link.unlink()
    link.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        open_writable(link, keep=True)
    with open_writable(link) as file:
        file.write(b"x")
    assert not link.is_symlink()
    (tmp_path / "t").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "t" / name).symlink_to(victim)
    train_from_texts(["abc"], "char").save(tmp_path / "t")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("place", ["/dev/full", "/dev/null", "directory", "fifo"])
def test_devices_and_directories_are_not_replaced(tmp_path: Path, place: str) -> None:
    target = Path(place) if place.startswith("/") else tmp_path / place
    if place == "directory":
        target.mkdir()
    elif place == "fifo":
        os.mkfifo(target)
    before = os.lstat(target)
    with pytest.raises(OSError, match="directory|device"):
        replace_file(target, b"x")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OSError, match="directory|device"):
        replace_file(tmp_path / "link", b"x")
    assert os.lstat(target).st_ino == before.st_ino and len(os.listdir(tmp_path)) <= 2
