"""The classical baseline of object detection: what it finds, where it finds nothing, and that a run says its figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("sklearn")

import pretrain
from pretrain.data.tables import Table
from pretrain.finetuning.remarks import remarks
from pretrain.metrics import detection_precision
from pretrain.objectives.object_detection import ObjectDetection
from pretrain.objectives.regions import region_boxes

NAMES = ("dark", "light")


def discs(count: int, seed: int, side: int = 64) -> list[dict[str, Any]]:
    """Images of noise with three discs, dark or light, in different rows; some of them touch."""
    rng, rows = np.random.default_rng(seed), []
    across, down = np.meshgrid(np.arange(side), np.arange(side))
    for _ in range(count):
        image = rng.integers(100, 156, (side, side, 3), dtype=np.uint8)
        boxes, labels = [], []
        for part in range(3):
            radius, k = int(rng.integers(6, 10)), int(rng.integers(2))
            x, y = int(rng.integers(10, side - 10)), 10 + 21 * part
            image[(across - x) ** 2 + (down - y) ** 2 <= radius**2] = (20, 230)[k]
            boxes.append([x - radius, y - radius, x + radius + 1, y + radius + 1])
            labels.append(NAMES[k])
        rows.append({"image": image, "boxes": boxes, "label": labels})
    return rows


def table(rows: list[dict[str, Any]]) -> Any:
    found = ObjectDetection.gathered(ObjectDetection.read(rows), {})
    return ObjectDetection.tidy(found, ObjectDetection.learn(found, {"labels": list(NAMES)}), {})


def precision(train: list[dict[str, Any]], held: list[dict[str, Any]]) -> Any:
    images = region_boxes(table(train), table(held), NAMES)
    assert len(images) == len(held)
    return detection_precision(images, 2, (0.5,))[0]


def test_discs_are_found_and_told_apart() -> None:
    train, held = discs(30, 0), discs(12, 1)
    assert precision(train, held).min() > 0.9
    # In pixels of the images, which are scaled down here.
    large = [
        {
            "image": row["image"].repeat(4, 0).repeat(4, 1),
            "boxes": (4 * np.array(row["boxes"])).tolist(),
            "label": row["label"],
        }
        for row in held
    ]
    assert precision([*train, *large], large).min() > 0.8
    # What it says is what it was told; the right boxes come behind the wrong ones then.
    swapped = [{**row, "label": [NAMES[1 - NAMES.index(k)] for k in row["label"]]} for row in train]
    assert precision(swapped, held).max() < 0.6


def test_images_without_objects_and_nothing_to_learn() -> None:
    empty = {"image": np.full((64, 64, 3), 128, np.uint8), "boxes": [], "label": []}
    images = region_boxes(table(discs(20, 0)), table([empty, *discs(1, 1)]), NAMES)
    assert images[0][0].shape == (0, 5) and images[1][0].shape == (3, 5)
    assert all(found.shape[1] == 6 for _, found in images)
    assert np.all(np.diff(images[1][1][:, 4]) <= 0)  # best first
    one = {**empty, "boxes": [[0, 0, 64, 64]], "label": ["dark"]}
    assert region_boxes(table([one]), table([one]), NAMES) == []


def test_a_run_says_that_it_is_better(tmp_path: Path) -> None:
    model = pretrain.build(
        "resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=64,
    )  # fmt: skip
    result = pretrain.finetune(
        model, discs(24, 0), "object-detection", valid=discs(8, 1), limit="1 steps", batch_rows=4,
        device="cpu", quiet=True, out=tmp_path / "run",
    )  # fmt: skip
    assert result.classical is not None and result.classical > 0.8
    (line,) = [line for line in result.remarks if "classical" in line]
    assert "regions of pixels with logistic regression on the same rows has ap50 " in line
    result.metrics["ap50"] = 1.0
    assert not any("classical" in line for line in remarks(result))


def test_many_classes_and_regions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def compared(found: np.ndarray) -> np.ndarray:
        seen.append(len(found))
        return found[:0]

    monkeypatch.setattr("pretrain.metrics.without_overlap", compared)
    monkeypatch.setattr("pretrain.objectives.regions._MOST", 5)
    taken: list[int] = []
    whole = Table.take

    def take(self: Table, rows: Any) -> Table:
        taken.append(len(rows))
        return whole(self, rows)

    monkeypatch.setattr(Table, "take", take)
    train, held = table(discs(24, 0)), table(discs(2, 1))
    taken.clear()
    region_boxes(train, held, NAMES, images=24)
    assert seen == [5, 5] and taken[0] == 12
