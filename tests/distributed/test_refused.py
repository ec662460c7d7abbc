"""What a user sees when the processes of a run do not fit together: one message, once, and exit code 2 from each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed.fault_table import Stage, events
from pretrain.data.prepare import prepare

Settings = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("refused"))
    options: dict[str, Any] = {"tokenizer": "wordpiece", "vocab_size": 90, "row_length": 16}
    prepare(
        made.folder / "text.txt",
        made.folder / "other",
        valid=0.4,
        separator="\n\n",
        workers=1,
        quiet=True,
        **options,
    )
    yield made
    made.close()


def other_rate(rank: int, plain: Settings) -> None:
    plain["optim"]["lr"] = (0.01, 0.02)[rank]


def other_data(rank: int, plain: Settings) -> None:
    plain["data"]["train"] = plain["data"]["train"].replace("data", ("data", "other")[rank])


def other_model(rank: int, plain: Settings) -> None:
    plain["model"]["overrides"]["num_layers"] = 2 + rank


def own_directory(rank: int, plain: Settings) -> None:
    plain["train"]["out"] = "runs/own"  # below the folder in which each works


def misspelt(rank: int, plain: Settings) -> None:
    plain["optim"]["lrr"] = 1


def no_data(rank: int, plain: Settings) -> None:
    plain["data"]["train"] += "-that-nobody-made"


def no_share(rank: int, plain: Settings) -> None:
    plain["train"]["batch_rows"] = 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_rate, ["Rank 1", "settings.optim.lr is 0.02 there, and 0.01 on rank 0"]),
        pytest.param(
            other_data, ["Rank 1", "data.fingerprint", "same prepared data"], marks=pytest.mark.slow
        ),
        pytest.param(
            other_model,
            ["Rank 1", "model", "same checkpoint and configuration"],
            marks=pytest.mark.slow,
        ),
        (own_directory, ["Rank 1", "does not see the run directory", "all hosts share"]),
        # The same for all, found before they meet, while they do, and after.
        (misspelt, ["'optim.lrr' is not a setting. Did you mean 'optim.lr'?"]),
        (no_data, ["no such file", "that-nobody-made"]),
        (no_share, ["7 rows", "cannot be split equally over 2 processes"]),
    ],
)
def test_one_message_is_said_once(
    stage: Stage, change: Callable[[int, Settings], None], words: list[str]
) -> None:
    out = stage.folder / change.__name__
    plain = json.loads(stage.config(out, "ddp").read_text())
    configs = stage.folder / "configs"
    shutil.rmtree(configs, ignore_errors=True)
    for rank in range(2):
        mine = json.loads(json.dumps(plain))
        change(rank, mine)
        (configs / str(rank)).mkdir(parents=True)
        (configs / str(rank) / "run.yaml").write_text(json.dumps(mine))
    alike = change in (misspelt, no_data, no_share)
    config = configs / ("0" if alike else "{rank}") / "run.yaml"
    stage.start(config, out, [], 2, 0, OWN=str(stage.folder / "own"))
    assert stage.launcher.wait(60) == 1
    said = stage.errors(out)
    assert said.count("error: ") == 1, said
    for word in words:
        assert word in said
    assert [one["code"] for one in events(out, "exit")] == [2, 2], said


def test_who_alone_is_wrong_says_so(stage: Stage) -> None:
    out = stage.folder / "alone"
    config = stage.config(out, "ddp")
    plain = json.loads(config.read_text())
    (stage.folder / "alone-0.yaml").write_text(json.dumps(plain))
    misspelt(1, plain)
    (stage.folder / "alone-1.yaml").write_text(json.dumps(plain))
    stage.start(Path(f"{out}-{{rank}}.yaml"), out, [], 2, 0)
    assert stage.launcher.wait(60) == 1
    said = stage.errors(out)
    assert said.count("error: ") == 1 and "'optim.lrr' is not a setting" in said
    assert {one["rank"]: one["code"] for one in events(out, "exit")}[1] == 2
