"""The small files of a run that name a choice are believed only where they hold."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.best import BEST, SWEEP, rates_of_run, write_choice
from pretrain.checkpoint.resolve import models_of_run


def chosen(run: Path) -> tuple[str, float | None]:
    return models_of_run(run)[0].name, rates_of_run(run).get("lr")


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
