"""The learning-rate range test: what it suggests, when it stops, and what it leaves alone."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
from pretrain.cli.main import main
from pretrain.errors import ConfigError
from pretrain.training.lr_range import diverged, judged, running_mean, smooth

RATES = [10 ** (-6 + 6 * k / 99) for k in range(100)]


def bowl(rate: float) -> float:
    """A loss that falls around 1e-3 and rises from 1e-1."""
    return 5 - 2 / (1 + (1e-3 / rate)) + (rate / 1e-1) ** 2


def test_the_suggestion_lies_where_the_loss_falls_and_below_where_it_rises() -> None:
    found = judged(RATES, [bowl(rate) for rate in RATES], 100)
    assert found.lr is not None and 1e-3 <= found.lr <= 1e-2
    assert "falls fastest" in found.reason and "rises beyond" in found.reason
    assert found.plot().svg.count("polyline") == 2
    steep = judged(RATES[:60], [9.0] * 58 + [5.0, 1.0], 100)
    assert steep.lr == float(f"{RATES[59] / 3:.1e}") and "a third leaves room" in steep.reason


@pytest.mark.parametrize("loss", [lambda k: 5.0, lambda k: 5.0 + k, lambda k: math.nan])
def test_without_a_fall_nothing_is_suggested(loss: Any) -> None:
    found = judged(RATES, [loss(k) for k in range(100)], 100)
    assert found.lr is None and "fell at none of the rates" in found.reason


def test_divergence_is_a_rise_of_the_running_mean_and_not_one_bad_batch() -> None:
    falling = [5 - k / 20 for k in range(60)]

    def ends(*losses: float) -> bool:
        return diverged(running_mean([*falling, *losses], 100))

    assert not ends() and not ends(3.5) and ends(*[6.0] * 10) and ends(math.inf)
    assert not diverged([])


@pytest.mark.parametrize("steps", [20, 30, 100, 400])
def test_what_is_suggested_does_not_depend_on_the_number_of_steps(steps: int) -> None:
    draw = random.Random(1)
    rates = [10 ** (-6 + 6 * k / (steps - 1)) for k in range(steps)]
    losses = [bowl(rate) + draw.gauss(0, 0.02) for rate in rates]
    found = judged(rates, losses, steps)
    assert found.lr is not None and 4e-4 < found.lr < 3e-3, found
    lowest = rates[min(range(steps), key=smooth(losses, steps).__getitem__)]
    assert 4e-3 < lowest < 5e-2  # that of the curve is 0.02; a running mean is lowest at 0.06


def text(folder: Path) -> Path:
    draw = random.Random(0)
    words = ["ship", "sea", "wind", "salt", "rope", "sail", "deck", "mast", "gull", "tide"]
    path = folder / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=10)) for _ in range(200)))
    return path


def test_a_range_test_leaves_the_run_and_the_random_state_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "data": {"train": str(text(tmp_path)), "cache": str(tmp_path / "c"), "vocab_size": 280, "row_length": 32},
        "model": {"family": "gpt2", "size": "tiny", "overrides": {"hidden_size": 32, "max_positions": 32}},
        "train": {"out": str(tmp_path / "run"), "batch_rows": 8},
        "parallel": {"device": "cpu"},
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("kept")
    before, torch_state = sorted(tmp_path.iterdir()), torch.get_rng_state()
    found = pretrain.lr_range_test(settings, steps=40, highest=100.0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]
    assert set(tmp_path.iterdir()) - set(before) == {tmp_path / "c"}
    assert found.lr is not None and 1e-4 < found.lr < 1 and len(found.rates) < 40, found
    assert found.rates[0] == pytest.approx(1e-6)
    steps = [math.log(b / a) for a, b in zip(found.rates, found.rates[1:], strict=False)]
    assert steps == pytest.approx([math.log(1e8) / 39] * len(steps))
    again = pretrain.lr_range_test(settings, steps=40, highest=100.0)
    assert again.losses == found.losses
    assert "lr 1e-06" in capsys.readouterr().err
    # The learning rate of the settings is not used: AdamW's may be 0, and Muon's is a multiple of it.
    assert pretrain.lr_range_test(settings, steps=40, highest=100.0, lr=0).losses == found.losses
    muon = pretrain.lr_range_test(
        settings, optim={"name": "muon", "lr": 0.01, "muon_lr": 0.2}, steps=20
    )
    assert muon.lr is not None and muon.muon_lr == pytest.approx(20 * muon.lr)
    assert muon.suggested == {"optim.lr": muon.lr, "optim.muon_lr": muon.muon_lr}
    assert found.muon_lr is None and found.suggested == {"optim.lr": found.lr}
    with pytest.raises(ConfigError, match=r"muon_lr in proportion to optim\.lr, which is 0"):
        pretrain.lr_range_test(settings, optim={"name": "muon", "lr": 0})
    with pytest.raises(ConfigError, match=r"at least 10 steps, .* highest=1\.0, steps=3"):
        pretrain.lr_range_test(settings, steps=3)


def test_the_command_writes_a_picture_and_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text(tmp_path)
    words = "--data.train text.txt --data.cache c --data.vocab_size 280 --data.row_length 32 --model.family gpt2"
    more = "--model.size tiny --train.batch_rows 4 --steps 30 --highest 10 --parallel.device cpu"
    asked = ["lr-range", *words.split(), *more.split()]
    for picture, why in (("lr.png", "must end in .svg"), ("no/lr.svg", "that does not exist")):
        assert main([*asked, "--plot", picture]) == 2
        shown = capsys.readouterr()
        assert picture in shown.err and why in shown.err and "step" not in shown.err
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "suggested: --optim.lr 0.0" in shown and "picture: lr-range.svg" in shown
    assert (tmp_path / "lr-range.svg").read_text().startswith("<svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "lr-range.svg", "text.txt"]


def test_the_suggestion_is_printed_although_the_picture_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    found = judged(RATES, [bowl(rate) for rate in RATES], 100)
    monkeypatch.setattr("pretrain.training.lr_range.lr_range_test", lambda *_, **__: found)
    monkeypatch.setattr("pretrain.utils.files.replace_file", full)
    monkeypatch.chdir(tmp_path)
    assert main(["lr-range", "--data", "a.txt"]) == 2
    shown = capsys.readouterr()
    assert f"suggested: --optim.lr {found.lr:g}" in shown.out
    assert "No space left on device" in shown.err and "Traceback" not in shown.err
