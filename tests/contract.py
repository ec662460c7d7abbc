"""What every model and every objective must do; ``check_model`` and ``check_objective`` take a function that builds it.

Shapes, initial statistics, a gradient for every parameter, one batch learned by heart, equal after saving and
loading, the same weights from the same seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.data.loader import row_rngs
from pretrain.models import FAMILIES, family_class
from pretrain.models.base import Model
from pretrain.models.heads import LABELLED
from pretrain.objectives import Objective
from pretrain.training.trainer import Hook, Trainer

Build = Callable[..., Model]
TEXT_FAMILIES = [name for name in FAMILIES if family_class(name).processor_class is None]


def reads_images(model: Model) -> bool:
    return hasattr(model.backbone.config, "image_size")


def batch_for(model: Model, rows: int = 4, tokens: int = 12) -> dict[str, Tensor]:
    """Random rows, the last one padded on the right; random images for a family that reads those."""
    generator = torch.Generator().manual_seed(0)
    if reads_images(model):
        config = model.backbone.config
        shape = (rows, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    if hasattr(model.backbone.config, "num_mel_bins"):
        shape = (rows, *model.backbone.random_batch(generator)["input_values"].shape[1:])
        return {"input_values": torch.randn(shape, generator=generator)}
    pad = model.backbone.config.pad_id or 0
    ids = torch.randint(4, model.backbone.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    return {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}


def loss_of(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy against fixed random answers, on real tokens."""
    logits = model(batch)
    real = batch.get("attention_mask")
    if real is not None and logits.shape[:2] == real.shape:
        logits = logits[real.bool()]
    elif logits.ndim == 3:
        logits = logits.flatten(0, 1)
    targets = torch.arange(logits.shape[0]) * 7 % logits.shape[-1]
    return F.cross_entropy(logits, targets)


def check_model(build: Build, outputs: int | None = None) -> None:
    """Run every check on models that ``build(seed=...)`` makes.

    Args:
        build: returns a fresh model on the CPU.
        outputs: size of the last dimension of the output; not checked when None.
    """
    check_shapes(build(seed=0), outputs)
    check_seed(build)
    check_init(build(seed=0))
    check_gradients(build(seed=0))
    check_save_and_load(build)
    check_checkpointing(build(seed=0))
    check_overfit(build(seed=0))


def check_shapes(model: Model, outputs: int | None) -> None:
    model.eval()
    batch = batch_for(model)
    out = model(batch)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    if outputs is not None:
        assert out.shape[-1] == outputs
    rows = len(next(iter(batch.values())))
    if model.head_kind in {*LABELLED} - {"token-classification"}:
        assert out.shape[:-1] == (rows,)
    elif "input_ids" in batch:
        assert out.shape[:-1] == batch["input_ids"].shape
    else:
        assert out.shape[0] == rows
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and not parameter.is_meta


def check_seed(build: Build) -> None:
    torch.manual_seed(1)
    first = build(seed=3).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = build(seed=3).state_dict()
    torch.set_rng_state(state)
    assert all(torch.equal(first[n], second[n]) for n in first)
    third = build(seed=4).state_dict()
    assert any(not torch.equal(first[n], third[n]) for n in first)


def check_init(model: Model) -> None:
    std = model.backbone.config.initializer_range
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        assert torch.isfinite(value).all(), name
        if value.ndim < 2:
            assert bool((value == (1.0 if name.endswith("weight") else 0.0)).all()), name
        elif value.numel() > 1000 and not name.startswith("head."):
            # Families of images keep the variance of their inputs (Xavier's or He's initialisation).
            fans = value[0].numel(), value[:, 0].numel()
            limit = std if model.backbone.vocab_size else max(std, (2 / min(fans)) ** 0.5)
            assert abs(float(value.mean())) < 5 * limit / value.numel() ** 0.5 + 1e-4, name
            assert float(value.std()) < 1.1 * limit, name


def check_gradients(model: Model) -> None:
    """Every parameter is reached, positions and segments that no row has aside."""
    batch = batch_for(model)
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), name
        zero_by_symmetry = name.endswith("attention.key.bias") and not hasattr(
            model.backbone, "rotary"
        )
        if not zero_by_symmetry:
            assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


def check_save_and_load(build: Build) -> None:
    model, other = build(seed=0).eval(), build(seed=1).eval()
    report = other.load_disk_state(model.disk_state())
    assert not report.missing and not report.unexpected
    kept = other.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    batch = batch_for(model)
    assert torch.equal(model(batch), other(batch))
    if type(model.backbone).__module__.startswith("pretrain."):
        fresh = Model.from_hf_config(model.hf_config())
        assert all(p.is_meta for p in fresh.parameters())
        fresh.load_disk_state(model.disk_state())
        assert torch.equal(model(batch), fresh.eval()(batch))
        assert fresh.hf_config() == model.hf_config()


def check_checkpointing(model: Model) -> None:
    """Recomputing activations changes no gradient."""
    batch = batch_for(model)
    grads = []
    for mode in ("off", "full", "selective"):
        model.zero_grad()
        torch.manual_seed(0)  # a head may have dropout
        model.backbone.set_activation_checkpointing(mode)
        loss_of(model.train(), batch).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    plain, *others = grads
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def check_overfit(model: Model, steps: int = 100) -> None:
    """One batch is learned by heart; of random labels of single tokens some draws take more than 60 steps."""
    batch = batch_for(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        first = float(loss.detach()) if first is None else first
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.2 * first:
            return
    raise AssertionError(f"one batch is not learned: {first:.3f} -> {float(loss):.3f}")


def check_objective(build: Callable[[], Objective], rows: Any, out: Path) -> None:
    """Run every check on an objective that ``build()`` makes around a fresh model.

    Args:
        build: returns a fresh objective on the CPU, the same at every call.
        rows: at least eight training examples.
        out: an empty directory.
    """
    check_sums(build(), rows)
    check_row_randomness(build(), rows)
    check_objective_learns(build, rows, out / "overfit")
    check_objective_resumes(build, rows, out)


def check_sums(objective: Objective, rows: Any) -> None:
    """Loss and count are sums: two halves add up to the whole."""
    objective.eval()
    rngs = row_rngs(0, "collate", 0, 8)
    whole = objective(objective.collate([rows[i] for i in range(8)], rngs))
    total, count = 0.0, 0.0
    for start in (0, 4):
        part = objective.collate(
            [rows[i] for i in range(start, start + 4)], row_rngs(0, "collate", start, 4)
        )
        assert int(objective.count(part)) > 0
        loss = objective(part)
        total, count = total + float(loss.total.detach()), count + float(loss.count)
    if not objective.couples_examples:
        torch.testing.assert_close(torch.tensor(total), whole.total, rtol=1e-4, atol=1e-4)
        assert count == float(whole.count)


def check_row_randomness(objective: Objective, rows: Any) -> None:
    """What is drawn for a row depends on its own generator alone; beside longer rows it may be padded on the right."""
    rngs = row_rngs(0, "collate", 0, 4)
    together = objective.collate([rows[i] for i in range(4)], rngs)
    alone = objective.collate([rows[2]], row_rngs(0, "collate", 2, 1))
    for key, value in alone.items():
        if value.ndim >= 2 and key in together:
            own = tuple(slice(size) for size in value[0].shape)
            assert torch.equal(value[0], together[key][2][own]), key


def check_objective_learns(build: Callable[[], Objective], rows: Any, out: Path) -> None:
    """A gradient reaches every trainable parameter, and a few rows are learned by heart."""
    objective = build()
    objective.train()
    loss = objective(objective.collate([rows[i] for i in range(8)], row_rngs(0, "collate", 0, 8)))
    loss.total.backward()
    for name, p in objective.named_parameters():
        assert not p.requires_grad or p.grad is not None, f"no gradient reaches {name}"
    steps: list[float] = []
    few = [rows[i] for i in range(8)]
    fit = _trainer(build(), few, out, "80 steps", lr=2e-2, save_every="0 steps")
    fit.hooks = [Hook(lambda record: steps.append(record["loss"]))]
    fit.fit()
    assert min(steps[-8:]) < 0.8 * steps[0]


def check_objective_resumes(build: Callable[[], Objective], rows: Any, out: Path) -> None:
    """Six steps equal four of which three are saved, new objects, and the other three: bit for bit."""
    whole = _trainer(build(), rows, out / "whole", "6 steps").fit()
    _trainer(build(), rows, out / "cut", "6 steps", stop_after=4)
    assert [path.name for path in (out / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    cut = _trainer(build(), rows, out / "cut", "6 steps").fit()
    assert whole.checkpoint is not None and cut.checkpoint is not None
    files = [run.checkpoint / "model.safetensors" for run in (whole, cut)]  # type: ignore[operator]
    assert files[0].read_bytes() == files[1].read_bytes()


class _Stop(Exception):
    """Ends a run in the middle."""


def _trainer(
    objective: Objective,
    rows: Any,
    out: Path,
    limit: str,
    *,
    lr: float = 1e-3,
    stop_after: int = 0,
    save_every: str = "3 steps",
) -> Trainer:
    def strike(record: Any) -> None:
        if record["step"] == stop_after:
            raise _Stop

    trainer = Trainer(
        objective,
        rows,
        optim=OptimConfig(lr=lr),
        train=TrainConfig(
            out=str(out), limit=limit, batch_rows=8, save_every=save_every, keep=1, precision="fp32"
        ),
        parallel=ParallelConfig(device="cpu"),
        hooks=[Hook(strike)],
    )
    if stop_after:
        with contextlib.suppress(_Stop):
            trainer.fit()
    return trainer
