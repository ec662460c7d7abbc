"""Runs and evaluations on rows of images whose classes, sizes or files do not fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

import pretrain
from pretrain.data.images.source import labelled_images
from pretrain.errors import ConfigError, DataError
from pretrain.training.run import evaluate

RNG = np.random.default_rng(0)
NAMES = ["top", "bottom", "left", "right"]
MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "patch_size": 4}


def stored(path: Path, names: list[str], count: int = 40) -> str:
    images = RNG.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    labels = np.arange(count) % len(names)
    np.savez(path, images=images, labels=labels, class_names=names)
    return str(path)


def sections(source: str, out: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "data": {"source": "images", "source_args": {"train": source}},
        "model": {"family": "vit", "overrides": MODEL},
        "objective": {"class_path": "ImageClassification"},
        "train": {"out": str(out), "limit": "1 steps", "batch_rows": 4},
        "parallel": {"device": "cpu"},
    }
    return found | changes


def test_classes_in_another_order_or_number_are_refused(tmp_path: Path) -> None:
    source = stored(tmp_path / "a.npz", NAMES)
    for k, labels in enumerate((NAMES[::-1], NAMES[:2], [*NAMES, "middle"])):
        model = pretrain.build("vit", head="image-classification", labels=labels, image_size=8, **MODEL)  # fmt: skip
        model.save(tmp_path / f"model-{k}")
        start = {"checkpoint": str(tmp_path / f"model-{k}")}
        with pytest.raises(DataError, match=f"top, bottom, left, right, .*{', '.join(labels)}"):
            pretrain.train(sections(source, tmp_path / f"run-{k}", model=start))
        with pytest.raises(DataError, match=f"top, bottom, left, right, .*{', '.join(labels)}"):
            evaluate(tmp_path / f"model-{k}", labelled_images(source))
    turned = {"source": "images", "source_args": {"train": source, "labels": NAMES[::-1]}}
    start = {"checkpoint": str(tmp_path / "model-0")}
    run = pretrain.train(sections(source, tmp_path / "run", model=start, data=turned))
    assert pretrain.load(run.checkpoint, quiet=True).labels == tuple(NAMES[::-1])
    assert pretrain.evaluate(tmp_path / "run")["targets"] == 4


def test_changed_rows_of_a_run_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stored(tmp_path / "a.npz", NAMES)
    pretrain.train(sections(source, tmp_path / "run"))
    for count, said in ((None, False), (44, True)):
        if count:
            stored(tmp_path / "a.npz", NAMES, count)
        capsys.readouterr()
        pretrain.evaluate(tmp_path / "run")
        assert ("have changed since the model was trained" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, r"image_size is 64, .* returns 8\. .*data\.source_args\.size=64"),
        ({"num_channels": 1}, r"num_channels is 1, .* returns 3\. .*data\.source_args\.channels=1"),
    ],
)
def test_sizes_that_the_rows_do_not_have_are_refused(
    change: dict[str, int], message: str, tmp_path: Path
) -> None:
    model = {"family": "vit", "overrides": {**MODEL, **change}}
    with pytest.raises(ConfigError, match=message):
        pretrain.train(sections(stored(tmp_path / "a.npz", NAMES), tmp_path / "run", model=model))
