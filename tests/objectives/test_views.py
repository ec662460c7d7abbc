"""Views of images: losses against plain formulas, shares of ranks, the average of MoCo, draws, and the contract."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("PIL")

from contract import check_objective_learns, check_objective_resumes, check_row_randomness
from distributed.torchrun import launch
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.data.loader import row_rngs
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.models import build
from pretrain.objectives import build_objective
from pretrain.objectives.views import LeJEPA, MoCo, SimCLR, gaussian_distance
from pretrain.training.trainer import Trainer

HERE = Path(__file__).parent
KINDS = ("LeJEPA", "MoCo", "SimCLR")
TINY: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "pooling": "mean",
}


def objective(kind: str, **options: Any) -> Any:
    return build_objective(kind, options, build("vit", None, **TINY), seed=3)


def rows(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Two views of each image, a bright row of pixels at the same height in both."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        views = rng.normal(0, 0.3, (2, 1, 8, 8)).astype(np.float32)
        views[:, :, i % 8] += 2 + i // 8
        found.append({"pixel_values": views})
    return found


def batch_of(goal: Any, count: int = 8) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = goal.collate(rows(count), row_rngs(0, "collate", 0, count))
    return found


@pytest.mark.parametrize("kind", ["LeJEPA", "MoCo", pytest.param("SimCLR", marks=pytest.mark.slow)])
def test_contract(kind: str, tmp_path: Path) -> None:
    check_row_randomness(objective(kind), rows(8))
    check_objective_learns(lambda: objective(kind), rows(8), tmp_path / "learn")
    check_objective_resumes(lambda: objective(kind), rows(16), tmp_path)


def plain_distance(points: np.ndarray, directions: np.ndarray) -> float:
    """The statistic of Epps and Pulley by loops over directions and knots, and numpy's trapezoidal sum."""
    found, knots = [], np.linspace(-3, 3, 33)
    for direction in directions.astype(np.float64):
        along = points.astype(np.float64) @ (direction / np.sqrt((direction**2).sum()))
        apart = [abs(np.exp(1j * t * along).mean() - np.exp(-t * t / 2)) ** 2 for t in knots]
        found.append(len(points) * np.trapezoid(apart * np.exp(-(knots**2) / 2), knots))
    return float(np.mean(found))


def test_the_distance_from_the_normal_distribution_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    points, directions = rng.normal(0.5, 2, (12, 3)), rng.normal(size=(5, 3))
    found = gaussian_distance(torch.tensor(points), torch.tensor(directions))
    assert float(found) == pytest.approx(plain_distance(points, directions), rel=1e-5)
    both = torch.tensor(np.stack([points, points + 1]))
    apart = [plain_distance(part.numpy(), directions) for part in both]
    mean = gaussian_distance(both, torch.tensor(directions))
    assert float(mean) == pytest.approx(np.mean(apart), rel=1e-5)
    # About 1 or less for what is normal, and in proportion to the number of points for what is not.
    normal, ones = rng.normal(size=(2000, 3)), np.ones((2000, 3))
    near, far = (
        gaussian_distance(torch.tensor(x), torch.tensor(directions)) for x in (normal, ones)
    )
    assert near < 3 < 100 < far


def scaled(features: torch.Tensor) -> torch.Tensor:
    """Features of all views of a batch as BatchNorm of torch scales them."""
    return F.batch_norm(features, None, None, training=True)


def plain_loss(goal: Any, batch: dict[str, torch.Tensor]) -> float:
    """The loss of each paper, pair by pair."""
    with torch.no_grad():
        views = batch["views"]
        hidden = goal.model.backbone({"pixel_values": views.flatten(0, 1)})
        z = goal.projector(scaled(hidden[:, 1:].mean(1))).double().view(len(views), 2, -1)
        if isinstance(goal, LeJEPA):
            apart = [
                plain_distance(z[:, v].numpy(), batch["directions"][:, 0].numpy()) for v in (0, 1)
            ]
            near = ((z - z.mean(1, keepdim=True)) ** 2).mean().item()
            return len(z) * ((1 - goal.weight) * near + goal.weight * float(np.mean(apart)))
        if isinstance(goal, MoCo):
            hidden = goal.average_backbone({"pixel_values": views.flatten(0, 1)})
            k = (
                goal.average_projector(scaled(hidden[:, 1:].mean(1)))
                .double()
                .view(len(views), 2, -1)
            )
            q = goal.predictor(z.float()).double()
            total = 0.0
            for i in range(len(z)):
                for a, b in ((0, 1), (1, 0)):
                    cosines = [
                        F.cosine_similarity(q[i, a], k[j, b], dim=0).item() for j in range(len(k))
                    ]
                    scores = np.array(cosines) / goal.temperature
                    total += goal.temperature * (np.log(np.exp(scores).sum()) - scores[i])
            return float(total)
        flat, total = z.flatten(0, 1), 0.0  # the views of an image stand beside each other
        for i, one in enumerate(flat):
            scores = {
                j: F.cosine_similarity(one, flat[j], dim=0).item() / goal.temperature
                for j in range(len(flat))
                if j != i
            }
            total += math.log(sum(map(math.exp, scores.values()))) - scores[i ^ 1]
        return total / 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_plain_formula(kind: str) -> None:
    goal = objective(kind)
    batch = batch_of(goal, 6)
    loss = goal(batch)
    assert int(loss.count) == 6 and goal.units(batch) == 6 * 2 * 4
    assert float(loss.total.detach()) == pytest.approx(plain_loss(goal, batch), rel=1e-4)
    figures = goal.summarize(
        float(loss.total.detach()), 6, {k: float(v) for k, v in loss.metrics.items()}, {}
    )
    assert set(figures) == set(goal.figures)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_of_ranks_add_up_to_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank compares its own rows with all of them; gradients reach the rows of the others."""
    goal = objective(kind).train()
    batch = batch_of(goal)
    gathered: list[torch.Tensor] = []

    def remember(value: torch.Tensor) -> tuple[torch.Tensor, int]:
        gathered.append(value)
        return value, 0

    monkeypatch.setattr(goal, "whole_batch", remember)
    whole = goal(batch)
    wanted = torch.autograd.grad(
        whole.total, [p for p in goal.parameters() if p.requires_grad], retain_graph=True
    )
    total = torch.zeros(())
    for first in (0, 4):
        values = iter(gathered)
        monkeypatch.setattr(goal, "whole_batch", lambda rows, v=values, f=first: (next(v), f))
        part = goal({key: value[first : first + 4] for key, value in batch.items()})
        total = total + part.total
    torch.testing.assert_close(total, whole.total, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(total, [p for p in goal.parameters() if p.requires_grad])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    launch(HERE / "views_worker.py", 2, str(tmp_path / "losses.pt"), kind)
    found = torch.load(tmp_path / "losses.pt")
    run = trainer(objective(kind), tmp_path / "one").fit()
    losses = torch.tensor([r["loss"] for r in run.history if "grad_norm" in r])
    for strategy in ("ddp", "fsdp"):
        torch.testing.assert_close(found[strategy], losses, rtol=1e-4, atol=1e-6)


def trainer(goal: Any, out: Path, strategy: Any = "auto", **options: Any) -> Trainer:
    return Trainer(
        goal,
        rows(16),
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        train=TrainConfig(out=str(out), limit="4 steps", batch_rows=8, precision="fp32", **options),
        parallel=ParallelConfig(device="cpu", threads=1, strategy=strategy),
        quiet=True,
    )


def test_the_average_begins_at_the_model_and_follows_it() -> None:
    goal = objective("MoCo", momentum=0.25)
    weight, average = goal.projector[0].weight, goal.average_projector[0].weight
    value = average.detach().clone() + 1  # no copy of the weights, as at the start of another seed
    with torch.no_grad():
        average.copy_(value)
    for step in range(6):
        with torch.no_grad():
            weight += 1
        goal.after_step()
        decay = min(0.25, (1 + step) / (10 + step))
        value = decay * value + (1 - decay) * weight.detach()
        torch.testing.assert_close(average, value)
    assert int(goal.steps) == 6
    assert not any(p.requires_grad for p in goal.average_backbone.parameters())
    assert not goal.model.backbone.embedding.projection.weight.requires_grad
    assert objective(
        "MoCo", freeze_patches=False
    ).model.backbone.embedding.projection.weight.requires_grad
    assert goal(batch_of(goal)).total.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_norm_takes_over_mean_and_scale_of_the_features(kind: str) -> None:
    goal = objective(kind).train()
    batch = batch_of(goal)
    with torch.no_grad():
        # As large as those of a trained model, beside which the constant in the normalisation is nothing.
        goal.model.backbone.final_norm.weight *= 30
        before = float(goal(batch).total)
        for _ in range(300):
            goal.after_step()
            after = float(goal(batch).total)
        pooled = goal.model.backbone({"pixel_values": batch["views"].flatten(0, 1)})[:, 1:].mean(1)
    variance, mean = torch.var_mean(pooled, dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(variance, torch.ones(16), rtol=1e-3, atol=0)
    if kind != "MoCo":  # whose average follows the model
        assert after == pytest.approx(before, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_began_without_it_keeps_its_norm(kind: str) -> None:
    goal = objective(kind).train()
    record = goal.record()
    assert record["centred"]
    goal.continue_from({key: value for key, value in record.items() if key != "centred"})
    before = goal.model.backbone.final_norm.weight.detach().clone()
    goal(batch_of(goal))
    with torch.no_grad():
        goal.after_step()
    assert torch.equal(goal.model.backbone.final_norm.weight, before)
    assert not goal.record()["centred"] and objective(kind).same_argument(
        "centred", False, True, ()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_images_depend_on_the_row_alone(kind: str) -> None:
    goal = objective(kind, crop=0.4, flip=True)
    images = [
        {"image": np.random.default_rng(i).integers(0, 255, (10, 12), np.uint8)} for i in (0, 1, 2)
    ]
    together = goal.collate(images, row_rngs(0, "collate", 0, 3))["views"]
    assert together.shape == (3, 2, 1, 8, 8)
    assert not torch.equal(together[:, 0], together[:, 1])
    alone = goal.collate(images[2:], row_rngs(0, "collate", 2, 1))["views"]
    assert torch.equal(alone[0], together[2])
    held = goal.collate(images, row_rngs(0, "collate", 0, 3), evaluation=True)["views"]
    assert torch.equal(held, together)  # without random crops the views would be equal


def test_patches_are_hidden(tmp_path: Path) -> None:
    goal = objective("LeJEPA", mask_ratio=0.5)
    batch = batch_of(goal)
    places = batch["visible_index"]
    assert places.shape == (8, 2, 2) and (places.diff(dim=-1) > 0).all() and places.max() == 3
    assert not torch.equal(places[:, 0], places[:, 1])  # each view shows others
    assert goal.units(batch) == 8 * 2 * 4
    assert goal.flops(64, 8, 4) < objective("LeJEPA").flops(64, 8, 4)
    # What is hidden does not count.
    hidden = torch.ones(8, 2, 4, dtype=torch.bool).scatter(2, places, False)
    apart = hidden.view(8, 2, 1, 2, 1, 2, 1).expand(8, 2, 1, 2, 4, 2, 4).reshape(8, 2, 1, 8, 8)
    loss = float(goal(batch).total.detach())
    batch["views"] = batch["views"] + 5 * apart
    assert float(goal(batch).total.detach()) == pytest.approx(loss, rel=1e-6)
    batch["views"] = batch["views"] + 5 * batch["views"].square()
    assert float(goal(batch).total.detach()) != pytest.approx(loss, rel=1e-3)
    check_row_randomness(goal, rows(8))
    check_objective_resumes(lambda: objective("LeJEPA", mask_ratio=0.5), rows(16), tmp_path)
    shape = {key: value for key, value in TINY.items() if key != "pooling"}
    whole = build("vit_mae", None, head=None, **shape)
    assert build_objective("LeJEPA", {"mask_ratio": 0.5}, whole)(batch).total.isfinite()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    labelled = build("vit", head="image-classification", labels=("a", "b"), **TINY)
    with pytest.raises(ModelError, match="without a head"):
        SimCLR(labelled)
    with pytest.raises(ModelError, match="Build the family vit"):
        LeJEPA(build("gpt2", None, vocab_size=40, num_layers=1, hidden_size=16, num_heads=2))
    for kind, options in (
        ("LeJEPA", {"views": 1}),
        ("LeJEPA", {"weight": 1.0}),
        ("LeJEPA", {"mask_ratio": 1.0}),
        ("SimCLR", {"temperature": 0.0}),
        ("MoCo", {"momentum": 1.0}),
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            objective(kind, **options)
    with pytest.raises(ConfigError, match="reads whole images only"):
        LeJEPA(build("resnet", "tiny"), mask_ratio=0.5)
    with pytest.raises(DataError, match=r"\(2, channels, height, width\)"):
        objective("SimCLR").collate(
            [{"pixel_values": np.zeros((1, 8, 8), np.float32)}] * 2, row_rngs(0, "collate", 0, 2)
        )
    with pytest.raises(ConfigError, match="micro_rows"):
        trainer(objective("LeJEPA"), tmp_path / "run", micro_rows=4).fit()


@pytest.mark.parametrize("kind", ["LeJEPA", "SimCLR", "MoCo"])
def test_jitter_changes_the_views_and_is_recorded(kind: str) -> None:
    made = objective(kind, jitter=0.3)
    assert made.augmentation.jitter == made.record()["jitter"] == 0.3
    assert made.pooling is None
