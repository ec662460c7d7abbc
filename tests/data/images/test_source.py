"""Rows of images for pre-training: sizes of new models, order of the classes, and duplicates of held-out images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from pretrain.data.images.source import labelled_images
from pretrain.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def stored(path: Path, count: int = 20, side: int = 8, copies: int = 1) -> str:
    images = RNG.integers(0, 256, (count, side, side), dtype=np.uint8).repeat(copies, axis=0)
    np.savez(path / "a.npz", images=images, labels=np.arange(count).repeat(copies) % 4)
    return str(path / "a.npz")


@pytest.mark.parametrize(
    ("side", "scaled", "patch"),
    [(8, 8, 1), (28, 28, 4), (30, 30, 3), (31, 24, 3), (128, 128, 16), (223, 216, 27), (224, 224, 16), (384, 384, 16)],
)  # fmt: skip
def test_a_new_model_has_at_most_16_patches_along_a_side(
    side: int, scaled: int, patch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = labelled_images(stored(tmp_path), size=side)
    assert rows.overrides["image_size"] == scaled and rows.processor.size == (scaled, scaled)
    assert rows.overrides["patch_size"] == patch
    assert (f"scaled to {scaled} x {scaled}" in capsys.readouterr().err) == (side != scaled)


@pytest.mark.parametrize("size", [0, -8, 8.0])
def test_a_size_that_is_no_size_is_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"data.source_args.size is {size}"):
        labelled_images(stored(tmp_path), size=size)


def test_training_rows_that_are_also_held_out_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = labelled_images(stored(tmp_path, copies=2), 0.25)
    held, trained = (
        {np.asarray(r["image"]).tobytes() for r in part} for part in (rows.valid, rows.train)
    )
    assert held and trained and not held & trained
    assert "training rows also stand in the validation rows" in capsys.readouterr().err


def test_given_labels_keep_their_order(tmp_path: Path) -> None:
    source = stored(tmp_path)
    usual, turned = labelled_images(source), labelled_images(source, labels=["3", "1", "2", "0"])
    assert turned.overrides["labels"] == ("3", "1", "2", "0")
    names = [
        [rows.overrides["labels"][int(row["labels"])] for row in rows.train]
        for rows in (usual, turned)
    ]
    assert names[0] == names[1] and len(set(names[0])) == 4
    with pytest.raises(DataError, match="classes of the checkpoint"):
        labelled_images(source, labels=["a", "b"])
