"""The table of sizes: parameters are those of the models, figures are those of sizes.json, nothing is invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pretrain
from pretrain.cli import main as cli
from pretrain.errors import ConfigError
from pretrain.models import family_class
from pretrain.models.config import SIZES
from pretrain.training import sizes as module

FIGURES = json.loads(Path(module.__file__).with_name("sizes.json").read_text())["figures"]


def test_the_table_of_a_family() -> None:
    found = pretrain.sizes("modernbert")
    assert [row.name for row in found.rows] == list(SIZES)
    for small, large in zip(found.rows[:-1], found.rows[1:], strict=True):
        assert small.parameters < large.parameters and small.memory < large.memory
    tiny = pretrain.build("modernbert", "tiny", vocab_size=8192)
    assert found.rows[0].parameters == tiny.num_parameters()
    # Weights, gradients and two moments in fp32 alone take 16 bytes for each parameter.
    assert all(row.memory > 16 * row.parameters for row in found.rows)
    text = str(found)
    assert text.count("not measured") == sum(
        (row.seconds is None) + (row.loss is None) for row in found.rows
    )
    assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(ConfigError, match="'gpt2'"):
        pretrain.sizes("gtp2")


@pytest.mark.parametrize("family", ["vit", "resnet", "clip"])
def test_families_of_images_have_sizes_of_their_own(family: str) -> None:
    found = pretrain.sizes(family)
    assert [row.name for row in found.rows] == list(family_class(family).config_class.size_names())
    model = pretrain.build(family, found.rows[0].name, device="meta")
    assert found.rows[0].parameters == sum(p.numel() for p in model.parameters())
    said = " ".join(str(found).split())
    assert "images of 224 x 224 pixels" in said and "32 images in a forward pass." in said
    assert "vocabulary" not in said and "WikiText" not in said


def test_families_of_audio_have_sizes_of_their_own() -> None:
    said = " ".join(str(pretrain.sizes("audio-spectrogram-transformer")).split())
    assert "audio of 1,024 frames of 128 mel bands" in said
    assert "32 recordings in a forward pass." in said


def test_figures_are_those_that_were_measured(capsys: Any, monkeypatch: Any) -> None:
    assert all(set(of) <= set(SIZES) for of in FIGURES.values()) and "gpt2" in FIGURES
    found = pretrain.sizes("gpt2")
    for row in found.rows:
        figures = FIGURES["gpt2"].get(row.name, {"seconds": None, "loss": None})
        assert {"seconds": row.seconds, "loss": row.loss} == figures
    monkeypatch.setattr(module, "sizes", {"gpt2": found}.get)
    for words in (["--model", "gpt2:?"], ["--size", "?", "--model.family=gpt2"]):
        assert cli.main(["train", *words]) == 0
        shown = capsys.readouterr().out
        assert shown == f"{found}\n" and "not measured" in shown
