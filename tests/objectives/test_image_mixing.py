"""Mixup and CutMix in training: batches however they are split, targets beside an oracle, and none in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("PIL")

import pretrain
from contract import check_objective_resumes, check_row_randomness, check_sums
from pretrain.data.loader import Loader, row_rngs
from pretrain.errors import ConfigError
from pretrain.objectives.image_classification import ImageClassification
from pretrain.training.feed import Feed

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 8, "patch_size": 4}
NAMES = ("dark", "mid", "bright")


def rows_of(count: int = 24, *, several: bool = False) -> list[dict[str, Any]]:
    """Images that are as bright as their class."""
    rng, rows = np.random.default_rng(0), []
    for k in range(count):
        label: Any = np.asarray(k % 3)
        if several:
            label = np.asarray([k % 2, k % 3 == 0, 1], np.float32)
        image = np.clip(rng.normal(60 + 60 * (k % 3), 20, (8, 8)), 0, 255).astype(np.uint8)
        rows.append({"image": image, "labels": label})
    return rows


def task(rows: Any = None, **options: Any) -> ImageClassification:
    model = pretrain.build("vit", head="image-classification", labels=NAMES, **TINY)
    goal = ImageClassification(model, **options)
    goal.train_rows = rows
    return goal


def test_the_contract_of_objectives(tmp_path: Path) -> None:
    rows = rows_of()

    def build() -> ImageClassification:
        return task(rows, crop=0.9, mixup=0.2, cutmix=0.2)

    check_sums(build(), rows)
    check_row_randomness(build(), rows)
    check_objective_resumes(build, rows, tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_is_the_same_however_it_is_split(several: bool) -> None:
    rows = rows_of(several=several)
    goal = task(rows, mixup=0.8, cutmix=1.0, problem="multi_label" if several else "single_label")

    def step(micro: int, ranks: int) -> dict[str, torch.Tensor]:
        loader = Loader(rows, seed=4)
        feeds = [
            Feed(goal, loader, batch_rows=8, micro_rows=micro, share=(rank, ranks))
            for rank in range(ranks)
        ]
        parts = [batch for feed in feeds for batch in feed.step_at(40)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    whole = step(8, 1)
    assert ("targets" in whole) != several
    for micro, ranks in ((1, 1), (2, 1), (4, 2), (1, 4)):
        for key, value in step(micro, ranks).items():
            assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_targets_have_the_share_of_their_images(weights: list[float] | None) -> None:
    """The loss is that of both labels, each with its share and weight, added one after the other."""
    rows = rows_of()
    goal = task(rows, crop=1.0, mixup=1.0, cutmix=1.0, class_weights=weights, label_smoothing=0.1)
    plain = task(crop=1.0, class_weights=weights)
    batch = goal.train().collate(rows[:6], row_rngs(0, "collate", 0, 6))
    logits = goal.model(batch).detach()
    total = count = 0.0
    for i, rng in enumerate(row_rngs(0, "collate", 0, 6)):
        mixture = goal.mixing.draw(rng, len(rows), 8, 8)
        pair = [rows[i], rows[mixture.partner]]
        both = plain.collate(pair, row_rngs(0, "x", 0, 2))
        mixed = mixture(*both["pixel_values"])
        torch.testing.assert_close(batch["pixel_values"][i], mixed)
        for row, share in zip(pair, (mixture.share, 1 - mixture.share), strict=True):
            label = int(row["labels"])
            weight = share * (1.0 if weights is None else weights[label])
            loss = F.cross_entropy(logits[i], torch.tensor(label), label_smoothing=0.1)
            total, count = total + weight * float(loss), count + weight
    found = goal(batch)
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)
    assert float(found.count) == pytest.approx(count, rel=1e-5)
    assert float(goal.count(batch)) == float(found.count)


def test_evaluation_and_runs_without_it_are_as_before() -> None:
    rows, rngs = rows_of(), row_rngs(0, "collate", 3, 6)
    mixed, plain = task(rows, mixup=1.0), task(rows)
    one = mixed.collate(rows[:6], rngs, evaluation=True)
    other = plain.collate(rows[:6], row_rngs(0, "collate", 3, 6), evaluation=True)
    assert one.keys() == other.keys() == {"pixel_values", "labels", "keep_index"}
    assert all(torch.equal(one[key], other[key]) for key in one)
    own = plain.collate(rows[:6], row_rngs(0, "collate", 3, 6))
    changed = mixed.collate(rows[:6], row_rngs(0, "collate", 3, 6))
    assert torch.equal(own["labels"], changed["labels"])
    assert not torch.equal(own["pixel_values"], changed["pixel_values"])
    with pytest.raises(ConfigError, match="train_rows"):
        task(mixup=1.0).collate(rows[:2], rngs[:2])


def test_fine_tuning(tmp_path: Path) -> None:
    rows = [{"image": row["image"], "label": NAMES[int(row["labels"])]} for row in rows_of(32)]
    run = pretrain.finetune(
        pretrain.build("vit", **TINY), rows, task="image-classification", mixup=0.5, cutmix=0.5,
        limit="2 steps", batch_rows=8, micro_rows=2, device="cpu", valid=0.25, quiet=True,
        out=tmp_path / "run",
    )  # fmt: skip
    assert set(run.metrics) >= {"accuracy", "macro_f1", "loss"}
    assert run.predict(rows[0]["image"])["label"] in NAMES
